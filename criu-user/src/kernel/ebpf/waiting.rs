//! What waits in connections of unix sockets that nobody has accepted yet: `criu-ebpf/src/waiting.rs`, from the
//! engine's side.
//!
//! It takes a millisecond or two: so it is asked only where a connection is known to be such a one.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use criu_common::kfuncs;
use criu_common::pieces::Piece;
use criu_common::waiting::{Packet, SOURCES};

use super::object::compiled;
use super::pieces::{self, Item, Pieces};
use super::{EbpfError, EbpfResult, bpf};

/// The compiled programs.
static OBJECT: Option<&[u8]> = compiled!("waiting");

const PROGRAM: &str = "waiting";
/// The kernel function that stands for the iterator, and those that the program calls.
const FUNCTIONS: [&str; 4] = ["bpf_iter_unix", kfuncs::LOOP[0], kfuncs::LOOP[1], kfuncs::LOOP[2]];

/// A packet that waits, as far as it could be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// The kernel's record.
    pub record: Packet,
    /// Its bytes; fewer than the record says where they could not be read.
    pub data: Vec<u8>,
}

/// What waits in the connections of this network namespace that were not accepted, by the inode of the client's socket,
/// in the order in which it was sent.
///
/// # Minimum kernel version
/// 6.4, for loops of that kind.
pub fn all() -> EbpfResult<HashMap<u64, Vec<Waiting>>> {
    let object = OBJECT.ok_or(EbpfError::NotBuilt)?;
    let mut reader = Pieces::new(PROGRAM, object, SOURCES, &FUNCTIONS, 0)?;
    let told = reader.read(|pieces, _| {
        let program: OwnedFd = pieces.load(PROGRAM, 0)?;
        let iterator = bpf::iterate_all(program.as_fd()).map_err(|(command, source)| {
            let on = format!("iterator `{PROGRAM}` over unix sockets");
            EbpfError::Call { command, on, source }
        })?;
        pieces.go(iterator)
    })?;
    parse(&told).ok_or_else(|| reader.broken())
}

fn parse(told: &[Piece]) -> Option<HashMap<u64, Vec<Waiting>>> {
    let mut found: HashMap<u64, Vec<Waiting>> = HashMap::new();
    let mut last = None;
    for item in pieces::items(told) {
        match item? {
            Item::Record(bytes) => {
                let bytes: &[u8; size_of::<Packet>()] = bytes.try_into().ok()?;
                // SAFETY: there are as many bytes; they are integers without a gap.
                let record = unsafe { bytes.as_ptr().cast::<Packet>().read_unaligned() };
                last = Some(record.client);
                found.entry(record.client).or_default().push(Waiting { record, data: Vec::new() });
            }
            Item::Data(_, bytes) => found.get_mut(&last?)?.last_mut()?.data.extend_from_slice(bytes),
            Item::Unreadable => {}
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use criu_common::pieces::{DATA, PIECE, RECORD};

    use super::*;

    fn piece(kind: u32, content: &[u8]) -> Piece {
        let mut bytes = [0; PIECE];
        bytes[..content.len()].copy_from_slice(content);
        Piece { kind, length: content.len() as u32, seq: 0, padding: 0, bytes }
    }

    fn record(client: u64) -> Piece {
        let record = Packet { client, of: 2, length: 3, ..Packet::default() };
        // SAFETY: integers without a gap.
        piece(RECORD, unsafe { std::slice::from_raw_parts((&raw const record).cast::<u8>(), size_of::<Packet>()) })
    }

    #[test]
    fn packets_are_told_apart_by_client_and_keep_their_order() {
        let told = [record(7), piece(DATA, b"o"), piece(DATA, b"ne"), record(9), record(7), piece(DATA, b"two")];
        let found = parse(&told).expect("whole");
        let data: Vec<&[u8]> = found[&7].iter().map(|w| w.data.as_slice()).collect();
        assert_eq!(data, [b"one", b"two"]);
        assert_eq!((found[&9].len(), found[&9][0].data.len()), (1, 0));
    }

    #[test]
    fn what_makes_no_sense_is_nothing() {
        assert!(parse(&[piece(DATA, b"one")]).is_none());
        assert!(parse(&[piece(RECORD, b"short")]).is_none());
        assert!(parse(&[piece(77, b"")]).is_none());
    }
}
