//! What UDP sockets have gathered for a datagram that is not sent yet: `criu-ebpf/src/gathered.rs`, from the engine's side.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::AsFd;

use criu_common::gathered::{Gathered, SOURCES};
use criu_common::kfuncs;
use criu_common::pieces::Piece;

use super::object::compiled;
use super::pieces::{self, Item, Pieces};
use super::{EbpfError, EbpfResult, bpf};

/// The compiled program.
static OBJECT: Option<&[u8]> = compiled!("gathered");

const PROGRAM: &str = "gathered";
/// The kernel function that stands for the iterator, and those that the program calls.
const FUNCTIONS: [&str; 4] = ["bpf_iter_task_file", kfuncs::LOOP[0], kfuncs::LOOP[1], kfuncs::LOOP[2]];
/// `struct udphdr`.
const HEADER: usize = 8;

/// A datagram that is not complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// The kernel's record.
    pub record: Gathered,
    /// Its bytes so far.
    pub data: Vec<u8>,
}

impl Datagram {
    /// Whether all of it could be read.
    pub fn is_whole(&self) -> bool {
        self.data.len() + HEADER == self.record.length as usize
    }

    /// Where it comes from.
    pub fn source(&self) -> IpAddr {
        self.address(self.record.source)
    }

    /// Where it goes.
    pub fn destination(&self) -> SocketAddr {
        let port = u16::from_be_bytes(self.record.port);
        match self.address(self.record.destination) {
            IpAddr::V6(v6) if v6.is_unicast_link_local() => {
                SocketAddrV6::new(v6, port, 0, self.record.interface).into()
            }
            address => SocketAddr::new(address, port),
        }
    }

    fn address(&self, bytes: [u8; 16]) -> IpAddr {
        match (i32::from(self.record.family), bytes) {
            (libc::AF_INET, [a, b, c, d, ..]) => [a, b, c, d].into(),
            _ => bytes.into(),
        }
    }
}

/// Those of all UDP sockets of which this process has descriptors.
///
/// # Minimum kernel version
/// 6.4, for loops of that kind.
pub fn all() -> EbpfResult<Vec<Datagram>> {
    let mut reader = Pieces::new(PROGRAM, OBJECT.ok_or(EbpfError::NotBuilt)?, SOURCES, &FUNCTIONS, 0)?;
    let told = reader.read(|pieces, _| {
        let program = pieces.load(PROGRAM, 0)?;
        let own = bpf::iterate(program.as_fd(), std::process::id());
        pieces.go(own.map_err(|(command, source)| {
            let on = format!("iterator `{PROGRAM}` over our own descriptors");
            EbpfError::Call { command, on, source }
        })?)
    })?;
    parse(&told).ok_or_else(|| reader.broken())
}

/// Puts data behind its records. What comes before number 0 is room for headers.
fn parse(told: &[Piece]) -> Option<Vec<Datagram>> {
    let mut found: Vec<Datagram> = Vec::new();
    for item in pieces::items(told) {
        match item? {
            Item::Record(bytes) => {
                let bytes: &[u8; size_of::<Gathered>()] = bytes.try_into().ok()?;
                // SAFETY: there are as many bytes; they are integers without a gap.
                let record = unsafe { bytes.as_ptr().cast::<Gathered>().read_unaligned() };
                found.push(Datagram { record, data: Vec::new() });
            }
            Item::Data(number, bytes) => {
                let headers = (number as i32).min(0).unsigned_abs() as usize;
                found.last_mut()?.data.extend_from_slice(bytes.get(headers..).unwrap_or_default());
            }
            // It is too short then.
            Item::Unreadable => {}
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use criu_common::pieces::{DATA, PIECE, RECORD};

    use super::*;

    fn piece(kind: u32, seq: i32, content: &[u8]) -> Piece {
        let mut bytes = [0; PIECE];
        bytes[..content.len()].copy_from_slice(content);
        Piece { kind, length: content.len() as u32, seq: seq as u32, padding: 0, bytes }
    }

    fn record(socket: u64, length: u32) -> Piece {
        let record = Gathered { socket, length, family: 2, ..Gathered::default() };
        // SAFETY: integers without a gap.
        piece(RECORD, 0, unsafe { std::slice::from_raw_parts((&raw const record).cast::<u8>(), size_of::<Gathered>()) })
    }

    #[test]
    fn headers_are_left_out() {
        let told = [
            record(7, 14),
            piece(DATA, -28, &[0; 28]),
            piece(DATA, 0, b"one"),
            piece(DATA, -20, &[[0; 20].as_slice(), b"two"].concat()),
            record(8, 11),
        ];
        let found = parse(&told).expect("whole");
        assert_eq!((found[0].data.as_slice(), found[0].is_whole()), (b"onetwo".as_slice(), true));
        assert_eq!((found[1].record.socket, found[1].is_whole()), (8, false));
    }

    #[test]
    fn what_makes_no_sense_is_nothing() {
        assert!(parse(&[piece(DATA, 0, b"one")]).is_none());
        assert!(parse(&[piece(RECORD, 0, b"short")]).is_none());
        let shorter = parse(&[record(7, 14), piece(DATA, -28, &[0; 20])]).expect("whole");
        assert_eq!(shorter[0].data, b"");
    }
}
