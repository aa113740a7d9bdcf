//! inotify: watches with their numbers.
//!
//! fdinfo tells a handle of every watched file, by which its path is found. Events that nobody has read yet cannot be
//! looked at without taking them, and nothing can put them into the kernel's queue. But the kernel has a word for
//! events that are lost, IN_Q_OVERFLOW, which programs have to understand anyway (inotify(7)): a restored descriptor
//! begins with it if there were any.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{Mode, stat};

use super::ObjectError;
use super::file::{Capture, FileKind, Planner, Seen};
use crate::image::proto::{FdTypes, FhEntry, FileEntry, InotifyFileEntry, InotifyWdEntry};
use crate::image::{kernel_dev, user_dev};
use crate::kernel::{self, SysError, error::During, root::Root, sys};
use crate::plan::{FileRef, Opened, Opener};

/// inotify descriptors.
#[derive(Debug)]
pub struct Inotify;

/// Longest file handle: MAX_HANDLE_SZ of linux/exportfs.h.
const HANDLE_MAX: usize = 128;
/// Handles are filled up with zeros to so many words in images.
const HANDLE_WORDS: usize = 16;

/// One line of fdinfo.
#[derive(Debug, PartialEq)]
struct Watch {
    wd: u32,
    ino: u64,
    dev: u32,
    mask: u32,
    ignored: u32,
    handle_type: u32,
    handle: Vec<u8>,
}

/// `inotify wd:3 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:7e9e…`
fn parse(line: &str) -> Option<Watch> {
    let field = |name: &str| line.split_ascii_whitespace().find_map(|w| w.strip_prefix(name)?.strip_prefix(':'));
    let hex = |name: &str| u64::from_str_radix(field(name)?, 16).ok();
    let text = field("f_handle").unwrap_or_default();
    let bytes = (0..text.len() / 2).map(|i| u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok());
    Some(Watch {
        wd: hex("wd")? as u32,
        ino: hex("ino")?,
        dev: hex("sdev")? as u32,
        mask: hex("mask")? as u32,
        ignored: hex("ignored_mask").unwrap_or(0) as u32,
        handle_type: hex("fhandle-type").unwrap_or(0) as u32,
        handle: bytes.collect::<Option<Vec<u8>>>()?,
    })
}

/// A mount of a file system, open for looking up handles.
fn mount_of(dev: u32) -> Result<Option<OwnedFd>, ObjectError> {
    let text = kernel::proc::read_text("/proc/self/mountinfo")?;
    for line in text.lines() {
        // 36 35 98:0 /mnt1 /mnt2 …: the device is the third word, the mount point the fifth; proc_pid_mountinfo(5).
        let words: Vec<&str> = line.split_ascii_whitespace().take(5).collect();
        let &[_, _, device, _, point] = &words[..] else { continue };
        let of = device.split_once(':').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
        if of.is_none_or(|(major, minor)| kernel_dev(libc::makedev(major, minor)) != dev) {
            continue;
        }
        let point = unescape(point);
        // It may be hidden below another mount.
        if let Ok(fd) = open(&point, OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC, Mode::empty())
            && nix::sys::stat::fstat(&fd).is_ok_and(|s| kernel_dev(s.st_dev) == dev)
        {
            return Ok(Some(fd));
        }
    }
    Ok(None)
}

/// Blanks and backslashes stand as octal numbers.
fn unescape(text: &str) -> PathBuf {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = (first == b'\\').then(|| tail.get(..3)).flatten();
        match octal.and_then(|o| u8::from_str_radix(std::str::from_utf8(o).ok()?, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(first);
                rest = tail;
            }
        }
    }
    PathBuf::from(std::ffi::OsStr::from_bytes(&out))
}

/// The path of a watched file.
fn find(watch: &Watch) -> Result<PathBuf, String> {
    let said = |err: &dyn std::fmt::Display| err.to_string();
    let mount = mount_of(watch.dev).map_err(|e| said(&e))?.ok_or("its file system is mounted nowhere")?;
    let handle = sys::open_by_handle(mount.as_fd(), watch.handle_type as i32, &watch.handle, libc::O_PATH)
        .map_err(|e| said(&e))?;
    let path = kernel::proc::link(&format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&handle)))
        .map_err(|e| said(&e))?;
    match stat(&path) {
        Ok(s) if s.st_ino == watch.ino && kernel_dev(s.st_dev) == watch.dev => Ok(path),
        _ => Err(format!("{} has lost its name", path.display())),
    }
}

