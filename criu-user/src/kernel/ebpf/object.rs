//! An object with eBPF programs, from the bytes inside the engine to programs in the kernel.
//!
//! aya-obj parses and relocates it. aya itself would load it as well, but only with the whole kernel BTF parsed, which
//! costs more than everything else that a small dump does; here the one id that is needed comes from a cache.

use std::collections::{HashMap, HashSet};
use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd};

use aya_obj::generated::bpf_insn;
use aya_obj::{EbpfSectionKind, Map, Object};

use super::bpf::{self, Access, IterProgram};
use super::{EbpfError, EbpfResult};

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
    _maps: Vec<OwnedFd>,
}

impl Loaded {
    /// Parses an object, sets `globals` by name, makes its maps.
    pub fn new(name: &'static str, bytes: &[u8], globals: HashMap<&str, (&[u8], bool)>) -> EbpfResult<Self> {
        let bad = |why: String| EbpfError::BadObject { object: name, why };
        let mut object = Object::parse(bytes).map_err(|error| bad(error.to_string()))?;
        object.patch_map_data(globals).map_err(|error| bad(error.to_string()))?;
        let mut maps: Vec<(String, Map, OwnedFd)> = Vec::new();
        for (section, map) in object.maps.drain() {
            let access = match map.section_kind() {
                EbpfSectionKind::Rodata => Access::Frozen,
                EbpfSectionKind::Data | EbpfSectionKind::Bss => Access::ReadWrite,
                other => return Err(bad(format!("section {section} is of kind {other:?}"))),
            };
            let fd = bpf::globals_map(map.data(), access).map_err(|(command, source)| {
                let on = format!("section {section} of `{name}`");
                EbpfError::Call { command, on, source }
            })?;
            maps.push((section, map, fd));
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
        let _maps = maps.into_iter().map(|(_, _, fd)| fd).collect();
        Ok(Self { name, license: object.license, programs, _maps })
    }

    /// Loads one iterator.
    pub fn load_iter(&self, program: &str, attach_btf_id: u32) -> EbpfResult<OwnedFd> {
        let instructions = self
            .programs
            .get(program)
            .ok_or_else(|| EbpfError::BadObject { object: self.name, why: format!("there is no program {program}") })?;
        let iter = IterProgram { name: program, instructions, license: &self.license, attach_btf_id };
        bpf::load_iter(iter, None).map_err(|(_, source)| {
            let mut log = vec![0; LOG_ROOM];
            // Once more, for the verifier's words: it is asked for them only here, because writing them takes it time.
            let log = match bpf::load_iter(iter, Some(&mut log)) {
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
