//! The survey by eBPF: the iterators of `criu-ebpf/src/survey.rs`, run for one process at a time.
//!
//! A program is loaded when it is first asked for, and gone when the [`EbpfSurvey`] is dropped (or its process dies):
//! nothing is pinned. Making them ready takes 0.3 ms (6 ms the first time after boot), loading each of the three 0.6 to
//! 1 ms, a process of the usual size 0.02 ms for each iterator; 20 000 areas take 10 ms (/proc: 67), 1000 threads 1.6 ms,
//! 4000 descriptors with their paths 4 ms (/proc: 20, without the flags). So for a small tree, or where the programs
//! cannot be loaded before the freeze, /proc is the faster one.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use criu_common::offsets::{Offsets, SOURCES};
use criu_common::survey as record;
use nix::unistd::Pid;

use super::object::{Loaded, compiled};
use super::{EbpfError, EbpfResult, bpf, cache};

/// The compiled programs.
static OBJECT: Option<&[u8]> = compiled!("survey");

/// Programs and the kernel functions that stand for their iterators.
const VMAS: (usize, &str) = (0, "survey_vmas");
const FILES: (usize, &str) = (1, "survey_files");
const TASKS: (usize, &str) = (2, "survey_tasks");
const FUNCTIONS: [&str; 3] = ["bpf_iter_task_vma", "bpf_iter_task_file", "bpf_iter_task"];

/// The kernel gives at most its own buffer of eight pages with each read (kernel/bpf/bpf_iter.c).
const READ_SIZE: usize = 64 << 10;

/// A record with the text that came with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named<T> {
    /// The record, as criu_common describes it.
    pub record: T,
    /// Its path or name, as bytes without a NUL; empty where there is none. Records of the same file share one.
    pub text: Arc<[u8]>,
}

/// One process: its threads, what they share, and its memory if it has any.
#[derive(Clone, Debug)]
pub struct TaskRecords {
    /// In the order in which they were started.
    pub threads: Vec<record::Thread>,
    /// What the threads share.
    pub process: record::Process,
    /// Absent where all that is left is a zombie.
    pub mm: Option<record::Mm>,
}

/// What a signal does, as `rt_sigaction(2)` gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Action {
    /// `SIG_DFL` (0), `SIG_IGN` (1), or the handler.
    pub handler: u64,
    /// `SA_*`
    pub flags: u64,
    /// What the handler returns to.
    pub restorer: u64,
    /// Blocked while it runs.
    pub mask: u64,
}

/// The loaded survey programs.
#[derive(Debug)]
pub struct EbpfSurvey {
    object: Loaded,
    offsets: Offsets,
    functions: Vec<u32>,
    programs: [Option<OwnedFd>; 3],
    buffer: Vec<u8>,
    /// By mount namespace (its `struct nsproxy`): whether mapped files may have others behind them.
    pub(super) stacked: HashMap<u64, bool>,
}

impl EbpfSurvey {
    /// Whether this engine has the programs inside.
    pub const fn is_built_in() -> bool {
        OBJECT.is_some()
    }

    /// Makes the programs ready; each is loaded when it is first used.
    ///
    /// # Minimum kernel version
    /// 6.1, for iterators over one process. Needs CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN.
    pub fn new() -> EbpfResult<Self> {
        let object = OBJECT.ok_or(EbpfError::NotBuilt)?;
        let start = Instant::now();
        let layout = cache::layout(SOURCES, &FUNCTIONS)?;
        let offsets = layout.table()?;
        let bytes = layout.bytes();
        let object = Loaded::new("survey", object, HashMap::from([("OFFSETS", (bytes.as_slice(), true))]))?;
        tracing::debug!(took = ?start.elapsed(), "made the eBPF survey ready");
        Ok(Self {
            object,
            offsets,
            functions: layout.functions,
            programs: [None, None, None],
            buffer: Vec::new(),
            stacked: HashMap::new(),
        })
    }

    /// Loads all programs, so that this does not happen while a process stands still.
    pub fn load_all(&mut self) -> EbpfResult<()> {
        [VMAS, FILES, TASKS].into_iter().try_for_each(|program| self.program(program).map(drop))
    }

    /// Loads the one about threads alone.
    pub fn load_tasks(&mut self) -> EbpfResult<()> {
        self.program(TASKS).map(drop)
    }

    /// The table of offsets, for what is decoded here ([`record::Thread::restart`]).
    pub const fn offsets(&self) -> &Offsets {
        &self.offsets
    }

