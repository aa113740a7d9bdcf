//! Sockets: addresses as the kernel has them, options of any level, and messages with descriptors in them.
//!
//! Addresses are byte strings, family first, as in socket(7): a restore hands them on as it found them, to calls of its
//! own and of others.

use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

use super::{SysError, SysResult};

/// `SIOCUNIXFILE` of include/uapi/linux/un.h.
const SIOCUNIXFILE: u64 = 0x89e0;
/// More than the control messages of one packet can take: 253 descriptors (SCM_MAX_FD), credentials, a few more.
const CONTROL: usize = 2048;
/// The longest address.
const ADDRESS: usize = size_of::<libc::sockaddr_storage>();

fn on(fd: BorrowedFd<'_>) -> String {
    format!("fd {}", fd.as_raw_fd())
}

fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: callers pass descriptors that a call of theirs has just made.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A new socket, closed on exec. socket(2).
pub fn new(family: i32, kind: i32, protocol: i32) -> SysResult<OwnedFd> {
    // SAFETY: numbers only.
    Errno::result(unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) })
        .map(owned)
        .map_err(|e| SysError::new("socket", format!("family {family}, type {kind}, protocol {protocol}"), e))
}

/// Two new unix sockets, connected with each other, closed on exec. socketpair(2).
pub fn pair(kind: i32) -> SysResult<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: the array has room for both.
    Errno::result(unsafe { libc::socketpair(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr()) })
        .map_err(|e| SysError::new("socketpair", format!("type {kind}"), e))?;
    Ok((owned(fds[0]), owned(fds[1])))
}

/// bind(2).
pub fn bind(fd: impl AsFd, address: &[u8]) -> SysResult<()> {
    let fd = fd.as_fd();
    // SAFETY: the kernel reads as many bytes as it is told of.
    Errno::result(unsafe { libc::bind(fd.as_raw_fd(), address.as_ptr().cast(), address.len() as u32) })
        .map(drop)
        .map_err(|e| SysError::new("bind", show(address), e))
}

/// connect(2).
pub fn connect(fd: impl AsFd, address: &[u8]) -> SysResult<()> {
    let fd = fd.as_fd();
    // SAFETY: the kernel reads as many bytes as it is told of.
    Errno::result(unsafe { libc::connect(fd.as_raw_fd(), address.as_ptr().cast(), address.len() as u32) })
        .map(drop)
        .map_err(|e| SysError::new("connect", show(address), e))
}

/// listen(2).
pub fn listen(fd: impl AsFd, backlog: u32) -> SysResult<()> {
    let fd = fd.as_fd();
    // SAFETY: numbers only.
    Errno::result(unsafe { libc::listen(fd.as_raw_fd(), backlog as i32) })
        .map(drop)
        .map_err(|e| SysError::new("listen", on(fd), e))
}

/// accept4(2), closed on exec, without waiting for anybody.
pub fn accept(fd: impl AsFd) -> SysResult<OwnedFd> {
    let fd = fd.as_fd();
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one element.
    if unsafe { libc::poll(&raw mut poll, 1, 0) } == 0 {
        return Err(SysError::new("accept4", on(fd), Errno::EAGAIN));
    }
    // SAFETY: no address is asked for.
    Errno::result(unsafe {
        libc::accept4(fd.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), libc::SOCK_CLOEXEC)
    })
    .map(owned)
    .map_err(|e| SysError::new("accept4", on(fd), e))
}

/// shutdown(2).
pub fn shutdown(fd: impl AsFd, how: i32) -> SysResult<()> {
    let fd = fd.as_fd();
    // SAFETY: numbers only.
    Errno::result(unsafe { libc::shutdown(fd.as_raw_fd(), how) })
        .map(drop)
        .map_err(|e| SysError::new("shutdown", on(fd), e))
}

type NameCall = unsafe extern "C" fn(i32, *mut libc::sockaddr, *mut libc::socklen_t) -> i32;

