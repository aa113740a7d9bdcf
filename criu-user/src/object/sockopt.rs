//! What sockets of all families have in common: their options (socket(7)), and how images number their states.

use std::cell::OnceCell;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use super::ObjectError;
use crate::image::proto::{SkOptsEntry, SkShutdown};
use crate::kernel::socket::{self, attach_filter, filter, number, option, set_number, set_option};
use crate::kernel::{SysError, SysResult};

/// States of sockets, of whatever family, as the kernel and images number them (include/net/tcp_states.h).
pub mod state {
    /// Connected.
    pub const ESTABLISHED: u32 = 1;
    /// Nothing yet, or nothing any more.
    pub const CLOSE: u32 = 7;
    /// Listening.
    pub const LISTEN: u32 = 10;
}

const SOL: i32 = libc::SOL_SOCKET;
/// Options that libc does not have: include/uapi/asm-generic/socket.h.
const SO_BUF_LOCK: i32 = 72;
const SO_PASSPIDFD: i32 = 76;
const BUF_LOCK_MASK: u32 = 3;

/// Options that are on or off, and their fields. Which of them there are depends on the family.
type Switch = (i32, fn(&mut SkOptsEntry) -> &mut Option<bool>);
const SWITCHES: [Switch; 7] = [
    (libc::SO_PASSCRED, |o| &mut o.so_passcred),
    (libc::SO_PASSSEC, |o| &mut o.so_passsec),
    (libc::SO_DONTROUTE, |o| &mut o.so_dontroute),
    (libc::SO_NO_CHECK, |o| &mut o.so_no_check),
    (libc::SO_BROADCAST, |o| &mut o.so_broadcast),
    (libc::SO_KEEPALIVE, |o| &mut o.so_keepalive),
    (SO_PASSPIDFD, |o| &mut o.so_passpidfd),
];

/// Options that are numbers, and their fields.
type Number = (i32, fn(&mut SkOptsEntry) -> &mut Option<u32>);
const NUMBERS: [Number; 4] = [
    (libc::SO_PRIORITY, |o| &mut o.so_priority),
    (libc::SO_RCVLOWAT, |o| &mut o.so_rcvlowat),
    (libc::SO_MARK, |o| &mut o.so_mark),
    (libc::SO_OOBINLINE, |o| &mut o.so_oobinline),
];

/// Which of [`SWITCHES`] internet sockets of this kernel do not have, a bit each, as it has said once.
static NOT_OF_INTERNET: AtomicU32 = AtomicU32::new(0);

/// Reads the options of a socket.
pub fn capture(fd: impl AsFd) -> Result<SkOptsEntry, ObjectError> {
    capture_of(fd, None)
}

/// The same of a socket of a family, whose options need not be looked for in vain more than once.
pub fn capture_of(fd: impl AsFd, family: Option<i32>) -> Result<SkOptsEntry, ObjectError> {
    let fd = fd.as_fd();
    let internet = family.is_some_and(|family| [libc::AF_INET, libc::AF_INET6].contains(&family));
    let absent = if internet { NOT_OF_INTERNET.load(Ordering::Relaxed) } else { 0 };
    let mut opts = SkOptsEntry {
        so_sndbuf: number(fd, SOL, libc::SO_SNDBUF)? as u32,
        so_rcvbuf: number(fd, SOL, libc::SO_RCVBUF)? as u32,
        // Since Linux 5.14.
        so_buf_lock: number(fd, SOL, SO_BUF_LOCK).ok().map(|v| v as u32),
        reuseaddr: Some(number(fd, SOL, libc::SO_REUSEADDR)? != 0),
        so_reuseport: Some(number(fd, SOL, libc::SO_REUSEPORT)? != 0),
        ..SkOptsEntry::default()
    };
    (opts.so_snd_tmo_sec, opts.so_snd_tmo_usec) = two_words(&option(fd, SOL, libc::SO_SNDTIMEO, 16)?);
    (opts.so_rcv_tmo_sec, opts.so_rcv_tmo_usec) = two_words(&option(fd, SOL, libc::SO_RCVTIMEO, 16)?);
    for (n, (name, field)) in SWITCHES.into_iter().enumerate().filter(|(n, _)| absent >> n & 1 == 0) {
        let found = where_there(number(fd, SOL, name))?;
        if internet && found.is_none() {
            NOT_OF_INTERNET.fetch_or(1 << n, Ordering::Relaxed);
        }
        *field(&mut opts) = found.map(|v| v != 0);
    }
    for (name, field) in NUMBERS {
        *field(&mut opts) = where_there(number(fd, SOL, name))?.map(|v| v as u32);
    }
    let linger = option(fd, SOL, libc::SO_LINGER, 8)?;
    opts.so_linger = (linger.first() == Some(&1)).then(|| word(&linger, 4));
    opts.so_peek_off = where_there(number(fd, SOL, libc::SO_PEEK_OFF))?.and_then(|v| u32::try_from(v).ok());
    let device = where_there(option(fd, SOL, libc::SO_BINDTODEVICE, libc::IFNAMSIZ))?.unwrap_or_default();
    opts.so_bound_dev = (!device.is_empty()).then_some(device);
    opts.so_filter = filter(fd)?;
    Ok(opts)
}

