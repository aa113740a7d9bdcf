//! All metrics that there are. docs/metrics.md has the same table, and a test compares them.

use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;

/// What a number stands for; its name ends with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Of {
    /// Things, which the name says.
    Things,
    /// Bytes.
    Bytes,
    /// Bytes a second.
    BytesPerSecond,
    /// Seconds.
    Seconds,
}

impl Of {
    /// As the exposition says it.
    pub(super) fn unit(self) -> Option<Unit> {
        match self {
            Self::Things => None,
            Self::Bytes => Some(Unit::Bytes),
            Self::BytesPerSecond => Some(Unit::Other("bytes_per_second".into())),
            Self::Seconds => Some(Unit::Seconds),
        }
    }
}

/// One metric.
#[derive(Debug)]
pub struct Metric {
    /// Its name, without unit and suffix.
    pub(super) name: &'static str,
    /// What it counts.
    pub(super) of: Of,
    /// How.
    pub(super) kind: MetricType,
    /// What it tells.
    pub(super) help: &'static str,
}

impl Metric {
    /// The name of its family in a plain text exposition, which for a counter is that of its series.
    pub fn full_name(&self) -> String {
        let unit = self.of.unit().map(|unit| format!("_{}", unit.as_str())).unwrap_or_default();
        let suffix = match self.kind {
            MetricType::Counter => "_total",
            MetricType::Info => "_info",
            _ => "",
        };
        format!("{}{unit}{suffix}", self.name)
    }
}

macro_rules! metrics {
    ($($constant:ident = $kind:ident $name:literal $of:ident, $help:literal;)*) => {
        $(#[doc = $help] pub static $constant: Metric =
            Metric { name: $name, of: Of::$of, kind: MetricType::$kind, help: $help };)*

        /// Each of them.
        pub static ALL: &[&Metric] = &[$(&$constant),*];
    };
}

