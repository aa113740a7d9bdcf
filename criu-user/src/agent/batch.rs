//! Batches: the system calls that another process is to make, in order, and what came of them.

use nix::errno::Errno;

/// Bytes of one record: number, six arguments, flags, result.
pub const RECORD: usize = 72;
/// Offset of the result within a record.
pub const RET: usize = 64;
/// Where records start in an area; what is before belongs to the agent's protocol.
pub const HEADER: usize = 128;

const GO_ON: u64 = 1;
const FORK: u64 = 2;

/// An argument of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arg {
    /// A plain number, or an address in the process.
    Value(u64),
    /// The result of an earlier call of the same batch.
    ResultOf(CallId),
    /// The eight bytes that an earlier call left at this place of the shared area.
    ValueAt(Room),
    /// The address of a place in the shared area.
    Pointer(Room),
}

macro_rules! arg_from {
    ($($t:ty),*) => { $(impl From<$t> for Arg { fn from(v: $t) -> Self { Arg::Value(v as u64) } })* };
}
arg_from!(u64, i64, u32, i32, usize);

impl From<Room> for Arg {
    fn from(room: Room) -> Self {
        Arg::Pointer(room)
    }
}

impl From<CallId> for Arg {
    fn from(id: CallId) -> Self {
        Arg::ResultOf(id)
    }
}

/// A call within its batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallId(pub usize);

/// A place in the shared area, relative to the end of the batch's records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    offset: usize,
    len: usize,
}

impl Room {
    /// The place `skip` bytes further on.
    pub fn at(self, skip: usize) -> Room {
        Room { offset: self.offset + skip, len: self.len.saturating_sub(skip) }
    }
}

#[derive(Debug, Clone)]
struct Call {
    nr: i64,
    args: [Arg; 6],
    flags: u64,
    child: u64,
}

/// System calls to be made in order. A call that fails ends the batch unless it was added with [`Batch::try_call`].
#[derive(Debug, Clone, Default)]
pub struct Batch {
    calls: Vec<Call>,
    data: Vec<u8>,
    /// Pointers inside the data: (where, to what), in data offsets.
    links: Vec<(usize, usize)>,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    fn push(&mut self, nr: i64, args: &[Arg], flags: u64, child: u64) -> CallId {
        let mut all = [Arg::Value(0); 6];
        all[..args.len()].copy_from_slice(args);
        self.calls.push(Call { nr, args: all, flags, child });
        CallId(self.calls.len() - 1)
    }

    /// A call that must succeed.
    pub fn call(&mut self, nr: i64, args: &[Arg]) -> CallId {
        self.push(nr, args, 0, 0)
    }

    /// A call whose failure is looked at afterwards; the batch goes on.
    pub fn try_call(&mut self, nr: i64, args: &[Arg]) -> CallId {
        self.push(nr, args, GO_ON, 0)
    }

    /// A call that creates a task; the new one waits for its own batches in the area at address `child`.
    pub fn fork(&mut self, nr: i64, args: &[Arg], child: u64) -> CallId {
        self.push(nr, args, FORK, child)
    }

    /// The same for a call that may fail: the batch goes on, in the caller.
    pub fn try_fork(&mut self, nr: i64, args: &[Arg], child: u64) -> CallId {
        self.push(nr, args, FORK | GO_ON, child)
    }

    /// Room for `len` bytes that a call fills.
    pub fn room(&mut self, len: usize) -> Room {
        // The kernel wants its structures aligned.
        self.data.resize(self.data.len().next_multiple_of(16), 0);
        let offset = self.data.len();
        self.data.resize(offset + len, 0);
        Room { offset, len }
    }

    /// Bytes that a call reads.
    pub fn bytes(&mut self, bytes: &[u8]) -> Room {
        let room = self.room(bytes.len());
        self.data[room.offset..room.offset + bytes.len()].copy_from_slice(bytes);
        room
    }

