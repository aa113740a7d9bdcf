//! What tells a tree's processes apart from the engine and from each other, and is taken for granted everywhere else:
//! all live in the engine's namespaces (clocks excepted), each process has an address space, descriptors, directories
//! and signal actions of its own, and its threads share them. A tree that is otherwise is refused.

use std::collections::HashMap;
use std::path::PathBuf;

use nix::unistd::Pid;

use super::Refusal;
use super::file::Capture;
use crate::freeze::{Frozen, FrozenProcess};
use crate::kernel::SysResult;
use crate::kernel::proc::{LinkDir, Shown};
use crate::kernel::surveyor::Identity;
use crate::kernel::sys::{Compare, kcmp};

/// A kind of namespace: its file in /proc/PID/ns, its name for readers.
type Kind = (&'static str, &'static str);

/// Those that a process has to share with the engine. (Its descriptors and paths are looked at with the engine's eyes.)
const SHARED: [Kind; 8] = [
    ("mnt", "mount"),
    ("pid", "pid"),
    ("net", "network"),
    ("user", "user"),
    ("uts", "UTS"),
    ("ipc", "IPC"),
    ("cgroup", "cgroup"),
    ("pid_for_children", "pid"),
];
/// Those that one thread alone can leave.
const BY_THREAD: [Kind; 4] = [("mnt", "mount"), ("net", "network"), ("uts", "UTS"), ("ipc", "IPC")];
const ADVICE: &str = "run criu-ebpf inside of it (nsenter), where it sees what the process sees";

/// Names of the namespaces of a process, frozen or not, that are not the engine's.
pub fn foreign_to_engine(pid: Pid) -> SysResult<Vec<String>> {
    let here = Namespaces::of("self")?;
    foreign_namespaces(&Namespaces::of(pid)?, &SHARED.map(|(file, _)| here.get(file)))
}

/// By what the threads of a process can be told to share all that they mostly do; of as many as are known.
pub type Identities = HashMap<Pid, Identity>;

/// Enters refusals for all that is otherwise.
pub fn refuse(cx: &mut Capture<'_>, frozen: &Frozen, identities: &HashMap<Pid, Identities>) -> SysResult<()> {
    let here = Namespaces::of("self")?;
    let own = SHARED.map(|(file, _)| here.get(file));
    let clock = Namespaces::of(frozen.processes[0].shown.by)?.get("time").ok();
    for process in frozen.alive() {
        let namespaces = Namespaces::of(process.shown.by)?;
        let found = foreign_namespaces(&namespaces, &own)?;
        if !found.is_empty() {
            cx.refuse(refuse_namespaces(process.pid, &found));
        }
        if namespaces.get("time").ok() != clock {
            let what = "its clocks are not those of the tree's first process (time namespace)".to_owned();
            cx.refuse(refusal(process.pid, what, "dump that part of the tree by itself"));
        }
        refuse_threads(cx, process, identities.get(&process.pid))?;
    }
    let alive: HashMap<Pid, Shown> = frozen.alive().map(|process| (process.pid, process.shown)).collect();
    for process in frozen.alive() {
        if let Some(&parent) = alive.get(&process.stat.ppid) {
            refuse_shared(cx, parent, process.shown)?;
        }
    }
    Ok(())
}

/// The refusal of a process in namespaces of these names.
pub fn refuse_namespaces(pid: Pid, names: &[String]) -> Refusal {
    refusal(pid, format!("it is in another {} namespace than criu-ebpf", names.join(", ")), ADVICE)
}

fn refusal(pid: Pid, what: String, advice: &str) -> Refusal {
    Refusal { pid: pid.as_raw(), fd: None, what, advice: advice.to_owned() }
}

/// The namespaces of a task, each as `kind:[number]`. A kernel without a kind of namespace has one for all.
struct Namespaces(LinkDir);

impl Namespaces {
    fn of(task: impl std::fmt::Display) -> SysResult<Self> {
        LinkDir::open(format!("/proc/{task}/ns")).map(Self)
    }

    fn get(&self, kind: &str) -> SysResult<PathBuf> {
        self.0.link(kind)
    }
}

fn foreign_namespaces(namespaces: &Namespaces, own: &[SysResult<PathBuf>; 8]) -> SysResult<Vec<String>> {
    let mut found: Vec<String> = Vec::new();
    for ((file, name), own) in SHARED.iter().zip(own) {
        let Ok(own) = own else { continue };
        let name = (*name).to_owned();
        if namespaces.get(file)? != *own && !found.contains(&name) {
            found.push(name);
        }
    }
    Ok(found)
}

/// Threads that have something of their own that threads mostly share.
fn refuse_threads(cx: &mut Capture<'_>, process: &FrozenProcess, identities: Option<&Identities>) -> SysResult<()> {
    let pid = process.pid;
    let [first, others @ ..] = &process.threads[..] else { return Ok(()) };
    if others.is_empty() {
        return Ok(());
    }
    let of = |tid: Pid| Namespaces::of(format!("{pid}/task/{tid}"));
    let leader = of(first.tid())?;
    let common = BY_THREAD.map(|(file, _)| leader.get(file));
    let identity = |tid: Pid| identities.and_then(|all| all.get(&tid));
    for thread in others {
        let tid = thread.tid();
        // Most of them are found the same at one look, where eBPF has it.
        if identity(tid).is_some() && identity(tid) == identity(first.tid()) {
            continue;
        }
        let namespaces = of(tid)?;
        for ((file, name), common) in BY_THREAD.iter().zip(&common) {
            if common.as_ref().is_ok_and(|common| namespaces.get(file).is_ok_and(|own| own != *common)) {
                let what = format!("its thread {tid} is in a {name} namespace of its own");
                cx.refuse(refusal(pid, what, "let the thread end, or come back (setns)"));
            }
        }
        for (what, name) in [(Compare::Files, "descriptors"), (Compare::Fs, "directories")] {
            if !kcmp(first.tid(), tid, what)?.is_eq() {
                let what = format!("its thread {tid} has {name} of its own (unshare)");
                cx.refuse(refusal(pid, what, "let the thread end before the dump"));
            }
        }
    }
    Ok(())
}

/// A process that has something in common with its parent that processes mostly have each.
fn refuse_shared(cx: &mut Capture<'_>, parent: Shown, process: Shown) -> SysResult<()> {
    let all = [
        (Compare::Vm, "memory"),
        (Compare::Files, "descriptors"),
        (Compare::Fs, "directories"),
        (Compare::Sighand, "signal actions"),
    ];
    let mut shared = Vec::new();
    for (what, name) in all {
        if kcmp(parent.by, process.by, what)?.is_eq() {
            shared.push(name);
        }
    }
    if !shared.is_empty() {
        let what = format!("it shares its {} with its parent {} (clone)", shared.join(", "), parent.pid);
        cx.refuse(refusal(process.pid, what, "use threads, or fork(2)"));
    }
    Ok(())
}
