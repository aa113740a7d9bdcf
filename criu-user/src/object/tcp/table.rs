//! A tree's connections for a reader: of running processes, or of images.
//!
//! Nothing is changed and nobody is stopped: what is shown of running processes may be another a moment later.

use std::collections::HashSet;
use std::os::fd::OwnedFd;

use nix::unistd::Pid;
use serde::Serialize;

use super::capture::{closed_was_connected, unsupported};
use super::{Ends, State, clients};
use crate::image::proto::{FileEntry, InetSkEntry, TcpClientEntry, TcpStreamEntry};
use crate::image::{ImageDir, ImageKind};
use crate::kernel::ebpf::pending::{Reader, Waiting, Which};
use crate::kernel::pidfd::PidFd;
use crate::kernel::tcp::{self, Lengths, options};
use crate::kernel::{inet_diag, proc, socket};
use crate::object::inet::{IPPROTO_MPTCP, addresses};
use crate::object::{ObjectError, sockopt};

/// One connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Row {
    /// The process that has it; images do not say it of a connection alone.
    pub pid: Option<i32>,
    /// Its descriptor there.
    pub fd: Option<i32>,
    /// Both ends.
    pub local: String,
    /// The peer's.
    pub remote: String,
    /// How far it is.
    pub state: State,
    /// Whether the program has it; else it waits to be accepted by the listening socket that is told of.
    pub accepted: bool,
    /// Bytes that wait to be read.
    pub received: u32,
    /// Bytes that the peer has not acknowledged.
    pub unacknowledged: u32,
    /// Of these, bytes that were never sent.
    pub unsent: u32,
    /// What was agreed on.
    pub agreed: Vec<String>,
    /// Why it would not be carried over.
    pub refused: Option<String>,
}

/// The connections of a process and all below it.
pub fn of_tree(root: Pid) -> Result<Vec<Row>, ObjectError> {
    let diag = inet_diag::all()?;
    let (mut rows, mut seen, mut open) = (Vec::new(), HashSet::new(), vec![root]);
    let mut servers = Vec::new();
    while let Some(pid) = open.pop() {
        let pidfd = PidFd::open(pid)?;
        for fd in proc::descriptors(pid)? {
            // One that was closed meanwhile is none.
            let Ok(file) = pidfd.get(fd) else { continue };
            let Ok(stat) = nix::sys::stat::fstat(&file) else { continue };
            if is_tcp(&file) && seen.insert(stat.st_ino) {
                rows.extend(of_socket(&file, pid, fd, diag.get(&(stat.st_ino as u32)).copied())?);
                let info = tcp::info(&file)?;
                if u32::from(info.state) == sockopt::state::LISTEN && info.waiting > 0 {
                    servers.push((stat.st_ino, pid, fd, file));
                }
            }
        }
        for tid in proc::threads(pid)? {
            open.extend(proc::children(pid, tid).unwrap_or_default());
        }
    }
    rows.extend(of_clients(&servers));
    Ok(rows)
}

/// Those that wait to be accepted by these listening sockets: none where nobody can look at them.
fn of_clients(servers: &[(u64, Pid, i32, OwnedFd)]) -> Vec<Row> {
    if servers.is_empty() {
        return Vec::new();
    }
    let inodes: Vec<u64> = servers.iter().map(|(ino, ..)| *ino).collect();
    let waiting =
        Reader::new(&inodes, 0, Which::Connected).and_then(|mut reader| reader.read()).unwrap_or_else(|err| {
            tracing::warn!(%err, "clients that wait to be accepted are left out");
            Vec::new()
        });
    let row = |one: &Waiting| {
        let (_, pid, fd, _) = servers.iter().find(|(ino, ..)| *ino == one.client.listener)?;
        let (entry, refused) = clients::described(one);
        Some(Row { refused: refused.map(str::to_owned), ..of_client(&entry, Some((*pid, *fd)))? })
    };
    waiting.iter().filter_map(row).collect()
}

fn of_client(client: &TcpClientEntry, server: Option<(Pid, i32)>) -> Option<Row> {
    let (local, remote) = ((&client.src_addr[..], client.src_port), (&client.dst_addr[..], client.dst_port));
    let ends = Ends::of_words(client.family, 0, local, remote);
    let stream = &client.stream;
    Some(Row {
        pid: server.map(|(pid, _)| pid.as_raw()),
        fd: server.map(|(_, fd)| fd),
        local: ends.local.to_string(),
        remote: ends.remote.to_string(),
        state: State::of_number(client.state)?,
        accepted: false,
        received: stream.inq_len,
        unacknowledged: 0,
        unsent: 0,
        agreed: agreed(stream.opt_mask, stream.snd_wscale, stream.rcv_wscale()),
        refused: None,
    })
}

