//! Memory shared with other processes.
//!
//! The other side may write at any time, so the memory is never borrowed: bytes are copied in and out, and the words
//! that both sides watch are atomic.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;

use super::error::During;
use super::ipc::HUGE_SIZE;
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

/// A file mapped for the kernel to copy from: whatever becomes of the file meanwhile, nothing of ours reads there, and the
/// kernel gives EFAULT. It is brought in chunk by chunk, and each goes when all that was to be copied of it has been.
#[derive(Debug)]
pub struct SourceMap {
    base: u64,
    len: u64,
    chunks: Vec<Chunk>,
}

/// Two megabytes of it.
#[derive(Debug, Default)]
struct Chunk {
    present: AtomicBool,
    /// Bytes that are still to be copied.
    left: AtomicU64,
}

const CHUNK: u64 = 2 << 20;

impl SourceMap {
    /// Maps a file as far as these parts of it go, which will be copied: offsets and lengths.
    pub fn new(file: impl AsFd, parts: impl Iterator<Item = (u64, u64)> + Clone) -> SysResult<Self> {
        let size = nix::sys::stat::fstat(file.as_fd()).during("fstat", "a file to be mapped")?.st_size as u64;
        let len = parts.clone().map(|(offset, len)| offset.saturating_add(len)).max().unwrap_or(0).min(size);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len as usize,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_fd().as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(SysError::new("mmap", format!("{len} bytes of a file"), Errno::last()));
        }
        let chunks = std::iter::repeat_with(Chunk::default).take(len.div_ceil(CHUNK) as usize).collect();
        let map = Self { base: base as u64, len, chunks };
        for (offset, len) in parts {
            map.each_chunk(offset, len, |_, chunk, bytes| {
                chunk.left.fetch_add(bytes, Ordering::Relaxed);
            });
        }
        Ok(map)
    }

    /// Where this part of it is, brought in if need be; `None` if the file is shorter.
    pub fn part(&self, offset: u64, len: u64) -> Option<u64> {
        let end = offset.checked_add(len).filter(|end| *end <= self.len)?;
        self.each_chunk(offset, end - offset, |start, chunk, _| {
            // Two that come at the same time do it twice.
            if !chunk.present.load(Ordering::Relaxed) {
                // Before Linux 5.14 it does nothing, and the kernel brings pages in one by one as it copies them.
                self.advise(start, libc::MADV_POPULATE_READ);
                chunk.present.store(true, Ordering::Relaxed);
            }
        });
        Some(self.base + offset)
    }

    /// This part has been copied.
    pub fn done_with(&self, offset: u64, len: u64) {
        self.each_chunk(offset, len, |start, chunk, bytes| {
            if chunk.left.fetch_sub(bytes, Ordering::Relaxed) == bytes {
                self.advise(start, libc::MADV_DONTNEED);
            }
        });
    }

    /// The chunks of a part: where each starts, and how many bytes of it belong to the part.
    fn each_chunk(&self, offset: u64, len: u64, each: impl Fn(u64, &Chunk, u64)) {
        let end = offset.saturating_add(len).min(self.len);
        for n in offset / CHUNK..end.div_ceil(CHUNK) {
            let start = n * CHUNK;
            each(start, &self.chunks[n as usize], end.min(start + CHUNK) - offset.max(start));
        }
    }

    fn advise(&self, start: u64, advice: i32) {
        let len = CHUNK.min(self.len - start) as usize;
        // SAFETY: within our own mapping of a file, whose content neither piece of advice that is given here changes.
        unsafe { libc::madvise((self.base + start) as *mut _, len, advice) };
    }
}

impl Drop for SourceMap {
    fn drop(&mut self) {
        // SAFETY: our own mapping, of this length, of which nothing is borrowed.
        unsafe { libc::munmap(self.base as *mut _, self.len as usize) };
    }
}

/// Memory of our own that nobody needs: it is taken so that the machine has it. When it is given back, whoever takes memory next
/// gets this, and need not wait for it (a virtual machine may have to ask its host for what was free for long).
#[derive(Debug)]
pub struct Reserve {
    base: *mut libc::c_void,
    len: usize,
}

