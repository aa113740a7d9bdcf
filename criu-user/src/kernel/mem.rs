//! Another process's memory, from outside: `/proc/PID/mem` (which also writes to read-only mappings of a traced
//! process) and process_vm_readv(2).

use std::fs::{File, OpenOptions};
use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_writev};
use nix::unistd::Pid;

use super::error::During;
use super::{SysError, SysResult};

/// The memory of one process.
#[derive(Debug)]
pub struct ProcessMemory {
    file: File,
    pid: Pid,
}

impl ProcessMemory {
    /// Opens `/proc/PID/mem` for reading and writing.
    pub fn open(pid: Pid) -> SysResult<Self> {
        let path = format!("/proc/{pid}/mem");
        let file = OpenOptions::new().read(true).write(true).open(&path).during("open", &path)?;
        Ok(Self { file, pid })
    }

    /// Reads `len` bytes at `addr`.
    pub fn read(&self, addr: u64, len: usize) -> SysResult<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.read_into(addr, &mut bytes)?;
        Ok(bytes)
    }

    /// Fills `out` from `addr`.
    pub fn read_into(&self, addr: u64, out: &mut [u8]) -> SysResult<()> {
        self.file.read_exact_at(out, addr).map_err(|e| self.error("read of /proc/PID/mem", addr, out.len(), &e))
    }

    /// Writes `bytes` at `addr`, whatever the protection of the mapping.
    pub fn write(&self, addr: u64, bytes: &[u8]) -> SysResult<()> {
        self.file.write_all_at(bytes, addr).map_err(|e| self.error("write of /proc/PID/mem", addr, bytes.len(), &e))
    }

    fn error(&self, call: &'static str, addr: u64, len: usize, err: &std::io::Error) -> SysError {
        SysError::io(call, format!("pid {}, {addr:#x}, {len} bytes", self.pid), err)
    }
}

/// Fills pieces of a process's memory (address, length, offset in the file) from a file: process_vm_writev(2) from a
/// buffer that stays in the processor's cache. `moved` is told the bytes of each call.
pub fn fill(pid: Pid, file: &OwnedFd, pieces: &[(u64, u64, u64)], moved: impl Fn(u64)) -> SysResult<()> {
    const BUFFER: usize = 256 << 10;
    /// Pieces moved by one call: IOV_MAX.
    const VECTOR: usize = 1024;
    let mut buffer = vec![0; BUFFER];
    let mut rest = pieces.iter().flat_map(|&(address, len, offset)| {
        (0..len)
            .step_by(BUFFER)
            .map(move |done| (address + done, (len - done).min(BUFFER as u64) as usize, offset + done))
    });
    let mut next = rest.next();
    while let Some((_, _, offset)) = next {
        // Neighbours in the file go together, wherever they lie in memory.
        let mut remote = Vec::new();
        let mut total = 0;
        while let Some((base, len, at)) = next {
            if at != offset + total as u64 || total + len > BUFFER || remote.len() == VECTOR {
                break;
            }
            remote.push(RemoteIoVec { base: base as usize, len });
            total += len;
            next = rest.next();
        }
        let read = nix::sys::uio::pread(file.as_fd(), &mut buffer[..total], offset as i64)
            .during("pread", format!("{total} bytes of pages at {offset}"))?;
        let written = process_vm_writev(pid, &[IoSlice::new(&buffer[..read])], &remote)
            .during("process_vm_writev", format!("pid {pid}, {total} bytes"))?;
        if read != total || written != total {
            return Err(SysError::new("process_vm_writev", format!("pid {pid}, {total} bytes"), Errno::EIO));
        }
        moved(written as u64);
    }
    Ok(())
}
