//! A dump, from the frozen tree to a directory of images. The order is that of docs/architecture.md.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use serde::Serialize;
use tracing::{debug, info, warn};

use crate::agent::{Aside, Beside, Guest, alone};
use crate::freeze::{self, FreezeError, Frozen, FrozenProcess, Release};
use crate::head_start::HeadStart;
use crate::image::proto::{DumpStatsEntry, InventoryEntry, StatsEntry, TaskKobjIdsEntry};
use crate::image::{ImageDir, ImageError, ImageKind, Lasting};
use crate::kernel::limits::{self, ManyFiles};
use crate::kernel::pidfd::PidFd;
use crate::kernel::proc::{self, Shown};
use crate::kernel::survey::{PAGE, Vma};
use crate::kernel::survey_cache::{CacheUse, Caching};
use crate::kernel::surveyor::{Source, SurveyError, Surveyor};
use crate::kernel::threads::ThreadRecords;
use crate::lineage::{Lineage, LineageError, Tracking};
use crate::live::{self, Live, Manner};
use crate::object::cgroup::Manage;
use crate::object::file::Capture;
use crate::object::ghost::{self, Links};
use crate::object::inet_ahead::Ahead;
use crate::object::memory::{Crowded, Pages, Past, Prepared};
use crate::object::outside::{External, Inherit};
use crate::object::tcp::{Hold, NetworkLock};
use crate::object::{
    ObjectError, Refusal, apart, cgroup, clocks, fs, locks, memfd, memory, seccomp, seen, shmem, task, tree, waits,
};
use crate::observer::{Moment, Objection, Observer, tell};
use crate::track::predict::{self, Measured, Shape};
use crate::track::refusals;

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
    /// How its memory is written so that it stands still only for its small state; the tree has to run on.
    pub live: Option<Manner>,
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
    /// Whether those who ask for connections with listening sockets are held as well.
    pub lock_listeners: bool,
    /// How the packets of connections are held meanwhile.
    pub network_lock: NetworkLock,
    /// Where the survey comes from.
    pub survey: Source,
    /// How far what was read before the freeze is believed.
    pub caching: Caching,
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
    /// What the images build on.
    pub tracking: Tracking,
    /// Whether the images of a tree that is killed are brought to disk before that.
    pub sync: bool,
}

impl DumpOptions {
    /// Whether the tree stands still until its images are complete. One that is to be killed must not be before they are;
    /// one that runs on need not wait for that, unless somebody wants to see it standing beside them.
    fn is_complete_first(&self, observer: &dyn Observer) -> bool {
        self.release == Release::Kill || observer.acts_after_dump() && self.live.is_none()
    }

    /// How far the images come before they are a dump. A tree that is to be killed stands still meanwhile (see decision 012);
    /// files that were made beforehand are as long as they should be before they hold what they should.
    fn lasting(&self) -> Lasting {
        let stands = self.release == Release::Kill && self.tracking.prev_images_dir.is_none();
        if stands && !self.sync { Lasting::Written } else { Lasting::OnDisk }
    }
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
    /// Somebody does not let it happen.
    #[error(transparent)]
    Objection(#[from] Objection),
    /// The parent, or the tracking session.
    #[error(transparent)]
    Lineage(#[from] LineageError),
    /// The tree has what cannot be dumped.
    #[error("cannot dump, because of {} thing(s):\n{}", .0.len(), .0.iter().map(|r| format!("  {r}")).collect::<Vec<_>>().join("\n"))]
    Refused(Vec<Refusal>),
}

/// What a dump came to. Times are written in microseconds.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// The root of the tree.
    pub pid: i32,
    /// Processes, zombies included.
    pub processes: usize,
    /// Threads.
    pub threads: usize,
    /// How long the tree stood still (until it was killed or ran on).
    #[serde(rename = "frozen_us", serialize_with = "micros")]
    pub frozen: Duration,
    /// How long it took to stop it.
    #[serde(rename = "freezing_us", serialize_with = "micros")]
    pub freezing: Duration,
    /// How long it took to write the images.
    #[serde(rename = "writing_us", serialize_with = "micros")]
    pub writing: Duration,
    /// All in all.
    #[serde(rename = "total_us", serialize_with = "micros")]
    pub total: Duration,
    /// Pages looked at.
    pub pages_scanned: u64,
    /// Pages written.
    pub pages_written: u64,
    /// Pages that the parent images have.
    pub pages_in_parent: u64,
    /// Pages that were written since the parent and copied while the tree still ran, into `pre-dumps/last`. Those that were
    /// not written again are among the ones of the parents.
    pub pages_ahead: u64,
    /// Memory maps that were read before the freeze: still right in it, or not.
    pub maps_read_ahead: CacheUse,
    /// TCP connections that were asked before the freeze: still as they had told in it, or not.
    pub connections_asked_ahead: CacheUse,
    /// The pages written in bytes.
    pub bytes_written: u64,
    /// Bytes written in a second of writing.
    pub bytes_per_second: u64,
    /// Processes whose memory was written from a copy while they ran on (`--live`).
    pub copied: usize,
    /// Processes to which so little had been written since the parent that they needed no copy (`--live`).
    pub spared: usize,
    /// Longest time for which a process was stopped before the freeze, so that its memory could be tracked.
    #[serde(rename = "stopped_before_us", serialize_with = "micros")]
    pub stopped_before: Duration,
    /// Processes that could not be copied, and why: they stood still meanwhile.
    pub not_copied: Vec<String>,
}

/// Writes a time as a whole number of microseconds.
pub(crate) fn micros<S: serde::Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(time.as_micros() as u64)
}

