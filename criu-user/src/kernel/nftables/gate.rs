//! The gate by rules of the packet filter, for where eBPF is not to be had. Its life is that of the other one: until a
//! dump is complete the kernel takes its table away when the engine ends, as that owns it. A gate that is to stay gets a
//! second table, which is nobody's.
//!
//! The rules stand where packets enter and leave the machine, whatever the interface: none can come too late.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use criu_common::gate::{Connection, Held, mapped};
use netlink_bindings::nftables::{
    Chained, ExprOps, IterableSetelemAttrs, OpGetsetelemDump, OpGettableDump, Request, TableFlags,
};
use netlink_bindings::traits::NetlinkRequest;
use nix::errno::Errno;

use super::batch::{Netfilter, dump, inet};
use super::rules::{self, Family, V4, V6};
use crate::kernel::{SysError, SysResult};

/// What our tables are called, before the name of the gate.
const PREFIX: &str = "criu-ebpf-";
/// The lists of elements that one message can have are shorter than 64 KiB.
const ELEMENTS: usize = 500;

/// A gate that we hold, or that an earlier engine has left.
#[derive(Debug)]
pub struct Gate {
    table: CString,
    /// Owns the table: it is gone with this socket. None of one that stays.
    owner: Option<Netfilter>,
    /// What it holds, if we hold it.
    locked: Vec<Connection>,
}

fn table_of(name: &str) -> SysResult<CString> {
    CString::new(format!("{PREFIX}{name}")).map_err(|_| SysError::new("nf_tables", name, Errno::EINVAL))
}

impl Gate {
    /// Makes a gate. Everything passes until something is locked.
    ///
    /// # Minimum kernel version
    /// 5.12, for tables that are owned.
    pub fn new() -> SysResult<Self> {
        let table = table_of(&format!("held-by-{}", std::process::id()))?;
        let owner = Netfilter::open()?;
        owner.change("the table of a gate", |batch| rules::make(batch, &table, true))?;
        Ok(Self { table, owner: Some(owner), locked: Vec::new() })
    }

    /// Locks connections: from now on nobody hears of the other.
    pub fn lock(&mut self, connections: &[Connection]) -> SysResult<()> {
        // Before Linux 6.10 nothing is answered where nothing is asked for.
        if connections.is_empty() {
            return Ok(());
        }
        let one = Netfilter::open()?;
        let by = self.owner.as_ref().unwrap_or(&one);
        by.change("the connections of a gate", |batch| enter(batch, &self.table, connections))?;
        self.locked.extend(connections);
        Ok(())
    }

    /// Makes it outlive us, under this name.
    pub fn pin(&self, name: &str) -> SysResult<()> {
        let table = table_of(name)?;
        Netfilter::open()?.change("the table of a gate that stays", |batch| {
            rules::make(batch, &table, false);
            enter(batch, &table, &self.locked);
        })
    }

    /// The gate of this name that an earlier engine has left; `None` if it was opened meanwhile.
    pub fn find(name: &str) -> SysResult<Option<Self>> {
        let there = pinned()?.iter().any(|(known, _)| known == name);
        there.then(|| Ok(Self { table: table_of(name)?, owner: None, locked: Vec::new() })).transpose()
    }

    /// The connections that it holds, and how much of them it has dropped.
    pub fn connections(&self) -> SysResult<Vec<(Connection, Held)>> {
        let mut found: HashMap<Connection, Held> = HashMap::new();
        for family in [V4, V6] {
            for (key, packets) in self.elements(family.to)? {
                found.entry(connection_of(&family, &key)).or_default().to_peer += packets;
            }
            for (key, packets) in self.elements(family.from)?.into_iter().chain(self.elements(family.asked)?) {
                found.entry(connection_of(&family, &key)).or_default().from_peer += packets;
            }
        }
        let mut all: Vec<_> = found.into_iter().collect();
        all.sort_unstable_by_key(|(connection, _)| *connection);
        Ok(all)
    }

    /// The keys of a set, and how many packets were dropped for each.
    fn elements(&self, set: &CStr) -> SysResult<Vec<(Vec<u8>, u64)>> {
        let mut request = Request::new().op_getsetelem_dump(&inet());
        request.encode().push_table(&self.table).push_set(set);
        let mut found = Vec::new();
        let asked = dump("the connections of a gate", &request, |message| {
            let (_, list) = OpGetsetelemDump::decode_reply(message);
            // The last message may have none.
            for element in list.get_elements().ok().into_iter().flat_map(|all| all.get_elem()) {
                found.push((element.get_key().ok()?.get_value().ok()?.to_vec(), packets(&element)));
            }
            Some(())
        });
        match asked {
            // Somebody has opened it.
            Err(err) if err.errno == Errno::ENOENT => Ok(Vec::new()),
            asked => asked.map(|()| found),
        }
    }

    /// Lets everything pass, at once and for good.
    pub fn remove(&self) -> SysResult<()> {
        let one = Netfilter::open()?;
        let by = self.owner.as_ref().unwrap_or(&one);
        let removed = by.change("the table of a gate", |batch| {
            batch.request().op_deltable_do(&inet()).encode().push_name(&self.table);
        });
        match removed {
            Err(err) if err.errno == Errno::ENOENT => Ok(()),
            other => other,
        }
    }
}

