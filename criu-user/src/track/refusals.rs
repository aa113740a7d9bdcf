//! What would refuse a dump now: a dry look at a tree that runs on.
//!
//! Nothing is stopped, and hardly any descriptor taken: links of /proc/PID/fd, device numbers, protocols of sockets, names
//! of areas and namespaces tell the kinds that no dump can carry over, and whose other ends are outside of the tree. A dump
//! looks closer, with the tree frozen: it may find more, and has the last word.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sys::stat::SFlag;
use nix::unistd::Pid;

use super::report::{CallReport, RefusalReport};
use super::witness::now_unix_ms;
use crate::kernel::ebpf::watch::Connection;
use crate::kernel::pidfd::PidFd;
use crate::kernel::proc::{self, KeyValues, Shown};
use crate::kernel::{fd, survey, unix_diag};
use crate::object::tty::{self, Device};
use crate::object::{Refusal, apart, regfile, unsupported};

/// So many looks at the memory come to one dry look, unless something suspicious was done.
const EACH: u32 = 5;
/// One part in so many of its time may the session spend with dry looks.
const SHARE: u32 = 50;
/// How many refusals are reported: whoever has so many needs no longer list.
const MOST: usize = 100;

/// A refusal; the option with which it is none; the calls that lead to it, where it is no descriptor.
#[derive(Debug)]
struct Found {
    refusal: Refusal,
    option: Option<&'static str>,
    calls: &'static [&'static str],
}

impl Found {
    fn new(pid: Pid, fd: Option<i32>, what: impl Into<String>, advice: &str) -> Self {
        let refusal = Refusal { pid: pid.as_raw(), fd, what: what.into(), advice: advice.to_owned() };
        Self { refusal, option: None, calls: &[] }
    }

    fn unless(self, option: &'static str) -> Self {
        Self { option: Some(option), ..self }
    }

    fn by(self, calls: &'static [&'static str]) -> Self {
        Self { calls, ..self }
    }
}

/// What is kept from one dry look to the next.
#[derive(Debug, Default)]
pub struct DryLooks {
    until_next: u32,
    not_before: Option<Instant>,
    /// When each refusal was first seen.
    since: HashMap<Refusal, u64>,
    latest: Vec<Found>,
}

impl DryLooks {
    /// Has the next look at the memory come with a dry look.
    pub fn hurry(&mut self) {
        self.until_next = 0;
    }

    /// Looks, if it is time, and says what would refuse a dump of the tree below `root`.
    pub fn look(
        &mut self,
        root: Pid,
        tree: &BTreeSet<Pid>,
        connections: &[Connection],
        calls: &[CallReport],
    ) -> Vec<RefusalReport> {
        let begin = Instant::now();
        if self.until_next == 0 && self.not_before.is_none_or(|moment| begin >= moment) {
            self.latest = look(root, tree, connections);
            let took = begin.elapsed();
            self.until_next = EACH;
            self.not_before = Some(begin + (took * SHARE).min(Duration::from_secs(60)));
            tracing::debug!(found = self.latest.len(), ?took, "looked for what would refuse a dump");
        }
        self.until_next = self.until_next.saturating_sub(1);
        let now = now_unix_ms();
        let before = std::mem::take(&mut self.since);
        let mut reports = Vec::new();
        for found in &self.latest {
            let since = before.get(&found.refusal).copied().unwrap_or(now);
            self.since.insert(found.refusal.clone(), since);
            reports.push(report(found, since, calls));
        }
        reports
    }
}

fn report(found: &Found, since_unix_ms: u64, calls: &[CallReport]) -> RefusalReport {
    let Refusal { pid, fd, what, advice } = found.refusal.clone();
    let made = |call: &&CallReport| match fd {
        Some(fd) => call.result == i64::from(fd),
        None => call.pid == pid && found.calls.contains(&call.name.as_str()),
    };
    // A descriptor may be inherited: its number is the same then.
    let own = calls.iter().rev().filter(made).find(|call| call.pid == pid);
    let call = own.or_else(|| calls.iter().rev().find(made)).cloned();
    RefusalReport { pid, fd, what, advice, option: found.option.map(str::to_owned), since_unix_ms, call }
}