/// Bytes in a second, for a reader.
pub(crate) fn rate(bytes: u64, time: Duration) -> u64 {
    (bytes as f64 / time.as_secs_f64().max(1e-6)) as u64
}

/// Dumps a tree.
pub fn dump(options: &DumpOptions, observer: &dyn Observer) -> Result<Summary, DumpError> {
    let begin = Instant::now();
    let _files = ManyFiles::allow();
    let dir = ImageDir::create(&options.images_dir)?;
    info!(pid = options.pid.as_raw(), images = %dir.path().display(), "dump of the tree");
    // What a session knows to be in the way is said before anything stands still.
    let known = refusals::known_to_session(options.pid);
    if !known.is_empty() {
        return Err(DumpError::Refused(known));
    }
    tell(observer, Moment::PreDump, Some(options.pid))?;
    let mut surveyor = Surveyor::choose(options.survey, options.pid, options.caching)?;
    let mut hold = match options.tcp_established || options.lock_listeners {
        true => Hold::prepare(options).map_err(ObjectError::from)?,
        false => Hold::default(),
    };
    let (mut lineage, history) = Lineage::begin(options.pid, &options.tracking, &dir)?;
    let stopped_before = lineage.stopped;
    let shape = lineage.is_tracked().then(|| Shape::of_tree(options.pid));
    // A copy of the tree does not need it.
    let parent = options.tracking.prev_images_dir.as_deref().filter(|_| options.live != Some(Manner::Copies));
    let (history, mut head_start) = HeadStart::take(&dir, parent, observer, &lineage, history)?;
    let tree = proc::tree(options.pid);
    let live = options.live.map(|manner| {
        let spared = live::spared(manner, &lineage.tracked, &history);
        Live::prepare(options.pid, spared)
    });
    // A copy may need as much again as it writes.
    let is_copied = |pid: &Pid| live.as_ref().is_some_and(|live| !live.spared.contains(pid));
    let crowded = Crowded::look(&tree, if tree.iter().any(is_copied) { 2 } else { 1 });
    let in_freeze: Vec<Pid> = tree.iter().copied().filter(|pid| !is_copied(pid)).collect();
    let mut prepared = if options.release == Release::Kill && history.is_empty() {
        Prepared::default()
    } else {
        Prepared::make(&dir, &in_freeze, &history, |pid| head_start.expected(pid))
    };
    let live = live.unwrap_or_default();
    let files = if options.is_complete_first(observer) { files_of(&tree) } else { 0 };
    seen::make_room(&tree, files);
    let ahead = match options.survey {
        Source::Proc => Ahead::default(),
        _ => Ahead::ask(&tree, options.caching),
    };
    if options.tcp_established && ahead.are_likely() {
        hold.expect_idle(options.caching);
    }
    if files > 0 {
        dir.prepare(part_of_limit(files + ahead.connections()));
    }
    surveyor.read_ahead(options.pid);
    prepared.give_back();
    let frozen = freeze::freeze(options.pid, options.timeout, options.freeze_cgroup.as_deref())?;
    let (processes, threads) = (frozen.processes.len(), frozen.processes.iter().map(|p| p.threads.len()).sum());
    info!(processes, threads, took = ?frozen.took, "the tree stands still");
    let writing = Instant::now();
    let past = Past { prepared, crowded, ..lineage.confirm(history, options.release) };
    let Written { mut pages, links, hold, mut live, ahead } =
        write_images(options, observer, &dir, &frozen, &mut surveyor, (hold, ahead), (past, live))?;
    let mut writing = writing.elapsed();
    info!(pages = pages.written, took = ?writing, "images are written");
    let freezing = frozen.took;
    let frozen = release(options, observer, &dir, frozen, hold, &lineage, &mut live)?;
    head_start.keep();
    pages.add(live.pages);
    writing += live.writing;
    links.keep();
    // What a copy spares says nothing of dumps that have none, and who is dumped live is mostly busy.
    if let Some(shape) = shape.filter(|_| options.live.is_none()) {
        let shape = Shape { pages: pages.written + pages.in_parent, written: pages.written, ..shape };
        predict::remember(&Measured { shape, frozen_us: frozen.as_micros() as u64 });
    }
    go_on_from(options, lineage);
    let bytes_written = pages.written * PAGE;
    let summary = Summary {
        pid: options.pid.as_raw(),
        processes,
        threads,
        frozen,
        freezing,
        writing,
        total: begin.elapsed(),
        pages_scanned: pages.scanned,
        pages_written: pages.written,
        pages_in_parent: pages.in_parent,
        pages_ahead: head_start.pages(),
        maps_read_ahead: surveyor.cache_use(),
        connections_asked_ahead: ahead.used(),
        bytes_written,
        bytes_per_second: rate(bytes_written, writing),
        copied: live.copied,
        spared: live.not_needed,
        stopped_before,
        not_copied: live.fallbacks,
    };
    if let Err(err) = write_stats(options, &summary) {
        warn!(%err, "the dump is good, but has no statistics");
    }
    let Summary { frozen, total, pages_written: pages, bytes_per_second, .. } = summary;
    info!(
        ?frozen,
        pages,
        in_parent = summary.pages_in_parent,
        bytes = bytes_written,
        bytes_per_second,
        ?total,
        "dump finished"
    );
    Ok(summary)
}

