//! The interfaces of this network namespace, and their addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::{InterfaceFlags, if_indextoname, if_nametoindex};
use nix::sys::socket::{MsgFlags, NetlinkAddr, SockaddrStorage, bind, recv};

use super::error::During;
use super::{SysError, SysResult, proc, socket};

/// Which way packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the interface to the machine.
    In,
    /// From the machine to the interface.
    Out,
}

impl Way {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::In, Self::Out];
}

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

/// The number of an interface.
pub fn index_of(name: &str) -> Option<u32> {
    if_nametoindex(name).ok()
}

/// The name of an interface; `None` for 0, and for one that has gone.
pub fn name_of(index: u32) -> Option<String> {
    let name = if_indextoname(index).ok()?;
    // Asked for 0, the C library gives an empty name.
    Some(name.to_string_lossy().into_owned()).filter(|name| !name.is_empty())
}

/// A multicast group that somebody at an interface is a member of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// The interface.
    pub interface: String,
    /// Its number.
    pub index: u32,
    /// The group.
    pub address: IpAddr,
}

/// All groups of all interfaces: /proc/net/igmp and /proc/net/igmp6.
pub fn groups() -> SysResult<Vec<Group>> {
    let mut found = v4_groups(&proc::read_text("/proc/net/igmp")?);
    match proc::read_text("/proc/net/igmp6") {
        Ok(text) => found.extend(text.lines().filter_map(v6_group)),
        // A kernel without IPv6.
        Err(e) if e.errno == Errno::ENOENT => {}
        Err(e) => return Err(e),
    }
    Ok(found)
}

/// A line for each interface (`1\tlo        :     1      V3`), and behind it, indented, one for each of its groups, whose
/// address is a word as it stands in memory.
fn v4_groups(text: &str) -> Vec<Group> {
    let (mut at, mut found) = (None, Vec::new());
    for line in text.lines().skip(1) {
        let mut words = line.split_whitespace();
        let first = words.next();
        if !line.starts_with(char::is_whitespace) {
            at = first.and_then(|index| Some((index.parse().ok()?, words.next()?.to_owned())));
        } else if let (Some((index, interface)), Some(Ok(word))) = (&at, first.map(|w| u32::from_str_radix(w, 16))) {
            let (index, address) = (*index, IpAddr::from(word.to_le_bytes()));
            found.push(Group { interface: interface.clone(), index, address });
        }
    }
    found
}

/// A line for each group: `1    lo              ff020000000000000000000000000001     1 0000000C 0`.
fn v6_group(line: &str) -> Option<Group> {
    let mut words = line.split_whitespace();
    let (index, interface) = (words.next()?.parse().ok()?, words.next()?.to_owned());
    let address = u128::from_str_radix(words.next()?, 16).ok()?;
    Some(Group { interface, index, address: IpAddr::from(address.to_be_bytes()) })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_both_families() {
        let text = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
                    1\tlo        :     2      V3\n\t\t\t\tC70000E0     1 0:00000000\t\t0\n\
                    \t\t\t\t010000E0     1 0:00000000\t\t0\n4\teth0      :     1      V3\n\
                    \t\t\t\t010000E0     1 0:00000000\t\t0\n";
        let found: Vec<String> = v4_groups(text).iter().map(|g| format!("{} {}", g.interface, g.address)).collect();
        assert_eq!(found, ["lo 224.0.0.199", "lo 224.0.0.1", "eth0 224.0.0.1"]);
        let group = v6_group("4    eth0            ff020000000000000000000000000001     1 0000000C 0").unwrap();
        assert_eq!((group.index, group.address.to_string().as_str()), (4, "ff02::1"));
        assert_eq!(v6_group("4    eth0"), None);
    }
}
