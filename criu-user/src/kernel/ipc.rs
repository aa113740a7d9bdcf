//! System V shared memory segments: shmget(2), shmctl(2), shmat(2).

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;

use nix::errno::Errno;

use super::error::During;
use super::{SysError, SysResult};

/// The segment goes at its last detach: include/uapi/linux/shm.h.
pub const SHM_DEST: u32 = 0o1000;

/// The bits with the size of huge pages, as shmget(2), memfd_create(2) and mmap(2) take it: SHM_HUGE_MASK << SHM_HUGE_SHIFT.
pub const HUGE_SIZE: u32 = 0x3f << 26;

/// What the kernel says of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Its key; 0 for none.
    pub key: i32,
    /// Its id.
    pub id: i32,
    /// Bytes.
    pub size: u64,
    /// Owner: uid, gid.
    pub owner: (u32, u32),
    /// Creator: uid, gid.
    pub creator: (u32, u32),
    /// Permissions and [`SHM_DEST`].
    pub mode: u32,
    /// The size of its pages where those are huge, as shmget(2) takes it: SHM_HUGE_2MB, or 0 for the kernel's default.
    /// [`stat`] does not tell.
    pub huge: Option<u32>,
}

impl Segment {
    /// Bytes that it takes where it is attached.
    pub fn attached_size(&self) -> u64 {
        let page = match self.huge.map(|size| size & HUGE_SIZE) {
            Some(0) => super::proc::huge_page_size(),
            Some(size) => 1 << (size >> HUGE_SIZE.trailing_zeros()),
            None => super::survey::PAGE,
        };
        self.size.checked_next_multiple_of(page).unwrap_or(u64::MAX)
    }
}

fn failed(call: &'static str, id: i32) -> SysError {
    SysError::new(call, format!("segment {id}"), Errno::last())
}

/// Asks for a segment.
pub fn stat(id: i32) -> SysResult<Segment> {
    // SAFETY: all-zero is valid for this plain C struct, which the call fills.
    unsafe {
        let mut ds: libc::shmid_ds = std::mem::zeroed();
        if libc::shmctl(id, libc::IPC_STAT, &raw mut ds) < 0 {
            return Err(failed("shmctl(IPC_STAT)", id));
        }
        let perm = &ds.shm_perm;
        Ok(Segment {
            key: perm.__key,
            id,
            size: ds.shm_segsz as u64,
            owner: (perm.uid, perm.gid),
            creator: (perm.cuid, perm.cgid),
            mode: perm.mode.into(),
            huge: None,
        })
    }
}

/// Creates a segment with an id of our choice (CONFIG_CHECKPOINT_RESTORE: /proc/sys/kernel/shm_next_id).
pub fn create(wanted: &Segment) -> SysResult<()> {
    const NEXT: &str = "/proc/sys/kernel/shm_next_id";
    std::fs::write(NEXT, wanted.id.to_string()).during("write", NEXT)?;
    let huge = wanted.huge.map_or(0, |size| libc::SHM_HUGETLB | (size & HUGE_SIZE) as i32);
    let flags = (wanted.mode & 0o777) as i32 | libc::IPC_CREAT | libc::IPC_EXCL | huge;
    // SAFETY: numbers only.
    let id = unsafe { libc::shmget(wanted.key, wanted.size as usize, flags) };
    if id < 0 {
        return Err(failed("shmget", wanted.id));
    }
    if id != wanted.id {
        remove(id)?;
        return Err(SysError::new("shmget", format!("segment {} (its place is taken)", wanted.id), Errno::EEXIST));
    }
    // SAFETY: the call reads the struct, whose owner and mode are set; all-zero is valid for the rest.
    unsafe {
        let mut ds: libc::shmid_ds = std::mem::zeroed();
        (ds.shm_perm.uid, ds.shm_perm.gid) = wanted.owner;
        ds.shm_perm.mode = (wanted.mode & 0o777) as _;
        if libc::shmctl(id, libc::IPC_SET, &raw mut ds) < 0 {
            return Err(failed("shmctl(IPC_SET)", id));
        }
    }
    Ok(())
}

/// Removes a segment, at its last detach: IPC_RMID.
pub fn remove(id: i32) -> SysResult<()> {
    // SAFETY: numbers only.
    if unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) } < 0 {
        return Err(failed("shmctl(IPC_RMID)", id));
    }
    Ok(())
}

/// The file behind a segment.
pub fn file(segment: &Segment) -> SysResult<OwnedFd> {
    let id = segment.id;
    // SAFETY: attached where the kernel likes, and detached again below; nothing refers to it.
    let at = unsafe { libc::shmat(id, std::ptr::null(), 0) };
    if at as isize == -1 {
        return Err(failed("shmat", id));
    }
    let end = at as u64 + segment.attached_size();
    let path = format!("/proc/self/map_files/{:x}-{end:x}", at as u64);
    let file = OpenOptions::new().read(true).write(true).open(&path).during("open", &path);
    // SAFETY: attached above.
    unsafe { libc::shmdt(at) };
    file.map(Into::into)
}
