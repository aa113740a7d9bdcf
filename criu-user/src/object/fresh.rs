//! The options that internet sockets have, and what they are on a new socket: a restore sets only what differs from that.
//!
//! A server's thousand connections differ from new sockets in two or three of some forty options.

use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use super::ObjectError;
use super::sockopt;
use super::tcp::options;
use crate::image::proto::{InetSkEntry, IpOptsEntry, SkOptsEntry, TcpOptsEntry};
use crate::kernel::{SysResult, socket};

/// Options that are numbers, by their level and name, and their fields.
type IpNumber = (i32, i32, fn(&mut IpOptsEntry) -> &mut Option<u32>);
type IpSwitch = (i32, i32, fn(&mut IpOptsEntry) -> &mut Option<bool>);

const IPV6_FREEBIND: i32 = 78;
const V4_SWITCHES: [IpSwitch; 2] =
    [(libc::SOL_IP, libc::IP_FREEBIND, |o| &mut o.freebind), (libc::SOL_IP, libc::IP_PKTINFO, |o| &mut o.pktinfo)];
const V6_SWITCHES: [IpSwitch; 2] = [
    (libc::SOL_IPV6, IPV6_FREEBIND, |o| &mut o.freebind),
    (libc::SOL_IPV6, libc::IPV6_RECVPKTINFO, |o| &mut o.pktinfo),
];
const V4_NUMBERS: [IpNumber; 6] = [
    (libc::SOL_IP, libc::IP_TOS, |o| &mut o.tos),
    (libc::SOL_IP, libc::IP_TTL, |o| &mut o.ttl),
    (libc::SOL_IP, libc::IP_RECVERR, |o| &mut o.receive_errors),
    (libc::SOL_IP, libc::IP_RECVTTL, |o| &mut o.receive_ttl),
    (libc::SOL_IP, libc::IP_RECVTOS, |o| &mut o.receive_tos),
    (libc::SOL_IP, libc::IP_MTU_DISCOVER, |o| &mut o.mtu_discover),
];
const V6_NUMBERS: [IpNumber; 6] = [
    (libc::SOL_IPV6, libc::IPV6_TCLASS, |o| &mut o.traffic_class),
    (libc::SOL_IPV6, libc::IPV6_UNICAST_HOPS, |o| &mut o.hops),
    (libc::SOL_IPV6, libc::IPV6_RECVERR, |o| &mut o.receive_errors6),
    (libc::SOL_IPV6, libc::IPV6_RECVHOPLIMIT, |o| &mut o.receive_hops),
    (libc::SOL_IPV6, libc::IPV6_RECVTCLASS, |o| &mut o.receive_traffic_class),
    (libc::SOL_IPV6, libc::IPV6_MTU_DISCOVER, |o| &mut o.mtu_discover6),
];

/// Reads the options of IP.
pub fn ip_options(file: &OwnedFd, v6: bool) -> Result<IpOptsEntry, ObjectError> {
    let mut opts = IpOptsEntry::default();
    // An IPv6 socket may talk IPv4 as well, and then has both kinds.
    for (level, name, field) in if v6 { V6_SWITCHES } else { V4_SWITCHES } {
        let value = sockopt::where_there(socket::number(file, level, name))?;
        *field(&mut opts) = value.filter(|&v| v != 0).map(|_| true);
    }
    let numbers = V4_NUMBERS.iter().chain(v6.then_some(&V6_NUMBERS).into_iter().flatten());
    for &(level, name, field) in numbers {
        *field(&mut opts) = sockopt::where_there(socket::number(file, level, name))?.map(|v| v as u32);
    }
    Ok(opts)
}

/// Asks again for what the kernel changes by itself: a connection that knows of congestion on its way (ECN) marks some
/// packets and others not, and these marks are bits of IP_TOS (`INET_ECN_xmit` of include/net/inet_ecn.h).
pub fn ask_again(file: &OwnedFd, opts: &mut IpOptsEntry) -> SysResult<()> {
    if opts.tos.is_some() {
        opts.tos = Some(socket::number(file, libc::SOL_IP, libc::IP_TOS)? as u32);
    }
    if opts.traffic_class.is_some() {
        opts.traffic_class = Some(socket::number(file, libc::SOL_IPV6, libc::IPV6_TCLASS)? as u32);
    }
    Ok(())
}

