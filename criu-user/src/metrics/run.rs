//! Dumps, pre-dumps and restores: what each came to, and all of them together.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::exposition::Exposition;
use super::histogram::Histogram;
use super::table;
use crate::kernel::survey_cache::CacheUse;

/// Defines a fixed set of names: what a label may say.
macro_rules! names {
    ($(#[$meta:meta])* $name:ident { $($(#[$of:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum $name { $($(#[$of])* #[serde(rename = $text)] $variant,)* }

        impl $name {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// As it is said in labels.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }

            /// The one of this name.
            pub fn named(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|one| one.name() == name)
            }
        }
    };
}

names! {
    /// What was done.
    Operation {
        /// A dump.
        Dump = "dump",
        /// A pre-dump.
        PreDump = "pre-dump",
        /// A restore.
        Restore = "restore",
    }
}

names! {
    /// A part of it. Parts overlap: a tree is frozen while images are written.
    Phase {
        /// Stopping the tree.
        Freezing = "freezing",
        /// The tree stands still; in a pre-dump, the longest stop of a process.
        Frozen = "frozen",
        /// Images are written.
        Writing = "writing",
        /// Images are read, and the plan made.
        Planning = "planning",
        /// The plan is carried out.
        Executing = "executing",
        /// All of it.
        Total = "total",
    }
}

names! {
    /// Why it failed, by what has to be looked at.
    Reason {
        /// The tree could not be stopped.
        Freeze = "freeze",
        /// The tree has what cannot be dumped.
        Refused = "refused",
        /// Images cannot be written or read, or do not fit together.
        Image = "image",
        /// Memory could not be read or written.
        Memory = "memory",
        /// The system calls inside the processes.
        Agent = "agent",
        /// The tree could not be looked over.
        Survey = "survey",
        /// The tracking session.
        Session = "session",
        /// An action script or another observer objected.
        Script = "script",
        /// A pid that the tree needs is taken.
        Pid = "pid",
        /// The disk is full.
        NoSpace = "no_space",
        /// Anything else.
        Other = "other",
    }
}

impl Operation {
    /// The parts that it has.
    pub fn phases(self) -> &'static [Phase] {
        match self {
            Self::Dump => &[Phase::Freezing, Phase::Frozen, Phase::Writing, Phase::Total],
            Self::PreDump => &[Phase::Frozen, Phase::Total],
            Self::Restore => &[Phase::Planning, Phase::Executing, Phase::Total],
        }
    }
}

/// Pages by what became of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// Written to images.
    pub written: u64,
    /// Left to the parent images.
    pub in_parent: u64,
    /// Left to the next image: written to again before they could be copied.
    pub skipped: u64,
}

/// One dump, pre-dump or restore.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// Which of them.
    pub operation: Operation,
    /// Why it failed, if it did. Then there is nothing else.
    pub failure: Option<Reason>,
    /// How long its parts took.
    pub phases: Vec<(Phase, Duration)>,
    /// Pages, of a dump or pre-dump.
    pub pages: Pages,
    /// Memory maps that a dump had read before the freeze.
    pub maps: CacheUse,
    /// TCP connections that a dump had asked before the freeze.
    pub connections: CacheUse,
    /// Bytes of memory written to images or filled from them.
    pub bytes: u64,
}

impl Run {
    /// One that has come to nothing yet.
    fn of(operation: Operation) -> Self {
        let (pages, maps, connections) = Default::default();
        Self { operation, failure: None, phases: Vec::new(), pages, maps, connections, bytes: 0 }
    }

    /// One that failed.
    pub fn failed(operation: Operation, reason: Reason) -> Self {
        Self { operation, failure: Some(reason), ..Self::of(operation) }
    }
}

/// All runs of one operation.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Sums {
    succeeded: u64,
    failed: BTreeMap<Reason, u64>,
    phases: BTreeMap<Phase, Histogram>,
    pages: Pages,
    #[serde(default)]
    maps: CacheUse,
    #[serde(default)]
    connections: CacheUse,
    bytes: u64,
    /// When the last one succeeded, since 1970.
    last_success: Option<Duration>,
    /// How long the tree stood still in it.
    last_freeze: Option<Duration>,
}

/// What all dumps, pre-dumps and restores came to.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Runs(BTreeMap<Operation, Sums>);

impl Runs {
    /// Counts one that has just ended.
    pub fn add(&mut self, run: &Run) {
        let sums = self.0.entry(run.operation).or_default();
        if let Some(reason) = run.failure {
            *sums.failed.entry(reason).or_default() += 1;
            return;
        }
        sums.succeeded += 1;
        sums.last_success = SystemTime::now().duration_since(UNIX_EPOCH).ok();
        for &(phase, time) in &run.phases {
            sums.phases.entry(phase).or_default().add(time);
            if phase == Phase::Frozen {
                sums.last_freeze = Some(time);
            }
        }
        sums.pages.written += run.pages.written;
        sums.pages.in_parent += run.pages.in_parent;
        sums.pages.skipped += run.pages.skipped;
        sums.maps.add(run.maps);
        sums.connections.add(run.connections);
        sums.bytes += run.bytes;
    }

