//! The object with the watching programs: what belongs to which question, and loading it with aya.

use std::os::fd::AsFd;

use aya::programs::{BtfTracePoint, Iter};
use aya::{Btf, Ebpf, EbpfLoader};
use aya_obj::btf::BtfKind;
use criu_common::watch::offsets::{Offsets, SOURCES};

use super::calls;
use super::plain::Plain;
use crate::kernel::ebpf::object::compiled;
use crate::kernel::ebpf::{EbpfError, EbpfResult, bpf, btf};

/// The compiled programs.
static OBJECT: Option<&[u8]> = compiled!("watch");

bitflags::bitflags! {
    /// What is asked of the kernel about the tracked set. Each has programs of its own, which cost something (docs/tracking.md).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Questions: u32 {
        /// Who forks, executes and ends. Without it children are not followed.
        const LIFECYCLE = 1;
        /// Where is written.
        const MEMORY = 2;
        /// Which kinds of state are touched.
        const SYSCALLS = 4;
        /// How connections move.
        const SOCKETS = 8;
        /// Who is put into a control group. [`super::Watch::follow_cgroup`] asks it by itself.
        const CGROUPS = 16;
    }
}

/// A program for a question.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Whose it is.
    pub question: Questions,
    /// Its name in the object.
    pub program: &'static str,
    /// The tracepoint that it sits at.
    pub tracepoint: &'static str,
    /// Whether the question can be answered without it, on kernels that have no such tracepoint.
    pub needed: bool,
}

const fn entry(question: Questions, program: &'static str, tracepoint: &'static str, needed: bool) -> Entry {
    Entry { question, program, tracepoint, needed }
}

/// All programs at tracepoints.
pub const TABLE: &[Entry] = &[
    entry(Questions::LIFECYCLE, "watch_fork", "sched_process_fork", true),
    entry(Questions::LIFECYCLE, "watch_exec", "sched_process_exec", true),
    entry(Questions::LIFECYCLE, "watch_exit", "sched_process_exit", true),
    entry(Questions::CGROUPS, "watch_attach", "cgroup_attach_task", true),
    entry(Questions::MEMORY, "watch_fault_user", "page_fault_user", true),
    entry(Questions::MEMORY, "watch_fault_kernel", "page_fault_kernel", true),
    entry(Questions::SYSCALLS, "watch_sys_exit", "sys_exit", true),
    entry(Questions::SOCKETS, "watch_socket_state", "inet_sock_set_state", true),
    entry(Questions::SOCKETS, "watch_socket_end", "tcp_destroy_sock", true),
];

/// The iterator that keeps the set by hand.
pub const FOLLOW: &str = "watch_follow";

/// The iterator over the TCP sockets of a process.
pub const CONNECTIONS: &str = "watch_sockets";

/// What aya says, as an error of ours.
pub fn failed<E: Into<aya::EbpfError>>(doing: &'static str, on: impl Into<String>) -> impl FnOnce(E) -> EbpfError {
    let on = on.into();
    move |error| {
        use aya::programs::ProgramError;
        match error.into() {
            aya::EbpfError::ProgramError(ProgramError::LoadError { io_error, verifier_log }) => {
                let text = verifier_log.to_string();
                let lines: Vec<_> = text.lines().collect();
                let log = lines[lines.len().saturating_sub(12)..].join("\n");
                EbpfError::Refused { program: on, source: io_error, log }
            }
            source => EbpfError::Aya { doing, on, source: Box::new(source) },
        }
    }
}

/// The object with its maps made, and the iterator loaded; and the kernel's types, for what is loaded later.
pub fn open() -> EbpfResult<(Ebpf, Btf)> {
    let bytes = OBJECT.ok_or(EbpfError::NotBuilt)?;
    let offsets = Offsets::from_values(&btf::offsets(SOURCES)?).ok_or(EbpfError::BadBtf { at: 0 })?;
    let kernel = Btf::from_sys_fs().map_err(failed("read the kernel's types in", btf::VMLINUX))?;
    let table = calls::table();
    let mut object = EbpfLoader::new()
        .btf(Some(&kernel))
        .override_global("OFFSETS", &Plain(offsets), true)
        .override_global("TABLE", table.as_slice(), true)
        .load(bytes)
        .map_err(failed("load the object of", "the watch"))?;
    let iterator: &mut Iter = program(&mut object, FOLLOW)?;
    iterator.load("task", &kernel).map_err(failed("load", FOLLOW))?;
    Ok((object, kernel))
}

/// Loads and attaches the programs of these questions. Gives the tracepoints that this kernel does not have.
pub fn attach(object: &mut Ebpf, kernel: &Btf, questions: Questions) -> EbpfResult<Vec<&'static str>> {
    let mut missing = Vec::new();
    for entry in TABLE.iter().filter(|entry| questions.contains(entry.question)) {
        let typedef = format!("btf_trace_{}", entry.tracepoint);
        if kernel.id_by_type_name_kind(&typedef, BtfKind::Typedef).is_err() {
            if entry.needed {
                return Err(EbpfError::Missing { what: format!("tracepoint {}", entry.tracepoint) });
            }
            missing.push(entry.tracepoint);
            continue;
        }
        let program: &mut BtfTracePoint = program(object, entry.program)?;
        if program.fd().is_err() {
            program.load(entry.tracepoint, kernel).map_err(failed("load", entry.program))?;
        }
        program.attach().map_err(failed("attach", entry.program))?;
    }
    if questions.contains(Questions::SOCKETS) {
        let iterator: &mut Iter = program(object, CONNECTIONS)?;
        if iterator.fd().is_err() {
            iterator.load("task_file", kernel).map_err(failed("load", CONNECTIONS))?;
        }
    }
    Ok(missing)
}

/// Takes the programs of these questions away again. Iterators stay: nothing runs them.
pub fn detach(object: &mut Ebpf, questions: Questions) -> EbpfResult<()> {
    for entry in TABLE.iter().filter(|entry| questions.contains(entry.question)) {
        let program: &mut BtfTracePoint = program(object, entry.program)?;
        // Its link goes with it.
        if program.fd().is_ok() {
            program.unload().map_err(failed("unload", entry.program))?;
        }
    }
    Ok(())
}

/// How often each program that is loaded was not run, because it interrupted itself on the same processor.
pub fn misses(object: &mut Ebpf) -> EbpfResult<Vec<(Questions, u64)>> {
    let mut found = Vec::new();
    for entry in TABLE {
        let program: &mut BtfTracePoint = program(object, entry.program)?;
        let Ok(fd) = program.fd() else { continue };
        let misses = bpf::misses(fd.as_fd()).map_err(|(command, source)| EbpfError::Call {
            command,
            on: entry.program.to_owned(),
            source,
        })?;
        found.push((entry.question, misses));
    }
    Ok(found)
}

/// A program of the object, as what it is.
pub fn program<'a, T>(object: &'a mut Ebpf, name: &str) -> EbpfResult<&'a mut T>
where
    &'a mut T: TryFrom<&'a mut aya::programs::Program, Error = aya::programs::ProgramError>,
{
    let bad = |why: String| EbpfError::BadObject { object: "watch", why };
    let program = object.program_mut(name).ok_or_else(|| bad(format!("there is no program {name}")))?;
    program.try_into().map_err(failed("use", name))
}
