//! The process tree: who is whose child, sessions, process groups, zombies.
//!
//! A session can only be entered by being born into it, or made by setsid(2). So who forks whom, and when, follows from
//! the sessions: a child that is in the session that its parent has left is forked before the parent's setsid; one whose
//! session's leader is a sibling is forked by that sibling with CLONE_PARENT. Leaders that are gone are stood in for by
//! helpers, which end when everybody is in place. setsid(2), setpgid(2), credentials(7).

use std::collections::{BTreeMap, BTreeSet, HashMap};

use nix::unistd::Pid;

use super::ObjectError;
use super::file::Planner;
use crate::call;
use crate::freeze::FrozenProcess;
use crate::image::proto::{CoreEntry, PstreeEntry};
use crate::image::{TaskState, references};
use crate::kernel::clone::{CloneArgs, SET_TID};
use crate::plan::{Call, Expect, Role, Stage, Structure, Task, TaskRef};

/// The tree as it was found.
pub fn capture(processes: &[FrozenProcess]) -> Vec<PstreeEntry> {
    processes
        .iter()
        .map(|p| {
            let mut threads: Vec<u32> = p.threads.iter().map(|t| t.tid().as_raw() as u32).collect();
            if !threads.contains(&(p.pid.as_raw() as u32)) {
                threads.insert(0, p.pid.as_raw() as u32);
            }
            let root = p.pid == processes[0].pid;
            PstreeEntry {
                pid: p.pid.as_raw() as u32,
                ppid: if root { 0 } else { p.stat.ppid.as_raw() as u32 },
                pgid: p.stat.pgid.as_raw() as u32,
                sid: p.stat.sid.as_raw() as u32,
                threads,
            }
        })
        .collect()
}

/// Sessions and groups of the tree whose leaders are outside of it.
pub fn foreign(processes: &[FrozenProcess]) -> (BTreeSet<Pid>, BTreeSet<Pid>) {
    let pids: BTreeSet<Pid> = processes.iter().map(|p| p.pid).collect();
    let outside = |id: Pid| !pids.contains(&id) && crate::kernel::proc::stat(id, None).is_ok_and(|s| s.pgid == id);
    let sessions = processes.iter().map(|p| p.stat.sid).filter(|&sid| outside(sid) || sid.as_raw() == 0).collect();
    let groups = processes.iter().map(|p| p.stat.pgid).filter(|&g| outside(g) || g.as_raw() == 0).collect();
    (sessions, groups)
}

/// Who creates a process, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Birth {
    /// The engine.
    Root,
    /// Its parent, before the parent's setsid.
    Before(i32),
    /// Its parent, after that.
    After(i32),
    /// A sibling (or helper) in its session, with CLONE_PARENT.
    Sibling(i32),
}

impl Birth {
    fn creator(self) -> Option<i32> {
        match self {
            Birth::Root => None,
            Birth::Before(pid) | Birth::After(pid) | Birth::Sibling(pid) => Some(pid),
        }
    }
}

struct Tree<'a> {
    entries: BTreeMap<i32, &'a PstreeEntry>,
    order: Vec<i32>,
    root: i32,
    births: HashMap<i32, Birth>,
    /// Stand-ins for leaders that are gone: pid, parent, whether of a session.
    helpers: Vec<Helper>,
    /// Whether session and group of the root are the caller's.
    shell_job: bool,
}

#[derive(Debug, Clone, Copy)]
struct Helper {
    pid: i32,
    parent: i32,
    session: bool,
}

/// Plans the tasks of the tree and how they come to be. `cores` are the leaders' and threads' messages by tid.
pub fn plan(cx: &mut Planner<'_>, entries: &[PstreeEntry], cores: &HashMap<i32, CoreEntry>) -> Result<(), ObjectError> {
    let tree = Tree::new(entries, cx.options.shell_job)?;
    for &pid in &tree.creation_order()? {
        add_task(cx, &tree, pid, cores)?;
    }
    for &pid in &tree.order {
        plan_births(cx, &tree, pid, cores)?;
    }
    for helper in &tree.helpers {
        plan_births(cx, &tree, helper.pid, cores)?;
        plan_helper(cx, helper);
    }
    plan_groups(cx, &tree)?;
    for entry in entries {
        plan_end(cx, entry, cores);
    }
    Ok(())
}

