//! Internet sockets: TCP, UDP, raw ones and those for pings (see [`super::raw`]).
//!
//! A TCP connection is kept (`--tcp-established`, see [`super::tcp`]), or given up (`--tcp-close`): then it comes back as a
//! closed socket. What waits in a UDP socket is kept as well, see [`super::udp`].

use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::errno::Errno;

use super::ObjectError;
use super::file::{Capture, FileKind, Planner, Seen};
use super::fresh::{self, Buffers, Fresh, Kinds};
use super::multicast::{self, Groups};
use super::sockopt::{self, state};
use super::tcp::ends::sockaddr;
use super::tcp::revive::Revival;
use super::tcp::{Ends, Hold, admit, capture};
use super::{raw, udp};
use crate::image::proto::{FdTypes, FileEntry, InetSkEntry};
use crate::kernel::{SysResult, fd, socket};
use crate::plan::{Apart, Deed, FileRef, Opened, Opener, Stage};

/// Internet sockets.
#[derive(Debug)]
pub struct Inet;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// icmp(7).
const NO_PINGS: &str = "nobody in group 0 may make sockets for pings here: set the sysctl net.ipv4.ping_group_range as it \
                        was at the dump (\"0 2147483647\" allows all)";

/// Of include/uapi/linux/in.h.
pub(super) const IPPROTO_MPTCP: i32 = 262;

pub(super) fn is_tcp(entry: &InetSkEntry) -> bool {
    entry.r#type as i32 == libc::SOCK_STREAM && [libc::IPPROTO_TCP, IPPROTO_MPTCP].contains(&(entry.proto as i32))
}

fn is_udp(entry: &InetSkEntry) -> bool {
    entry.r#type as i32 == libc::SOCK_DGRAM
        && [libc::IPPROTO_UDP, libc::IPPROTO_UDPLITE].contains(&(entry.proto as i32))
}

/// Sockets for pings: a datagram is a request or an answer of ICMP, and the port is its identifier.
fn is_ping(entry: &InetSkEntry) -> bool {
    entry.r#type as i32 == libc::SOCK_DGRAM
        && [libc::IPPROTO_ICMP, libc::IPPROTO_ICMPV6].contains(&(entry.proto as i32))
}

fn is_raw(entry: &InetSkEntry) -> bool {
    entry.r#type as i32 == libc::SOCK_RAW
}

pub(super) fn is_connection(entry: &InetSkEntry) -> bool {
    is_tcp(entry) && ![state::LISTEN, state::CLOSE].contains(&entry.state)
}

/// What an internet socket itself tells: that takes some fifty calls, and nothing else need be known for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    entry: InetSkEntry,
    /// Of TCP.
    tcp: capture::Facts,
}

/// Whether sockets of a family are internet sockets.
pub(super) fn is_family(family: i32) -> bool {
    [libc::AF_INET, libc::AF_INET6].contains(&family)
}

impl Facts {
    /// Asks it.
    pub(super) fn read(file: &OwnedFd, inode: u64) -> Result<Self, ObjectError> {
        let number = |name| socket::number(file, libc::SOL_SOCKET, name);
        let family = number(libc::SO_DOMAIN)?;
        let mut entry = InetSkEntry {
            ino: inode as u32,
            family: family as u32,
            r#type: number(libc::SO_TYPE)? as u32,
            proto: number(libc::SO_PROTOCOL)? as u32,
            state: state::CLOSE,
            opts: sockopt::capture_of(file, Some(family))?,
            ip_opts: Some(fresh::ip_options(file, family == libc::AF_INET6)?),
            ..InetSkEntry::default()
        };
        addresses(file, &mut entry)?;
        let tcp = if is_tcp(&entry) { capture::Facts::read(file, &entry)? } else { capture::Facts::default() };
        Ok(Self { entry, tcp })
    }

    /// Whether it is a connection.
    pub(super) fn is_connection(&self) -> bool {
        is_tcp(&self.entry) && self.tcp.is_connected()
    }

    /// What a connection tells now, if nobody has touched it since: what the kernel changes by itself is asked again. `None`
    /// where that may be anything.
    pub(super) fn as_of_now(&self, file: &OwnedFd) -> Result<Option<Self>, ObjectError> {
        let mut now = self.clone();
        let entry = &mut now.entry;
        // A connection that ends changes more than its state.
        match self.tcp.as_of_now(file)? {
            Some(tcp) => now.tcp = tcp,
            None => return Ok(None),
        }
        sockopt::ask_again(file, &mut entry.opts)?;
        if let Some(opts) = &mut entry.ip_opts {
            fresh::ask_again(file, opts)?;
        }
        Ok(Some(now))
    }

