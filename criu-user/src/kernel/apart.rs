//! Work in a process of its own: what must not be left half done when the engine is killed, or must not happen to the
//! engine itself.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, pipe2};

use super::error::During;
use super::{SysError, SysResult};

/// Runs `work` in a child, and gives what it gave. The child is in no way tied to the caller's life.
///
/// `work` runs in a copy of a process that may have had further threads: it should do little but system calls.
pub fn run(work: impl FnOnce() -> Result<Vec<u8>, Errno>) -> SysResult<Vec<u8>> {
    let (from, to) = pipe2(nix::fcntl::OFlag::O_CLOEXEC).during("pipe2", "work apart")?;
    // SAFETY: the child runs `work`, which its callers keep to system calls, and leaves by _exit.
    match unsafe { fork() }.during("fork", "work apart")? {
        ForkResult::Child => {
            drop(from);
            let outcome = work();
            let mut message = match &outcome {
                Ok(_) => 0i32,
                Err(errno) => *errno as i32,
            }
            .to_le_bytes()
            .to_vec();
            message.extend(outcome.unwrap_or_default());
            let _ = File::from(to).write_all(&message);
            // SAFETY: ends this process alone, without running what the parent would run at its end.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => {
            drop(to);
            let mut message = Vec::new();
            let read = File::from(from).read_to_end(&mut message).during("read", "work apart");
            let _ = waitpid(child, None);
            read?;
            let Some((status, bytes)) = message.split_first_chunk::<4>() else {
                return Err(SysError::new("fork", "work apart ended early", Errno::ECHILD));
            };
            match i32::from_le_bytes(*status) {
                0 => Ok(bytes.to_vec()),
                errno => Err(SysError::new("fork", "work apart", Errno::from_raw(errno))),
            }
        }
    }
}

/// A process that looks on, and acts if the caller dies.
///
/// It leads a session of its own, so that whoever kills the caller's group does not take it along, holds none of the
/// caller's files, and is gone when this is dropped.
#[derive(Debug)]
pub struct Watchman {
    child: Pid,
    channel: File,
}

impl Watchman {
    /// What is said when the point is passed from which on there is no way back.
    const PASSED: u8 = b'P';
    /// What is said when nothing need be done any more.
    const DONE: u8 = b'D';

    /// Starts one. Should the caller die, it does `act`, and is told whether the point was passed. It runs in a copy of a
    /// process that may have had further threads: it should do little but system calls.
    pub fn start(act: impl FnOnce(bool)) -> SysResult<Self> {
        let (from, to) = pipe2(nix::fcntl::OFlag::O_CLOEXEC).during("pipe2", "watchman")?;
        // SAFETY: the child runs `act`, which its callers keep to little but system calls, and leaves by _exit.
        match unsafe { fork() }.during("fork", "watchman")? {
            ForkResult::Child => {
                // A leader already would be one of its own.
                let _ = nix::unistd::setsid();
                if let Some(passed) = Self::watch(&from) {
                    act(passed);
                }
                // SAFETY: ends this process alone, without running what the parent would run at its end.
                unsafe { libc::_exit(0) }
            }
            ForkResult::Parent { child } => Ok(Self { child, channel: File::from(to) }),
        }
    }

    /// Waits for the caller's last word, or its end: then whether the point was passed.
    fn watch(from: &OwnedFd) -> Option<bool> {
        // Our copies of the caller's files would keep pipes and sockets open, and its end of this pipe as well.
        let own = from.as_raw_fd() as u32;
        for (first, last) in own.checked_sub(1).map(|last| (0, last)).into_iter().chain([(own + 1, u32::MAX)]) {
            // SAFETY: nothing in this process uses any of them again.
            unsafe { libc::close_range(first, last, 0) };
        }
        let (mut passed, mut word) = (false, [0]);
        loop {
            match nix::unistd::read(from, &mut word) {
                Ok(1) if word[0] == Self::PASSED => passed = true,
                Ok(0) => return Some(passed),
                Err(Errno::EINTR) => {}
                _ => return None,
            }
        }
    }

    /// Says that the point is passed.
    pub fn pass(&self) -> SysResult<()> {
        (&self.channel).write_all(&[Self::PASSED]).during("write", "watchman")
    }
}

impl Drop for Watchman {
    fn drop(&mut self) {
        // Without the word it would act; it is a child of ours, and may have been killed by somebody.
        let _ = (&self.channel).write_all(&[Self::DONE]);
        let _ = waitpid(self.child, None);
    }
}

/// Opens `/dev/tty` as the member of a session that has `terminal` for its controlling terminal would.
///
/// A child leads that session for a moment, and we take the file from it. It gives
/// the terminal up before it ends: the end of a session's leader would hang up on everybody else.
pub fn open_as_controlling(terminal: impl AsFd, flags: i32) -> SysResult<OwnedFd> {
    let terminal = terminal.as_fd();
    let (mine, theirs) = nix::sys::socket::socketpair(
        nix::sys::socket::AddressFamily::Unix,
        nix::sys::socket::SockType::Stream,
        None,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
    )
    .during("socketpair", "/dev/tty")?;
    // SAFETY: the child makes system calls alone, and leaves by _exit.
    match unsafe { fork() }.during("fork", "/dev/tty")? {
        ForkResult::Child => {
            drop(mine);
            let opened = (|| {
                // Giving the terminal up has the foreground group told of it: ourselves.
                nix::sys::signal::SigSet::all().thread_block()?;
                nix::unistd::setsid()?;
                super::tty::take_control(terminal).map_err(|e| e.errno)?;
                let file = nix::fcntl::open(
                    "/dev/tty",
                    nix::fcntl::OFlag::from_bits_retain(flags | libc::O_CLOEXEC),
                    nix::sys::stat::Mode::empty(),
                );
                super::tty::give_up_control(terminal).map_err(|e| e.errno)?;
                file
            })();
            let number = match &opened {
                Ok(file) => file.as_raw_fd(),
                Err(errno) => -(*errno as i32),
            };
            let mut channel = File::from(theirs);
            let _ = channel.write_all(&number.to_le_bytes());
            // The parent takes the file by its number here; its word, or its end, lets us go.
            let _ = channel.read(&mut [0]);
            // SAFETY: as above.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => {
            drop(theirs);
            let mut channel = File::from(mine);
            let mut number = [0; 4];
            let outcome = channel.read_exact(&mut number).during("read", "/dev/tty").and_then(|()| {
                match i32::from_le_bytes(number) {
                    errno if errno < 0 => Err(SysError::new("open", "/dev/tty", Errno::from_raw(-errno))),
                    fd => super::pidfd::PidFd::open(child)?.get(fd),
                }
            });
            drop(channel);
            let _ = waitpid(child, None);
            outcome
        }
    }
}
