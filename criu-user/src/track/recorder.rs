//! Turns looks, and what the eBPF programs tell, into reports.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::{Duration, Instant};

use nix::unistd::Pid;

use super::memory::Memory;
use super::refusals::DryLooks;
use super::report::{CallReport, HISTORY, ProcessReport, Report};
use super::tree::{Tree, TreeLook};
use super::witness::{Statement, Witness, now_unix_ms};
use crate::kernel::proc;
use crate::kernel::survey::PAGE;
use crate::object::memory::estimate;

/// What is remembered from one report to the next.
#[derive(Debug, Default)]
pub struct Recorder {
    looks: u64,
    last: Option<Instant>,
    /// Bytes a second in the last intervals, of each process and of all.
    histories: HashMap<Pid, VecDeque<u64>>,
    history: VecDeque<u64>,
    dry_looks: DryLooks,
}

impl Recorder {
    /// Has the next report come with a fresh look for what would refuse a dump.
    pub fn hurry(&mut self) {
        self.dry_looks.hurry();
    }

    /// Makes the report of a look that began then and took so long.
    pub fn report(
        &mut self,
        tree: &Tree,
        found: &TreeLook,
        witness: &mut Witness,
        begin: Instant,
        took: Duration,
    ) -> Report {
        let interval = self.last.replace(begin).map_or(Duration::ZERO, |last| begin - last);
        self.looks += 1;
        let statement = witness.count().clone();
        let processes: Vec<ProcessReport> =
            tree.processes.values().map(|memory| self.process(tree, memory, found, &statement, interval)).collect();
        self.histories.retain(|pid, _| tree.processes.contains_key(pid));
        let sum = |value: fn(&ProcessReport) -> u64| processes.iter().map(value).sum();
        let written_bytes_per_second = sum(|p| p.written_bytes_per_second);
        note(&mut self.history, written_bytes_per_second);
        let calls = witness.calls();
        let pids: BTreeSet<Pid> = tree.processes.keys().copied().collect();
        let refusals = self.dry_looks.look(tree.root(), &pids, witness.connections(), &calls);
        let explains = |call: &CallReport| refusals.iter().any(|refusal| refusal.call.as_ref() == Some(call));
        Report {
            pid: tree.root().as_raw(),
            session: std::process::id() as i32,
            unix_ms: now_unix_ms(),
            looks: self.looks,
            interval_ms: interval.as_millis() as u64,
            look_us: took.as_micros() as u64,
            written_bytes_per_second,
            history: self.history.iter().copied().collect(),
            pending_bytes: sum(|p| p.pending_bytes),
            working_set_bytes: sum(|p| p.working_set_bytes),
            rewritten_bytes: sum(|p| p.rewritten_bytes),
            memory_bytes: sum(|p| p.memory_bytes),
            faults: statement.faults,
            calls: statement.calls,
            sockets: statement.sockets,
            has_image: false,
            soft_dirty: false,
            ends_with: None,
            predicted_freeze_us: 0,
            suspicious: calls.iter().filter(|call| !explains(call)).cloned().collect(),
            refusals,
            ebpf: witness.report().clone(),
            lost: statement.lost,
            processes,
        }
    }

    fn process(
        &mut self,
        tree: &Tree,
        memory: &Memory,
        found: &TreeLook,
        statement: &Statement,
        interval: Duration,
    ) -> ProcessReport {
        let pid = memory.pid;
        let look = found.looks.get(&pid).copied().unwrap_or_default();
        let written_bytes_per_second = match interval.as_secs_f64() {
            0.0 => 0,
            seconds => ((look.written * PAGE) as f64 / seconds) as u64,
        };
        let history = self.histories.entry(pid).or_default();
        note(history, written_bytes_per_second);
        let testimony = statement.processes.get(&pid).cloned().unwrap_or_default();
        ProcessReport {
            pid: pid.as_raw(),
            parent: tree.parent(pid).map_or(0, Pid::as_raw),
            comm: String::from_utf8_lossy(&proc::comm(pid, pid).unwrap_or_default()).into_owned(),
            threads: proc::threads(pid).map_or(0, |threads| threads.len() as u64),
            written_bytes_per_second,
            history: history.iter().copied().collect(),
            pending_bytes: memory.written() * PAGE,
            working_set_bytes: memory.working_set() * PAGE,
            rewritten_bytes: look.again * PAGE,
            memory_bytes: estimate(pid),
            faults: testimony.faults,
            calls: testimony.calls,
            images: testimony.images,
            untracked: memory.untracked.clone(),
        }
    }
}

fn note(history: &mut VecDeque<u64>, value: u64) {
    if history.len() == HISTORY {
        history.pop_front();
    }
    history.push_back(value);
}