    /// What of this is not so in what is told now, both as a reader can tell them apart. What was asked again may have
    /// changed since, and the state with it: packets are not held yet.
    pub(super) fn difference(&self, read: &Self) -> Option<(String, String)> {
        let mut kept = self.clone();
        sockopt::take_over(&read.entry.opts, &mut kept.entry.opts);
        if let (Some(now), Some(opts)) = (&read.entry.ip_opts, &mut kept.entry.ip_opts) {
            fresh::take_over(now, opts);
        }
        if !kept.tcp.take_over(&read.tcp) || kept == *read {
            return None;
        }
        let [kept, read] = [&kept, read].map(|facts| format!("{facts:#?}"));
        let differs = kept.lines().zip(read.lines()).find(|(kept, read)| kept != read);
        Some(differs.map_or((kept.clone(), read.clone()), |(kept, read)| (kept.trim().into(), read.trim().into())))
    }
}

impl FileKind for Inet {
    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Inetsk]
    }

    fn is(&self, seen: &Seen) -> bool {
        seen.family().is_some_and(is_family)
    }

    fn capture(&self, seen: &Seen, cx: &mut Capture<'_>) -> Result<FileEntry, ObjectError> {
        let Facts { entry, tcp } = seen.inet()?;
        let mut entry = InetSkEntry { id: seen.id, flags: seen.flags, fown: seen.fown()?, ..entry.clone() };
        match entry.r#type as i32 {
            libc::SOCK_STREAM if is_tcp(&entry) => capture::capture(seen, cx, &mut entry, tcp)?,
            libc::SOCK_DGRAM if is_udp(&entry) => {
                udp::capture(seen, cx)?;
                let mut opts = udp::options(&seen.file, entry.proto)?;
                udp::cork::capture(seen, cx, &entry, &mut opts)?;
                entry.udp_opts = Some(opts);
            }
            libc::SOCK_DGRAM if is_ping(&entry) => raw::peer(seen, cx, &mut entry)?,
            libc::SOCK_RAW => raw::capture(seen, cx, &mut entry)?,
            other => cx.refuse(seen.refuse(
                format!("internet socket of type {other} and protocol {}", entry.proto),
                "close it before the dump: TCP, UDP, ping and raw sockets can be dumped",
            )),
        }
        if [libc::SOCK_DGRAM, libc::SOCK_RAW].contains(&(entry.r#type as i32)) {
            let v6 = seen.family() == Some(libc::AF_INET6);
            entry.multicast = Some(multicast::capture(&seen.file, v6, cx.shelf.get::<Groups>())?);
        }
        Ok(FileEntry {
            r#type: FdTypes::Inetsk as i32,
            id: entry.id,
            isk: Some(Box::new(entry)),
            ..FileEntry::default()
        })
    }

    fn finish(&self, cx: &mut Capture<'_>) -> Result<(), ObjectError> {
        // What is refused is not touched.
        if !cx.refusals.is_empty() {
            return Ok(());
        }
        udp::finish(cx)?;
        let mut hold = cx.shelf.take::<Hold>();
        let outcome = hold.look(cx).and_then(|()| if cx.refusals.is_empty() { hold.read(cx) } else { Ok(()) });
        *cx.shelf.get() = hold;
        outcome
    }

    fn plan(&self, entry: &FileEntry, cx: &mut Planner<'_>) -> Result<FileRef, ObjectError> {
        let empty = || ObjectError::contradiction(format!("file {} is empty", entry.id));
        let isk = &Arc::new(InetSkEntry::clone(entry.isk.as_ref().ok_or_else(empty)?));
        let words = if isk.family as i32 == libc::AF_INET6 { 4 } else { 1 };
        if isk.src_addr.len() < words || isk.dst_addr.len() < words {
            return Err(ObjectError::contradiction(format!("socket {} has no whole address", isk.ino)));
        }
        let kept = is_tcp(isk) && isk.state != state::LISTEN && !cx.options.tcp_close;
        let revival = if kept { Revival::read(isk, scope(isk), cx)?.map(Arc::new) } else { None };
        if kept && is_connection(isk) && (revival.is_none() || !cx.options.tcp_established) {
            return Err(ObjectError::Unsupported {
                what: format!("socket {}, the TCP connection {}", isk.ino, Ends::of(isk, 0)),
                advice: "give --tcp-established to keep it, or --tcp-close to have it closed",
            });
        }
        let fresh = cx.shelf.get::<Kinds>().of(isk);
        let file = cx.plan.open(Make { entry: Arc::clone(isk), revival: revival.clone(), fresh });
        match revival {
            Some(revival) => revival.plan(file, cx),
            None => cx.plan.after(Stage::Groups, Reuse { file, address: isk.opts.reuseaddr(), flags: isk.flags }),
        }
        if is_udp(isk) {
            udp::plan(isk, scope(isk), file, cx)?;
            udp::cork::plan(isk, file, cx);
        }
        if is_tcp(isk) && isk.state == state::LISTEN {
            admit::plan(isk, file, cx)?;
        }
        Ok(file)
    }
}

