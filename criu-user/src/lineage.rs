//! What an image builds on: the parent that the user named, and what a tracking session knows of the time since.

use std::path::PathBuf;
use std::time::Duration;

use nix::unistd::Pid;
use tracing::{debug, info, warn};

use crate::image::proto::InventoryEntry;
use crate::image::{ImageDir, ImageError};
use crate::kernel::SysResult;
use crate::kernel::page_set::PageSet;
use crate::kernel::proc;
use crate::object::memory::History;
use crate::track::TrackError;
use crate::track::client::Client;
use crate::track::wire::Tracked;

/// What the user wants of memory tracking.
#[derive(Debug, Clone, Default)]
pub struct Tracking {
    /// Whether a session is to track memory from here on; it is started if there is none.
    pub track_mem: bool,
    /// The images that these build on, as the user says it: from the images directory, if it is no absolute path.
    pub prev_images_dir: Option<PathBuf>,
    /// Whether data in the parents that these images replace is given up.
    pub auto_dedup: bool,
}

/// Why nothing can be built on.
#[derive(Debug, thiserror::Error)]
pub enum LineageError {
    /// The parent cannot be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The session cannot be asked.
    #[error(transparent)]
    Track(#[from] TrackError),
    /// No name for the images.
    #[error(transparent)]
    Sys(#[from] crate::kernel::SysError),
}

/// An image's connection with the one before it. Dropped before [`Lineage::commit`], the session goes on as if there had
/// been no image.
#[derive(Debug)]
pub struct Lineage {
    client: Option<Client>,
    id: Vec<u8>,
    /// Processes that are tracked, and when they began.
    pub tracked: Vec<(Pid, u64)>,
    /// Processes that are not tracked, and why.
    pub untracked: Vec<(Pid, String)>,
    /// Longest time for which a process was stopped, to begin tracking it.
    pub stopped: Duration,
}

impl Lineage {
    /// Connects the images in `dir`, which are being made, with what was before. From here on until the end of this, the
    /// session leaves the tree alone.
    pub fn begin(pid: Pid, wanted: &Tracking, dir: &ImageDir) -> Result<(Self, History), LineageError> {
        let mut lineage =
            Self { client: None, id: new_id()?, tracked: Vec::new(), untracked: Vec::new(), stopped: Duration::ZERO };
        let parent = match &wanted.prev_images_dir {
            Some(path) => {
                dir.set_parent(path)?;
                dir.parent()?
            }
            None => None,
        };
        let client = match wanted.track_mem {
            true => Some(Client::connect_or_start(pid)?),
            false if parent.is_some() => Client::connect(pid)?,
            false => None,
        };
        let Some(mut client) = client else {
            if parent.is_some() {
                warn!("nobody tracked the tree since its parent image: all of its memory is written");
            }
            return Ok((lineage, History::default()));
        };
        let begun = client.begin()?;
        lineage.client = Some(client);
        lineage.stopped = Duration::from_micros(begun.stopped_us());
        let mut written = Vec::new();
        for process in &begun.processes {
            if let Some(why) = &process.untracked {
                info!(pid = process.pid, why, "its memory is not tracked, and all of it is written");
                lineage.untracked.push((Pid::from_raw(process.pid), why.clone()));
            } else if let Some(pages) = believed(process) {
                let pid = Pid::from_raw(process.pid);
                debug!(pid = process.pid, pages = pages.len(), "written since the last image");
                lineage.tracked.push((pid, process.start_time));
                written.push((pid, pages));
            }
        }
        let history = match parent {
            Some(parent) if builds_on(&parent, &begun.since)? => History::new(&parent, &written)?,
            _ => History::default(),
        };
        Ok((lineage, history))
    }

    /// Whether a session is asked to go on from this image.
    pub fn is_tracked(&self) -> bool {
        self.client.is_some()
    }

    /// Tells the session that the pages are armed by the engine itself from here on.
    pub fn arming(&mut self) -> Result<(), TrackError> {
        self.client.as_mut().map_or(Ok(()), Client::arming)
    }

    /// Enters the image's name into its inventory.
    pub fn describe(&self, inventory: &mut InventoryEntry) {
        inventory.dump_id = Some(self.id.clone());
    }

    /// The image is complete: the session collects for the one after it.
    pub fn commit(mut self) -> Result<(), TrackError> {
        match &mut self.client {
            Some(client) => client.commit(&self.id),
            None => Ok(()),
        }
    }
}

/// What was written to the memory of a process, if that is known.
fn believed(process: &Tracked) -> Option<PageSet> {
    let stat = proc::stat(Pid::from_raw(process.pid), None).ok()?;
    if stat.start_time != process.start_time {
        return None;
    }
    PageSet::from_bytes(&process.written)
}

/// Whether the session has collected since just this parent.
fn builds_on(parent: &ImageDir, since: &[u8]) -> Result<bool, ImageError> {
    let id = parent.inventory()?.dump_id.unwrap_or_default();
    let same = !id.is_empty() && id == since;
    if !same {
        let what = if since.is_empty() { "none before this one" } else { "another image" };
        warn!(
            parent = %parent.path().display(),
            "the session has tracked since {what}, not since the parent image: all memory is written"
        );
    }
    Ok(same)
}

/// A name that no other image has.
fn new_id() -> SysResult<Vec<u8>> {
    Ok(proc::read_text("/proc/sys/kernel/random/uuid")?.trim().as_bytes().to_vec())
}
