//! Has the kernel make sockets for clients that nobody has accepted: `criu-ebpf/src/admit.rs`, from the engine's side.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use criu_common::gate::{Connection, bytes, from_bytes};
use criu_common::kfuncs;
use criu_common::pending::Admission;

use super::bpf::Purpose;
use super::links;
use super::object::{Loaded, compiled};
use super::{EbpfError, EbpfResult, btf, maps};
use crate::kernel::interfaces::{self, Way};

/// The compiled programs.
static OBJECT: Option<&[u8]> = compiled!("admit");

const PROGRAM: &str = "admit";
const FUNCTION: &str = kfuncs::ASSIGN;
/// Where packets of our own come in.
const LOOPBACK: &str = "lo";

/// Vouches for clients, as long as it lives.
#[derive(Debug)]
pub struct Door {
    clients: OwnedFd,
    _link: OwnedFd,
}

fn failed(on: &'static str) -> impl FnOnce((&'static str, std::io::Error)) -> EbpfError {
    move |(command, source)| EbpfError::Call { command, on: on.into(), source }
}

fn id() -> EbpfResult<u32> {
    let missing = || EbpfError::Missing { what: format!("function `{FUNCTION}` (Linux 6.9, CONFIG_SYN_COOKIES)") };
    btf::ids(&[FUNCTION])?.1.first().copied().flatten().ok_or_else(missing)
}

impl Door {
    /// One for these clients, each by its ends as the server sees them.
    ///
    /// # Minimum kernel version
    /// 6.9.
    pub fn new(clients: &[(Connection, Admission)]) -> EbpfResult<Self> {
        let id = id()?;
        let mut object = Loaded::new(PROGRAM, OBJECT.ok_or(EbpfError::NotBuilt)?, HashMap::new())?;
        object.bind(&[FUNCTION], &[id]);
        let program = object.load(PROGRAM, Purpose::Classifier)?;
        let map = object.take_map("CLIENTS")?;
        let keys: Vec<_> = clients.iter().map(|(key, _)| bytes(key)).collect();
        let values: Vec<_> = clients.iter().map(|(_, admission)| admission.bytes()).collect();
        maps::insert(map.as_fd(), &keys, &values).map_err(failed("the clients that wait"))?;
        let missing = || EbpfError::Interfaces { source: std::io::Error::other("there is no lo") };
        let lo = interfaces::index_of(LOOPBACK).ok_or_else(missing)?;
        let link = links::attach(program.as_fd(), lo, Way::In).map_err(failed("the interface lo"))?;
        Ok(Self { clients: map, _link: link })
    }

    /// What the kernel said of each that was tried, as an errno, 0 where it was well.
    pub fn outcomes(&self) -> EbpfResult<HashMap<Connection, i32>> {
        let all = maps::entries::<36, 28>(self.clients.as_fd()).map_err(failed("the clients that wait"))?;
        let word = |value: &[u8]| value.first_chunk().map_or(0, |b| i32::from_ne_bytes(*b));
        let tried = all.iter().filter(|(_, value)| word(&value[20..]) > 0);
        Ok(tried.map(|(key, value)| (from_bytes(key), -word(&value[24..]))).collect())
    }
}
