//! What programs tell of queues of packets, in pieces: `criu-ebpf/src/queue.rs`, from the engine's side.
//!
//! An iterator's own output has room for 32 KiB of each object; a queue may hold megabytes. So they write into an array,
//! and where that was too small they are loaded again with a larger one.

use std::collections::HashMap;
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::{PipeReader, PipeWriter, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use criu_common::offsets::Source;
use criu_common::pieces::{DATA, PIECE, Piece, RECORD, Search, Told, UNREADABLE};

use super::btf::Layout;
use super::object::Loaded;
use super::survey::read_to_end;
use super::{EbpfError, EbpfResult, cache, maps};

/// The first attempt has room for so many pieces at least: a quarter of a megabyte.
const ROOM: u32 = 64;
/// More than this, 4 GiB, is not read.
const MOST: u64 = 1 << 20;
/// What the programs take for granted of a page and of the table of pages.
const PAGE_STRUCT: u32 = 64;
const TOLD: usize = size_of::<Told>();

/// What a piece holds.
#[derive(Debug, PartialEq, Eq)]
pub enum Item<'a> {
    /// The bytes of a record.
    Record(&'a [u8]),
    /// The number of the first byte, and the data.
    Data(u32, &'a [u8]),
    /// Data is left out.
    Unreadable,
}

/// What pieces hold; `None` for one that is none.
pub fn items(pieces: &[Piece]) -> impl Iterator<Item = Option<Item<'_>>> {
    pieces.iter().map(|piece| {
        let bytes = piece.bytes.get(..piece.length as usize)?;
        match piece.kind {
            RECORD => Some(Item::Record(bytes)),
            DATA => Some(Item::Data(piece.seq, bytes)),
            UNREADABLE => Some(Item::Unreadable),
            _ => None,
        }
    })
}

/// Programs that tell in pieces, and as much room for these as was needed so far.
#[derive(Debug)]
pub struct Pieces {
    name: &'static str,
    object: &'static [u8],
    layout: Layout,
    functions: &'static [&'static str],
    room: u32,
    loading: Option<Loading>,
}

/// Programs and maps with room for a certain number of pieces.
#[derive(Debug)]
pub struct Loading {
    name: &'static str,
    object: Loaded,
    functions: Vec<u32>,
    told: OwnedFd,
    pieces: OwnedFd,
    /// Both ends of a pipe, with known content.
    _pipe: (PipeReader, PipeWriter),
}

fn own_pid() -> i32 {
    std::process::id() as i32
}

fn failed(on: &'static str) -> impl FnOnce((&'static str, std::io::Error)) -> EbpfError {
    move |(command, source)| EbpfError::Call { command, on: on.into(), source }
}

impl Pieces {
    /// Programs of an object, which need these fields and functions of the kernel's: those that stand for iterators, and
    /// those that they call.
    pub fn new(
        name: &'static str,
        object: &'static [u8],
        sources: &[Source],
        functions: &'static [&'static str],
        expected: u32,
    ) -> EbpfResult<Self> {
        let layout = cache::layout(sources, functions)?;
        let page = sources.iter().position(|source| source.of == "page").and_then(|at| layout.offsets.get(at));
        if page != Some(&PAGE_STRUCT) {
            return Err(EbpfError::Missing { what: format!("`struct page` of {PAGE_STRUCT} bytes") });
        }
        let room = ROOM.saturating_add(expected).min(MOST as u32);
        Ok(Self { name, object, layout, functions, room, loading: None })
    }

    /// What a run of the programs tells. `run` is told whether they have to be loaded anew, and may be asked more than once.
    pub fn read(&mut self, mut run: impl FnMut(&mut Loading, bool) -> EbpfResult<()>) -> EbpfResult<Vec<Piece>> {
        /// Between one and the next more may come.
        const ATTEMPTS: u32 = 5;
        let mut needed = 0;
        for _ in 0..ATTEMPTS {
            let is_new = self.loading.is_none();
            let loading = match self.loading.take() {
                Some(loading) => self.loading.insert(loading),
                None => self.loading.insert(self.load()?),
            };
            loading.forget()?;
            run(loading, is_new)?;
            needed = loading.told()?.pieces;
            tracing::debug!(program = self.name, pieces = needed, room = self.room, "queues were read");
            if needed <= self.room.into() {
                return loading.pieces(needed as usize);
            }
            if needed > MOST {
                break;
            }
            self.room = (needed + needed / 8) as u32;
            self.loading = None;
        }
        let source = std::io::Error::other(format!("{needed} pieces of {PIECE} bytes wait, more than can be taken"));
        Err(EbpfError::Read { program: self.name, pid: own_pid(), source })
    }

    fn load(&self) -> EbpfResult<Loading> {
        Loading::new(self.name, self.object, (self.functions, &self.layout), self.room)
    }

    /// What was told makes no sense.
    pub fn broken(&self) -> EbpfError {
        EbpfError::BadRecord { program: self.name, pid: own_pid(), at: 0 }
    }
}

