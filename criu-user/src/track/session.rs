//! A session: looks at the tree again and again, and answers at its control socket.
//!
//! Everything happens in one thread, because that is who traces the processes that are stopped for a moment; looks are
//! short, and whoever asks meanwhile waits for the end of one.

use std::cell::{Cell, OnceCell, RefCell};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use nix::unistd::{Pid, Uid};
use prost::Message;
use tokio::io::unix::AsyncFd;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Mutex, Notify, OwnedMutexGuard, watch};
use tokio::task::LocalSet;
use tokio_util::codec::{Framed, LengthDelimitedCodec};

use super::TrackError;
use super::export::{Exporter, MetricsOptions};
use super::measures::Measures;
use super::memory::{Memory, Purpose};
use super::method::Method;
use super::predict::{self, Costs, Measured, Shape};
use super::recorder::Recorder;
use super::report::Report;
use super::tree::{Belief, Tree, TreeLook};
use super::wire::{self, Answer, Ask, Begun, Confirmed, Empty, Reply, Request, Tracked};
use super::witness::{News, Witness};
use crate::freeze;
use crate::kernel::kept;
use crate::kernel::limits::ManyFiles;
use crate::kernel::pagemap::Marks;
use crate::kernel::pidfd::PidFd;
use crate::kernel::survey::PAGE;

/// How long an interval is at least, and at most.
const SHORTEST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(10);
/// The first write to a page after it was armed costs its program this much (docs/tracking.md has the measurement).
const FAULT: Duration = Duration::from_nanos(1300);
/// How long new memory waits for its first look: programs that are short-lived need none.
const SETTLING: Duration = Duration::from_millis(50);
/// How often it is tried again to let a thread go that was not to be had when it should have been.
const LATE: Duration = Duration::from_millis(10);
/// One part in so many of its time may the session spend with looks at new memory.
const EARLY_SHARE: u32 = 10;
/// One part in so many of its time may a program lose to these faults, and a processor to our looks.
const SHARE: u32 = 50;

/// How a session works.
#[derive(Debug, Clone)]
pub struct SessionOptions {
    /// The root of the tree.
    pub root: Pid,
    /// Wanted time between looks; where looks or their faults would cost too much, it is longer.
    pub interval: Duration,
    /// What tells which pages were written.
    pub method: Method,
    /// Whether eBPF programs are used, where they can be.
    pub ebpf: bool,
    /// What SIGINT and SIGTERM do.
    pub signals: Signals,
    /// The process with which it ends.
    pub ends_with: Option<i32>,
    /// Where metrics go.
    pub metrics: MetricsOptions,
}

/// Whose the signals are that come to a session's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signals {
    /// They end the session.
    End,
    /// Somebody else takes care of them.
    Elsewhere,
}

/// Why a session has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The tree has ended.
    Tree,
    /// Somebody stopped it: by a signal, at the socket, or on the screen.
    Stopped,
}

/// A session that is ready: its socket is there.
#[derive(Debug)]
pub struct Session {
    listener: UnixListener,
    socket: SocketFile,
    shared: Rc<Shared>,
    root: AsyncFd<OwnedFd>,
    options: SessionOptions,
    exporter: Exporter,
    _files: ManyFiles,
}

#[derive(Debug)]
struct Shared {
    tree: RefCell<Tree>,
    /// The image since which is collected; empty if there is none.
    since: RefCell<Vec<u8>>,
    /// Held by whoever makes an image.
    hold: Arc<Mutex<()>>,
    reports: watch::Sender<Report>,
    /// The process with which all ends.
    ends_with: Option<i32>,
    stop: Notify,
    measures: Rc<RefCell<Measures>>,
    witness: RefCell<Witness>,
    recorder: RefCell<Recorder>,
    /// What the tree was made of when it was looked at last, and what earlier dumps took.
    shape: RefCell<Shape>,
    measured: RefCell<Vec<Measured>>,
    /// What a dump costs before others have told; found out for the first prediction.
    costs: OnceCell<Costs>,
    last_look: Cell<Option<Instant>>,
    /// Longest time for which a process was stopped since somebody last made an image.
    stopped: Cell<Duration>,
    /// Time that the next interval should take at least.
    breath: Cell<Duration>,
    /// When to look at new memory, if there is some, and how long that took the last time.
    early: Cell<Option<Instant>>,
    early_took: Cell<Duration>,
}

