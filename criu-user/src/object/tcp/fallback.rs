//! Clients of MPTCP whose servers know TCP only. From the first answer on the connection is plain TCP, below a socket of another
//! kind, which has no repair mode; it comes back without that.
//!
//! An eBPF program reads the numbers. What waits to be read can be looked at as in any socket. What is on its way to the peer
//! cannot, so a dump waits until that has said that it has come.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use criu_common::numbers::Numbers;

use super::read::{Connection, TcpError};
use crate::image::proto::InetSkEntry;
use crate::kernel::ebpf::numbers::Reader;
use crate::kernel::socket;
use crate::kernel::tcp::{self, Info};
use crate::object::inet::IPPROTO_MPTCP;
use crate::object::sockopt::state;

/// How long a peer may take to acknowledge what it was sent.
const PATIENCE: Duration = Duration::from_millis(500);

/// Whether a socket is one of MPTCP.
pub(super) fn is_mptcp(entry: &InetSkEntry) -> bool {
    entry.proto as i32 == IPPROTO_MPTCP
}

/// What of a connection of MPTCP the kernel does not let go.
pub(super) fn obstacle(socket: impl AsFd, entry: &InetSkEntry) -> Option<&'static str> {
    /// SOL_MPTCP and MPTCP_INFO, which a connection does not have that goes on as plain TCP.
    const INFO: (i32, i32) = (284, 1);
    if socket::option(socket, INFO.0, INFO.1, 256).is_ok() {
        return Some("is made of several (MPTCP), whose keys the kernel keeps to itself");
    }
    (entry.state != state::ESTABLISHED).then_some(
        "was to be MPTCP, its server knows TCP only, and one side has ended it: the kernel shows nobody how far it is",
    )
}

/// Waits until nothing is on its way to the peer. The program stands still, so nothing new comes; the gate must be open.
pub(super) fn drain(socket: impl AsFd) -> Result<(), TcpError> {
    let end = Instant::now() + PATIENCE;
    loop {
        let left = tcp::lengths(&socket)?.unacknowledged;
        if left == 0 {
            return Ok(());
        }
        if Instant::now() > end {
            return Err(TcpError::Undrained { left });
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Has the kernel bring all that was received to where it can be looked at, and says how much that is.
pub(super) fn gather(socket: impl AsFd) -> Result<u32, TcpError> {
    Ok(tcp::lengths(socket)?.received)
}

/// Where all connections stand.
pub(super) fn numbers(reader: Option<&Reader>) -> Result<HashMap<u64, Numbers>, TcpError> {
    let read = match reader {
        Some(reader) => reader.read(),
        None => Reader::new().and_then(|reader| reader.read()),
    };
    read.map_err(|err| TcpError::Unseen { why: err.to_string() })
}

/// Reads a connection whose numbers were read after it was gathered.
pub(super) fn read(
    socket: impl AsFd,
    gathered: u32,
    numbers: Option<&Numbers>,
    info: &Info,
) -> Result<Connection, TcpError> {
    let numbers = numbers.ok_or_else(|| TcpError::Unseen { why: "it has not come by".into() })?;
    let mut connection = Connection::of(numbers, info).ok_or(TcpError::State { number: numbers.state })?;
    let stream = &mut connection.stream;
    if stream.outq_len != 0 {
        return Err(TcpError::Undrained { left: stream.outq_len });
    }
    if stream.inq_len != 0 {
        return Err(TcpError::Moved { queue: tcp::Queue::Receive, expected: 0, found: stream.inq_len as usize });
    }
    stream.inq_len = gathered;
    connection.data = vec![0; gathered as usize];
    let found = tcp::look(socket, &mut connection.data)?;
    if found != gathered as usize {
        return Err(TcpError::Moved { queue: tcp::Queue::Receive, expected: gathered, found });
    }
    Ok(connection)
}
