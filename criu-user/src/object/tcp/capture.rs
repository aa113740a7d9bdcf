//! TCP sockets at the dump: what they are, and whether they can be carried over.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::poll::PollFlags;

use super::hold::Layer;
use super::{Ends, Hold, clients, fallback, options, tls as layer};
use crate::image::proto::{InetSkEntry, TcpOptsEntry};
use crate::kernel::inet_diag::{self, Asker, TcpSocket};
use crate::kernel::tcp::{self, Info};
use crate::kernel::tls;
use crate::kernel::{fd, socket};
use crate::object::ObjectError;
use crate::object::file::{Capture, Seen};
use crate::object::inet::{is_connection, split_end};
use crate::object::sockopt::state;

/// TCP_SYN_SENT.
const SYN_SENT: u32 = 2;
/// TCP_AO_INFO: there is one only where packets are signed as RFC 5925 says.
const TCP_AO_INFO: i32 = 40;

/// What sock_diag says of all connections, asked when one was not found by its ends.
#[derive(Debug, Default)]
struct Diag(Option<HashMap<u32, TcpSocket>>);

impl Diag {
    fn of(&mut self, ino: u32) -> Result<Option<TcpSocket>, ObjectError> {
        let all = match &mut self.0 {
            Some(all) => all,
            empty => empty.insert(inet_diag::all()?),
        };
        Ok(all.get(&ino).copied())
    }

    /// After a connection was refused a socket still tells the port that the kernel had given it for that, and has given
    /// to the next one since.
    fn has_lost_port(&mut self, ino: u32) -> Result<bool, ObjectError> {
        Ok(self.of(ino)?.is_none() && inet_diag::lists_bound()?)
    }
}

/// What only a TCP socket tells.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Facts {
    info: Info,
    opts: TcpOptsEntry,
    /// What sock_diag says of a connection, where it finds it by its ends.
    diag: Option<TcpSocket>,
}

impl Facts {
    /// Asks it, a socket with these addresses.
    pub fn read(file: &OwnedFd, entry: &InetSkEntry) -> Result<Self, ObjectError> {
        let mut facts = Self { info: tcp::info(file)?, opts: options::capture(file)?, diag: None };
        if facts.is_connected() {
            facts.diag = found(entry)?;
        }
        Ok(facts)
    }

    /// Whether it is connected.
    pub fn is_connected(&self) -> bool {
        ![state::LISTEN, state::CLOSE, SYN_SENT].contains(&self.info.state.into())
    }

    /// What it tells now, if it is in the state that it was in.
    pub fn as_of_now(&self, file: &OwnedFd) -> Result<Option<Self>, ObjectError> {
        let info = tcp::info(file)?;
        Ok((info.state == self.info.state).then(|| Self { info, ..self.clone() }))
    }

    /// Takes what [`Self::as_of_now`] asks for from others. Whether they are in the same state.
    pub fn take_over(&mut self, from: &Self) -> bool {
        let is_same = self.info.state == from.info.state;
        self.info = from.info;
        is_same
    }
}

fn found(entry: &InetSkEntry) -> Result<Option<TcpSocket>, ObjectError> {
    thread_local! {
        static ASKER: OnceCell<Asker> = const { OnceCell::new() };
    }
    let Ends { local, remote } = Ends::of(entry, 0);
    let ask = |asker: &Asker| asker.find(local, remote);
    let answer = ASKER.with(|known| match known.get() {
        Some(asker) => ask(asker),
        None => {
            let asker = Asker::new()?;
            ask(known.get_or_init(|| asker))
        }
    })?;
    Ok(answer.filter(|(ino, _)| *ino == entry.ino).map(|(_, socket)| socket))
}

/// The state of a TCP socket, from TCP_INFO: it is right where sock_diag(7) does not list a socket at all.
pub fn capture(seen: &Seen, cx: &mut Capture<'_>, entry: &mut InetSkEntry, facts: &Facts) -> Result<(), ObjectError> {
    let Facts { info, opts, diag } = facts.clone();
    entry.state = info.state.into();
    (entry.opts.tcp_keepcnt, entry.opts.tcp_keepidle, entry.opts.tcp_keepintvl) =
        (opts.keepcnt, opts.keepidle, opts.keepintvl);
    entry.tcp_opts = Some(opts);
    if entry.state == state::LISTEN {
        listening(seen, cx, entry, &info)?;
    } else if !cx.options.tcp_close && is_connection(entry) {
        connection(seen, cx, entry, info, diag)?;
    } else if cx.options.tcp_established && !fallback::is_mptcp(entry) && closed_was_connected(&seen.file, &info)? {
        if tls::is_above(&seen.file)? {
            cx.refuse(seen.refuse(
                "a TCP socket that was encrypted by the kernel (TLS), and is closed",
                "close it, or give --tcp-close to have it restored as a closed socket",
            ));
        }
        cx.shelf.get::<Hold>().add(seen, entry, info, Layer::None);
    } else if entry.state == state::CLOSE && entry.src_port != 0 && cx.shelf.get::<Diag>().has_lost_port(entry.ino)? {
        (entry.src_addr, entry.src_port) = (vec![0; entry.src_addr.len()], 0);
    }
    Ok(())
}