/// Takes what [`ask_again`] asks for from other options.
pub fn take_over(from: &IpOptsEntry, to: &mut IpOptsEntry) {
    (to.tos, to.traffic_class) = (from.tos, from.traffic_class);
}

/// All options of a socket.
#[derive(Debug, Default)]
pub struct Options {
    socket: SkOptsEntry,
    ip: IpOptsEntry,
    tcp: TcpOptsEntry,
}

/// What a new socket of a kind has, found out when the first one is made.
#[derive(Debug, Default)]
pub struct Fresh {
    options: OnceLock<Options>,
}

/// Those of all kinds that a plan has, by family, type and protocol.
#[derive(Debug, Default)]
pub struct Kinds(std::collections::HashMap<(u32, u32, u32), Arc<Fresh>>);

impl Kinds {
    /// What new sockets of an entry's kind have.
    pub fn of(&mut self, entry: &InetSkEntry) -> Arc<Fresh> {
        Arc::clone(self.0.entry((entry.family, entry.r#type, entry.proto)).or_default())
    }
}

impl Fresh {
    fn options(&self, entry: &InetSkEntry) -> Result<&Options, ObjectError> {
        if let Some(known) = self.options.get() {
            return Ok(known);
        }
        let new = socket::new(entry.family as i32, entry.r#type as i32, entry.proto as i32)?;
        let v6 = entry.family as i32 == libc::AF_INET6;
        let tcp = if super::inet::is_tcp(entry) { options::capture(&new)? } else { TcpOptsEntry::default() };
        let found = Options { socket: sockopt::capture(&new)?, ip: ip_options(&new, v6)?, tcp };
        Ok(self.options.get_or_init(|| found))
    }

    /// Gives a new socket its options, but for the sizes of its buffers if it is a connection that is kept: these come
    /// when its queues are full.
    pub fn restore(&self, made: &OwnedFd, entry: &InetSkEntry, buffers: Buffers) -> Result<(), ObjectError> {
        let fresh = self.options(entry)?;
        if buffers == Buffers::Now {
            sockopt::restore_buffers_over(made, &entry.opts, &fresh.socket)?;
        }
        sockopt::restore_over(made, &entry.opts, Some(&fresh.socket))?;
        if let Some(opts) = &entry.ip_opts {
            ip_restore(made, opts.clone(), fresh.ip.clone(), entry.family as i32 == libc::AF_INET6)?;
            // IP_TOS has changed it.
            if let Some(priority) = entry.opts.so_priority.filter(|_| opts.tos != fresh.ip.tos) {
                socket::set_number(made, libc::SOL_SOCKET, libc::SO_PRIORITY, priority as i32)?;
            }
        }
        if super::inet::is_tcp(entry) {
            options::restore(made, options::of(entry), fresh.tcp.clone())?;
        }
        Ok(())
    }
}

/// When a socket's buffers get their sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Buffers {
    /// With all other options.
    Now,
    /// When its queues are full.
    Later,
}

fn ip_restore(made: &OwnedFd, mut opts: IpOptsEntry, mut fresh: IpOptsEntry, v6: bool) -> SysResult<()> {
    for (level, name, field) in if v6 { V6_SWITCHES } else { V4_SWITCHES } {
        let (want, have) = (field(&mut opts).unwrap_or(false), field(&mut fresh).unwrap_or(false));
        if want != have {
            socket::set_number(made, level, name, want.into())?;
        }
    }
    for (level, name, field) in V4_NUMBERS.iter().chain(&V6_NUMBERS) {
        if let Some(value) = *field(&mut opts)
            && *field(&mut fresh) != Some(value)
        {
            socket::set_number(made, *level, *name, value as i32)?;
        }
    }
    Ok(())
}