impl<'a> Tree<'a> {
    fn new(entries: &'a [PstreeEntry], shell_job: bool) -> Result<Self, ObjectError> {
        let root = entries.first().ok_or_else(|| ObjectError::contradiction("pstree.img is empty"))?.pid as i32;
        let by_pid: BTreeMap<i32, &PstreeEntry> = entries.iter().map(|e| (e.pid as i32, e)).collect();
        let order = entries.iter().map(|e| e.pid as i32).collect();
        let mut tree = Self { entries: by_pid, order, root, births: HashMap::new(), helpers: Vec::new(), shell_job };
        tree.check_root()?;
        for pid in tree.order.clone() {
            let birth = tree.birth(pid)?;
            tree.births.insert(pid, birth);
        }
        tree.group_helpers()?;
        Ok(tree)
    }

    fn sid(&self, pid: i32) -> i32 {
        self.entries.get(&pid).map_or(pid, |e| e.sid as i32)
    }

    fn parent(&self, pid: i32) -> i32 {
        self.entries.get(&pid).map_or(0, |e| e.ppid as i32)
    }

    fn check_root(&self) -> Result<(), ObjectError> {
        if self.sid(self.root) != self.root && !self.shell_job {
            return Err(ObjectError::Unsupported {
                what: format!("process {}, whose session {} is not part of the dump", self.root, self.sid(self.root)),
                advice: "give --shell-job to restore it into the session of the caller",
            });
        }
        Ok(())
    }

    /// The session that a process is in when it is born.
    fn birth_session(&self, pid: i32) -> i32 {
        // A leader is born into whatever session its early children must be in.
        let early = self
            .entries
            .values()
            .find(|e| e.ppid as i32 == pid && e.sid as i32 != self.sid(pid) && e.sid != e.pid && self.sid(pid) == pid);
        match early {
            Some(child) if !self.has_sibling_leader(child) => child.sid as i32,
            _ => self.sid(pid),
        }
    }

    /// Whether a process's session was made by one of its siblings, dead or alive.
    fn has_sibling_leader(&self, entry: &PstreeEntry) -> bool {
        match self.entries.get(&(entry.sid as i32)) {
            Some(leader) => leader.ppid == entry.ppid,
            // A dead leader: its helper is made a sibling, unless the parent's own first session is meant.
            None => self.sid(entry.ppid as i32) != entry.ppid as i32 || !self.inherits_outside(entry),
        }
    }

    fn inherits_outside(&self, entry: &PstreeEntry) -> bool {
        self.shell_job && entry.sid as i32 == self.sid(self.root)
    }

    fn birth(&mut self, pid: i32) -> Result<Birth, ObjectError> {
        if pid == self.root {
            return Ok(Birth::Root);
        }
        let entry = self.entries[&pid];
        let (parent, sid) = (entry.ppid as i32, entry.sid as i32);
        if !self.entries.contains_key(&parent) {
            return Err(ObjectError::contradiction(format!("process {pid} has no parent in the dump")));
        }
        let wanted = if sid == pid { self.birth_session(pid) } else { sid };
        if sid == pid && wanted == pid || wanted == self.sid(parent) {
            return Ok(Birth::After(parent));
        }
        if self.sid(parent) == parent && wanted == self.birth_session(parent) {
            return Ok(Birth::Before(parent));
        }
        if let Some(leader) = self.entries.get(&wanted) {
            if leader.ppid as i32 == parent {
                return Ok(Birth::Sibling(wanted));
            }
        } else {
            if !self.helpers.iter().any(|h| h.pid == wanted) {
                self.helpers.push(Helper { pid: wanted, parent, session: true });
                self.births.insert(wanted, Birth::After(parent));
            }
            if self.helpers.iter().any(|h| h.pid == wanted && h.parent == parent) {
                return Ok(Birth::Sibling(wanted));
            }
        }
        Err(ObjectError::Unsupported {
            what: format!("process {pid}, child of {parent}, in session {wanted}"),
            advice: "its session's leader is neither an ancestor nor a sibling; such trees cannot be rebuilt",
        })
    }

    /// Groups whose leader is gone get a helper, in the session of a member.
    fn group_helpers(&mut self) -> Result<(), ObjectError> {
        for pid in self.order.clone() {
            let entry = self.entries[&pid];
            let group = entry.pgid as i32;
            let known = self.entries.contains_key(&group) || self.helpers.iter().any(|h| h.pid == group);
            if known || self.is_callers_group(entry) {
                continue;
            }
            if entry.sid == entry.pid {
                return Err(ObjectError::contradiction(format!("session leader {pid} is in group {group}")));
            }
            self.helpers.push(Helper { pid: group, parent: pid, session: false });
            self.births.insert(group, Birth::After(pid));
        }
        Ok(())
    }

    fn is_callers_group(&self, entry: &PstreeEntry) -> bool {
        self.shell_job
            && entry.pgid == self.entries[&self.root].pgid
            && !self.entries.contains_key(&(entry.pgid as i32))
    }

