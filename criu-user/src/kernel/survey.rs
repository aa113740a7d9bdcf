//! The survey: which areas and which descriptors the processes of a tree have.
//!
//! There are two sources of the same facts: eBPF iterators, one pass over the whole tree, and /proc, one process at a
//! time. This file has the types that both give, and the /proc half.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::unistd::Pid;

use super::error::During;
use super::proc::KeyValues;
use super::{SysError, SysResult, proc, sys};

/// Size of a page.
pub const PAGE: u64 = 4096;

bitflags::bitflags! {
    /// The kernel's `vm_flags` that a restore has to bring back (include/linux/mm.h), with the kernel's own bits.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct VmFlags: u64 {
        /// Readable.
        const READ = 0x1;
        /// Writable.
        const WRITE = 0x2;
        /// Executable.
        const EXEC = 0x4;
        /// MAP_SHARED.
        const SHARED = 0x8;
        /// MAP_GROWSDOWN: a stack.
        const GROWSDOWN = 0x100;
        /// Page frames without `struct page`: device memory.
        const PFNMAP = 0x400;
        /// mlock(2).
        const LOCKED = 0x2000;
        /// Memory-mapped I/O.
        const IO = 0x4000;
        /// MADV_SEQUENTIAL.
        const SEQ_READ = 0x8000;
        /// MADV_RANDOM.
        const RAND_READ = 0x10000;
        /// MADV_DONTFORK.
        const DONTCOPY = 0x20000;
        /// mlock2(MLOCK_ONFAULT).
        const LOCKONFAULT = 0x80000;
        /// MAP_NORESERVE.
        const NORESERVE = 0x200000;
        /// Huge pages of hugetlbfs.
        const HUGETLB = 0x400000;
        /// MADV_WIPEONFORK.
        const WIPEONFORK = 0x2000000;
        /// MADV_DONTDUMP.
        const DONTDUMP = 0x4000000;
        /// MADV_HUGEPAGE.
        const HUGEPAGE = 0x20000000;
        /// MADV_NOHUGEPAGE.
        const NOHUGEPAGE = 0x40000000;
        /// MADV_MERGEABLE.
        const MERGEABLE = 0x80000000;
    }
}

/// Two-letter codes of smaps' `VmFlags` line (fs/proc/task_mmu.c, `show_smap_vma_flags`).
const SMAPS_CODES: [(&str, VmFlags); 20] = [
    ("rd", VmFlags::READ),
    ("wr", VmFlags::WRITE),
    ("ex", VmFlags::EXEC),
    ("sh", VmFlags::SHARED),
    ("gd", VmFlags::GROWSDOWN),
    ("pf", VmFlags::PFNMAP),
    ("lo", VmFlags::LOCKED),
    ("io", VmFlags::IO),
    ("sr", VmFlags::SEQ_READ),
    ("rr", VmFlags::RAND_READ),
    ("dc", VmFlags::DONTCOPY),
    ("lf", VmFlags::LOCKONFAULT),
    ("nr", VmFlags::NORESERVE),
    ("ht", VmFlags::HUGETLB),
    ("wf", VmFlags::WIPEONFORK),
    ("dd", VmFlags::DONTDUMP),
    ("hg", VmFlags::HUGEPAGE),
    ("nh", VmFlags::NOHUGEPAGE),
    ("mg", VmFlags::MERGEABLE),
    ("  ", VmFlags::empty()),
];

/// What an area's name in /proc/PID/maps says about it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum VmaName {
    /// Anonymous, without a name.
    None,
    /// `[heap]`, `[stack]`, `[vdso]`, `[vvar]`, `[vvar_vclock]`, `[vsyscall]`, `[uprobes]`, `[anon:…]`, …
    Special(String),
    /// A file, by its path as the kernel prints it (which may end in ` (deleted)`).
    File(PathBuf),
}

