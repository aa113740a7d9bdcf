//! Asking the kernel about its sockets: sock_diag(7), over netlink(7). What is asked and answered is of the families
//! ([`inet_diag`](super::inet_diag), [`unix_diag`](super::unix_diag)).
//!
//! The netlink crates know no more of these messages than is needed here, and would be four crates more.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

use super::error::During;
use super::socket::{self, Extra};
use super::{SysError, SysResult};

/// SOCK_DIAG_BY_FAMILY, SOCK_DESTROY.
pub(super) const BY_FAMILY: u16 = 20;
pub(super) const DESTROY: u16 = 21;
/// An answer in any case.
pub(super) const ACK: u16 = 4;
/// All that there are.
pub(super) const DUMP: u16 = 0x300;

const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// The kernel's dumps come in pieces of at most 32 KiB.
const ROOM: usize = 64 << 10;

/// Sends a request and hands every message of the answer to `each`, which gives nothing for one that is malformed.
pub(super) fn ask(
    family: &'static str,
    kind: u16,
    flags: u16,
    request: &[u8],
    each: impl FnMut(&[u8]) -> Option<()>,
) -> SysResult<()> {
    ask_by(open()?.as_fd(), ("sock_diag", family), kind, flags, request, each)
}

/// A socket to ask by.
pub(super) fn open() -> SysResult<OwnedFd> {
    socket::new(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_SOCK_DIAG)
}

/// Asks for one thing, again and again by the same socket: the answer is one short message.
pub(super) fn ask_for_one(
    netlink: BorrowedFd<'_>,
    family: &'static str,
    request: &[u8],
    mut each: impl FnMut(&[u8]) -> Option<()>,
) -> SysResult<()> {
    let call = ("sock_diag", family);
    send(netlink, BY_FAMILY, 0, request)?;
    receive(call, netlink, &mut [0; 4 << 10], &mut each).map(drop)
}

/// The same by a socket of any netlink protocol; `call` says for a reader what is done, on what.
pub(super) fn ask_by(
    netlink: BorrowedFd<'_>,
    call: (&'static str, &'static str),
    kind: u16,
    flags: u16,
    request: &[u8],
    mut each: impl FnMut(&[u8]) -> Option<()>,
) -> SysResult<()> {
    send(netlink, kind, flags, request)?;
    let mut room = vec![0; ROOM];
    while receive(call, netlink, &mut room, &mut each)? {}
    Ok(())
}

fn send(netlink: BorrowedFd<'_>, kind: u16, flags: u16, request: &[u8]) -> SysResult<()> {
    let mut message = Vec::with_capacity(HEADER + request.len());
    message.extend_from_slice(&((HEADER + request.len()) as u32).to_le_bytes());
    message.extend_from_slice(&kind.to_le_bytes());
    message.extend_from_slice(&(NLM_F_REQUEST | flags).to_le_bytes());
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(request);
    socket::send(netlink, &message, &Extra::default()).map(drop)
}

/// Takes one piece of an answer; whether there is more.
fn receive(
    (call, on): (&'static str, &'static str),
    netlink: BorrowedFd<'_>,
    piece: &mut [u8],
    each: &mut impl FnMut(&[u8]) -> Option<()>,
) -> SysResult<bool> {
    let malformed = || SysError::new(call, on, Errno::EBADMSG);
    let len = recv(netlink.as_raw_fd(), piece, MsgFlags::empty()).during("recv", call)?;
    let mut rest = &piece[..len];
    while rest.len() >= HEADER {
        let (len, kind) = (u32_at(rest, 0) as usize, u16_at(rest, 4));
        let message = rest.get(HEADER..len).ok_or_else(malformed)?;
        match kind {
            NLMSG_DONE => return Ok(false),
            NLMSG_ERROR => {
                return match message.get(..4).map_or(0, |_| u32_at(message, 0) as i32) {
                    0 => Ok(false),
                    errno => Err(SysError::new(call, on, Errno::from_raw(-errno))),
                };
            }
            _ => each(message).ok_or_else(malformed)?,
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(true)
}

/// Hands every attribute, its number and its value, to `each`; nothing if one is cut short.
pub(super) fn attributes(mut rest: &[u8], mut each: impl FnMut(u16, &[u8])) -> Option<()> {
    while rest.len() >= 4 {
        let (len, kind) = (usize::from(u16_at(rest, 0)), u16_at(rest, 2));
        each(kind, rest.get(4..len)?);
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(())
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}
