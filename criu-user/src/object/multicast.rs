//! Multicast: which groups a socket is a member of and from whom it takes their packets, and how it sends to groups.
//!
//! The kernel lists the groups of interfaces (/proc/net/igmp, /proc/net/igmp6), not those of a socket. But asked for the
//! filter of one group at one interface (MCAST_MSFILTER), a socket says whether it is a member. So each socket is asked
//! for every group that is there: there are few.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use nix::errno::Errno;

use super::inet::ensure;
use super::tcp::ends::{address_of, sockaddr};
use super::{ObjectError, sockopt};
use crate::image::proto::{MembershipEntry, MulticastEntry};
use crate::kernel::interfaces::{self, Group};
use crate::kernel::{SysError, SysResult, socket};

/// Of include/uapi/linux/in.h, for both levels.
const MCAST_JOIN_GROUP: i32 = 42;
const MCAST_MSFILTER: i32 = 48;
const IP_MULTICAST_ALL: i32 = 49;
const IPV6_MULTICAST_ALL: i32 = 29;
/// MCAST_EXCLUDE: all but the sources that are named.
const EXCLUDE: u32 = 0;

/// `struct sockaddr_storage`.
const STORAGE: usize = 128;
/// `struct group_filter` without its sources: the interface, the group, the mode, the number of sources.
const FILTER: usize = 8 + STORAGE + 8;
/// More sources than the kernel lets a socket name by itself (sysctl net.ipv4.igmp_max_msf).
const SOURCES: usize = 64;

/// Options that are numbers, by their level and name, and their fields.
type Number = (i32, i32, fn(&mut MulticastEntry) -> &mut Option<u32>);
const V4_NUMBERS: [Number; 3] = [
    (libc::SOL_IP, libc::IP_MULTICAST_TTL, |e| &mut e.ttl),
    (libc::SOL_IP, libc::IP_MULTICAST_LOOP, |e| &mut e.loopback),
    (libc::SOL_IP, IP_MULTICAST_ALL, |e| &mut e.all),
];
const V6_NUMBERS: [Number; 3] = [
    (libc::SOL_IPV6, libc::IPV6_MULTICAST_HOPS, |e| &mut e.hops6),
    (libc::SOL_IPV6, libc::IPV6_MULTICAST_LOOP, |e| &mut e.loopback6),
    (libc::SOL_IPV6, IPV6_MULTICAST_ALL, |e| &mut e.all6),
];

/// All groups of all interfaces, looked up when the first socket asks.
#[derive(Debug, Default)]
pub struct Groups(Option<Vec<Group>>);

/// Reads what a datagram or raw socket has of multicast.
pub fn capture(file: &OwnedFd, v6: bool, groups: &mut Groups) -> Result<MulticastEntry, ObjectError> {
    let mut entry = MulticastEntry::default();
    for (level, name, field) in V4_NUMBERS.into_iter().chain(v6.then_some(V6_NUMBERS).into_iter().flatten()) {
        *field(&mut entry) = sockopt::where_there(socket::number(file, level, name))?.map(|value| value as u32);
    }
    // Raw sockets of IPv6 have no options of IPv4.
    let by = sockopt::where_there(socket::option(file, libc::SOL_IP, libc::IP_MULTICAST_IF, 4))?;
    entry.interface = by
        .unwrap_or_default()
        .first_chunk()
        .map(|address| u32::from_le_bytes(*address))
        .filter(|&address| address != 0);
    if v6 {
        let index = socket::number(file, libc::SOL_IPV6, libc::IPV6_MULTICAST_IF)?;
        entry.interface6 = interfaces::name_of(index as u32).map(String::into_bytes);
    }
    let known = match &mut groups.0 {
        Some(known) => known,
        empty => empty.insert(interfaces::groups()?),
    };
    for group in known.iter().filter(|group| v6 || group.address.is_ipv4()) {
        entry.groups.extend(membership(file, group)?);
    }
    Ok(entry)
}

/// What a socket takes of a group; `None` if it is no member.
fn membership(file: &OwnedFd, group: &Group) -> Result<Option<MembershipEntry>, ObjectError> {
    let mut room = SOURCES;
    loop {
        let asked = filter(group.index, group.address, EXCLUDE, room as u32, &[]);
        let told = match socket::option_about(file, level(group.address), MCAST_MSFILTER, asked) {
            Err(e) if [Errno::EADDRNOTAVAIL, Errno::ENOPROTOOPT].contains(&e.errno) => return Ok(None),
            other => other?,
        };
        let word = |at: usize| told.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let (mode, count) = (word(8 + STORAGE), word(8 + STORAGE + 4) as usize);
        if count > room {
            room = count;
            continue;
        }
        let sources = told.get(FILTER..).unwrap_or_default().chunks_exact(STORAGE).take(count);
        let sources = sources.filter_map(address_of).map(|source| octets(source.ip())).collect();
        let (ifname, group) = (group.interface.clone().into_bytes(), octets(group.address));
        return Ok(Some(MembershipEntry { ifname, group, mode, sources }));
    }
}

