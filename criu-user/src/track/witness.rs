//! What the eBPF programs tell a session: who forks, executes and ends, which kinds of state are touched, how connections
//! move. Where they cannot be loaded the session does without, and says so.
//!
//! Nothing of it is believed where it matters: it says when to look, and what to show.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use tokio::io::unix::AsyncFd;

use super::report::{CallReport, EbpfReport, FaultsReport, LostReport, QuestionReport, SocketsReport};
use crate::kernel::ebpf::watch::{Call, Connection, Event, Kind, Questions, Tracked, Watch, What};
use crate::kernel::ebpf::{EbpfError, EbpfResult};
use crate::kernel::survey::{self, Vma, VmaName};
use crate::kernel::{proc, syscall_name, uffd};

/// Why nobody counts calls just now.
const UNWATCHED: &str = "nobody looks on; counting system calls slows every process of the machine";

/// What is asked, in this order, and under which name it is reported. System calls come last: they are counted only while
/// somebody looks on.
const QUESTIONS: [(Questions, &str); 4] = [
    (Questions::LIFECYCLE, "lifecycle"),
    (Questions::MEMORY, "memory"),
    (Questions::SOCKETS, "sockets"),
    (Questions::SYSCALLS, "syscalls"),
];
/// Where it stands in there.
const SYSCALLS: usize = 3;

/// How many suspicious calls are remembered.
const CALLS: usize = 64;
/// How many events are taken at once, so that whoever asks meanwhile does not wait for a program that never stops.
const AT_ONCE: usize = 1 << 14;
/// For how many calls at once the frames of the stack are looked up.
const STACKS_AT_ONCE: usize = 16;

/// What has happened to the tracked processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    /// A child was made.
    Forked {
        /// Its parent.
        parent: Pid,
        /// The child.
        child: Pid,
    },
    /// It has another program.
    Executed(Pid),
    /// It has ended.
    Ended(Pid),
    /// It made a call after which a dump may be refused.
    Suspicious(Pid),
}

/// What is known of one process.
#[derive(Debug, Clone, Default)]
pub struct Testimony {
    /// Its write faults.
    pub faults: FaultsReport,
    /// Its calls by kind of state touched.
    pub calls: BTreeMap<String, u64>,
    /// How often it has called execve(2).
    pub images: u32,
}

/// What is known of all.
#[derive(Debug, Clone, Default)]
pub struct Statement {
    /// By pid.
    pub processes: HashMap<Pid, Testimony>,
    /// Write faults of all, ended ones included.
    pub faults: FaultsReport,
    /// Calls of all, ended ones included.
    pub calls: BTreeMap<String, u64>,
    /// TCP sockets.
    pub sockets: SocketsReport,
    /// What could not be noted.
    pub lost: LostReport,
}

/// The programs, or why there are none, and what they have told so far.
#[derive(Debug)]
pub struct Witness {
    watch: Option<Watch>,
    report: EbpfReport,
    calls: VecDeque<CallReport>,
    last: Statement,
    /// What each socket had moved, to be able to go on counting when it is gone.
    moved: HashMap<u64, (u64, u64, u32)>,
    connections: Vec<Connection>,
    /// Whether the sockets that were there before are known.
    has_begun: bool,
}

impl Witness {
    /// Loads the programs and follows a tree.
    pub fn start(root: Pid) -> Self {
        let mut witness = Self::load();
        witness.follow_tree(root);
        witness
    }

    /// No programs at all, for this reason.
    pub fn absent(why: &str) -> Self {
        let questions = QUESTIONS.map(|(_, name)| QuestionReport {
            name: name.to_owned(),
            runs: false,
            why_not: Some(why.to_owned()),
        });
        Self {
            watch: None,
            report: EbpfReport { questions: questions.to_vec(), ..EbpfReport::default() },
            calls: VecDeque::new(),
            last: Statement::default(),
            moved: HashMap::new(),
            connections: Vec::new(),
            has_begun: false,
        }
    }