fn name(fd: BorrowedFd<'_>, call: &'static str, of: NameCall) -> SysResult<Vec<u8>> {
    let mut address = vec![0; ADDRESS];
    let mut len = ADDRESS as u32;
    // SAFETY: the kernel writes at most `len` bytes.
    Errno::result(unsafe { of(fd.as_raw_fd(), address.as_mut_ptr().cast(), &raw mut len) })
        .map_err(|e| SysError::new(call, on(fd), e))?;
    address.truncate(len as usize);
    Ok(address)
}

/// getsockname(2).
pub fn own_name(fd: impl AsFd) -> SysResult<Vec<u8>> {
    name(fd.as_fd(), "getsockname", libc::getsockname)
}

/// getpeername(2); `None` where there is no peer.
pub fn peer_name(fd: impl AsFd) -> SysResult<Option<Vec<u8>>> {
    match name(fd.as_fd(), "getpeername", libc::getpeername) {
        Err(err) if err.errno == Errno::ENOTCONN => Ok(None),
        other => other.map(Some),
    }
}

/// The value of an option, `room` bytes at most. getsockopt(2).
pub fn option(fd: impl AsFd, level: i32, option: i32, room: usize) -> SysResult<Vec<u8>> {
    let fd = fd.as_fd();
    let mut value = vec![0; room];
    let mut len = room as u32;
    // SAFETY: the kernel writes at most `len` bytes.
    Errno::result(unsafe { libc::getsockopt(fd.as_raw_fd(), level, option, value.as_mut_ptr().cast(), &raw mut len) })
        .map_err(|e| SysError::new("getsockopt", format!("{}, level {level}, option {option}", on(fd)), e))?;
    // Some options tell how much there is rather than how much they gave.
    value.truncate(len as usize);
    Ok(value)
}

/// The value of an option that is asked about something: `about` says what, and is as long as the answer may be.
pub fn option_about(fd: impl AsFd, level: i32, option: i32, mut about: Vec<u8>) -> SysResult<Vec<u8>> {
    let fd = fd.as_fd();
    let mut len = about.len() as u32;
    // SAFETY: the kernel reads and writes at most `len` bytes.
    Errno::result(unsafe { libc::getsockopt(fd.as_raw_fd(), level, option, about.as_mut_ptr().cast(), &raw mut len) })
        .map_err(|e| SysError::new("getsockopt", format!("{}, level {level}, option {option}", on(fd)), e))?;
    about.truncate(len as usize);
    Ok(about)
}

/// The value of an option that is a number (of whatever size).
pub fn number(fd: impl AsFd, level: i32, name: i32) -> SysResult<i32> {
    let fd = fd.as_fd();
    let (mut word, mut len) = ([0; 4], 4u32);
    // SAFETY: the kernel writes at most four bytes.
    Errno::result(unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, word.as_mut_ptr().cast(), &raw mut len) })
        .map_err(|e| SysError::new("getsockopt", format!("{}, level {level}, option {name}", on(fd)), e))?;
    Ok(i32::from_le_bytes(word))
}

/// Sets an option. setsockopt(2).
pub fn set_option(fd: impl AsFd, level: i32, option: i32, value: &[u8]) -> SysResult<()> {
    let fd = fd.as_fd();
    // SAFETY: the kernel reads as many bytes as it is told of.
    Errno::result(unsafe { libc::setsockopt(fd.as_raw_fd(), level, option, value.as_ptr().cast(), value.len() as u32) })
        .map(drop)
        .map_err(|e| SysError::new("setsockopt", format!("{}, level {level}, option {option}", on(fd)), e))
}

/// Sets an option that is a number.
pub fn set_number(fd: impl AsFd, level: i32, option: i32, value: i32) -> SysResult<()> {
    set_option(fd, level, option, &value.to_le_bytes())
}

/// Sets a program of classic BPF as the filter of a socket: SO_ATTACH_FILTER.
pub fn attach_filter(fd: impl AsFd, program: &[u64]) -> SysResult<()> {
    let fd = fd.as_fd();
    let fprog = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr() as *mut libc::sock_filter };
    let len = size_of::<libc::sock_fprog>() as u32;
    // SAFETY: an instruction is eight bytes, and the kernel only reads them.
    Errno::result(unsafe {
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, (&raw const fprog).cast(), len)
    })
    .map(drop)
    .map_err(|e| SysError::new("setsockopt(SO_ATTACH_FILTER)", on(fd), e))
}

