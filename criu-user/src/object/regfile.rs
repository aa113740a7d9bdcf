//! Regular files, directories, O_PATH handles and the character devices without state.
//!
//! They come back by their names. What has lost its name is the business of [`ghost`](super::ghost); files of /proc
//! that belong to a process of the tree are opened by whoever holds them, once that process is there.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, lstat, stat};
use nix::sys::statfs::{self, FsType};

use super::file::{Capture, FileKind, Planner, Seen};
use super::ghost::{self, Held};
use super::outside::{self, Name};
use super::{ObjectError, memfd, unsupported};
use crate::call;
use crate::image::proto::{FdTypes, FileEntry, FownEntry, RegFileEntry};
use crate::kernel::{self, error::During, root::Root};
use crate::plan::{Arg, FileRef, Opened, Opener, Stage, TaskRef};

/// Files with a path.
#[derive(Debug)]
pub struct RegFile;

/// Memory devices that keep no state: null, zero, full, random, urandom (Documentation/admin-guide/devices.txt, 1 char).
const MEMORY_DEVICES: [u64; 5] = [3, 5, 7, 8, 9];

/// File systems whose files the kernel makes up when they are looked at: their times say nothing.
const MADE_UP: [FsType; 7] = [
    statfs::PROC_SUPER_MAGIC,
    statfs::SYSFS_MAGIC,
    statfs::CGROUP_SUPER_MAGIC,
    statfs::CGROUP2_SUPER_MAGIC,
    statfs::DEBUGFS_MAGIC,
    statfs::TRACEFS_MAGIC,
    statfs::BPF_FS_MAGIC,
];

fn kind_of(mode: u32) -> SFlag {
    SFlag::from_bits_truncate(mode & SFlag::S_IFMT.bits())
}

/// Whether it is a device that keeps nothing: /dev/null and the like.
pub fn plain_device(stat: &FileStat) -> bool {
    kind_of(stat.st_mode) == SFlag::S_IFCHR
        && nix::sys::stat::major(stat.st_rdev) == 1
        && MEMORY_DEVICES.contains(&nix::sys::stat::minor(stat.st_rdev))
}

impl FileKind for RegFile {
    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Reg]
    }

    fn is(&self, seen: &Seen) -> bool {
        let kind = seen.file_type();
        let path = seen.link.is_absolute();
        let o_path = seen.flags & libc::O_PATH as u32 != 0;
        path && !unsupported::is_secret_memory(seen)
            && (kind == SFlag::S_IFREG || kind == SFlag::S_IFDIR || plain_device(&seen.stat) || o_path)
    }

    fn capture(&self, seen: &Seen, cx: &mut Capture<'_>) -> Result<FileEntry, ObjectError> {
        entry_of_seen(cx, seen, seen.id)
    }

    fn plan(&self, entry: &FileEntry, cx: &mut Planner<'_>) -> Result<FileRef, ObjectError> {
        let reg =
            entry.reg.as_deref().ok_or_else(|| ObjectError::contradiction(format!("file {} is empty", entry.id)))?;
        if let Some(given) = outside::given(cx.options, &Name::path(path_of(reg).to_string_lossy()))? {
            return Ok(cx.plan.open(Given { what: path_of(reg).display().to_string(), given }));
        }
        if reg.ext() {
            return Err(ObjectError::Unsupported {
                what: format!("{}, which is outside of the tree", path_of(reg).display()),
                advice: "say which descriptor stands for it with --inherit-fd fd[N]:file[MOUNT:INODE]",
            });
        }
        if let Some(root) = ghost::plan(cx, reg)? {
            return Ok(cx.plan.open(Reopen { root, entry: reg.clone() }));
        }
        let path = path_of(reg);
        if let Some(pid) = process_of(&path)
            && cx.tasks.contains_key(&pid)
        {
            let place = cx.plan.open(OpenPlace { path: "/proc".into(), root: Root::default() });
            cx.shelf.get::<Late>().0.insert(entry.id, path);
            return Ok(place);
        }
        let check = !cx.options.skip_file_validation;
        let root = cx.options.root.clone();
        Ok(cx.plan.open(OpenPath { path, root, entry: reg.clone(), check }))
    }

    fn wire(&self, entry: &FileEntry, cx: &mut Planner<'_>) -> Result<(), ObjectError> {
        if let (Some(path), Some(reg)) = (cx.shelf.get::<Late>().0.remove(&entry.id), &entry.reg) {
            plan_late(cx, reg, &path);
        }
        Ok(())
    }
}