fn is_tcp(file: &OwnedFd) -> bool {
    let is = |protocol| [libc::IPPROTO_TCP, IPPROTO_MPTCP].contains(&protocol);
    let internet = sockopt::family(file).is_some_and(|family| [libc::AF_INET, libc::AF_INET6].contains(&family));
    let number = |name| socket::number(file, libc::SOL_SOCKET, name);
    internet && number(libc::SO_PROTOCOL).is_ok_and(is) && number(libc::SO_TYPE).is_ok_and(|t| t == libc::SOCK_STREAM)
}

fn of_socket(
    file: &OwnedFd,
    pid: Pid,
    fd: i32,
    diag: Option<inet_diag::TcpSocket>,
) -> Result<Option<Row>, ObjectError> {
    let info = tcp::info(file)?;
    let number = |name| socket::number(file, libc::SOL_SOCKET, name).map(|value| value as u32);
    let mut entry = InetSkEntry {
        family: number(libc::SO_DOMAIN)?,
        proto: number(libc::SO_PROTOCOL)?,
        state: info.state.into(),
        ..InetSkEntry::default()
    };
    addresses(file, &mut entry)?;
    let Some(state) = State::of_number(entry.state) else { return Ok(None) };
    if state == State::Close && !closed_was_connected(file, &info)? {
        return Ok(None);
    }
    let ends = diag
        .filter(|_| state == State::SynSent)
        .map_or(Ends::of(&entry, 0), |socket| Ends { local: socket.local, remote: socket.remote });
    let Lengths { received, unacknowledged, unsent } = state.data(tcp::lengths(file)?);
    Ok(Some(Row {
        pid: Some(pid.as_raw()),
        fd: Some(fd),
        local: ends.local.to_string(),
        remote: ends.remote.to_string(),
        state,
        accepted: true,
        received,
        unacknowledged,
        unsent,
        agreed: agreed(info.options.into(), info.snd_wscale.into(), info.rcv_wscale.into()),
        refused: unsupported(file, &entry, diag)?.map(str::to_owned),
    }))
}

/// The connections of a dump.
pub fn of_images(dir: &ImageDir) -> Result<Vec<Row>, ObjectError> {
    let files: Vec<FileEntry> = dir.read_all(ImageKind::Files)?;
    let mut rows = Vec::new();
    for entry in files.into_iter().filter_map(|file| file.isk) {
        let Some(state) = State::of_number(entry.state) else { continue };
        let names = [ImageKind::TcpStream, ImageKind::TcpTls].map(|kind| kind.id(entry.ino.into()));
        let Some(name) = names.into_iter().find(|name| dir.exists(*name).unwrap_or(true)) else { continue };
        let empty =
            || ObjectError::contradiction(format!("the image of the connection of socket {} is empty", entry.ino));
        let stream: TcpStreamEntry = dir.reader(name)?.message()?.ok_or_else(empty)?;
        let ends = Ends::of(&entry, 0);
        rows.push(Row {
            pid: None,
            fd: None,
            local: ends.local.to_string(),
            remote: ends.remote.to_string(),
            state,
            accepted: true,
            received: stream.inq_len,
            unacknowledged: stream.outq_len,
            unsent: stream.unsq_len(),
            agreed: agreed(stream.opt_mask, stream.snd_wscale, stream.rcv_wscale()),
            refused: None,
        });
    }
    if dir.exists(ImageKind::TcpClients)? {
        let mut reader = dir.reader(ImageKind::TcpClients)?;
        while let Some((client, _)) = reader.message_over_payload::<TcpClientEntry>()? {
            rows.extend(of_client(&client, None));
        }
    }
    Ok(rows)
}

fn agreed(mask: u32, snd_wscale: u32, rcv_wscale: u32) -> Vec<String> {
    let has = |option: u8| mask & u32::from(option) != 0;
    let mut words = Vec::new();
    if has(options::TIMESTAMPS) {
        words.push("timestamps".to_owned());
    }
    if has(options::SACK) {
        words.push("sack".to_owned());
    }
    if has(options::WSCALE) {
        words.push(format!("wscale {snd_wscale},{rcv_wscale}"));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_agreed_on_has_words() {
        let mask = u32::from(options::SACK | options::WSCALE);
        assert_eq!(agreed(mask, 7, 10), ["sack", "wscale 7,10"]);
        assert_eq!(agreed(0, 7, 10), [""; 0]);
    }
}
