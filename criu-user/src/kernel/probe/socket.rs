//! What sockets tell, and what can be set.

use std::os::fd::OwnedFd;

use nix::sched::CloneFlags;

use super::{Answer, apart_in, ensure, network};
use crate::kernel::{SysResult, socket, tls, unix_diag};

const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_SEND_QUEUE: i32 = 2;

/// sock_diag(7) lists the unix sockets.
pub fn unix_diag() -> Answer {
    Ok(format!("{} sockets", unix_diag::all()?.len()))
}

/// SIOCUNIXFILE: the file of a unix socket; here, that there is none.
pub fn unix_file() -> Answer {
    let (one, _other) = socket::pair(libc::SOCK_STREAM)?;
    ensure(socket::unix_file(&one)?.is_none(), "a socket without a name has a file")?;
    Ok(String::new())
}

/// SIOCGSKNS: the network namespace of a socket.
pub fn namespace() -> Answer {
    const SIOCGSKNS: u64 = 0x894c;
    let socket = socket::new(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    socket::namespace_by(&socket, SIOCGSKNS)?;
    Ok(String::new())
}

/// TCP_REPAIR: sequence numbers of a socket are set and read back.
pub fn tcp_repair() -> Answer {
    const SEQUENCE: i32 = 12345;
    let socket = socket::new(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    let set = |option, value| socket::set_number(&socket, libc::IPPROTO_TCP, option, value);
    set(TCP_REPAIR, 1)?;
    set(TCP_REPAIR_QUEUE, TCP_SEND_QUEUE)?;
    set(TCP_QUEUE_SEQ, SEQUENCE)?;
    let number = socket::number(&socket, libc::IPPROTO_TCP, TCP_QUEUE_SEQ)?;
    ensure(number == SEQUENCE, "the kernel gives another sequence number than was set")?;
    Ok(String::new())
}

/// A listening socket and one that is connected to it, over a loopback device that is up.
fn connected() -> SysResult<(OwnedFd, OwnedFd)> {
    let server = socket::new(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    // struct sockaddr_in: family, any port, 127.0.0.1.
    let mut address = [0u8; 16];
    address[0] = libc::AF_INET as u8;
    address[4..8].copy_from_slice(&[127, 0, 0, 1]);
    socket::bind(&server, &address)?;
    socket::listen(&server, 1)?;
    let client = socket::new(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    socket::connect(&client, &socket::own_name(&server)?)?;
    Ok((server, client))
}

/// TLS as the upper layer of a connection, which hides nothing of what it has received (see [`tls::keeps_parts`]).
pub fn tls() -> Answer {
    apart_in(CloneFlags::CLONE_NEWNET, || {
        network::loopback_up()?;
        let (_server, client) = connected()?;
        tls::put_above(&client)?;
        ensure(tls::keeps_parts(), "before Linux 6.0 parts of records are hidden")?;
        Ok(String::new())
    })
}

/// TCP_REPAIR on a connection that one side has closed already.
pub fn tcp_half_closed() -> Answer {
    apart_in(CloneFlags::CLONE_NEWNET, || {
        network::loopback_up()?;
        let (_server, client) = connected()?;
        socket::shutdown(&client, libc::SHUT_WR)?;
        socket::set_number(&client, libc::IPPROTO_TCP, TCP_REPAIR, 1)?;
        Ok(String::new())
    })
}

/// Raw sockets of both families, whose packets can be marked.
pub fn raw() -> Answer {
    for family in [libc::AF_INET, libc::AF_INET6] {
        let socket = socket::new(family, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
        socket::set_number(&socket, libc::SOL_SOCKET, libc::SO_MARK, 1)?;
    }
    Ok(String::new())
}

/// SO_BUF_LOCK: whether the size of a socket's buffers was chosen.
pub fn buffer_lock() -> Answer {
    const SO_BUF_LOCK: i32 = 72;
    let socket = socket::new(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    socket::set_number(&socket, libc::SOL_SOCKET, SO_BUF_LOCK, 1)?;
    ensure(socket::number(&socket, libc::SOL_SOCKET, SO_BUF_LOCK)? == 1, "SO_BUF_LOCK is without effect")?;
    Ok(String::new())
}

/// IPV6_FREEBIND.
pub fn ipv6_freebind() -> Answer {
    const IPV6_FREEBIND: i32 = 78;
    let socket = socket::new(libc::AF_INET6, libc::SOCK_DGRAM, 0)?;
    socket::set_number(&socket, libc::SOL_IPV6, IPV6_FREEBIND, 1)?;
    Ok(String::new())
}
