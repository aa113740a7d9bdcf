//! The packets with which sockets are put into their state, IP header included: TCP segments, and what waits in UDP
//! sockets.

use std::net::SocketAddr;

use etherparse::checksum::Sum16BitWords;
use etherparse::{IpHeaders, IpNumber, PacketBuilder, PacketBuilderStep, TcpHeader, TcpOptionElement};

use super::course::{Flag, Segment};
use super::ends::Ends;
use super::read::TcpError;

const TTL: u8 = 64;

/// The bytes of a segment from `ends.local` to `ends.remote`. Timestamps are left out: a receiver takes a packet without
/// any for one that cannot be old.
pub fn build(ends: &Ends, segment: &Segment) -> Result<Vec<u8>, TcpError> {
    build_with(ends, segment, None, &[])
}

/// The same with data, and with timestamps: the sender's own, and the one that it gives back.
pub fn build_with(
    ends: &Ends,
    segment: &Segment,
    stamps: Option<(u32, u32)>,
    data: &[u8],
) -> Result<Vec<u8>, TcpError> {
    let ends = ends.on_the_wire();
    let mut tcp = ip(&ends)?.tcp(ends.local.port(), ends.remote.port(), segment.seq, segment.window).ack(segment.ack);
    tcp = match segment.flag {
        Flag::None => tcp,
        Flag::Fin => tcp.fin(),
        Flag::Reset => tcp.rst(),
    };
    if let Some((own, echo)) = stamps {
        // As every other sender aligns them.
        let words = [TcpOptionElement::Noop, TcpOptionElement::Noop, TcpOptionElement::Timestamp(own, echo)];
        tcp = tcp.options(&words).map_err(|e| failed(&ends, e.to_string()))?;
    }
    written(&ends, tcp, data)
}

fn written(ends: &Ends, tcp: PacketBuilderStep<TcpHeader>, data: &[u8]) -> Result<Vec<u8>, TcpError> {
    let mut bytes = Vec::with_capacity(tcp.size(data.len()));
    tcp.write(&mut bytes, data).map_err(|e| failed(ends, e.to_string()))?;
    Ok(bytes)
}

/// What answers a request for a connection: the second packet of a handshake. The segment counts from the first byte that
/// follows.
pub fn answer(ends: &Ends, segment: &Segment, options: &[TcpOptionElement]) -> Result<Vec<u8>, TcpError> {
    let ends = ends.on_the_wire();
    let first = segment.seq.wrapping_sub(1);
    let tcp = ip(&ends)?.tcp(ends.local.port(), ends.remote.port(), first, segment.window).syn().ack(segment.ack);
    written(&ends, tcp.options(options).map_err(|e| failed(&ends, e.to_string()))?, &[])
}

/// The bytes of a UDP datagram from `ends.local` to `ends.remote`.
pub fn datagram(ends: &Ends, data: &[u8]) -> Result<Vec<u8>, TcpError> {
    let ends = ends.on_the_wire();
    let udp = ip(&ends)?.udp(ends.local.port(), ends.remote.port());
    let mut bytes = Vec::with_capacity(udp.size(data.len()));
    udp.write(&mut bytes, data).map_err(|e| failed(&ends, e.to_string()))?;
    Ok(bytes)
}

/// The same for UDP-Lite (RFC 3828), with a checksum of all of it.
pub fn lite_datagram(ends: &Ends, data: &[u8]) -> Result<Vec<u8>, TcpError> {
    let ends = ends.on_the_wire();
    /// Everything is covered.
    const COVERAGE: [u8; 2] = [0; 2];
    let [from, to] = [ends.local, ends.remote].map(|end| end.port().to_be_bytes());
    let mut payload = [from, to, COVERAGE, [0; 2]].concat();
    payload.extend_from_slice(data);
    let mut sum = Sum16BitWords::new();
    for end in [ends.local, ends.remote] {
        sum = match end {
            SocketAddr::V4(v4) => sum.add_4bytes(v4.ip().octets()),
            SocketAddr::V6(v6) => sum.add_16bytes(v6.ip().octets()),
        };
    }
    sum = sum.add_4bytes((payload.len() as u32).to_be_bytes()).add_2bytes([0, libc::IPPROTO_UDPLITE as u8]);
    let checksum = sum.add_slice(&payload).to_ones_complement_with_no_zero();
    payload[6..8].copy_from_slice(&checksum.to_ne_bytes());
    let ip = ip(&ends)?;
    let mut bytes = Vec::with_capacity(ip.size(payload.len()));
    ip.write(&mut bytes, IpNumber(libc::IPPROTO_UDPLITE as u8), &payload).map_err(|e| failed(&ends, e.to_string()))?;
    Ok(bytes)
}

fn ip(ends: &Ends) -> Result<PacketBuilderStep<IpHeaders>, TcpError> {
    match (ends.local, ends.remote) {
        (SocketAddr::V4(from), SocketAddr::V4(to)) => {
            Ok(PacketBuilder::ipv4(from.ip().octets(), to.ip().octets(), TTL))
        }
        (SocketAddr::V6(from), SocketAddr::V6(to)) => {
            Ok(PacketBuilder::ipv6(from.ip().octets(), to.ip().octets(), TTL))
        }
        _ => Err(failed(ends, "one address is IPv4, the other IPv6".into())),
    }
}

fn failed(ends: &Ends, why: String) -> TcpError {
    TcpError::Packet { from: ends.local, to: ends.remote, why }
}

#[cfg(test)]
mod tests {
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};

    use super::*;

    fn check(local: &str, remote: &str, v4: bool) {
        let ends = Ends { local: local.parse().unwrap(), remote: remote.parse().unwrap() };
        let segment = Segment { flag: Flag::Fin, seq: 7, ack: u32::MAX, window: 512 };
        let bytes = build(&ends, &segment).unwrap();
        let packet = SlicedPacket::from_ip(&bytes).unwrap();
        assert_eq!(matches!(packet.net, Some(NetSlice::Ipv4(_))), v4);
        let Some(TransportSlice::Tcp(tcp)) = packet.transport else { panic!("no TCP") };
        assert_eq!((tcp.source_port(), tcp.destination_port()), (ends.local.port(), ends.remote.port()));
        assert_eq!((tcp.sequence_number(), tcp.acknowledgment_number(), tcp.window_size()), (7, u32::MAX, 512));
        assert!(tcp.fin() && tcp.ack() && !tcp.syn() && !tcp.rst());
    }

    #[test]
    fn data_and_timestamps() {
        let ends = Ends { local: "10.0.0.1:80".parse().unwrap(), remote: "10.0.0.2:4000".parse().unwrap() };
        let segment = Segment { flag: Flag::None, seq: 7, ack: 8, window: 512 };
        let bytes = build_with(&ends, &segment, Some((70, 60)), b"again").unwrap();
        let Some(TransportSlice::Tcp(tcp)) = SlicedPacket::from_ip(&bytes).unwrap().transport else { panic!("no TCP") };
        assert_eq!(tcp.payload(), b"again");
        let stamps = tcp.options_iterator().any(|option| option == Ok(TcpOptionElement::Timestamp(70, 60)));
        assert!(stamps, "{:?}", tcp.options());
    }

    #[test]
    fn both_families() {
        check("10.0.0.1:80", "127.0.0.1:4000", true);
        check("[fd00::1]:80", "[::1]:4000", false);
    }

    #[test]
    fn mapped_addresses_travel_as_ipv4() {
        check("[::ffff:10.0.0.1]:80", "[::ffff:127.0.0.1]:4000", true);
    }
}
