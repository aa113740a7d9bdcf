//! Descriptors of kinds that nothing here can carry over: what they are, and what can be done about each.

use std::os::fd::AsFd;

use nix::sys::stat::SFlag;
use nix::sys::statfs::{FsType, fstatfs};

use super::Refusal;
use super::file::Seen;
use crate::kernel::socket;
use crate::kernel::survey::{Vma, VmaName};

const CLOSE: &str = "close it before the dump";
const RINGS: &str = "requests that the kernel works on cannot be carried over: close it before the dump, or have the program \
                     do without (UV_USE_IO_URING=0 for libuv, sysctl kernel.io_uring_disabled=2 for all)";
const AIO: &str = "requests that the kernel works on cannot be carried over: have the program end them (io_destroy) or do \
                   without (innodb_use_native_aio=0, aio threads in nginx)";
const PROFILE: &str = "end the profiling (perf, bpftrace) before the dump";
const EBPF: &str = "pin it in a bpffs, and close it for the dump";
const WAITERS: &str = "close it before the dump, and wait by waitpid";

/// Where /proc/PID/fd points, or the beginning of that; what it is; advice.
const KNOWN: &[(&str, &str, &str)] = &[
    ("anon_inode:[io_uring]", "an io_uring instance", RINGS),
    ("anon_inode:[io_uring", "a part of io_uring", RINGS),
    ("anon_inode:[userfaultfd]", "a userfaultfd", "end what serves its page faults before the dump"),
    ("anon_inode:[perf_event]", "a performance counter", PROFILE),
    ("anon_inode:bpf-map", "an eBPF map", EBPF),
    ("anon_inode:bpf-prog", "an eBPF program", EBPF),
    ("anon_inode:bpf", "an eBPF object", EBPF),
    ("anon_inode:[pidfd]", "a pidfd", WAITERS),
    ("pidfd:", "a pidfd", WAITERS),
    ("anon_inode:[fanotify]", "a fanotify group", "end the watching before the dump"),
    ("anon_inode:seccomp notify", "the supervisor's end of a seccomp filter", "dump the supervised process alone"),
    ("anon_inode:kvm", "a virtual machine", "save the machine by its own means"),
    ("anon_inode:[landlock-ruleset]", "a Landlock ruleset", CLOSE),
    ("anon_inode:[fscontext]", "a file system that is being set up", "finish mounting before the dump"),
    ("/dmabuf:", "a buffer shared with a device", CLOSE),
    ("mqueue:", "a message queue", CLOSE),
    (SECRET, "memory that the kernel itself cannot read (memfd_secret)", "unmap and close it before the dump"),
    ("net:[", "a network namespace", CLOSE),
    ("mnt:[", "a mount namespace", CLOSE),
    ("pid:[", "a pid namespace", CLOSE),
    ("user:[", "a user namespace", CLOSE),
    ("uts:[", "a UTS namespace", CLOSE),
    ("ipc:[", "an IPC namespace", CLOSE),
    ("cgroup:[", "a cgroup namespace", CLOSE),
    ("time:[", "a time namespace", CLOSE),
];

/// The name of every memfd_secret(2), which looks like a path (mm/secretmem.c).
const SECRET: &str = "/secretmem";

/// SECRETMEM_MAGIC of include/uapi/linux/magic.h.
const SECRETMEM_MAGIC: FsType = FsType(0x5345_434d);

/// Whether a description is one of memfd_secret(2).
pub fn is_secret_memory(seen: &Seen) -> bool {
    seen.link.starts_with(SECRET) && fstatfs(&seen.file).is_ok_and(|fs| fs.filesystem_type() == SECRETMEM_MAGIC)
}

/// Families of sockets that have no kind of their own, by the numbers of socket(2).
const FAMILIES: &[(i32, &str, &str)] = &[
    (libc::AF_VSOCK, "a socket to a virtual machine or its host", CLOSE),
    (libc::AF_ALG, "a socket of the kernel's cryptography", CLOSE),
    (libc::AF_CAN, "a CAN socket", CLOSE),
    (libc::AF_BLUETOOTH, "a Bluetooth socket", CLOSE),
    (libc::AF_XDP, "an XDP socket", CLOSE),
    (libc::AF_TIPC, "a TIPC socket", CLOSE),
    (libc::AF_RDS, "an RDS socket", CLOSE),
];