/// Asks again for what changes without anybody's setting it: the kernel adapts buffers, and whoever peeks or reads moves the
/// place that is peeked at.
pub fn ask_again(fd: impl AsFd, opts: &mut SkOptsEntry) -> SysResult<()> {
    let fd = fd.as_fd();
    (opts.so_sndbuf, opts.so_rcvbuf) =
        (number(fd, SOL, libc::SO_SNDBUF)? as u32, number(fd, SOL, libc::SO_RCVBUF)? as u32);
    if opts.so_peek_off.is_some() {
        opts.so_peek_off = u32::try_from(number(fd, SOL, libc::SO_PEEK_OFF)?).ok();
    }
    Ok(())
}

/// Takes what [`ask_again`] asks for from other options.
pub fn take_over(from: &SkOptsEntry, to: &mut SkOptsEntry) {
    (to.so_sndbuf, to.so_rcvbuf, to.so_peek_off) = (from.so_sndbuf, from.so_rcvbuf, from.so_peek_off);
}

/// Options of other families are refused with these.
pub fn where_there<T>(value: SysResult<T>) -> Result<Option<T>, SysError> {
    use nix::errno::Errno;
    match value {
        Ok(value) => Ok(Some(value)),
        Err(err) if [Errno::EOPNOTSUPP, Errno::ENOPROTOOPT].contains(&err.errno) => Ok(None),
        Err(err) => Err(err),
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

fn two_words(bytes: &[u8]) -> (u64, u64) {
    let long = |at| u64::from(word(bytes, at)) | u64::from(word(bytes, at + 4)) << 32;
    (long(0), long(8))
}

/// Gives a socket its options, but for SO_REUSEADDR and SO_REUSEPORT, whose time is another. The queues must be full by
/// then: buffers may be smaller than what is in them.
pub fn restore(fd: impl AsFd, opts: &SkOptsEntry) -> SysResult<()> {
    restore_buffers(&fd, opts)?;
    restore_over(fd, opts, None)
}

/// The same without the sizes of buffers, for a socket that has the options `fresh`, or is to be asked.
pub fn restore_over(fd: impl AsFd, opts: &SkOptsEntry, fresh: Option<&SkOptsEntry>) -> SysResult<()> {
    let fd = fd.as_fd();
    let (mut opts, mut fresh) = (opts.clone(), fresh.cloned());
    let timeouts = |o: &SkOptsEntry| [(o.so_snd_tmo_sec, o.so_snd_tmo_usec), (o.so_rcv_tmo_sec, o.so_rcv_tmo_usec)];
    let known = fresh.as_ref().map(timeouts);
    for (n, (name, (sec, usec))) in [libc::SO_SNDTIMEO, libc::SO_RCVTIMEO].into_iter().zip(timeouts(&opts)).enumerate()
    {
        if known.is_none_or(|known| known[n] != (sec, usec)) {
            set_option(fd, SOL, name, &[sec.to_le_bytes(), usec.to_le_bytes()].concat())?;
        }
    }
    for (name, field) in SWITCHES {
        let Some(want) = *field(&mut opts) else { continue };
        let have = match &mut fresh {
            Some(fresh) => *field(fresh),
            // Off already, unless it was inherited from a listening socket.
            None => where_there(number(fd, SOL, name))?.map(|v| v != 0),
        };
        if want != have.unwrap_or(false) {
            set_number(fd, SOL, name, want.into())?;
        }
    }
    for (name, field) in NUMBERS {
        let Some(want) = *field(&mut opts) else { continue };
        let have = match &mut fresh {
            Some(fresh) => *field(fresh),
            None => where_there(number(fd, SOL, name))?.map(|v| v as u32),
        };
        if have.is_some_and(|have| have != want) {
            set_number(fd, SOL, name, want as i32)?;
        }
    }
    if let Some(seconds) = opts.so_linger {
        set_option(fd, SOL, libc::SO_LINGER, &[1i32.to_le_bytes(), seconds.to_le_bytes()].concat())?;
    }
    if let Some(offset) = opts.so_peek_off {
        set_number(fd, SOL, libc::SO_PEEK_OFF, offset as i32)?;
    }
    if let Some(device) = &opts.so_bound_dev {
        set_option(fd, SOL, libc::SO_BINDTODEVICE, device)?;
    }
    if !opts.so_filter.is_empty() {
        attach_filter(fd, &opts.so_filter)?;
    }
    Ok(())
}

/// What a new socket of a kind is like, found out when it is first asked for: few sockets are different, and options are
/// many.
#[derive(Debug, Default)]
pub struct Fresh(OnceCell<SkOptsEntry>);

impl Fresh {
    /// As [`restore`], for a new socket. Only its send buffer may have another size by now.
    pub fn restore(&self, fd: impl AsFd, opts: &SkOptsEntry) -> Result<(), ObjectError> {
        let fd = fd.as_fd();
        let fresh = self.options(fd)?;
        let now = SkOptsEntry { so_sndbuf: number(fd, SOL, libc::SO_SNDBUF)? as u32, ..fresh.clone() };
        restore_buffers_over(fd, opts, &now)?;
        Ok(restore_over(fd, opts, Some(fresh))?)
    }

    fn options(&self, fd: BorrowedFd<'_>) -> Result<&SkOptsEntry, ObjectError> {
        if let Some(known) = self.0.get() {
            return Ok(known);
        }
        let [domain, kind, protocol] =
            [libc::SO_DOMAIN, libc::SO_TYPE, libc::SO_PROTOCOL].map(|name| number(fd, SOL, name));
        let found = capture(socket::new(domain?, kind?, protocol?)?)?;
        Ok(self.0.get_or_init(|| found))
    }
}

/// Gives a socket the sizes of its buffers, and says which of them are the user's: the kernel goes on adapting the others.
pub fn restore_buffers(fd: impl AsFd, opts: &SkOptsEntry) -> SysResult<()> {
    let fd = fd.as_fd();
    // The kernel doubles what it is given.
    set_number(fd, SOL, libc::SO_SNDBUFFORCE, (opts.so_sndbuf / 2) as i32)?;
    set_number(fd, SOL, libc::SO_RCVBUFFORCE, (opts.so_rcvbuf / 2) as i32)?;
    restore_locks(fd, opts)
}

fn restore_locks(fd: BorrowedFd<'_>, opts: &SkOptsEntry) -> SysResult<()> {
    let Some(locks) = opts.so_buf_lock else { return Ok(()) };
    match set_number(fd, SOL, SO_BUF_LOCK, (locks & BUF_LOCK_MASK) as i32) {
        // MPTCP only tells it.
        Err(err) if err.errno == nix::errno::Errno::EOPNOTSUPP => Ok(()),
        other => other,
    }
}

/// The same for a socket whose buffers are as in `now`: sets only what differs.
pub fn restore_buffers_over(fd: impl AsFd, opts: &SkOptsEntry, now: &SkOptsEntry) -> SysResult<()> {
    let fd = fd.as_fd();
    let locks = |o: &SkOptsEntry| o.so_buf_lock.unwrap_or(0) & BUF_LOCK_MASK;
    let [send, receive] = [opts.so_sndbuf != now.so_sndbuf, opts.so_rcvbuf != now.so_rcvbuf];
    if send {
        set_number(fd, SOL, libc::SO_SNDBUFFORCE, (opts.so_sndbuf / 2) as i32)?;
    }
    if receive {
        set_number(fd, SOL, libc::SO_RCVBUFFORCE, (opts.so_rcvbuf / 2) as i32)?;
    }
    if send || receive || locks(opts) != locks(now) { restore_locks(fd, opts) } else { Ok(()) }
}

/// The sizes of its buffers that a socket has just now, and that the kernel adapts both.
pub fn adapted_buffers(fd: impl AsFd) -> SysResult<SkOptsEntry> {
    let size = |name| number(&fd, SOL, name).map(|v| v as u32);
    Ok(SkOptsEntry {
        so_sndbuf: size(libc::SO_SNDBUF)?,
        so_rcvbuf: size(libc::SO_RCVBUF)?,
        so_buf_lock: Some(0),
        ..SkOptsEntry::default()
    })
}

/// The halves that are shut down, RCV_SHUTDOWN (1) and SEND_SHUTDOWN (2), as images have them.
pub fn shutdown_of(bits: u8) -> Option<i32> {
    (bits != 0).then_some(i32::from(bits & 3))
}

/// The argument of shutdown(2) for what an image says.
pub fn shutdown_how(shutdown: SkShutdown) -> Option<i32> {
    match shutdown {
        SkShutdown::None => None,
        SkShutdown::Read => Some(libc::SHUT_RD),
        SkShutdown::Write => Some(libc::SHUT_WR),
        SkShutdown::Both => Some(libc::SHUT_RDWR),
    }
}

/// The family of a socket.
pub fn family(fd: impl AsFd) -> Option<i32> {
    number(fd, SOL, libc::SO_DOMAIN).ok()
}
