//! Raw sockets: packets of one protocol of IP, as routing daemons use them (raw(7)); and sockets for pings, which are told
//! apart by the number in their requests (icmp(7)).
//!
//! What waits in them is dropped, as a network might: the kernel shows the first packet only.

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use nix::poll::PollFlags;

use super::ObjectError;
use super::file::{Capture, Seen};
use super::inet::ensure;
use super::sockopt::{state, where_there};
use crate::image::proto::{InetSkEntry, IpOptsRawEntry};
use crate::kernel::fd::poll_now;
use crate::kernel::{SysError, SysResult, proc, socket};

/// Level and name of ICMP_FILTER (raw(7)) and ICMP6_FILTER (RFC 3542).
const ICMP_FILTER: (i32, i32) = (255, 1);
const ICMPV6_FILTER: (i32, i32) = (58, 1);
/// `struct icmp6_filter`.
const ICMPV6_WORDS: usize = 8;
/// Of include/uapi/linux/in.h and in6.h.
const IP_NODEFRAG: i32 = 22;
const IPV6_CHECKSUM: i32 = 7;
const IPV6_HDRINCL: i32 = 36;

/// Where a socket stands in /proc/net/raw, raw6, icmp, icmp6.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Line {
    state: u32,
    remote: Vec<u32>,
    remote_port: u32,
}

/// These sockets by inode.
#[derive(Debug, Default)]
struct Lines(Option<HashMap<u32, Line>>);

/// Reads what a raw socket has that others do not.
pub fn capture(seen: &Seen, cx: &mut Capture<'_>, entry: &mut InetSkEntry) -> Result<(), ObjectError> {
    entry.ip_opts.get_or_insert_default().raw = Some(options(&seen.file, entry)?);
    peer(seen, cx, entry)
}

/// Reads where a socket without ports is connected to, which getpeername(2) does not know.
pub fn peer(seen: &Seen, cx: &mut Capture<'_>, entry: &mut InetSkEntry) -> Result<(), ObjectError> {
    let lines = match &mut cx.shelf.get::<Lines>().0 {
        Some(lines) => lines,
        empty => empty.insert(lines()?),
    };
    if let Some(line) = lines.get(&entry.ino).filter(|line| line.state == state::ESTABLISHED) {
        entry.state = state::ESTABLISHED;
        (entry.dst_addr, entry.dst_port) = (line.remote.clone(), line.remote_port);
    }
    if poll_now(&seen.file, PollFlags::POLLIN)?.contains(PollFlags::POLLIN) {
        tracing::warn!(pid = seen.pid.as_raw(), fd = seen.fd, "what waits in a raw or ping socket is dropped");
    }
    Ok(())
}

/// The options of raw sockets.
fn options(file: &OwnedFd, entry: &InetSkEntry) -> Result<IpOptsRawEntry, ObjectError> {
    let v6 = entry.family as i32 == libc::AF_INET6;
    let number = |level, name| where_there(socket::number(file, level, name));
    let on = |level, name| Ok::<_, ObjectError>(number(level, name)?.map(|v| v != 0));
    let (level, hdrincl) = header_included(v6);
    let mut raw = IpOptsRawEntry { hdrincl: on(level, hdrincl)?, ..IpOptsRawEntry::default() };
    if v6 {
        raw.checksum_offset = number(libc::SOL_IPV6, IPV6_CHECKSUM)?;
        raw.checksum = raw.checksum_offset.map(|offset| offset >= 0);
    } else {
        raw.nodefrag = on(libc::SOL_IP, IP_NODEFRAG)?;
    }
    if let Some(((level, name), words)) = filter_of(entry) {
        let filter = socket::option(file, level, name, words * 4)?;
        raw.icmpv_filter = filter.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    }
    Ok(raw)
}

fn header_included(v6: bool) -> (i32, i32) {
    if v6 { (libc::SOL_IPV6, IPV6_HDRINCL) } else { (libc::SOL_IP, libc::IP_HDRINCL) }
}

