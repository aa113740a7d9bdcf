//! What waits in UDP and UDP-Lite sockets: looked at, never taken, at dump; delivered again at restore, by packets of our
//! own making from the address that each came from, with the mark.
//!
//! CRIU's images have no place for it, so it is in a file of ours, and dropped where that is not there: as the network
//! might have done.

pub mod cork;

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use crate::image::ImageKind;
use crate::image::proto::{InetSkEntry, SkPacketEntry, UdpOptsEntry};
use crate::kernel::{SysResult, socket};
use crate::object::file::{Capture, Planner, Seen};
use crate::object::inet::ensure;
use crate::object::tcp::ends::{Ends, address_of};
use crate::object::tcp::packet;
use crate::object::tcp::rebuild::{Pass, Wire};
use crate::object::unix::queue;
use crate::object::{ObjectError, sockopt};
use crate::plan::{Deed, FileRef, Opened, Stage};

/// Options that are numbers (udp(7), include/uapi/linux/udp.h; the last two UDP-Lite's), and their fields.
type Number = (i32, fn(&mut UdpOptsEntry) -> &mut Option<u32>);
const NUMBERS: [Number; 6] = [
    (101, |o| &mut o.no_check6_tx),
    (102, |o| &mut o.no_check6_rx),
    (libc::UDP_SEGMENT, |o| &mut o.segment),
    (libc::UDP_GRO, |o| &mut o.gro),
    (10, |o| &mut o.send_coverage),
    (11, |o| &mut o.receive_coverage),
];

/// Reads the options that UDP sockets have. Their level has the number of the protocol.
pub fn options(file: &OwnedFd, protocol: u32) -> Result<UdpOptsEntry, ObjectError> {
    let mut opts = UdpOptsEntry::default();
    for (name, field) in NUMBERS {
        *field(&mut opts) = sockopt::where_there(socket::number(file, protocol as i32, name))?.map(|v| v as u32);
    }
    Ok(opts)
}

/// Gives a new UDP socket its options.
pub fn restore(made: &OwnedFd, protocol: u32, opts: &UdpOptsEntry) -> SysResult<()> {
    cork::restore(made, protocol, opts)?;
    let mut opts = opts.clone();
    for (name, field) in NUMBERS {
        if let Some(value) = *field(&mut opts) {
            ensure(made, protocol as i32, name, value as i32)?;
        }
    }
    Ok(())
}

/// A datagram and what is told of it.
type Waiting = (SkPacketEntry, Vec<u8>);

/// What was found in all sockets.
#[derive(Debug, Default)]
struct Found(Vec<Waiting>);

/// Looks at what waits in a socket.
pub fn capture(seen: &Seen, cx: &mut Capture<'_>) -> Result<(), ObjectError> {
    for packet in queue::packets(&seen.file, false)? {
        let message = SkPacketEntry {
            id_for: seen.id,
            length: packet.data.len() as u32,
            sender_name: Some(packet.from),
            ..SkPacketEntry::default()
        };
        cx.shelf.get::<Found>().0.push((message, packet.data));
    }
    Ok(())
}

/// Writes what was found.
pub fn finish(cx: &mut Capture<'_>) -> Result<(), ObjectError> {
    let Found(found) = cx.shelf.take();
    if found.is_empty() {
        return Ok(());
    }
    let mut writer = cx.dir.writer(ImageKind::UdpQueues)?;
    for (message, data) in &found {
        writer.message_with_payload(message, data)?;
    }
    writer.finish()?;
    Ok(())
}

/// What the images have, by description.
#[derive(Debug, Default)]
struct Read(Option<HashMap<u32, Vec<Waiting>>>);

/// Plans the delivery of what waited in a socket.
pub fn plan(entry: &InetSkEntry, scope: u32, file: FileRef, cx: &mut Planner<'_>) -> Result<(), ObjectError> {
    if cx.shelf.get::<Read>().0.is_none() {
        let mut all: HashMap<u32, Vec<Waiting>> = HashMap::new();
        if cx.dir.exists(ImageKind::UdpQueues)? {
            let mut reader = cx.dir.reader(ImageKind::UdpQueues)?;
            while let Some((message, data)) = reader.message_with_payload::<SkPacketEntry>()? {
                all.entry(message.id_for).or_default().push((message, data));
            }
        }
        cx.shelf.get::<Read>().0 = Some(all);
    }
    let waiting = cx.shelf.get::<Read>().0.as_mut().and_then(|all| all.remove(&entry.id));
    if let Some(waiting) = waiting {
        let protocol = entry.proto as i32;
        cx.plan.after(Stage::Groups, Deliver { file, protocol, to: Ends::of(entry, scope).local, waiting });
    }
    Ok(())
}

/// Delivers what waited in a socket.
#[derive(Debug)]
struct Deliver {
    file: FileRef,
    protocol: i32,
    to: SocketAddr,
    waiting: Vec<Waiting>,
}

impl Deed for Deliver {
    fn describe(&self) -> String {
        format!("deliver {} datagrams to {} ({:?})", self.waiting.len(), self.to, self.file)
    }

    fn run(&self, _: &Opened) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let wire = Wire::default();
        for (message, data) in &self.waiting {
            let from = message.sender_name.as_deref().and_then(address_of).ok_or("a datagram without a sender")?;
            let ends = Ends { local: from, remote: reachable(self.to, from) }.on_the_wire();
            let packet = match self.protocol {
                libc::IPPROTO_UDPLITE => packet::lite_datagram(&ends, data)?,
                _ => packet::datagram(&ends, data)?,
            };
            wire.send(&packet, ends.remote, Pass::Marked)?;
        }
        Ok(())
    }
}

/// An address that a socket can be reached at which is bound to any.
fn reachable(mut bound: SocketAddr, from: SocketAddr) -> SocketAddr {
    if bound.ip().is_unspecified() {
        bound.set_ip(match from.ip().to_canonical() {
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    bound
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_address_is_reached_in_the_sender_s_family() {
        let reached = |bound: &str, from: &str| {
            reachable(bound.parse().expect("an address"), from.parse().expect("an address")).to_string()
        };
        assert_eq!(reached("0.0.0.0:53", "10.0.0.1:9"), "127.0.0.1:53");
        assert_eq!(reached("[::]:53", "[::ffff:10.0.0.1]:9"), "127.0.0.1:53");
        assert_eq!(reached("[::]:53", "[fd00::1]:9"), "[::1]:53");
        assert_eq!(reached("10.0.0.2:53", "10.0.0.1:9"), "10.0.0.2:53");
    }
}