    /// The areas of a process, in ascending order.
    pub fn vmas_of(&mut self, pid: Pid) -> EbpfResult<Vec<Named<record::Vma>>> {
        self.run(VMAS, pid)?;
        let mut records = Records::new(&self.buffer, VMAS.1, pid);
        let mut vmas: Vec<Named<record::Vma>> = Vec::new();
        let mut paths: HashMap<u64, Arc<[u8]>> = HashMap::new();
        let none: Arc<[u8]> = Arc::from([]);
        while let Some((kind, bytes)) = records.header()? {
            records.expect(kind, record::Kind::Vma)?;
            let (area, text) = records.take::<record::Vma>(bytes)?;
            // The kernel walks over the memory of each thread that has files of its own: the same memory again.
            if vmas.last().is_some_and(|last| last.record.start >= area.start) {
                break;
            }
            let text = match (area.file, text.is_empty()) {
                (0, true) => Arc::clone(&none),
                (0, false) => Arc::from(text),
                (file, true) => paths.get(&file).map_or_else(|| Arc::clone(&none), Arc::clone),
                (file, false) => {
                    let path = paths.entry(file).or_insert_with(|| Arc::from(text));
                    Arc::clone(path)
                }
            };
            vmas.push(Named { record: area, text });
        }
        Ok(vmas)
    }

    /// The descriptors of a process, each table once: the leader's, and those of threads that have their own.
    pub fn files_of(&mut self, pid: Pid) -> EbpfResult<Vec<Named<record::File>>> {
        self.run(FILES, pid)?;
        let mut records = Records::new(&self.buffer, FILES.1, pid);
        let mut files: Vec<Named<record::File>> = Vec::new();
        // Where the leader is dead, the kernel shows the table that its threads share once for each of them.
        let mut owners: HashMap<u64, u32> = HashMap::new();
        while let Some((kind, bytes)) = records.header()? {
            records.expect(kind, record::Kind::File)?;
            let (file, text) = records.take::<record::File>(bytes)?;
            if *owners.entry(file.table).or_insert(file.tid) == file.tid {
                files.push(Named { record: file, text: Arc::from(text) });
            }
        }
        Ok(files)
    }

    /// The threads of a process, and what they share; `None` if there is no such process.
    pub fn tasks_of(&mut self, pid: Pid) -> EbpfResult<Option<TaskRecords>> {
        self.run(TASKS, pid)?;
        let mut records = Records::new(&self.buffer, TASKS.1, pid);
        let (mut threads, mut process, mut mm) = (Vec::new(), None, None);
        while let Some((kind, bytes)) = records.header()? {
            match kind {
                kind if kind == record::Kind::Thread as u32 => threads.push(records.take(bytes)?.0),
                kind if kind == record::Kind::Process as u32 => process = Some(records.take(bytes)?.0),
                kind if kind == record::Kind::Mm as u32 => {
                    let (memory, _) = records.take(bytes)?;
                    mm.get_or_insert(memory);
                }
                _ => return Err(records.broken()),
            }
        }
        Ok(process.map(|process| TaskRecords { threads, process, mm }))
    }

    /// The actions of signals 1 to 64; `None` if this kernel keeps them in another shape than four words.
    pub fn actions(&self, process: &record::Process) -> Option<Vec<Action>> {
        let offsets = &self.offsets;
        if offsets.k_sigaction_size as usize != size_of_val(&process.actions[0]) {
            return None;
        }
        let word = |action: &[u64; 4], at: u32| at.is_multiple_of(8).then(|| action.get(at as usize / 8).copied())?;
        let read = |action| {
            Some(Action {
                handler: word(action, offsets.sigaction_handler)?,
                flags: word(action, offsets.sigaction_flags)?,
                restorer: word(action, offsets.sigaction_restorer)?,
                mask: word(action, offsets.sigaction_mask)?,
            })
        };
        process.actions.iter().map(read).collect()
    }