/// About how many images there will be of a tree, besides one for each connection.
fn files_of(tree: &[Pid]) -> usize {
    /// Of a process: memory map, page map, pages, descriptors, file system, and ids.
    const OF_EACH: usize = 6;
    let threads: usize = tree.iter().map(|&pid| proc::threads(pid).map_or(0, |threads| threads.len())).sum();
    tree.len() * OF_EACH + threads
}

/// So many files, but no more than a part of those that we may have open.
fn part_of_limit(files: usize) -> usize {
    const PART: u64 = 4;
    files.min(usize::try_from(limits::open_files() / PART).unwrap_or(usize::MAX))
}

/// Has the session collect for an image after this one, if there can be one.
fn go_on_from(options: &DumpOptions, lineage: Lineage) {
    if options.release != Release::Kill
        && let Err(err) = lineage.commit()
    {
        warn!(%err, "the dump is good, but the next one cannot build on it");
    }
}

/// Completes the dump, and lets the tree go.
fn release(
    options: &DumpOptions,
    observer: &dyn Observer,
    dir: &ImageDir,
    frozen: Frozen,
    mut hold: Hold,
    lineage: &Lineage,
    live: &mut Live,
) -> Result<Duration, DumpError> {
    let mut inventory = inventory();
    lineage.describe(&mut inventory);
    hold.describe(&mut inventory);
    if options.release != Release::Kill {
        inventory.gate = None;
    }
    let complete = |hold: &Hold| -> Result<(), DumpError> {
        let begin = Instant::now();
        hold.write(dir)?;
        dir.commit(&inventory, options.lasting())?;
        info!(took = ?begin.elapsed(), "images are complete");
        if let Err(objection) = tell(observer, Moment::PostDump, Some(options.pid)) {
            dir.withdraw()?;
            return Err(objection.into());
        }
        Ok(())
    };
    let first = options.is_complete_first(observer);
    if first {
        complete(&hold)?;
    }
    let lasted = if options.release == Release::Kill {
        if let Err(err) = hold.seal(&frozen) {
            dir.withdraw()?;
            return Err(err.into());
        }
        let lasted = frozen.release(Release::Kill);
        hold.silence();
        lasted
    } else {
        // The gate opens, and the sockets are as they were.
        hold.let_go();
        frozen.release(options.release)
    };
    info!(frozen = ?lasted, "the tree {}", match options.release {
        Release::Kill => "is killed",
        Release::Stop => "is left stopped",
        Release::Resume => "runs on",
    });
    if live.is_pending() {
        live.finish(dir, observer)?;
    }
    if !first {
        complete(&hold)?;
    }
    Ok(lasted)
}