/// Removed with the session.
#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Session {
    /// Begins: from here on, commands find it. Needs a tokio runtime.
    pub fn begin(options: SessionOptions) -> Result<Self, TrackError> {
        let files = ManyFiles::allow();
        let tree = Tree::new(options.root, options.method.marks()?)?;
        let pidfd = PidFd::open(options.root)?;
        let (listener, socket) = listen(options.root)?;
        let root = pidfd.into_async().map_err(|source| TrackError::Socket { path: socket.0.clone(), source })?;
        let exporter = Exporter::begin(&options.metrics, options.root)?;
        // Before the first look, so that nobody who is forked meanwhile is missed.
        let witness = match options.ebpf {
            false => Witness::absent("not wanted (--no-ebpf)"),
            true => Witness::start(options.root),
        };
        let shared = Shared {
            tree: RefCell::new(tree),
            since: RefCell::default(),
            hold: Arc::default(),
            reports: watch::channel(Report { ends_with: options.ends_with, ..Report::default() }).0,
            ends_with: options.ends_with,
            stop: Notify::new(),
            measures: Rc::default(),
            witness: RefCell::new(witness),
            recorder: RefCell::default(),
            shape: RefCell::default(),
            measured: RefCell::default(),
            costs: OnceCell::new(),
            last_look: Cell::default(),
            stopped: Cell::default(),
            breath: Cell::default(),
            early: Cell::default(),
            early_took: Cell::default(),
        };
        let mut session = Self { listener, socket, shared: Rc::new(shared), root, options, exporter, _files: files };
        // The first look brings the userfaultfds in: what cannot be tracked is known before anybody relies on it.
        session.shared.report(Belief::Seen);
        session.exporter.write(&session.shared.measures.borrow(), &session.shared.reports.borrow())?;
        Ok(session)
    }

    /// The reports, one an interval.
    pub fn reports(&self) -> watch::Receiver<Report> {
        self.shared.reports.subscribe()
    }

    /// Works until the tree ends or somebody stops it. `beside` runs beside (a screen, a printer); when it ends, so does
    /// the session.
    pub async fn run(mut self, beside: impl Future<Output = ()>) -> Result<End, TrackError> {
        let path = self.socket.0.clone();
        let failed = |source| TrackError::Socket { path: path.clone(), source };
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let ends = self.options.signals == Signals::End;
        let exporting = std::mem::take(&mut self.exporter).run(self.shared.measures.clone(), self.reports());
        let serving = LocalSet::new();
        let end = serving.run_until(async {
            tokio::select! {
                end = self.watch_tree() => end,
                () = self.serve() => End::Stopped,
                () = beside => End::Stopped,
                () = exporting => End::Stopped,
                () = self.shared.stop.notified() => End::Stopped,
                _ = interrupt.recv(), if ends => End::Stopped,
                _ = terminate.recv(), if ends => End::Stopped,
            }
        });
        let end = end.await;
        // Connections close when `serving` is dropped. Who waits for that finds nothing of ours any more, neither in the tree
        // nor in the way of the next session; nor does a session that begins just now.
        let _turn = kept::turn().inspect_err(|err| tracing::warn!(%err, place = kept::DIR, "it cannot be locked"));
        drop(self.socket);
        drop(self.listener);
        self.shared.tree.borrow_mut().processes.clear();
        self.shared.witness.replace(Witness::absent("the session has ended"));
        tracing::info!(?end, "the session ends");
        Ok(end)
    }

    async fn watch_tree(&self) -> End {
        let shared = &self.shared;
        let ring = shared.witness.borrow().readiness();
        let mut next = Instant::now() + self.pause();
        loop {
            let wake = shared.early.get().map_or(next, |early| early.min(next));
            // Nobody stands still for us now.
            let late = freeze::catch_up();
            tokio::select! {
                // Its pidfd tells when the root has ended with all its threads.
                _ = self.root.readable() => return End::Tree,
                () = readable(ring.as_ref()) => {
                    shared.hear();
                    continue;
                }
                () = tokio::time::sleep(LATE), if late => continue,
                () = tokio::time::sleep_until(wake.into()) => {}
            }
            // Whoever makes an image has the tree for himself.
            let held = shared.hold.try_lock();
            if wake < next {
                shared.early.set(None);
                if held.is_ok() {
                    shared.look_early();
                }
                continue;
            }
            if held.is_ok() {
                shared.report(Belief::Told);
            }
            next = Instant::now() + self.pause();
        }
    }

    /// Time until the next look.
    fn pause(&self) -> Duration {
        self.options.interval.max(SHORTEST).max(self.shared.breath.get()).min(LONGEST)
    }

    async fn serve(&self) {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) if is_allowed(&stream) => {
                    let shared = self.shared.clone();
                    tokio::task::spawn_local(async move { Connection::new(shared, stream).serve().await });
                }
                Ok(_) => tracing::warn!("somebody else's process was turned away at the control socket"),
                Err(err) => {
                    tracing::warn!(%err, "the control socket");
                    tokio::time::sleep(SHORTEST).await;
                }
            }
        }
    }
}