/// Whose file of /proc a path is.
fn process_of(path: &Path) -> Option<i32> {
    let mut parts = path.strip_prefix("/proc").ok()?.components();
    parts.next()?.as_os_str().to_str()?.parse().ok()
}

/// Files of /proc that are there only when the process is, by id.
#[derive(Debug, Default)]
struct Late(HashMap<u32, PathBuf>);

/// Has the first holder of a file of /proc open it, and the others fetch it from there.
fn plan_late(cx: &mut Planner<'_>, reg: &RegFileEntry, path: &Path) {
    let holders = cx.holders.get(&reg.id).cloned().unwrap_or_default();
    let Some(&(first, number)) = holders.first() else { return };
    let mut name = path.as_os_str().as_bytes().to_vec();
    name.push(0);
    let place = |cx: &mut Planner<'_>, task: TaskRef, fd: i32, stage| {
        let cloexec = if cx.cloexec.contains(&(task, fd)) { libc::O_CLOEXEC } else { 0 };
        let put = call!(SYS_dup3(Arg::Earlier(1), fd, cloexec), format!("descriptor {fd} is {}", path.display()));
        cx.plan.push(task, stage, put);
        cx.plan.push(task, stage, call!(SYS_close(Arg::Earlier(2)), "it is in its place"));
    };
    let flags = reg.flags as i32 & !ONCE | libc::O_CLOEXEC;
    let why = format!("{} is there now", path.display());
    cx.plan.push(first, Stage::Wiring, call!(SYS_openat(libc::AT_FDCWD, name, flags), why));
    place(cx, first, number, Stage::Wiring);
    if reg.pos != 0 && reg.flags & libc::O_PATH as u32 == 0 {
        let seek = call!(SYS_lseek(number, reg.pos, libc::SEEK_SET), "its position");
        cx.plan.push(first, Stage::Wiring, seek);
    }
    let pid = cx.plan.task(first).pid.as_raw();
    for &(task, fd) in &holders[1..] {
        if task == first {
            let cloexec = if cx.cloexec.contains(&(task, fd)) { libc::O_CLOEXEC } else { 0 };
            cx.plan.push(task, Stage::Wiring, call!(SYS_dup3(number, fd, cloexec), "the same description"));
            continue;
        }
        // The first holder has it only after the stage of wiring.
        cx.plan.push(task, Stage::Process, call!(SYS_pidfd_open(pid, 0u32), "who has the description"));
        let fetch = call!(SYS_pidfd_getfd(Arg::Earlier(1), number, 0u32), "the description");
        cx.plan.push(task, Stage::Process, fetch);
        place(cx, task, fd, Stage::Process);
        cx.plan.push(task, Stage::Process, call!(SYS_close(Arg::Earlier(4)), "no longer needed"));
    }
}

/// The entry of a description that has a path, under an id.
pub fn entry_of_seen(cx: &mut Capture<'_>, seen: &Seen, id: u32) -> Result<FileEntry, ObjectError> {
    let mount = seen.mount()?;
    let external = Name::file(mount, seen.stat.st_ino);
    let fown = seen.fown()?;
    if outside::is_external(cx.options, &external) {
        let mut entry = entry_of(id, Path::new(external.as_str()), &seen.stat, seen.flags, seen.pos, fown);
        entry.ext = Some(true);
        return Ok(wrap(entry));
    }
    let held = Held {
        pid: seen.pid.as_raw(),
        fd: Some(seen.fd),
        id,
        link: &seen.link,
        stat: &seen.stat,
        way: format!("/proc/{}/fd/{}", seen.pid, seen.fd),
    };
    let name = ghost::name(cx, &held)?;
    let mut entry = entry_of(id, &name, &seen.stat, seen.flags, seen.pos, fown);
    if kind_of(seen.stat.st_mode) == SFlag::S_IFREG && seen.flags & libc::O_PATH as u32 == 0 {
        let fs = statfs::fstatfs(&seen.file).during("fstatfs", seen.link.display())?;
        entry.mtime = (!MADE_UP.contains(&fs.filesystem_type())).then(|| mtime(&seen.stat));
    }
    Ok(wrap(entry))
}

