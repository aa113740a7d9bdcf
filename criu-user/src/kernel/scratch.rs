//! A file system of our own that nobody else sees, and names in it.
//!
//! A unix socket keeps the name that it was bound by, word for word. A name whose place on disk is taken by now, or must
//! not be made again, is bound below a root directory that is a tmpfs mounted nowhere; it goes away with its last user.

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, chroot, fchdir};

use super::error::During;
use super::root::Root;
use super::{SysError, SysResult, sys};

const FSCONFIG_CMD_CREATE: u64 = 6;

/// A tmpfs that is mounted nowhere.
pub fn filesystem() -> SysResult<OwnedFd> {
    detached(c"tmpfs")
}

/// A new file system of this type that is mounted nowhere: fsopen(2), fsmount(2). Since Linux 5.2.
pub(super) fn detached(kind: &CStr) -> SysResult<OwnedFd> {
    let call = |nr, args, name| {
        // SAFETY: pointers are to strings that live.
        unsafe { sys::raw(nr, args) }.map_err(|e| SysError::new(name, kind.to_string_lossy(), e))
    };
    let context = call(libc::SYS_fsopen, [kind.as_ptr() as u64, 1, 0, 0, 0, 0], "fsopen")?;
    // SAFETY: a new descriptor that nobody else owns.
    let context = unsafe { OwnedFd::from_raw_fd(context as i32) };
    let at = context.as_raw_fd() as u64;
    call(libc::SYS_fsconfig, [at, FSCONFIG_CMD_CREATE, 0, 0, 0, 0], "fsconfig")?;
    let mount = call(libc::SYS_fsmount, [at, 1, 0, 0, 0, 0], "fsmount")?;
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(mount as i32) })
}

/// Where a thread stands in the file system.
#[derive(Debug, Clone)]
pub enum Stand<'a> {
    /// Its root and working directory are this one.
    Below(&'a OwnedFd),
    /// Its working directory is this one, below that root.
    In(Root, PathBuf),
}

/// Does something as if from another directory, in a thread with a root and working directory of its own.
pub fn from<T: Send>(stand: &Stand<'_>, work: impl FnOnce() -> SysResult<T> + Send) -> SysResult<T> {
    let lost = || SysError::new("thread", "working directory", Errno::EIO);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_FS).during("unshare", "CLONE_FS")?;
            match stand {
                Stand::Below(root) => {
                    fchdir(root.as_fd()).during("fchdir", "a file system of our own")?;
                    chroot(".").during("chroot", "a file system of our own")?;
                }
                Stand::In(root, path) => {
                    if let Some(root) = root.path() {
                        chdir(root).during("chdir", root.display())?;
                        chroot(".").during("chroot", root.display())?;
                    }
                    chdir(path).during("chdir", path.display())?;
                }
            }
            work()
        });
        thread.join().unwrap_or_else(|_| Err(lost()))
    })
}

/// mkdir -p of what a name needs.
pub fn make_parents(name: &Path) -> SysResult<()> {
    match name.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Ok(()),
        Some(parent) => std::fs::create_dir_all(parent).during("mkdir", parent.display()),
        None => Ok(()),
    }
}
