//! What waits in unix sockets: looked at, never taken, at dump; sent again at restore.

use std::os::fd::OwnedFd;

use super::super::ObjectError;
use super::super::file::{Capture, Seen};
use super::is_stream;
use crate::image::proto::{ScmEntry, SkPacketEntry, SkUcredEntry};
use crate::kernel::socket::{self, Peeked};
use crate::kernel::unix_diag::UnixSocket;
use crate::kernel::{SysResult, sys};

/// Room for a packet at first; there is more for the next try.
const PACKET: usize = 64 << 10;
const RCV_SHUTDOWN: u8 = 1;

type Packet = (SkPacketEntry, Vec<u8>);

/// Where looking begins (SO_PEEK_OFF, socket(7)). It is the program's own option: it gets back what it had, and as soon
/// as possible, because this is a state of the target that an engine that is killed leaves behind.
struct Offset<'a> {
    socket: &'a OwnedFd,
    was: Option<i32>,
}

impl Offset<'_> {
    fn set(&mut self, offset: usize) -> SysResult<()> {
        if self.was.is_none() {
            self.was = Some(socket::number(self.socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF)?);
        }
        socket::set_number(self.socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset as i32)
    }
}

impl Drop for Offset<'_> {
    fn drop(&mut self) {
        if let Some(was) = self.was
            && let Err(err) = socket::set_number(self.socket, libc::SOL_SOCKET, libc::SO_PEEK_OFF, was)
        {
            tracing::error!(%err, "SO_PEEK_OFF could not be put back");
        }
    }
}

/// Reads what waits in a socket.
pub fn capture(seen: &Seen, cx: &mut Capture<'_>, found: &UnixSocket) -> Result<Vec<Packet>, ObjectError> {
    let peeked = if is_stream(found.kind) && found.kind != libc::SOCK_SEQPACKET as u32 {
        stream(&seen.file)?
    } else {
        packets(&seen.file, found.shutdown & RCV_SHUTDOWN != 0)?
    };
    let mut out = Vec::with_capacity(peeked.len());
    for packet in peeked {
        if !packet.others.is_empty() {
            cx.refuse(seen.refuse(
                format!("control messages of types {:?} wait in it", packet.others),
                "dump when the program has read them",
            ));
        }
        let mut rights = Vec::with_capacity(packet.files.len());
        for file in packet.files {
            rights.push(cx.in_flight(seen, file)?);
        }
        let scm = (!rights.is_empty()).then_some(ScmEntry { r#type: libc::SCM_RIGHTS as u32, rights });
        let entry = SkPacketEntry {
            id_for: seen.id,
            length: packet.data.len() as u32,
            scm: scm.into_iter().collect(),
            ucred: packet.sender.filter(|s| s[0] != 0).map(|[pid, uid, gid]| SkUcredEntry { uid, gid, pid }),
            sender_name: packet.from.get(2..).filter(|n| !n.is_empty()).map(<[u8]>::to_vec),
        };
        out.push((entry, packet.data));
    }
    Ok(out)
}

/// Datagrams, one after the other; `shut` says whether the socket gives an end of file.
pub fn packets(file: &OwnedFd, shut: bool) -> Result<Vec<Peeked>, ObjectError> {
    let mut offset = Offset { socket: file, was: None };
    let (mut at, mut room) = (0, PACKET);
    let mut out: Vec<Peeked> = Vec::new();
    loop {
        // The first is to be had without an offset.
        if !out.is_empty() || room > PACKET {
            offset.set(at)?;
        }
        let Some(packet) = socket::peek(file, room)? else { return Ok(out) };
        // End of file looks like a packet of nothing.
        if packet.len == 0 && shut {
            return Ok(out);
        }
        if packet.len > room {
            room = packet.len;
            continue;
        }
        at += packet.len;
        room = PACKET;
        out.push(packet);
    }
}

/// A stream: all of it at once, if there are no descriptors in it.
fn stream(file: &OwnedFd) -> Result<Vec<Peeked>, ObjectError> {
    let total = sys::readable_bytes(std::os::fd::AsFd::as_fd(file))? as usize;
    let mut offset = Offset { socket: file, was: None };
    let mut out = Vec::new();
    let mut at = 0;
    while at < total {
        let mut look = |room: usize| -> Result<Option<Peeked>, ObjectError> {
            if at > 0 || room < total {
                offset.set(at)?;
            }
            Ok(socket::peek(file, room)?)
        };
        let Some(mut piece) = look(total - at)? else { break };
        if piece.len == 0 {
            break;
        }
        if !piece.files.is_empty() {
            // The piece ends with the bytes that the descriptors came with; what is before must not get them.
            let (mut without, mut with) = (0, piece.len);
            while with - without > 1 {
                let middle = without + (with - without) / 2;
                let has_files = look(middle)?.is_some_and(|p| !p.files.is_empty());
                if has_files { with = middle } else { without = middle }
            }
            let rest = piece.data.split_off(without);
            let before = std::mem::replace(&mut piece.data, rest);
            if !before.is_empty() {
                out.push(Peeked { len: before.len(), data: before, sender: piece.sender, ..Peeked::default() });
            }
        }
        at += piece.len;
        piece.from.clear();
        out.push(piece);
    }
    Ok(out)
}
