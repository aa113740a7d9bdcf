//! What holds the packets of connections: an eBPF program at every interface, or rules of the packet filter. Both live
//! alike: with the engine, until they get a name under which they stay.

use std::collections::HashSet;
use std::time::Duration;

use criu_common::gate::{Connection, Held};

use super::ebpf::{self, EbpfError};
use super::{SysError, nftables};

/// A gate that we hold, or that an earlier engine has left.
#[derive(Debug)]
pub enum Gate {
    /// An eBPF program at every interface.
    Ebpf(ebpf::Gate),
    /// Rules of the packet filter.
    Nftables(nftables::Gate),
}

/// Why a gate cannot be made, found, changed or opened.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// eBPF.
    #[error(transparent)]
    Ebpf(#[from] EbpfError),
    /// The packet filter, or what tells of interfaces.
    #[error(transparent)]
    Sys(#[from] SysError),
}

/// What the functions of this module return.
pub type GateResult<T> = Result<T, GateError>;

impl Gate {
    /// Makes sure that a gate can be given a name, before anything depends on it.
    pub fn check_place(&self) -> GateResult<()> {
        match self {
            Self::Ebpf(_) => Ok(ebpf::Gate::check_place()?),
            Self::Nftables(_) => Ok(()),
        }
    }

    /// Looks after interfaces that have come up since it was made, or since the last look. Call it at every step that
    /// takes the gate for complete.
    pub fn refresh(&mut self) -> GateResult<()> {
        match self {
            Self::Ebpf(gate) => Ok(gate.refresh()?),
            Self::Nftables(_) => Ok(()),
        }
    }

    /// Interfaces that a gate of an earlier engine does not stand at.
    pub fn uncovered(&self) -> GateResult<Vec<String>> {
        match self {
            Self::Ebpf(gate) => Ok(gate.uncovered()?),
            Self::Nftables(_) => Ok(Vec::new()),
        }
    }

    /// Locks connections: from now on nobody hears of the other.
    pub fn lock(&mut self, connections: &[Connection]) -> GateResult<()> {
        match self {
            Self::Ebpf(gate) => Ok(gate.lock(connections)?),
            Self::Nftables(gate) => Ok(gate.lock(connections)?),
        }
    }

    /// Makes it outlive us, under this name.
    pub fn pin(&mut self, name: &str) -> GateResult<()> {
        match self {
            Self::Ebpf(gate) => Ok(gate.pin(name)?),
            Self::Nftables(gate) => Ok(gate.pin(name)?),
        }
    }

    /// Takes note that a copy of this process has given it its name: nothing is taken away with us.
    pub fn leave(&mut self) {
        match self {
            Self::Ebpf(gate) => gate.leave(),
            Self::Nftables(_) => {}
        }
    }

    /// The gate of this name that an earlier engine has left; `None` if it was opened meanwhile.
    pub fn find(name: &str) -> GateResult<Option<Self>> {
        match ebpf::Gate::find(name)? {
            Some(gate) => Ok(Some(Self::Ebpf(gate))),
            None => Ok(nftables::Gate::find(name)?.map(Self::Nftables)),
        }
    }

    /// Whether a gate of this name is still closed.
    pub fn is_pinned(name: &str) -> bool {
        ebpf::Gate::is_pinned(name) || nftables::Gate::find(name).is_ok_and(|gate| gate.is_some())
    }

    /// The connections that it holds, and how much of them it has dropped.
    pub fn connections(&self) -> GateResult<Vec<(Connection, Held)>> {
        match self {
            Self::Ebpf(gate) => Ok(gate.connections()?),
            Self::Nftables(gate) => Ok(gate.connections()?),
        }
    }

    /// Lets everything pass, at once. Of a gate that a dump has left, it may tell of which connections packets were held
    /// since then; the packet filter does not count to the very end.
    pub fn unlock(&self) -> GateResult<Option<HashSet<Connection>>> {
        match self {
            Self::Ebpf(gate) => Ok(gate.unlock()?),
            Self::Nftables(gate) => Ok(gate.remove().map(|()| None)?),
        }
    }

    /// Takes it away, for good. Who is in a hurry unlocks it first.
    pub fn remove(self) -> GateResult<()> {
        match self {
            Self::Ebpf(gate) => Ok(gate.remove()?),
            Self::Nftables(gate) => Ok(gate.remove()?),
        }
    }
}

/// A gate that stays closed though nobody works with it.
#[derive(Debug)]
pub struct Pinned {
    /// Its name.
    pub name: String,
    /// For how long it has been.
    pub age: Duration,
    /// What is left of an eBPF one that holds nothing: its engine was killed while it made or removed it.
    place: Option<ebpf::gate::Pinned>,
}

impl Pinned {
    /// Opens it, and takes away what is left of it.
    pub fn clear(&self) -> GateResult<()> {
        match (Gate::find(&self.name)?, &self.place) {
            (Some(gate), _) => {
                gate.unlock()?;
                gate.remove()
            }
            (None, Some(place)) => Ok(place.discard()?),
            (None, None) => Ok(()),
        }
    }
}

/// Takes away what stays at interfaces of this network namespace when an engine is killed on a kernel that does not see
/// to it: filters that let everything pass.
pub fn sweep() -> GateResult<()> {
    Ok(ebpf::latch::sweep()?)
}

/// All gates that stay.
pub fn pinned() -> GateResult<Vec<Pinned>> {
    let ebpf = ebpf::gate::pinned()?;
    let mut all: Vec<Pinned> =
        ebpf.into_iter().map(|at| Pinned { name: at.name.clone(), age: at.age, place: Some(at) }).collect();
    all.extend(nftables::gate::pinned()?.into_iter().map(|(name, age)| Pinned { name, age, place: None }));
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}
