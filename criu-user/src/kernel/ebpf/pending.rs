//! Clients of TCP servers that nobody has accepted yet, and what they have sent: `criu-ebpf/src/pending.rs`, from the
//! engine's side.

use std::cell::OnceCell;
use std::os::fd::{AsFd, OwnedFd};

use criu_common::kfuncs;
use criu_common::pending::{Client, SOURCES};
use criu_common::pieces::Piece;

use super::object::compiled;
use super::pieces::{self, Item, Loading, Pieces};
use super::{EbpfError, EbpfResult, bpf, maps};

/// The compiled programs.
static OBJECT: Option<&[u8]> = compiled!("pending");

const PROGRAM: &str = "pending";
/// The one about handshakes that are not over.
const REQUESTS: &str = "requests";
/// The kernel functions that stand for the iterators, the one that brings clients back, without which it is of no use to look
/// at them, and those that the programs call.
const FUNCTIONS: [&str; 6] =
    ["bpf_iter_task_file", "bpf_iter_tcp", kfuncs::ASSIGN, kfuncs::LOOP[0], kfuncs::LOOP[1], kfuncs::LOOP[2]];

/// A client that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// The kernel's record.
    pub client: Client,
    /// What it has sent and nobody has read.
    pub data: Vec<u8>,
    /// Whether all of it could be read.
    pub readable: bool,
}

impl Waiting {
    /// Whether the peer has said that it sends no more.
    pub fn has_ended(&self) -> bool {
        self.client.rcv_nxt.wrapping_sub(self.client.copied_seq) as usize == self.data.len() + 1
    }

    /// Whether the data is all that was received.
    pub fn is_whole(&self) -> bool {
        let received = self.client.rcv_nxt.wrapping_sub(self.client.copied_seq) as usize;
        self.readable && (received == self.data.len() || self.has_ended())
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
/// 6.9, for bringing them back.
#[derive(Debug)]
pub struct Reader {
    listeners: Vec<[u8; 8]>,
    which: Which,
    pieces: Pieces,
    programs: Option<Programs>,
}

/// What is there as long as what is told has room.
#[derive(Debug)]
struct Programs {
    pending: OwnedFd,
    /// Loaded where it is needed.
    requests: OnceCell<OwnedFd>,
    listeners: OwnedFd,
}

impl Reader {
    /// One that asks about the listening sockets with these inodes, of which this process must have descriptors. About so
    /// many clients are expected.
    pub fn new(listeners: &[u64], clients: u32, which: Which) -> EbpfResult<Self> {
        let listeners = listeners.iter().map(|ino| ino.to_ne_bytes()).collect();
        let object = OBJECT.ok_or(EbpfError::NotBuilt)?;
        let pieces = Pieces::new(PROGRAM, object, SOURCES, &FUNCTIONS, clients.saturating_mul(2))?;
        Ok(Self { listeners, which, pieces, programs: None })
    }

    /// All that wait there, in the order in which they would be accepted.
    pub fn read(&mut self) -> EbpfResult<Vec<Waiting>> {
        let (listeners, which, programs) = (&self.listeners, self.which, &mut self.programs);
        let pieces = self.pieces.read(|pieces, is_new| {
            let programs = match programs.take().filter(|_| !is_new) {
                Some(known) => programs.insert(known),
                None => programs.insert(Programs::load(pieces)?),
            };
            programs.run(pieces, listeners, which)
        })?;
        assemble(&pieces).ok_or_else(|| self.pieces.broken())
    }
}

impl Programs {
    fn load(pieces: &mut Loading) -> EbpfResult<Self> {
        Ok(Self {
            pending: pieces.load(PROGRAM, 0)?,
            requests: OnceCell::new(),
            listeners: pieces.take_map("LISTENERS")?,
        })
    }

    fn run(&self, pieces: &Loading, listeners: &[[u8; 8]], which: Which) -> EbpfResult<()> {
        maps::insert_zeros::<8, 4>(self.listeners.as_fd(), listeners).map_err(failed("the listening sockets"))?;
        let own = bpf::iterate(self.pending.as_fd(), std::process::id());
        pieces.go(own.map_err(failed("iterator `pending` over our own descriptors"))?)?;
        if which == Which::Connected || pieces.told()?.requests == 0 {
            return Ok(());
        }
        let program = match self.requests.get() {
            Some(program) => program,
            None => {
                let program = pieces.load(REQUESTS, 1)?;
                self.requests.get_or_init(|| program)
            }
        };
        pieces.go(bpf::iterate_all(program.as_fd()).map_err(failed("iterator `requests` over TCP sockets"))?)
    }
}

fn failed(on: &'static str) -> impl FnOnce((&'static str, std::io::Error)) -> EbpfError {
    move |(command, source)| EbpfError::Call { command, on: on.into(), source }
}

/// Puts data behind its clients. What was sent twice is there once.
fn assemble(pieces: &[Piece]) -> Option<Vec<Waiting>> {
    let mut found: Vec<Waiting> = Vec::new();
    for told in pieces::items(pieces) {
        match told? {
            Item::Record(bytes) => {
                let bytes: &[u8; size_of::<Client>()] = bytes.try_into().ok()?;
                // SAFETY: there are as many bytes; they are integers, the gaps between which are fields as well.
                let client = unsafe { bytes.as_ptr().cast::<Client>().read_unaligned() };
                found.push(Waiting { client, data: Vec::new(), readable: true });
            }
            Item::Data(seq, bytes) => {
                let Waiting { client, data, readable } = found.last_mut()?;
                // Behind what is there already: the number of its first byte less than the number of the next.
                let known = client.copied_seq.wrapping_add(data.len() as u32).wrapping_sub(seq) as i32;
                match usize::try_from(known) {
                    Ok(known) => data.extend_from_slice(bytes.get(known..).unwrap_or_default()),
                    // There is a gap before it.
                    Err(_) => *readable = false,
                }
            }
            Item::Unreadable => found.last_mut()?.readable = false,
        }
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use criu_common::pieces::{DATA, PIECE, RECORD, UNREADABLE};

    use super::*;

    fn client(copied_seq: u32, rcv_nxt: u32) -> Piece {
        let client = Client { copied_seq, rcv_nxt, ..Client::default() };
        let mut bytes = [0; PIECE];
        // SAFETY: integers without a gap.
        let own = unsafe { std::slice::from_raw_parts((&raw const client).cast::<u8>(), size_of::<Client>()) };
        bytes[..own.len()].copy_from_slice(own);
        Piece { kind: RECORD, length: own.len() as u32, seq: 0, padding: 0, bytes }
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
        let missing = Piece { kind: UNREADABLE, ..data(5, b"") };
        assert!(!assemble(&[client(5, 5), missing]).expect("whole")[0].is_whole());
        assert!(assemble(&[data(5, b"on")]).is_none());
    }
}
