//! A dump, from the frozen tree to a directory of images. The order is that of docs/architecture.md.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use serde::Serialize;
use tracing::{debug, info};

use crate::agent::Guest;
use crate::freeze::{self, FreezeError, Frozen, FrozenProcess, Release};
use crate::image::proto::{DumpStatsEntry, InventoryEntry, StatsEntry, TaskKobjIdsEntry};
use crate::image::{ImageDir, ImageError, ImageKind};
use crate::kernel::pidfd::PidFd;
use crate::kernel::survey::Vma;
use crate::kernel::surveyor::{Source, SurveyError, Surveyor};
use crate::kernel::threads::ThreadRecords;
use crate::object::cgroup::Manage;
use crate::object::file::Capture;
use crate::object::ghost::{self, Links};
use crate::object::memory::Pages;
use crate::object::outside::{External, Inherit};
use crate::object::tcp::{Hold, NetworkLock};
use crate::object::{
    ObjectError, Refusal, cgroup, clocks, fs, locks, memfd, memory, seccomp, shmem, task, tree, waits,
};

/// What to dump, and how.
#[derive(Debug, Clone)]
pub struct DumpOptions {
    /// Root of the tree.
    pub pid: Pid,
    /// Where images go.
    pub images_dir: PathBuf,
    /// Where logs and statistics go.
    pub work_dir: PathBuf,
    /// What becomes of the tree.
    pub release: Release,
    /// How long freezing may take.
    pub timeout: Duration,
    /// Whether the tree may be part of a session that is not dumped.
    pub shell_job: bool,
    /// Whether datagram sockets may be connected to peers outside, by name.
    pub ext_unix_sk: bool,
    /// Whether TCP connections are given up.
    pub tcp_close: bool,
    /// Whether TCP connections are kept.
    pub tcp_established: bool,
    /// Whether clients that nobody has accepted yet are dropped.
    pub skip_in_flight: bool,
    /// How the packets of connections are held meanwhile.
    pub network_lock: NetworkLock,
    /// Where the survey comes from.
    pub survey: Source,
    /// What belongs to somebody outside of the tree.
    pub external: Vec<External>,
    /// What will be given at the restore, which makes it as external.
    pub inherit: Vec<Inherit>,
    /// Whether file locks are dumped; else they are refused.
    pub file_locks: bool,
    /// Whether files that lost their name but have another may be given one more.
    pub link_remap: bool,
    /// Largest deleted file whose content goes into the images, in bytes on disk.
    pub ghost_limit: u64,
    /// What is done about control groups.
    pub manage_cgroups: Manage,
    /// A control group whose freezer stops the tree.
    pub freeze_cgroup: Option<PathBuf>,
}

/// Why a dump failed. The tree goes on as if nothing had happened.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The tree could not be frozen.
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    /// An image could not be written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// An object could not be read.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// The survey failed.
    #[error(transparent)]
    Survey(#[from] SurveyError),
    /// The tree has what cannot be dumped.
    #[error("cannot dump, because of {} thing(s):\n{}", .0.len(), .0.iter().map(|r| format!("  {r}")).collect::<Vec<_>>().join("\n"))]
    Refused(Vec<Refusal>),
}

/// What a dump came to.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// Processes, zombies included.
    pub processes: usize,
    /// Threads.
    pub threads: usize,
    /// How long the tree stood still (until it was killed or ran on).
    pub frozen: Duration,
    /// How long it took to stop it.
    pub freezing: Duration,
    /// All in all.
    pub total: Duration,
    /// Pages looked at.
    pub pages_scanned: u64,
    /// Pages written.
    pub pages_written: u64,
}

