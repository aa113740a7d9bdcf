//! The round before a live dump: all of the memory is copied while the tree runs, so that the freeze has only what was
//! written meanwhile.
//!
//! It needs a tracking session. One that was started for it ends with the dump.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use tracing::{info, warn};

use super::Manner;
use crate::dump::DumpOptions;
use crate::image::{ImageError, Lasting};
use crate::kernel::proc;
use crate::lineage::{LineageError, Tracking};
use crate::object::memory::estimate;
use crate::observer::Observer;
use crate::predump::{PreDumpError, PreDumpOptions, pre_dump};
use crate::track::TrackError;
use crate::track::client::{self, Client, Started};
use crate::track::method::Method;
use crate::track::report::Report;

/// Where the images of that round are, from the directory of the dump. What was written during the round comes beside it
/// (head_start.rs).
const PLACE: &str = "pre-dumps/1";

/// Bytes from which on a copy takes so long that a round is made without being asked for: 5 ms in small pages.
const MUCH: u64 = 256 << 20;

/// How long a session may take to end with its engine.
const PATIENCE: Duration = Duration::from_secs(5);

/// A round that was made. Its images go away with this unless they are kept, and the session does in any case.
#[derive(Debug)]
pub struct Round {
    /// Longest time for which a process was stopped, to begin tracking its memory.
    pub stopped: Duration,
    images_dir: PathBuf,
    kept: bool,
    /// The root of the tree, if the session was started for the round alone.
    hired: Option<Pid>,
}

impl Round {
    /// Makes it, where `options` want it or a copy would take long, and makes it the parent of the dump.
    pub fn make(options: &mut DumpOptions, observer: &dyn Observer) -> Result<Option<Self>, PreDumpError> {
        let Some(manner) = options.live.filter(|&manner| manner != Manner::Copies) else { return Ok(None) };
        if options.tracking.prev_images_dir.is_some() {
            return Ok(None);
        }
        let is_much = || proc::tree(options.pid).into_iter().map(estimate).sum::<u64>() >= MUCH;
        if manner == Manner::Auto && (!is_much() || is_built_on(options)?) {
            return Ok(None);
        }
        match Self::try_make(options, observer) {
            Ok(round) => {
                options.tracking.prev_images_dir = Some(PathBuf::from(PLACE));
                Ok(Some(round))
            }
            Err(err) if manner == Manner::Auto && is_for_want_of_tracking(&err) => {
                info!(%err, "its memory cannot be tracked: it will be written from copies");
                Ok(None)
            }
            Err(err) => Err(err),
        }
    }

    fn try_make(options: &DumpOptions, observer: &dyn Observer) -> Result<Self, PreDumpError> {
        let pid = options.pid;
        let hired = if !options.tracking.track_mem && hire(pid, options.tracking.method)? { Some(pid) } else { None };
        let images_dir = options.images_dir.join(PLACE);
        fs::create_dir_all(&images_dir).map_err(|source| failed(&images_dir, source))?;
        let mut round = Self { stopped: Duration::ZERO, images_dir: images_dir.clone(), kept: false, hired };
        let wanted = PreDumpOptions {
            pid,
            images_dir,
            work_dir: options.work_dir.clone(),
            tracking: Tracking { track_mem: true, method: options.tracking.method, ..Tracking::default() },
            // The dump brings it to disk with itself.
            lasting: Lasting::Written,
        };
        let summary = pre_dump(&wanted, observer)?;
        info!(pages = summary.pages_written, took = ?summary.total, "its memory is copied, and what it writes is known");
        round.stopped = summary.frozen;
        Ok(round)
    }

    /// Keeps its images: the dump is complete.
    pub fn keep(&mut self) {
        self.kept = true;
    }

    fn remove(&self) {
        match fs::remove_dir_all(&self.images_dir) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => {
                warn!(%err, place = %self.images_dir.display(), "the round of a live dump that failed is still there");
            }
            // There may be others beside it.
            _ => drop(self.images_dir.parent().map(fs::remove_dir)),
        }
    }
}

fn failed(place: &Path, source: io::Error) -> PreDumpError {
    ImageError::File { file: place.to_owned(), offset: 0, call: "mkdir", source }.into()
}

/// Whether somebody has made an image of the tree to build on, which a round would take from him.
fn is_built_on(options: &DumpOptions) -> Result<bool, TrackError> {
    match session(options.pid)? {
        Some(report) => Ok(!options.tracking.track_mem && report.has_image),
        None => Ok(false),
    }
}

/// Starts a session that ends with us, however we do, and tells whether it did: not if there is one already. For memory it
/// needs no eBPF programs, and nobody asks it for anything else.
fn hire(pid: Pid, method: Method) -> Result<bool, TrackError> {
    let mut words = vec!["--with".into(), std::process::id().to_string().into(), "--no-ebpf".into()];
    words.extend(method.words());
    while session(pid)?.is_none() {
        if client::start(pid, &words)? == Started::New {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What the session of a tree knows, if there is one. That of an engine which was killed is waited for: it is about to end.
fn session(pid: Pid) -> Result<Option<Report>, TrackError> {
    let end = Instant::now() + PATIENCE;
    loop {
        let Some(mut client) = Client::connect(pid)? else { return Ok(None) };
        let ended = match client.report() {
            Ok(report) if report.ends_with.is_none_or(is_there) => return Ok(Some(report)),
            Ok(_) => Ok(()),
            Err(err) => Err(err),
        };
        if Instant::now() > end {
            ended?;
            return Err(TrackError::NoSession { pid: pid.as_raw() });
        }
        client.patience(PATIENCE)?;
        client.wait_for_its_end();
    }
}

fn is_there(pid: i32) -> bool {
    kill(Pid::from_raw(pid), None) != Err(Errno::ESRCH)
}

fn is_for_want_of_tracking(err: &PreDumpError) -> bool {
    matches!(
        err,
        PreDumpError::Untracked { .. } | PreDumpError::Track(_) | PreDumpError::Lineage(LineageError::Track(_))
    )
}

impl Drop for Round {
    fn drop(&mut self) {
        if !self.kept {
            self.remove();
        }
        let Some(pid) = self.hired else { return };
        // With a tree that has ended it ends by itself.
        if let Ok(Some(client)) = Client::connect(pid)
            && let Err(err) = client.stop()
        {
            warn!(%err, "the tracking session of the live dump is still there: criu-ebpf track --stop {pid}");
        }
    }
}
