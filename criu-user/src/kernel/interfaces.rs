//! The interfaces of this network namespace, and their addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::{InterfaceFlags, if_nametoindex};
use nix::sys::socket::{MsgFlags, NetlinkAddr, SockaddrStorage, bind, recv};

use super::error::During;
use super::{SysError, SysResult, socket};

/// Names and numbers of the interfaces that are up.
pub fn up() -> SysResult<BTreeMap<String, u32>> {
    let all = getifaddrs().during("getifaddrs", "interfaces")?;
    let names: BTreeSet<String> =
        all.filter(|address| address.flags.contains(InterfaceFlags::IFF_UP)).map(|a| a.interface_name).collect();
    // One that has gone meanwhile has no number.
    Ok(names.into_iter().filter_map(|name| Some((name.clone(), if_nametoindex(name.as_str()).ok()?))).collect())
}

/// The addresses of all interfaces.
pub fn addresses() -> SysResult<Vec<IpAddr>> {
    Ok(named_addresses()?.into_iter().map(|(_, address)| address).collect())
}

/// The same, with the name of the interface that has each.
pub fn named_addresses() -> SysResult<Vec<(String, IpAddr)>> {
    let of = |address: SockaddrStorage| {
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::from(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::from(v6.ip())))
    };
    let all = getifaddrs().during("getifaddrs", "addresses")?;
    Ok(all.filter_map(|entry| Some((entry.interface_name, of(entry.address?)?))).collect())
}

/// Tells whether interfaces have come up, or anything else has happened to them: rtnetlink(7).
#[derive(Debug)]
pub struct Watch {
    netlink: OwnedFd,
}

impl Watch {
    /// Looks from now on.
    pub fn new() -> SysResult<Self> {
        /// RTMGRP_LINK.
        const LINKS: u32 = 1;
        let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK;
        let netlink = socket::new(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE)?;
        bind(netlink.as_raw_fd(), &NetlinkAddr::new(0, LINKS)).during("bind", "rtnetlink")?;
        Ok(Self { netlink })
    }

    /// Whether anything has happened since the last look.
    pub fn has_news(&self) -> SysResult<bool> {
        let mut news = false;
        loop {
            match recv(self.netlink.as_raw_fd(), &mut [0; 4096], MsgFlags::MSG_TRUNC) {
                // More has happened than there was room for.
                Ok(_) | Err(Errno::ENOBUFS) => news = true,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(news),
                Err(e) => return Err(SysError::new("recv", "rtnetlink", e)),
            }
        }
    }
}
