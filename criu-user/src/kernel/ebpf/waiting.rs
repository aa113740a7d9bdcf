//! What waits in connections of unix sockets that nobody has accepted yet: `criu-ebpf/src/waiting.rs`, from the
//! engine's side.
//!
//! It takes a millisecond or two: so it is asked only where a connection is known to be such a one.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd;

use criu_common::waiting::{Packet, SOURCES};

use super::object::Loaded;
use super::survey::read_to_end;
use super::{EbpfError, EbpfResult, bpf, cache};

/// The compiled program; none where the toolchain was missing.
#[cfg(ebpf_programs)]
static OBJECT: Option<&[u8]> = Some({
    /// ELF parsing reads words in place.
    #[repr(C, align(16))]
    struct Aligned<T: ?Sized>(T);
    static ALIGNED: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/waiting")));
    &ALIGNED.0
});
#[cfg(not(ebpf_programs))]
static OBJECT: Option<&[u8]> = None;

const PROGRAM: &str = "waiting";
/// The kernel function that stands for the iterator.
const FUNCTION: &str = "bpf_iter_unix";

/// A packet that waits, as far as it could be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// The kernel's record.
    pub record: Packet,
    /// Its bytes; none where the record says that they cannot be had.
    pub data: Vec<u8>,
}

/// What waits in the connections of this network namespace that were not accepted, by the inode of the client's socket,
/// in the order in which it was sent.
///
/// # Minimum kernel version
/// 5.15, for the iterator over unix sockets.
pub fn all() -> EbpfResult<HashMap<u64, Vec<Waiting>>> {
    let object = OBJECT.ok_or(EbpfError::NotBuilt)?;
    let layout = cache::layout(SOURCES, &[FUNCTION])?;
    let offsets = layout.bytes();
    let object = Loaded::new(PROGRAM, object, HashMap::from([("OFFSETS", (offsets.as_slice(), true))]))?;
    let program = object.load_iter(PROGRAM, layout.functions[0])?;
    let iterator = bpf::iterate_all(program.as_fd()).map_err(|(command, source)| {
        let on = format!("iterator `{PROGRAM}` over unix sockets");
        EbpfError::Call { command, on, source }
    })?;
    let mut bytes = Vec::new();
    read_to_end(File::from(iterator), &mut bytes).map_err(|source| EbpfError::Read {
        program: PROGRAM,
        pid: std::process::id() as i32,
        source,
    })?;
    parse(&bytes).ok_or_else(|| EbpfError::BadRecord { program: PROGRAM, pid: std::process::id() as i32, at: 0 })
}

fn parse(mut bytes: &[u8]) -> Option<HashMap<u64, Vec<Waiting>>> {
    let mut found: HashMap<u64, Vec<Waiting>> = HashMap::new();
    while !bytes.is_empty() {
        let (fixed, rest) = bytes.split_at_checked(size_of::<Packet>())?;
        // SAFETY: `fixed` is as long as a record, which is integers without a gap: any bytes are one.
        let record = unsafe { fixed.as_ptr().cast::<Packet>().read_unaligned() };
        let (data, rest) = rest.split_at_checked(record.tail as usize)?;
        found.entry(record.client).or_default().push(Waiting { record, data: data.to_vec() });
        bytes = rest;
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of(record: &Packet, data: &[u8]) -> Vec<u8> {
        // SAFETY: integers without a gap.
        let fixed = unsafe { std::slice::from_raw_parts((&raw const *record).cast::<u8>(), size_of::<Packet>()) };
        [fixed, data].concat()
    }

    #[test]
    fn packets_are_told_apart_by_client_and_keep_their_order() {
        let record = |client, tail| Packet { client, of: 2, length: 3, tail, ..Packet::default() };
        let bytes =
            [bytes_of(&record(7, 3), b"one"), bytes_of(&record(9, 0), b""), bytes_of(&record(7, 3), b"two")].concat();
        let found = parse(&bytes).expect("whole");
        let data: Vec<&[u8]> = found[&7].iter().map(|w| w.data.as_slice()).collect();
        assert_eq!(data, [b"one", b"two"]);
        assert_eq!((found[&9].len(), found[&9][0].data.len()), (1, 0));
    }

    #[test]
    fn what_was_cut_short_is_nothing() {
        let whole = bytes_of(&Packet { tail: 3, ..Packet::default() }, b"one");
        assert!((1..whole.len()).all(|end| parse(&whole[..end]).is_none()));
    }
}
