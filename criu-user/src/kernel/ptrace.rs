//! ptrace(2), the part that a checkpoint needs: seize, stop, look, change registers, let go.
//!
//! Every tracee belongs to the thread that seized it: the engine does all of this from one thread.

use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::error::During;
use super::seccomp_bpf::Filter;
use super::{SysError, SysResult};

const GETSIGMASK: u32 = 0x420a;
const SETSIGMASK: u32 = 0x420b;
const PEEKSIGINFO: u32 = 0x4209;
const PEEKSIGINFO_SHARED: u32 = 1;
const GET_RSEQ_CONFIGURATION: u32 = 0x420f;
/// NT_X86_XSTATE of include/uapi/linux/elf.h.
const NT_X86_XSTATE: usize = 0x202;
/// PTRACE_O_SUSPEND_SECCOMP of include/uapi/linux/ptrace.h.
pub const SUSPEND_SECCOMP: i32 = 1 << 21;
/// PTRACE_O_TRACESYSGOOD: system-call stops can be told from SIGTRAP.
pub const TRACE_SYSGOOD: i32 = 1;
/// PTRACE_O_EXITKILL: the tracee dies with its tracer.
pub const EXIT_KILL: i32 = 1 << 20;
/// PTRACE_O_TRACEFORK, VFORK and CLONE: what the tracee creates is traced from its first instruction on, with the same
/// options.
pub const TRACE_CHILDREN: i32 = libc::PTRACE_O_TRACEFORK | libc::PTRACE_O_TRACEVFORK | libc::PTRACE_O_TRACECLONE;
/// Bytes of a queued signal's description.
pub const SIGINFO_LEN: usize = 128;

/// Why a tracee stands still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Because of PTRACE_INTERRUPT: it runs on when it is let go.
    Interrupt,
    /// Because of job control, by this signal: it stays stopped when it is let go.
    Group(i32),
    /// Entry to or exit from a system call.
    Syscall,
    /// A signal is about to be delivered.
    Signal(i32),
    /// Another ptrace event (`PTRACE_EVENT_*`).
    Event(i32),
    /// It is gone.
    Exited,
}

/// `struct __ptrace_rseq_configuration`: a thread's registration of restartable sequences.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RseqConfig {
    /// Address of the thread's `struct rseq`; 0 where none is registered.
    pub address: u64,
    /// Its registered length in bytes.
    pub size: u32,
    /// Signature that stands before each abort handler.
    pub signature: u32,
    /// Registration flags.
    pub flags: u32,
    pad: u32,
}

fn raw(request: u32, tid: Pid, addr: usize, data: usize, call: &'static str) -> SysResult<i64> {
    // SAFETY: the callers below pass buffers that live for the call, of the size that they say.
    Errno::result(unsafe { libc::ptrace(request, tid.as_raw(), addr, data) })
        .map_err(|e| SysError::new(call, format!("tid {tid}"), e))
}

/// Attaches to a thread without stopping it.
pub fn seize(tid: Pid, options: i32) -> SysResult<()> {
    // PTRACE_O_SUSPEND_SECCOMP is no constant of nix, which passes unknown bits on.
    ptrace::seize(tid, ptrace::Options::from_bits_retain(options)).during("ptrace(SEIZE)", format!("tid {tid}"))
}

/// Sets the options of a stopped tracee.
pub fn set_options(tid: Pid, options: i32) -> SysResult<()> {
    ptrace::setoptions(tid, ptrace::Options::from_bits_retain(options))
        .during("ptrace(SETOPTIONS)", format!("tid {tid}"))
}

/// What a tracee that stands at an event has to say about it: the pid of its child, at the birth of one.
pub fn event_message(tid: Pid) -> SysResult<i64> {
    ptrace::getevent(tid).during("ptrace(GETEVENTMSG)", format!("tid {tid}"))
}

/// Asks a seized thread to stop.
pub fn interrupt(tid: Pid) -> SysResult<()> {
    ptrace::interrupt(tid).during("ptrace(INTERRUPT)", format!("tid {tid}"))
}

/// Lets a stopped thread run, with a signal to deliver or 0.
pub fn cont(tid: Pid, signal: i32) -> SysResult<()> {
    const CONT: u32 = 7;
    raw(CONT, tid, 0, signal as usize, "ptrace(CONT)").map(drop)
}