fn listening(seen: &Seen, cx: &mut Capture<'_>, entry: &mut InetSkEntry, info: &Info) -> Result<(), ObjectError> {
    entry.backlog = info.backlog;
    if !cx.options.tcp_close && !cx.options.skip_in_flight {
        match clients::obstacle(cx.options, entry) {
            Some((why, advice)) if info.waiting > 0 => cx.refuse(seen.refuse(
                format!(
                    "{} TCP client(s) wait to be accepted by the server on port {}{why}",
                    info.waiting, entry.src_port
                ),
                advice,
            )),
            Some(_) => {}
            // Some may come until requests for connections are dropped. Where they are, or where a handshake is only over
            // when the client has said something (TCP_DEFER_ACCEPT), those in the middle of one count as well.
            None => {
                let deferred = entry.tcp_opts.as_ref().and_then(|opts| opts.defer_accept).unwrap_or_default() > 0;
                let unfinished = cx.options.lock_listeners || deferred;
                cx.shelf.get::<Hold>().clients.add(seen, entry, info.waiting, unfinished);
            }
        }
    }
    if cx.options.lock_listeners {
        cx.shelf.get::<Hold>().add_listener(entry)?;
    }
    Ok(())
}

/// A closed socket is a connection that has come to its end, with all that this means to a reader, or never was one: then
/// there never was a window of a peer's.
pub fn closed_was_connected(file: &OwnedFd, info: &Info) -> Result<bool, ObjectError> {
    Ok(info.snd_wnd != 0 && tcp::has_end(file)?)
}

/// A connection is held to be read when all are known, or refused.
fn connection(
    seen: &Seen,
    cx: &mut Capture<'_>,
    entry: &mut InetSkEntry,
    info: Info,
    diag: Option<TcpSocket>,
) -> Result<(), ObjectError> {
    let diag = match diag {
        None => cx.shelf.get::<Diag>().of(entry.ino)?,
        known => known,
    };
    // getpeername(2) knows no peer that has not answered.
    if let Some(socket) = diag.filter(|_| entry.state == SYN_SENT) {
        (entry.dst_addr, entry.dst_port) = split_end(socket.remote);
    }
    let ends = Ends::of(entry, 0);
    let refused = if cx.options.tcp_established {
        unsupported(&seen.file, entry, diag)?.map(|what| {
            (
                format!("TCP connection {ends} {what}"),
                "close it, or give --tcp-close to have it restored as a closed socket",
            )
        })
    } else {
        Some((
            format!("TCP connection {ends} (state {})", entry.state),
            "give --tcp-established to keep it, or --tcp-close to have it restored as a closed socket",
        ))
    };
    match refused {
        Some((what, advice)) => cx.refuse(seen.refuse(what, advice)),
        None => {
            let layer = match diag {
                _ if fallback::is_mptcp(entry) => Layer::FallenBack,
                Some(socket) if socket.has_upper_layer => Layer::Tls,
                _ => Layer::None,
            };
            cx.shelf.get::<Hold>().add(seen, entry, info, layer);
            // One that has fallen back comes back as what it is.
            if fallback::is_mptcp(entry) {
                entry.proto = libc::IPPROTO_TCP as u32;
            }
        }
    }
    Ok(())
}

/// Whether packets are signed (TCP-AO). A kernel that does not know of that has to say so only once.
fn is_signed(file: &OwnedFd) -> bool {
    static UNKNOWN: AtomicBool = AtomicBool::new(false);
    if UNKNOWN.load(Ordering::Relaxed) {
        return false;
    }
    match socket::option(file, libc::SOL_TCP, TCP_AO_INFO, 256) {
        Ok(_) => true,
        Err(err) => {
            UNKNOWN.fetch_or(err.errno == Errno::ENOPROTOOPT, Ordering::Relaxed);
            false
        }
    }
}

/// What of a connection the kernel does not let go.
pub fn unsupported(
    file: &OwnedFd,
    entry: &InetSkEntry,
    diag: Option<TcpSocket>,
) -> Result<Option<&'static str>, ObjectError> {
    if fallback::is_mptcp(entry) {
        return Ok(fallback::obstacle(file, entry));
    }
    if diag.is_some_and(|socket| socket.signed) {
        return Ok(Some("has its packets signed (TCP MD5), and the kernel keeps the keys to itself"));
    }
    if is_signed(file) {
        return Ok(Some("has its packets signed (TCP-AO), and the kernel keeps the keys to itself"));
    }
    if diag.is_some_and(|socket| socket.has_upper_layer) {
        return Ok(layer::obstacle(file, entry.state)?);
    }
    if fd::poll_now(file, PollFlags::POLLPRI)?.contains(PollFlags::POLLPRI) {
        return Ok(Some("has urgent data that was not read yet"));
    }
    if entry.state == SYN_SENT && tcp::lengths(file)?.unacknowledged > 0 {
        return Ok(Some("has sent data with its first packet (TCP Fast Open), which was not answered yet"));
    }
    Ok(None)
}