fn look(root: Pid, tree: &BTreeSet<Pid>, connections: &[Connection]) -> Vec<Found> {
    let mut found = Vec::new();
    let mut ends = Ends::default();
    for &pid in tree {
        let Some(shown) = Shown::find(pid) else { continue };
        look_at_process(shown, &mut found);
        look_at_descriptors(shown, &mut ends, &mut found);
        look_at_areas(shown, &mut found);
    }
    look_at_sessions(root, tree, &mut found);
    ends.look_outside(&mut found);
    for connection in connections.iter().filter(|c| ![Connection::LISTEN, Connection::CLOSE].contains(&c.state)) {
        let what = format!("TCP connection {} - {} ({})", connection.local, connection.remote, connection.state_name());
        let advice = "give --tcp-established to keep it, or --tcp-close to have it restored as a closed socket";
        found.push(Found::new(connection.pid, Some(connection.fd as i32), what, advice).unless("--tcp-established"));
    }
    found.sort_by_key(|found| (found.option.is_some(), found.refusal.pid, found.refusal.fd));
    found.truncate(MOST);
    found
}

fn look_at_process(shown: Shown, found: &mut Vec<Found>) {
    if let Ok(names) = apart::foreign_to_engine(shown.by)
        && !names.is_empty()
    {
        let refusal = apart::refuse_namespaces(shown.pid, &names);
        found.push(Found { refusal, option: None, calls: &["unshare", "setns", "clone", "clone3"] });
    }
    let tracer = KeyValues::status(shown.pid, shown.by).ok().and_then(|status| status.number("TracerPid", 10).ok());
    // The session itself traces a process for a moment only, and never while it looks.
    if let Some(tracer) = tracer.filter(|&tracer| tracer != 0) {
        let what = format!("process {tracer} traces it");
        found.push(Found::new(shown.pid, None, what, "end the debugger or tracer before the dump").by(&["ptrace"]));
    }
}

fn look_at_sessions(root: Pid, tree: &BTreeSet<Pid>, found: &mut Vec<Found>) {
    let is_outside =
        |id: Pid| id.as_raw() == 0 || !tree.contains(&id) && proc::stat(id, None).is_ok_and(|leader| leader.pgid == id);
    let stats: Vec<_> = tree.iter().filter_map(|&pid| proc::stat(pid, None).ok()).collect();
    let sessions: BTreeSet<Pid> = stats.iter().map(|stat| stat.sid).filter(|&sid| is_outside(sid)).collect();
    let groups: BTreeSet<Pid> = stats.iter().map(|stat| stat.pgid).filter(|&group| is_outside(group)).collect();
    for session in sessions {
        let what = format!("the session leader {session} is outside of the tree");
        let advice = "start the program with setsid(1), or give --shell-job";
        found.push(Found::new(root, None, what, advice).unless("--shell-job"));
    }
    for group in groups {
        let what = format!("the leader {group} of its process group is outside of the tree");
        let advice = "dump from the group's leader on, or give --shell-job";
        found.push(Found::new(root, None, what, advice).unless("--shell-job"));
    }
}

fn look_at_areas(shown: Shown, found: &mut Vec<Found>) {
    let Ok(areas) = survey::layout_of(shown.by) else { return };
    let known: BTreeMap<String, &str> = areas.iter().filter_map(unsupported::mapping).collect();
    for (what, advice) in known {
        let found_here = Found::new(shown.pid, None, what, advice);
        found.push(found_here.by(&["io_setup", "io_uring_setup", "perf_event_open", "bpf", "memfd_secret"]));
    }
}

/// A descriptor of a process.
type At = (Pid, i32);

/// What has another end, by inode or number: where it was met.
#[derive(Debug, Default)]
struct Ends {
    /// Ends of pipes that read, and that write.
    pipes: BTreeMap<u64, (Option<At>, Option<At>)>,
    unix: BTreeMap<u32, At>,
    slaves: BTreeMap<u32, At>,
    masters: BTreeSet<u32>,
}