    /// Everybody after their creators.
    fn creation_order(&self) -> Result<Vec<i32>, ObjectError> {
        let mut order = Vec::with_capacity(self.births.len());
        let mut placed = BTreeSet::new();
        let all: Vec<i32> = self.order.iter().copied().chain(self.helpers.iter().map(|h| h.pid)).collect();
        while placed.len() < all.len() {
            let before = placed.len();
            for &pid in &all {
                let ready = self.births[&pid].creator().is_none_or(|c| placed.contains(&c));
                if ready && placed.insert(pid) {
                    order.push(pid);
                }
            }
            if placed.len() == before {
                return Err(ObjectError::contradiction("processes that would have to create each other"));
            }
        }
        Ok(order)
    }
}

fn add_task(
    cx: &mut Planner<'_>,
    tree: &Tree<'_>,
    pid: i32,
    cores: &HashMap<i32, CoreEntry>,
) -> Result<(), ObjectError> {
    let ended = cores.get(&pid).is_none_or(TaskState::is_gone);
    let helper = tree.helpers.iter().find(|h| h.pid == pid);
    let parent = helper.map_or_else(|| tree.parent(pid), |h| h.parent);
    let role = if ended || helper.is_some() { Role::Ends } else { Role::Leader };
    let task = Task::new(Pid::from_raw(pid), Pid::from_raw(pid), cx.tasks.get(&parent).copied(), role);
    cx.plan.tasks.push(task);
    if cx.tasks.insert(pid, TaskRef(cx.plan.tasks.len() - 1)).is_some() {
        return Err(ObjectError::contradiction(format!("two tasks with id {pid}")));
    }
    Ok(())
}

/// A call that creates a task with an id of our choice.
pub fn clone_call(plan: &crate::plan::Plan, creates: TaskRef, flags: u64, exit_signal: u64, why: String) -> Call {
    let tid = plan.tasks[creates.0].tid.as_raw();
    let args = CloneArgs { flags, exit_signal, set_tid_size: 1, ..CloneArgs::default() };
    let bytes = args.bytes();
    let size = bytes.len();
    let args = Structure { bytes, pointers: vec![(SET_TID, tid.to_le_bytes().to_vec())], ..Structure::default() };
    let mut call = call!(SYS_clone3(args, size), why);
    call.expect = Expect::Exactly(tid as u64);
    call.creates = Some(creates);
    call
}

fn plan_births(
    cx: &mut Planner<'_>,
    tree: &Tree<'_>,
    pid: i32,
    cores: &HashMap<i32, CoreEntry>,
) -> Result<(), ObjectError> {
    let task = cx.tasks[&pid];
    let leads_session = tree
        .entries
        .get(&pid)
        .map_or_else(|| tree.helpers.iter().any(|h| h.pid == pid && h.session), |e| e.sid == e.pid);
    let mut born: Vec<(i32, Birth)> =
        tree.births.iter().filter(|(_, b)| b.creator() == Some(pid)).map(|(&child, &b)| (child, b)).collect();
    born.sort_by_key(|(child, _)| *child);
    let (early, late): (Vec<_>, Vec<_>) = born.into_iter().partition(|(_, b)| matches!(b, Birth::Before(_)));
    for (child, birth) in early {
        push_birth(cx, tree, task, child, birth, exit_signal(cores, child)?);
    }
    if leads_session {
        cx.plan.push(task, Stage::Tree, call!(SYS_setsid(), "a session of its own").giving(pid as u64));
    } else if tree.entries.get(&pid).is_none_or(|e| e.pgid == e.pid) {
        cx.plan.push(task, Stage::Tree, call!(SYS_setpgid(0u64, 0u64), "a process group of its own"));
    }
    for (child, birth) in late {
        push_birth(cx, tree, task, child, birth, exit_signal(cores, child)?);
    }
    Ok(())
}

/// What its parent gets at the end of a process. Stand-ins have the usual one.
fn exit_signal(cores: &HashMap<i32, CoreEntry>, pid: i32) -> Result<u64, ObjectError> {
    let own = cores.get(&pid).and_then(|core| core.tc.as_ref()).and_then(|tc| tc.exit_signal);
    match own {
        None => Ok(libc::SIGCHLD as u64),
        Some(signal) if signal <= 64 => Ok(signal.into()),
        Some(signal) => Err(ObjectError::contradiction(format!("process {pid} ends with signal {signal}"))),
    }
}