/// The option that says which messages of ICMP a socket does not want, and its words.
fn filter_of(entry: &InetSkEntry) -> Option<((i32, i32), usize)> {
    match (entry.family as i32, entry.proto as i32) {
        (libc::AF_INET, libc::IPPROTO_ICMP) => Some((ICMP_FILTER, 1)),
        (libc::AF_INET6, libc::IPPROTO_ICMPV6) => Some((ICMPV6_FILTER, ICMPV6_WORDS)),
        _ => None,
    }
}

/// Gives a new raw socket its options.
pub fn restore(made: &OwnedFd, entry: &InetSkEntry) -> SysResult<()> {
    let Some(raw) = entry.ip_opts.as_ref().and_then(|opts| opts.raw.as_ref()) else { return Ok(()) };
    // First of all: from now on only what is wanted waits.
    if let Some(((level, name), words)) = filter_of(entry).filter(|_| !raw.icmpv_filter.is_empty()) {
        let filter: Vec<u8> = raw.icmpv_filter.iter().take(words).flat_map(|word| word.to_le_bytes()).collect();
        socket::set_option(made, level, name, &filter)?;
    }
    let (level, name) = header_included(entry.family as i32 == libc::AF_INET6);
    if let Some(on) = raw.hdrincl {
        ensure(made, level, name, on.into())?;
    }
    if let Some(on) = raw.nodefrag {
        ensure(made, libc::SOL_IP, IP_NODEFRAG, on.into())?;
    }
    if let Some(offset) = raw.checksum_offset {
        ensure(made, libc::SOL_IPV6, IPV6_CHECKSUM, offset)?;
    }
    Ok(())
}

/// All such sockets of this network namespace.
fn lines() -> Result<HashMap<u32, Line>, SysError> {
    let mut found = HashMap::new();
    for path in ["/proc/net/raw", "/proc/net/raw6", "/proc/net/icmp", "/proc/net/icmp6"] {
        match proc::read_text(path) {
            Ok(text) => found.extend(text.lines().filter_map(line)),
            // A kernel without IPv6.
            Err(e) if e.errno == nix::errno::Errno::ENOENT => {}
            Err(e) => return Err(e),
        }
    }
    Ok(found)
}

/// `   1: 0100007F:0001 0200007F:0000 01 00000000:00000000 00:00000000 00000000     0        0 4711 2 0000000000000000 0`:
/// addresses are words as they stand in memory, ports numbers.
fn line(text: &str) -> Option<(u32, Line)> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let (address, port) = words.get(2)?.split_once(':')?;
    let remote: Option<Vec<u32>> =
        address.as_bytes().chunks(8).map(|word| u32::from_str_radix(str::from_utf8(word).ok()?, 16).ok()).collect();
    let state = u32::from_str_radix(words.get(3)?, 16).ok()?;
    let line = Line { state, remote: remote?, remote_port: u32::from_str_radix(port, 16).ok()? };
    Some((words.get(9)?.parse().ok()?, line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_both_families() {
        let v4 =
            "   1: 0100007F:0001 0200007F:0007 01 00000000:00000000 00:00000000 00000000     0        0 4711 2 0 0";
        let remote = vec![u32::from_le_bytes([127, 0, 0, 2])];
        assert_eq!(line(v4), Some((4711, Line { state: 1, remote, remote_port: 7 })));
        let v6 =
            "  58: 00000000000000000000000000000000:003A 00000000000000000000000001000000:0000 07 0:0 0:0 0 0 0 12 2";
        let remote = vec![0, 0, 0, u32::from_le_bytes([0, 0, 0, 1])];
        assert_eq!(line(v6), Some((12, Line { state: 7, remote, remote_port: 0 })));
        assert_eq!(line("  sl  local_address rem_address   st tx_queue rx_queue tr"), None);
    }
}