    /// Tells all of it, of these operations: what has not happened yet is told as nothing, so that it can be seen to
    /// begin.
    pub fn expose(&self, operations: &[Operation], to: &mut Exposition) {
        let nothing = Sums::default();
        let none = Histogram::default();
        let all: Vec<(Operation, &Sums)> =
            operations.iter().map(|operation| (*operation, self.0.get(operation).unwrap_or(&nothing))).collect();
        for &(operation, sums) in &all {
            let operation = ("operation", operation.name());
            to.counter(&table::OPERATIONS, &[operation, ("result", "ok")], sums.succeeded);
            to.counter(&table::OPERATIONS, &[operation, ("result", "failed")], sums.failed.values().sum());
        }
        for &(operation, sums) in &all {
            for &reason in Reason::ALL {
                let labels = [("operation", operation.name()), ("reason", reason.name())];
                to.counter(&table::FAILURES, &labels, sums.failed.get(&reason).copied().unwrap_or(0));
            }
        }
        for &(operation, sums) in &all {
            for phase in operation.phases() {
                let labels = [("operation", operation.name()), ("phase", phase.name())];
                to.histogram(&table::OPERATION_DURATION, &labels, sums.phases.get(phase).unwrap_or(&none));
            }
        }
        for &(operation, sums) in all.iter().filter(|(operation, _)| *operation != Operation::Restore) {
            let Pages { written, in_parent, skipped } = sums.pages;
            for (kind, pages) in [("written", written), ("in_parent", in_parent), ("skipped", skipped)] {
                to.counter(&table::PAGES, &[("operation", operation.name()), ("kind", kind)], pages);
            }
        }
        for &(operation, sums) in all.iter().filter(|(operation, _)| *operation == Operation::Dump) {
            for (metric, of) in [(&table::CACHED_MAPS, sums.maps), (&table::CACHED_CONNECTIONS, sums.connections)] {
                for (result, count) in [("hit", of.hits), ("miss", of.misses)] {
                    to.counter(metric, &[("operation", operation.name()), ("result", result)], count);
                }
            }
        }
        for &(operation, sums) in &all {
            to.counter(&table::MOVED, &[("operation", operation.name())], sums.bytes);
        }
        for &(operation, sums) in &all {
            if let Some(time) = sums.last_success {
                to.gauge(&table::LAST_SUCCESS, &[("operation", operation.name())], time.as_secs_f64());
            }
        }
        for &(operation, sums) in &all {
            if let Some(time) = sums.last_freeze {
                to.gauge(&table::LAST_FREEZE, &[("operation", operation.name())], time.as_secs_f64());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dump() -> Run {
        Run {
            operation: Operation::Dump,
            failure: None,
            phases: vec![(Phase::Frozen, Duration::from_millis(20)), (Phase::Total, Duration::from_millis(40))],
            pages: Pages { written: 7, in_parent: 2, skipped: 0 },
            maps: CacheUse { hits: 2, misses: 1 },
            connections: CacheUse { hits: 3, misses: 0 },
            bytes: 7 * 4096,
        }
    }

    #[test]
    fn what_is_kept_is_what_was() {
        let mut runs = Runs::default();
        runs.add(&dump());
        runs.add(&Run::failed(Operation::Dump, Reason::NoSpace));
        runs.add(&Run::failed(Operation::PreDump, Reason::Freeze));
        let kept = serde_json::to_string(&runs).expect("JSON");
        assert_eq!(serde_json::from_str::<Runs>(&kept).expect("the same JSON"), runs);
    }

    #[test]
    fn names_lead_back() {
        for reason in Reason::ALL {
            assert_eq!(Reason::named(reason.name()), Some(*reason));
        }
        assert_eq!(Reason::named("something new"), None);
    }

    #[test]
    fn runs_add_up() {
        let mut runs = Runs::default();
        runs.add(&dump());
        runs.add(&dump());
        runs.add(&Run::failed(Operation::Dump, Reason::Refused));
        let mut exposition = Exposition::new([]);
        runs.expose(&[Operation::Dump], &mut exposition);
        let text = exposition.text();
        for line in [
            "criu_ebpf_operations_total{operation=\"dump\",result=\"ok\"} 2",
            "criu_ebpf_operations_total{operation=\"dump\",result=\"failed\"} 1",
            "criu_ebpf_operation_failures_total{operation=\"dump\",reason=\"refused\"} 1",
            "criu_ebpf_operation_failures_total{operation=\"dump\",reason=\"no_space\"} 0",
            "criu_ebpf_pages_total{operation=\"dump\",kind=\"written\"} 14",
            "criu_ebpf_cached_maps_total{operation=\"dump\",result=\"hit\"} 4",
            "criu_ebpf_cached_maps_total{operation=\"dump\",result=\"miss\"} 2",
            "criu_ebpf_cached_connections_total{operation=\"dump\",result=\"hit\"} 6",
            "criu_ebpf_operation_duration_seconds_bucket{le=\"0.03\",operation=\"dump\",phase=\"frozen\"} 2",
            "criu_ebpf_last_freeze_seconds{operation=\"dump\"} 0.02",
        ] {
            assert!(text.lines().any(|l| l == line), "no line {line} in\n{text}");
        }
    }
}
