//! What an image builds on: the parent that the user named, and what a tracking session knows of the time since.

use std::collections::{HashMap, HashSet};
use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::Duration;

use nix::unistd::Pid;
use tracing::{debug, info, warn};

use crate::freeze::Release;
use crate::image::proto::InventoryEntry;
use crate::image::{ImageDir, ImageError};
use crate::kernel::SysResult;
use crate::kernel::page_set::PageSet;
use crate::kernel::pagemap::Marks;
use crate::kernel::proc;
use crate::object::memory::{History, Past};
use crate::track::TrackError;
use crate::track::client::{Client, PATIENCE};
use crate::track::method::Method;
use crate::track::wire::{Begun, Tracked};

/// What the user wants of memory tracking.
#[derive(Debug, Clone, Default)]
pub struct Tracking {
    /// Whether a session is to track memory from here on; it is started if there is none.
    pub track_mem: bool,
    /// By what.
    pub method: Method,
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

/// How long the session may take to answer while the tree stands still.
const IN_THE_FREEZE: Duration = Duration::from_millis(500);

/// How long to wait for the end of a session that does not answer any more.
const DYING: Duration = Duration::from_millis(20);

/// An image's connection with the one before it. Dropped before [`Lineage::commit`], the session goes on as if there had
/// been no image.
#[derive(Debug, Default)]
pub struct Lineage {
    client: Option<Client>,
    id: Vec<u8>,
    /// Processes that are tracked, and when they began.
    pub tracked: Vec<(Pid, u64)>,
    /// Processes that are not tracked, and why.
    pub untracked: Vec<(Pid, String)>,
    /// Longest time for which a process was stopped, to begin tracking it.
    pub stopped: Duration,
    /// What the tree writes in a second, in bytes.
    pub written_per_second: u64,
}

impl Lineage {
    /// Connects the images in `dir`, which are being made, with what was before. From here on until the end of this, the
    /// session leaves the tree alone.
    pub fn begin(pid: Pid, wanted: &Tracking, dir: &ImageDir) -> Result<(Self, History), LineageError> {
        let mut lineage = Self { id: new_id()?, ..Self::default() };
        let parent = match &wanted.prev_images_dir {
            Some(path) => {
                dir.set_parent(path)?;
                dir.parent()?
            }
            None => None,
        };
        let Some((client, begun)) = connect(pid, wanted, parent.is_some())? else {
            if parent.is_some() {
                warn!("nobody tracked the tree since its parent image: all of its memory is written");
            }
            return Ok((lineage, History::default()));
        };
        lineage.client = Some(client);
        lineage.stopped = Duration::from_micros(begun.stopped_us());
        lineage.written_per_second = begun.written_per_second();
        info!(stopped = ?lineage.stopped, "the session tells what was written");
        let mut written = Vec::new();
        let mut marked = HashMap::new();
        for process in &begun.processes {
            let marks = if process.soft_dirty() { Marks::SoftDirty } else { Marks::Userfaultfd };
            if !wanted.method.admits(marks) {
                return Err(TrackError::OtherMethod { pid: pid.as_raw() }.into());
            }
            marked.insert(Pid::from_raw(process.pid), marks);
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
        let mut history = match parent {
            Some(parent) if builds_on(&parent, &begun.since)? => History::new(&parent, &written)?,
            _ => History::default(),
        };
        history.go_by(marked);
        Ok((lineage, history))
    }

    /// Whether a session is asked to go on from this image.
    pub fn is_tracked(&self) -> bool {
        self.client.is_some()
    }

    /// In the freeze: what of the history holds, and whose pages are to be armed for the image after this one.
    ///
    /// Only a session that was there all the time knows of all writes. Where it died meanwhile and another one began, the
    /// other has armed pages without telling us what it found; it cannot begin in the freeze.
    pub fn confirm(&mut self, mut history: History, release: Release) -> Past {
        let Some(client) = &mut self.client else { return Past { history, ..Past::default() } };
        let ask = |client: &mut Client| {
            client.patience(IN_THE_FREEZE)?;
            let tracked = if release == Release::Kill { client.confirm()? } else { client.arming()? };
            client.patience(PATIENCE)?;
            Ok::<_, TrackError>(tracked)
        };
        match ask(client) {
            Ok(tracked) => {
                let known = self.tracked.iter().map(|&(pid, _)| pid);
                let tracked: HashSet<Pid> = known.filter(|pid| tracked.contains(pid)).collect();
                history.keep(|pid| tracked.contains(&pid));
                // A tree that is killed has no next image; and if it is not, because the dump fails, what the session
                // has not seen must stay to be seen.
                let arms = if release == Release::Kill { HashSet::new() } else { tracked };
                Past { history, arms, ..Past::default() }
            }
            Err(err) => {
                warn!(%err, "the tracking session is gone: all memory is written");
                self.client = None;
                Past::default()
            }
        }
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

/// Finds the session, or starts one where it is wanted, and takes what it knows. One that was killed this very moment still
/// takes connections, and answers none.
fn connect(pid: Pid, wanted: &Tracking, has_parent: bool) -> Result<Option<(Client, Begun)>, TrackError> {
    const TRIES: usize = 10;
    let is_end = |kind| matches!(kind, ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe);
    for n in 1.. {
        let client = match wanted.track_mem {
            true => Some(Client::connect_or_start(pid, wanted.method)?),
            false if has_parent => Client::connect(pid)?,
            false => None,
        };
        let Some(mut client) = client else { break };
        match client.begin() {
            Err(TrackError::Socket { source, .. }) if n < TRIES && is_end(source.kind()) => {
                debug!(%source, "the session has just ended");
                std::thread::sleep(DYING);
            }
            begun => return Ok(Some((client, begun?))),
        }
    }
    Ok(None)
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
pub(crate) fn new_id() -> SysResult<Vec<u8>> {
    Ok(proc::read_text("/proc/sys/kernel/random/uuid")?.trim().as_bytes().to_vec())
}