/// Lets a stopped thread run to its next system-call entry or exit.
pub fn cont_to_syscall(tid: Pid) -> SysResult<()> {
    ptrace::syscall(tid, None).during("ptrace(SYSCALL)", format!("tid {tid}"))
}

/// Ends tracing; the thread runs on, or stays in its job-control stop.
pub fn detach(tid: Pid) -> SysResult<()> {
    ptrace::detach(tid, None).during("ptrace(DETACH)", format!("tid {tid}"))
}

/// General registers of a stopped thread.
pub fn regs(tid: Pid) -> SysResult<libc::user_regs_struct> {
    ptrace::getregs(tid).during("ptrace(GETREGS)", format!("tid {tid}"))
}

/// Sets the general registers of a stopped thread.
pub fn set_regs(tid: Pid, regs: &libc::user_regs_struct) -> SysResult<()> {
    ptrace::setregs(tid, *regs).during("ptrace(SETREGS)", format!("tid {tid}"))
}

/// Blocked signals of a stopped thread, bit n−1 for signal n.
pub fn sigmask(tid: Pid) -> SysResult<u64> {
    let mut mask = 0u64;
    raw(GETSIGMASK, tid, 8, &raw mut mask as usize, "ptrace(GETSIGMASK)")?;
    Ok(mask)
}

/// Sets the blocked signals of a stopped thread.
pub fn set_sigmask(tid: Pid, mask: u64) -> SysResult<()> {
    raw(SETSIGMASK, tid, 8, &raw const mask as usize, "ptrace(SETSIGMASK)").map(drop)
}

/// The extended state (FPU, SSE, AVX, AVX-512, PKRU …) in the processor's XSAVE layout.
pub fn xstate(tid: Pid) -> SysResult<Vec<u8>> {
    // The largest state in use (AMX) is about 11 KiB.
    let mut bytes = vec![0u8; 16 << 10];
    let mut iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    raw(libc::PTRACE_GETREGSET, tid, NT_X86_XSTATE, &raw mut iov as usize, "ptrace(GETREGSET xstate)")?;
    bytes.truncate(iov.iov_len);
    Ok(bytes)
}

/// Sets the extended state, given in the processor's XSAVE layout.
pub fn set_xstate(tid: Pid, bytes: &[u8]) -> SysResult<()> {
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    raw(libc::PTRACE_SETREGSET, tid, NT_X86_XSTATE, &raw mut iov as usize, "ptrace(SETREGSET xstate)").map(drop)
}

/// The thread's registration of restartable sequences; `None` where the kernel cannot tell.
pub fn rseq_config(tid: Pid) -> Option<RseqConfig> {
    let mut config = RseqConfig::default();
    let size = size_of::<RseqConfig>();
    raw(GET_RSEQ_CONFIGURATION, tid, size, &raw mut config as usize, "ptrace(GET_RSEQ_CONFIGURATION)").ok()?;
    Some(config)
}

/// The filters of seccomp(2) of a stopped thread in the order in which they were installed; empty where it has none,
/// `None` where we may not ask: it takes CAP_SYS_ADMIN, and no seccomp of our own. PTRACE_SECCOMP_GET_FILTER,
/// PTRACE_SECCOMP_GET_METADATA.
pub fn seccomp_filters(tid: Pid) -> SysResult<Option<Vec<Filter>>> {
    let mut filters = Vec::new();
    loop {
        match seccomp_filter(tid, filters.len()) {
            Ok(filter) => filters.push(filter),
            Err(e) => match e.errno {
                // Behind the last; no filters; a kernel without them.
                Errno::ENOENT | Errno::EINVAL | Errno::EIO => return Ok(Some(filters)),
                Errno::EACCES => return Ok(None),
                _ => return Err(e),
            },
        }
    }
}

