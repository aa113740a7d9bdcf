//! Datagrams that a socket has gathered and not sent (UDP_CORK, MSG_MORE): read by eBPF at dump, begun anew at restore.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddrV6};
use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::image::proto::{InetSkEntry, UdpGatheredEntry, UdpOptsEntry};
use crate::kernel::ebpf::gathered::{self, Datagram};
use crate::kernel::socket::Extra;
use crate::kernel::{SysResult, socket, tcp};
use crate::object::file::{Capture, Planner, Seen};
use crate::object::tcp::ends::{address_of, sockaddr};
use crate::object::{ObjectError, sockopt};
use crate::plan::{Deed, FileRef, Opened, Stage};

/// UDP_CORK of udp(7).
const UDP_CORK: i32 = 1;

/// Looks whether a socket is corked, and at what it has gathered.
pub fn capture(
    seen: &Seen,
    cx: &mut Capture<'_>,
    entry: &InetSkEntry,
    opts: &mut UdpOptsEntry,
) -> Result<(), ObjectError> {
    // The level of UDP-Lite's options has its number as well.
    let corked = socket::number(&seen.file, entry.proto as i32, UDP_CORK)? != 0;
    opts.cork = corked.then_some(true);
    if !corked && !gathers(seen)? {
        return Ok(());
    }
    let found = match gathered::all() {
        Ok(all) => all.into_iter().find(|datagram| datagram.record.socket == seen.stat.st_ino),
        // One that is corked may have gathered nothing yet; without eBPF nobody can tell.
        Err(err) => {
            refuse(seen, cx, entry, &err.to_string());
            None
        }
    };
    match found {
        None => {}
        Some(datagram) if datagram.is_whole() => opts.gathered = Some(describe(&datagram, entry)),
        Some(_) => refuse(seen, cx, entry, "some of it is where no program can read it"),
    }
    Ok(())
}

fn refuse(seen: &Seen, cx: &mut Capture<'_>, entry: &InetSkEntry, why: &str) {
    cx.refuse(seen.refuse(
        format!(
            "UDP socket on port {}: what it has gathered so far (UDP_CORK, MSG_MORE) cannot be read: {why}",
            entry.src_port
        ),
        "dump when the program has sent it",
    ));
}

