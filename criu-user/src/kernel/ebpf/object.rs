//! An object with eBPF programs, from the bytes inside the engine to programs in the kernel.
//!
//! aya-obj parses and relocates it. aya itself would load it as well, but only with the whole kernel BTF parsed, which
//! costs more than everything else that a small dump does; here the one id that is needed comes from a cache.

use std::collections::{HashMap, HashSet};
use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd};

use aya_obj::generated::bpf_insn;
use aya_obj::{EbpfSectionKind, Map, Object};
use criu_common::kfuncs;

use super::bpf::{self, Access, Program, Purpose};
use super::{EbpfError, EbpfResult, maps};

/// The programs of `criu-ebpf/` of this name, as they were compiled; none where the toolchain was missing.
macro_rules! compiled {
    ($name:literal) => {{
        #[cfg(ebpf_programs)]
        {
            /// ELF parsing reads words in place.
            #[repr(C, align(16))]
            struct Aligned<T: ?Sized>(T);
            static ALIGNED: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/", $name)));
            Some(&ALIGNED.0)
        }
        #[cfg(not(ebpf_programs))]
        None
    }};
}
pub(super) use compiled;

/// Room for what the verifier says: enough for one walk over a program of some thousand instructions.
const LOG_ROOM: usize = 4 << 20;
/// How much of the end of that is put into the error.
const LOG_LINES: usize = 12;

/// An object whose maps exist and whose programs can be loaded. Dropping it takes the maps away once no program uses
/// them.
#[derive(Debug)]
pub struct Loaded {
    name: &'static str,
    license: CString,
    programs: HashMap<String, Vec<bpf_insn>>,
    /// Held for the programs that are loaded later: they refer to the maps by descriptor.
    maps: HashMap<String, OwnedFd>,
}

impl Loaded {
    /// Parses an object, sets `globals` by name, makes its maps.
    pub fn new(name: &'static str, bytes: &[u8], globals: HashMap<&str, (&[u8], bool)>) -> EbpfResult<Self> {
        Self::with_sizes(name, bytes, globals, &[])
    }

    /// The same, with other sizes of some maps than they are compiled with.
    pub fn with_sizes(
        name: &'static str,
        bytes: &[u8],
        globals: HashMap<&str, (&[u8], bool)>,
        sizes: &[(&str, u32)],
    ) -> EbpfResult<Self> {
        let bad = |why: String| EbpfError::BadObject { object: name, why };
        let mut object = Object::parse(bytes).map_err(|error| bad(error.to_string()))?;
        object.patch_map_data(globals).map_err(|error| bad(error.to_string()))?;
        let mut maps: Vec<(String, Map, OwnedFd)> = Vec::new();
        for (of, mut map) in object.maps.drain() {
            if let Some((_, size)) = sizes.iter().find(|(name, _)| *name == of) {
                map.set_max_entries(*size);
            }
            let made = match map.section_kind() {
                EbpfSectionKind::Rodata => bpf::globals_map(map.data(), Access::Frozen),
                EbpfSectionKind::Data | EbpfSectionKind::Bss => bpf::globals_map(map.data(), Access::ReadWrite),
                EbpfSectionKind::Maps => maps::create(&map),
                other => return Err(bad(format!("map {of} is of kind {other:?}"))),
            };
            let fd = made.map_err(|(command, source)| {
                let on = format!("map {of} of `{name}`");
                EbpfError::Call { command, on, source }
            })?;
            maps.push((of, map, fd));
        }
        let text: HashSet<usize> = object
            .functions
            .keys()
            .map(|(section, _)| *section)
            .filter(|section| object.programs.values().all(|program| program.section_index != *section))
            .collect();
        let by_name = maps.iter().map(|(name, map, fd)| (name.as_str(), fd.as_raw_fd(), map));
        object.relocate_maps(by_name, &text).map_err(|error| bad(format!("{error:?}")))?;
        object.relocate_calls(&text).map_err(|error| bad(format!("{error:?}")))?;
        let mut programs = HashMap::new();
        for (program, at) in &object.programs {
            let function = object.functions.get(&at.function_key());
            let function = function.ok_or_else(|| bad(format!("program {program} has no instructions")))?;
            programs.insert(program.clone(), function.instructions.clone());
        }
        let maps = maps.into_iter().map(|(name, _, fd)| (name, fd)).collect();
        Ok(Self { name, license: object.license, programs, maps })
    }

    /// Has the programs call functions of the kernel, by the ids that belong to these names. Others are passed over: those
    /// that stand for iterators.
    pub fn bind(&mut self, names: &[&str], ids: &[u32]) {
        /// BPF_JMP | BPF_CALL
        const CALL: u8 = 0x85;
        /// BPF_PSEUDO_KFUNC_CALL
        const BY_ID: u8 = 2;
        let ids: HashMap<u32, u32> =
            names.iter().zip(ids).filter_map(|(name, id)| Some((kfuncs::number_of(name)?, *id))).collect();
        for instruction in self.programs.values_mut().flatten().filter(|i| i.code == CALL && i.src_reg() == 0) {
            if let Some(id) = ids.get(&(instruction.imm as u32)) {
                instruction.set_src_reg(BY_ID);
                instruction.imm = *id as i32;
            }
        }
    }

    /// Takes a map of its own out of the object.
    pub fn take_map(&mut self, name: &str) -> EbpfResult<OwnedFd> {
        let missing = || EbpfError::BadObject { object: self.name, why: format!("there is no map {name}") };
        self.maps.remove(name).ok_or_else(missing)
    }

    /// Loads one iterator.
    pub fn load_iter(&self, program: &str, attach_btf_id: u32) -> EbpfResult<OwnedFd> {
        self.load(program, Purpose::Iterator(attach_btf_id))
    }

    /// Loads one program.
    pub fn load(&self, program: &str, purpose: Purpose) -> EbpfResult<OwnedFd> {
        let instructions = self
            .programs
            .get(program)
            .ok_or_else(|| EbpfError::BadObject { object: self.name, why: format!("there is no program {program}") })?;
        let wanted = Program { name: program, instructions, license: &self.license, purpose };
        bpf::load(wanted, None).map_err(|(_, source)| {
            let mut log = vec![0; LOG_ROOM];
            // Once more, for the verifier's words: it is asked for them only here, because writing them takes it time.
            let log = match bpf::load(wanted, Some(&mut log)) {
                Ok(_) => "the second attempt succeeded".to_owned(),
                Err(_) => last_lines(&log),
            };
            EbpfError::Refused { program: program.to_owned(), source, log }
        })
    }
}

fn last_lines(log: &[u8]) -> String {
    let text = String::from_utf8_lossy(log.split(|byte| *byte == 0).next().unwrap_or_default());
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}