fn packets(element: &IterableSetelemAttrs<'_>) -> u64 {
    match element.get_expr().and_then(|counter| counter.get_data()) {
        Ok(ExprOps::Counter(counter)) => counter.get_packets().unwrap_or(0),
        _ => 0,
    }
}

/// Enters connections into the sets of a table. What is there already stays as it is.
fn enter(batch: &mut Chained<'_>, table: &CStr, connections: &[Connection]) {
    for family in [V4, V6] {
        let own = |connection: &&Connection| family_of(connection).address == family.address;
        let (asked, pairs): (Vec<_>, Vec<_>) = connections.iter().filter(own).partition(|one| one.is_asking());
        for (set, connections) in [(family.to, &pairs), (family.from, &pairs), (family.asked, &asked)] {
            for some in connections.chunks(ELEMENTS) {
                let mut request = batch.request().set_create().op_newsetelem_do(&inet());
                let mut elements = request.encode().push_table(table).push_set(set).nested_elements();
                for connection in some {
                    let key = key_of(&family, connection);
                    elements = elements.nested_elem().nested_key().push_value(&key).end_nested().end_nested();
                }
            }
        }
    }
}

/// The family of a connection's packets.
fn family_of(connection: &Connection) -> Family {
    if connection.local[..12] == mapped([0; 4])[..12] { V4 } else { V6 }
}

/// A connection as the sets have it: our end, and unless it stands for all that ask, the peer's.
fn key_of(family: &Family, connection: &Connection) -> Vec<u8> {
    let skip = connection.local.len() - family.address;
    let mut key = Vec::with_capacity(family.pair());
    for (address, port) in [(connection.local, connection.local_port), (connection.remote, connection.remote_port)] {
        key.extend_from_slice(&address[skip..]);
        key.extend_from_slice(&port);
        key.extend_from_slice(&[0; 2]);
    }
    if connection.is_asking() {
        key.truncate(family.pair() / 2);
    }
    key
}

/// The connection of a key.
fn connection_of(family: &Family, key: &[u8]) -> Connection {
    let mut ends = key.chunks(family.pair() / 2).map(|end| {
        let (address, port) = end.split_at_checked(family.address).unwrap_or_default();
        let address = match (address.first_chunk::<16>(), address.first_chunk::<4>()) {
            (Some(v6), _) => *v6,
            (None, Some(v4)) => mapped(*v4),
            _ => [0; 16],
        };
        (address, port.first_chunk().copied().unwrap_or_default())
    });
    let (local, local_port) = ends.next().unwrap_or_default();
    let (remote, remote_port) = ends.next().unwrap_or_default();
    Connection { local, remote, local_port, remote_port }
}

/// The gates that stay though nobody works with them: names, and for how long each has been closed. None where the kernel
/// has no packet filter of this kind.
pub fn pinned() -> SysResult<Vec<(String, Duration)>> {
    let mut found = Vec::new();
    let asked = dump("tables", &Request::new().op_gettable_dump(&inet()), |message| {
        let (_, table) = OpGettableDump::decode_reply(message);
        let owned = table.get_flags().unwrap_or(0) & TableFlags::Owner as u32 != 0;
        let name = table.get_name().ok()?.to_str().ok().and_then(|name| name.strip_prefix(PREFIX));
        if let Some(name) = name.filter(|_| !owned) {
            found.push((name.to_owned(), age_of(name)));
        }
        Some(())
    });
    match asked {
        Err(SysError { errno: Errno::EPROTONOSUPPORT | Errno::EINVAL | Errno::EOPNOTSUPP, .. }) => Ok(Vec::new()),
        asked => asked.map(|()| found),
    }
}

/// Gates are named after the time of their dump: `PID-MILLISECONDS`, the latter as hexadecimal digits.
fn age_of(name: &str) -> Duration {
    let since = name.rsplit_once('-').and_then(|(_, digits)| u64::from_str_radix(digits, 16).ok());
    let then = since.and_then(|ms| UNIX_EPOCH.checked_add(Duration::from_millis(ms)));
    then.and_then(|then| SystemTime::now().duration_since(then).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_come_back() {
        let v6 = Connection { local: [1; 16], remote: [2; 16], local_port: [0, 80], remote_port: [3, 4] };
        let v4 = Connection { local: mapped([10, 0, 0, 1]), remote: mapped([10, 0, 0, 2]), ..v6 };
        let asked = [v4, v6].map(|connection| Connection::asking(connection.local, connection.local_port));
        for connection in [v4, v6].into_iter().chain(asked) {
            let family = family_of(&connection);
            let key = key_of(&family, &connection);
            assert_eq!(key.len(), if connection.is_asking() { family.pair() / 2 } else { family.pair() });
            assert_eq!(connection_of(&family, &key), connection);
        }
        assert_eq!(family_of(&v4).address, 4);
    }

    #[test]
    fn broken_keys_are_no_connection_of_anybody() {
        assert_eq!(connection_of(&V6, &[1, 2, 3]), Connection::default());
        assert_eq!(connection_of(&V4, &[]), Connection::default());
    }

    #[test]
    fn ages_are_in_names() {
        assert!(age_of("1-0") > Duration::from_secs(1_000_000_000));
        assert_eq!(age_of("1-zz"), Duration::ZERO);
        assert_eq!(age_of(&format!("1-{:x}", u64::MAX)), Duration::ZERO);
    }
}