/// Gives a new socket what it had.
pub fn restore(made: &OwnedFd, entry: &MulticastEntry) -> Result<(), ObjectError> {
    let mut entry = entry.clone();
    for (level, name, field) in V4_NUMBERS.into_iter().chain(V6_NUMBERS) {
        if let Some(value) = *field(&mut entry) {
            ensure(made, level, name, value as i32)?;
        }
    }
    if let Some(address) = entry.interface {
        socket::set_option(made, libc::SOL_IP, libc::IP_MULTICAST_IF, &address.to_le_bytes())?;
    }
    if let Some(name) = &entry.interface6 {
        socket::set_number(made, libc::SOL_IPV6, libc::IPV6_MULTICAST_IF, index(name)? as i32)?;
    }
    entry.groups.iter().try_for_each(|group| join(made, group))
}

fn join(made: &OwnedFd, entry: &MembershipEntry) -> Result<(), ObjectError> {
    let strange = || ObjectError::contradiction(format!("a multicast group of {} bytes", entry.group.len()));
    let group = address(&entry.group).ok_or_else(strange)?;
    let sources: Vec<IpAddr> = entry.sources.iter().filter_map(|source| address(source)).collect();
    let index = index(&entry.ifname)?;
    let mut request = Vec::with_capacity(8 + STORAGE);
    push_interface(&mut request, index);
    push_address(&mut request, group);
    socket::set_option(made, level(group), MCAST_JOIN_GROUP, &request)?;
    if entry.mode != EXCLUDE || !sources.is_empty() {
        let filter = filter(index, group, entry.mode, sources.len() as u32, &sources);
        socket::set_option(made, level(group), MCAST_MSFILTER, &filter)?;
    }
    Ok(())
}

/// The number of an interface here.
fn index(name: &[u8]) -> SysResult<u32> {
    let name = String::from_utf8_lossy(name);
    interfaces::index_of(&name).ok_or_else(|| {
        SysError::new("if_nametoindex", format!("the interface {name} of a multicast socket"), Errno::ENODEV)
    })
}

fn level(group: IpAddr) -> i32 {
    if group.is_ipv4() { libc::SOL_IP } else { libc::SOL_IPV6 }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn address(octets: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(octets).ok().map(IpAddr::from);
    v4.or_else(|| <[u8; 16]>::try_from(octets).ok().map(IpAddr::from))
}

fn push_interface(into: &mut Vec<u8>, index: u32) {
    into.extend_from_slice(&index.to_le_bytes());
    into.extend_from_slice(&[0; 4]);
}

fn push_address(into: &mut Vec<u8>, address: IpAddr) {
    let start = into.len();
    into.extend(sockaddr(SocketAddr::new(address, 0)));
    into.resize(start + STORAGE, 0);
}

/// `struct group_filter` with room for `count` sources.
fn filter(index: u32, group: IpAddr, mode: u32, count: u32, sources: &[IpAddr]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(FILTER + count as usize * STORAGE);
    push_interface(&mut bytes, index);
    push_address(&mut bytes, group);
    bytes.extend_from_slice(&mode.to_le_bytes());
    bytes.extend_from_slice(&count.to_le_bytes());
    sources.iter().for_each(|&source| push_address(&mut bytes, source));
    bytes.resize(FILTER + count as usize * STORAGE, 0);
    bytes
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    #[test]
    fn a_filter_is_as_long_as_it_says() {
        let group = IpAddr::from(Ipv4Addr::new(224, 0, 0, 199));
        let bytes = filter(3, group, 1, 2, &[group]);
        assert_eq!(bytes.len(), FILTER + 2 * STORAGE);
        assert_eq!((bytes[0], bytes[8], &bytes[12..16]), (3, libc::AF_INET as u8, &[224, 0, 0, 199][..]));
        assert_eq!((bytes[136], bytes[140]), (1, 2));
        assert_eq!(address_of(&bytes[FILTER..]).map(|end| end.ip()), Some(group));
    }

    #[test]
    fn addresses_are_octets() {
        for end in [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)] {
            assert_eq!(address(&octets(end)), Some(end));
        }
        assert_eq!(address(&[1, 2, 3]), None);
    }
}