metrics! {
    BUILD = Info "criu_ebpf_build" Things, "The engine that tells this.";
    TREE = Info "criu_ebpf_tree" Things, "The tree that is tracked: name of its root, pid of the session.";
    PROCESSES = Gauge "criu_ebpf_processes" Things, "Processes of the tree with memory of their own.";
    UNTRACKED = Gauge "criu_ebpf_untracked_processes" Things,
        "Processes whose memory cannot be tracked: a dump writes all of it.";
    MEMORY = Gauge "criu_ebpf_memory" Bytes, "Private memory of the tree.";
    WRITTEN_RATE = Gauge "criu_ebpf_written" BytesPerSecond,
        "Memory written in the last interval; a page counts once, however often it was written.";
    WRITTEN = Counter "criu_ebpf_written" Bytes,
        "Memory found written by the looks; a page counts once a look.";
    PENDING = Gauge "criu_ebpf_pending" Bytes, "Memory written since the last image: what the next one has to take.";
    WORKING_SET = Gauge "criu_ebpf_working_set" Bytes, "Memory written in the last ten intervals.";
    PROCESS_MEMORY = Gauge "criu_ebpf_process_memory" Bytes,
        "Private memory by process: those that have most, and the others together.";
    PROCESS_WRITTEN_RATE = Gauge "criu_ebpf_process_written" BytesPerSecond,
        "Memory written in the last interval, by process.";
    PROCESS_PENDING = Gauge "criu_ebpf_process_pending" Bytes, "Memory written since the last image, by process.";
    PROCESS_WORKING_SET = Gauge "criu_ebpf_process_working_set" Bytes,
        "Memory written in the last ten intervals, by process.";
    THREADS = Gauge "criu_ebpf_threads" Things, "Threads of these processes.";
    REWRITTEN = Gauge "criu_ebpf_rewritten" Bytes, "Memory written in the last interval as well as in the one before.";
    FAULTS = Counter "criu_ebpf_faults" Things,
        "Write faults: on protected pages, which were there, and on missing ones.";
    CALLS = Counter "criu_ebpf_calls" Things,
        "System calls that touched state of a process, by the kind of state; one that touches several counts for each.";
    SOCKETS = Gauge "criu_ebpf_sockets" Things, "TCP sockets of the tree, by state.";
    SOCKET_CHANGES = Counter "criu_ebpf_socket_changes" Things, "Changes of state of TCP sockets.";
    SOCKET_SENT = Counter "criu_ebpf_socket_sent" Bytes, "Bytes sent over TCP, those sent again included.";
    SOCKET_RECEIVED = Counter "criu_ebpf_socket_received" Bytes, "Bytes received over TCP.";
    SOCKET_RETRANSMITS = Counter "criu_ebpf_socket_retransmits" Things, "TCP segments sent again.";
    SOCKET_UNREAD = Gauge "criu_ebpf_socket_unread" Bytes, "Bytes that wait in TCP sockets to be read.";
    SOCKET_UNACKNOWLEDGED = Gauge "criu_ebpf_socket_unacknowledged" Bytes,
        "Bytes written to TCP sockets that the peer has not acknowledged.";
    REFUSALS = Gauge "criu_ebpf_refusals" Things,
        "What a dump now would be refused for: for good, or without an option of dump.";
    QUESTIONS = Gauge "criu_ebpf_question_runs" Things,
        "1 if the eBPF programs that answer this question run, else 0: then its numbers stand still.";
    LOST = Counter "criu_ebpf_lost_records" Things,
        "What eBPF programs could not note, by kind; what it was about is looked at anew.";
    HAS_IMAGE = Gauge "criu_ebpf_image_to_build_on" Things, "1 if there is an image that the next can build on, else 0.";
    PREDICTED_FREEZE = Gauge "criu_ebpf_predicted_freeze" Seconds, "For how long a dump now would hold the tree.";
    LOOK_DURATION = Histogram "criu_ebpf_look_duration" Seconds, "How long the session's looks at the tree took.";
    LOOK_INTERVAL = Gauge "criu_ebpf_look_interval" Seconds, "Time between the last two looks.";
    LAST_LOOK = Gauge "criu_ebpf_last_look_timestamp" Seconds, "When the session last looked, since 1970.";
    OPERATIONS = Counter "criu_ebpf_operations" Things, "Dumps, pre-dumps and restores that have ended, by result.";
    FAILURES = Counter "criu_ebpf_operation_failures" Things, "Those that failed, by reason.";
    OPERATION_DURATION = Histogram "criu_ebpf_operation_duration" Seconds,
        "How long they took when they succeeded, by phase; phases overlap.";
    PAGES = Counter "criu_ebpf_pages" Things,
        "Pages by what became of them: written, left to the parent images, skipped for the next image.";
    CACHED_MAPS = Counter "criu_ebpf_cached_maps" Things,
        "Memory maps that were read before the freeze: still right in it (hit), or read anew (miss).";
    CACHED_CONNECTIONS = Counter "criu_ebpf_cached_connections" Things,
        "TCP connections that were asked before the freeze: still as they had told in it (hit), or asked anew (miss).";
    MOVED = Counter "criu_ebpf_image" Bytes, "Memory that was written to images or filled from them.";
    LAST_SUCCESS = Gauge "criu_ebpf_last_success_timestamp" Seconds, "When the last one succeeded, since 1970.";
    LAST_FREEZE = Gauge "criu_ebpf_last_freeze" Seconds,
        "For how long the last dump held the tree; of a pre-dump, the longest stop of a process.";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_ours() {
        let mut names: Vec<String> = ALL.iter().map(|metric| metric.full_name()).collect();
        assert!(names.iter().all(|name| name.starts_with("criu_ebpf_")));
        names.sort();
        let all = names.len();
        names.dedup();
        assert_eq!(names.len(), all);
    }

    /// A reader of the plain format may not take two families for one.
    #[test]
    fn families_are_unique() {
        let mut names: Vec<String> = ALL.iter().map(|metric| format!("{} {:?}", metric.name, metric.of)).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
    }
}