    fn program(&mut self, (index, name): (usize, &'static str)) -> EbpfResult<&OwnedFd> {
        match &mut self.programs[index] {
            Some(program) => Ok(program),
            slot => {
                let start = Instant::now();
                let program = self.object.load_iter(name, self.functions[index])?;
                tracing::debug!(program = name, took = ?start.elapsed(), "loaded an eBPF program");
                Ok(slot.insert(program))
            }
        }
    }

    /// Runs an iterator to its end; its output is in `self.buffer`.
    fn run(&mut self, program: (usize, &'static str), pid: Pid) -> EbpfResult<()> {
        let (name, buffer) = (program.1, std::mem::take(&mut self.buffer));
        let of = pid.as_raw().unsigned_abs();
        let iterator = bpf::iterate(self.program(program)?.as_fd(), of).map_err(|(command, source)| {
            let on = format!("iterator `{name}` over process {pid}");
            EbpfError::Call { command, on, source }
        })?;
        self.buffer = buffer;
        self.buffer.clear();
        read_to_end(File::from(iterator), &mut self.buffer).map_err(|source| EbpfError::Read {
            program: name,
            pid: pid.as_raw(),
            source,
        })
    }
}

/// Reads until nothing comes. Unlike `Read::read_to_end` it takes "again" for an answer: the kernel gives it after a long
/// walk over what it does not show (`MAX_ITER_OBJECTS`).
pub(super) fn read_to_end(mut from: File, buffer: &mut Vec<u8>) -> io::Result<()> {
    loop {
        let filled = buffer.len();
        buffer.resize(filled + READ_SIZE, 0);
        let got = match from.read(&mut buffer[filled..]) {
            Ok(got) => got,
            Err(error) if [io::ErrorKind::Interrupted, io::ErrorKind::WouldBlock].contains(&error.kind()) => {
                buffer.truncate(filled);
                continue;
            }
            Err(error) => return Err(error),
        };
        buffer.truncate(filled + got);
        if got == 0 {
            return Ok(());
        }
    }
}

/// Plain data that any bytes are a value of.
///
/// # Safety
/// Only for `repr(C)` structs of integers, whose first field is a [`record::Header`].
unsafe trait Plain: Copy {}

// SAFETY: integers and arrays of them.
unsafe impl Plain for record::Vma {}
// SAFETY: as above.
unsafe impl Plain for record::File {}
// SAFETY: as above.
unsafe impl Plain for record::Thread {}
// SAFETY: as above.
unsafe impl Plain for record::Process {}
// SAFETY: as above.
unsafe impl Plain for record::Mm {}
// SAFETY: as above, and it is its own first field.
unsafe impl Plain for record::Header {}

/// Takes an iterator's output apart.
struct Records<'a> {
    bytes: &'a [u8],
    at: usize,
    program: &'static str,
    pid: Pid,
}

impl<'a> Records<'a> {
    const fn new(bytes: &'a [u8], program: &'static str, pid: Pid) -> Self {
        Self { bytes, at: 0, program, pid }
    }

    /// The kind of the next record, and the length of its text; `None` at the end.
    fn header(&self) -> EbpfResult<Option<(u32, usize)>> {
        if self.at == self.bytes.len() {
            return Ok(None);
        }
        let header: record::Header = self.peek()?;
        Ok(Some((header.kind, header.tail as usize)))
    }

    fn expect(&self, kind: u32, wanted: record::Kind) -> EbpfResult<()> {
        if kind == wanted as u32 { Ok(()) } else { Err(self.broken()) }
    }

    /// The record and its text.
    fn take<T: Plain>(&mut self, text: usize) -> EbpfResult<(T, &'a [u8])> {
        let record = self.peek()?;
        let from = self.at + size_of::<T>();
        let bytes = self.bytes.get(from..from + text).ok_or_else(|| self.broken())?;
        self.at = from + text;
        Ok((record, bytes))
    }

    fn peek<T: Plain>(&self) -> EbpfResult<T> {
        let bytes = self.bytes.get(self.at..self.at + size_of::<T>()).ok_or_else(|| self.broken())?;
        // SAFETY: `bytes` is as long as a `T`, and any bytes are one.
        Ok(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
    }

    fn broken(&self) -> EbpfError {
        EbpfError::BadRecord { program: self.program, pid: self.pid.as_raw(), at: self.at }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of(area: &record::Vma, text: &[u8]) -> Vec<u8> {
        // SAFETY: plain data without padding.
        let bytes = unsafe { std::slice::from_raw_parts((&raw const *area).cast::<u8>(), size_of::<record::Vma>()) };
        [bytes, text].concat()
    }

    fn area(start: u64, text: &[u8]) -> record::Vma {
        let tail_kind = if text.is_empty() { record::Tail::None } else { record::Tail::Path } as u32;
        let kind = record::Kind::Vma as u32;
        let header = record::Header { kind, tail_kind, tail: text.len() as u32, tgid: 0 };
        record::Vma { header, start, end: start + 4096, ..record::Vma::default() }
    }

    #[test]
    fn records_follow_each_other_without_a_gap() {
        let (first, second) = (area(1 << 12, b"/lib"), area(2 << 12, b""));
        let bytes = [bytes_of(&first, b"/lib"), bytes_of(&second, b"")].concat();
        let mut records = Records::new(&bytes, "test", Pid::from_raw(1));
        let (kind, text) = records.header().expect("whole").expect("a record");
        records.expect(kind, record::Kind::Vma).expect("the kind");
        assert_eq!(records.take::<record::Vma>(text).expect("whole"), (first, b"/lib".as_slice()));
        let (_, text) = records.header().expect("whole").expect("a record");
        assert_eq!(records.take::<record::Vma>(text).expect("whole"), (second, b"".as_slice()));
        assert_eq!(records.header().expect("whole"), None);
    }

    #[test]
    fn what_was_cut_short_is_an_error() {
        let whole = bytes_of(&area(1 << 12, b"/lib"), b"/lib");
        for end in 1..whole.len() {
            let mut records = Records::new(&whole[..end], "test", Pid::from_raw(1));
            let taken = match records.header() {
                Ok(Some((_, text))) => records.take::<record::Vma>(text).map(drop),
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            };
            assert!(taken.is_err(), "cut at {end}");
        }
    }
}