/// One area of an address space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vma {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// Protection, kind and advice.
    pub flags: VmFlags,
    /// Offset into the mapped file, in bytes.
    pub offset: u64,
    /// Device of the mapped file, as `st_dev`; 0 for anonymous memory.
    pub dev: u64,
    /// Inode of the mapped file; 0 for anonymous memory.
    pub ino: u64,
    /// Its name.
    pub name: VmaName,
}

impl Vma {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Never true for an area that the kernel showed.
    pub fn is_empty(&self) -> bool {
        self.end <= self.start
    }

    /// Protection as mmap(2) takes it.
    pub fn prot(&self) -> i32 {
        (self.flags & (VmFlags::READ | VmFlags::WRITE | VmFlags::EXEC)).bits() as i32
    }

    /// The name in brackets, if it has one.
    pub fn special(&self) -> Option<&str> {
        match &self.name {
            VmaName::Special(name) => Some(name),
            _ => None,
        }
    }
}

/// One descriptor of one process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// Its number.
    pub fd: i32,
    /// Which open file description it refers to: equal numbers, the same description. Numbers count up from 1 in the
    /// order in which descriptions are first met, process by process, descriptor by descriptor.
    pub description: u32,
    /// What else is known of it, by eBPF.
    pub facts: Option<Facts>,
}

/// What the kernel's own records say of a descriptor, which otherwise takes `/proc/PID/fd/N`, `/proc/PID/fdinfo/N` and
/// calls of fcntl(2) to find out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// As in fdinfo: with O_CLOEXEC if the descriptor is closed on exec.
    pub flags: u32,
    /// The position.
    pub pos: u64,
    /// The number of the mount, as in mountinfo.
    pub mount: Option<u64>,
    /// Whether it may have somebody who gets its signals.
    pub may_have_owner: bool,
    /// Whether locks may be on it.
    pub may_have_locks: bool,
    /// Where `/proc/PID/fd/N` points.
    pub link: Option<PathBuf>,
}

/// The areas of a process, ascending, from /proc/PID/smaps: the only file of /proc that shows all flags.
pub fn vmas_of(pid: Pid) -> SysResult<Vec<Vma>> {
    let path = format!("/proc/{pid}/smaps");
    let bytes = std::fs::read(&path).during("read", &path)?;
    let mut vmas: Vec<Vma> = Vec::new();
    for line in bytes.split(|&b| b == b'\n') {
        if let Some(codes) = line.strip_prefix(b"VmFlags:") {
            let codes = String::from_utf8_lossy(codes);
            let last = vmas.last_mut().ok_or_else(|| SysError::new("parse", &path, Errno::EBADMSG))?;
            for code in codes.split_ascii_whitespace() {
                if let Some((_, flag)) = SMAPS_CODES.iter().find(|(c, _)| *c == code) {
                    last.flags |= *flag;
                }
            }
        } else if begins_area(line) {
            vmas.push(parse_area(line).ok_or_else(|| SysError::new("parse", &path, Errno::EBADMSG))?);
        }
    }
    Ok(vmas)
}

/// The areas of a process as /proc/PID/maps tells them: with their protection, but without advice and other flags, and
/// many times faster.
pub fn layout_of(pid: Pid) -> SysResult<Vec<Vma>> {
    let path = format!("/proc/{pid}/maps");
    let bytes = std::fs::read(&path).during("read", &path)?;
    parse_layout(&bytes).ok_or_else(|| SysError::new("parse", &path, Errno::EBADMSG))
}

/// Where the areas of a process are that have pages, in memory or swapped out.
pub fn inhabited_of(pid: Pid) -> SysResult<Vec<(u64, u64)>> {
    const COUNTS: [&[u8]; 4] = [b"Rss:", b"Swap:", b"Private_Hugetlb:", b"Shared_Hugetlb:"];
    let path = format!("/proc/{pid}/smaps");
    let bytes = std::fs::read(&path).during("read", &path)?;
    let mut area = None;
    let mut inhabited = Vec::new();
    for line in bytes.split(|&b| b == b'\n') {
        if begins_area(line) {
            let vma = parse_area(line).ok_or_else(|| SysError::new("parse", &path, Errno::EBADMSG))?;
            area = Some((vma.start, vma.end));
        } else if let Some(count) = COUNTS.iter().find_map(|name| line.strip_prefix(*name))
            && count.iter().any(|digit| (b'1'..=b'9').contains(digit))
        {
            inhabited.extend(area.take());
        }
    }
    Ok(inhabited)
}

