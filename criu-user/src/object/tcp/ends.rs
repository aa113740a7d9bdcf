//! The two ends of a connection: as sockets, packets and the gate know them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use criu_common::gate;

use crate::image::proto::InetSkEntry;
use crate::kernel::{SysResult, interfaces};

/// The two ends of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    /// Ours.
    pub local: SocketAddr,
    /// The peer's.
    pub remote: SocketAddr,
}

impl Ends {
    /// The ends that an image tells of. `scope` is the number of the interface that link-local addresses are at.
    pub fn of(entry: &InetSkEntry, scope: u32) -> Self {
        let [local, remote] = [(&entry.src_addr[..], entry.src_port), (&entry.dst_addr[..], entry.dst_port)];
        Self::of_words(entry.family, scope, local, remote)
    }

    /// The same of addresses of a family, in words as they stand in memory, and ports.
    pub fn of_words(family: u32, scope: u32, local: (&[u32], u32), remote: (&[u32], u32)) -> Self {
        let end = |(words, port): (&[u32], u32)| {
            let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            match (family as i32, bytes.first_chunk::<16>(), bytes.first_chunk::<4>()) {
                (libc::AF_INET6, Some(v6), _) => {
                    SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::from(*v6), port as u16, 0, scope))
                }
                (_, _, Some(v4)) => SocketAddr::new(IpAddr::from(*v4), port as u16),
                _ => SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port as u16),
            }
        };
        Self { local: end(local), remote: end(remote) }
    }

    /// The ends as packets have them: an IPv4 address that an IPv6 socket sees as mapped travels as itself.
    pub fn on_the_wire(&self) -> Self {
        let plain = |end: SocketAddr| match end.ip().to_canonical() {
            IpAddr::V4(v4) => SocketAddr::new(v4.into(), end.port()),
            IpAddr::V6(_) => end,
        };
        Self { local: plain(self.local), remote: plain(self.remote) }
    }

    /// The ends as the peer sees them.
    pub fn swapped(&self) -> Self {
        Self { local: self.remote, remote: self.local }
    }

    /// The connection as the gate knows it.
    pub fn key(&self) -> gate::Connection {
        let address = |end: SocketAddr| match end.ip() {
            IpAddr::V4(v4) => gate::mapped(v4.octets()),
            IpAddr::V6(v6) => v6.octets(),
        };
        gate::Connection {
            local: address(self.local),
            remote: address(self.remote),
            local_port: self.local.port().to_be_bytes(),
            remote_port: self.remote.port().to_be_bytes(),
        }
    }
}

/// What the gate knows those by that ask for a connection with this end.
pub fn asking(end: SocketAddr) -> gate::Connection {
    let key = Ends { local: end, remote: end }.key();
    gate::Connection::asking(key.local, key.local_port)
}

/// The ends that a listening socket can be reached at: those of all interfaces, if it is bound to any.
pub fn reached_at(end: SocketAddr, v6only: bool) -> SysResult<impl Iterator<Item = SocketAddr>> {
    let any = end.ip().is_unspecified();
    let own = if any { interfaces::addresses()? } else { vec![end.ip()] };
    let reached = move |at: &IpAddr| !any || (at.is_ipv4() && !v6only) || (at.is_ipv6() && end.is_ipv6());
    Ok(own.into_iter().filter(reached).map(move |at| SocketAddr::new(at, end.port())))
}

impl From<gate::Connection> for Ends {
    fn from(key: gate::Connection) -> Self {
        let end =
            |address: [u8; 16], port| SocketAddr::new(IpAddr::from(address).to_canonical(), u16::from_be_bytes(port));
        Self { local: end(key.local, key.local_port), remote: end(key.remote, key.remote_port) }
    }
}

impl std::fmt::Display for Ends {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} to {}", self.local, self.remote)
    }
}

/// `struct sockaddr_in` or `sockaddr_in6`.
pub fn sockaddr(end: SocketAddr) -> Vec<u8> {
    let family = if end.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let mut bytes = (family as u16).to_le_bytes().to_vec();
    bytes.extend_from_slice(&end.port().to_be_bytes());
    match end {
        SocketAddr::V4(v4) => {
            bytes.extend_from_slice(&v4.ip().octets());
            bytes.extend_from_slice(&[0; 8]);
        }
        SocketAddr::V6(v6) => {
            bytes.extend_from_slice(&v6.flowinfo().to_be_bytes());
            bytes.extend_from_slice(&v6.ip().octets());
            bytes.extend_from_slice(&v6.scope_id().to_le_bytes());
        }
    }
    bytes
}

/// What a `struct sockaddr_in` or `sockaddr_in6` says.
pub fn address_of(bytes: &[u8]) -> Option<SocketAddr> {
    let family = i32::from(u16::from_le_bytes(*bytes.first_chunk()?));
    let port = u16::from_be_bytes(*bytes.get(2..)?.first_chunk()?);
    match family {
        libc::AF_INET => Some(SocketAddr::new(IpAddr::from(*bytes.get(4..)?.first_chunk::<4>()?), port)),
        libc::AF_INET6 => {
            let address = Ipv6Addr::from(*bytes.get(8..)?.first_chunk::<16>()?);
            let scope = u32::from_le_bytes(*bytes.get(24..)?.first_chunk()?);
            Some(SocketAddrV6::new(address, port, 0, scope).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_addresses_are_one_connection() {
        let v4 = Ends { local: "127.0.0.1:80".parse().unwrap(), remote: "10.1.2.3:4000".parse().unwrap() };
        let v6 =
            Ends { local: "[::ffff:127.0.0.1]:80".parse().unwrap(), remote: "[::ffff:10.1.2.3]:4000".parse().unwrap() };
        assert_eq!(v6.key(), v4.key());
        assert_eq!(v6.on_the_wire(), v4);
        assert_eq!(Ends::from(v6.key()), v4);
    }

    #[test]
    fn addresses_come_back() {
        for address in ["127.0.0.1:80", "[fd00::1]:4000"] {
            let address: SocketAddr = address.parse().unwrap();
            assert_eq!(address_of(&sockaddr(address)), Some(address));
        }
        assert_eq!(address_of(&[1, 0, 0]), None);
    }

    #[test]
    fn images_have_words() {
        let entry = InetSkEntry {
            family: libc::AF_INET as u32,
            src_addr: vec![u32::from_le_bytes([127, 0, 0, 1])],
            src_port: 80,
            dst_addr: vec![u32::from_le_bytes([10, 1, 2, 3])],
            dst_port: 4000,
            ..InetSkEntry::default()
        };
        assert_eq!(Ends::of(&entry, 0).to_string(), "127.0.0.1:80 to 10.1.2.3:4000");
    }
}
