//! Staying the parent of a restored tree: signals are passed on, and the end of its root is our own.

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::kernel::SysResult;
use crate::kernel::error::During;

/// Signals that mean the program rather than us. Not among them: those that cannot be caught, those that a program
/// causes itself, and those of job control, by which a shell means us.
const PASSED_ON: [Signal; 11] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGCONT,
    Signal::SIGWINCH,
    Signal::SIGIO,
    Signal::SIGPWR,
];

/// `si_code` of what the kernel sends by itself, such as a terminal for a key: SI_KERNEL of asm-generic/siginfo.h.
const FROM_KERNEL: i32 = 0x80;

/// Whether the tree gets the signals of our terminal by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Terminal {
    /// It is part of our session.
    Shared,
    /// It has another one, or none.
    Other,
}

/// Holds signals back until there is somebody to pass them on to.
#[derive(Debug)]
pub struct Attendant {
    signals: SignalFd,
}

impl Attendant {
    /// From here on signals wait. To be called before the restore, so that none ends us while the tree runs already.
    pub fn begin() -> SysResult<Self> {
        let mut set: SigSet = PASSED_ON.into_iter().collect();
        set.add(Signal::SIGCHLD);
        set.thread_block().during("sigprocmask", "signals to pass on")?;
        let signals = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC).during("signalfd", "signals to pass on")?;
        Ok(Self { signals })
    }

    /// Waits for the end of `root`, a child of ours, and gives its status as a shell would: 128 and the signal for one
    /// that was killed.
    pub fn attend(self, root: Pid, terminal: Terminal) -> SysResult<u8> {
        loop {
            match waitpid(root, Some(WaitPidFlag::WNOHANG)).during("waitpid", root)? {
                WaitStatus::Exited(_, code) => return Ok(code as u8),
                WaitStatus::Signaled(_, signal, _) => return Ok(128 + signal as u8),
                _ => {}
            }
            let info = match self.signals.read_signal() {
                Ok(Some(info)) => info,
                Ok(None) | Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno).during("read", "signals to pass on"),
            };
            let twice = terminal == Terminal::Shared && info.ssi_code == FROM_KERNEL;
            match Signal::try_from(info.ssi_signo as i32) {
                Ok(Signal::SIGCHLD) | Err(_) => {}
                Ok(_) if twice => {}
                // It may have ended this very moment.
                Ok(signal) => drop(kill(root, signal)),
            }
        }
    }
}
