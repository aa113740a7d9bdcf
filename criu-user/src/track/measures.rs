//! What a session tells as metrics: its last report, and what adds up over its life.

use std::cmp::Reverse;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::report::{LostReport, ProcessReport, Report, SocketsReport};
use super::witness::kind_name;
use crate::kernel::ebpf::watch::{Connection, Kind};
use crate::kernel::survey::PAGE;
use crate::metrics::table::Metric;
use crate::metrics::{Exposition, Histogram, Operation, Run, Runs, table};

/// How many processes have series of their own. The others are told together, so that a tree of any size has a bounded
/// number of series.
const LARGEST: usize = 20;

/// What adds up over the life of a session.
#[derive(Debug, Default)]
pub(super) struct Measures {
    written_bytes: u64,
    looks: Histogram,
    last_look: Option<SystemTime>,
    runs: Runs,
}

impl Measures {
    /// A look was made.
    pub fn looked(&mut self, written_pages: u64, took: Duration) {
        self.written_bytes += written_pages * PAGE;
        self.looks.add(took);
        self.last_look = Some(SystemTime::now());
    }

    /// A dump, pre-dump or restore has ended.
    pub fn told(&mut self, run: &Run) {
        self.runs.add(run);
    }

    /// All that there is to tell.
    pub fn exposition(&self, report: &Report) -> Exposition {
        let mut to = Exposition::new([("tree", report.pid.to_string())]);
        let comm = report.processes.iter().find(|process| process.pid == report.pid).map(|root| root.comm.as_str());
        let session = report.session.to_string();
        to.info(&table::TREE, &[("comm", comm.unwrap_or_default()), ("session", &session)]);
        self.memory(report, &mut to);
        processes(&report.processes, &mut to);
        watched(report, &mut to);
        sockets(&report.sockets, &mut to);
        refusals(report, &mut to);
        self.looks(report, &mut to);
        self.runs.expose(Operation::ALL, &mut to);
        to
    }

    fn memory(&self, report: &Report, to: &mut Exposition) {
        let untracked = report.processes.iter().filter(|process| process.untracked.is_some()).count();
        to.gauge(&table::PROCESSES, &[], report.processes.len() as f64);
        to.gauge(&table::UNTRACKED, &[], untracked as f64);
        to.gauge(&table::MEMORY, &[], report.memory_bytes as f64);
        to.gauge(&table::WRITTEN_RATE, &[], report.written_bytes_per_second as f64);
        to.counter(&table::WRITTEN, &[], self.written_bytes);
        to.gauge(&table::PENDING, &[], report.pending_bytes as f64);
        to.gauge(&table::WORKING_SET, &[], report.working_set_bytes as f64);
        to.gauge(&table::REWRITTEN, &[], report.rewritten_bytes as f64);
        to.gauge(&table::THREADS, &[], report.processes.iter().map(|process| process.threads).sum::<u64>() as f64);
        to.gauge(&table::HAS_IMAGE, &[], f64::from(u8::from(report.has_image)));
        to.gauge(&table::PREDICTED_FREEZE, &[], Duration::from_micros(report.predicted_freeze_us).as_secs_f64());
    }

    fn looks(&self, report: &Report, to: &mut Exposition) {
        to.histogram(&table::LOOK_DURATION, &[], &self.looks);
        to.gauge(&table::LOOK_INTERVAL, &[], Duration::from_millis(report.interval_ms).as_secs_f64());
        if let Some(since) = self.last_look.and_then(|time| time.duration_since(UNIX_EPOCH).ok()) {
            to.gauge(&table::LAST_LOOK, &[], since.as_secs_f64());
        }
    }
}

/// What the eBPF programs saw, and what they did not. Kinds that have not happened are told as nothing, so that they can be
/// seen to begin.
fn watched(report: &Report, to: &mut Exposition) {
    to.counter(&table::FAULTS, &[("kind", "protected")], report.faults.protected);
    to.counter(&table::FAULTS, &[("kind", "missing")], report.faults.missing);
    for kind in Kind::ALL {
        let name = kind_name(kind);
        to.counter(&table::CALLS, &[("state", &name)], report.calls.get(&name).copied().unwrap_or(0));
    }
    for question in &report.ebpf.questions {
        to.gauge(&table::QUESTIONS, &[("question", &question.name)], f64::from(u8::from(question.runs)));
    }
    let LostReport { processes, lifecycle, blocks, calls, sockets, faults, connections, undecoded, missed } =
        report.lost;
    for (kind, lost) in [
        ("processes", processes),
        ("lifecycle", lifecycle),
        ("blocks", blocks),
        ("calls", calls),
        ("sockets", sockets),
        ("faults", faults),
        ("connections", connections),
        ("undecoded", undecoded),
        ("missed", missed),
    ] {
        to.counter(&table::LOST, &[("kind", kind)], lost);
    }
}