fn push_birth(cx: &mut Planner<'_>, tree: &Tree<'_>, task: TaskRef, child: i32, birth: Birth, exit_signal: u64) {
    let creates = cx.tasks[&child];
    let helper = tree.helpers.iter().any(|h| h.pid == child);
    // Whoever a helper creates with CLONE_PARENT takes its exit signal over, so it has the usual one.
    let (flags, signal) = match birth {
        Birth::Sibling(_) => (libc::CLONE_PARENT as u64, 0),
        _ => (0, exit_signal),
    };
    let what = if helper { "stand-in for a leader that is gone" } else { "child" };
    let call = clone_call(&cx.plan, creates, flags, signal, format!("{what} {child}"));
    cx.plan.push(task, Stage::Tree, call);
}

fn plan_helper(cx: &mut Planner<'_>, helper: &Helper) {
    let (task, parent) = (cx.tasks[&helper.pid], cx.tasks[&helper.parent]);
    cx.plan.push(task, Stage::Files, call!(SYS_exit_group(0u64), "its part is done"));
    let why = format!("collect the stand-in {}", helper.pid);
    let wait = call!(SYS_wait4(helper.pid, 0u64, libc::__WALL as u32, 0u64), why).giving(helper.pid as u64);
    cx.plan.push(parent, Stage::Files, wait);
    forget_end(cx, parent, "nobody hears of a stand-in's end");
}

/// Takes the signal that tells of a child's end from a task's queue.
fn forget_end(cx: &mut Planner<'_>, parent: TaskRef, why: &'static str) {
    let set = (1u64 << (libc::SIGCHLD - 1)).to_le_bytes().to_vec();
    let now = vec![0u8; 16];
    cx.plan.push(parent, Stage::Wiring, call!(SYS_rt_sigtimedwait(set, 0u64, now, 8u64), why).trying());
}

fn plan_groups(cx: &mut Planner<'_>, tree: &Tree<'_>) -> Result<(), ObjectError> {
    for entry in tree.entries.values() {
        let leads = entry.pgid == entry.pid || entry.sid == entry.pid;
        if !leads && !tree.is_callers_group(entry) {
            let why = format!("process group {}", entry.pgid);
            cx.plan.push(cx.tasks[&(entry.pid as i32)], Stage::Groups, call!(SYS_setpgid(0u64, entry.pgid), why));
        }
    }
    Ok(())
}

/// A process that had ended ends again, in the same way.
fn plan_end(cx: &mut Planner<'_>, entry: &PstreeEntry, cores: &HashMap<i32, CoreEntry>) {
    let gone = cores.get(&(entry.pid as i32)).filter(|core| TaskState::is_gone(core));
    let Some(core) = gone.and_then(|core| core.tc.as_ref()) else { return };
    let task = cx.tasks[&(entry.pid as i32)];
    let mut name = core.comm.clone();
    name.truncate(15);
    name.push(0);
    const PR_SET_NAME: u64 = 15;
    cx.plan.push(task, Stage::Files, call!(SYS_prctl(PR_SET_NAME, name), "name"));
    let (status, signal) = (core.exit_code >> 8 & 0xff, core.exit_code & 0x7f);
    if signal == 0 {
        let why = format!("it had ended with status {status}");
        cx.plan.push(task, Stage::Files, call!(SYS_exit_group(status), why));
    } else {
        let none = 0u64.to_le_bytes().to_vec();
        let why = format!("it had been killed by signal {signal}");
        let unblock = call!(SYS_rt_sigprocmask(libc::SIG_SETMASK, none, 0u64, 8u64), "let the signal through");
        cx.plan.push(task, Stage::Files, unblock);
        cx.plan.push(task, Stage::Files, call!(SYS_kill(entry.pid, signal), why));
    }
    // Its parent has heard of this end already, or will by what was pending.
    if let Some(parent) = cx.plan.task(task).parent {
        forget_end(cx, parent, "no second SIGCHLD for an old end");
    }
}

/// Plans the threads of a process.
pub fn plan_threads(cx: &mut Planner<'_>, entry: &PstreeEntry) -> Result<(), ObjectError> {
    const FLAGS: i32 = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM;
    let leader = cx.tasks[&(entry.pid as i32)];
    for &tid in references::threads(entry).iter().filter(|&&tid| tid != entry.pid) {
        let (id, pid) = (Pid::from_raw(tid as i32), Pid::from_raw(entry.pid as i32));
        let task = Task::new(id, pid, Some(leader), Role::Thread(leader));
        cx.plan.tasks.push(task);
        let creates = TaskRef(cx.plan.tasks.len() - 1);
        if cx.tasks.insert(tid as i32, creates).is_some() {
            return Err(ObjectError::contradiction(format!("two tasks with id {tid}")));
        }
        let call = clone_call(&cx.plan, creates, FLAGS as u64, 0, format!("thread {tid}"));
        cx.plan.push(leader, Stage::Threads, call);
    }
    Ok(())
}