    /// Loads the programs, each question by itself: one that cannot be asked here does not take the others with it.
    fn load() -> Self {
        let mut watch = match Watch::start(Questions::empty()) {
            Ok(watch) => watch,
            Err(error) => {
                tracing::warn!(%error, "no eBPF programs: new processes are found by looking, not when they come into being");
                return Self::absent(&error.to_string());
            }
        };
        let mut witness = Self::absent("");
        for ((question, name), report) in QUESTIONS.iter().zip(&mut witness.report.questions).take(SYSCALLS) {
            let asked = watch.ask(watch.questions() | *question);
            report.runs = asked.is_ok();
            report.why_not = asked.err().map(|error| error.to_string());
            if let Some(why) = &report.why_not {
                tracing::warn!(question = name, why, "some eBPF programs cannot run here");
            }
        }
        witness.report.missing_tracepoints = watch.missing().iter().map(|&name| name.to_owned()).collect();
        witness.watch = Some(watch);
        witness.report.questions[SYSCALLS].why_not = Some(UNWATCHED.to_owned());
        witness
    }

    /// Counts system calls while somebody looks on, and not otherwise.
    pub fn be_watched(&mut self, is_watched: bool) {
        let report = &mut self.report.questions[SYSCALLS];
        let Some(watch) = self.watch.as_mut().filter(|_| report.runs != is_watched) else { return };
        // What failed once will fail again.
        if is_watched && report.why_not.as_deref() != Some(UNWATCHED) {
            return;
        }
        let questions = watch.questions();
        let asked = if is_watched { questions | Questions::SYSCALLS } else { questions - Questions::SYSCALLS };
        let outcome = watch.ask(asked);
        report.runs = is_watched && outcome.is_ok();
        report.why_not = match outcome {
            Ok(()) => (!is_watched).then(|| UNWATCHED.to_owned()),
            Err(error) => {
                tracing::warn!(%error, "system calls cannot be counted");
                Some(error.to_string())
            }
        };
    }

    /// Follows a process and its descendants.
    pub fn follow_tree(&mut self, root: Pid) {
        let Some(watch) = &mut self.watch else { return };
        match watch.follow_tree(root) {
            Ok(_) | Err(EbpfError::NoProcess { .. }) => {}
            Err(error) => self.give_up(&error),
        }
    }

    /// Follows a process that was found by looking; one that is followed already stays so.
    pub fn follow(&mut self, pid: Pid) {
        let Some(watch) = &mut self.watch else { return };
        match watch.follow(pid) {
            Ok(()) | Err(EbpfError::NoProcess { .. } | EbpfError::TooMany { .. }) => {}
            Err(error) => self.give_up(&error),
        }
    }

    /// Follows a process no more.
    pub fn forget(&mut self, pid: Pid) {
        if let Some(watch) = &mut self.watch {
            let _ = watch.forget(pid);
        }
    }

    /// Programs that do not do what they should are of no use any more.
    fn give_up(&mut self, error: &EbpfError) {
        tracing::warn!(%error, "the eBPF programs are given up");
        self.watch = None;
        for question in &mut self.report.questions {
            question.runs = false;
            question.why_not.get_or_insert_with(|| error.to_string());
        }
    }

    /// Whether forks, executions and ends are told.
    pub fn tells_of_lifecycle(&self) -> bool {
        self.watch.as_ref().is_some_and(|watch| watch.questions().contains(Questions::LIFECYCLE))
    }

    /// What becomes readable when there is news.
    pub fn readiness(&self) -> Option<AsyncFd<OwnedFd>> {
        let readiness = self.watch.as_ref()?.readiness();
        readiness.inspect_err(|error| tracing::warn!(%error, "events are only looked at with the memory")).ok()
    }

    /// Takes the news that are there, and tells whether these were all.
    pub fn hear(&mut self) -> (Vec<News>, bool) {
        let mut news = Vec::new();
        let mut stacks = 0;
        for _ in 0..AT_ONCE {
            let Some(event) = self.watch.as_mut().and_then(Watch::try_next) else { return (news, true) };
            match &event.what {
                What::Fork { child } => news.push(News::Forked { parent: event.pid, child: *child }),
                What::Exec { .. } => news.push(News::Executed(event.pid)),
                What::Exit { .. } => {
                    self.calls.retain(|call| call.pid != event.pid.as_raw());
                    news.push(News::Ended(event.pid));
                }
                What::Socket { .. } => self.last.sockets.changes += 1,
                What::Call(call) if is_ours(event.pid, call) => {}
                What::Call(call) => {
                    stacks += 1;
                    self.note(&event, call, stacks <= STACKS_AT_ONCE);
                    news.push(News::Suspicious(event.pid));
                }
                What::Thread { .. } | What::ThreadExit { .. } | What::FirstWrite { .. } | What::Moved { .. } => {}
            }
        }
        (news, false)
    }

