//! What waits in a terminal to be read.
//!
//! The kernel shows it to nobody but a reader, and a reader takes it away. So it is read, with the terminal in a mode
//! that hands everything over, and pushed back in at once. In between, the engine must not die: all of it happens in a
//! process apart, which goes on to the end whatever becomes of the engine.

use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::kernel::tty::{self, Settings};
use crate::kernel::{SysResult, apart, sys};

/// How much the line discipline holds (drivers/tty/n_tty.c, N_TTY_BUF_SIZE less one); what is beyond it waits in front.
const LINE_DISCIPLINE: usize = 4095;
/// Pieces of this size fill the kernel's buffers best: whatever was written in other pieces fits (include/linux/tty.h,
/// TTY_BUFFER_PAGE).
const PIECE: usize = 1792;
/// More than a pair ever holds one way.
const MOST: usize = 256 << 10;

/// One end of a pair.
#[derive(Debug, Clone, Copy)]
pub struct End<'a> {
    /// What is read from or pushed into.
    pub fd: BorrowedFd<'a>,
    /// The other end, for what does not fit into the line discipline.
    pub peer: Option<BorrowedFd<'a>>,
    /// Whether it is the slave, to which alone the settings apply.
    pub slave: bool,
    /// Whether it is a master in packet mode.
    pub packets: bool,
}

/// Whether there may be anything to read: a line that has not come to its end cannot be seen from outside.
pub fn may_hold(end: End<'_>, settings: &Settings) -> bool {
    end.slave && settings.by_lines() || readable(end.fd)
}

/// Asking also has the kernel move what was just written to where it can be read (`n_tty_poll`).
fn readable(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok()
        && fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLIN))
        && sys::readable_bytes(fd).is_ok_and(|n| n > 0)
}

/// What waits at this end. It waits there afterwards as well.
pub fn read(end: End<'_>, settings: &Settings) -> SysResult<Vec<u8>> {
    apart::run(|| {
        in_neutral(end, settings, |lines| {
            if lines {
                tty::set_settings(end.fd, &settings.neutral(false)).map_err(|e| e.errno)?;
            }
            let bytes = take(end)?;
            if lines {
                tty::set_settings(end.fd, &settings.neutral(true)).map_err(|e| e.errno)?;
            }
            put(end, &bytes)?;
            Ok(bytes)
        })
    })
}

/// Makes these bytes wait at this end of a new pair, and gives it its settings.
pub fn fill(end: End<'_>, settings: &Settings, bytes: &[u8]) -> SysResult<()> {
    in_neutral(end, settings, |_| put(end, bytes).map(|()| Vec::new()))
        .map(drop)
        .map_err(|e| crate::kernel::SysError::new("ioctl TIOCSTI", format!("{} bytes", bytes.len()), e))
}

/// Does something while the terminal changes nothing on the way; told whether it hands over lines.
fn in_neutral(
    end: End<'_>,
    settings: &Settings,
    work: impl FnOnce(bool) -> Result<Vec<u8>, Errno>,
) -> Result<Vec<u8>, Errno> {
    let lines = end.slave && settings.by_lines();
    let set = |settings: &Settings| tty::set_settings(end.fd, settings).map_err(|e| e.errno);
    let packets = |on| match end.packets {
        true => sys::set_pty_packet_mode(end.fd, on).map_err(|e| e.errno),
        false => Ok(()),
    };
    packets(0)?;
    set(&settings.neutral(lines))?;
    let outcome = work(lines);
    // Whatever became of it, the terminal is what it was.
    set(settings)?;
    packets(1)?;
    outcome
}

fn take(end: End<'_>) -> Result<Vec<u8>, Errno> {
    let mut bytes = Vec::new();
    let mut piece = [0; 4096];
    // A master's read would wait, so it is asked first.
    while bytes.len() < MOST && readable(end.fd) {
        match nix::unistd::read(end.fd, &mut piece) {
            Ok(0) | Err(Errno::EAGAIN) => break,
            Ok(n) => bytes.extend_from_slice(&piece[..n]),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(bytes)
}

fn put(end: End<'_>, bytes: &[u8]) -> Result<(), Errno> {
    let (near, far) = bytes.split_at(bytes.len().min(LINE_DISCIPLINE));
    for &byte in near {
        tty::push(end.fd, byte).map_err(|e| e.errno)?;
    }
    match end.peer {
        _ if far.is_empty() => Ok(()),
        Some(peer) => write_without_waiting(peer, far),
        None => Err(Errno::ENOSPC),
    }
}

/// Writes all, or fails: waiting would be for a reader that stands still.
fn write_without_waiting(fd: BorrowedFd<'_>, bytes: &[u8]) -> Result<(), Errno> {
    let flags = crate::kernel::fd::flags(fd).map_err(|e| e.errno)?;
    crate::kernel::fd::set_flags(fd, flags | libc::O_NONBLOCK).map_err(|e| e.errno)?;
    let outcome = bytes.chunks(PIECE).try_for_each(|piece| {
        let mut left = piece;
        while !left.is_empty() {
            match nix::unistd::write(fd, left) {
                Ok(n) if n > 0 => left = &left[n..],
                Err(Errno::EINTR) => {}
                Ok(_) | Err(Errno::EAGAIN) => return Err(Errno::ENOSPC),
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    });
    crate::kernel::fd::set_flags(fd, flags).map_err(|e| e.errno)?;
    outcome
}
