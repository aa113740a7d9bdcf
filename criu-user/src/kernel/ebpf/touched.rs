//! Which TCP connections a process has, and which of them somebody changes: `criu-ebpf/src/touched.rs`, from the engine's
//! side.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use criu_common::kfuncs;
use criu_common::touched::{Connection, MOST_SOCKETS, SOURCES, UNKNOWN};
use nix::unistd::Pid;

use super::bpf::{self, Purpose};
use super::btf::Layout;
use super::object::{Loaded, compiled};
use super::survey::read_to_end;
use super::{EbpfError, EbpfResult, cache, maps};

/// The compiled programs.
static OBJECT: Option<&[u8]> = compiled!("touched");

const NAME: &str = "touched";
const CONNECTIONS: &str = "connections";
/// The function that stands for the iterator, the type of the tracepoint, and what the programs call.
const FUNCTIONS: [&str; 5] = ["bpf_iter_task", "btf_trace_sys_exit", kfuncs::LOOP[0], kfuncs::LOOP[1], kfuncs::LOOP[2]];

/// Programs that find connections, and look after them.
#[derive(Debug)]
pub struct Lookout {
    object: Loaded,
    layout: Layout,
    sockets: OwnedFd,
    iterator: OwnedFd,
}

/// Looks after connections, as long as it lives.
#[derive(Debug)]
pub struct Watchful {
    sockets: OwnedFd,
    program: OwnedFd,
    _link: OwnedFd,
}

/// What was touched since somebody looks after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Touched {
    /// The sockets with these inodes.
    These(HashSet<u64>),
    /// Any may have been: a call was not understood, or not seen.
    Unknown,
}

impl Touched {
    /// Whether a socket may have been changed.
    pub fn has(&self, inode: u64) -> bool {
        match self {
            Self::These(inodes) => inodes.contains(&inode),
            Self::Unknown => true,
        }
    }
}

fn failed((command, source): (&'static str, std::io::Error)) -> EbpfError {
    EbpfError::Call { command, on: "the connections of the tree".into(), source }
}

impl Lookout {
    /// One with room for so many connections.
    ///
    /// # Minimum kernel version
    /// 6.4, with type information (CONFIG_DEBUG_INFO_BTF); CAP_BPF and CAP_PERFMON.
    pub fn new(most: usize) -> EbpfResult<Self> {
        let layout = cache::layout(SOURCES, &FUNCTIONS)?;
        let offsets = layout.bytes();
        let globals = HashMap::from([("OFFSETS", (offsets.as_slice(), true))]);
        // One more, for what is unknown.
        let room = u32::try_from(most + 1).unwrap_or(MOST_SOCKETS).min(MOST_SOCKETS);
        let mut object = Loaded::with_sizes(NAME, OBJECT.ok_or(EbpfError::NotBuilt)?, globals, &[("SOCKETS", room)])?;
        object.bind(&FUNCTIONS, &layout.functions);
        let sockets = object.take_map("SOCKETS")?;
        let iterator = object.load_iter(CONNECTIONS, function(&layout, 0))?;
        Ok(Self { object, layout, sockets, iterator })
    }

    /// The connections that a process has just now.
    pub fn connections(&self, pid: Pid) -> EbpfResult<Vec<Connection>> {
        let mut found = Vec::new();
        loop {
            let iterator = bpf::iterate(self.iterator.as_fd(), pid.as_raw() as u32).map_err(failed)?;
            let mut bytes = Vec::new();
            read_to_end(File::from(iterator), &mut bytes).map_err(|source| EbpfError::Read {
                program: CONNECTIONS,
                pid: pid.as_raw(),
                source,
            })?;
            found.extend(bytes.as_chunks().0.iter().map(Connection::from_bytes));
            match found.pop() {
                Some(Connection::MORE) => {}
                // Of a process that has ended nothing is told.
                Some(Connection::END) | None => return Ok(found),
                Some(_) => {
                    return Err(EbpfError::BadObject {
                        object: NAME,
                        why: "it told of connections without an end".into(),
                    });
                }
            }
        }
    }

    /// Begins to look after the sockets with these inodes. What is asked of them from here on is true until
    /// [`Watchful::touched`] names them, but for what the kernel changes by itself.
    pub fn begin(self, inodes: &[u64]) -> EbpfResult<Watchful> {
        let keys: Vec<[u8; 8]> = std::iter::once(&UNKNOWN).chain(inodes).map(|inode| inode.to_ne_bytes()).collect();
        maps::insert_zeros::<8, 4>(self.sockets.as_fd(), &keys).map_err(failed)?;
        let program = self.object.load(NAME, Purpose::Tracepoint(function(&self.layout, 1)))?;
        let link = bpf::attach_tracepoint(program.as_fd()).map_err(failed)?;
        Ok(Watchful { sockets: self.sockets, program, _link: link })
    }
}

/// The id of one of [`FUNCTIONS`].
fn function(layout: &Layout, n: usize) -> u32 {
    layout.functions.get(n).copied().unwrap_or_default()
}

impl Watchful {
    /// What was touched so far.
    pub fn touched(&self) -> EbpfResult<Touched> {
        if bpf::misses(self.program.as_fd()).map_err(failed)? > 0 {
            return Ok(Touched::Unknown);
        }
        let all = maps::entries::<8, 4>(self.sockets.as_fd()).map_err(failed)?;
        let named = all.iter().filter(|(_, value)| *value != [0; 4]).map(|(key, _)| u64::from_ne_bytes(*key));
        let inodes: HashSet<u64> = named.collect();
        Ok(if inodes.contains(&UNKNOWN) { Touched::Unknown } else { Touched::These(inodes) })
    }
}
