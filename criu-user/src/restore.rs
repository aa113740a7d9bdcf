//! A restore: images become a [`Plan`], the plan is carried out by a crew.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;
use tracing::info;

use crate::execute::{self, ExecuteError};
use crate::image::proto::{
    CoreEntry, FileEntry, FsEntry, MmEntry, PstreeEntry, RestoreStatsEntry, StatsEntry, TaskKobjIdsEntry, TimensEntry,
};
use crate::image::{ImageDir, ImageError, ImageKind, references};
use crate::object::cgroup::{Manage, NewRoot};
use crate::object::file::{Planner, Shelf, read_table};
use crate::object::outside::Inherit;
use crate::object::tcp::NetworkLock;
use crate::object::{ObjectError, cgroup, clocks, creds, fs, locks, memory, shmem, task, tree, waits};
use crate::plan::Plan;

/// What to restore, and how.
#[derive(Debug, Clone)]
pub struct RestoreOptions {
    /// Where the images are.
    pub images_dir: PathBuf,
    /// Where logs and statistics go.
    pub work_dir: PathBuf,
    /// Whether the tree joins the session of the caller.
    pub shell_job: bool,
    /// Whether the root becomes a child of the engine's parent.
    pub sibling: bool,
    /// Whether the tree stays stopped.
    pub leave_stopped: bool,
    /// Whether changed files are accepted.
    pub skip_file_validation: bool,
    /// Whether datagram sockets are connected to peers outside again.
    pub ext_unix_sk: bool,
    /// Whether connections come back closed.
    pub tcp_close: bool,
    /// Whether connections come back as they were.
    pub tcp_established: bool,
    /// How the packets of connections are held meanwhile.
    pub network_lock: NetworkLock,
    /// Whether the tree sees the host's clocks.
    pub host_clock: bool,
    /// Descriptors that stand for what is outside of the tree.
    pub inherit: Vec<Inherit>,
    /// What is done about control groups.
    pub manage_cgroups: Manage,
    /// Other groups for those that the root of the tree was in.
    pub cgroup_root: Vec<NewRoot>,
}

/// Why a restore failed. Nothing of the tree is left over.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// An image cannot be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The images cannot be made into a plan.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// The plan cannot be carried out.
    #[error(transparent)]
    Execute(#[from] ExecuteError),
}

/// What a restore came to.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// The root of the tree.
    pub pid: i32,
    /// Tasks, threads included.
    pub tasks: usize,
    /// System calls that they made.
    pub calls: usize,
    /// How long reading and planning took.
    pub planning: Duration,
    /// All in all.
    pub total: Duration,
}

/// Restores a tree, and gives its root.
pub fn restore(options: &RestoreOptions) -> Result<Summary, RestoreError> {
    let begin = Instant::now();
    let dir = ImageDir::open(&options.images_dir)?;
    let plan = plan(&dir, options)?;
    let planning = begin.elapsed();
    let calls = plan.tasks.iter().flat_map(|t| &t.calls).map(|(_, c)| c.len()).sum();
    info!(tasks = plan.tasks.len(), calls, took = ?planning, "planned");
    let pid = execute::execute(&plan, options)?;
    let summary = Summary { pid: pid.as_raw(), tasks: plan.tasks.len(), calls, planning, total: begin.elapsed() };
    let stats = StatsEntry {
        dump: None,
        restore: Some(RestoreStatsEntry {
            forking_time: 0,
            restore_time: summary.total.as_micros() as u32,
            ..RestoreStatsEntry::default()
        }),
    };
    crate::image::write_service(&options.work_dir, ImageKind::StatsRestore, &stats)?;
    info!(pid = summary.pid, total = ?summary.total, "restore finished");
    Ok(summary)
}

/// Everything that belongs to one live process.
struct ProcessImages {
    entry: PstreeEntry,
    core: CoreEntry,
    mm: MmEntry,
    fs: FsEntry,
    ids: TaskKobjIdsEntry,
}

/// Makes the plan of a restore.
pub fn plan(dir: &ImageDir, options: &RestoreOptions) -> Result<Plan, RestoreError> {
    let entries: Vec<PstreeEntry> = dir.read_all(ImageKind::Pstree)?;
    references::tree(&dir.path_of(ImageKind::Pstree), &entries)?;
    let files: Vec<FileEntry> = dir.read_all(ImageKind::Files)?;
    references::descriptions(&dir.path_of(ImageKind::Files), &files)?;
    let cores = read_cores(dir, &entries)?;
    let mut cx = Planner {
        dir,
        options,
        plan: Plan::default(),
        files: files.into_iter().map(|f| (f.id, f)).collect(),
        refs: HashMap::new(),
        holders: Default::default(),
        cloexec: Default::default(),
        mapped: HashMap::new(),
        tasks: HashMap::new(),
        shelf: Shelf::default(),
    };
    let processes = read_processes(dir, &entries, &cores)?;
    cx.plan.connections.gate = dir.inventory()?.gate;
    let own = creds::own()?;
    if let Some(time) = dir.read_optional::<TimensEntry>(ImageKind::Timens.id(timens_id(&processes)))? {
        let at_dump = clocks::plan(&time)?;
        waits::remember(&mut cx, at_dump);
        cx.plan.clocks = (!options.host_clock).then_some(at_dump);
    }
    let root = processes.first().map(|process| &process.core);
    let root_set = root.and_then(|core| core.thread_core.as_ref()?.cg_set.or(core.tc.as_ref()?.cg_set));
    cgroup::plan(&mut cx, root_set)?;
    tree::plan(&mut cx, &entries, &cores)?;
    for process in &processes {
        tree::plan_threads(&mut cx, &process.entry)?;
    }
    for process in &processes {
        shmem::note_sizes(&mut cx, &process.mm.vmas);
    }
    for process in &processes {
        plan_process(&mut cx, process, &cores, &own)?;
    }
    cx.wiring()?;
    let used = cx.holders.values().flatten().map(|&(_, fd)| fd + 1).max().unwrap_or(0);
    cx.plan.first_free_fd = cx.plan.first_free_fd.max(used).max(3);
    locks::plan(&mut cx)?;
    Ok(cx.plan)
}

