//! Clients of TCP servers that nobody has accepted yet, and what they have sent: `criu-ebpf/src/pending.rs`, from the
//! engine's side.

use std::cell::OnceCell;
use std::collections::HashMap;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use criu_common::kfuncs;
use criu_common::pending::{CLIENT, Client, PIECE, Piece, SOURCES, Search, Told};

use super::object::Loaded;
use super::survey::read_to_end;
use super::{EbpfError, EbpfResult, bpf, cache, maps};

/// The compiled program; none where the toolchain was missing.
#[cfg(ebpf_programs)]
static OBJECT: Option<&[u8]> = Some({
    /// ELF parsing reads words in place.
    #[repr(C, align(16))]
    struct Aligned<T: ?Sized>(T);
    static ALIGNED: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/pending")));
    &ALIGNED.0
});
#[cfg(not(ebpf_programs))]
static OBJECT: Option<&[u8]> = None;

const PROGRAM: &str = "pending";
/// The one about handshakes that are not over.
const REQUESTS: &str = "requests";
/// The kernel functions that stand for the iterators, and those that the programs call.
const FUNCTIONS: [&str; 5] =
    ["bpf_iter_task_file", "bpf_iter_tcp", kfuncs::NAMES[0], kfuncs::NAMES[1], kfuncs::NAMES[2]];
/// The first attempt has room for so many pieces more than two of each client: a quarter of a megabyte.
const ROOM: u32 = 64;
/// More than this, 4 GiB, is not read.
const MOST: u64 = 1 << 20;
/// What the program takes for granted of a page and of the table of pages.
const PAGE_STRUCT: u32 = 64;

/// A client that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// The kernel's record.
    pub client: Client,
    /// What it has sent and nobody has read.
    pub data: Vec<u8>,
}

impl Waiting {
    /// Whether the peer has said that it sends no more.
    pub fn has_ended(&self) -> bool {
        self.client.rcv_nxt.wrapping_sub(self.client.copied_seq) as usize == self.data.len() + 1
    }

    /// Whether the data is all that was received.
    pub fn is_whole(&self) -> bool {
        let received = self.client.rcv_nxt.wrapping_sub(self.client.copied_seq) as usize;
        self.client.unreadable == 0 && (received == self.data.len() || self.has_ended())
    }
}

/// Who is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Those that could be accepted.
    Connected,
    /// Those whose handshake is not over as well, behind them.
    All,
}

/// Asks the kernel for them.
///
/// # Minimum kernel version
/// 6.4, for loops of that kind.
#[derive(Debug)]
pub struct Reader {
    listeners: Vec<[u8; 8]>,
    which: Which,
    room: u32,
    loaded: Programs,
}

/// The program, its maps, and what it looks for.
#[derive(Debug)]
struct Programs {
    /// For the second program, which is loaded where it is needed.
    object: Loaded,
    function: u32,
    program: OwnedFd,
    requests: OnceCell<OwnedFd>,
    told: OwnedFd,
    pieces: OwnedFd,
    listeners: OwnedFd,
    /// Both ends of a pipe, with known content.
    _pipe: (std::io::PipeReader, std::io::PipeWriter),
}

fn failed(on: &'static str) -> impl FnOnce((&'static str, std::io::Error)) -> EbpfError {
    move |(command, source)| EbpfError::Call { command, on: on.into(), source }
}

impl Reader {
    /// One that asks about the listening sockets with these inodes, of which this process must have descriptors. About so
    /// many clients are expected.
    pub fn new(listeners: &[u64], clients: u32, which: Which) -> EbpfResult<Self> {
        let listeners: Vec<[u8; 8]> = listeners.iter().map(|ino| ino.to_ne_bytes()).collect();
        let room = ROOM.saturating_add(clients.saturating_mul(2)).min(MOST as u32);
        let loaded = Programs::load(room)?;
        Ok(Self { listeners, which, room, loaded })
    }

