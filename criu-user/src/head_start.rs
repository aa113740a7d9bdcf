//! A head start: what was written since the parent image is copied while the tree still runs, into an image of its own
//! between the parent and the dump. In the freeze there is only left what was written meanwhile.
//!
//! A program that writes 5000 pages a second has written tens of thousands since a parent that took long to make, and each
//! costs the freeze two microseconds or more. Copied beforehand they take some tenths of a second, in which it writes a
//! thousand.
//!
//! The tracking session hears nothing of it: if the dump fails, it goes on from the parent, and what was copied goes away.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::time::Instant;

use nix::unistd::Pid;
use tracing::{info, warn};

use crate::image::proto::InventoryEntry;
use crate::image::{ImageDir, ImageError, Lasting};
use crate::kernel::page_set::PageSet;
use crate::kernel::proc::Shown;
use crate::kernel::survey::PAGE;
use crate::lineage::{self, Lineage};
use crate::object::memory::{History, estimate};
use crate::observer::Observer;
use crate::predump::{self, Counts, PreDumpError, copy_process};
use crate::track::predict;

/// Where it is, from the directory of the dump. Pre-dumps of `--max-freeze` are beside it.
pub const PLACE: &str = "pre-dumps/last";

/// What was copied beforehand, if anything was. Goes away with this, unless it was kept.
#[derive(Debug, Default)]
pub struct HeadStart {
    image: Option<ImageDir>,
    /// Pages copied of each process.
    copied: HashMap<Pid, u64>,
    /// Pages that the tree writes in a second.
    rate: u64,
    /// When the first was copied, or before.
    begin: Option<Instant>,
    kept: bool,
}

impl HeadStart {
    /// Copies what is written since the `parent` of the dump in `dir`, if that is worth it, and makes it the parent. What
    /// cannot be copied now is left to the freeze.
    pub fn take(
        dir: &ImageDir,
        parent: Option<&Path>,
        observer: &dyn Observer,
        lineage: &Lineage,
        history: History,
    ) -> Result<(History, Self), ImageError> {
        let Some(parent) = parent.filter(|_| !history.is_empty()) else { return Ok((history, Self::default())) };
        let missing = |&(pid, _): &(_, u64)| (estimate(pid) / PAGE).saturating_sub(history.pages_of(pid));
        let pages = lineage.tracked.iter().map(missing).sum();
        if !predict::is_worth_a_head_start(pages, lineage.written_per_second / PAGE) {
            return Ok((history, Self::default()));
        }
        let begin = Instant::now();
        match Self::copy(dir, parent, observer, lineage, &history) {
            Ok((new, head_start)) => {
                dir.set_parent(Path::new(PLACE))?;
                let (pages, took) = (head_start.pages(), begin.elapsed());
                info!(pages, ?took, "written since the parent, and copied beforehand");
                Ok((new, head_start))
            }
            Err(err) => {
                warn!(%err, "what was written since the parent is copied in the freeze, not beforehand");
                Ok((history, Self::default()))
            }
        }
    }

    fn copy(
        dir: &ImageDir,
        parent: &Path,
        observer: &dyn Observer,
        lineage: &Lineage,
        history: &History,
    ) -> Result<(History, Self), PreDumpError> {
        let place = dir.path().join(PLACE);
        let above = dir.path().join(Path::new(PLACE).parent().unwrap_or(Path::new("")));
        fs::create_dir_all(&above).map_err(|source| ImageError::File {
            file: above,
            offset: 0,
            call: "mkdir",
            source,
        })?;
        let image = ImageDir::create(&place)?;
        let mut head_start = Self::default();
        head_start.rate = lineage.written_per_second / PAGE;
        head_start.begin = Some(Instant::now());
        let image = &*head_start.image.insert(image);
        // A path that is not absolute starts in the directory of the dump, and this one is two deeper.
        image.set_parent(&Path::new("../..").join(parent))?;
        let mut counts = Counts::default();
        for (n, &(pid, _)) in lineage.tracked.iter().enumerate() {
            let Some(shown) = Shown::find(pid) else { continue };
            let before = counts.written;
            copy_process(image, observer, shown, history.of(pid), n as u32 + 1, &mut counts)?;
            head_start.copied.insert(pid, counts.written - before);
        }
        let inventory = InventoryEntry { dump_id: Some(lineage::new_id()?), ..predump::inventory() };
        // It gets to disk with the dump, which brings all of the file system there.
        image.commit(&inventory, Lasting::Written)?;
        // The session has armed all pages before any was copied: in the freeze, the page map tells which were written since.
        let nothing: Vec<_> = lineage.tracked.iter().map(|&(pid, _)| (pid, PageSet::default())).collect();
        let mut copied = History::new(image, &nothing)?;
        copied.go_by(history.marks().clone());
        Ok((copied, head_start))
    }

    /// How many pages were copied.
    pub fn pages(&self) -> u64 {
        self.copied.values().sum()
    }

    /// How many pages of a process the freeze is expected to write besides what would be written without this.
    pub fn expected(&self, pid: Pid) -> u64 {
        let Some(begin) = self.begin else { return 0 };
        let all = self.rate as f64 * begin.elapsed().as_secs_f64();
        let share = self.copied.get(&pid).map_or(0.0, |&pages| pages as f64 / self.pages().max(1) as f64);
        (all * share) as u64
    }

    /// Keeps it: the dump is complete.
    pub fn keep(&mut self) {
        self.kept = true;
    }
}

impl Drop for HeadStart {
    fn drop(&mut self) {
        if let Some(image) = self.image.as_ref().filter(|_| !self.kept)
            && let Err(err) = fs::remove_dir_all(image.path())
        {
            warn!(%err, place = %image.path().display(), "what was copied for a dump that failed is still there");
        }
    }
}
