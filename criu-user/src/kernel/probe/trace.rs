//! ptrace(2): what it takes to stop a process, look at it, and act in its place.

use nix::errno::Errno;
use nix::sys::prctl;

use super::helper::Helper;
use super::{Absent, Answer, ensure};
use crate::kernel::error::During;
use crate::kernel::mem::ProcessMemory;
use crate::kernel::ptrace::{self, PendingQueue};

fn nothing() -> Result<(), Errno> {
    Ok(())
}

/// Seizes and stops a process, and reads and writes its registers.
pub fn control() -> Answer {
    let helper = Helper::traced(ptrace::TRACE_SYSGOOD, nothing)?;
    let tid = helper.pid();
    let registers = ptrace::regs(tid)?;
    ptrace::set_regs(tid, &registers)?;
    let mask = ptrace::sigmask(tid)?;
    ptrace::set_sigmask(tid, mask)?;
    ptrace::pending_signals(tid, PendingQueue::Process)?;
    let extended = ptrace::xstate(tid)?;
    ptrace::set_xstate(tid, &extended)?;
    Ok(format!("{} bytes of extended registers", extended.len()))
}

/// PTRACE_GET_RSEQ_CONFIGURATION.
pub fn rseq_configuration() -> Answer {
    let helper = Helper::traced(0, nothing)?;
    let rseq = ptrace::rseq_config(helper.pid());
    let rseq = rseq.ok_or_else(|| Absent::because("ptrace(GET_RSEQ_CONFIGURATION) is refused"))?;
    Ok(if rseq.address == 0 { "none registered here".to_owned() } else { format!("{} bytes long", rseq.size) })
}

/// PTRACE_O_SUSPEND_SECCOMP: the option under which a process is seized.
pub fn suspend_seccomp() -> Answer {
    Helper::traced(ptrace::SUSPEND_SECCOMP | ptrace::TRACE_SYSGOOD, nothing)?;
    Ok(String::new())
}

/// PTRACE_SECCOMP_GET_FILTER: a filter that a process has installed comes back word for word.
pub fn seccomp_filter() -> Answer {
    /// BPF_RET | BPF_K, SECCOMP_RET_ALLOW.
    const ALLOW: libc::sock_filter = libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: 0x7fff_0000 };
    let helper = Helper::traced(0, || {
        prctl::set_no_new_privs()?;
        let mut code = [ALLOW];
        let program = libc::sock_fprog { len: 1, filter: code.as_mut_ptr() };
        // SAFETY: the program and its code live for the call.
        let done = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
        Errno::result(done).map(drop)
    })?;
    let filter = ptrace::seccomp_filters(helper.pid())?.unwrap_or_default();
    ensure(
        filter.first().is_some_and(|(code, _)| code.len() == 8),
        "the kernel gives another filter than was installed",
    )?;
    Ok(String::new())
}

/// Writing into code that is mapped read-only, through /proc/PID/mem, of a process that is traced.
pub fn forced_write() -> Answer {
    let helper = Helper::traced(0, nothing)?;
    let memory = ProcessMemory::open(helper.pid())?;
    // The helper is a copy: its code is where ours is.
    let code = (forced_write as *const ()).addr() as u64;
    let byte = memory.read(code, 1)?;
    memory.write(code, &[!byte[0]])?;
    ensure(memory.read(code, 1)? == [!byte[0]], "a write to /proc/PID/mem is without effect")?;
    Ok(String::new())
}

/// Hardware breakpoints: the processor's debug registers of a traced process.
pub fn breakpoints() -> Answer {
    const REGISTER: usize = std::mem::offset_of!(libc::user, u_debugreg);
    /// Breakpoint 0 for this process, on execution.
    const CONTROL: i64 = 1;
    let helper = Helper::traced(0, nothing)?;
    let code = (breakpoints as *const ()).addr() as i64;
    for (register, value) in [(0, code), (7, CONTROL)] {
        let at = (REGISTER + register * 8) as *mut libc::c_void;
        nix::sys::ptrace::write_user(helper.pid(), at, value).during("ptrace(POKEUSER)", "debug registers")?;
    }
    Ok(String::new())
}
