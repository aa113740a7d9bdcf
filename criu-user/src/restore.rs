//! A restore: images become a [`Plan`], the plan is carried out by a crew.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use serde::Serialize;
use tracing::{info, warn};

use crate::dump::micros;
use crate::execute::{self, ExecuteError};
use crate::image::proto::{
    CoreEntry, FileEntry, FsEntry, MmEntry, PstreeEntry, RestoreStatsEntry, StatsEntry, TaskKobjIdsEntry, TimensEntry,
};
use crate::image::{ImageDir, ImageError, ImageKind, TaskState, references};
use crate::kernel::limits::ManyFiles;
use crate::kernel::root::Root;
use crate::object::cgroup::{Manage, NewRoot};
use crate::object::file::{Planner, Shelf, read_table};
use crate::object::outside::Inherit;
use crate::object::tcp::NetworkLock;
use crate::object::{ObjectError, cgroup, clocks, creds, fs, locks, memory, shmem, task, tree, waits};
use crate::observer::{Moment, Objection, Observer, tell};
use crate::parallel;
use crate::plan::Plan;

/// What to restore, and how.
#[derive(Debug, Clone)]
pub struct RestoreOptions {
    /// Where the images are.
    pub images_dir: PathBuf,
    /// Where logs and statistics go.
    pub work_dir: PathBuf,
    /// Where the tree's paths start.
    pub root: Root,
    /// Whether the tree joins the session of the caller.
    pub shell_job: bool,
    /// Whether the root becomes a child of the engine's parent.
    pub sibling: bool,
    /// Whether the engine ends when the tree runs.
    pub detached: bool,
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
    /// Whether clients that nobody had accepted are dropped.
    pub skip_in_flight: bool,
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
    /// There is nothing but memory.
    #[error(
        "{path} is a pre-dump, of memory only: restore from the dump that was made after it with --prev-images-dir",
        path = path.display()
    )]
    PreDump {
        /// The images.
        path: PathBuf,
    },
    /// Somebody does not let it happen.
    #[error(transparent)]
    Objection(#[from] Objection),
    /// The plan cannot be carried out.
    #[error(transparent)]
    Execute(#[from] ExecuteError),
}

/// What a restore came to. Times are written in microseconds.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// The root of the tree.
    pub pid: i32,
    /// Tasks, threads included.
    pub tasks: usize,
    /// System calls that they made.
    pub calls: usize,
    /// Bytes of memory that were filled.
    pub bytes_filled: u64,
    /// How long reading and planning took.
    #[serde(rename = "planning_us", serialize_with = "micros")]
    pub planning: Duration,
    /// All in all.
    #[serde(rename = "total_us", serialize_with = "micros")]
    pub total: Duration,
}

/// Restores a tree, and gives its root.
pub fn restore(options: &RestoreOptions, observer: &dyn Observer) -> Result<Summary, RestoreError> {
    let begin = Instant::now();
    let _files = ManyFiles::allow();
    let dir = ImageDir::open(&options.images_dir)?;
    info!(images = %dir.path().display(), "restore");
    tell(observer, Moment::PreRestore, None)?;
    let plan = plan(&dir, options)?;
    let planning = begin.elapsed();
    let calls = plan.tasks.iter().flat_map(|t| &t.calls).map(|(_, c)| c.len()).sum();
    info!(tasks = plan.tasks.len(), calls, took = ?planning, "planned");
    let memory = plan.memory();
    observer.expects(memory);
    let pid = execute::execute(&plan, options, observer)?;
    let total = begin.elapsed();
    let summary = Summary { pid: pid.as_raw(), tasks: plan.tasks.len(), calls, bytes_filled: memory, planning, total };
    // To take a large plan apart piece by piece takes its time. Who ends leaves all of it to the kernel.
    if options.detached {
        std::mem::forget(plan);
    }
    let stats = StatsEntry {
        dump: None,
        restore: Some(RestoreStatsEntry {
            forking_time: 0,
            restore_time: summary.total.as_micros() as u32,
            ..RestoreStatsEntry::default()
        }),
    };
    if let Err(err) = crate::image::write_service(&options.work_dir, ImageKind::StatsRestore, &stats) {
        warn!(%err, "restored, but there are no statistics");
    }
    info!(pid = summary.pid, tasks = summary.tasks, bytes = memory, total = ?summary.total, "restored, and running");
    if let Err(objection) = tell(observer, Moment::PostResume, Some(pid)) {
        warn!(pid = summary.pid, "{objection}; the tree runs all the same");
    }
    Ok(summary)
}