/// Whether a line of smaps is the first one of an area: the others begin with a name.
fn begins_area(line: &[u8]) -> bool {
    line.first().is_some_and(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase())
}

/// The areas in the text of /proc/PID/maps, ascending. The kernel gives it in pieces, and a program that runs may change its
/// areas between two of them: one that was shown at the end of a piece is shown again if it has grown since. Only what it has
/// grown by counts.
fn parse_layout(text: &[u8]) -> Option<Vec<Vma>> {
    let mut until = 0;
    let mut vmas = Vec::new();
    for line in text.split(|&b| b == b'\n').filter(|line| !line.is_empty()) {
        let mut vma = parse_area(line)?;
        if vma.end <= until {
            continue;
        }
        if let Some(seen) = until.checked_sub(vma.start) {
            vma.start = until;
            vma.offset += if vma.ino == 0 { 0 } else { seen };
        }
        until = vma.end;
        vmas.push(vma);
    }
    Some(vmas)
}

fn parse_area(line: &[u8]) -> Option<Vma> {
    let mut fields = line.splitn(6, |&b| b == b' ');
    let mut field = || fields.next().and_then(|f| std::str::from_utf8(f).ok());
    let (start, end) = field()?.split_once('-')?;
    let permissions = field()?;
    let offset = u64::from_str_radix(field()?, 16).ok()?;
    let (major, minor) = field()?.split_once(':')?;
    let ino = field()?.parse().ok()?;
    let name = fields.next().unwrap_or_default();
    let name = &name[name.iter().position(|&b| b != b' ').unwrap_or(name.len())..];
    let mut flags = VmFlags::empty();
    for (letter, flag) in [('r', VmFlags::READ), ('w', VmFlags::WRITE), ('x', VmFlags::EXEC), ('s', VmFlags::SHARED)] {
        flags.set(flag, permissions.contains(letter));
    }
    Some(Vma {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        flags,
        offset,
        dev: nix::sys::stat::makedev(u64::from_str_radix(major, 16).ok()?, u64::from_str_radix(minor, 16).ok()?),
        ino,
        name: area_name(name),
    })
}

/// The meaning of a name as /proc/PID/maps prints it.
pub fn area_name(name: &[u8]) -> VmaName {
    match name.first() {
        None => VmaName::None,
        Some(b'[') => VmaName::Special(String::from_utf8_lossy(name).into_owned()),
        // The kernel escapes the line feed alone (fs/proc/task_mmu.c: seq_path with "\n").
        Some(_) => VmaName::File(PathBuf::from(OsString::from_vec(unescape(name)))),
    }
}

fn unescape(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&first, tail)) = rest.split_first() {
        if rest.starts_with(b"\\012") {
            out.push(b'\n');
            rest = &rest[4..];
        } else {
            out.push(first);
            rest = tail;
        }
    }
    out
}

/// What descriptors of one description have in common, as far as /proc shows: inode, position and flags.
type Looks = (u64, u64, String);

