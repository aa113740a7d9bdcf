//! Changes to the packet filter, all or none of them, and questions about it: nfnetlink.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use netlink_bindings::nftables::{Chained, Nfgenmsg};
use netlink_bindings::traits::{NetlinkRequest, Protocol};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

use crate::kernel::socket::{self, Extra};
use crate::kernel::{SysError, SysResult, sock_diag};

/// What nfnetlink(7) counts nf_tables as: NFNL_SUBSYS_NFTABLES.
const SUBSYSTEM: u16 = 10;
/// Tables for both families: NFPROTO_INET.
const INET: u8 = 1;
const NLMSG_ERROR: u16 = 2;
/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// Of an answer only the beginning is read.
const ROOM: usize = 512;

/// The header of messages about tables of both families.
pub(super) fn inet() -> Nfgenmsg {
    Nfgenmsg { nfgen_family: INET, ..Nfgenmsg::default() }
}

/// A connection with the packet filter. Tables that are made by it may live as long as it does.
#[derive(Debug)]
pub(super) struct Netfilter(OwnedFd);

impl Netfilter {
    pub(super) fn open() -> SysResult<Self> {
        socket::new(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_NETFILTER).map(Self)
    }

    /// Makes changes: all of them, or none.
    pub(super) fn change(&self, what: &'static str, fill: impl FnOnce(&mut Chained<'_>)) -> SysResult<()> {
        let mut edge = Nfgenmsg::default();
        edge.set_res_id(SUBSYSTEM);
        let mut batch = Chained::new(1);
        batch.request().op_batch_begin_do(&edge);
        fill(&mut batch);
        batch.request().op_batch_end_do(&edge);
        let batch = batch.finalize();
        let bytes = batch.buf();
        // A message must fit into the buffer, with as many answers.
        if let Ok(room) = i32::try_from(bytes.len()) {
            for name in [libc::SO_SNDBUFFORCE, libc::SO_RCVBUFFORCE] {
                if socket::number(&self.0, libc::SOL_SOCKET, unforced(name))? / 2 < room {
                    socket::set_number(&self.0, libc::SOL_SOCKET, name, room)?;
                }
            }
        }
        socket::send(&self.0, bytes, &Extra::default())?;
        self.outcome(what)
    }

    /// The kernel has answered to every message by now: the first refusal is the reason for all others.
    fn outcome(&self, what: &'static str) -> SysResult<()> {
        let failed = |errno| SysError::new("nf_tables", what, errno);
        let (mut answers, mut refusal) = (0, None);
        loop {
            let mut answer = [0; ROOM];
            let len = match recv(self.0.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT) {
                Ok(len) => len,
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => break,
                Err(errno) => return Err(failed(errno)),
            };
            let answer = &answer[..len.min(ROOM)];
            if sock_diag::u16_at(answer, 4) == NLMSG_ERROR && answer.len() >= HEADER + 4 {
                answers += 1;
                let errno = sock_diag::u32_at(answer, HEADER) as i32;
                refusal = refusal.or((errno != 0).then(|| Errno::from_raw(-errno)));
            }
        }
        match refusal {
            Some(errno) => Err(failed(errno)),
            None if answers == 0 => Err(failed(Errno::EBADMSG)),
            None => Ok(()),
        }
    }
}

/// The option that tells what one of the other sets.
fn unforced(name: i32) -> i32 {
    if name == libc::SO_SNDBUFFORCE { libc::SO_SNDBUF } else { libc::SO_RCVBUF }
}

/// Asks for all of something, and hands the body of every message of the answer to `each`.
pub(super) fn dump(
    what: &'static str,
    request: &impl NetlinkRequest,
    each: impl FnMut(&[u8]) -> Option<()>,
) -> SysResult<()> {
    let Protocol::Raw { request_type, .. } = request.protocol() else {
        return Err(SysError::new("nf_tables", what, Errno::EPROTO));
    };
    let netfilter = Netfilter::open()?;
    let call = ("nf_tables", what);
    sock_diag::ask_by(
        netfilter.0.as_fd(),
        call,
        request_type,
        request.flags() | sock_diag::DUMP,
        request.payload(),
        each,
    )
}
