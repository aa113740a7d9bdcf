//! TLS in the kernel: an upper layer of a TCP socket that encrypts what is written and decrypts what has come.
//!
//! # References
//! Documentation/networking/tls.rst; include/uapi/linux/tls.h; net/tls/tls_main.c.

use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::sys::utsname::uname;

use super::SysResult;
use super::socket::{Extra, number, option, send, set_number, set_option};

const TCP_ULP: i32 = 31;
/// The name of the layer.
const NAME: &[u8] = b"tls";
const SOL_TLS: i32 = 282;
const TLS_TX_ZEROCOPY_RO: i32 = 3;
const TLS_RX_EXPECT_NO_PAD: i32 = 4;
/// What a control message says the type of a record by.
const TLS_SET_RECORD_TYPE: i32 = 1;
/// Of records that are what the program has written.
const APPLICATION_DATA: u8 = 23;

/// One of the two ways of a connection, each with keys of its own: TLS_TX and TLS_RX.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// What is written.
    Out = 1,
    /// What has come.
    In = 2,
}

/// Whether this is the upper layer of a socket.
pub fn is_above(fd: impl AsFd) -> SysResult<bool> {
    /// TCP_ULP_NAME_MAX of include/net/tcp.h.
    const ROOM: usize = 16;
    let name = option(fd, libc::SOL_TCP, TCP_ULP, ROOM)?;
    Ok(name.split(|&byte| byte == 0).next() == Some(NAME))
}

/// Makes it that. The socket has to be connected.
pub fn put_above(fd: impl AsFd) -> SysResult<()> {
    set_option(fd, libc::SOL_TCP, TCP_ULP, NAME)
}

/// The version, the cipher, its keys and the number of the next record, as one of the structures `tls12_crypto_info_*`;
/// `None` where this way goes in plain text. Of ciphers that are not known here the first four bytes.
pub fn keys(fd: impl AsFd, way: Way) -> SysResult<Option<Vec<u8>>> {
    /// `struct tls_crypto_info`, with which all of them begin.
    const HEAD: usize = 4;
    let head = match option(&fd, SOL_TLS, way as i32, HEAD) {
        Err(err) if err.errno == Errno::EBUSY => return Ok(None),
        head => head?,
    };
    match length(&head) {
        Some(length) => option(fd, SOL_TLS, way as i32, length).map(Some),
        None => Ok(Some(head)),
    }
}

/// Sets them.
pub fn set_keys(fd: impl AsFd, way: Way, keys: &[u8]) -> SysResult<()> {
    set_option(fd, SOL_TLS, way as i32, keys)
}

/// How long the structure of a cipher is, by what it begins with: the size of each is in include/uapi/linux/tls.h.
pub fn length(keys: &[u8]) -> Option<usize> {
    let cipher = u16::from_le_bytes([*keys.get(2)?, *keys.get(3)?]);
    match cipher {
        // Keys of 16 bytes: AES-GCM, AES-CCM, SM4-GCM, SM4-CCM, ARIA-GCM.
        51 | 53 | 55 | 56 | 57 => Some(40),
        // Of 32: AES-GCM, ChaCha20-Poly1305, ARIA-GCM.
        52 | 54 | 58 => Some(56),
        _ => None,
    }
}

/// Sends what was written with MSG_MORE, and waits in a record that is not full. Where nothing does, nothing happens.
pub fn flush(fd: impl AsFd) -> SysResult<()> {
    let control = vec![(SOL_TLS, TLS_SET_RECORD_TYPE, vec![APPLICATION_DATA])];
    send(fd, &[], &Extra { control, ..Extra::default() }).map(drop)
}

/// Whether parts of records stay in the receive queue until all of a record is there: since Linux 6.0. Nobody tells of it.
pub fn keeps_parts() -> bool {
    let release = uname().ok().and_then(|uname| uname.release().to_str()?.split('.').next()?.parse::<u32>().ok());
    release.is_some_and(|major| major >= 6)
}

/// Options of the layer's own: whether pages of files may be sent without a copy, and whether records are expected to have no
/// padding. Before Linux 6.0 there is neither.
pub fn hints(fd: impl AsFd) -> [bool; 2] {
    [TLS_TX_ZEROCOPY_RO, TLS_RX_EXPECT_NO_PAD].map(|name| number(&fd, SOL_TLS, name).is_ok_and(|value| value != 0))
}

/// Sets those that are wanted.
pub fn set_hints(fd: impl AsFd, hints: [bool; 2]) -> SysResult<()> {
    let wanted = [TLS_TX_ZEROCOPY_RO, TLS_RX_EXPECT_NO_PAD].into_iter().zip(hints).filter(|(_, wanted)| *wanted);
    wanted.into_iter().try_for_each(|(name, _)| set_number(&fd, SOL_TLS, name, 1))
}
