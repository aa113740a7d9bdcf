//! Another process's memory, from outside: `/proc/PID/mem`, which also reaches what the process itself may not read or
//! write.
//!
//! Kernels can be told to forbid that (`proc_mem.force_override`, CONFIG_PROC_MEM_NO_FORCE). Of a thread that we have
//! stopped, ptrace(2) then does the same, word by word.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::sys::ptrace;
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
        match self.file.read_exact_at(out, addr) {
            Err(_) if peek(self.pid, addr, out).is_ok() => Ok(()),
            outcome => outcome.map_err(|e| self.error("read of /proc/PID/mem", addr, out.len(), &e)),
        }
    }

    /// Writes `bytes` at `addr`, whatever the protection of the mapping.
    pub fn write(&self, addr: u64, bytes: &[u8]) -> SysResult<()> {
        match self.file.write_all_at(bytes, addr) {
            Err(_) if poke(self.pid, addr, bytes).is_ok() => Ok(()),
            outcome => outcome.map_err(|e| self.error("write of /proc/PID/mem", addr, bytes.len(), &e)),
        }
    }

    fn error(&self, call: &'static str, addr: u64, len: usize, err: &std::io::Error) -> SysError {
        SysError::io(call, format!("pid {}, {addr:#x}, {len} bytes", self.pid), err)
    }
}

const WORD: u64 = size_of::<u64>() as u64;

fn word(pid: Pid, addr: u64) -> Result<[u8; WORD as usize], Errno> {
    ptrace::read(pid, std::ptr::without_provenance_mut(addr as usize)).map(i64::to_le_bytes)
}

/// Reads memory of a thread that is stopped and traced by the calling thread: ptrace(PTRACE_PEEKDATA).
fn peek(pid: Pid, addr: u64, out: &mut [u8]) -> Result<(), Errno> {
    let mut at = addr;
    let mut rest = out;
    while !rest.is_empty() {
        let start = at - at % WORD;
        let skip = (at - start) as usize;
        let len = rest.len().min(WORD as usize - skip);
        let (part, others) = rest.split_at_mut(len);
        part.copy_from_slice(&word(pid, start)?[skip..skip + len]);
        (rest, at) = (others, at + len as u64);
    }
    Ok(())
}

/// Writes it: ptrace(PTRACE_POKEDATA).
fn poke(pid: Pid, addr: u64, bytes: &[u8]) -> Result<(), Errno> {
    let mut at = addr;
    let mut rest = bytes;
    while !rest.is_empty() {
        let start = at - at % WORD;
        let skip = (at - start) as usize;
        let (part, others) = rest.split_at(rest.len().min(WORD as usize - skip));
        let mut whole = if part.len() == WORD as usize { [0; WORD as usize] } else { word(pid, start)? };
        whole[skip..skip + part.len()].copy_from_slice(part);
        ptrace::write(pid, std::ptr::without_provenance_mut(start as usize), i64::from_le_bytes(whole))?;
        (rest, at) = (others, at + part.len() as u64);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::probe::helper::Helper;

    /// The code of a helper, a copy of this process, is where ours is, and read-only.
    fn code() -> u64 {
        (code as *const ()).addr() as u64 & !7
    }

    #[test]
    fn word_by_word_it_is_the_same() {
        let helper = Helper::traced(0, || Ok(())).expect("a traced helper");
        let memory = ProcessMemory::open(helper.pid()).expect("its memory");
        for (skip, len) in [(0, 8), (0, 24), (3, 2), (3, 5), (5, 1), (5, 21), (7, 1), (1, 100)] {
            let at = code() + skip;
            let before = memory.read(at - 8, len + 16).expect("code");
            let bytes: Vec<u8> = (0..len).map(|n| n as u8 ^ 0x5a).collect();
            poke(helper.pid(), at, &bytes).expect("written");
            let after = memory.read(at - 8, len + 16).expect("code");
            assert_eq!(after[8..len + 8], bytes, "{len} bytes at {skip}");
            assert_eq!((&after[..8], &after[len + 8..]), (&before[..8], &before[len + 8..]), "what is beside them");
            let mut peeked = vec![0; len];
            peek(helper.pid(), at, &mut peeked).expect("read");
            assert_eq!(peeked, bytes);
        }
    }

    #[test]
    fn who_is_not_traced_is_left_alone() {
        let memory = ProcessMemory::open(Pid::this()).expect("own memory");
        let err = memory.read(0x1000, 8).expect_err("nothing is there");
        assert_eq!(err.call, "read of /proc/PID/mem");
        assert_eq!(peek(Pid::this(), code(), &mut [0; 8]), Err(Errno::ESRCH));
    }
}