/// Names of time namespace images go by the namespace's id; ours is always 0 (the kernel numbers none of ours).
fn timens_id(processes: &[ProcessImages]) -> u64 {
    processes.first().and_then(|p| p.ids.time_ns_id).unwrap_or(0).into()
}

fn read_cores(dir: &ImageDir, entries: &[PstreeEntry]) -> Result<HashMap<i32, CoreEntry>, RestoreError> {
    let mut cores = HashMap::new();
    for entry in entries {
        for tid in entry.threads.iter().copied().chain([entry.pid]) {
            if let std::collections::hash_map::Entry::Vacant(slot) = cores.entry(tid as i32) {
                let name = ImageKind::Core.id(tid.into());
                let core: CoreEntry = dir.read_one(name)?;
                references::core(&dir.path_of(name), &core, tid == entry.pid)?;
                slot.insert(core);
            }
        }
    }
    Ok(cores)
}

fn read_processes(
    dir: &ImageDir,
    entries: &[PstreeEntry],
    cores: &HashMap<i32, CoreEntry>,
) -> Result<Vec<ProcessImages>, RestoreError> {
    let mut processes = Vec::new();
    for entry in entries {
        let core = &cores[&(entry.pid as i32)];
        if core.tc.as_ref().is_some_and(|tc| tc.task_state == task::state::ZOMBIE) {
            continue;
        }
        let pid = u64::from(entry.pid);
        processes.push(ProcessImages {
            entry: entry.clone(),
            core: core.clone(),
            mm: dir.read_one(ImageKind::Mm.id(pid))?,
            fs: dir.read_one(ImageKind::Fs.id(pid))?,
            ids: match &core.ids {
                Some(ids) => *ids,
                None => dir.read_one(ImageKind::Ids.id(pid))?,
            },
        });
    }
    Ok(processes)
}

fn plan_process(
    cx: &mut Planner<'_>,
    process: &ProcessImages,
    cores: &HashMap<i32, CoreEntry>,
    own: &crate::image::proto::CredsEntry,
) -> Result<(), RestoreError> {
    let task = cx.tasks[&(process.entry.pid as i32)];
    let missing = || ObjectError::contradiction(format!("core-{}.img has no process part", process.entry.pid));
    let core = process.core.tc.as_ref().ok_or_else(missing)?;
    memory::plan(cx, task, &process.mm)?;
    let table = read_table(cx.dir, process.ids.files_id)?;
    cx.descriptors(task, &table)?;
    fs::plan(cx, task, &process.fs)?;
    task::plan_process(cx, task, core, &process.mm)?;
    for &tid in &process.entry.threads {
        let thread = cx.tasks[&(tid as i32)];
        task::plan_thread(cx, thread, &cores[&(tid as i32)], own)?;
    }
    task::plan_dumpable(cx, task, &process.mm);
    Ok(())
}

/// Stays the parent of a restored tree: passes signals on, and gives the root's exit status as a shell would.
pub fn attend(pid: i32) -> Result<u8, RestoreError> {
    use nix::sys::signal::{SigSet, Signal, kill};
    use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
    use nix::unistd::Pid;
    let root = Pid::from_raw(pid);
    let forwarded =
        [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM, Signal::SIGUSR1, Signal::SIGUSR2];
    let mut set = SigSet::empty();
    set.extend(forwarded);
    set.add(Signal::SIGCHLD);
    let failed = |call, e| RestoreError::Execute(ExecuteError::Sys(crate::kernel::SysError::new(call, pid, e)));
    set.thread_block().map_err(|e| failed("sigprocmask", e))?;
    loop {
        match waitpid(root, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => return Ok(code as u8),
            Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(128 + signal as u8),
            Ok(_) => {}
            Err(e) => return Err(failed("waitpid", e)),
        }
        match set.wait().map_err(|e| failed("sigwait", e))? {
            Signal::SIGCHLD => {}
            signal => {
                // It may have ended this very moment.
                let _ = kill(root, signal);
            }
        }
    }
}
