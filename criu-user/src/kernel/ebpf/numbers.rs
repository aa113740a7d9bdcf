//! Where connections stand in their streams: `criu-ebpf/src/numbers.rs`, from the engine's side.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use criu_common::numbers::{Numbers, SOURCES};

use super::object::{Loaded, compiled};
use super::survey::read_to_end;
use super::{EbpfError, EbpfResult, bpf, cache};

/// The compiled program.
static OBJECT: Option<&[u8]> = compiled!("numbers");

const NAME: &str = "numbers";
/// The function that stands for the iterator.
const FUNCTION: &str = "bpf_iter_task_file";

/// Reads them.
#[derive(Debug)]
pub struct Reader {
    _object: Loaded,
    iterator: OwnedFd,
}

impl Reader {
    /// Loads the program.
    ///
    /// # Minimum kernel version
    /// 6.1, with type information (CONFIG_DEBUG_INFO_BTF); CAP_BPF and CAP_PERFMON.
    pub fn new() -> EbpfResult<Self> {
        let layout = cache::layout(SOURCES, &[FUNCTION])?;
        let offsets = layout.bytes();
        let globals = HashMap::from([("OFFSETS", (offsets.as_slice(), true))]);
        let object = Loaded::new(NAME, OBJECT.ok_or(EbpfError::NotBuilt)?, globals)?;
        let iterator = object.load_iter(NAME, layout.functions.first().copied().unwrap_or_default())?;
        Ok(Self { _object: object, iterator })
    }

    /// Those of all TCP sockets of which this process has descriptors, by inode. What was torn is left out.
    pub fn read(&self) -> EbpfResult<HashMap<u64, Numbers>> {
        let own = bpf::iterate(self.iterator.as_fd(), std::process::id()).map_err(|(command, source)| {
            EbpfError::Call { command, on: "iterator `numbers` over our own descriptors".into(), source }
        })?;
        let mut bytes = Vec::new();
        let pid = std::process::id() as i32;
        read_to_end(File::from(own), &mut bytes).map_err(|source| EbpfError::Read { program: NAME, pid, source })?;
        let all = bytes.as_chunks().0.iter().map(Numbers::from_bytes);
        Ok(all.filter(|numbers| numbers.torn == 0).map(|numbers| (numbers.inode, numbers)).collect())
    }
}
