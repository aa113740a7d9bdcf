//! What a stopped thread was doing, read off its registers: whether a system call was interrupted, and how the thread
//! goes on so that the program does not notice.
//!
//! arch/x86/kernel/signal.c, `arch_do_signal_or_restart`, is the kernel's own half of this: it turns the internal
//! `-ERESTART*` values into a restart when no handler runs. What is added here is the other half: the calls that give
//! plain `-EINTR` after any stop (signal(7), "Interruption of system calls and library functions by stop signals"),
//! and the same decision in the form of data for those who go home without the kernel's help.

use libc::user_regs_struct;

const EINTR: i64 = 4;
const ERESTARTSYS: i64 = 512;
const ERESTARTNOINTR: i64 = 513;
const ERESTARTNOHAND: i64 = 514;
const ERESTART_RESTARTBLOCK: i64 = 516;
/// The `syscall` instruction.
pub const SYSCALL: [u8; 2] = [0x0f, 0x05];
const SYSCALL_LEN: u64 = SYSCALL.len() as u64;

/// Whether a thread at a system-call stop is at the call's entry: there the kernel shows -ENOSYS as its result.
pub fn is_entry(regs: &user_regs_struct) -> bool {
    regs.rax as i64 == -i64::from(libc::ENOSYS)
}

/// How an interrupted system call goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interrupted {
    /// No system call was interrupted.
    No,
    /// It is made again with the same arguments.
    Again {
        /// Its number.
        nr: i64,
    },
    /// It is continued with what remained of its time, which the kernel keeps in the thread's restart block.
    Remainder {
        /// Its number.
        nr: i64,
    },
}

/// Calls that return EINTR after a stop without any signal handler; made again, they do what the program expects.
const EINTR_AFTER_STOP: [i64; 12] = [
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_io_getevents,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_accept,
    libc::SYS_accept4,
];

/// Tells what became of the system call that a stopped thread was in.
///
/// `signal_waits`: a signal that is not blocked is pending, so that an EINTR may be that signal's doing.
pub fn interrupted(regs: &user_regs_struct, signal_waits: bool) -> Interrupted {
    let nr = regs.orig_rax as i64;
    if nr < 0 {
        return Interrupted::No;
    }
    match -(regs.rax as i64) {
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => Interrupted::Again { nr },
        ERESTART_RESTARTBLOCK => Interrupted::Remainder { nr },
        EINTR if !signal_waits && EINTR_AFTER_STOP.contains(&nr) => Interrupted::Again { nr },
        _ => Interrupted::No,
    }
}

/// The same registers as they are in the interruption, for a thread that was let go and has not yet made the
/// restart_syscall(2) by which its call goes on: stopped again there, it would look as if it ran. In another thread, as a
/// restore makes it, that call would go on with what interrupted that one last. `code` reads what stands at an address.
pub fn before_restart(regs: &user_regs_struct, code: impl FnOnce(u64) -> Option<Vec<u8>>) -> Option<user_regs_struct> {
    if regs.rax as i64 != libc::SYS_restart_syscall || code(regs.rip)? != SYSCALL {
        return None;
    }
    let nr = if (regs.orig_rax as i64) < 0 { libc::SYS_restart_syscall as u64 } else { regs.orig_rax };
    let rax = (-ERESTART_RESTARTBLOCK) as u64;
    Some(user_regs_struct { rip: regs.rip + SYSCALL_LEN, rax, orig_rax: nr, ..*regs })
}

/// The registers with which a thread resumes by itself, without the kernel's restart logic.
pub fn resumable(regs: &user_regs_struct, signal_waits: bool) -> user_regs_struct {
    let mut home = *regs;
    match interrupted(regs, signal_waits) {
        Interrupted::No => {}
        // A signal that waits ends these calls: its handler is what the program waits for.
        Interrupted::Again { .. } if signal_waits && -(regs.rax as i64) == ERESTARTNOHAND => {
            home.rax = (-EINTR) as u64;
        }
        Interrupted::Again { nr } => {
            home.rip -= SYSCALL_LEN;
            home.rax = nr as u64;
        }
        Interrupted::Remainder { .. } => {
            home.rip -= SYSCALL_LEN;
            home.rax = libc::SYS_restart_syscall as u64;
        }
    }
    home.orig_rax = u64::MAX;
    home
}