/// Whether the socket keeps something that it has not sent. What is on its way through an interface counts as well, but
/// not for long.
fn gathers(seen: &Seen) -> SysResult<bool> {
    const LOOKS: u32 = 10;
    for _ in 0..LOOKS {
        if tcp::unsent_memory(&seen.file)? == 0 {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(true)
}

/// A datagram as images have it.
fn describe(datagram: &Datagram, entry: &InetSkEntry) -> UdpGatheredEntry {
    let record = &datagram.record;
    let to = datagram.destination();
    // A socket of IPv6 sees addresses of IPv4 as mapped.
    let to = match to.ip() {
        IpAddr::V4(v4) if entry.family as i32 == libc::AF_INET6 => {
            SocketAddrV6::new(v4.to_ipv6_mapped(), to.port(), 0, 0).into()
        }
        _ => to,
    };
    UdpGatheredEntry {
        data: datagram.data.clone(),
        source: match datagram.source() {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        },
        destination: sockaddr(to),
        class: u32::try_from(record.class).ok(),
        ttl: Some(record.ttl).filter(|ttl| *ttl != 0),
        segment: Some(u32::from(record.segment)).filter(|size| *size != 0),
    }
}

/// Corks a new socket.
pub fn restore(made: &OwnedFd, protocol: u32, opts: &UdpOptsEntry) -> SysResult<()> {
    if opts.cork == Some(true) {
        socket::set_number(made, protocol as i32, UDP_CORK, 1)?;
    }
    Ok(())
}

/// Plans that a datagram is begun anew.
pub fn plan(entry: &InetSkEntry, file: FileRef, cx: &mut Planner<'_>) {
    let begun = entry.udp_opts.as_ref().and_then(|opts| opts.gathered.clone());
    // Who can send no more will never send it.
    let closed = sockopt::shutdown_how(entry.shutdown()).is_some_and(|how| how != libc::SHUT_RD);
    if let Some(datagram) = begun.filter(|_| !closed) {
        cx.plan.after(Stage::Groups, Begin { file, datagram });
    }
}

/// Begins a datagram that more is to come of.
#[derive(Debug)]
struct Begin {
    file: FileRef,
    datagram: UdpGatheredEntry,
}

impl Deed for Begin {
    fn describe(&self) -> String {
        format!("begin a datagram of {} bytes ({:?})", self.datagram.data.len(), self.file)
    }

    fn run(&self, opened: &Opened) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let UdpGatheredEntry { data, source, destination, .. } = &self.datagram;
        let file = opened.get(self.file).ok_or("the socket is not there")?;
        let to = address_of(destination).ok_or("a datagram without an address to go to")?;
        let source = address(source).ok_or("a datagram without an address to come from")?;
        let control = control(&self.datagram, source);
        socket::send(file, data, &Extra { to: destination, control, more: true, ..Extra::default() }).map_err(|err| {
            format!("a datagram from {source} to {to} that is not complete cannot be begun anew: {err}; are both addresses and a way there as they were?")
        })?;
        Ok(())
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

/// What is told with it: the address that it comes from, and what was chosen for it alone.
fn control(datagram: &UdpGatheredEntry, source: IpAddr) -> Vec<(i32, i32, Vec<u8>)> {
    let number = |value: u32| value.to_ne_bytes().to_vec();
    let (level, from, class, ttl) = match source {
        IpAddr::V4(v4) => (libc::SOL_IP, (libc::IP_PKTINFO, in_pktinfo(v4)), libc::IP_TOS, libc::IP_TTL),
        IpAddr::V6(v6) => {
            (libc::SOL_IPV6, (libc::IPV6_PKTINFO, in6_pktinfo(v6)), libc::IPV6_TCLASS, libc::IPV6_HOPLIMIT)
        }
    };
    let mut all = vec![(level, from.0, from.1)];
    all.extend(datagram.class.map(|value| (level, class, number(value))));
    all.extend(datagram.ttl.map(|value| (level, ttl, number(value))));
    let segment = datagram.segment.and_then(|size| u16::try_from(size).ok());
    all.extend(segment.map(|size| (libc::SOL_UDP, libc::UDP_SEGMENT, size.to_ne_bytes().to_vec())));
    all
}

/// `struct in_pktinfo`, whose interface is chosen by the kernel.
fn in_pktinfo(source: Ipv4Addr) -> Vec<u8> {
    [[0; 4], source.octets(), [0; 4]].concat()
}

/// `struct in6_pktinfo`, likewise.
fn in6_pktinfo(source: Ipv6Addr) -> Vec<u8> {
    [source.octets().as_slice(), &[0; 4]].concat()
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use criu_common::gathered::Gathered;

    use super::*;

    #[test]
    fn a_datagram_of_ipv4_from_a_socket_of_ipv6_goes_to_a_mapped_address() {
        let mut record = Gathered { family: 2, port: [0, 53], class: -1, ttl: 7, ..Gathered::default() };
        record.destination[..4].copy_from_slice(&[10, 0, 0, 1]);
        record.source[..4].copy_from_slice(&[10, 0, 0, 2]);
        let datagram = Datagram { record, data: b"one".to_vec() };
        let entry = InetSkEntry { family: libc::AF_INET6 as u32, ..InetSkEntry::default() };
        let image = describe(&datagram, &entry);
        let to: SocketAddr = "[::ffff:10.0.0.1]:53".parse().expect("an address");
        assert_eq!(address_of(&image.destination), Some(to));
        assert_eq!((image.class, image.ttl, image.segment), (None, Some(7), None));
        let source = address(&image.source).expect("an address");
        let told = control(&image, source);
        assert_eq!(told[0], (libc::SOL_IP, libc::IP_PKTINFO, vec![0, 0, 0, 0, 10, 0, 0, 2, 0, 0, 0, 0]));
        assert_eq!(told[1], (libc::SOL_IP, libc::IP_TTL, 7u32.to_ne_bytes().to_vec()));
    }

    #[test]
    fn addresses_of_no_length_are_none() {
        assert_eq!(address(&[1, 2, 3]), None);
        assert_eq!(address(&[127, 0, 0, 1]), Some(Ipv4Addr::LOCALHOST.into()));
    }
}