impl Loading {
    fn new(name: &'static str, object: &[u8], (functions, layout): (&[&str], &Layout), room: u32) -> EbpfResult<Self> {
        let pipe = |source| EbpfError::Read { program: name, pid: own_pid(), source };
        let (reader, mut writer) = std::io::pipe().map_err(pipe)?;
        let random = RandomState::new();
        let content: [u64; 4] = std::array::from_fn(|n| random.hash_one(n));
        writer.write_all(&words(&content)).map_err(pipe)?;
        let search = Search { fd: reader.as_raw_fd() as u64, content };
        let search = [&words(&[search.fd])[..], &words(&search.content)].concat();
        let offsets = layout.bytes();
        let globals = HashMap::from([("OFFSETS", (offsets.as_slice(), true)), ("SEARCH", (search.as_slice(), true))]);
        let mut object = Loaded::with_sizes(name, object, globals, &[("PIECES", room)])?;
        object.bind(functions, &layout.functions);
        let (told, pieces) = (object.take_map("TOLD")?, object.take_map("PIECES")?);
        Ok(Self { name, object, functions: layout.functions.clone(), told, pieces, _pipe: (reader, writer) })
    }

    /// Loads an iterator, of the function with this place among those that were asked for.
    pub fn load(&self, program: &str, function: usize) -> EbpfResult<OwnedFd> {
        let missing = || EbpfError::Missing { what: format!("function of the iterator `{program}`") };
        self.object.load_iter(program, *self.functions.get(function).ok_or_else(missing)?)
    }

    /// Takes a further map out of the object.
    pub fn take_map(&mut self, name: &str) -> EbpfResult<OwnedFd> {
        self.object.take_map(name)
    }

    /// Makes an iterator go: nothing is written into it, but it has to be read.
    pub fn go(&self, iterator: OwnedFd) -> EbpfResult<()> {
        read_to_end(File::from(iterator), &mut Vec::new()).map(drop).map_err(|source| EbpfError::Read {
            program: self.name,
            pid: own_pid(),
            source,
        })
    }

    fn forget(&self) -> EbpfResult<()> {
        maps::insert_zeros::<4, TOLD>(self.told.as_fd(), &[0u32.to_ne_bytes()]).map_err(failed("how a reading went"))
    }

    /// How it went so far.
    pub fn told(&self) -> EbpfResult<Told> {
        let told = maps::entries::<4, TOLD>(self.told.as_fd()).map_err(failed("how a reading went"))?;
        let word =
            |at: usize| told.first().and_then(|(_, v)| v[at..].first_chunk()).map_or(0, |b| u64::from_ne_bytes(*b));
        Ok(Told { pieces: word(0), requests: word(8), memory: word(16) })
    }

    fn pieces(&self, count: usize) -> EbpfResult<Vec<Piece>> {
        let all = maps::entries::<4, { size_of::<Piece>() }>(self.pieces.as_fd()).map_err(failed("what was read"))?;
        Ok(all.iter().take(count).map(|(_, bytes)| piece(bytes)).collect())
    }
}

fn words<const N: usize>(words: &[u64; N]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn piece(bytes: &[u8; size_of::<Piece>()]) -> Piece {
    // SAFETY: integers without a gap, as long as they are: any bytes are one.
    unsafe { bytes.as_ptr().cast::<Piece>().read_unaligned() }
}