/// Waits until there are events; for ever, where nobody tells of any.
async fn readable(ring: Option<&AsyncFd<OwnedFd>>) {
    let Some(ring) = ring else { return std::future::pending().await };
    match ring.readable().await {
        // All is read after this: what comes meanwhile makes it ready again.
        Ok(mut ready) => ready.clear_ready(),
        Err(err) => {
            tracing::warn!(%err, "events are only looked at with the memory");
            std::future::pending().await
        }
    }
}

/// Root, or the user whose session this is.
fn is_allowed(stream: &UnixStream) -> bool {
    stream.peer_cred().is_ok_and(|peer| peer.uid() == 0 || peer.uid() == Uid::effective().as_raw())
}

/// Makes the socket. One that nobody listens at is what a killed session left.
fn listen(root: Pid) -> Result<(UnixListener, SocketFile), TrackError> {
    let path = wire::socket_path(root);
    let failed = |source| TrackError::Socket { path: path.clone(), source };
    // Of two that begin at once, the second finds the socket of the first; one that is about to end is waited for.
    let _turn = kept::turn().map_err(failed)?;
    if std::os::unix::net::UnixStream::connect(&path).is_ok() {
        return Err(TrackError::Tracked { pid: root.as_raw() });
    }
    // Bound under another name, closed to others, then renamed: nobody finds it half made.
    let beside = path.with_extension(format!("{}", std::process::id()));
    let _ = std::fs::remove_file(&beside);
    let listener = UnixListener::bind(&beside).map_err(failed)?;
    let file = SocketFile(beside.clone());
    std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    std::fs::rename(&beside, &path).map_err(failed)?;
    std::mem::forget(file);
    Ok((listener, SocketFile(path)))
}

impl Shared {
    /// Takes in what the programs tell.
    fn hear(&self) {
        loop {
            let (news, is_all) = self.witness.borrow_mut().hear();
            if news.iter().any(|news| matches!(news, News::Suspicious(_))) {
                self.recorder.borrow_mut().hurry();
            }
            if self.tree.borrow_mut().hear(&news) && self.early.get().is_none() {
                let wait = SETTLING.max(self.early_took.get() * EARLY_SHARE);
                self.early.set(Some(Instant::now() + wait));
            }
            if is_all {
                return;
            }
        }
    }

    /// Looks at memory that is new since the last look.
    fn look_early(&self) {
        let begin = Instant::now();
        self.hear();
        self.early.set(None);
        let stopped = self.tree.borrow_mut().look_early();
        self.stopped.set(self.stopped.get().max(stopped));
        self.early_took.set(begin.elapsed());
        tracing::debug!(?stopped, took = ?begin.elapsed(), "looked at new memory");
    }

    /// Looks at the tree.
    fn look(&self, belief: Belief, purpose: Purpose) -> TreeLook {
        self.hear();
        let mut witness = self.witness.borrow_mut();
        let belief = if witness.tells_of_lifecycle() { belief } else { Belief::Seen };
        let found = self.tree.borrow_mut().look(belief, purpose);
        // Those that nobody told of are followed from here on; those that belong to others now are not.
        found.met.iter().for_each(|&pid| witness.follow(pid));
        found.left.iter().for_each(|&pid| witness.forget(pid));
        self.stopped.set(self.stopped.get().max(found.stopped));
        found
    }