    fn note(&mut self, event: &Event, call: &Call, name_frames: bool) {
        let areas = if name_frames { survey::layout_of(event.pid).unwrap_or_default() } else { Vec::new() };
        let name = syscall_name(call.number).into_owned();
        tracing::debug!(pid = event.pid.as_raw(), call = name, "after this a dump may be refused");
        if self.calls.len() == CALLS {
            self.calls.pop_front();
        }
        self.calls.push_back(CallReport {
            pid: event.pid.as_raw(),
            tid: event.tid.as_raw(),
            name,
            arguments: call.arguments.iter().map(|argument| format!("{argument:#x}")).collect(),
            detail: if call.detail == 0 { String::new() } else { format!("{:#x}", call.detail) },
            result: call.result,
            unix_ms: unix_ms(event.at),
            stack: call.stack.iter().map(|&address| frame(&areas, address)).collect(),
        });
    }

    /// The suspicious calls that are remembered, the latest last.
    pub fn calls(&self) -> Vec<CallReport> {
        self.calls.iter().cloned().collect()
    }

    /// What runs.
    pub fn report(&self) -> &EbpfReport {
        &self.report
    }

    /// TCP sockets as they were when last counted.
    pub fn connections(&self) -> &[Connection] {
        &self.connections
    }

    /// Counts anew what is counted in the kernel.
    pub fn count(&mut self) -> &Statement {
        if let Some(watch) = &mut self.watch {
            let counted = count_processes(watch, &mut self.last).and_then(|()| {
                self.last.lost = lost(watch)?;
                if watch.questions().contains(Questions::SOCKETS) {
                    self.connections = watch.connections()?;
                    count_sockets(&self.connections, &mut self.moved, self.has_begun, &mut self.last.sockets);
                    self.has_begun = true;
                }
                Ok(())
            });
            if let Err(error) = counted {
                self.give_up(&error);
            }
        }
        &self.last
    }
}

fn count_processes(watch: &mut Watch, last: &mut Statement) -> EbpfResult<()> {
    let mut now = HashMap::new();
    for process in watch.tracked()? {
        let before = last.processes.get(&process.pid).cloned().unwrap_or_default();
        let testimony = testify(watch, &process)?;
        last.faults.protected += testimony.faults.protected.saturating_sub(before.faults.protected);
        last.faults.missing += testimony.faults.missing.saturating_sub(before.faults.missing);
        for (kind, &count) in &testimony.calls {
            let before = before.calls.get(kind).copied().unwrap_or_default();
            *last.calls.entry(kind.clone()).or_default() += count.saturating_sub(before);
        }
        now.insert(process.pid, testimony);
    }
    last.processes = now;
    Ok(())
}

fn testify(watch: &mut Watch, process: &Tracked) -> EbpfResult<Testimony> {
    let mut calls = BTreeMap::new();
    if let Some(generations) = watch.generations(process.pid)? {
        let touched = Kind::ALL.iter().map(|&kind| (kind_name(kind), generations.touched(kind)));
        calls.extend(touched.filter(|&(_, count)| count > 0));
    }
    let faults = FaultsReport { protected: process.faults.protected, missing: process.faults.missing };
    Ok(Testimony { faults, calls, images: process.images })
}

/// How a kind of state is called in reports.
pub(super) fn kind_name(kind: Kind) -> String {
    format!("{kind:?}").to_lowercase()
}