    /// All that wait there, in the order in which they would be accepted.
    pub fn read(&mut self) -> EbpfResult<Vec<Waiting>> {
        /// Between one and the next more may come.
        const ATTEMPTS: u32 = 5;
        let mut needed = 0;
        for _ in 0..ATTEMPTS {
            let (told, pieces) = self.loaded.run(&self.listeners, self.which)?;
            if told.pieces <= self.room.into() {
                let used = pieces.get(..told.pieces as usize).unwrap_or_default();
                return assemble(used).ok_or(EbpfError::BadRecord { program: PROGRAM, pid: own_pid(), at: 0 });
            }
            needed = told.pieces;
            if needed > MOST {
                break;
            }
            self.room = (needed + needed / 8) as u32;
            self.loaded = Programs::load(self.room)?;
        }
        let source = std::io::Error::other(format!("{needed} pieces of {PIECE} bytes wait, more than can be taken"));
        Err(EbpfError::Read { program: PROGRAM, pid: own_pid(), source })
    }
}

fn own_pid() -> i32 {
    std::process::id() as i32
}

impl Programs {
    fn load(room: u32) -> EbpfResult<Self> {
        let object = OBJECT.ok_or(EbpfError::NotBuilt)?;
        let layout = cache::layout(SOURCES, &FUNCTIONS)?;
        let at = SOURCES.iter().position(|source| source.of == "page").unwrap_or_default();
        if layout.offsets[at] != PAGE_STRUCT {
            return Err(EbpfError::Missing { what: format!("`struct page` of {PAGE_STRUCT} bytes") });
        }
        let pipe = |source| EbpfError::Read { program: PROGRAM, pid: own_pid(), source };
        let (reader, mut writer) = std::io::pipe().map_err(pipe)?;
        let random = RandomState::new();
        let content: [u64; 4] = std::array::from_fn(|n| random.hash_one(n));
        writer.write_all(&words(&content)).map_err(pipe)?;
        let search = Search { fd: reader.as_raw_fd() as u64, content };
        let search = [&words(&[search.fd])[..], &words(&search.content)].concat();
        let offsets = layout.bytes();
        let globals = HashMap::from([("OFFSETS", (offsets.as_slice(), true)), ("SEARCH", (search.as_slice(), true))]);
        let mut object = Loaded::with_sizes(PROGRAM, object, globals, &[("PIECES", room)])?;
        let numbers = [kfuncs::ITER_NUM_NEW, kfuncs::ITER_NUM_NEXT, kfuncs::ITER_NUM_DESTROY];
        let ids: Vec<(u32, u32)> = numbers.into_iter().zip(layout.functions[2..].iter().copied()).collect();
        object.bind(&ids);
        let program = object.load_iter(PROGRAM, layout.functions[0])?;
        Ok(Self {
            program,
            requests: OnceCell::new(),
            function: layout.functions[1],
            told: object.take_map("TOLD")?,
            pieces: object.take_map("PIECES")?,
            listeners: object.take_map("LISTENERS")?,
            object,
            _pipe: (reader, writer),
        })
    }

    fn run(&self, listeners: &[[u8; 8]], which: Which) -> EbpfResult<(Told, Vec<Piece>)> {
        maps::insert_zeros::<8, 4>(self.listeners.as_fd(), listeners).map_err(failed("the listening sockets"))?;
        let first = [0u32.to_ne_bytes()];
        maps::insert_zeros::<4, TOLD>(self.told.as_fd(), &first).map_err(failed("what is told of clients"))?;
        let descriptors = bpf::iterate(self.program.as_fd(), std::process::id());
        go(descriptors.map_err(failed("iterator `pending` over our own descriptors"))?)?;
        let mut told = self.told()?;
        if told.requests > 0 && which == Which::All {
            let program = match self.requests.get() {
                Some(program) => program,
                None => {
                    let program = self.object.load_iter(REQUESTS, self.function)?;
                    self.requests.get_or_init(|| program)
                }
            };
            go(bpf::iterate_all(program.as_fd()).map_err(failed("iterator `requests` over TCP sockets"))?)?;
            told = self.told()?;
        }
        let pieces = maps::entries::<4, { size_of::<Piece>() }>(self.pieces.as_fd()).map_err(failed("the clients"))?;
        tracing::debug!(pieces = told.pieces, requests = told.requests, "clients that wait were read");
        Ok((told, pieces.iter().map(|(_, bytes)| piece(bytes)).collect()))
    }