/// The descriptors of all processes of a tree, with one number for each open file description.
///
/// Without eBPF the kernel's file pointers are not known: descriptions are told apart by kcmp(2), among those whose
/// inode, position and flags agree.
pub fn descriptors_of(pids: &[Pid]) -> SysResult<BTreeMap<Pid, Vec<Descriptor>>> {
    let mut groups: BTreeMap<Looks, Vec<(Pid, i32, u32)>> = BTreeMap::new();
    let mut next = 1;
    let mut all = BTreeMap::new();
    for &pid in pids {
        let mut mine = Vec::new();
        for fd in proc::descriptors(pid)? {
            let path = format!("/proc/{pid}/fd/{fd}");
            let meta = nix::sys::stat::stat(path.as_str()).during("stat", &path)?;
            let info = KeyValues::fdinfo(pid, fd)?;
            // Close-on-exec is the descriptor's own, not the description's.
            let flags = info.number("flags", 8)? & !(libc::O_CLOEXEC as u64);
            let key = (meta.st_dev, meta.st_ino, format!("{flags:o} {}", info.get("pos").unwrap_or_default()));
            let group = groups.entry(key).or_default();
            let mut description = None;
            for &(other, other_fd, number) in group.iter() {
                let what = sys::Compare::File(other_fd as u64, fd as u64);
                if sys::kcmp(other, pid, what)?.is_eq() {
                    description = Some(number);
                    break;
                }
            }
            let description = description.unwrap_or_else(|| {
                group.push((pid, fd, next));
                next += 1;
                next - 1
            });
            mine.push(Descriptor { fd, description, facts: None });
        }
        all.insert(pid, mine);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_areas_are_understood() {
        let vmas = vmas_of(Pid::this()).expect("own smaps");
        assert!(vmas.windows(2).all(|w| w[0].end <= w[1].start));
        assert!(vmas.iter().any(|v| v.special() == Some("[stack]") && v.flags.contains(VmFlags::GROWSDOWN)));
        assert!(vmas.iter().any(|v| matches!(&v.name, VmaName::File(_)) && v.ino != 0));
    }

    #[test]
    fn a_line_with_spaces_in_its_path() {
        let vma =
            parse_area(b"7f00-8f00 rw-s 00001000 fe:01 42                         /tmp/a b (deleted)").expect("area");
        assert_eq!(vma.name, VmaName::File("/tmp/a b (deleted)".into()));
        assert_eq!((vma.start, vma.offset, vma.ino), (0x7f00, 0x1000, 42));
        assert!(vma.flags.contains(VmFlags::SHARED | VmFlags::WRITE));
    }

    #[test]
    fn areas_that_grow_while_they_are_read_are_not_there_twice() {
        let text = b"7f1000-7f3000 rw-p 00000000 00:00 0 \n7f1000-7f5000 rw-p 00000000 00:00 0 \n\
                     7f2000-7f4000 rw-p 00000000 00:00 0 \n7f4000-7f8000 r--p 00001000 fe:01 42 /lib\n\
                     7f9000-7fa000 r--p 00006000 fe:01 42 /lib\n";
        let areas = parse_layout(text).expect("well formed");
        let found: Vec<_> = areas.iter().map(|vma| (vma.start, vma.end, vma.offset)).collect();
        assert_eq!(
            found,
            [
                (0x7f_1000, 0x7f_3000, 0),
                (0x7f_3000, 0x7f_5000, 0),
                (0x7f_5000, 0x7f_8000, 0x2000),
                (0x7f_9000, 0x7f_a000, 0x6000)
            ]
        );
    }

    #[test]
    fn duplicates_share_a_description() {
        let file = std::fs::File::open("/dev/null").expect("open");
        let twin = file.try_clone().expect("dup");
        let other = std::fs::File::open("/dev/null").expect("open");
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .stdin(file)
            .stdout(twin)
            .stderr(other)
            .spawn()
            .expect("spawn");
        let pid = Pid::from_raw(child.id() as i32);
        // While its loader runs, descriptors come and go: a survey is made for processes that stand still.
        let all = (0..100).find_map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            descriptors_of(&[pid]).ok()
        });
        child.kill().expect("kill");
        child.wait().expect("wait");
        let all = all.expect("descriptors");
        let of = |fd| all[&pid].iter().find(|d| d.fd == fd).map(|d| d.description);
        assert_eq!(of(0), of(1));
        assert_ne!(of(0), of(2));
    }
}
