//! Network namespaces and what is set up in them. Everything happens in a namespace that ends with its only process.

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sched::CloneFlags;

use super::netlink::{ACK, CREATE, DUMP, Message, Netlink, REQUEST, find};
use super::{Absent, Answer, apart_in, ensure};
use crate::kernel::error::During;
use crate::kernel::{SysError, SysResult, socket};

/// The loopback device is the first of every namespace.
pub(super) const LO: u32 = 1;
const RTM_GETLINK: u16 = 18;
const RTM_SETLINK: u16 = 19;
const RTM_NEWNSID: u16 = 88;
const RTM_GETNSID: u16 = 90;
/// NETNSA_NSID, NETNSA_FD of include/uapi/linux/net_namespace.h.
const NSID: u16 = 1;
const NSID_FD: u16 = 3;
/// A number for a namespace, of our choice.
const NUMBER: i32 = 7;

/// `struct ifinfomsg` of the loopback device.
fn loopback() -> [u8; 16] {
    let mut fixed = [0; 16];
    fixed[4..8].copy_from_slice(&LO.to_ne_bytes());
    fixed
}

/// The network namespace that this process is in, and a child with one of its own that gives it a number.
fn with_number(question: impl FnOnce(&Netlink, &File) -> Answer) -> Answer {
    let outer = File::open("/proc/self/ns/net").during("open", "/proc/self/ns/net")?;
    apart_in(CloneFlags::CLONE_NEWNET, || {
        let netlink = Netlink::open(libc::NETLINK_ROUTE)?;
        let request = Message::new(RTM_NEWNSID, REQUEST | ACK, &[0; 4])
            .with(NSID, &NUMBER.to_ne_bytes())
            .with(NSID_FD, &outer.as_raw_fd().to_ne_bytes());
        netlink.ask("RTM_NEWNSID", &request.bytes())?;
        question(&netlink, &outer)
    })
}

/// Namespaces have numbers: RTM_NEWNSID, RTM_GETNSID.
pub fn numbers() -> Answer {
    with_number(|netlink, outer| {
        let request = Message::new(RTM_GETNSID, REQUEST, &[0; 4]).with(NSID_FD, &outer.as_raw_fd().to_ne_bytes());
        let answer = netlink.ask("RTM_GETNSID", &request.bytes())?;
        let number = find(&answer, 4, NSID).and_then(|value| value.first_chunk());
        ensure(number == Some(&NUMBER.to_ne_bytes()), "the kernel gives another number than was set")?;
        Ok(String::new())
    })
}

/// Links of another namespace can be asked for by its number.
pub fn links_by_number() -> Answer {
    /// IFLA_TARGET_NETNSID of include/uapi/linux/if_link.h.
    const TARGET: u16 = 46;
    with_number(|netlink, _| {
        let request = Message::new(RTM_GETLINK, REQUEST, &loopback()).with(TARGET, &NUMBER.to_ne_bytes());
        let answer = netlink.ask("RTM_GETLINK", &request.bytes())?;
        ensure(find(&answer, 16, TARGET).is_some(), "the kernel does not say of which namespace a link is")?;
        Ok(String::new())
    })
}

/// A link that changes its namespace can be given its index there. The kernel shows that it knows the attribute by
/// refusing an index that cannot be.
pub fn new_link_index() -> Answer {
    const NEW_IFINDEX: u16 = 49;
    apart_in(CloneFlags::CLONE_NEWNET, || {
        let request = Message::new(RTM_SETLINK, REQUEST | ACK, &loopback()).with(NEW_IFINDEX, &(-1i32).to_ne_bytes());
        match Netlink::open(libc::NETLINK_ROUTE)?.ask("RTM_SETLINK", &request.bytes()) {
            Err(SysError { errno: Errno::ERANGE, .. }) => Ok(String::new()),
            Err(other) => Err(other.into()),
            Ok(_) => Err(Absent::because("the kernel does not look at IFLA_NEW_IFINDEX")),
        }
    })
}

