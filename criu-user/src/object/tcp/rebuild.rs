//! Makes the steps of a connection's way back.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};

use criu_common::gate::MARK;
use nix::errno::Errno;

use super::course::{Segment, Step};
use super::ends::{Ends, sockaddr};
use super::packet;
use super::read::TcpError;
use crate::kernel::socket::{self, Extra};
use crate::kernel::tcp::{self, Queue};
use crate::kernel::{SysResult, fd, inet_diag};

/// Makes steps on a socket; `data` is what [`super::Connection::data`] was.
pub fn perform(made: impl AsFd, ends: &Ends, data: &[u8], steps: &[Step]) -> Result<(), TcpError> {
    let made = made.as_fd();
    steps.iter().try_for_each(|step| perform_one(made, ends, data, step))
}

fn perform_one(made: BorrowedFd<'_>, ends: &Ends, data: &[u8], step: &Step) -> Result<(), TcpError> {
    match step {
        Step::Repair(repair) => tcp::set_repair(made, *repair)?,
        Step::Bind => socket::bind(made, &sockaddr(ends.local))?,
        Step::Begin(queue, seq) => tcp::set_queue_seq(made, *queue, *seq)?,
        Step::Segments(size) => tcp::set_segments(made, *size)?,
        Step::Connect => connect(made, ends)?,
        Step::Agree(agreed) => tcp::set_negotiated(made, agreed)?,
        Step::Timestamp(stamp) => tcp::set_timestamp(made, *stamp)?,
        Step::Fill(queue, range) => {
            tcp::choose_queue(made, *queue)?;
            tcp::append(made, data.get(range.clone()).unwrap_or_default())?;
        }
        Step::Window(window) => tcp::set_window(made, window)?,
        Step::FinAsSent => {
            tcp::choose_queue(made, Queue::Send)?;
            socket::shutdown(made, libc::SHUT_WR)?;
            tcp::choose_queue(made, Queue::None)?;
        }
        Step::Write(range) => tcp::append(made, data.get(range.clone()).unwrap_or_default())?,
        Step::Fin => socket::shutdown(made, libc::SHUT_WR)?,
        Step::FromPeer(segment) => inject(&ends.swapped(), segment, MARK)?,
        Step::Push => tcp::push(made)?,
        // The gate is open: no mark is needed, and rules of the user's see a packet like any other.
        Step::ToPeer(segment) => inject(ends, segment, 0)?,
    }
    Ok(())
}

/// In repair mode this is instant; a request for a connection is not waited for.
///
/// Where an engine was killed after its dump, the kernel may still be trying to tell the peer of the end of the old
/// socket, and be held by the gate. It is not to, and the new socket takes its place.
fn connect(made: BorrowedFd<'_>, ends: &Ends) -> SysResult<()> {
    let flags = fd::flags(made)?;
    fd::set_flags(made, flags | libc::O_NONBLOCK)?;
    let address = sockaddr(ends.remote);
    let mut outcome = socket::connect(made, &address);
    if outcome.as_ref().is_err_and(|e| e.errno == Errno::EADDRNOTAVAIL) {
        inet_diag::destroy(ends.local, ends.remote)?;
        outcome = socket::connect(made, &address);
    }
    match outcome {
        Err(e) if e.errno == Errno::EINPROGRESS => {}
        other => other?,
    }
    fd::set_flags(made, flags)
}

/// Sends a segment as if from `ends.local`.
fn inject(ends: &Ends, segment: &Segment, mark: u32) -> Result<(), TcpError> {
    Ok(send_raw(&packet::build(ends, segment)?, ends.on_the_wire().remote, mark)?)
}

/// Sends a packet that has its IP header already. raw(7).
pub fn send_raw(packet: &[u8], mut to: SocketAddr, mark: u32) -> SysResult<()> {
    let family = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let raw = socket::new(family, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
    socket::set_number(&raw, libc::SOL_SOCKET, libc::SO_MARK, mark as i32)?;
    // Raw sockets have no ports.
    to.set_port(0);
    socket::send(&raw, packet, &Extra { to: &sockaddr(to), ..Extra::default() }).map(drop)
}
