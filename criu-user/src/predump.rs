//! A pre-dump: the memory of a tree that runs on. A later dump, or pre-dump, takes only what was written since.
//!
//! The tracking session hands over which pages were written since the last image and collects anew from that instant;
//! then the pages are copied from outside, while the tree runs. What changes during the copying, or is not there any
//! more, was written since the instant, and the next image has it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use serde::Serialize;
use tracing::{debug, info, warn};

use crate::dump::{micros, rate};
use crate::image::proto::{DumpStatsEntry, InventoryEntry, StatsEntry};
use crate::image::{ImageDir, ImageError, ImageKind, Lasting, PageRange, PagesWriter};
use crate::kernel::limits::ManyFiles;
use crate::kernel::mem::ProcessMemory;
use crate::kernel::pagemap::{PageKind, PageMap, Region};
use crate::kernel::proc::Shown;
use crate::kernel::survey::{self, PAGE};
use crate::kernel::{SysError, fd};
use crate::lineage::{Lineage, LineageError, Tracking};
use crate::object::memory::{Clean, Place, is_private, own_pages};
use crate::observer::{Moment, Objection, Observer, tell};
use crate::track::TrackError;

/// What to pre-dump.
#[derive(Debug, Clone)]
pub struct PreDumpOptions {
    /// Root of the tree.
    pub pid: Pid,
    /// Where images go.
    pub images_dir: PathBuf,
    /// Where statistics go.
    pub work_dir: PathBuf,
    /// What these images build on.
    pub tracking: Tracking,
    /// How far the images have come when it is done.
    pub lasting: Lasting,
}

