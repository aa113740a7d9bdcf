//! `track --cgroup`: all trees that are in a control group, and those that come into it later. Each has a session of its
//! own, so that dumps find it.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep;

use super::{Outcome, TrackArgs, begin_in_background, line, print, runtime, session_words};
use crate::cli::say;
use crate::kernel::cgroup::members;
use crate::kernel::ebpf::Watch;
use crate::kernel::ebpf::watch::{Questions, What};
use crate::kernel::pidfd::PidFd;
use crate::track::TrackError;
use crate::track::client::{Client, Started};
use crate::track::report::Report;
use crate::track::tree::roots_in;

/// What has become of the trees of a group.
#[derive(Debug)]
struct Group<'a> {
    dir: &'a Path,
    args: &'a TrackArgs,
    /// Further words for sessions.
    words: Vec<OsString>,
    /// Roots that were found. One that was told to stop is not begun with again.
    seen: BTreeSet<Pid>,
    /// Of these, those whose sessions we have started.
    ours: BTreeSet<Pid>,
}

impl<'a> Group<'a> {
    fn new(dir: &'a Path, args: &'a TrackArgs, words: Vec<OsString>) -> Self {
        Self { dir, args, words, seen: BTreeSet::new(), ours: BTreeSet::new() }
    }

    /// Begins sessions for the trees that are there at first; gives their roots.
    fn begin(&mut self) -> Result<Vec<Pid>, TrackError> {
        let roots = roots_in(self.dir)?;
        if roots.len() > 1 && self.args.metrics.are_wanted() {
            let (path, roots) = (self.dir.to_owned(), roots.into_iter().map(Pid::as_raw).collect());
            return Err(TrackError::SeveralTrees { path, roots });
        }
        self.begin_with(roots, Err)
    }

    /// The same for those that are new. One that cannot be tracked is passed over.
    fn look(&mut self) -> Result<Vec<Pid>, TrackError> {
        let roots = match roots_in(self.dir) {
            // It may fill again.
            Err(TrackError::EmptyGroup { .. }) => Vec::new(),
            roots => roots?,
        };
        self.begin_with(roots, |err| {
            tracing::warn!(%err, "a tree of the control group is not tracked");
            Ok(())
        })
    }

    fn begin_with(
        &mut self,
        roots: Vec<Pid>,
        fails: impl Fn(TrackError) -> Result<(), TrackError>,
    ) -> Result<Vec<Pid>, TrackError> {
        self.seen.retain(|pid| roots.contains(pid));
        self.ours.retain(|pid| roots.contains(pid));
        let mut new = Vec::new();
        for root in roots {
            if !self.seen.insert(root) {
                continue;
            }
            match begin_in_background(root, self.args, &self.words) {
                Ok(Some(Started::New)) => {
                    self.ours.insert(root);
                    new.push(root);
                }
                Ok(_) => new.push(root),
                // It ended meanwhile.
                Err(_) if PidFd::open(root).is_err() => {}
                Err(err) => fails(err)?,
            }
        }
        Ok(new)
    }

    fn is_empty(&self) -> bool {
        members(self.dir).is_empty()
    }

    /// Ends the sessions that were begun.
    fn stop(&self) {
        for &root in &self.ours {
            if let Ok(Some(client)) = Client::connect(root)
                && let Err(err) = client.stop()
            {
                tracing::warn!(pid = root.as_raw(), %err, "its session may go on");
            }
        }
    }
}

/// Tells when somebody comes into the group: by eBPF at once, else after an interval.
#[derive(Debug)]
struct Arrivals {
    watch: Option<Watch>,
    interval: Duration,
}

impl Arrivals {
    fn new(dir: &Path, args: &TrackArgs) -> Self {
        let interval = Duration::from_millis(args.interval);
        if args.no_ebpf {
            return Self { watch: None, interval };
        }
        let watch = Watch::start(Questions::LIFECYCLE).and_then(|mut watch| {
            watch.follow_cgroup(dir)?;
            Ok(watch)
        });
        let watch = watch.inspect_err(|err| tracing::info!(%err, "new trees are looked for at each interval")).ok();
        Self { watch, interval }
    }