/// The registers to leave a thread with when it is let go by ptrace: as they were, for the kernel to restart what it
/// can, but for the calls that a mere stop ends with EINTR.
pub fn released(regs: &user_regs_struct, signal_waits: bool) -> user_regs_struct {
    if -(regs.rax as i64) == EINTR { resumable(regs, signal_waits) } else { *regs }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Registers of a thread in a call with these arguments.
    pub(crate) fn with_arguments(rdi: u64, rsi: u64, rdx: u64, r10: u64) -> user_regs_struct {
        user_regs_struct { rdi, rsi, rdx, r10, ..stopped_in(libc::SYS_restart_syscall, -ERESTART_RESTARTBLOCK) }
    }

    fn stopped_in(nr: i64, result: i64) -> user_regs_struct {
        user_regs_struct {
            r15: 0,
            r14: 0,
            r13: 0,
            r12: 0,
            rbp: 0,
            rbx: 0,
            r11: 0,
            r10: 0,
            r9: 0,
            r8: 0,
            rax: result as u64,
            rcx: 0,
            rdx: 0,
            rsi: 0,
            rdi: 0,
            orig_rax: nr as u64,
            rip: 0x1002,
            cs: 0,
            eflags: 0,
            rsp: 0,
            ss: 0,
            fs_base: 0,
            gs_base: 0,
            ds: 0,
            es: 0,
            fs: 0,
            gs: 0,
        }
    }

    #[test]
    fn who_is_about_to_restart_a_call_is_still_in_it() {
        let found = stopped_in(libc::SYS_futex, -ERESTART_RESTARTBLOCK);
        let mut home = resumable(&found, false);
        let code = |at| (at == found.rip - SYSCALL_LEN).then(|| SYSCALL.to_vec());
        assert_eq!(before_restart(&home, |_| Some(vec![0x90, 0x90])), None, "219 is any number");
        let again = before_restart(&home, code).expect("a restart");
        assert_eq!(interrupted(&again, false), Interrupted::Remainder { nr: libc::SYS_restart_syscall });
        assert_eq!((again.rip, again.rax), (found.rip, found.rax));
        // As the kernel leaves it, the call's own number is still there.
        home.orig_rax = libc::SYS_futex as u64;
        assert_eq!(before_restart(&home, code), Some(found));
        assert_eq!(before_restart(&found, code), None);
    }

    #[test]
    fn running_code_is_left_alone() {
        let regs = stopped_in(-1, 7);
        assert_eq!(resumable(&regs, false), regs);
    }

    #[test]
    fn a_read_is_made_again() {
        let home = resumable(&stopped_in(libc::SYS_read, -ERESTARTSYS), false);
        assert_eq!((home.rip, home.rax, home.orig_rax), (0x1000, libc::SYS_read as u64, u64::MAX));
    }

    #[test]
    fn a_sleep_goes_on_with_what_remains() {
        let home = resumable(&stopped_in(libc::SYS_nanosleep, -ERESTART_RESTARTBLOCK), false);
        assert_eq!((home.rip, home.rax), (0x1000, libc::SYS_restart_syscall as u64));
    }

    #[test]
    fn epoll_gets_no_eintr_from_a_stop_but_keeps_one_from_a_signal() {
        let regs = stopped_in(libc::SYS_epoll_wait, -EINTR);
        assert_eq!(released(&regs, false).rip, 0x1000);
        assert_eq!(released(&regs, true), regs_with_eintr(&regs));
    }

    fn regs_with_eintr(regs: &user_regs_struct) -> user_regs_struct {
        let mut same = *regs;
        same.orig_rax = u64::MAX;
        same
    }

    #[test]
    fn pause_ends_when_a_signal_waits() {
        let home = resumable(&stopped_in(libc::SYS_pause, -ERESTARTNOHAND), true);
        assert_eq!((home.rip, home.rax), (0x1002, (-EINTR) as u64));
    }
}
