//! What programs tell of queues of packets: `criu-ebpf/src/queue.rs` and those that use it.

/// Bytes of one piece.
pub const PIECE: usize = 4096;

/// A [`Piece`] holds a record, of a kind that the program's own module describes.
pub const RECORD: u32 = 1;
/// A [`Piece`] holds data that belongs to the record before it.
pub const DATA: u32 = 2;
/// Data is left out here, because it is where no program can read it.
pub const UNREADABLE: u32 = 3;

/// What is told, one after the other: records, and the data of each behind it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// [`RECORD`], [`DATA`] or [`UNREADABLE`].
    pub kind: u32,
    /// How many of the bytes are used.
    pub length: u32,
    /// Of data: the number of its first byte, where packets have numbers.
    pub seq: u32,
    /// None.
    pub padding: u32,
    /// What it holds.
    pub bytes: [u8; PIECE],
}

/// How the reading went.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// How many pieces there were: where it is more than there was room for, the others were not written.
    pub pieces: u64,
    /// How many handshakes with listening sockets are not over.
    pub requests: u64,
    /// What is added to 64 times the address of a `struct page` for the address of its memory; 0: not found.
    pub memory: u64,
}

/// How the program finds out where the kernel sees the memory of a page: by one whose content is known, in a pipe of the
/// reader's.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Search {
    /// The pipe's descriptor.
    pub fd: u64,
    /// What was written into it.
    pub content: [u64; 4],
}