/// The filter of a socket: SO_GET_FILTER, whose lengths are instructions and not bytes.
pub fn filter(fd: impl AsFd) -> SysResult<Vec<u64>> {
    let fd = fd.as_fd();
    let failed = |e| SysError::new("getsockopt(SO_GET_FILTER)", on(fd), e);
    let get = |into: *mut u64, len: &mut u32| {
        // SAFETY: the kernel writes at most `len` instructions of eight bytes, and none if that is 0.
        Errno::result(unsafe {
            libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_GET_FILTER, into.cast(), len)
        })
    };
    let mut len = 0;
    get(std::ptr::null_mut(), &mut len).map_err(failed)?;
    let mut program = vec![0; len as usize];
    if len > 0 {
        get(program.as_mut_ptr(), &mut len).map_err(failed)?;
    }
    Ok(program)
}

/// The file that a unix socket is bound to, as an O_PATH handle; `None` where it has none. Needs CAP_NET_ADMIN.
pub fn unix_file(fd: impl AsFd) -> SysResult<Option<OwnedFd>> {
    let fd = fd.as_fd();
    // SAFETY: the request takes no argument.
    match Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), SIOCUNIXFILE as _) }) {
        Ok(file) => Ok(Some(owned(file))),
        Err(Errno::ENOENT) => Ok(None),
        Err(e) => Err(SysError::new("ioctl(SIOCUNIXFILE)", on(fd), e)),
    }
}

/// The network namespace of a socket or device, by the ioctl that it has for this.
pub(super) fn namespace_by(fd: impl AsFd, request: u64) -> SysResult<OwnedFd> {
    let fd = fd.as_fd();
    // SAFETY: requests of this kind take no argument, and give a new descriptor.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request as _) })
        .map(owned)
        .map_err(|e| SysError::new("ioctl (network namespace)", on(fd), e))
}

/// A message that waits in a socket.
#[derive(Debug, Default)]
pub struct Peeked {
    /// Its content, as far as there was room.
    pub data: Vec<u8>,
    /// How long it is.
    pub len: usize,
    /// Descriptors in it; ours now as well.
    pub files: Vec<OwnedFd>,
    /// pid, uid and gid of who sent it, where the socket asks for that (SO_PASSCRED).
    pub sender: Option<[u32; 3]>,
    /// Address of who sent it.
    pub from: Vec<u8>,
    /// Control messages that are neither.
    pub others: Vec<i32>,
}

/// Looks at what waits in a socket without taking it; `None` if that is nothing. recvmsg(2) with MSG_PEEK.
pub fn peek(fd: impl AsFd, room: usize) -> SysResult<Option<Peeked>> {
    let fd = fd.as_fd();
    let mut peeked = Peeked { data: vec![0; room], from: vec![0; ADDRESS], ..Peeked::default() };
    // u64 for the alignment of control messages.
    let mut control = vec![0u64; CONTROL / 8];
    let mut part = libc::iovec { iov_base: peeked.data.as_mut_ptr().cast(), iov_len: room };
    // SAFETY: all-zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { zeroed() };
    header.msg_name = peeked.from.as_mut_ptr().cast();
    header.msg_namelen = ADDRESS as u32;
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = CONTROL;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_TRUNC | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: everything that the header points to lives and is as long as it says.
    match Errno::result(unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut header, flags) }) {
        Ok(len) => peeked.len = len as usize,
        Err(Errno::EAGAIN) => return Ok(None),
        Err(e) => return Err(SysError::new("recvmsg(MSG_PEEK)", on(fd), e)),
    }
    peeked.data.truncate(peeked.len);
    peeked.from.truncate(header.msg_namelen as usize);
    // SAFETY: the header is the one that the kernel has filled in, and its buffers live.
    unsafe { control_messages(&header, &mut peeked) };
    Ok(Some(peeked))
}

