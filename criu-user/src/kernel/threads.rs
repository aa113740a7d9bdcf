//! What eBPF tells about the threads of a process; empty where there is no eBPF.

use std::collections::HashMap;

use criu_common::offsets::Offsets;
use criu_common::survey::Thread;
use nix::unistd::Pid;

use super::ebpf::restart::Restart;

/// The records of a process's threads.
#[derive(Debug, Default)]
pub struct ThreadRecords {
    by_tid: HashMap<Pid, Thread>,
    offsets: Option<Offsets>,
}

impl ThreadRecords {
    /// Of these threads, with what it takes to read them.
    pub fn new(threads: Vec<Thread>, offsets: Offsets) -> Self {
        let by_tid = threads.into_iter().map(|thread| (Pid::from_raw(thread.tid as i32), thread)).collect();
        Self { by_tid, offsets: Some(offsets) }
    }

    /// The record of a thread.
    pub fn get(&self, tid: Pid) -> Option<&Thread> {
        self.by_tid.get(&tid)
    }

    /// What a thread would do in restart_syscall(2), and the number of the system call that it made in the first place.
    pub fn restart(&self, tid: Pid, regs: &libc::user_regs_struct) -> Option<(i64, Restart)> {
        let args = [regs.rdi, regs.rsi, regs.rdx, regs.r10];
        Restart::of_call(self.get(tid)?, self.offsets.as_ref()?, regs.orig_rax as i64, args)
    }
}