/// What a link of /proc/PID/fd tells of a description that cannot be dumped: what it is, and advice. It is all that can be
/// looked at without touching the description.
pub fn by_link(link: &str) -> Option<(&'static str, &'static str)> {
    KNOWN.iter().find(|(start, ..)| link.starts_with(start)).map(|&(_, what, advice)| (what, advice))
}

/// The same by the name of a socket's protocol (`system.sockprotoname`), for those that cannot be dumped.
pub fn by_protocol(name: &str) -> Option<(&'static str, &'static str)> {
    let (_, family) = PROTOCOLS.iter().find(|(start, _)| name.starts_with(start))?;
    FAMILIES.iter().find(|(known, ..)| known == family).map(|&(_, what, advice)| (what, advice))
}

/// The advice for what has no better one.
pub const ADVICE: &str = CLOSE;

/// Families by the beginnings of the names of their protocols in the kernel (`struct proto`).
const PROTOCOLS: &[(&str, i32)] = &[
    ("AF_VSOCK", libc::AF_VSOCK),
    ("ALG", libc::AF_ALG),
    ("CAN", libc::AF_CAN),
    ("BCM", libc::AF_CAN),
    ("L2CAP", libc::AF_BLUETOOTH),
    ("HCI", libc::AF_BLUETOOTH),
    ("RFCOMM", libc::AF_BLUETOOTH),
    ("XDP", libc::AF_XDP),
    ("TIPC", libc::AF_TIPC),
    ("RDS", libc::AF_RDS),
];

/// The refusal of a description that is of no kind.
pub fn refuse(seen: &Seen) -> Refusal {
    let link = seen.link_text();
    let kind = SFlag::from_bits_truncate(seen.stat.st_mode) & SFlag::S_IFMT;
    if let Some((_, what, advice)) = KNOWN.iter().find(|(start, ..)| link.starts_with(start)) {
        let whose = seen
            .info()
            .ok()
            .and_then(|info| info.get("Pid"))
            .map(|pid| format!(" of process {pid}"))
            .unwrap_or_default();
        return seen.refuse(format!("{what}{whose} ({link}) cannot be dumped"), *advice);
    }
    if kind == SFlag::S_IFCHR || kind == SFlag::S_IFBLK {
        let (major, minor) = (libc::major(seen.stat.st_rdev), libc::minor(seen.stat.st_rdev));
        let what = format!("the device {link} ({major}:{minor}) cannot be dumped: its driver keeps what it knows");
        return seen.refuse(what, CLOSE);
    }
    if kind == SFlag::S_IFSOCK {
        return refuse_socket(seen);
    }
    seen.refuse(format!("{link} is of a kind that cannot be dumped"), CLOSE)
}

fn refuse_socket(seen: &Seen) -> Refusal {
    let number = |option| socket::number(seen.file.as_fd(), libc::SOL_SOCKET, option).unwrap_or(-1);
    let (family, protocol) = (number(libc::SO_DOMAIN), number(libc::SO_PROTOCOL));
    let link = seen.link_text();
    match FAMILIES.iter().find(|(known, ..)| *known == family) {
        Some((_, what, advice)) => seen.refuse(format!("{what} ({link}) cannot be dumped"), *advice),
        None => {
            let what = format!("a socket of family {family}, protocol {protocol} ({link}) cannot be dumped");
            seen.refuse(what, CLOSE)
        }
    }
}

/// What an area is whose file is the kernel's own: a ring or a buffer of one of these descriptions; and advice.
pub fn mapping(vma: &Vma) -> Option<(String, &'static str)> {
    let VmaName::File(name) = &vma.name else { return None };
    let name = name.to_string_lossy();
    if name.starts_with("/[aio]") {
        return Some(("the ring of a context of asynchronous I/O (io_setup)".to_owned(), AIO));
    }
    let secret = name == format!("{SECRET} (deleted)");
    if !name.starts_with("anon_inode:") && !name.starts_with("/dmabuf:") && !secret {
        return None;
    }
    let known = KNOWN.iter().find(|(start, ..)| name.starts_with(start));
    Some(known.map_or_else(
        || (format!("memory of {name}"), CLOSE),
        |(_, what, advice)| (format!("memory of {what}"), advice),
    ))
}