/// Dumps a tree.
pub fn dump(options: &DumpOptions) -> Result<Summary, DumpError> {
    let begin = Instant::now();
    let dir = ImageDir::create(&options.images_dir)?;
    let mut surveyor = Surveyor::choose(options.survey, options.pid)?;
    let hold = match options.tcp_established {
        true => Hold::prepare(options.pid, options.network_lock).map_err(ObjectError::from)?,
        false => Hold::default(),
    };
    let frozen = freeze::freeze(options.pid, options.timeout, options.freeze_cgroup.as_deref())?;
    let (processes, threads) = (frozen.processes.len(), frozen.processes.iter().map(|p| p.threads.len()).sum());
    info!(processes, threads, took = ?frozen.took, "the tree stands still");
    let writing = Instant::now();
    let (pages, links, mut hold) = write_images(options, &dir, &frozen, &mut surveyor, hold)?;
    info!(pages = pages.written, took = ?writing.elapsed(), "images are written");
    let freezing = frozen.took;
    // A tree that is to be killed must not be before its images are safe; one that runs on need not wait.
    let mut inventory = inventory(&frozen)?;
    hold.describe(&mut inventory);
    let frozen = match options.release {
        Release::Kill => {
            hold.write(&dir)?;
            dir.commit(&inventory)?;
            hold.seal(&frozen)?;
            let lasted = frozen.release(Release::Kill);
            hold.silence();
            lasted
        }
        other => {
            inventory.gate = None;
            hold.unlock();
            let lasted = frozen.release(other);
            hold.write(&dir)?;
            dir.commit(&inventory)?;
            lasted
        }
    };
    links.keep();
    let summary = Summary {
        processes,
        threads,
        frozen,
        freezing,
        total: begin.elapsed(),
        pages_scanned: pages.scanned,
        pages_written: pages.written,
    };
    write_stats(options, &summary, writing.elapsed())?;
    info!(frozen = ?summary.frozen, total = ?summary.total, "dump finished");
    Ok(summary)
}

fn write_images(
    options: &DumpOptions,
    dir: &ImageDir,
    frozen: &Frozen,
    surveyor: &mut Surveyor,
    hold: Hold,
) -> Result<(Pages, Links, Hold), DumpError> {
    let pids: Vec<Pid> = frozen.processes.iter().map(|p| p.pid).collect();
    let mut cx = Capture::new(dir, options, pids);
    *cx.shelf.get() = hold;
    refuse_foreign(options, frozen, &mut cx);

    let alive: Vec<Pid> = frozen.alive().map(|p| p.pid).collect();
    let tables = surveyor.descriptors(&alive)?;
    let pidfds: BTreeMap<Pid, &PidFd> = frozen.alive().map(|p| (p.pid, &p.pidfd)).collect();
    let fdinfo = cx.descriptions(&tables, &pidfds)?;
    let mut areas = BTreeMap::new();
    for process in frozen.alive() {
        let vmas = surveyor.areas(process.pid)?;
        let entries = memory::areas(&mut cx, process.pid.as_raw(), &vmas)?;
        areas.insert(process.pid, (vmas, entries));
    }
    if !cx.refusals.is_empty() {
        return Err(DumpError::Refused(std::mem::take(&mut cx.refusals)));
    }

    let mut pages = Pages::default();
    for (n, process) in frozen.processes.iter().enumerate() {
        let id = n as u32 + 1;
        let Some((vmas, entries)) = areas.remove(&process.pid) else {
            dir.write_one(ImageKind::Core.id(process.pid.as_raw() as u64), &task::zombie(&process.stat))?;
            continue;
        };
        let sleeps = process.threads.iter().any(waits::sleeps);
        let records = surveyor.threads(process.pid, sleeps)?;
        let part = write_process(&mut cx, process, vmas, entries, &records, id)?;
        pages.scanned += part.scanned;
        pages.written += part.written;
        if let Some(table) = fdinfo.get(&process.pid) {
            dir.write_all(ImageKind::Fdinfo.id(id.into()), table)?;
        }
    }
    // Some things only a thread itself has told.
    if !cx.refusals.is_empty() {
        return Err(DumpError::Refused(std::mem::take(&mut cx.refusals)));
    }
    let shared = shmem::dump_all(&mut cx, frozen.processes.len() as u32 + 1)?;
    pages.scanned += shared.scanned;
    pages.written += shared.written;
    seccomp::write(&mut cx)?;
    cgroup::write(&mut cx)?;
    dir.write_all(ImageKind::Pstree, &tree::capture(&frozen.processes))?;
    dir.write_one(ImageKind::Timens.id(0), &clocks::capture(frozen.root())?)?;
    memfd::finish(&mut cx)?;
    locks::finish(&mut cx)?;
    let links = ghost::finish(&mut cx)?;
    // Programs and directories are looked at with their process.
    if !cx.refusals.is_empty() {
        return Err(DumpError::Refused(std::mem::take(&mut cx.refusals)));
    }
    let hold = cx.shelf.take();
    dir.write_all(ImageKind::Files, &cx.into_files())?;
    Ok((pages, links, hold))
}