/// What the freeze has brought.
struct Written {
    pages: Pages,
    links: Links,
    hold: Hold,
    live: Live,
    ahead: Ahead,
}

fn write_images(
    options: &DumpOptions,
    observer: &dyn Observer,
    dir: &ImageDir,
    frozen: &Frozen,
    surveyor: &mut Surveyor,
    (hold, ahead): (Hold, Ahead),
    (past, live): (Past, Live),
) -> Result<Written, DumpError> {
    let pids: Vec<Pid> = frozen.processes.iter().map(|p| p.pid).collect();
    let mut cx = Capture::new(dir, options, observer, pids);
    *cx.shelf.get() = hold;
    *cx.shelf.get() = live;
    *cx.shelf.get() = ahead;
    cx.past = past;
    match write_all(options, dir, frozen, surveyor, &mut cx) {
        // What cannot be dumped may have been in the way of reading something else.
        Err(_) if !cx.refusals.is_empty() => Err(DumpError::Refused(cx.refusals)),
        outcome => outcome.map(|(pages, links)| {
            let (hold, live, ahead) = (cx.shelf.take(), cx.shelf.take(), cx.shelf.take());
            Written { pages, links, hold, live, ahead }
        }),
    }
}

fn write_all(
    options: &DumpOptions,
    dir: &ImageDir,
    frozen: &Frozen,
    surveyor: &mut Surveyor,
    cx: &mut Capture<'_>,
) -> Result<(Pages, Links), DumpError> {
    let observer = cx.observer;
    refuse_foreign(options, frozen, cx);
    let many = frozen.alive().filter(|process| process.threads.len() > 1);
    let identities = many.map(|process| Ok((process.pid, surveyor.identities(process.pid)?)));
    let identities = identities.collect::<Result<_, SurveyError>>()?;
    apart::refuse(cx, frozen, &identities).map_err(ObjectError::from)?;

    let alive: Vec<Shown> = frozen.alive().map(|p| p.shown).collect();
    let tables = surveyor.descriptors(&alive)?;
    let pidfds: BTreeMap<Pid, &PidFd> = frozen.alive().map(|p| (p.shown.by, &p.pidfd)).collect();
    let fdinfo = cx.descriptions(&tables, &pidfds)?;
    let mut areas = BTreeMap::new();
    for process in frozen.alive() {
        let vmas = surveyor.areas(process.shown)?;
        let entries = memory::areas(cx, process.shown.by.as_raw(), &vmas)?;
        areas.insert(process.pid, (vmas, entries));
    }
    stop_if_refused(cx)?;

    let described: usize = tables.values().map(Vec::len).sum();
    let mapped: usize = areas.values().map(|(vmas, _)| vmas.len()).sum();
    let CacheUse { hits, misses } = surveyor.cache_use();
    info!(by = surveyor.name(), descriptors = described, areas = mapped, hits, misses, "the tree is surveyed");
    let CacheUse { hits, misses } = cx.shelf.get::<Ahead>().used();
    info!(hits, misses, "connections were asked before the freeze");
    if observer.counts_memory() {
        observer.expects(alive.iter().map(|process| memory::estimate(process.by)).sum());
    }
    let mut pages = Pages::default();
    let mut aside = Aside::new().map_err(ObjectError::from)?;
    let beside = Beside::stay();
    for (n, process) in frozen.processes.iter().enumerate() {
        let id = n as u32 + 1;
        let Some((vmas, entries)) = areas.remove(&process.pid) else {
            dir.write_one(ImageKind::Core.id(process.pid.as_raw() as u64), &task::zombie(&process.stat))?;
            continue;
        };
        let sleeps = process.threads.iter().any(waits::sleeps);
        let records = surveyor.threads(process.pid, sleeps)?;
        pages.add(write_process(cx, process, vmas, entries, &records, id, (&mut aside, beside.as_ref()))?);
        if let Some(table) = fdinfo.get(&process.shown.by) {
            dir.write_all(ImageKind::Fdinfo.id(id.into()), table)?;
        }
    }
    aside.come_back().map_err(ObjectError::from)?;
    drop(beside);
    // Some things only a thread itself has told.
    stop_if_refused(cx)?;
    info!(pages = pages.written, "all processes are written");
    let shared = shmem::dump_all(cx, frozen.processes.len() as u32 + 1)?;
    pages.add(shared);
    info!(pages = shared.written, "shared memory is written");
    seccomp::write(cx)?;
    cgroup::write(cx)?;
    dir.write_all(ImageKind::Pstree, &tree::capture(&frozen.processes))?;
    dir.write_one(ImageKind::Timens.id(0), &clocks::capture(frozen.processes[0].shown.by)?)?;
    memfd::finish(cx)?;
    locks::finish(cx)?;
    let links = ghost::finish(cx)?;
    // Programs and directories are looked at with their process.
    stop_if_refused(cx)?;
    dir.write_all(ImageKind::Files, &cx.take_files())?;
    Ok((pages, links))
}