/// The time of the last change in nanoseconds.
fn mtime(stat: &FileStat) -> u64 {
    (stat.st_mtime as u64).wrapping_mul(1_000_000_000).wrapping_add(stat.st_mtime_nsec as u64)
}

/// The entry of a file that is known by path.
pub fn entry_of(id: u32, path: &Path, stat: &FileStat, flags: u32, pos: u64, fown: FownEntry) -> RegFileEntry {
    // A file without a name is opened once; afterwards it is a file like any other.
    let nameless = flags & (libc::O_TMPFILE & !libc::O_DIRECTORY) as u32 != 0;
    RegFileEntry {
        id,
        flags: if nameless { flags & !(libc::O_TMPFILE as u32) } else { flags },
        pos,
        fown,
        name: path.as_os_str().as_bytes().to_vec(),
        mnt_id: Some(-1),
        size: (kind_of(stat.st_mode) == SFlag::S_IFREG).then_some(stat.st_size as u64),
        mode: Some(stat.st_mode),
        ..RegFileEntry::default()
    }
}

/// The entry of files.img around it.
pub fn wrap(reg: RegFileEntry) -> FileEntry {
    FileEntry { r#type: FdTypes::Reg as i32, id: reg.id, reg: Some(reg.into()), ..FileEntry::default() }
}

/// Enters a file that is no descriptor, such as a program, a mapped file or a directory, and gives its id.
///
/// `held` is a magic link of /proc that leads to the file whatever became of its name.
pub fn by_path(cx: &mut Capture<'_>, pid: i32, held: &str, flags: u32) -> Result<u32, ObjectError> {
    let link = kernel::proc::link(held)?;
    // Names that are gone may have been those of several files.
    let found = if link.as_os_str().as_bytes().ends_with(ghost::DELETED) {
        Some(stat(held).during("stat", held)?)
    } else {
        None
    };
    let key = match &found {
        Some(s) => link.join(format!("\0{}:{}", s.st_dev, s.st_ino)),
        None => link.clone(),
    };
    cx.path_id(key, flags, |cx, id| {
        let found = match found {
            Some(found) => found,
            None => stat(held).during("stat", held)?,
        };
        if memfd::is_name(&link) {
            return memfd::entry_by_path(cx, held, &link, &found, flags, id);
        }
        let name = ghost::name(cx, &Held { pid, fd: None, id, link: &link, stat: &found, way: held.to_owned() })?;
        Ok(wrap(entry_of(id, &name, &found, flags, 0, FownEntry::default())))
    })
}

/// The path that an entry names; CRIU leaves the leading slash out where a root directory was given.
pub fn path_of(entry: &RegFileEntry) -> PathBuf {
    let path = PathBuf::from(std::ffi::OsString::from_vec(entry.name.clone()));
    if path.is_absolute() { path } else { Path::new("/").join(path) }
}

/// Plans a handle on the place of a file, from which it can be opened in any way.
pub fn plan_place(cx: &mut Planner<'_>, reg: &RegFileEntry) -> Result<FileRef, ObjectError> {
    match ghost::plan(cx, reg)? {
        Some(root) => Ok(root),
        None => Ok(cx.plan.open(OpenPlace { path: path_of(reg), root: cx.options.root.clone() })),
    }
}

/// A handle on a file: O_PATH.
#[derive(Debug)]
struct OpenPlace {
    path: PathBuf,
    root: Root,
}

impl Opener for OpenPlace {
    fn describe(&self) -> String {
        format!("find {}", self.path.display())
    }

    fn open(&self, _: &Opened) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>> {
        let path = self.root.reach(&self.path)?;
        Ok(open(&path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).during("open", path.display())?)
    }
}

/// Flags that act once, at the first open, and must not act again; signals are asked for by fcntl(2).
const ONCE: i32 = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_ASYNC;

/// Opens a file by its path, as it was open.
#[derive(Debug)]
struct OpenPath {
    path: PathBuf,
    root: Root,
    entry: RegFileEntry,
    check: bool,
}

/// Why a file cannot be opened again.
#[derive(Debug, thiserror::Error)]
enum ReopenError {
    #[error("{path}: its size changed since the dump ({now}, was {then}); put it back, or give --skip-file-validation")]
    Size { path: String, then: u64, now: u64 },
    #[error("{path} was written to since the dump (modified {by} later); put it back, or give --skip-file-validation", by = humantime(*.then, *.now))]
    Time { path: String, then: u64, now: u64 },
    #[error("{path} is of another type than at the dump (mode {now:o}, was {then:o})")]
    OtherType { path: String, then: u32, now: u32 },
}

fn humantime(then: u64, now: u64) -> String {
    format!("{:.3} s", (now as f64 - then as f64) / 1e9)
}

impl Opener for OpenPath {
    fn describe(&self) -> String {
        format!("open {} with flags {:#o} at {}", self.path.display(), self.entry.flags, self.entry.pos)
    }

    fn open(&self, _: &Opened) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>> {
        let o_nofollow = self.entry.flags & libc::O_NOFOLLOW as u32 != 0;
        let path = if o_nofollow { self.root.place(&self.path)? } else { self.root.reach(&self.path)? };
        if self.check {
            // Before it is opened: opening another type of file may wait, or do something.
            let now = if o_nofollow { lstat(&path) } else { stat(&path) };
            self.validate(&now.during("stat", path.display())?)?;
        }
        let flags = OFlag::from_bits_retain(self.entry.flags as i32 & !ONCE | libc::O_CLOEXEC);
        let file = open(&path, flags, Mode::empty()).during("open", path.display())?;
        if self.check {
            self.validate(&fstat(&file).during("fstat", path.display())?)?;
        }
        seek(&file, &self.entry)?;
        Ok(file)
    }
}

fn seek(file: &OwnedFd, entry: &RegFileEntry) -> Result<(), kernel::SysError> {
    let o_path = entry.flags & libc::O_PATH as u32 != 0;
    if entry.pos != 0 && !o_path { kernel::fd::seek(file, entry.pos) } else { Ok(()) }
}

impl OpenPath {
    fn validate(&self, now: &FileStat) -> Result<(), ReopenError> {
        let path = || self.path.display().to_string();
        if let Some(mode) = self.entry.mode
            && kind_of(mode) != kind_of(now.st_mode)
        {
            return Err(ReopenError::OtherType { path: path(), then: mode, now: now.st_mode });
        }
        if kind_of(now.st_mode) != SFlag::S_IFREG {
            return Ok(());
        }
        if let Some(then) = self.entry.size
            && now.st_size as u64 != then
        {
            return Err(ReopenError::Size { path: path(), then, now: now.st_size as u64 });
        }
        if let Some(then) = self.entry.mtime
            && mtime(now) != then
        {
            return Err(ReopenError::Time { path: path(), then, now: mtime(now) });
        }
        Ok(())
    }
}

/// Opens a file without a name once more.
#[derive(Debug)]
struct Reopen {
    root: FileRef,
    entry: RegFileEntry,
}

impl Opener for Reopen {
    fn describe(&self) -> String {
        let path = path_of(&self.entry);
        format!("open {}, which has no name, with flags {:#o} at {}", path.display(), self.entry.flags, self.entry.pos)
    }

    fn open(&self, opened: &Opened) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>> {
        let root = opened.get(self.root).ok_or("it has not been made")?;
        let mut flags = self.entry.flags as i32;
        if flags & libc::O_TMPFILE == libc::O_TMPFILE {
            // What never had a name is opened like any other file now.
            flags &= !libc::O_TMPFILE;
        }
        if flags & (libc::O_PATH | libc::O_NOFOLLOW) == libc::O_PATH | libc::O_NOFOLLOW {
            // A symbolic link itself: the root is what is wanted, and has no state.
            return Ok(root.try_clone()?);
        }
        let file = kernel::fd::reopen(root, flags & !(ONCE | libc::O_NOFOLLOW))?;
        seek(&file, &self.entry)?;
        Ok(file)
    }
}

/// A descriptor that the caller has given.
#[derive(Debug)]
struct Given {
    what: String,
    given: OwnedFd,
}

impl Opener for Given {
    fn describe(&self) -> String {
        format!("the descriptor given for {}", self.what)
    }

    fn open(&self, _: &Opened) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.given.try_clone()?)
    }
}
