//! What can keep the eBPF programs from being used. None of it keeps a dump from being made: /proc is asked instead.

use std::io;

use crate::kernel::SysError;

/// Why the kernel could not be asked through eBPF.
#[derive(Debug, thiserror::Error)]
pub enum EbpfError {
    /// The toolchain was missing when the engine was built.
    #[error(
        "this criu-ebpf was built without eBPF programs: build it with `cargo xtask setup` and `cargo xtask build`"
    )]
    NotBuilt,
    /// The kernel does not describe its types.
    #[error("cannot read the kernel's type information {path}: {source}; it needs CONFIG_DEBUG_INFO_BTF")]
    NoBtf {
        /// The file.
        path: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The type information is not what the format says.
    #[error("the kernel's type information is broken at byte {at}")]
    BadBtf {
        /// Where.
        at: usize,
    },
    /// A type, field or function that the programs are about does not exist in this kernel.
    #[error("this kernel has no {what}, which the eBPF programs read")]
    Missing {
        /// Its name.
        what: String,
    },
    /// The object inside the engine cannot be used.
    #[error("the eBPF object `{object}` inside this criu-ebpf is unusable: {why}")]
    BadObject {
        /// Name of the object.
        object: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A bpf(2) call failed.
    #[error("bpf({command}) for {on} failed: {source}")]
    Call {
        /// The command.
        command: &'static str,
        /// What for.
        on: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The interfaces could not be listed.
    #[error("cannot list the interfaces of the network: {source}")]
    Interfaces {
        /// What the kernel said.
        source: io::Error,
    },
    /// The gate cannot stand at interfaces as filters of traffic control.
    #[error(
        "cannot put filters of traffic control (clsact) at the interfaces of the network, or take them away: {source}"
    )]
    Filters {
        /// What the kernel said.
        source: SysError,
    },
    /// Nothing can be pinned.
    #[error("{call} of {path} failed: {source}; a bpf file system is needed there to keep connections held", path = path.display())]
    Pins {
        /// The call.
        call: &'static str,
        /// On what.
        path: std::path::PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The verifier refused a program.
    #[error("the kernel refused the eBPF program `{program}`: {source}\n{log}")]
    Refused {
        /// The program.
        program: String,
        /// What the kernel said.
        source: io::Error,
        /// The end of the verifier's log.
        log: String,
    },
    /// Aya could not do something.
    #[error("cannot {doing} {on}: {}", chain(source))]
    Aya {
        /// What was being done.
        doing: &'static str,
        /// With which program or map.
        on: String,
        /// What aya says.
        source: Box<aya::EbpfError>,
    },
    /// The ring buffer cannot be waited for.
    #[error("cannot wait for records of the eBPF programs: {source}")]
    Wait {
        /// What the system said.
        source: io::Error,
    },
    /// There is no such process.
    #[error("there is no process {pid} to be followed")]
    NoProcess {
        /// Which.
        pid: i32,
    },
    /// A directory is no control group whose processes can be followed.
    #[error("cannot follow the control group {path}: {source}; it has to be a directory of a mounted hierarchy", path = path.display())]
    Cgroup {
        /// Its directory.
        path: std::path::PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The tracked set is full.
    #[error("process {pid} cannot be followed: {most} processes are already, which is the most")]
    TooMany {
        /// Which.
        pid: i32,
        /// How many can be.
        most: u32,
    },
    /// An iterator ended early.
    #[error("cannot read what the eBPF program `{program}` says of process {pid}: {source}")]
    Read {
        /// The program.
        program: &'static str,
        /// The process.
        pid: i32,
        /// What the kernel said.
        source: io::Error,
    },
    /// An iterator's records make no sense.
    #[error("what the eBPF program `{program}` says of process {pid} is broken at byte {at}")]
    BadRecord {
        /// The program.
        program: &'static str,
        /// The process.
        pid: i32,
        /// Where.
        at: usize,
    },
}

/// An error with what lies behind it: aya's own messages mostly leave that out.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        next = error.source();
    }
    text
}

impl EbpfError {
    /// Whether it would be the same at the next attempt. What a process or the system ran out of may be there again.
    pub fn will_last(&self) -> bool {
        const PASSING: [i32; 5] = [libc::ENOMEM, libc::EAGAIN, libc::EINTR, libc::EMFILE, libc::ENFILE];
        match self {
            Self::NoBtf { source, .. }
            | Self::Call { source, .. }
            | Self::Refused { source, .. }
            | Self::Read { source, .. } => !source.raw_os_error().is_some_and(|errno| PASSING.contains(&errno)),
            _ => true,
        }
    }
}

/// Result of what is done with eBPF.
pub type EbpfResult<T> = Result<T, EbpfError>;
