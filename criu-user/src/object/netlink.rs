//! Netlink sockets: questions to the kernel, and what it tells on its own (routes, devices). netlink(7).

use std::os::fd::{AsFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::ObjectError;
use super::file::{Capture, FileKind, Planner, Seen};
use super::sockopt;
use crate::image::proto::{FdTypes, FileEntry, NetlinkSkEntry};
use crate::kernel::{error::During, fd, socket};
use crate::plan::{FileRef, Opened, Opener};

/// Netlink sockets.
#[derive(Debug)]
pub struct Netlink;

/// Options that are on or off: PKTINFO, BROADCAST_ERROR, NO_ENOBUFS, LISTEN_ALL_NSID, CAP_ACK, EXT_ACK, GET_STRICT_CHK.
const SWITCHES: [i32; 7] = [3, 4, 5, 8, 10, 11, 12];
/// Room for the groups of any family.
const GROUPS: usize = 128;
/// `NETLINK_CONNECTED` of net/netlink/af_netlink.h.
const CONNECTED: u32 = 1;

impl FileKind for Netlink {
    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Netlinksk]
    }

    fn is(&self, seen: &Seen) -> bool {
        seen.family() == Some(libc::AF_NETLINK)
    }

    fn capture(&self, seen: &Seen, cx: &mut Capture<'_>) -> Result<FileEntry, ObjectError> {
        let number = |name| socket::number(&seen.file, libc::SOL_SOCKET, name);
        let own = socket::own_name(&seen.file)?;
        let peer = socket::peer_name(&seen.file)?.unwrap_or_default();
        let (dst_portid, dst_group) = (word(&peer, 4), word(&peer, 8));
        let mut options = Vec::new();
        for name in SWITCHES {
            if sockopt::where_there(socket::number(&seen.file, libc::SOL_NETLINK, name))?.is_some_and(|v| v != 0) {
                options.push(name as u32);
            }
        }
        let members = socket::option(&seen.file, libc::SOL_NETLINK, libc::NETLINK_LIST_MEMBERSHIPS, GROUPS)?;
        let entry = NetlinkSkEntry {
            id: seen.id,
            ino: seen.stat.st_ino as u32,
            protocol: number(libc::SO_PROTOCOL)? as u32,
            state: if dst_portid != 0 || dst_group != 0 { CONNECTED } else { 0 },
            flags: seen.flags,
            portid: word(&own, 4),
            groups: members.chunks_exact(4).map(|b| word(b, 0)).collect(),
            dst_portid,
            // The address has a mask, the image a number.
            dst_group: if dst_group == 0 { 0 } else { dst_group.trailing_zeros() + 1 },
            fown: seen.fown()?,
            opts: sockopt::capture(&seen.file)?,
            r#type: Some(number(libc::SO_TYPE)? as u32),
            options,
            ..NetlinkSkEntry::default()
        };
        // recvmsg(2), even a look, could make the kernel go on with an answer that it has begun.
        let mut waiting = [PollFd::new(seen.file.as_fd(), PollFlags::POLLIN)];
        if poll(&mut waiting, PollTimeout::ZERO).during("poll", "netlink socket")? > 0 {
            cx.refuse(seen.refuse(
                format!("something waits in netlink socket {}", entry.ino),
                "dump when the program has read it",
            ));
        }
        Ok(FileEntry {
            r#type: FdTypes::Netlinksk as i32,
            id: entry.id,
            nlsk: Some(entry.into()),
            ..FileEntry::default()
        })
    }

    fn plan(&self, entry: &FileEntry, cx: &mut Planner<'_>) -> Result<FileRef, ObjectError> {
        let nlsk =
            entry.nlsk.as_ref().ok_or_else(|| ObjectError::contradiction(format!("file {} is empty", entry.id)))?;
        Ok(cx.plan.open(Make { entry: nlsk.clone() }))
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

/// `struct sockaddr_nl`.
fn address(portid: u32, groups: u32) -> Vec<u8> {
    let mut bytes = (libc::AF_NETLINK as u16).to_le_bytes().to_vec();
    bytes.extend_from_slice(&[0; 2]);
    bytes.extend_from_slice(&portid.to_le_bytes());
    bytes.extend_from_slice(&groups.to_le_bytes());
    bytes
}

/// Makes a netlink socket.
#[derive(Debug)]
struct Make {
    entry: Box<NetlinkSkEntry>,
}

impl Opener for Make {
    fn describe(&self) -> String {
        format!("a netlink socket of protocol {}, port {}", self.entry.protocol, self.entry.portid)
    }

    fn open(&self, _: &Opened) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>> {
        let entry = &self.entry;
        let kind = entry.r#type.unwrap_or(libc::SOCK_RAW as u32) as i32;
        let made = socket::new(libc::AF_NETLINK, kind, entry.protocol as i32)?;
        if entry.portid != 0 {
            socket::bind(&made, &address(entry.portid, 0))?;
        }
        for (n, &groups) in entry.groups.iter().enumerate() {
            for bit in (0..32).filter(|bit| groups & 1 << bit != 0) {
                let group = n as i32 * 32 + bit + 1;
                socket::set_number(&made, libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP, group)?;
            }
        }
        if entry.state == CONNECTED {
            let group = entry.dst_group.checked_sub(1).and_then(|bit| 1u32.checked_shl(bit)).unwrap_or(0);
            socket::connect(&made, &address(entry.dst_portid, group))?;
        }
        for &name in &entry.options {
            socket::set_number(&made, libc::SOL_NETLINK, name as i32, 1)?;
        }
        sockopt::restore(&made, &entry.opts)?;
        fd::set_flags(&made, entry.flags as i32)?;
        Ok(made)
    }
}
