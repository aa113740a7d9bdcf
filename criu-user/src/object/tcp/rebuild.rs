//! Makes the steps of a connection's way back.

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::time::Duration;

use criu_common::gate::{MARK, SWALLOWED};
use nix::errno::Errno;

use super::course::{Segment, Step};
use super::ends::{Ends, sockaddr};
use super::read::TcpError;
use super::{packet, tls};
use crate::kernel::socket::{self, Extra};
use crate::kernel::tcp::{self, Queue};
use crate::kernel::{SysResult, fd, inet_diag};

/// Raw sockets for packets of our own making, by family and mark; each is opened when it is first needed.
#[derive(Debug, Default)]
pub struct Wire {
    sockets: [[OnceLock<OwnedFd>; 2]; 2],
}

/// Whether a packet passes the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// As any other: rules of the user's see it as well.
    Plain,
    /// By the mark.
    Marked,
}

impl Wire {
    fn socket(&self, family: i32, pass: Pass) -> SysResult<&OwnedFd> {
        let slot = &self.sockets[usize::from(family == libc::AF_INET6)][usize::from(pass == Pass::Marked)];
        if let Some(open) = slot.get() {
            return Ok(open);
        }
        let raw = socket::new(family, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
        if pass == Pass::Marked {
            socket::set_number(&raw, libc::SOL_SOCKET, libc::SO_MARK, MARK as i32)?;
        }
        Ok(slot.get_or_init(|| raw))
    }

    /// Sends a packet that has its IP header already. raw(7).
    pub fn send(&self, packet: &[u8], mut to: SocketAddr, pass: Pass) -> SysResult<()> {
        let family = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
        // Raw sockets have no ports.
        to.set_port(0);
        socket::send(self.socket(family, pass)?, packet, &Extra { to: &sockaddr(to), ..Extra::default() }).map(drop)
    }

    /// Sends data that was sent already, in segments of at most this size.
    fn resend(
        &self,
        ends: &Ends,
        first: &Segment,
        stamp: Option<u32>,
        size: usize,
        data: &[u8],
    ) -> Result<(), TcpError> {
        /// About as many as were on their way together.
        const MOST: usize = 64;
        let mut segment = *first;
        for piece in data.chunks(size.max(1)).take(MOST) {
            let packet = packet::build_with(ends, &segment, stamp.map(|own| (own, 0)), piece)?;
            self.send(&packet, ends.on_the_wire().remote, Pass::Plain)?;
            segment.seq = segment.seq.wrapping_add(piece.len() as u32);
        }
        Ok(())
    }

    /// Sends a segment as if from `ends.local`.
    fn inject(&self, ends: &Ends, segment: &Segment, pass: Pass) -> Result<(), TcpError> {
        Ok(self.send(&packet::build(ends, segment)?, ends.on_the_wire().remote, pass)?)
    }
}

/// Makes steps on a socket; `data` is what [`super::Connection::data`] was.
pub fn perform(made: impl AsFd, ends: &Ends, data: &[u8], steps: &[Step], wire: &Wire) -> Result<(), TcpError> {
    let made = made.as_fd();
    steps.iter().try_for_each(|step| perform_one(made, ends, data, step, wire))
}

fn perform_one(made: BorrowedFd<'_>, ends: &Ends, data: &[u8], step: &Step, wire: &Wire) -> Result<(), TcpError> {
    match step {
        Step::Repair(repair) => tcp::set_repair(made, *repair)?,
        Step::Bind => socket::bind(made, &sockaddr(ends.local))?,
        Step::Begin(queue, seq) => tcp::set_queue_seq(made, *queue, *seq)?,
        Step::Segments(size) => tcp::set_segments(made, *size)?,
        Step::Unscaled => tcp::limit_window(made, u16::MAX)?,
        Step::Connect => connect(made, ends)?,
        Step::Request => request(made, ends)?,
        Step::Agree(agreed) => tcp::set_negotiated(made, agreed)?,
        Step::Timestamp(stamp) => tcp::set_timestamp(made, *stamp)?,
        Step::Fill(queue, range) => {
            tcp::choose_queue(made, *queue)?;
            tcp::append(made, data.get(range.clone()).unwrap_or_default())?;
        }
        Step::Window(window) => tcp::set_window(made, window)?,
        Step::Encrypt(entry) => tls::restore(made, entry)?,
        Step::FinAsSent => {
            tcp::choose_queue(made, Queue::Send)?;
            socket::shutdown(made, libc::SHUT_WR)?;
            tcp::choose_queue(made, Queue::None)?;
        }
        Step::Write(range) => tcp::append(made, data.get(range.clone()).unwrap_or_default())?,
        Step::Fin => socket::shutdown(made, libc::SHUT_WR)?,
        Step::FromPeer(segment) => wire.inject(&ends.swapped(), segment, Pass::Marked)?,
        Step::Acknowledged => {
            tcp::choose_queue(made, Queue::Send)?;
            tcp::append(made, &[0])?;
        }
        Step::Sent => swallowed(made)?,
        Step::Wait(time) => wait(made, *time)?,
        Step::Sample(segment, echo) => {
            let ends = ends.swapped();
            // 0 is none that could be newer than the peer's own.
            let packet = packet::build_with(&ends, segment, Some((0, *echo)), &[])?;
            wire.send(&packet, ends.on_the_wire().remote, Pass::Marked)?;
        }
        Step::Again(first, range, stamp) => {
            let size = tcp::segments(made)? as usize;
            wire.resend(ends, first, *stamp, size, data.get(range.clone()).unwrap_or_default())?;
        }
        Step::Push => tcp::push(made)?,
        // The gate is open: no mark is needed.
        Step::ToPeer(segment) => wire.inject(ends, segment, Pass::Plain)?,
    }
    Ok(())
}

/// Sends a byte that the gate takes for itself. Left to the gate's usual way, it would count as not sent.
fn swallowed(made: BorrowedFd<'_>) -> SysResult<()> {
    let mark = |mark| socket::set_number(made, libc::SOL_SOCKET, libc::SO_MARK, mark);
    let before = socket::number(made, libc::SOL_SOCKET, libc::SO_MARK)?;
    mark(SWALLOWED as i32)?;
    tcp::append(made, &[0])?;
    mark(before)
}

/// Until nothing was sent for this time.
fn wait(made: BorrowedFd<'_>, time: Duration) -> SysResult<()> {
    loop {
        let since = tcp::info(made)?.since_sent;
        if since >= time {
            return Ok(());
        }
        // The kernel says so in ticks of its own.
        std::thread::sleep((time - since).max(Duration::from_millis(1)));
    }
}

/// In repair mode this is instant.
///
/// Where an engine was killed after its dump, the kernel may still be trying to tell the peer of the end of the old
/// socket, and be held by the gate. It is not to, and the new socket takes its place.
fn connect(made: BorrowedFd<'_>, ends: &Ends) -> SysResult<()> {
    let address = sockaddr(ends.remote);
    match socket::connect(made, &address) {
        Err(e) if e.errno == Errno::EADDRNOTAVAIL => {
            inet_diag::destroy(ends.local, ends.remote)?;
            socket::connect(made, &address)
        }
        other => other,
    }
}

/// Asks for a connection, and does not wait for the answer.
fn request(made: BorrowedFd<'_>, ends: &Ends) -> SysResult<()> {
    let flags = fd::flags(made)?;
    fd::set_flags(made, flags | libc::O_NONBLOCK)?;
    match connect(made, ends) {
        Err(e) if e.errno == Errno::EINPROGRESS => {}
        other => other?,
    }
    fd::set_flags(made, flags)
}
