//! From the kernel's records to the engine's own view of a process: exactly what `kernel::survey` finds through /proc.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use criu_common::survey as record;
use nix::unistd::Pid;

use super::survey::{Named, TaskRecords};
use super::{EbpfResult, EbpfSurvey};
use crate::kernel::proc::Shown;
use crate::kernel::survey::{Descriptor, Facts, PAGE, VmFlags, Vma, VmaName};

/// Filesystems whose files may have others behind them: a mapping then shows the file behind to the kernel, and the file
/// in front to a reader of /proc (`file_user_path` in fs/proc/task_mmu.c).
const STACKED: [&str; 3] = ["overlay", "fuse", "fuseblk"];

/// include/linux/mm.h
const VM_MAYSHARE: u64 = 0x80;

impl EbpfSurvey {
    /// The areas of a process, as [`crate::kernel::survey::vmas_of`] gives them, but for `[vsyscall]`, which lies outside
    /// the address space. `None` where only /proc can tell (a process that sees stacked filesystems), and where there is
    /// no memory left.
    pub fn areas(&mut self, pid: Pid) -> EbpfResult<Option<Vec<Vma>>> {
        match self.tasks_of(pid)? {
            Some(tasks) => self.areas_by(pid, &tasks),
            None => Ok(None),
        }
    }

    /// The same by what is known of its threads and its memory.
    pub fn areas_by(&mut self, pid: Pid, tasks: &TaskRecords) -> EbpfResult<Option<Vec<Vma>>> {
        let Some(mm) = &tasks.mm else { return Ok(None) };
        let namespaces = tasks.threads.first().map_or(0, |thread| thread.nsproxy);
        if *self.stacked.entry(namespaces).or_insert_with(|| sees_stacked_filesystem(pid)) {
            return Ok(None);
        }
        let records = self.vmas_of(pid)?;
        Ok(Some(records.iter().map(|vma| area(vma, mm)).collect()))
    }

    /// The descriptors of processes, as [`crate::kernel::survey::descriptors_of`] gives them by the names in /proc.
    pub fn descriptors(&mut self, processes: &[Shown]) -> EbpfResult<BTreeMap<Pid, Vec<Descriptor>>> {
        let mut numbers: HashMap<u64, u32> = HashMap::new();
        let mut all = BTreeMap::new();
        for process in processes {
            let by = process.by.as_raw().unsigned_abs();
            let leader_lives = process.by == process.pid;
            let mut mine = Vec::new();
            for file in self.files_of(process.pid)? {
                // A thread's own table is not the process's.
                if file.record.tid == if leader_lives { 0 } else { by } {
                    let next = numbers.len() as u32 + 1;
                    let description = *numbers.entry(file.record.file).or_insert(next);
                    mine.push(Descriptor { fd: file.record.fd as i32, description, facts: Some(facts(&file)) });
                }
            }
            all.insert(process.by, mine);
        }
        Ok(all)
    }
}

fn facts(file: &Named<record::File>) -> Facts {
    let Named { record, text } = file;
    let of_exec = if record.cloexec == 0 { 0 } else { libc::O_CLOEXEC as u32 };
    Facts {
        flags: record.flags & !(libc::O_CLOEXEC as u32) | of_exec,
        pos: record.pos,
        mount: (record.mount != 0).then_some(record.mount.into()),
        may_have_owner: record.has_owner != 0,
        may_have_locks: record.has_locks != 0,
        link: (!text.is_empty()).then(|| OsStr::from_bytes(text).into()),
    }
}

/// True as well where it cannot be told. The kernel marks a file that is behind another, with a bit that has another
/// place from one version to the next and is in no BTF.
fn sees_stacked_filesystem(pid: Pid) -> bool {
    let Ok(mounts) = std::fs::read_to_string(format!("/proc/{pid}/mountinfo")) else { return true };
    mounts.lines().any(|line| {
        let kind = line.split_once(" - ").and_then(|(_, rest)| rest.split(' ').next()).unwrap_or_default();
        STACKED.contains(&kind) || kind.starts_with("fuse.")
    })
}

fn area(vma: &Named<record::Vma>, mm: &record::Mm) -> Vma {
    let record = &vma.record;
    let has_file = record.file != 0;
    let mut flags = VmFlags::from_bits_truncate(record.flags);
    // A shared mapping of a file that was opened for reading only loses VM_SHARED, and shows as shared nevertheless.
    flags.set(VmFlags::SHARED, record.flags & VM_MAYSHARE != 0);
    Vma {
        start: record.start,
        end: record.end,
        flags,
        // Of an anonymous area it is its address at first, and nothing to a reader of /proc.
        offset: if has_file { record.pgoff * PAGE } else { 0 },
        dev: if has_file { device(record.dev) } else { 0 },
        ino: record.ino,
        name: name(vma, mm),
    }
}

/// The kernel's `dev_t` (include/linux/kdev_t.h) as `st_dev`.
fn device(dev: u32) -> u64 {
    nix::sys::stat::makedev(u64::from(dev >> 20), u64::from(dev & 0xf_ffff))
}

/// The name as /proc/PID/maps prints it: `get_vma_name` in fs/proc/task_mmu.c, in its order.
fn name(vma: &Named<record::Vma>, mm: &record::Mm) -> VmaName {
    let record = &vma.record;
    let text = || String::from_utf8_lossy(&vma.text).into_owned();
    let is = |kind: record::Tail| record.header.tail_kind == kind as u32;
    if is(record::Tail::AnonName) && record.file != 0 {
        VmaName::Special(format!("[anon_shmem:{}]", text()))
    } else if record.file != 0 {
        VmaName::File(OsStr::from_bytes(&vma.text).into())
    } else if is(record::Tail::Special) {
        VmaName::Special(text())
    } else if record.start < mm.brk && record.end > mm.start_brk {
        VmaName::Special("[heap]".to_owned())
    } else if record.start <= mm.start_stack && record.end >= mm.start_stack {
        VmaName::Special("[stack]".to_owned())
    } else if is(record::Tail::AnonName) {
        VmaName::Special(format!("[anon:{}]", text()))
    } else {
        VmaName::None
    }
}