impl FileKind for Inotify {
    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Inotify]
    }

    fn is(&self, seen: &Seen) -> bool {
        seen.is_anon("inotify")
    }

    fn capture(&self, seen: &Seen, cx: &mut Capture<'_>) -> Result<FileEntry, ObjectError> {
        let mut wd = Vec::new();
        for line in seen.info()?.text().lines().filter(|l| l.starts_with("inotify ")) {
            let watch = parse(line)
                .ok_or_else(|| ObjectError::contradiction(format!("pid {}, fd {}: {line:?}", seen.pid, seen.fd)))?;
            match find(&watch) {
                Ok(path) => wd.push(entry_of(seen.id, &watch, &path)),
                Err(why) => {
                    let what = format!("the file of inotify watch {} cannot be found: {why}", watch.wd);
                    cx.refuse(seen.refuse(what, "take the watch back, or watch a file of another file system"));
                }
            }
        }
        wd.sort_by_key(|w| w.wd);
        let ify = InotifyFileEntry {
            id: seen.id,
            flags: seen.flags,
            fown: seen.fown()?,
            wd,
            unread: (sys::readable_bytes(seen.file.as_fd())? > 0).then_some(true),
        };
        Ok(FileEntry { r#type: FdTypes::Inotify as i32, id: seen.id, ify: Some(ify.into()), ..FileEntry::default() })
    }

    fn plan(&self, entry: &FileEntry, cx: &mut Planner<'_>) -> Result<FileRef, ObjectError> {
        let missing = |what: &str| ObjectError::contradiction(format!("inotify {}: {what}", entry.id));
        let ify = entry.ify.as_deref().cloned().ok_or_else(|| missing("empty"))?;
        for watch in &ify.wd {
            if !(1..=i32::MAX as u32).contains(&watch.wd) || watch.f_handle.bytes as usize > HANDLE_MAX {
                return Err(missing("a watch that cannot be"));
            }
        }
        Ok(cx.plan.open(Make { ify, root: cx.options.root.clone() }))
    }
}

fn entry_of(id: u32, watch: &Watch, path: &Path) -> InotifyWdEntry {
    let mut handle: Vec<u64> = watch
        .handle
        .chunks(8)
        .map(|chunk| {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            u64::from_ne_bytes(word)
        })
        .collect();
    handle.resize(HANDLE_WORDS.max(handle.len()), 0);
    InotifyWdEntry {
        id,
        i_ino: watch.ino,
        mask: watch.mask,
        ignored_mask: watch.ignored,
        s_dev: watch.dev,
        wd: watch.wd,
        f_handle: FhEntry {
            bytes: watch.handle.len() as u32,
            r#type: watch.handle_type,
            handle,
            path: Some(path.as_os_str().as_bytes().to_vec()),
            mnt_id: None,
        },
    }
}

/// Makes an inotify descriptor with its watches.
#[derive(Debug)]
struct Make {
    ify: InotifyFileEntry,
    root: Root,
}

impl Opener for Make {
    fn describe(&self) -> String {
        format!("inotify with {} watches", self.ify.wd.len())
    }

    fn open(&self, _: &Opened) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>> {
        let queue = sys::inotify()?;
        if self.ify.unread() {
            overflow(&queue)?;
        }
        for watch in &self.ify.wd {
            sys::set_next_watch(queue.as_fd(), watch.wd as i32)?;
            let file = place(watch, &self.root)?;
            // What fdinfo shows beyond these is the kernel's own.
            let mask = watch.mask & (libc::IN_ALL_EVENTS | MODIFIERS);
            let given = sys::add_watch(queue.as_fd(), file.as_fd(), mask)?;
            if given as u32 != watch.wd {
                return Err(format!("watch {} became {given}", watch.wd).into());
            }
        }
        kernel::fd::set_flags(&queue, self.ify.flags as i32 & libc::O_NONBLOCK)?;
        Ok(queue)
    }
}

/// Bits of a watch besides events that inotify_add_watch(2) takes and keeps.
const MODIFIERS: u32 = libc::IN_ONESHOT | libc::IN_EXCL_UNLINK;

/// The watched file: by its path, or by its handle where the image has no path.
fn place(watch: &InotifyWdEntry, root: &Root) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>> {
    if let Some(path) = &watch.f_handle.path {
        let path = root.reach(&Path::new("/").join(Path::new(std::ffi::OsStr::from_bytes(path))))?;
        return Ok(open(&path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).during("open", path.display())?);
    }
    let mount = mount_of(watch.s_dev)?.ok_or_else(|| format!("device {:#x} is not mounted", user_dev(watch.s_dev)))?;
    let mut handle: Vec<u8> = watch.f_handle.handle.iter().flat_map(|w| w.to_ne_bytes()).collect();
    handle.truncate(watch.f_handle.bytes as usize);
    Ok(sys::open_by_handle(mount.as_fd(), watch.f_handle.r#type as i32, &handle, libc::O_PATH)?)
}

/// Leaves nothing in the queue but the message that events were lost.
///
/// The kernel says so when the queue is full. So it is filled with events of a file of our own, two that take turns
/// because equal neighbours are merged, and these are read back; what is left is the message.
fn overflow(queue: &OwnedFd) -> Result<(), SysError> {
    /// `struct inotify_event` without a name.
    const EVENT: usize = 16;
    let limit = kernel::proc::read_text("/proc/sys/fs/inotify/max_queued_events")?;
    let limit: usize = limit.trim().parse().unwrap_or(16384);
    let file: OwnedFd = memfd_create("watched", MFdFlags::MFD_CLOEXEC).during("memfd_create", "a file to watch")?;
    let watch = sys::add_watch(queue.as_fd(), file.as_fd(), libc::IN_OPEN | libc::IN_CLOSE)?;
    for _ in 0..limit / 2 + 2 {
        kernel::fd::reopen(&file, libc::O_RDONLY)?;
    }
    sys::remove_watch(queue.as_fd(), watch)?;
    let copy = queue.try_clone().during("dup", "inotify")?;
    let mut events = vec![0; limit * EVENT];
    std::fs::File::from(copy).read_exact(&mut events).during("read", "inotify")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watches_are_understood() {
        let line = "inotify wd:3 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:7e9e0000640d1b6d";
        let watch = parse(line).expect("a watch");
        assert_eq!((watch.wd, watch.ino, watch.dev, watch.handle_type), (3, 0x9e7e, 0x80_0013, 1));
        assert_eq!(watch.handle, [0x7e, 0x9e, 0, 0, 0x64, 0x0d, 0x1b, 0x6d]);
    }
}