    fn told(&self) -> EbpfResult<Told> {
        let told = maps::entries::<4, TOLD>(self.told.as_fd()).map_err(failed("what is told of clients"))?;
        let word =
            |at: usize| told.first().and_then(|(_, v)| v[at..].first_chunk()).map_or(0, |b| u64::from_ne_bytes(*b));
        Ok(Told { pieces: word(0), requests: word(8), memory: word(16) })
    }
}

const TOLD: usize = size_of::<Told>();

/// Nothing is written into these iterators: reading makes them go.
fn go(iterator: OwnedFd) -> EbpfResult<()> {
    read_to_end(File::from(iterator), &mut Vec::new()).map(drop).map_err(|source| EbpfError::Read {
        program: PROGRAM,
        pid: own_pid(),
        source,
    })
}

fn words<const N: usize>(words: &[u64; N]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn piece(bytes: &[u8; size_of::<Piece>()]) -> Piece {
    // SAFETY: integers without a gap, as long as they are: any bytes are one.
    unsafe { bytes.as_ptr().cast::<Piece>().read_unaligned() }
}

/// Puts data behind its clients. What was sent twice is there once.
fn assemble(pieces: &[Piece]) -> Option<Vec<Waiting>> {
    let mut found: Vec<Waiting> = Vec::new();
    for piece in pieces {
        let bytes = piece.bytes.get(..piece.length as usize)?;
        if piece.kind == CLIENT {
            if bytes.len() != size_of::<Client>() {
                return None;
            }
            // SAFETY: there are as many bytes; they are integers, the gaps between which are fields as well.
            let client = unsafe { bytes.as_ptr().cast::<Client>().read_unaligned() };
            found.push(Waiting { client, data: Vec::new() });
            continue;
        }
        let Waiting { client, data } = found.last_mut()?;
        // Behind what is there already: the number of its first byte less than the number of the next.
        let known = (client.copied_seq.wrapping_add(data.len() as u32)).wrapping_sub(piece.seq) as i32;
        match usize::try_from(known) {
            Ok(known) => data.extend_from_slice(bytes.get(known..).unwrap_or_default()),
            // There is a gap before it.
            Err(_) => client.unreadable = 1,
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use criu_common::pending::DATA;

    use super::*;

    fn client(copied_seq: u32, rcv_nxt: u32) -> Piece {
        let client = Client { copied_seq, rcv_nxt, ..Client::default() };
        let mut bytes = [0; PIECE];
        // SAFETY: integers without a gap.
        let own = unsafe { std::slice::from_raw_parts((&raw const client).cast::<u8>(), size_of::<Client>()) };
        bytes[..own.len()].copy_from_slice(own);
        Piece { kind: CLIENT, length: own.len() as u32, seq: 0, padding: 0, bytes }
    }

    fn data(seq: u32, text: &[u8]) -> Piece {
        let mut bytes = [0; PIECE];
        bytes[..text.len()].copy_from_slice(text);
        Piece { kind: DATA, length: text.len() as u32, seq, padding: 0, bytes }
    }

    #[test]
    fn data_goes_to_its_client_and_is_there_once() {
        let near = u32::MAX - 1;
        let pieces = [
            client(near, near.wrapping_add(7)),
            data(near, b"one"),
            data(near.wrapping_add(2), b"etwo"),
            client(5, 5),
            client(7, 9),
            data(7, b"a"),
        ];
        let found = assemble(&pieces).expect("whole");
        assert_eq!(found.iter().map(|w| w.data.as_slice()).collect::<Vec<_>>(), [b"onetwo".as_slice(), b"", b"a"]);
        assert_eq!(found.iter().map(Waiting::has_ended).collect::<Vec<_>>(), [true, false, true]);
        assert!(found.iter().all(Waiting::is_whole));
    }

    #[test]
    fn a_gap_is_seen() {
        let found = assemble(&[client(5, 8), data(6, b"ne")]).expect("whole");
        assert!(!found[0].is_whole());
        let found = assemble(&[client(5, 9), data(5, b"on")]).expect("whole");
        assert!(!found[0].is_whole());
        assert!(assemble(&[data(5, b"on")]).is_none());
    }
}