    /// Looks at the tree, and reports.
    fn report(&self, belief: Belief) {
        let begin = Instant::now();
        let found = self.look(belief, Purpose::Report);
        let took = begin.elapsed();
        let mut witness = self.witness.borrow_mut();
        witness.be_watched(self.reports.receiver_count() > 0);
        let lost_before = self.reports.borrow().lost.lifecycle;
        let mut report = self.recorder.borrow_mut().report(&self.tree.borrow(), &found, &mut witness, begin, took);
        report.has_image = !self.since.borrow().is_empty();
        report.ends_with = self.ends_with;
        report.soft_dirty = self.tree.borrow().marks() == Marks::SoftDirty;
        report.predicted_freeze_us = self.predict(&self.tree.borrow(), &report).as_micros() as u64;
        self.last_look.set(Some(begin));
        if report.lost.lifecycle != lost_before {
            self.tree.borrow_mut().doubt();
        }
        self.measures.borrow_mut().looked(found.written(), took);
        self.reports.send_replace(report);
        // What is done once does not come again; dry looks, and loading programs, have limits of their own.
        let cost = took.saturating_sub(found.installing);
        let faults = FAULT * found.written().min(u32::MAX.into()) as u32;
        self.breath.set(cost.max(faults) * SHARE);
    }

    /// Looks unless somebody makes an image, or the last look is young: for whoever asks right now.
    fn look_again(&self) {
        let young = self.last_look.get().is_some_and(|last| last.elapsed() < SHORTEST);
        if !young && self.hold.try_lock().is_ok() {
            self.report(Belief::Told);
        }
    }

    /// Estimates a dump now. What a tree is made of is looked at now and then; what it writes, each time.
    fn predict(&self, tree: &Tree, report: &Report) -> Duration {
        /// Looks after which the shape is looked at again.
        const OFTEN: u64 = 5;
        let mut shape = self.shape.borrow_mut();
        if report.looks % OFTEN == 1 {
            *shape = tree.processes.keys().copied().map(Shape::of).fold(Shape::default(), Shape::and);
            *self.measured.borrow_mut() = predict::known();
        }
        let written = |memory: &Memory| match &memory.untracked {
            None if report.has_image => memory.written(),
            _ => crate::object::memory::estimate(memory.pid) / PAGE,
        };
        let all: u64 = tree.processes.values().map(written).sum();
        let left = match report.has_image {
            true => predict::left_to_the_freeze(all, report.written_bytes_per_second / PAGE),
            false => all,
        };
        let now = Shape { written: left, ..*shape };
        predict::predict(&now, self.costs.get_or_init(Costs::of_this_machine), &self.measured.borrow())
    }

    /// Hands over what was written since the last image. Nothing is reported: whoever makes an image waits.
    fn cut(&self) -> Begun {
        let found = self.look(Belief::Seen, Purpose::Image);
        self.tree.borrow_mut().carry(&found);
        let mut tree = self.tree.borrow_mut();
        let processes = tree
            .processes
            .values_mut()
            .map(|memory| Tracked {
                pid: memory.pid.as_raw(),
                start_time: memory.start_time,
                written: memory.cut().to_bytes(),
                untracked: memory.untracked.clone(),
                soft_dirty: Some(memory.marks == Marks::SoftDirty),
            })
            .collect();
        Begun {
            since: self.since.borrow().clone(),
            processes,
            stopped_us: Some(self.stopped.take().as_micros() as u64),
            written_per_second: Some(self.reports.borrow().written_bytes_per_second),
        }
    }

    /// Whose pages have been tracked until now. That this is answered at all tells that the session has lived so long.
    fn confirm(&self) -> Confirmed {
        let tree = self.tree.borrow();
        let tracked = tree.processes.values().filter(|memory| memory.is_watched());
        Confirmed { pids: tracked.map(|memory| memory.pid.as_raw()).collect() }
    }