/// # Safety
/// The header must be as recvmsg(2) left it.
unsafe fn control_messages(header: &libc::msghdr, into: &mut Peeked) {
    // SAFETY: the macros stay within the control buffer; payloads are read unaligned and within cmsg_len.
    unsafe {
        let mut at = libc::CMSG_FIRSTHDR(header);
        while !at.is_null() {
            let message = at.read_unaligned();
            let data = libc::CMSG_DATA(at);
            let len = message.cmsg_len - libc::CMSG_LEN(0) as usize;
            match (message.cmsg_level, message.cmsg_type) {
                (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                    let fds = (0..len / 4).map(|n| owned(data.cast::<RawFd>().add(n).read_unaligned()));
                    into.files.extend(fds);
                }
                (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) if len >= 12 => {
                    into.sender = Some(data.cast::<[u32; 3]>().read_unaligned());
                }
                (_, kind) => into.others.push(kind),
            }
            at = libc::CMSG_NXTHDR(header, at);
        }
    }
}

/// What to send with data.
#[derive(Debug, Default)]
pub struct Extra<'a> {
    /// Descriptors.
    pub files: Vec<BorrowedFd<'a>>,
    /// pid, uid and gid to show for a sender.
    pub sender: Option<[u32; 3]>,
    /// Where to; an empty address for the peer.
    pub to: &'a [u8],
    /// What else is told with it: level, kind, and content. CMSG(3).
    pub control: Vec<(i32, i32, Vec<u8>)>,
    /// Whether there is more to come of the same message: MSG_MORE.
    pub more: bool,
}

/// Sends a message, without waiting for room; says how much of it. sendmsg(2).
pub fn send(fd: impl AsFd, data: &[u8], extra: &Extra<'_>) -> SysResult<usize> {
    let fd = fd.as_fd();
    let mut control = Vec::new();
    if !extra.files.is_empty() {
        let fds: Vec<u8> = extra.files.iter().flat_map(|f| f.as_raw_fd().to_le_bytes()).collect();
        push_control(&mut control, libc::SOL_SOCKET, libc::SCM_RIGHTS, &fds);
    }
    if let Some(sender) = extra.sender {
        let bytes: Vec<u8> = sender.iter().flat_map(|w| w.to_le_bytes()).collect();
        push_control(&mut control, libc::SOL_SOCKET, libc::SCM_CREDENTIALS, &bytes);
    }
    for (level, kind, content) in &extra.control {
        push_control(&mut control, *level, *kind, content);
    }
    let more = if extra.more { libc::MSG_MORE } else { 0 };
    let mut part = libc::iovec { iov_base: data.as_ptr() as *mut _, iov_len: data.len() };
    // SAFETY: all-zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { zeroed() };
    header.msg_name = extra.to.as_ptr() as *mut _;
    header.msg_namelen = extra.to.len() as u32;
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = control.len() * 8;
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL | more;
    // SAFETY: everything that the header points to lives, is as long as it says, and is only read.
    Errno::result(unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const header, flags) })
        .map(|sent| sent as usize)
        .map_err(|e| SysError::new("sendmsg", format!("{}, {} bytes", on(fd), data.len()), e))
}

/// `struct cmsghdr` and its payload, filled up to eight bytes: the layout of CMSG(3).
fn push_control(control: &mut Vec<u64>, level: i32, kind: i32, payload: &[u8]) {
    control.push(16 + payload.len() as u64);
    control.push((kind as u64) << 32 | u64::from(level as u32));
    for chunk in payload.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        control.push(u64::from_le_bytes(word));
    }
}

/// An address for a reader.
fn show(address: &[u8]) -> String {
    match address.split_first_chunk::<2>() {
        Some((family, rest)) if i32::from(u16::from_le_bytes(*family)) == libc::AF_UNIX => {
            String::from_utf8_lossy(rest).replace('\0', "@")
        }
        _ => format!("{address:02x?}"),
    }
}
