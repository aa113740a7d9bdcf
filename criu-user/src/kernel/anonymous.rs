//! Memory of our own, to see what the kernel does with it.

use nix::errno::Errno;

#[cfg(test)]
use super::error::During;
use super::survey::PAGE;
use super::{SysError, SysResult};

/// Anonymous private memory, unmapped when dropped.
pub(super) struct Pages {
    pub(super) start: u64,
    pub(super) len: u64,
}

impl Pages {
    pub(super) fn new(count: u64) -> SysResult<Self> {
        let len = count * PAGE;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: the kernel chooses a place where nothing is.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len as usize, protection, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(SysError::new("mmap", format!("{len} bytes"), Errno::last()));
        }
        Ok(Self { start: at.addr() as u64, len })
    }

    /// Gives advice, `MADV_*`.
    #[cfg(test)]
    pub(super) fn advise(&self, advice: i32) -> SysResult<()> {
        let start = std::ptr::with_exposed_provenance_mut(self.start as usize);
        // SAFETY: our own mapping, to which nobody holds a reference.
        Errno::result(unsafe { libc::madvise(start, self.len as usize, advice) }).during("madvise", "own pages")?;
        Ok(())
    }

    /// Reads a byte of one page, which has the kernel put one there.
    pub(super) fn look(&self, page: u64) -> u8 {
        assert!(page * PAGE < self.len, "one of these pages");
        // SAFETY: the page is ours, mapped and readable.
        unsafe { std::ptr::with_exposed_provenance::<u8>((self.start + page * PAGE) as usize).read_volatile() }
    }

    /// Writes to one page.
    pub(super) fn touch(&self, page: u64) {
        assert!(page * PAGE < self.len, "one of these pages");
        // SAFETY: the page is ours, mapped and writable.
        unsafe { std::ptr::with_exposed_provenance_mut::<u8>((self.start + page * PAGE) as usize).write_volatile(1) };
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: our own mapping, to which nobody holds a reference.
        unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(self.start as usize), self.len as usize) };
    }
}