fn refuse_foreign(options: &DumpOptions, frozen: &Frozen, cx: &mut Capture<'_>) {
    if options.shell_job {
        return;
    }
    let (sessions, groups) = tree::foreign(&frozen.processes);
    for sid in sessions {
        cx.refuse(Refusal {
            pid: frozen.root().as_raw(),
            fd: None,
            what: format!("the session leader {sid} is outside of the tree"),
            advice: "start the program with setsid(1), or give --shell-job".into(),
        });
    }
    for pgid in groups {
        cx.refuse(Refusal {
            pid: frozen.root().as_raw(),
            fd: None,
            what: format!("the leader {pgid} of its process group is outside of the tree"),
            advice: "dump from the group's leader on, or give --shell-job".into(),
        });
    }
}

fn write_process(
    cx: &mut Capture<'_>,
    process: &FrozenProcess,
    vmas: Vec<Vma>,
    entries: Vec<crate::image::proto::VmaEntry>,
    records: &ThreadRecords,
    id: u32,
) -> Result<Pages, DumpError> {
    let pid = process.pid;
    let (Some(memory), Some(first)) = (&process.memory, process.threads.first()) else {
        return Err(ObjectError::contradiction(format!("pid {pid} has no thread")).into());
    };
    let mut guest = Guest::enter(pid, &process.pidfd, first.stopped, memory, &vmas).map_err(ObjectError::from)?;
    let mut captured = task::capture(cx, process, &mut guest, entries, records)?;
    let pages = memory::dump_private(cx, &mut guest, memory, &vmas, id, &mut captured.mm.vmas)?;
    guest.leave().map_err(ObjectError::from)?;
    let name = |kind: ImageKind| kind.id(pid.as_raw() as u64);
    for (tid, core) in &captured.cores {
        cx.dir.write_one(ImageKind::Core.id(tid.as_raw() as u64), core)?;
    }
    cx.dir.write_one(name(ImageKind::Mm), &captured.mm)?;
    let fs_entry = fs::capture(cx, pid)?;
    cx.dir.write_one(name(ImageKind::Fs), &fs_entry)?;
    cx.dir.write_one(name(ImageKind::Ids), &own_ids(id))?;
    debug!(pid = pid.as_raw(), pages = pages.written, "process written");
    Ok(pages)
}

/// Every process has its own address space, descriptors, directories and signal actions; sharing them between processes
/// is refused.
fn own_ids(id: u32) -> TaskKobjIdsEntry {
    TaskKobjIdsEntry { vm_id: id, files_id: id, fs_id: id, sighand_id: id, ..TaskKobjIdsEntry::default() }
}

/// The ids of the engine's own objects, of which the tree shares none.
const ENGINE_IDS: u32 = i32::MAX as u32;

fn inventory(frozen: &Frozen) -> Result<InventoryEntry, DumpError> {
    let _ = frozen;
    Ok(InventoryEntry {
        fdinfo_per_id: Some(true),
        ns_per_id: Some(true),
        root_ids: Some(own_ids(ENGINE_IDS)),
        root_cg_set: Some(cgroup::ENGINE_SET),
        ..InventoryEntry::default()
    })
}

fn write_stats(options: &DumpOptions, summary: &Summary, writing: Duration) -> Result<(), DumpError> {
    let micros = |d: Duration| d.as_micros() as u32;
    let stats = StatsEntry {
        dump: Some(DumpStatsEntry {
            freezing_time: micros(summary.freezing),
            frozen_time: micros(summary.frozen),
            memwrite_time: micros(writing),
            pages_scanned: summary.pages_scanned,
            pages_written: summary.pages_written,
            ..DumpStatsEntry::default()
        }),
        restore: None,
    };
    crate::image::write_service(&options.work_dir, ImageKind::StatsDump, &stats)?;
    Ok(())
}