fn count_sockets(
    connections: &[Connection],
    moved: &mut HashMap<u64, (u64, u64, u32)>,
    has_begun: bool,
    into: &mut SocketsReport,
) {
    into.by_state.clear();
    (into.unread_bytes, into.unacknowledged_bytes) = (0, 0);
    let mut now = HashMap::with_capacity(connections.len());
    for connection in connections {
        *into.by_state.entry(connection.state_name().to_owned()).or_default() += 1;
        // What waits at a listening socket are connections, not bytes.
        if connection.state != Connection::LISTEN {
            into.unread_bytes += u64::from(connection.unread);
            into.unacknowledged_bytes += u64::from(connection.unacknowledged);
        }
        let counts = (connection.sent, connection.received, connection.retransmits);
        // What sockets had moved before tracking began is not counted.
        let before = moved.get(&connection.inode).copied().unwrap_or(if has_begun { (0, 0, 0) } else { counts });
        into.sent_bytes += counts.0.saturating_sub(before.0);
        into.received_bytes += counts.1.saturating_sub(before.1);
        into.retransmits += u64::from(counts.2.saturating_sub(before.2));
        now.insert(connection.inode, counts);
    }
    *moved = now;
}

fn lost(watch: &mut Watch) -> EbpfResult<LostReport> {
    let lost = watch.lost()?;
    Ok(LostReport {
        processes: lost.processes,
        lifecycle: lost.lifecycle,
        blocks: lost.blocks,
        calls: lost.calls,
        sockets: lost.sockets,
        faults: lost.faults,
        connections: lost.connections,
        undecoded: lost.undecoded,
        missed: lost.missed,
    })
}

/// Whether the call was made by the agent, to bring the means of tracking in: its descriptor is gone again.
fn is_ours(pid: Pid, call: &Call) -> bool {
    call.number == libc::SYS_userfaultfd
        && call.arguments[0] == uffd::MAKE_FLAGS
        && !proc::link(&format!("/proc/{pid}/fd/{}", call.result))
            .is_ok_and(|link| link.as_os_str() == "anon_inode:[userfaultfd]")
}

/// Where a return address is: the file's name and the offset in the file, which is what addr2line(1) asks for.
fn frame(areas: &[Vma], address: u64) -> String {
    let area = areas.iter().find(|area| (area.start..area.end).contains(&address));
    let file = area.and_then(|area| match &area.name {
        VmaName::File(path) => {
            Some((Path::new(path).file_name()?.to_string_lossy(), address - area.start + area.offset))
        }
        _ => None,
    });
    file.map_or_else(|| format!("{address:#x}"), |(name, offset)| format!("{name}+{offset:#x}"))
}

/// A moment of the monotonic clock in milliseconds since 1970.
fn unix_ms(at: Duration) -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(at, Duration::from);
    now_unix_ms().saturating_sub(now.saturating_sub(at).as_millis() as u64)
}

/// Milliseconds since 1970.
pub fn now_unix_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    fn connection(inode: u64, sent: u64, retransmits: u32) -> Connection {
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        Connection {
            inode,
            cookie: None,
            pid: Pid::from_raw(1),
            fd: 3,
            state: 1,
            local: nowhere,
            remote: nowhere,
            sent,
            received: 2 * sent,
            retransmits,
            unread: 5,
            unacknowledged: 7,
        }
    }

    #[test]
    fn sockets_that_were_there_before_count_from_the_first_look_on() {
        let (mut moved, mut total) = (HashMap::new(), SocketsReport::default());
        count_sockets(&[connection(1, 1000, 3)], &mut moved, false, &mut total);
        assert_eq!((total.sent_bytes, total.received_bytes, total.retransmits), (0, 0, 0));
        count_sockets(&[connection(1, 1010, 4), connection(2, 30, 1)], &mut moved, true, &mut total);
        assert_eq!((total.sent_bytes, total.received_bytes, total.retransmits), (40, 80, 2));
        assert_eq!((total.unread_bytes, total.unacknowledged_bytes, total.by_state["established"]), (10, 14, 2));
        count_sockets(&[], &mut moved, true, &mut total);
        assert_eq!((total.sent_bytes, total.unread_bytes), (40, 0), "what was sent stays sent");
        assert!(total.by_state.is_empty());
    }

    #[test]
    fn kinds_have_names_of_one_word() {
        for kind in Kind::ALL {
            assert!(kind_name(kind).bytes().all(|byte| byte.is_ascii_lowercase()));
        }
    }
}
