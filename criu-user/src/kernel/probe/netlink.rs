//! One question and its answer over netlink(7): messages of words and attributes.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

use crate::kernel::socket::{self, Extra};
use crate::kernel::{SysError, SysResult};

/// `NLM_F_*` of include/uapi/linux/netlink.h.
pub(super) const REQUEST: u16 = 1;
pub(super) const ACK: u16 = 4;
pub(super) const DUMP: u16 = 0x300;
pub(super) const CREATE: u16 = 0x600;

const ERROR: u16 = 2;
const HEADER: usize = 16;
const ROOM: usize = 64 << 10;

/// A message that is being put together.
#[derive(Debug, Default)]
pub(super) struct Message(Vec<u8>);

impl Message {
    /// With the fixed part that its type has.
    pub(super) fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(fixed);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        Self(bytes)
    }

    /// Adds an attribute.
    pub(super) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        self.0.extend(attribute(kind, value));
        self
    }

    pub(super) fn bytes(mut self) -> Vec<u8> {
        let len = self.0.len() as u32;
        self.0[..4].copy_from_slice(&len.to_ne_bytes());
        self.0
    }
}

/// `struct nlattr` and its value.
pub(super) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = (4 + value.len() as u16).to_ne_bytes().to_vec();
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// A netlink socket.
#[derive(Debug)]
pub(super) struct Netlink(OwnedFd);

impl Netlink {
    /// Of one of the protocols `NETLINK_*`.
    pub(super) fn open(protocol: i32) -> SysResult<Self> {
        socket::new(libc::AF_NETLINK, libc::SOCK_RAW, protocol).map(Self)
    }

    /// Sends messages, and gives the kernel's first answer: what stands behind its header, empty for a plain yes.
    pub(super) fn ask(&self, what: &'static str, messages: &[u8]) -> SysResult<Vec<u8>> {
        socket::send(&self.0, messages, &Extra::default())?;
        let mut answer = vec![0; ROOM];
        let refused = |errno| SysError::new("netlink", what, errno);
        let len = recv(self.0.as_raw_fd(), &mut answer, MsgFlags::empty()).map_err(refused)?;
        answer.truncate(len);
        let kind = answer.get(4..6).map(|kind| u16::from_ne_bytes([kind[0], kind[1]]));
        let body = answer.get(HEADER..).unwrap_or_default();
        match (kind, body.first_chunk()) {
            (Some(ERROR), Some(code)) => match i32::from_ne_bytes(*code) {
                0 => Ok(Vec::new()),
                errno => Err(refused(Errno::from_raw(-errno))),
            },
            (Some(_), _) => Ok(body.to_vec()),
            (None, _) => Err(refused(Errno::EBADMSG)),
        }
    }
}

/// The value of an attribute in an answer with `fixed` bytes before the first.
pub(super) fn find(answer: &[u8], fixed: usize, wanted: u16) -> Option<&[u8]> {
    let mut rest = answer.get(fixed..)?;
    while let (Some(&[a, b]), Some(&[c, d])) = (rest.first_chunk(), rest.get(2..).and_then(|r| r.first_chunk())) {
        let len = usize::from(u16::from_ne_bytes([a, b]));
        let value = rest.get(4..len)?;
        if u16::from_ne_bytes([c, d]) == wanted {
            return Some(value);
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_behind_each_other() {
        let answer = [vec![9; 4], attribute(1, b"abc"), attribute(2, &7u32.to_ne_bytes())].concat();
        assert_eq!(find(&answer, 4, 1), Some(b"abc".as_slice()));
        assert_eq!(find(&answer, 4, 2), Some(7u32.to_ne_bytes().as_slice()));
        assert_eq!(find(&answer, 4, 3), None);
        assert_eq!(find(&answer[..7], 4, 1), None);
    }
}