fn look_at_descriptors(shown: Shown, ends: &mut Ends, found: &mut Vec<Found>) {
    for number in proc::descriptors(shown.by).unwrap_or_default() {
        let path = format!("/proc/{}/fd/{number}", shown.by);
        // Closed meanwhile.
        let Ok(link) = proc::link(&path) else { continue };
        let link = link.to_string_lossy();
        let at = (shown.pid, number);
        if let Some((what, advice)) = unsupported::by_link(&link) {
            // A file may have such a name as well.
            if !link.starts_with('/') || !Path::new(&*link).exists() {
                found.push(Found::new(shown.pid, Some(number), format!("{what} ({link}) cannot be dumped"), advice));
            }
        } else if let Some(inode) = inode(&link, "socket:[") {
            look_at_socket(at, &path, &link, inode as u32, ends, found);
        } else if let Some(inode) = inode(&link, "pipe:[") {
            let flags = KeyValues::fdinfo(shown.by, number).ok().and_then(|info| info.number("flags", 8).ok());
            let mode = flags.unwrap_or_default() as i32 & libc::O_ACCMODE;
            let (reader, writer) = ends.pipes.entry(inode).or_default();
            if mode != libc::O_WRONLY {
                reader.get_or_insert(at);
            }
            if mode != libc::O_RDONLY {
                writer.get_or_insert(at);
            }
        } else if link.starts_with('/') {
            look_at_device(shown, number, &path, &link, ends, found);
        }
    }
}

/// The number in `pipe:[123]`.
fn inode(link: &str, kind: &str) -> Option<u64> {
    link.strip_prefix(kind)?.strip_suffix(']')?.parse().ok()
}

fn look_at_socket(at: At, path: &str, link: &str, inode: u32, ends: &mut Ends, found: &mut Vec<Found>) {
    let Ok(protocol) = fd::protocol_of(path) else { return };
    if protocol.starts_with("UNIX") {
        ends.unix.entry(inode).or_insert(at);
    } else if let Some((what, advice)) = unsupported::by_protocol(&protocol) {
        found.push(Found::new(at.0, Some(at.1), format!("{what} ({link}) cannot be dumped"), advice).by(&["socket"]));
    }
}

fn look_at_device(shown: Shown, number: i32, path: &str, link: &str, ends: &mut Ends, found: &mut Vec<Found>) {
    let Ok(stat) = nix::sys::stat::stat(path) else { return };
    let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
    if kind != SFlag::S_IFCHR && kind != SFlag::S_IFBLK || regfile::plain_device(&stat) {
        return;
    }
    match Device::of(stat.st_rdev).filter(|_| kind == SFlag::S_IFCHR) {
        Some(Device::Slave) => {
            ends.slaves.entry(tty::slave_index(stat.st_rdev)).or_insert((shown.pid, number));
        }
        Some(Device::Master) => {
            let info = KeyValues::fdinfo(shown.by, number).ok();
            ends.masters.extend(info.and_then(|info| info.number("tty-index", 10).ok()).map(|index| index as u32));
        }
        Some(Device::Controlling) => {}
        Some(Device::Console | Device::Hardware) => {
            let what = format!("{link} is a terminal of this machine, not a pseudo-terminal");
            let advice = "run the program in a terminal of its own (tmux, screen, script), or close it before the dump";
            found.push(Found::new(shown.pid, Some(number), what, advice));
        }
        None => {
            let (major, minor) = (libc::major(stat.st_rdev), libc::minor(stat.st_rdev));
            let what = format!("the device {link} ({major}:{minor}) cannot be dumped: its driver keeps what it knows");
            found.push(Found::new(shown.pid, Some(number), what, unsupported::ADVICE));
        }
    }
}

