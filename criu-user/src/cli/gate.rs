//! `criu-ebpf gate`.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde::Serialize;

use super::error::CliError;
use super::{Outcome, say};
use crate::kernel::gate::{Gate, Pinned, pinned, sweep};
use crate::object::tcp::Ends;

#[derive(Debug, Args)]
pub(super) struct GateArgs {
    #[command(subcommand)]
    command: GateCommand,
}

#[derive(Debug, Subcommand)]
enum GateCommand {
    /// Show the gates that are closed, and the connections that each holds
    List {
        /// Print as JSON
        #[arg(long)]
        json: bool,
    },
    /// Open gates: their trees will not be restored, and the peers are told that nobody is there
    Clear {
        /// Which; all, if none is named
        names: Vec<String>,
        /// Only those that were closed more than so many seconds ago
        #[arg(long, value_name = "SECONDS")]
        older_than: Option<u64>,
    },
}

/// A gate as it is printed.
#[derive(Debug, Serialize)]
struct Shown {
    name: String,
    age: Duration,
    connections: Vec<ShownConnection>,
}

#[derive(Debug, Serialize)]
struct ShownConnection {
    local: String,
    remote: String,
    /// Whether it stands for all that ask for a connection; then there is no other end.
    new_clients: bool,
    held_from_peer: u64,
    held_to_peer: u64,
}

pub(super) fn run(args: GateArgs) -> Outcome {
    match args.command {
        GateCommand::List { json } => list(json),
        GateCommand::Clear { names, older_than } => clear(&names, Duration::from_secs(older_than.unwrap_or(0))),
    }
}

fn list(json: bool) -> Outcome {
    let shown = pinned()?.into_iter().map(show).collect::<Result<Vec<_>, _>>()?;
    if json {
        say(serde_json::to_string(&shown)?);
        return Ok(ExitCode::SUCCESS);
    }
    for gate in shown {
        let (name, age, held) = (&gate.name, gate.age.as_secs(), gate.connections.len());
        say(format_args!("{name}  closed for {age} s, {held} connections"));
        for connection in gate.connections {
            if connection.new_clients {
                say(format_args!("  new clients of {}  held {} requests", connection.local, connection.held_from_peer));
                continue;
            }
            say(format_args!(
                "  {} to {}  held {} packets from the peer, {} to it",
                connection.local, connection.remote, connection.held_from_peer, connection.held_to_peer
            ));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn show(gate: Pinned) -> Result<Shown, CliError> {
    // One that was opened meanwhile holds nothing.
    let held = Gate::find(&gate.name)?.map(|gate| gate.connections()).transpose()?.unwrap_or_default();
    let connections = held.into_iter().map(|(key, held)| {
        let ends = Ends::from(key);
        ShownConnection {
            local: ends.local.to_string(),
            remote: ends.remote.to_string(),
            new_clients: key.is_asking(),
            held_from_peer: held.from_peer,
            held_to_peer: held.to_peer,
        }
    });
    Ok(Shown { name: gate.name, age: gate.age, connections: connections.collect() })
}

fn clear(names: &[String], older_than: Duration) -> Outcome {
    let all = pinned()?;
    if let Some(unknown) = names.iter().find(|name| all.iter().all(|gate| gate.name != **name)) {
        return Err(CliError::UnknownGate { name: unknown.clone() });
    }
    let wanted = |gate: &&Pinned| (names.is_empty() || names.contains(&gate.name)) && gate.age >= older_than;
    for gate in all.iter().filter(wanted) {
        gate.clear()?;
        say(format_args!("{} is open", gate.name));
    }
    sweep()?;
    Ok(ExitCode::SUCCESS)
}
