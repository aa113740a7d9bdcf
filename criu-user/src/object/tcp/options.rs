//! The options that only TCP sockets have: tcp(7).

use std::os::fd::OwnedFd;

use crate::image::proto::{InetSkEntry, TcpOptsEntry};
use crate::kernel::{SysResult, socket};
use crate::object::{ObjectError, sockopt};

type Number = (i32, fn(&mut TcpOptsEntry) -> &mut Option<u32>);
type Switch = (i32, fn(&mut TcpOptsEntry) -> &mut Option<bool>);

const SWITCHES: [Switch; 2] = [(libc::TCP_CORK, |o| &mut o.cork), (libc::TCP_NODELAY, |o| &mut o.nodelay)];
const NUMBERS: [Number; 9] = [
    (libc::TCP_KEEPCNT, |o| &mut o.keepcnt),
    (libc::TCP_KEEPIDLE, |o| &mut o.keepidle),
    (libc::TCP_KEEPINTVL, |o| &mut o.keepintvl),
    (libc::TCP_DEFER_ACCEPT, |o| &mut o.defer_accept),
    (libc::TCP_USER_TIMEOUT, |o| &mut o.user_timeout),
    (libc::TCP_FASTOPEN, |o| &mut o.fastopen),
    (libc::TCP_SYNCNT, |o| &mut o.syncnt),
    (libc::TCP_NOTSENT_LOWAT, |o| &mut o.notsent_lowat),
    (libc::TCP_LINGER2, |o| &mut o.linger2),
];
/// The longest name of a congestion control, TCP_CA_NAME_MAX of include/net/tcp.h.
const CONGESTION: usize = 16;

/// Reads the options of a socket.
pub fn capture(file: &OwnedFd) -> Result<TcpOptsEntry, ObjectError> {
    let mut opts = TcpOptsEntry::default();
    for (name, field) in SWITCHES {
        *field(&mut opts) = sockopt::where_there(socket::number(file, libc::SOL_TCP, name))?.map(|v| v != 0);
    }
    for (name, field) in NUMBERS {
        *field(&mut opts) = sockopt::where_there(socket::number(file, libc::SOL_TCP, name))?.map(|v| v as u32);
    }
    opts.congestion = sockopt::where_there(socket::option(file, libc::SOL_TCP, libc::TCP_CONGESTION, CONGESTION))?;
    Ok(opts)
}

/// The options that an image has, whichever place it has them in.
pub fn of(entry: &InetSkEntry) -> TcpOptsEntry {
    let mut opts = entry.tcp_opts.clone().unwrap_or_default();
    opts.keepcnt = opts.keepcnt.or(entry.opts.tcp_keepcnt);
    opts.keepidle = opts.keepidle.or(entry.opts.tcp_keepidle);
    opts.keepintvl = opts.keepintvl.or(entry.opts.tcp_keepintvl);
    opts
}

/// Gives a socket its options, as far as they are not those that it has as a new one.
pub fn restore(made: &OwnedFd, mut opts: TcpOptsEntry, mut fresh: TcpOptsEntry) -> SysResult<()> {
    for (name, field) in SWITCHES {
        if let Some(on) = *field(&mut opts)
            && *field(&mut fresh) != Some(on)
        {
            socket::set_number(made, libc::SOL_TCP, name, on.into())?;
        }
    }
    for (name, field) in NUMBERS {
        if let Some(value) = *field(&mut opts)
            && *field(&mut fresh) != Some(value)
        {
            socket::set_number(made, libc::SOL_TCP, name, value as i32)?;
        }
    }
    if let Some(name) = &opts.congestion
        && opts.congestion != fresh.congestion
    {
        socket::set_option(made, libc::SOL_TCP, libc::TCP_CONGESTION, name)?;
    }
    Ok(())
}
