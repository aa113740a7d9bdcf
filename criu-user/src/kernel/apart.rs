//! Work in a process of its own: what must not be left half done when the engine is killed, or must not happen to the
//! engine itself.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork, pipe2};

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
