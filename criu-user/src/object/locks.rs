//! File locks: flock(2), POSIX and open-file-description locks of fcntl(2), and leases.
//!
//! `/proc/PID/fdinfo/FD` shows exactly the locks that were made through that description and belong to it or, for
//! POSIX locks, to that process (fs/locks.c, `show_fd_locks`). All are made again by a process that holds the
//! description. POSIX locks come when every superfluous descriptor is closed: closing any descriptor of a file drops
//! all POSIX locks that the process has on it.

use std::collections::BTreeSet;

use nix::unistd::Pid;

use super::file::{Capture, Planner};
use super::{ObjectError, Refusal};
use crate::call;
use crate::image::ImageKind;
use crate::image::proto::FileLockEntry;
use crate::kernel::proc::KeyValues;
use crate::plan::Stage;

/// Kinds of lock as images number them.
mod flag {
    pub const POSIX: u32 = 1;
    pub const FLOCK: u32 = 2;
    pub const OFD: u32 = 4;
    pub const LEASE: u32 = 8;
}

const F_OFD_SETLK: i32 = 37;
const F_SETLEASE: i32 = 1024;

/// Locks found in a dump.
#[derive(Debug, Default)]
struct Found {
    entries: Vec<FileLockEntry>,
    /// Descriptions whose own locks are entered; all who share one show them.
    descriptions: BTreeSet<(u32, u32)>,
}

/// Looks at the locks that a descriptor shows.
pub fn look(cx: &mut Capture<'_>, pid: Pid, fd: i32, description: u32, info: &KeyValues) -> Result<(), ObjectError> {
    let mut met = Vec::new();
    for line in info.all("lock") {
        if line.contains("BREAKING") {
            // What it was is no longer shown, only what it is to become.
            let what = "its lease is being broken: somebody waits to open the file".to_owned();
            let advice = "dump again when the process has given the lease up".to_owned();
            cx.refuse(Refusal { pid: pid.as_raw(), fd: Some(fd), what, advice });
            continue;
        }
        let entry = parse(pid.as_raw(), fd, line)
            .ok_or_else(|| ObjectError::contradiction(format!("pid {pid}, fd {fd}: a lock {line:?}")))?;
        if !cx.options.file_locks {
            let what = format!("it holds a file lock ({})", words(&entry));
            let advice = "give --file-locks if no other program has to do with it";
            cx.refuse(Refusal { pid: pid.as_raw(), fd: Some(fd), what, advice: advice.into() });
            continue;
        }
        let found = cx.shelf.get::<Found>();
        if entry.flag != flag::POSIX {
            met.push((description, entry.flag));
            if found.descriptions.contains(&(description, entry.flag)) {
                continue;
            }
        }
        if !found.entries.contains(&entry) {
            found.entries.push(entry);
        }
    }
    cx.shelf.get::<Found>().descriptions.extend(met);
    Ok(())
}