/// The number of the interface that a link-local address is at.
fn scope(entry: &InetSkEntry) -> u32 {
    entry.ifname.as_ref().and_then(|name| interfaces().find(|(n, _)| n == name)).map_or(0, |(_, n)| n)
}

/// Both addresses, words as they stand in memory.
pub(super) fn addresses(file: &OwnedFd, entry: &mut InetSkEntry) -> Result<(), ObjectError> {
    let own = socket::own_name(file)?;
    let peer = socket::peer_name(file)?.unwrap_or_default();
    let v6 = entry.family as i32 == libc::AF_INET6;
    (entry.src_addr, entry.src_port) = split(&own, v6);
    (entry.dst_addr, entry.dst_port) = split(&peer, v6);
    if v6 {
        entry.v6only = Some(socket::number(file, libc::SOL_IPV6, libc::IPV6_V6ONLY)? != 0);
        // sockaddr_in6: family, port, flow, sixteen bytes of address, the interface.
        let scope = own.get(24..28).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        entry.ifname = interfaces().find(|(_, index)| scope != 0 && *index == scope).map(|(name, _)| name);
    }
    Ok(())
}

/// An end of a connection, as images have it.
pub(super) fn split_end(end: std::net::SocketAddr) -> (Vec<u32>, u32) {
    split(&sockaddr(end), end.is_ipv6())
}

fn split(address: &[u8], v6: bool) -> (Vec<u32>, u32) {
    let (start, len) = if v6 { (8, 16) } else { (4, 4) };
    let mut bytes = address.get(start..start + len).unwrap_or_default().to_vec();
    bytes.resize(len, 0);
    let words = bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let port = address.get(2..4).map_or(0, |b| u16::from_be_bytes([b[0], b[1]]));
    (words, port.into())
}

/// Names and numbers of network interfaces.
fn interfaces() -> impl Iterator<Item = (Vec<u8>, u32)> {
    let entries = std::fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let index = std::fs::read_to_string(entry.path().join("ifindex")).ok()?;
        Some((entry.file_name().into_encoded_bytes(), index.trim().parse().ok()?))
    })
}

/// `struct sockaddr_in` or `sockaddr_in6`.
fn address(family: u32, words: &[u32], port: u32, scope: u32) -> Vec<u8> {
    let mut bytes = (family as u16).to_le_bytes().to_vec();
    bytes.extend_from_slice(&(port as u16).to_be_bytes());
    if family as i32 == libc::AF_INET6 {
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend(words.iter().take(4).flat_map(|w| w.to_le_bytes()));
        bytes.extend_from_slice(&scope.to_le_bytes());
    } else {
        bytes.extend(words.iter().take(1).flat_map(|w| w.to_le_bytes()));
        bytes.extend_from_slice(&[0; 8]);
    }
    bytes
}

/// Makes an internet socket.
#[derive(Debug)]
struct Make {
    entry: Arc<InetSkEntry>,
    /// Of a connection that is kept.
    revival: Option<Arc<Revival>>,
    /// What it has without our doing.
    fresh: Arc<Fresh>,
}

impl Opener for Make {
    fn describe(&self) -> String {
        let entry = &self.entry;
        if let Some(revival) = &self.revival {
            return revival.describe();
        }
        let what = match entry.state {
            state::LISTEN => "listening on",
            _ if is_connection(entry) => "closed, was on",
            _ => "on",
        };
        if is_raw(entry) {
            return format!("a raw socket of protocol {}", entry.proto);
        }
        if is_ping(entry) {
            return format!("a ping socket with the identifier {}", entry.src_port);
        }
        let kind = if is_tcp(entry) { "TCP" } else { "UDP" };
        format!("a {kind} socket {what} port {}", entry.src_port)
    }

    fn apart(&self) -> Option<&dyn Apart> {
        self.revival.as_ref().is_some_and(|revival| revival.is_apart()).then_some(self)
    }

