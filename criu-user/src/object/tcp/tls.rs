//! Connections that the kernel encrypts (TLS as an upper layer of the socket).
//!
//! The kernel tells the keys and the numbers of the next records. What it tells nobody is what is under way: calls that read
//! a queue in repair mode get to that layer, and wait there for a record. So such a connection is carried over when nothing
//! of it is: all that was written has been acknowledged, and all that has come has been read.
//!
//! What is hidden in the layer itself:
//!
//! * A record that was begun with MSG_MORE. It is sent, as if the program had done without.
//! * Records that wait for room in the send queue. They go there as soon as that empties.
//! * What is left of a record that was read in part. poll(2) says that there is something to be read.
//! * A part of a record that has not come as a whole. Since Linux 6.0 it stays in the receive queue, unless that is about to
//!   be full (`tls_strp_read_short` of net/tls/tls_strp.c): not with one that can hold some records.

use std::os::fd::AsFd;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;

use super::read::TcpError;
use super::state::State;
use crate::image::proto::TlsEntry;
use crate::kernel::tcp::{self, Lengths};
use crate::kernel::tls::{self, Way};
use crate::kernel::{SysResult, fd, socket};
use crate::object::sockopt::state;

/// How long a peer may take to acknowledge what it was sent.
const PATIENCE: Duration = Duration::from_millis(500);

/// What waits in the layer for room in the send queue is there by then, once that is empty.
const MOMENT: Duration = Duration::from_millis(10);

/// Receive buffers that hold several records at least, of 16 KiB each.
const LARGE: i32 = 128 << 10;

/// Why a connection cannot be carried over whose socket has an upper layer.
pub(super) fn obstacle(file: impl AsFd, in_state: u32) -> SysResult<Option<&'static str>> {
    let fd = file.as_fd();
    if !tls::is_above(fd)? {
        return Ok(Some("has an upper layer that is not known here"));
    }
    if in_state != state::ESTABLISHED {
        return Ok(Some("is encrypted by the kernel (TLS), and one side has ended it"));
    }
    if !tls::keeps_parts() {
        return Ok(Some("is encrypted by the kernel (TLS), which before Linux 6.0 hides what it has received"));
    }
    for way in [Way::Out, Way::In] {
        if tls::keys(fd, way)?.is_some_and(|keys| tls::length(&keys) != Some(keys.len())) {
            return Ok(Some("is encrypted by the kernel (TLS), with a cipher that is not known here"));
        }
    }
    if socket::number(fd, libc::SOL_SOCKET, libc::SO_RCVBUF)? < LARGE {
        return Ok(Some("is encrypted by the kernel (TLS), and its receive buffer has no room for several records"));
    }
    let is_readable = fd::poll_now(fd, PollFlags::POLLIN)?.contains(PollFlags::POLLIN);
    if is_readable || tcp::lengths(fd)?.received > 0 {
        return Ok(Some("is encrypted by the kernel (TLS), and what has come was not read yet"));
    }
    Ok(None)
}

/// Waits until nothing is on its way to the peers. The program stands still, so nothing new comes; the gate must be open.
pub(super) fn drain<F: AsFd>(files: &[F]) -> Result<(), TcpError> {
    for file in files {
        tls::flush(file)?;
    }
    let end = Instant::now() + PATIENCE;
    let mut quiet_since = None;
    loop {
        let mut left = 0;
        for file in files {
            left += tcp::lengths(file)?.unacknowledged;
        }
        match (left, quiet_since) {
            (0, None) => quiet_since = Some(Instant::now()),
            (0, Some(since)) if since.elapsed() >= MOMENT => return Ok(()),
            (0, Some(_)) => {}
            _ if Instant::now() > end => return Err(TcpError::Encrypted { what: "sent, and not acknowledged" }),
            _ => quiet_since = None,
        }
        sleep(Duration::from_millis(1));
    }
}

/// That nothing has come, nor been sent, since it was looked at. The gate is closed.
pub(super) fn expect_idle(file: impl AsFd) -> Result<(), TcpError> {
    match tcp::lengths(&file)? {
        Lengths { received: 1.., .. } => Err(TcpError::Encrypted { what: "received, and not read" }),
        Lengths { unacknowledged: 1.., .. } => Err(TcpError::Encrypted { what: "sent, and not acknowledged" }),
        _ => Ok(()),
    }
}

/// What goes on encrypting it.
pub(super) fn read(file: impl AsFd, state: State) -> Result<TlsEntry, TcpError> {
    if state != State::Established {
        return Err(TcpError::Encrypted { what: "ended" });
    }
    let [tx_zerocopy, rx_no_pad] = tls::hints(&file);
    Ok(TlsEntry {
        tx: tls::keys(&file, Way::Out)?,
        rx: tls::keys(&file, Way::In)?,
        tx_zerocopy: Some(tx_zerocopy),
        rx_no_pad: Some(rx_no_pad),
    })
}

/// Has the kernel encrypt a connection that was just made.
pub(super) fn restore(made: impl AsFd, entry: &TlsEntry) -> Result<(), TcpError> {
    tls::put_above(&made).map_err(TcpError::NoTls)?;
    for (way, keys) in [(Way::Out, &entry.tx), (Way::In, &entry.rx)] {
        keys.as_ref().map_or(Ok(()), |keys| tls::set_keys(&made, way, keys))?;
    }
    Ok(tls::set_hints(&made, [entry.tx_zerocopy(), entry.rx_no_pad()])?)
}
