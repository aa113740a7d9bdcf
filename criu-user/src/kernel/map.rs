//! Memory shared with other processes.
//!
//! The other side may write at any time, so the memory is never borrowed: bytes are copied in and out, and the words
//! that both sides watch are atomic.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::errno::Errno;

use super::{SysError, SysResult, sys};

/// A shared mapping of a file, unmapped when dropped.
#[derive(Debug)]
pub struct SharedMap {
    base: *mut u8,
    len: usize,
}

impl SharedMap {
    /// Maps `len` bytes of `file`.
    pub fn new(file: impl AsFd, len: usize) -> SysResult<Self> {
        Self::map(file, len, 0, 0)
    }

    /// Maps `len` bytes of `file` at an address where nothing is mapped.
    pub fn new_at(file: impl AsFd, len: usize, address: u64) -> SysResult<Self> {
        Self::map(file, len, address, libc::MAP_FIXED_NOREPLACE)
    }

    fn map(file: impl AsFd, len: usize, address: u64, flags: i32) -> SysResult<Self> {
        // SAFETY: the kernel chooses an address, or takes one where nothing is: no memory of ours is replaced.
        let base = unsafe {
            libc::mmap(
                address as *mut _,
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | flags,
                file.as_fd().as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(SysError::new("mmap", format!("{len} bytes shared"), Errno::last()));
        }
        Ok(Self { base: base.cast(), len })
    }

    /// Where it is mapped here.
    pub fn address(&self) -> u64 {
        self.base as u64
    }

    /// Copies bytes in. Panics if they lie outside, which would be an error of the caller.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.len, "write outside of a shared map");
        // SAFETY: within the mapping, checked above; the source is ours.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(at), bytes.len()) }
    }

    /// Copies bytes out. Panics if they lie outside.
    pub fn read(&self, at: usize, len: usize) -> Vec<u8> {
        assert!(at + len <= self.len, "read outside of a shared map");
        let mut out = vec![0; len];
        // SAFETY: within the mapping, checked above; the destination is ours.
        unsafe { std::ptr::copy_nonoverlapping(self.base.add(at), out.as_mut_ptr(), len) }
        out
    }

    /// Writes a 64-bit number.
    pub fn write_u64(&self, at: usize, value: u64) {
        self.write(at, &value.to_le_bytes());
    }

    /// Reads a 64-bit number.
    pub fn read_u64(&self, at: usize) -> u64 {
        let mut word = [0; 8];
        word.copy_from_slice(&self.read(at, 8));
        u64::from_le_bytes(word)
    }

    fn word(&self, at: usize) -> &AtomicU32 {
        assert!(at.is_multiple_of(4) && at + 4 <= self.len, "word outside of a shared map");
        // SAFETY: aligned and within the mapping, which lives as long as the reference; shared words are only touched
        // atomically.
        unsafe { AtomicU32::from_ptr(self.base.add(at).cast()) }
    }

    /// Sets a word that the other side waits for, and wakes it. futex(2).
    pub fn set_and_wake(&self, at: usize, value: u32) {
        let word = self.word(at);
        word.store(value, Ordering::SeqCst);
        // SAFETY: the address is that of the live word; FUTEX_WAKE takes no other pointer.
        let _ = unsafe { sys::raw(libc::SYS_futex, [word.as_ptr() as u64, libc::FUTEX_WAKE as u64, 1, 0, 0, 0]) };
    }

    /// The value of a word that both sides watch.
    pub fn load(&self, at: usize) -> u32 {
        self.word(at).load(Ordering::SeqCst)
    }

    /// Waits while the word has this value, at most so long. futex(2).
    pub fn wait_while(&self, at: usize, value: u32, at_most: Duration) {
        let word = self.word(at);
        let timeout = libc::timespec { tv_sec: at_most.as_secs() as i64, tv_nsec: at_most.subsec_nanos() as i64 };
        // SAFETY: word and timeout live for the call.
        let _ = unsafe {
            sys::raw(
                libc::SYS_futex,
                [word.as_ptr() as u64, libc::FUTEX_WAIT as u64, value as u64, &raw const timeout as u64, 0, 0],
            )
        };
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // SAFETY: our own mapping, of this length; nothing borrows from it any more.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

/// A file of anonymous shared memory, as MAP_SHARED|MAP_ANONYMOUS makes it, to be mapped by others.
///
/// Only the mapping makes such a file; `/proc/self/map_files` (CAP_CHECKPOINT_RESTORE) opens it.
pub fn anonymous_shared(len: u64) -> SysResult<std::os::fd::OwnedFd> {
    let failed = |call| SysError::new(call, format!("{len} bytes shared"), Errno::last());
    // SAFETY: a new mapping at an address of the kernel's choice.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len as usize,
            libc::PROT_NONE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(failed("mmap"));
    }
    let path = format!("/proc/self/map_files/{:x}-{:x}", base as u64, base as u64 + len);
    let opened = std::fs::OpenOptions::new().read(true).write(true).open(&path);
    // SAFETY: the mapping made above, which nobody has seen.
    unsafe { libc::munmap(base, len as usize) };
    opened.map(Into::into).map_err(|e| SysError::io("open", path, &e))
}