fn sockets(sockets: &SocketsReport, to: &mut Exposition) {
    for state in Connection::STATES {
        to.gauge(&table::SOCKETS, &[("state", state)], sockets.by_state.get(state).copied().unwrap_or(0) as f64);
    }
    to.counter(&table::SOCKET_CHANGES, &[], sockets.changes);
    to.counter(&table::SOCKET_SENT, &[], sockets.sent_bytes);
    to.counter(&table::SOCKET_RECEIVED, &[], sockets.received_bytes);
    to.counter(&table::SOCKET_RETRANSMITS, &[], sockets.retransmits);
    to.gauge(&table::SOCKET_UNREAD, &[], sockets.unread_bytes as f64);
    to.gauge(&table::SOCKET_UNACKNOWLEDGED, &[], sockets.unacknowledged_bytes as f64);
}

fn refusals(report: &Report, to: &mut Exposition) {
    let (option, good): (Vec<_>, Vec<_>) = report.refusals.iter().partition(|refusal| refusal.option.is_some());
    to.gauge(&table::REFUSALS, &[("kind", "for_good")], good.len() as f64);
    to.gauge(&table::REFUSALS, &[("kind", "without_option")], option.len() as f64);
}

/// One number of it.
type Value = fn(&Share) -> u64;

/// What is told of one process, or of many together.
#[derive(Debug, Default, Clone, Copy)]
struct Share {
    memory: u64,
    written: u64,
    pending: u64,
    working_set: u64,
}

impl Share {
    fn of(process: &ProcessReport) -> Self {
        Self {
            memory: process.memory_bytes,
            written: process.written_bytes_per_second,
            pending: process.pending_bytes,
            working_set: process.working_set_bytes,
        }
    }

    fn and(self, more: Self) -> Self {
        Self {
            memory: self.memory + more.memory,
            written: self.written + more.written,
            pending: self.pending + more.pending,
            working_set: self.working_set + more.working_set,
        }
    }
}

/// The processes that have most memory, and the others together. By memory, because the order of what changes faster
/// would change all the time, and with it the series.
fn processes(all: &[ProcessReport], to: &mut Exposition) {
    let mut by_size: Vec<&ProcessReport> = all.iter().collect();
    by_size.sort_by_key(|process| (Reverse(process.memory_bytes), process.pid));
    let (own, others) = by_size.split_at(by_size.len().min(LARGEST));
    let mut shares: Vec<(String, &str, Share)> =
        own.iter().map(|process| (process.pid.to_string(), process.comm.as_str(), Share::of(process))).collect();
    let rest = others.iter().map(|process| Share::of(process)).fold(Share::default(), Share::and);
    shares.push(("other".to_owned(), "", rest));
    let metrics: [(&'static Metric, Value); 4] = [
        (&table::PROCESS_MEMORY, |share| share.memory),
        (&table::PROCESS_WRITTEN_RATE, |share| share.written),
        (&table::PROCESS_PENDING, |share| share.pending),
        (&table::PROCESS_WORKING_SET, |share| share.working_set),
    ];
    for (metric, value) in metrics {
        for (process, comm, share) in &shares {
            to.gauge(metric, &[("process", process), ("comm", comm)], value(share) as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::report::{EbpfReport, QuestionReport};
    use super::*;

    fn report(processes: i32) -> Report {
        let process = |n: i32| ProcessReport {
            pid: 100 + n,
            comm: format!("worker \"{n}\""),
            memory_bytes: 1000 + n as u64,
            written_bytes_per_second: 1,
            ..ProcessReport::default()
        };
        let question = QuestionReport { name: "memory".into(), runs: true, why_not: None };
        let ebpf = EbpfReport { questions: vec![question], ..EbpfReport::default() };
        Report { pid: 100, processes: (0..processes).map(process).collect(), ebpf, ..Report::default() }
    }

    #[test]
    fn all_that_the_table_has_is_told() {
        let mut measures = Measures::default();
        measures.looked(1, Duration::from_millis(1));
        measures.told(&Run {
            phases: vec![(crate::metrics::Phase::Frozen, Duration::from_millis(1))],
            failure: None,
            ..Run::failed(Operation::Dump, crate::metrics::Reason::Other)
        });
        let text = measures.exposition(&report(3)).text();
        let told: BTreeSet<&str> =
            text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
        let names: Vec<String> = table::ALL.iter().map(|metric| metric.full_name()).collect();
        assert_eq!(told, names.iter().map(String::as_str).collect());
    }

    #[test]
    fn the_largest_have_series_of_their_own() {
        let text = Measures::default().exposition(&report(500)).text();
        let series = text.lines().filter(|line| !line.starts_with('#')).count();
        assert!(series < 2000, "{series} series");
        let of = |process: &str| {
            let start = format!("criu_ebpf_process_written_bytes_per_second{{tree=\"100\",process=\"{process}\"");
            text.lines().find(|line| line.starts_with(&start)).map(|line| line.rsplit(' ').next().unwrap_or_default())
        };
        assert_eq!(of("599"), Some("1.0"));
        assert_eq!(of("580"), Some("1.0"));
        assert_eq!(of("579"), None);
        assert_eq!(of("other"), Some("480.0"));
    }
}