/// Why a pre-dump failed. The tree runs on, and is tracked as before.
#[derive(Debug, thiserror::Error)]
pub enum PreDumpError {
    /// The parent, or the session.
    #[error(transparent)]
    Lineage(#[from] LineageError),
    /// The session.
    #[error(transparent)]
    Track(#[from] TrackError),
    /// An image could not be written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A call failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// Somebody does not let it happen.
    #[error(transparent)]
    Objection(#[from] Objection),
    /// Nothing of it can be tracked.
    #[error("no memory of the tree of process {pid} can be tracked ({why}); dump it without pre-dumps")]
    Untracked {
        /// The root of the tree.
        pid: i32,
        /// Why.
        why: String,
    },
}

/// What a pre-dump came to. Times are written in microseconds.
#[derive(Debug, Clone, Serialize)]
pub struct PreDumpSummary {
    /// The root of the tree.
    pub pid: i32,
    /// Processes whose memory is in the images.
    pub processes: usize,
    /// Longest time for which a process stood still; none does once it is tracked.
    #[serde(rename = "frozen_us", serialize_with = "micros")]
    pub frozen: Duration,
    /// All in all.
    #[serde(rename = "total_us", serialize_with = "micros")]
    pub total: Duration,
    /// Pages looked at.
    pub pages_scanned: u64,
    /// Pages written.
    pub pages_written: u64,
    /// Pages that the parent has.
    pub pages_in_parent: u64,
    /// Pages that were written to again before they could be copied: the next image's.
    pub pages_skipped: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// The same in a second.
    pub bytes_per_second: u64,
}

/// Pages of a pre-dump.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    scanned: u64,
    pub written: u64,
    in_parent: u64,
    skipped: u64,
}

/// Pre-dumps a tree.
pub fn pre_dump(options: &PreDumpOptions, observer: &dyn Observer) -> Result<PreDumpSummary, PreDumpError> {
    let begin = Instant::now();
    let _files = ManyFiles::allow();
    let dir = ImageDir::create(&options.images_dir)?;
    info!(pid = options.pid.as_raw(), images = %dir.path().display(), "pre-dump of the tree");
    tell(observer, Moment::PreDump, Some(options.pid))?;
    let (lineage, history) = Lineage::begin(options.pid, &options.tracking, &dir)?;
    if lineage.tracked.is_empty() {
        let reasons: Vec<String> = lineage.untracked.iter().map(|(pid, why)| format!("pid {pid}: {why}")).collect();
        return Err(PreDumpError::Untracked { pid: options.pid.as_raw(), why: reasons.join("; ") });
    }
    let mut counts = Counts::default();
    let mut processes = 0;
    for (n, &(pid, _)) in lineage.tracked.iter().enumerate() {
        let Some(shown) = Shown::find(pid) else { continue };
        copy_process(&dir, observer, shown, history.of(pid), n as u32 + 1, &mut counts)?;
        processes += 1;
    }
    let mut inventory = inventory();
    lineage.describe(&mut inventory);
    dir.commit(&inventory, options.lasting)?;
    let frozen = lineage.stopped;
    lineage.commit()?;
    let total = begin.elapsed();
    let bytes_written = counts.written * PAGE;
    let summary = PreDumpSummary {
        pid: options.pid.as_raw(),
        processes,
        frozen,
        total,
        pages_scanned: counts.scanned,
        pages_written: counts.written,
        pages_in_parent: counts.in_parent,
        pages_skipped: counts.skipped,
        bytes_written,
        bytes_per_second: rate(bytes_written, total),
    };
    if let Err(err) = write_stats(options, &summary) {
        warn!(%err, "the pre-dump is good, but has no statistics");
    }
    info!(pages = counts.written, in_parent = counts.in_parent, skipped = counts.skipped, ?total, "pre-dump finished");
    Ok(summary)
}

/// That of a pre-dump, which has no name yet.
pub(crate) fn inventory() -> InventoryEntry {
    InventoryEntry { pre_dump: Some(true), fdinfo_per_id: Some(true), ..InventoryEntry::default() }
}

/// Statistics as a dump has them.
fn write_stats(options: &PreDumpOptions, summary: &PreDumpSummary) -> Result<(), ImageError> {
    let dump = DumpStatsEntry {
        frozen_time: summary.frozen.as_micros() as u32,
        memwrite_time: summary.total.as_micros() as u32,
        pages_scanned: summary.pages_scanned,
        pages_written: summary.pages_written,
        pages_skipped_parent: summary.pages_in_parent,
        ..DumpStatsEntry::default()
    };
    let stats = StatsEntry { dump: Some(dump), restore: None };
    crate::image::write_service(&options.work_dir, ImageKind::StatsDump, &stats)
}

/// Copies the memory of one process that runs on. Should it end meanwhile, there is less to copy.
pub(crate) fn copy_process(
    dir: &ImageDir,
    observer: &dyn Observer,
    shown: Shown,
    mut clean: Clean<'_>,
    pages_id: u32,
    counts: &mut Counts,
) -> Result<(), PreDumpError> {
    let image = PagesWriter::create(dir, ImageKind::Pagemap.id(shown.pid.as_raw() as u64), pages_id)?;
    let opened =
        || Ok::<_, SysError>((survey::layout_of(shown.by)?, PageMap::open(shown.by)?, ProcessMemory::open(shown.by)?));
    let Ok((areas, map, memory)) = opened() else {
        image.finish()?;
        return Ok(());
    };
    let mut map = map.with_marks(clean.marks);
    observer.expects(crate::object::memory::estimate(shown.by));
    let mut copy = Copy { image, memory, observer, buffer: vec![0; PIECE as usize], skipped: 0 };
    let mut regions = Vec::new();
    for area in areas.iter().filter(|area| is_private(area) && area.special() != Some("[vsyscall]")) {
        counts.scanned += area.len() / PAGE;
        regions.clear();
        // The process may have ended: then nothing is found.
        if map.scan(area.start, area.end, own_pages(area), &mut regions).is_err() {
            break;
        }
        for &region in &regions {
            let kind = PageKind::from_bits_retain(region.categories);
            // What is not tracked, or was written since the instant, the next image must take in any case.
            if kind.contains(PageKind::GUARD) {
                continue;
            }
            if !kind.contains(PageKind::WP_ALLOWED) || kind.contains(PageKind::WRITTEN) {
                counts.skipped += (region.end - region.start) / PAGE;
                continue;
            }
            let mut parts = Vec::new();
            clean.split(region, |part, place| parts.push((part, place)));
            for (part, place) in parts {
                copy.part(part, place)?;
            }
        }
    }
    counts.skipped += copy.skipped;
    let written = copy.image.finish()?;
    counts.written += written.present;
    counts.in_parent += written.in_parent;
    debug!(pid = shown.pid.as_raw(), written = written.present, in_parent = written.in_parent, "its memory is copied");
    Ok(())
}

/// Bytes that are copied at once.
const PIECE: u64 = 1 << 20;

struct Copy<'o> {
    image: PagesWriter,
    memory: ProcessMemory,
    observer: &'o dyn Observer,
    buffer: Vec<u8>,
    skipped: u64,
}

impl Copy<'_> {
    fn part(&mut self, part: Region, place: Place) -> Result<(), PreDumpError> {
        if place == Place::Parent {
            if let Some(range) = PageRange::new(part.start, part.end) {
                self.image.in_parent(range)?;
            }
            return Ok(());
        }
        let mut start = part.start;
        while start < part.end {
            let len = (part.end - start).min(PIECE);
            if !self.piece(start, len)? {
                // Some of it is no longer there: page by page.
                for page in (start..start + len).step_by(PAGE as usize) {
                    if !self.piece(page, PAGE)? {
                        self.skipped += 1;
                    }
                }
            }
            start += len;
        }
        Ok(())
    }

    /// Copies one piece, all of it or nothing.
    fn piece(&mut self, start: u64, len: u64) -> Result<bool, PreDumpError> {
        let bytes = &mut self.buffer[..len as usize];
        if self.memory.read_into(start, bytes).is_err() {
            return Ok(false);
        }
        let Some(range) = PageRange::new(start, start + len) else { return Ok(false) };
        let offset = self.image.append(range)?;
        fd::write_all_at(self.image.pages(), bytes, offset).map_err(|err| ImageError::File {
            file: self.image.pages_path().to_owned(),
            offset,
            call: "pwrite",
            source: err.errno.into(),
        })?;
        self.observer.moved(len);
        Ok(true)
    }
}