/// Everything that belongs to one live process.
struct ProcessImages {
    entry: PstreeEntry,
    core: CoreEntry,
    mm: Rc<MmEntry>,
    fs: FsEntry,
    ids: TaskKobjIdsEntry,
}

/// Makes the plan of a restore.
pub fn plan(dir: &ImageDir, options: &RestoreOptions) -> Result<Plan, RestoreError> {
    if dir.inventory()?.pre_dump() {
        return Err(RestoreError::PreDump { path: dir.path().to_owned() });
    }
    let entries: Vec<PstreeEntry> = dir.read_all(ImageKind::Pstree)?;
    references::tree(&dir.path_of(ImageKind::Pstree), &entries)?;
    let mut files: Vec<Rc<FileEntry>> = Vec::new();
    dir.read_each(ImageKind::Files, |file| files.push(Rc::new(file)))?;
    references::descriptions(&dir.path_of(ImageKind::Files), files.iter().map(|file| &**file))?;
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
    let threads =
        entries.iter().flat_map(|entry| references::threads(entry).iter().map(|&tid| (tid, tid == entry.pid)));
    let mut seen = HashSet::new();
    let threads: Vec<(u32, bool)> = threads.filter(|(tid, _)| seen.insert(*tid)).collect();
    let read = |&(tid, leads): &(u32, bool)| {
        let name = ImageKind::Core.id(tid.into());
        let core: CoreEntry = dir.read_one(name)?;
        references::core(&dir.path_of(name), &core, leads)?;
        Ok((tid as i32, core))
    };
    parallel::map(&threads, read).into_iter().collect()
}

fn read_processes(
    dir: &ImageDir,
    entries: &[PstreeEntry],
    cores: &HashMap<i32, CoreEntry>,
) -> Result<Vec<ProcessImages>, RestoreError> {
    let core = |entry: &PstreeEntry| &cores[&(entry.pid as i32)];
    let alive: Vec<&PstreeEntry> = entries.iter().filter(|entry| !TaskState::is_gone(core(entry))).collect();
    let read = |entry: &&PstreeEntry| -> Result<(MmEntry, FsEntry, TaskKobjIdsEntry), ImageError> {
        let pid = u64::from(entry.pid);
        let ids = match &core(entry).ids {
            Some(ids) => *ids,
            None => dir.read_one(ImageKind::Ids.id(pid))?,
        };
        Ok((dir.read_one(ImageKind::Mm.id(pid))?, dir.read_one(ImageKind::Fs.id(pid))?, ids))
    };
    let images = |(entry, read): (&PstreeEntry, Result<_, ImageError>)| {
        let (mm, fs, ids) = read?;
        Ok(ProcessImages { entry: entry.clone(), core: core(entry).clone(), mm: Rc::new(mm), fs, ids })
    };
    alive.iter().copied().zip(parallel::map(&alive, read)).map(images).collect()
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
    let table = read_table(cx, process.ids.files_id)?;
    cx.descriptors(task, &table)?;
    fs::plan(cx, task, &process.fs)?;
    task::plan_process(cx, task, &process.core, core, &process.mm)?;
    let leader_ended = core.leader_ended();
    if leader_ended {
        task::plan_dead_leader(cx, task, core)?;
    }
    for &tid in references::threads(&process.entry).iter().filter(|&&tid| tid != process.entry.pid || !leader_ended) {
        let thread = cx.tasks[&(tid as i32)];
        task::plan_thread(cx, thread, &cores[&(tid as i32)], own)?;
    }
    task::plan_dumpable(cx, task, &process.mm);
    if leader_ended {
        task::plan_leaders_end(cx, task, core);
    }
    Ok(())
}