/// `1: POSIX  ADVISORY  WRITE 1234 fe:01:5678 0 EOF`, proc_pid_fdinfo(5) and proc_locks(5).
fn parse(pid: i32, fd: i32, line: &str) -> Option<FileLockEntry> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let flag = match words.next()? {
        "POSIX" => flag::POSIX,
        "FLOCK" => flag::FLOCK,
        "OFDLCK" => flag::OFD,
        "LEASE" => flag::LEASE,
        _ => return None,
    };
    let _how = words.next()?;
    let r#type = match words.next()? {
        "READ" => libc::F_RDLCK,
        "WRITE" => libc::F_WRLCK,
        "UNLCK" => libc::F_UNLCK,
        _ => return None,
    };
    let (_pid, _inode) = (words.next()?, words.next()?);
    let start: i64 = words.next()?.parse().ok()?;
    let len = match words.next()? {
        "EOF" => 0,
        end => end.parse::<i64>().ok()?.checked_sub(start)?.checked_add(1)?,
    };
    Some(FileLockEntry { flag, r#type: r#type as u32, pid, fd, start, len })
}

fn words(lock: &FileLockEntry) -> String {
    let kind = match lock.flag {
        flag::POSIX => "POSIX",
        flag::FLOCK => "flock",
        flag::OFD => "open file description",
        _ => "lease",
    };
    let how = if lock.r#type == libc::F_RDLCK as u32 { "shared" } else { "exclusive" };
    match (lock.start, lock.len) {
        (0, 0) => format!("{kind}, {how}"),
        (start, 0) => format!("{kind}, {how}, from {start} on"),
        (start, len) => format!("{kind}, {how}, {len} bytes from {start} on"),
    }
}

/// Writes the image.
pub fn finish(cx: &mut Capture<'_>) -> Result<(), ObjectError> {
    let found = cx.shelf.take::<Found>();
    if !found.entries.is_empty() {
        cx.dir.write_all(ImageKind::FileLocks, &found.entries)?;
    }
    Ok(())
}

/// Plans all locks, when everything else of the descriptors has been planned.
pub fn plan(cx: &mut Planner<'_>) -> Result<(), ObjectError> {
    for lock in cx.dir.read_all::<FileLockEntry>(ImageKind::FileLocks)? {
        let unknown = || ObjectError::contradiction(format!("a file lock of pid {}, fd {}", lock.pid, lock.fd));
        let task = *cx.tasks.get(&lock.pid).ok_or_else(unknown)?;
        let held = cx.holders.values().flatten().any(|&holder| holder == (task, lock.fd));
        if !held || lock.r#type > libc::F_UNLCK as u32 {
            return Err(unknown());
        }
        let why = format!("file lock ({})", words(&lock));
        match lock.flag {
            flag::FLOCK => {
                let how = match lock.r#type as i32 {
                    libc::F_RDLCK => libc::LOCK_SH,
                    libc::F_WRLCK => libc::LOCK_EX,
                    _ => libc::LOCK_UN,
                };
                cx.plan.push(task, Stage::Wiring, call!(SYS_flock(lock.fd, how | libc::LOCK_NB), why));
            }
            flag::LEASE => {
                cx.plan.push(task, Stage::Wiring, call!(SYS_fcntl(lock.fd, F_SETLEASE, lock.r#type), why));
            }
            flag::OFD => {
                cx.plan.push(task, Stage::Wiring, call!(SYS_fcntl(lock.fd, F_OFD_SETLK, range(&lock)), why));
            }
            flag::POSIX => {
                // Calls of a stage keep their order: the close of what was inherited has been planned already.
                cx.plan.push(task, Stage::Timers, call!(SYS_fcntl(lock.fd, libc::F_SETLK, range(&lock)), why));
            }
            _ => return Err(unknown()),
        }
    }
    Ok(())
}

/// `struct flock`.
fn range(lock: &FileLockEntry) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(32);
    bytes.extend_from_slice(&(lock.r#type as i16).to_ne_bytes());
    bytes.extend_from_slice(&(libc::SEEK_SET as i16).to_ne_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&lock.start.to_ne_bytes());
    bytes.extend_from_slice(&lock.len.to_ne_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_are_understood() {
        let lock = parse(7, 3, "1: POSIX  ADVISORY  WRITE 1234 fe:01:5678 10 109").expect("a lock");
        assert_eq!((lock.flag, lock.r#type, lock.start, lock.len), (flag::POSIX, libc::F_WRLCK as u32, 10, 100));
        let lease = parse(7, 3, "2: LEASE  ACTIVE    READ 1 00:1a:5 0 EOF").expect("a lease");
        assert_eq!((lease.flag, lease.r#type, lease.len), (flag::LEASE, libc::F_RDLCK as u32, 0));
        assert_eq!(parse(7, 3, "1: DELEG ACTIVE READ 1 00:1a:5 0 EOF"), None);
    }
}