fn stop_if_refused(cx: &mut Capture<'_>) -> Result<(), DumpError> {
    if cx.refusals.is_empty() { Ok(()) } else { Err(DumpError::Refused(std::mem::take(&mut cx.refusals))) }
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

fn write_process<'f>(
    cx: &mut Capture<'_>,
    process: &'f FrozenProcess,
    vmas: Vec<Vma>,
    entries: Vec<crate::image::proto::VmaEntry>,
    records: &ThreadRecords,
    id: u32,
    (aside, beside): (&mut Aside<'f>, Option<&Beside>),
) -> Result<Pages, DumpError> {
    let pid = process.pid;
    let (Some(memory), Some(first)) = (&process.memory, process.threads.first()) else {
        return Err(ObjectError::contradiction(format!("pid {pid} has no thread")).into());
    };
    if let Some(call) = first.filters.as_deref().and_then(alone::obstacle) {
        warn!(
            pid = pid.as_raw(),
            call,
            "the process forbids itself a call that the agent makes: it is not proof against the engine's being killed in the next milliseconds"
        );
    }
    let mut guest = Guest::enter(pid, &process.pidfd, first.door(beside), memory, &vmas).map_err(ObjectError::from)?;
    debug!(pid = pid.as_raw(), areas = vmas.len(), "the agent is in");
    let task::Captured { cores, mm } = task::capture(cx, process, &mut guest, entries, records)?;
    debug!(pid = pid.as_raw(), threads = cores.len(), "its state is read");
    let name = |kind: ImageKind| kind.id(pid.as_raw() as u64);
    let orphans = live::orphans(&cores);
    let original = live::Original { process, vmas: &vmas, pages_id: id, orphans };
    let mut pages = Pages::default();
    if let Some(mut mm) = Live::copy(cx, &mut guest, original, mm, aside)? {
        pages = memory::dump_private(cx, &mut guest, process, &vmas, id, &mut mm.vmas)?;
        debug!(pid = pid.as_raw(), scanned = pages.scanned, written = pages.written, "its memory is written");
        cx.dir.write_one(name(ImageKind::Mm), &mm)?;
    }
    live::leave(cx.shelf.get(), guest, process, orphans, aside).map_err(ObjectError::from)?;
    debug!(pid = pid.as_raw(), "the agent is out");
    for (tid, core) in &cores {
        cx.dir.write_one(ImageKind::Core.id(tid.as_raw() as u64), core)?;
    }
    let fs_entry = fs::capture(cx, process.shown.by)?;
    cx.dir.write_one(name(ImageKind::Fs), &fs_entry)?;
    cx.dir.write_one(name(ImageKind::Ids), &own_ids(id))?;
    Ok(pages)
}

/// Every process has its own address space, descriptors, directories and signal actions; sharing them between processes
/// is refused.
fn own_ids(id: u32) -> TaskKobjIdsEntry {
    TaskKobjIdsEntry { vm_id: id, files_id: id, fs_id: id, sighand_id: id, ..TaskKobjIdsEntry::default() }
}

/// The ids of the engine's own objects, of which the tree shares none.
const ENGINE_IDS: u32 = i32::MAX as u32;

fn inventory() -> InventoryEntry {
    InventoryEntry {
        fdinfo_per_id: Some(true),
        ns_per_id: Some(true),
        root_ids: Some(own_ids(ENGINE_IDS)),
        root_cg_set: Some(cgroup::ENGINE_SET),
        ..InventoryEntry::default()
    }
}

fn write_stats(options: &DumpOptions, summary: &Summary) -> Result<(), ImageError> {
    let micros = |d: Duration| d.as_micros() as u32;
    let stats = StatsEntry {
        dump: Some(DumpStatsEntry {
            freezing_time: micros(summary.freezing),
            frozen_time: micros(summary.frozen),
            memwrite_time: micros(summary.writing),
            pages_scanned: summary.pages_scanned,
            pages_written: summary.pages_written,
            pages_skipped_parent: summary.pages_in_parent,
            ..DumpStatsEntry::default()
        }),
        restore: None,
    };
    crate::image::write_service(&options.work_dir, ImageKind::StatsDump, &stats)?;
    Ok(())
}