    /// Puts a number into `place`, as part of a structure that a call reads.
    pub fn set_u64(&mut self, place: Room, value: u64) {
        self.data[place.offset..place.offset + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// Puts the address of `target` into `place`, as part of a structure that a call reads.
    pub fn link(&mut self, place: Room, target: Room) {
        self.links.push((place.offset, target.offset));
    }

    /// Number of calls.
    pub fn len(&self) -> usize {
        self.calls.len()
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// Bytes that the batch takes in an area.
    pub fn size(&self) -> usize {
        self.data_start() + self.data.len()
    }

    fn data_start(&self) -> usize {
        (HEADER + self.calls.len() * RECORD).next_multiple_of(64)
    }

    /// The batch as it stands in an area that the process sees at `base`: records and data from [`HEADER`] on.
    pub(crate) fn encode(&self, base: u64) -> Vec<u8> {
        let start = self.data_start();
        let mut out = Vec::with_capacity(self.size() - HEADER);
        for call in &self.calls {
            let mut flags = call.flags;
            out.extend_from_slice(&call.nr.to_le_bytes());
            for (i, arg) in call.args.iter().enumerate() {
                let value = match arg {
                    Arg::Value(v) => *v,
                    Arg::ResultOf(id) => {
                        flags |= 1 << (8 + 2 * i);
                        (HEADER + id.0 * RECORD + RET) as u64
                    }
                    Arg::ValueAt(room) => {
                        flags |= 1 << (8 + 2 * i);
                        (start + room.offset) as u64
                    }
                    Arg::Pointer(room) => {
                        flags |= 2 << (8 + 2 * i);
                        (start + room.offset) as u64
                    }
                };
                out.extend_from_slice(&value.to_le_bytes());
            }
            out.extend_from_slice(&flags.to_le_bytes());
            out.extend_from_slice(&call.child.to_le_bytes());
        }
        out.resize(start - HEADER, 0);
        let data = out.len();
        out.extend_from_slice(&self.data);
        for &(place, target) in &self.links {
            let address = base + (start + target) as u64;
            out[data + place..data + place + 8].copy_from_slice(&address.to_le_bytes());
        }
        out
    }

    /// What came of the batch, of which `left` calls were not done, from the area's bytes.
    pub(crate) fn outcome(&self, left: usize, area: &[u8]) -> Outcome {
        let rets = (0..self.calls.len())
            .map(|i| {
                let at = HEADER + i * RECORD + RET;
                let mut word = [0; 8];
                word.copy_from_slice(&area[at..at + 8]);
                i64::from_le_bytes(word)
            })
            .collect();
        let data = area[self.data_start()..self.size()].to_vec();
        Outcome { rets, done: self.calls.len() - left, data }
    }
}

/// What came of a batch.
#[derive(Debug, Clone)]
pub struct Outcome {
    rets: Vec<i64>,
    done: usize,
    data: Vec<u8>,
}

impl Outcome {
    /// The result of a call.
    pub fn ret(&self, id: CallId) -> Result<u64, Errno> {
        if id.0 > self.done {
            return Err(Errno::ECANCELED);
        }
        match self.rets[id.0] {
            r if (-4095..0).contains(&r) => Err(Errno::from_raw(-r as i32)),
            r => Ok(r as u64),
        }
    }

    /// The call that ended the batch early, with its error.
    pub fn failed(&self) -> Option<(CallId, Errno)> {
        let id = CallId(self.done);
        (self.done < self.rets.len()).then(|| (id, self.ret(id).err().unwrap_or(Errno::ECANCELED)))
    }

    /// The bytes in `room`.
    pub fn bytes(&self, room: Room) -> &[u8] {
        &self.data[room.offset..room.offset + room.len]
    }

    /// The number that starts `skip` bytes into `room`.
    pub fn u64(&self, room: Room, skip: usize) -> u64 {
        let mut word = [0; 8];
        word.copy_from_slice(&self.bytes(room)[skip..skip + 8]);
        u64::from_le_bytes(word)
    }

    /// The 32-bit number that starts `skip` bytes into `room`.
    pub fn u32(&self, room: Room, skip: usize) -> u32 {
        let mut word = [0; 4];
        word.copy_from_slice(&self.bytes(room)[skip..skip + 4]);
        u32::from_le_bytes(word)
    }
}