impl Reserve {
    /// Takes `len` bytes; nothing where there are none to be had, or before Linux 5.14.
    pub fn take(len: usize) -> Option<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return None;
        }
        let reserve = Self { base, len };
        // SAFETY: our own mapping, which holds nothing. Large pages are there sooner; without them it takes longer.
        let taken = unsafe {
            libc::madvise(base, len, libc::MADV_HUGEPAGE);
            libc::madvise(base, len, libc::MADV_POPULATE_WRITE)
        };
        (taken == 0).then_some(reserve)
    }
}

impl Drop for Reserve {
    fn drop(&mut self) {
        // SAFETY: our own mapping, of this length, of which nothing is borrowed.
        unsafe { libc::munmap(self.base, self.len) };
    }
}

/// A file of anonymous shared memory, as MAP_SHARED|MAP_ANONYMOUS makes it, to be mapped by others.
///
/// Only the mapping makes such a file; `/proc/self/map_files` (CAP_CHECKPOINT_RESTORE) opens it.
pub fn anonymous_shared(len: u64) -> SysResult<std::os::fd::OwnedFd> {
    anonymous_shared_with(len, libc::MAP_NORESERVE)
}

/// The same of huge pages: `size_flag` is MAP_HUGE_2MB and the like, or 0 for the kernel's default.
pub fn anonymous_shared_huge(len: u64, size_flag: u32) -> SysResult<std::os::fd::OwnedFd> {
    anonymous_shared_with(len, libc::MAP_NORESERVE | libc::MAP_HUGETLB | (size_flag & HUGE_SIZE) as i32)
}

fn anonymous_shared_with(len: u64, flags: i32) -> SysResult<std::os::fd::OwnedFd> {
    let failed = |call| SysError::new(call, format!("{len} bytes shared"), Errno::last());
    // SAFETY: a new mapping at an address of the kernel's choice.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len as usize,
            libc::PROT_NONE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS | flags,
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

/// Reads `len` bytes of a file into another that can only be mapped, in pages of this size.
pub fn read_into(to: impl AsFd, to_at: u64, page: u64, from: impl AsFd, from_at: u64, len: u64) -> SysResult<()> {
    let start = to_at / page * page;
    let mapped = ((to_at + len).next_multiple_of(page) - start) as usize;
    let failed = |call, errno| SysError::new(call, format!("{len} bytes of memory at {to_at:#x}"), errno);
    // SAFETY: a new mapping at an address of the kernel's choice.
    let base = unsafe {
        let (prot, fd) = (libc::PROT_READ | libc::PROT_WRITE, to.as_fd().as_raw_fd());
        libc::mmap(std::ptr::null_mut(), mapped, prot, libc::MAP_SHARED, fd, start as i64)
    };
    if base == libc::MAP_FAILED {
        return Err(failed("mmap", Errno::last()));
    }
    let mut done = 0;
    let outcome = loop {
        if done == len {
            break Ok(());
        }
        // SAFETY: the kernel writes to our own mapping, of which nothing is borrowed, and not beyond it.
        let read = Errno::result(unsafe {
            let at = base.cast::<u8>().add((to_at - start + done) as usize);
            libc::pread(from.as_fd().as_raw_fd(), at.cast(), (len - done) as usize, (from_at + done) as i64)
        });
        match read {
            Ok(0) => break Err(failed("pread", Errno::ENODATA)),
            Ok(bytes) => done += bytes as u64,
            Err(Errno::EINTR) => {}
            // A page could not be had.
            Err(Errno::EFAULT) => break Err(failed("pread", Errno::ENOMEM)),
            Err(errno) => break Err(failed("pread", errno)),
        }
    };
    // SAFETY: the mapping made above.
    unsafe { libc::munmap(base, mapped) };
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserve_is_memory_that_is_there_until_it_is_given_back() {
        const LEN: usize = 64 << 20;
        let resident = || {
            let text = std::fs::read_to_string("/proc/self/statm").expect("statm");
            text.split(' ').nth(1).expect("resident pages").parse::<usize>().expect("a number") * 4096
        };
        let before = resident();
        let reserve = Reserve::take(LEN).expect("this machine has 64 MiB");
        assert!(resident() > before + LEN / 2, "it is not there");
        drop(reserve);
        assert!(resident() < before + LEN / 2, "it was not given back");
        assert!(Reserve::take(usize::MAX / 4096 * 4096).is_none(), "nobody has that much");
    }
}
