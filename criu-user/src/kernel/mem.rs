//! Another process's memory, from outside: `/proc/PID/mem`, which also writes to read-only mappings of a traced process.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

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