    async fn wait(&mut self) {
        let pause = sleep(self.interval);
        let Some(watch) = &mut self.watch else { return pause.await };
        let somebody = async {
            loop {
                match watch.next().await {
                    Ok(event) if matches!(event.what, What::Moved { is_in: true }) => return,
                    Ok(_) => {}
                    Err(err) => {
                        tracing::info!(%err, "new trees are looked for at each interval");
                        return std::future::pending().await;
                    }
                }
            }
        };
        tokio::select! {
            () = somebody => {}
            () = pause => {}
        }
    }
}

/// Follows the group in the foreground: reports of all trees, as lines. The sessions end with this process.
pub(super) fn run(dir: &Path, args: &TrackArgs) -> Outcome {
    let own = Pid::this();
    let mut group = Group::new(dir, args, vec!["--with".into(), own.to_string().into()]);
    let ended: Result<(), TrackError> = runtime(own)?.block_on(async {
        let failed = |source| TrackError::Group { path: dir.to_owned(), source };
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let mut new = group.begin()?;
        let mut arrivals = Arrivals::new(dir, args);
        while !group.is_empty() {
            new.extend(group.look()?);
            for root in new.drain(..) {
                follow(root, args.json)?;
            }
            tokio::select! {
                () = arrivals.wait() => {}
                _ = interrupt.recv() => return Ok(()),
                _ = terminate.recv() => return Ok(()),
            }
        }
        if !args.json {
            say(format_args!("there is no process in {} any more", dir.display()));
        }
        Ok(())
    });
    group.stop();
    ended?;
    Ok(ExitCode::SUCCESS)
}

/// Prints what a session reports, until it ends or we do.
fn follow(root: Pid, json: bool) -> Result<(), TrackError> {
    let Some(mut client) = Client::connect(root)? else { return Ok(()) };
    client.follow()?;
    std::thread::spawn(move || {
        while let Ok(Some(report)) = client.next_report() {
            tell(&report, json);
        }
    });
    Ok(())
}

fn tell(report: &Report, json: bool) {
    if json {
        print(report, true);
    } else {
        say(format_args!("{}: {}", report.pid, line(report)));
    }
}

/// Begins sessions in the background, and has somebody stay there who does so for trees that come later.
pub(super) fn detach(dir: &Path, args: &TrackArgs) -> Outcome {
    let dir = dir.canonicalize().map_err(|source| TrackError::Group { path: dir.to_owned(), source })?;
    Group::new(&dir, args, Vec::new()).begin()?;
    let mut keeper = Command::new("/proc/self/exe");
    keeper.args(["track", "--keep", "--cgroup"]).arg(&dir).args(session_words(args)?);
    keeper.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    keeper.spawn().map_err(|source| TrackError::Group { path: dir, source })?;
    Ok(ExitCode::SUCCESS)
}

/// Stays in the background, as long as a tree of the group has a session.
pub(super) fn keep(dir: &Path, args: &TrackArgs) -> Outcome {
    // Fails where it leads a group already: then it is on its own as well.
    let _ = nix::unistd::setsid();
    let moved = std::env::set_current_dir("/");
    moved.map_err(|source| TrackError::Group { path: PathBuf::from("/"), source })?;
    let mut group = Group::new(dir, args, Vec::new());
    runtime(Pid::this())?.block_on(async {
        let mut arrivals = Arrivals::new(dir, args);
        loop {
            group.look()?;
            let has_session = |root: &Pid| matches!(Client::connect(*root), Ok(Some(_)));
            if !group.seen.iter().any(has_session) {
                return Ok::<_, TrackError>(());
            }
            arrivals.wait().await;
        }
    })?;
    Ok(ExitCode::SUCCESS)
}
