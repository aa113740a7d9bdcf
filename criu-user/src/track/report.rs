//! What a session reports, once an interval. As JSON it is what `track --json` prints; docs/tracking.md has its schema.
//!
//! A field that a session of another version does not send has its default: old and new can ask each other.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// For how many intervals written bytes are kept.
pub const HISTORY: usize = 60;
/// Pages that were written in so many last intervals are the working set.
pub const RECENT: usize = 10;

/// The state of a session.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// The root of the tree.
    pub pid: i32,
    /// The session's own process.
    pub session: i32,
    /// When this was reported, in milliseconds since 1970.
    pub unix_ms: u64,
    /// Looks so far.
    pub looks: u64,
    /// Length of the last interval in milliseconds.
    pub interval_ms: u64,
    /// How long the last look took, in microseconds.
    pub look_us: u64,
    /// Bytes written a second, over the last interval. A page counts once, however often it was written.
    pub written_bytes_per_second: u64,
    /// The same for each of the last intervals, the latest last.
    pub history: Vec<u64>,
    /// Bytes written since the last image, which the next one would have to take.
    pub pending_bytes: u64,
    /// Bytes of pages written in the last ten intervals.
    pub working_set_bytes: u64,
    /// Bytes written in the last interval as well as in the one before.
    pub rewritten_bytes: u64,
    /// Private memory of the tree, in bytes.
    pub memory_bytes: u64,
    /// Write faults since tracking began, of processes that have ended as well.
    pub faults: FaultsReport,
    /// System calls since tracking began, by the kind of state that they touch, of processes that have ended as well.
    pub calls: BTreeMap<String, u64>,
    /// TCP sockets of the tree.
    pub sockets: SocketsReport,
    /// Whether there is an image that the next can build on.
    pub has_image: bool,
    /// Whether soft-dirty bits tell which pages were written, and not userfaultfds.
    pub soft_dirty: bool,
    /// The process with which the session ends, if it was begun for that alone: a live dump.
    pub ends_with: Option<i32>,
    /// How long a dump now would hold the tree, in microseconds.
    pub predicted_freeze_us: u64,
    /// What would refuse a dump now, or asks for an option of it.
    pub refusals: Vec<RefusalReport>,
    /// System calls after which a dump may be refused, the latest last. Those that explain a refusal stand there as well.
    pub suspicious: Vec<CallReport>,
    /// The eBPF programs.
    pub ebpf: EbpfReport,
    /// What could not be noted.
    pub lost: LostReport,
    /// The processes, by pid.
    pub processes: Vec<ProcessReport>,
}

/// One process.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessReport {
    /// Its id.
    pub pid: i32,
    /// Its parent's.
    pub parent: i32,
    /// Its name.
    pub comm: String,
    /// Its threads.
    pub threads: u64,
    /// Bytes written a second, over the last interval.
    pub written_bytes_per_second: u64,
    /// The same for each of the last intervals, the latest last.
    pub history: Vec<u64>,
    /// Bytes written since the last image.
    pub pending_bytes: u64,
    /// Bytes of pages written in the last ten intervals.
    pub working_set_bytes: u64,
    /// Bytes written in the last interval as well as in the one before.
    pub rewritten_bytes: u64,
    /// Private memory in bytes.
    pub memory_bytes: u64,
    /// Write faults since it is tracked.
    pub faults: FaultsReport,
    /// System calls since it is tracked, by the kind of state that they touch; kinds without any are left out.
    pub calls: BTreeMap<String, u64>,
    /// How often it has called execve(2) since it is tracked.
    pub images: u32,
    /// Why its memory is not tracked, if it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub untracked: Option<String>,
}

/// Write faults.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FaultsReport {
    /// On pages that were there: write-protected, or shared until then.
    pub protected: u64,
    /// On pages that were not.
    pub missing: u64,
}

/// TCP sockets.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SocketsReport {
    /// How many there are in each state; states without any are left out.
    pub by_state: BTreeMap<String, u64>,
    /// Bytes sent since tracking began, those sent again included, by sockets that are closed as well.
    pub sent_bytes: u64,
    /// Bytes received since tracking began.
    pub received_bytes: u64,
    /// Segments sent again since tracking began.
    pub retransmits: u64,
    /// Bytes that wait to be read.
    pub unread_bytes: u64,
    /// Bytes that were written and that the peer has not acknowledged.
    pub unacknowledged_bytes: u64,
    /// Changes of state since tracking began.
    pub changes: u64,
}

/// What would refuse a dump, or asks for an option.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RefusalReport {
    /// The process.
    pub pid: i32,
    /// Its descriptor, where it is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fd: Option<i32>,
    /// The object.
    pub what: String,
    /// What can be done.
    pub advice: String,
    /// The option of `dump` with which it is no reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub option: Option<String>,
    /// When it was first seen, in milliseconds since 1970.
    pub since_unix_ms: u64,
    /// The system call that made it, where it was seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub call: Option<CallReport>,
}

/// A system call.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CallReport {
    /// The process.
    pub pid: i32,
    /// The thread.
    pub tid: i32,
    /// Its name.
    pub name: String,
    /// Its arguments, in hexadecimal.
    pub arguments: Vec<String>,
    /// Flags or policy that were behind a pointer (clone3, sched_setattr), in hexadecimal; else empty.
    pub detail: String,
    /// What it gave.
    pub result: i64,
    /// When it returned, in milliseconds since 1970.
    pub unix_ms: u64,
    /// Who called it, the innermost first: a file and an offset in it, or an address.
    pub stack: Vec<String>,
}

/// The eBPF programs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EbpfReport {
    /// Each question that is asked of the kernel.
    pub questions: Vec<QuestionReport>,
    /// Tracepoints that this kernel does not have.
    pub missing_tracepoints: Vec<String>,
}

/// A question, and the programs that answer it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct QuestionReport {
    /// lifecycle, memory, syscalls or sockets.
    pub name: String,
    /// Whether its programs run.
    pub runs: bool,
    /// Why they do not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why_not: Option<String>,
}

/// What could not be noted since tracking began: numbers of records, but for `processes` and `connections`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LostReport {
    /// Processes for which there was no room.
    pub processes: u64,
    /// Forks, executions and ends.
    pub lifecycle: u64,
    /// First writes.
    pub blocks: u64,
    /// System calls.
    pub calls: u64,
    /// Changes of states of connections.
    pub sockets: u64,
    /// Write faults.
    pub faults: u64,
    /// Connections for which there was no room.
    pub connections: u64,
    /// Records that made no sense.
    pub undecoded: u64,
    /// Calls of programs that did not take place.
    pub missed: u64,
}

impl LostReport {
    /// All of it.
    pub fn sum(&self) -> u64 {
        let Self { processes, lifecycle, blocks, calls, sockets, faults, connections, undecoded, missed } = *self;
        processes + lifecycle + blocks + calls + sockets + faults + connections + undecoded + missed
    }
}