    fn commit(&self, id: Vec<u8>) {
        self.tree.borrow_mut().processes.values_mut().for_each(Memory::commit);
        *self.since.borrow_mut() = id;
        // What was reported last is not what the next image would find; and there is one dump more to learn from.
        self.last_look.set(None);
        *self.measured.borrow_mut() = predict::known();
    }

    fn give_back(&self) {
        self.tree.borrow_mut().processes.values_mut().for_each(Memory::give_back);
    }
}

/// What a connection has in its hands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holding {
    Nothing,
    /// What was written since the last image.
    Cut,
    /// The same, and the pages are armed by now, without our knowing what was found.
    Armed,
}

/// One asker.
struct Connection {
    shared: Rc<Shared>,
    stream: Framed<UnixStream, LengthDelimitedCodec>,
    holding: Holding,
    guard: Option<OwnedMutexGuard<()>>,
}

impl Connection {
    fn new(shared: Rc<Shared>, stream: UnixStream) -> Self {
        let codec = LengthDelimitedCodec::builder().max_frame_length(wire::LONGEST).new_codec();
        Self { shared, stream: Framed::new(stream, codec), holding: Holding::Nothing, guard: None }
    }

    async fn serve(mut self) {
        while let Some(Ok(frame)) = self.stream.next().await {
            let answer = match Request::decode(frame).map(|request| request.ask) {
                Ok(Some(Ask::Follow(_))) => return self.follow().await,
                Ok(Some(ask)) => self.answer(ask).await,
                Ok(None) => Answer::Error("nothing was asked that this version knows".into()),
                Err(err) => Answer::Error(err.to_string()),
            };
            if self.send(answer).await.is_err() {
                return;
            }
        }
    }

    async fn answer(&mut self, ask: Ask) -> Answer {
        let done = Answer::Done(Empty {});
        match ask {
            Ask::Status(_) => {
                self.shared.look_again();
                let report = serde_json::to_string(&*self.shared.reports.borrow());
                report.map_or_else(|err| Answer::Error(err.to_string()), Answer::Report)
            }
            Ask::Begin(_) if self.guard.is_some() => Answer::Error("this connection has begun already".into()),
            Ask::Begin(_) => {
                self.guard = Some(self.shared.hold.clone().lock_owned().await);
                self.holding = Holding::Cut;
                Answer::Begun(self.shared.cut())
            }
            Ask::Arming(_) | Ask::Commit(_) | Ask::Confirm(_) if self.guard.is_none() => {
                Answer::Error("this connection has not begun".into())
            }
            Ask::Confirm(_) => Answer::Confirmed(self.shared.confirm()),
            Ask::Arming(_) => {
                self.holding = Holding::Armed;
                Answer::Confirmed(self.shared.confirm())
            }
            Ask::Commit(id) => {
                self.shared.commit(id);
                self.holding = Holding::Nothing;
                self.guard = None;
                done
            }
            Ask::Stop(_) => {
                // The answer should still be read by the asker; the runtime ends once this task waits for it.
                self.shared.stop.notify_one();
                done
            }
            Ask::Told(told) => {
                self.shared.measures.borrow_mut().told(&told.into());
                done
            }
            Ask::Follow(_) => done,
        }
    }

    /// Sends a report each time there is a new one.
    async fn follow(mut self) {
        let mut reports = self.shared.reports.subscribe();
        loop {
            let Ok(report) = serde_json::to_string(&*reports.borrow_and_update()) else { return };
            if self.send(Answer::Report(report)).await.is_err() {
                return;
            }
            tokio::select! {
                changed = reports.changed() => if changed.is_err() { return },
                // Nothing is expected from the other side but its end.
                _ = self.stream.next() => return,
            }
        }
    }

    async fn send(&mut self, answer: Answer) -> io::Result<()> {
        let bytes = Bytes::from(Reply { answer: Some(answer) }.encode_to_vec());
        self.stream.send(bytes).await
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        match self.holding {
            Holding::Nothing => {}
            Holding::Cut => self.shared.give_back(),
            // What the asker found is lost: nothing may build on the last image any more.
            Holding::Armed => {
                self.shared.give_back();
                self.shared.since.borrow_mut().clear();
            }
        }
    }
}
