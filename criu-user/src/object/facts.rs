//! Facts about a thread that no call from outside tells: eBPF reads them off the kernel for all threads in one pass, and
//! where there is no eBPF the thread tells them itself. Both give the same, bit by bit.

use std::collections::HashMap;

use criu_common::survey as record;
use nix::unistd::Pid;

use super::ObjectError;
use super::creds;
use super::signals::inside;
use crate::agent::{Batch, CallId, Guest, Outcome, Room};
use crate::freeze::{FrozenProcess, FrozenThread};
use crate::image::proto::CredsEntry;
use crate::kernel::proc::{self, KeyValues};
use crate::kernel::threads::ThreadRecords;

const PR_GET_PDEATHSIG: u64 = 2;
const PR_GET_SECUREBITS: u64 = 27;
const PR_GET_TIMERSLACK: u64 = 30;
const PR_GET_TID_ADDRESS: u64 = 40;
/// `stack_t`.
const ALTSTACK: usize = 24;
/// `SS_*` of include/uapi/linux/signal.h.
const SS_ONSTACK: u32 = 1;
const SS_DISABLE: u32 = 2;
const SS_AUTODISARM: u32 = 1 << 31;

/// What a thread has registered with the kernel and what the kernel allows it.
#[derive(Debug, Clone, PartialEq)]
pub struct ThreadFacts {
    /// The alternate signal stack, as sigaltstack(2) gives it: address, size, flags.
    pub altstack: (u64, u64, u32),
    /// The word to clear at its end: set_tid_address(2).
    pub clear_child_tid: u64,
    /// PR_GET_PDEATHSIG.
    pub parent_death_signal: u32,
    /// PR_GET_TIMERSLACK, in nanoseconds; real-time threads have none.
    pub timer_slack: u64,
    /// 0, or 1 strict, or 2 filter.
    pub seccomp_mode: u32,
    /// Its name, up to 15 bytes of any kind.
    pub comm: Vec<u8>,
    /// Who it is and what it may do.
    pub creds: CredsEntry,
}

/// Facts of all threads of a process, in their order.
pub fn of_process(
    records: &ThreadRecords,
    guest: &mut Guest<'_>,
    process: &FrozenProcess,
) -> Result<Vec<ThreadFacts>, ObjectError> {
    let mut identities = HashMap::new();
    let mut facts = Vec::with_capacity(process.threads.len());
    for (n, thread) in process.threads.iter().enumerate() {
        facts.push(match records.get(thread.tid()) {
            Some(record) => from_record(process.pid, thread, record, &mut identities)?,
            None => ask(process.pid, guest, thread, n == 0)?,
        });
    }
    Ok(facts)
}

/// `identities`: credentials by the kernel's `struct cred`, which threads share until one of them changes its own.
fn from_record(
    pid: Pid,
    thread: &FrozenThread,
    record: &record::Thread,
    identities: &mut HashMap<u64, CredsEntry>,
) -> Result<ThreadFacts, ObjectError> {
    let mut creds = match identities.get(&record.cred) {
        Some(known) => known.clone(),
        None => {
            let read = creds::from_status(&KeyValues::status(pid, thread.tid())?, record.securebits)?;
            identities.insert(record.cred, read.clone());
            read
        }
    };
    // This is the thread's own, not its credentials'.
    creds.no_new_privs = Some(record.no_new_privs);
    let comm_len = record.comm.iter().position(|&byte| byte == 0).unwrap_or(record.comm.len());
    Ok(ThreadFacts {
        altstack: altstack(record, thread.stopped.regs.rsp),
        clear_child_tid: record.clear_child_tid,
        parent_death_signal: record.pdeath_signal,
        timer_slack: record.timer_slack_ns,
        seccomp_mode: record.seccomp_mode,
        comm: record.comm[..comm_len].to_vec(),
        creds,
    })
}

/// As `do_sigaltstack` of kernel/signal.c would say.
fn altstack(record: &record::Thread, sp: u64) -> (u64, u64, u32) {
    let (start, size) = (record.sas_ss_sp, record.sas_ss_size);
    let kept = record.sas_ss_flags & SS_AUTODISARM;
    let standing = kept == 0 && sp > start && sp - start <= size;
    let now = match (size, standing) {
        (0, _) => SS_DISABLE,
        (_, true) => SS_ONSTACK,
        _ => 0,
    };
    (start, size, kept | now)
}

fn ask(pid: Pid, guest: &mut Guest<'_>, thread: &FrozenThread, first: bool) -> Result<ThreadFacts, ObjectError> {
    let mut batch = Batch::new();
    let question = Question::ask(&mut batch);
    let out = if first { guest.run(&batch)? } else { guest.run_in(&thread.stopped, &batch)? };
    question.answer(pid, thread, &out)
}

/// The calls that make a thread tell.
#[derive(Debug)]
struct Question {
    altstack: (CallId, Room),
    tid_address: (CallId, Room),
    signal: (CallId, Room),
    securebits: CallId,
    timer_slack: CallId,
}

impl Question {
    fn ask(batch: &mut Batch) -> Self {
        let (stack, address, signal) = (batch.room(ALTSTACK), batch.room(8), batch.room(8));
        Self {
            altstack: (batch.call(libc::SYS_sigaltstack, &[0u64.into(), stack.into()]), stack),
            // Only there with CONFIG_CHECKPOINT_RESTORE.
            tid_address: (batch.try_call(libc::SYS_prctl, &[PR_GET_TID_ADDRESS.into(), address.into()]), address),
            signal: (batch.call(libc::SYS_prctl, &[PR_GET_PDEATHSIG.into(), signal.into()]), signal),
            securebits: batch.call(libc::SYS_prctl, &[PR_GET_SECUREBITS.into()]),
            timer_slack: batch.call(libc::SYS_prctl, &[PR_GET_TIMERSLACK.into()]),
        }
    }

    fn answer(&self, pid: Pid, thread: &FrozenThread, out: &Outcome) -> Result<ThreadFacts, ObjectError> {
        let failed = |call, what| inside(pid.as_raw(), call, what);
        out.ret(self.altstack.0).map_err(failed("sigaltstack", "the alternate stack"))?;
        out.ret(self.tid_address.0).map_err(failed("prctl(GET_TID_ADDRESS)", "the tid address"))?;
        out.ret(self.signal.0).map_err(failed("prctl(GET_PDEATHSIG)", "the parent-death signal"))?;
        let securebits = out.ret(self.securebits).map_err(failed("prctl(GET_SECUREBITS)", "credentials"))?;
        let status = KeyValues::status(pid, thread.tid())?;
        let stack = self.altstack.1;
        Ok(ThreadFacts {
            altstack: (out.u64(stack, 0), out.u64(stack, 16), out.u32(stack, 8)),
            clear_child_tid: out.u64(self.tid_address.1, 0),
            parent_death_signal: out.u32(self.signal.1, 0),
            timer_slack: out.ret(self.timer_slack).map_err(failed("prctl(GET_TIMERSLACK)", "the timer slack"))?,
            // Only there with CONFIG_SECCOMP.
            seccomp_mode: status.number("Seccomp", 10).unwrap_or(0) as u32,
            comm: proc::comm(pid, thread.tid())?,
            creds: creds::from_status(&status, securebits as u32)?,
        })
    }
}
