//! Keeping the network away from connections: who does it at dump and at restore.

use criu_common::gate::Connection;

use super::Ends;
use crate::kernel::gate::{Gate, GateError, GateResult};
use crate::kernel::{ebpf, interfaces, nftables, probe};
use crate::plan::Connections;

/// How packets of connections are held while there is no socket for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, serde::Serialize)]
pub enum NetworkLock {
    /// By an eBPF program at every interface
    Ebpf,
    /// By netfilter rules
    Nftables,
    /// Not at all: the caller keeps the network away
    Skip,
    /// By eBPF, or by netfilter rules where the kernel has no such programs
    #[default]
    Auto,
    /// By the same eBPF program, as a filter of traffic control; by itself where the kernel knows no better
    Clsact,
}

/// Why the network cannot be kept away.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// The gate failed.
    #[error(
        "cannot hold the packets of connections: {0}; give --network-lock nftables where eBPF is not to be had, or keep the network away by other means and give --network-lock skip"
    )]
    Gate(#[from] GateError),
    /// The gate does not stand where packets may have come through.
    #[error(
        "the interface {interface} came up after the dump, and packets of the connection {ends} may have come through it while nobody held them: its peer may have given it up. --network-lock skip restores it all the same"
    )]
    Leak {
        /// The interface.
        interface: String,
        /// The connection.
        ends: Ends,
    },
    /// Listening sockets cannot be locked without a lock.
    #[error("--lock-listeners needs a lock, and --network-lock skip is none: leave one of them out")]
    NoLock,
}

impl NetworkLock {
    /// As the inventory names it, in a field of our own.
    pub fn number(self) -> u32 {
        self as u32
    }

    /// A gate, where this lock has one, through which everything passes as yet. `expected`: about how many connections it
    /// will hold.
    pub fn gate(self, expected: usize) -> Result<Option<Gate>, LockError> {
        match self {
            Self::Ebpf => Ok(Some(Gate::Ebpf(ebpf::Gate::new(expected).map_err(GateError::from)?))),
            Self::Clsact => Ok(Some(Gate::Ebpf(ebpf::Gate::by_filters(expected).map_err(GateError::from)?))),
            Self::Nftables => Ok(Some(Gate::Nftables(nftables::Gate::new().map_err(GateError::from)?))),
            Self::Skip => Ok(None),
            Self::Auto => match (ebpf::Gate::new(expected), nftables::Gate::new) {
                (Ok(gate), _) => Ok(Some(Gate::Ebpf(gate))),
                (Err(err), rules) => match rules() {
                    Ok(gate) => {
                        tracing::info!(%err, "packets are held by rules of the packet filter");
                        Ok(Some(Gate::Nftables(gate)))
                    }
                    Err(_) => Err(GateError::from(err).into()),
                },
            },
        }
    }

    /// Whether the gate of a restore can swallow packets in a way that their sender takes them for sent. `left`: the gate
    /// that the dump has left, if it has.
    pub fn swallows(self, left: Option<&str>) -> bool {
        match left.and_then(|name| Gate::find(name).ok().flatten()) {
            Some(gate) => matches!(gate, Gate::Ebpf(_)),
            None => match self {
                Self::Ebpf | Self::Clsact => true,
                Self::Nftables | Self::Skip => false,
                Self::Auto => probe::ebpf::tcx().is_ok() || probe::ebpf::clsact().is_ok(),
            },
        }
    }

    /// Locks the connections of a restore: the gate that the dump has left stays closed, else there is a new one, which
    /// opens with our death.
    pub fn close(self, connections: &Connections) -> Result<Option<Gate>, LockError> {
        let left = connections.gate.as_deref().map(Gate::find).transpose()?.flatten();
        if connections.locked.is_empty() {
            return Ok(left);
        }
        match left {
            Some(mut gate) => {
                if self != Self::Skip {
                    refuse_leaks(&gate, &connections.locked)?;
                }
                gate.lock(&missing(&gate, &connections.locked)?)?;
                Ok(Some(gate))
            }
            None => {
                let mut gate = self.gate(connections.locked.len())?;
                gate.iter_mut().try_for_each(|gate| gate.lock(&connections.locked))?;
                Ok(gate)
            }
        }
    }
}

/// A connection whose address is at an interface that came up when nobody looked may be known as dead to its peer.
fn refuse_leaks(gate: &Gate, connections: &[Connection]) -> Result<(), LockError> {
    let late = gate.uncovered()?;
    if late.is_empty() {
        return Ok(());
    }
    let addresses = interfaces::named_addresses().map_err(GateError::from)?;
    for ends in connections.iter().map(|&connection| Ends::from(connection)) {
        let at = addresses.iter().find(|(name, address)| late.contains(name) && *address == ends.local.ip());
        if let Some((interface, _)) = at {
            return Err(LockError::Leak { interface: interface.clone(), ends });
        }
    }
    Ok(())
}

/// What a gate does not hold yet: entering a connection twice would set its counts back.
fn missing(gate: &Gate, wanted: &[Connection]) -> GateResult<Vec<Connection>> {
    let held: std::collections::HashSet<Connection> = gate.connections()?.into_iter().map(|(key, _)| key).collect();
    Ok(wanted.iter().filter(|key| !held.contains(key)).copied().collect())
}