    fn open(&self, _: &Opened) -> Result<OwnedFd, Failure> {
        Apart::open(self)
    }
}

impl Apart for Make {
    fn open(&self) -> Result<OwnedFd, Failure> {
        let entry = &self.entry;
        let kind = entry.r#type as i32 | (entry.flags as i32 & libc::O_NONBLOCK);
        let made = match socket::new(entry.family as i32, kind, entry.proto as i32) {
            Err(e) if e.errno == Errno::EACCES && is_ping(entry) => return Err(NO_PINGS.into()),
            made => made?,
        };
        self.options(&made)?;
        if let Some(revival) = &self.revival {
            revival.make(&made)?;
            return Ok(made);
        }
        if is_connection(entry) {
            return Ok(made);
        }
        let scope = scope(entry);
        // Raw sockets tell their protocol for a port.
        let bound = if is_raw(entry) { entry.src_addr.iter().any(|&word| word != 0) } else { entry.src_port != 0 };
        let connected = match is_raw(entry) || is_ping(entry) {
            true => entry.state == state::ESTABLISHED,
            false => entry.dst_port != 0 && !is_tcp(entry),
        };
        if bound {
            socket::bind(&made, &address(entry.family, &entry.src_addr, entry.src_port, scope))?;
        }
        if let Some(multicast) = &entry.multicast {
            multicast::restore(&made, multicast)?;
        }
        if entry.state == state::LISTEN {
            socket::listen(&made, entry.backlog)?;
        }
        if connected {
            socket::connect(&made, &address(entry.family, &entry.dst_addr, entry.dst_port, scope))?;
        }
        if let Some(how) = sockopt::shutdown_how(entry.shutdown()).filter(|_| !is_tcp(entry)) {
            socket::shutdown(&made, how)?;
        }
        Ok(made)
    }
}

impl Make {
    /// What must be there before the socket is bound, and what may.
    fn options(&self, made: &OwnedFd) -> Result<(), ObjectError> {
        let entry = &self.entry;
        let v6 = entry.family as i32 == libc::AF_INET6;
        if let Some(opts) = entry.udp_opts.as_ref().filter(|_| is_udp(entry)) {
            udp::restore(made, entry.proto, opts)?;
        }
        if is_raw(entry) {
            raw::restore(made, entry)?;
        } else if let Some(v6only) = entry.v6only.filter(|_| v6) {
            socket::set_number(made, libc::SOL_IPV6, libc::IPV6_V6ONLY, v6only.into())?;
        }
        // Connections of earlier days may linger on the port of a TCP socket; its own value comes later. Repair mode, in
        // which connections are made, means the same.
        let kept = self.revival.is_some();
        if !kept && (is_tcp(entry) || entry.opts.reuseaddr()) {
            socket::set_number(made, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        }
        if entry.opts.so_reuseport() {
            socket::set_number(made, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
        }
        self.fresh.restore(made, entry, if kept { Buffers::Later } else { Buffers::Now })
    }
}

/// Sets an option unless it is so already.
pub(super) fn ensure(made: &OwnedFd, level: i32, name: i32, value: i32) -> SysResult<()> {
    match socket::number(made, level, name) {
        Ok(now) if now == value => Ok(()),
        _ => socket::set_number(made, level, name, value),
    }
}

/// Sets what had to be otherwise while sockets of one port were bound one after the other.
#[derive(Debug)]
struct Reuse {
    file: FileRef,
    address: bool,
    flags: u32,
}

impl Deed for Reuse {
    fn describe(&self) -> String {
        format!("SO_REUSEADDR {} and flags {:#o} of {:?}", self.address, self.flags, self.file)
    }

    fn run(&self, opened: &Opened) -> Result<(), Failure> {
        let Some(file) = opened.get(self.file) else { return Err("the socket is not open".into()) };
        ensure(file, libc::SOL_SOCKET, libc::SO_REUSEADDR, self.address.into())?;
        Ok(fd::set_flags(file, self.flags as i32)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_back() {
        for (family, words, v6) in [(libc::AF_INET, vec![0x0100_007f], false), (libc::AF_INET6, vec![1, 2, 3, 4], true)]
        {
            let bytes = address(family as u32, &words, 8080, 0);
            assert_eq!(split(&bytes, v6), (words, 8080));
        }
    }

    #[test]
    fn no_address_is_all_zeros() {
        assert_eq!(split(&[], false), (vec![0], 0));
        assert_eq!(split(&[10, 0, 1], true), (vec![0; 4], 0));
    }
}