impl Ends {
    /// What has its other end outside of the tree.
    fn look_outside(&self, found: &mut Vec<Found>) {
        for (index, &(pid, fd)) in self.slaves.iter().filter(|(index, _)| !self.masters.contains(index)) {
            let what = format!("the master of the terminal /dev/pts/{index} is outside of the tree");
            let advice = "give --shell-job if it is the terminal that the program was started in, or redirect the \
                          program's standard streams";
            found.push(Found::new(pid, Some(fd), what, advice).unless("--shell-job"));
        }
        for (inode, ends) in &self.pipes {
            let (which, (pid, fd)) = match ends {
                (Some(at), None) => ("write", *at),
                (None, Some(at)) => ("read", *at),
                _ => continue,
            };
            if other_end_is_held(pid, fd, which == "write") {
                let what = format!("the {which} end of pipe:[{inode}] is held by a process outside of the tree");
                let advice = format!(
                    "give --external pipe:[{inode}] and at the restore --inherit-fd fd[N]:pipe:[{inode}], or dump that process as well"
                );
                found.push(Found::new(pid, Some(fd), what, &advice).unless("--external"));
            }
        }
        if !self.unix.is_empty() {
            self.look_at_peers(found);
        }
    }

    fn look_at_peers(&self, found: &mut Vec<Found>) {
        let Ok(all) = unix_diag::all() else { return };
        for (inode, &(pid, fd)) in &self.unix {
            let Some(peer) = all.get(inode).and_then(|socket| socket.peer) else { continue };
            if peer == 0 || self.unix.contains_key(&peer) {
                continue;
            }
            let what = format!("the other end ({peer}) of unix socket {inode} is outside of the tree");
            let other = all.get(&peer);
            let is_named = other.is_some_and(|other| other.kind == libc::SOCK_DGRAM as u32 && !other.name.is_empty());
            found.push(if is_named {
                let advice = "give --ext-unix-sk to connect it to that name again";
                Found::new(pid, Some(fd), what, advice).unless("--ext-unix-sk")
            } else {
                Found::new(pid, Some(fd), what, "dump both ends together, or close it")
            });
        }
    }
}

/// Whether somebody has the other end of a pipe. It is the only case in which a descriptor is taken, for an instant.
fn other_end_is_held(pid: Pid, number: i32, reads: bool) -> bool {
    let Ok(end) = PidFd::open(pid).and_then(|pidfd| pidfd.get(number)) else { return false };
    let gone = if reads { PollFlags::POLLHUP } else { PollFlags::POLLERR };
    fd::poll_now(&end, PollFlags::empty()).is_ok_and(|said| !said.contains(gone))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(pid: i32, name: &str, result: i64) -> CallReport {
        CallReport { pid, name: name.to_owned(), result, ..CallReport::default() }
    }

    #[test]
    fn a_descriptor_is_explained_by_the_latest_call_that_gave_it() {
        let found = Found::new(Pid::from_raw(7), Some(5), "a thing", "close it");
        let calls = [call(7, "socket", 5), call(7, "io_uring_setup", 5), call(6, "bpf", 5), call(7, "bpf", 6)];
        assert_eq!(report(&found, 1, &calls).call.map(|call| call.name).as_deref(), Some("io_uring_setup"));
        // Inherited from a parent that made it.
        assert_eq!(report(&found, 1, &calls[2..]).call.map(|call| call.pid), Some(6));
        assert_eq!(report(&found, 1, &calls[3..]).call, None);
    }

    #[test]
    fn what_is_no_descriptor_is_explained_by_name() {
        let found = Found::new(Pid::from_raw(7), None, "a ring", "end it").by(&["io_setup"]);
        let calls = [call(7, "unshare", 0), call(8, "io_setup", 0)];
        assert_eq!(report(&found, 1, &calls).call, None);
        let calls = [call(7, "io_setup", 0), call(7, "unshare", 0)];
        assert_eq!(report(&found, 1, &calls).call.map(|call| call.name).as_deref(), Some("io_setup"));
    }

    #[test]
    fn inodes_are_read_from_links() {
        assert_eq!(inode("pipe:[42]", "pipe:["), Some(42));
        assert_eq!(inode("/pipe:[42]", "pipe:["), None);
        assert_eq!(inode("socket:[x]", "socket:["), None);
    }
}