fn seccomp_filter(tid: Pid, nth: usize) -> SysResult<Filter> {
    const GET_FILTER: u32 = 0x420c;
    const GET_METADATA: u32 = 0x420d;
    const INSTRUCTION: usize = 8;
    let count = raw(GET_FILTER, tid, nth, 0, "ptrace(SECCOMP_GET_FILTER)")? as usize;
    let mut code = vec![0u8; count * INSTRUCTION];
    raw(GET_FILTER, tid, nth, code.as_mut_ptr() as usize, "ptrace(SECCOMP_GET_FILTER)")?;
    // struct seccomp_metadata: which one, its flags.
    let mut metadata = [nth as u64, 0];
    raw(GET_METADATA, tid, size_of_val(&metadata), metadata.as_mut_ptr() as usize, "ptrace(SECCOMP_GET_METADATA)")?;
    Ok((code, metadata[1] as u32))
}

/// Which queue of pending signals to look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PendingQueue {
    /// The thread's own.
    Thread,
    /// The one that all threads of the process share.
    Process,
}

/// Pending signals in their order, each as the kernel's `siginfo_t`.
pub fn pending_signals(tid: Pid, queue: PendingQueue) -> SysResult<Vec<[u8; SIGINFO_LEN]>> {
    #[repr(C)]
    struct PeekArgs {
        off: u64,
        flags: u32,
        nr: i32,
    }
    const CHUNK: usize = 32;
    let flags = if queue == PendingQueue::Process { PEEKSIGINFO_SHARED } else { 0 };
    let mut all = Vec::new();
    loop {
        let args = PeekArgs { off: all.len() as u64, flags, nr: CHUNK as i32 };
        let mut found = [[0u8; SIGINFO_LEN]; CHUNK];
        let n = raw(PEEKSIGINFO, tid, &raw const args as usize, found.as_mut_ptr() as usize, "ptrace(PEEKSIGINFO)")?
            as usize;
        all.extend_from_slice(&found[..n]);
        if n < CHUNK {
            return Ok(all);
        }
    }
}

fn decode(status: WaitStatus) -> Stop {
    match status {
        WaitStatus::Exited(..) | WaitStatus::Signaled(..) => Stop::Exited,
        WaitStatus::PtraceSyscall(_) => Stop::Syscall,
        WaitStatus::PtraceEvent(_, signal, event) if event == libc::PTRACE_EVENT_STOP => match signal {
            Signal::SIGTRAP => Stop::Interrupt,
            other => Stop::Group(other as i32),
        },
        WaitStatus::PtraceEvent(_, _, event) => Stop::Event(event),
        WaitStatus::Stopped(_, signal) => Stop::Signal(signal as i32),
        _ => Stop::Event(0),
    }
}

/// Waits for the next stop of a tracee.
pub fn wait(tid: Pid) -> SysResult<Stop> {
    wait_with(tid, WaitPidFlag::__WALL).map(|stop| stop.unwrap_or(Stop::Exited))
}

/// The next stop of a tracee if there is one already.
pub fn try_wait(tid: Pid) -> SysResult<Option<Stop>> {
    wait_with(tid, WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)
}

fn wait_with(tid: Pid, flags: WaitPidFlag) -> SysResult<Option<Stop>> {
    loop {
        // nix has no name for real-time signals in a wait status: the raw call decodes those.
        let mut status = 0;
        // SAFETY: `status` lives for the call.
        let got = unsafe { libc::waitpid(tid.as_raw(), &raw mut status, flags.bits()) };
        return match Errno::result(got) {
            Ok(0) => Ok(None),
            Ok(_) if libc::WIFSTOPPED(status) && status >> 16 == 0 && libc::WSTOPSIG(status) & 0x7f >= 32 => {
                Ok(Some(Stop::Signal(libc::WSTOPSIG(status))))
            }
            Ok(_) if libc::WIFSIGNALED(status) => Ok(Some(Stop::Exited)),
            Ok(_) => WaitStatus::from_raw(tid, status).map(|s| Some(decode(s))).during("waitpid", tid),
            Err(Errno::EINTR) => continue,
            Err(e) => Err(SysError::new("waitpid", tid, e)),
        };
    }
}

/// Waits until a killed tracee has been collected.
pub fn reap(tid: Pid) {
    loop {
        match waitpid(tid, Some(WaitPidFlag::__WALL)) {
            Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) | Err(Errno::ECHILD) => return,
            Ok(_) => {
                // A stop on its way out (say, an exit event): let it go on.
                let _ = cont(tid, 0);
            }
            Err(_) => {}
        }
    }
}