/// nf_tables: a table is made.
pub fn nftables() -> Answer {
    /// NFNL_MSG_BATCH_BEGIN and _END; the subsystem nf_tables, and NFT_MSG_NEWTABLE in it.
    const BEGIN: u16 = 0x10;
    const END: u16 = 0x11;
    const NEW_TABLE: u16 = 10 << 8;
    const NAME: u16 = 1;
    /// `struct nfgenmsg`: family, version, the subsystem in network order.
    const BATCH: [u8; 4] = [0, 0, 0, 10];
    const INET: [u8; 4] = [1, 0, 0, 0];
    apart_in(CloneFlags::CLONE_NEWNET, || {
        let table = Message::new(NEW_TABLE, REQUEST | ACK | CREATE, &INET).with(NAME, b"criu-ebpf-check\0");
        let [begin, end] = [BEGIN, END].map(|kind| Message::new(kind, REQUEST, &BATCH).bytes());
        Netlink::open(libc::NETLINK_NETFILTER)?.ask("NFT_MSG_NEWTABLE", &[begin, table.bytes(), end].concat())?;
        Ok(String::new())
    })
}

/// The tool that keeps rules of the older iptables is installed.
pub fn iptables_legacy() -> Answer {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&paths).map(|dir| dir.join("iptables-legacy-save")).find(|path| path.is_file());
    found.map(|path| path.display().to_string()).ok_or_else(|| Absent::because("iptables-legacy-save is not on PATH"))
}

/// sock_diag(7) lists the inet sockets of a protocol.
pub fn inet_diag<const PROTOCOL: u8>() -> Answer {
    const BY_FAMILY: u16 = 20;
    // struct inet_diag_req_v2: family, protocol, all states, any address.
    let mut request = [0; 56];
    (request[0], request[1]) = (libc::AF_INET as u8, PROTOCOL);
    request[4..8].copy_from_slice(&u32::MAX.to_ne_bytes());
    let message = Message::new(BY_FAMILY, REQUEST | DUMP, &request);
    Netlink::open(libc::NETLINK_SOCK_DIAG)?.ask("SOCK_DIAG_BY_FAMILY", &message.bytes())?;
    Ok(String::new())
}

/// Brings the loopback device of this process's namespace up.
pub(super) fn loopback_up() -> SysResult<()> {
    let mut fixed = loopback();
    let up = (libc::IFF_UP as u32).to_ne_bytes();
    fixed[8..12].copy_from_slice(&up);
    fixed[12..16].copy_from_slice(&up);
    let request = Message::new(RTM_SETLINK, REQUEST | ACK, &fixed);
    Netlink::open(libc::NETLINK_ROUTE)?.ask("RTM_SETLINK", &request.bytes()).map(drop)
}

/// A TUN device, which is gone with its descriptor.
fn tun(question: impl FnOnce(&File) -> Answer) -> Answer {
    /// `_IOW('T', 202, int)`.
    const TUNSETIFF: u64 = 0x4004_54ca;
    apart_in(CloneFlags::CLONE_NEWNET, || {
        let path = "/dev/net/tun";
        let tun = File::options().read(true).write(true).open(path).during("open", path)?;
        // struct ifreq: no name, IFF_TUN.
        let mut request = [0u8; 40];
        request[16] = 1;
        // SAFETY: the request lives for the call and is as long as struct ifreq.
        Errno::result(unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF as _, request.as_mut_ptr()) })
            .during("ioctl(TUNSETIFF)", path)?;
        question(&tun)
    })
}

/// A TUN device can be made, and says what it is.
pub fn tun_device() -> Answer {
    /// `_IOR('T', 210, unsigned int)`.
    const TUNGETIFF: u64 = 0x8004_54d2;
    tun(|tun| {
        let mut request = [0u8; 40];
        // SAFETY: as above.
        Errno::result(unsafe { libc::ioctl(tun.as_raw_fd(), TUNGETIFF as _, request.as_mut_ptr()) })
            .during("ioctl(TUNGETIFF)", "a TUN device")?;
        Ok(String::new())
    })
}

/// A TUN device says which namespace it belongs to.
pub fn tun_namespace() -> Answer {
    /// `_IO('T', 227)`.
    const TUNGETDEVNETNS: u64 = 0x54e3;
    tun(|tun| socket::namespace_by(tun, TUNGETDEVNETNS).map(|_| String::new()).map_err(Absent::from))
}
