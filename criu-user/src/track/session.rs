//! A session: looks at the tree again and again, and answers at its control socket.
//!
//! Everything happens in one thread, because that is who traces the processes that are stopped for a moment; looks are
//! short, and whoever asks meanwhile waits for the end of one.

use std::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
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
use super::report::{ProcessReport, Report};
use super::tree::{Tree, TreeLook};
use super::wire::{self, Answer, Ask, Begun, Empty, Reply, Request, Tracked};
use crate::kernel::kept;
use crate::kernel::pidfd::PidFd;
use crate::kernel::survey::PAGE;

/// How long an interval is at least, and at most.
const SHORTEST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(10);
/// The first write to a page after it was armed costs its program this much (docs/tracking.md has the measurement).
const FAULT: Duration = Duration::from_nanos(1300);
/// One part in so many of its time may a program lose to these faults, and a processor to our looks.
const SHARE: u32 = 50;

/// How a session works.
#[derive(Debug, Clone)]
pub struct SessionOptions {
    /// The root of the tree.
    pub root: Pid,
    /// Wanted time between looks; where looks or their faults would cost too much, it is longer.
    pub interval: Duration,
    /// Where metrics go.
    pub metrics: MetricsOptions,
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
}

#[derive(Debug)]
struct Shared {
    tree: RefCell<Tree>,
    /// The image since which is collected; empty if there is none.
    since: RefCell<Vec<u8>>,
    /// Held by whoever makes an image.
    hold: Arc<Mutex<()>>,
    reports: watch::Sender<Report>,
    stop: Notify,
    measures: Rc<RefCell<Measures>>,
    looks: RefCell<Looks>,
}

#[derive(Debug, Default)]
struct Looks {
    count: u64,
    last: Option<Instant>,
    /// Time that the next interval should take at least.
    breath: Duration,
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
        let tree = Tree::new(options.root)?;
        let pidfd = PidFd::open(options.root)?;
        let (listener, socket) = listen(options.root)?;
        let root = pidfd.into_async().map_err(|source| TrackError::Socket { path: socket.0.clone(), source })?;
        let exporter = Exporter::begin(&options.metrics, options.root)?;
        let shared = Shared {
            tree: RefCell::new(tree),
            since: RefCell::default(),
            hold: Arc::default(),
            reports: watch::channel(Report::default()).0,
            stop: Notify::new(),
            measures: Rc::default(),
            looks: RefCell::default(),
        };
        let mut session = Self { listener, socket, shared: Rc::new(shared), root, options, exporter };
        // The first look brings the userfaultfds in: what cannot be tracked is known before anybody relies on it.
        session.shared.look();
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
        let exporting = std::mem::take(&mut self.exporter).run(self.shared.measures.clone(), self.reports());
        let serving = LocalSet::new();
        let end = serving.run_until(async {
            tokio::select! {
                end = self.watch_tree() => end,
                () = self.serve() => End::Stopped,
                () = beside => End::Stopped,
                () = exporting => End::Stopped,
                () = self.shared.stop.notified() => End::Stopped,
                _ = interrupt.recv() => End::Stopped,
                _ = terminate.recv() => End::Stopped,
            }
        });
        let end = end.await;
        tracing::info!(?end, "the session ends");
        Ok(end)
    }

    async fn watch_tree(&self) -> End {
        loop {
            let pause = self.options.interval.max(SHORTEST).max(self.shared.looks.borrow().breath).min(LONGEST);
            tokio::select! {
                _ = self.root.readable() => return End::Tree,
                () = tokio::time::sleep(pause) => {}
            }
            if !self.shared.tree.borrow().is_alive() {
                return End::Tree;
            }
            // Whoever makes an image has the tree for himself.
            if let Ok(_held) = self.shared.hold.try_lock() {
                self.shared.look();
            }
        }
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

/// Root, or the user whose session this is.
fn is_allowed(stream: &UnixStream) -> bool {
    stream.peer_cred().is_ok_and(|peer| peer.uid() == 0 || peer.uid() == Uid::effective().as_raw())
}

/// Makes the socket. One that nobody listens at is what a killed session left.
fn listen(root: Pid) -> Result<(UnixListener, SocketFile), TrackError> {
    let path = wire::socket_path(root);
    let failed = |source| TrackError::Socket { path: path.clone(), source };
    match std::fs::DirBuilder::new().mode(0o700).create(kept::DIR) {
        Err(err) if err.kind() != io::ErrorKind::AlreadyExists => return Err(failed(err)),
        _ => {}
    }
    // Bound under another name, closed to others, then renamed: nobody finds it half made, and of two that start at once
    // the second sees the first.
    if std::os::unix::net::UnixStream::connect(&path).is_ok() {
        return Err(failed(io::ErrorKind::AddrInUse.into()));
    }
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
    /// Looks at the tree, and reports.
    fn look(&self) -> Duration {
        let begin = Instant::now();
        let found = self.tree.borrow_mut().look();
        let took = begin.elapsed();
        let mut looks = self.looks.borrow_mut();
        let interval = looks.last.replace(begin).map_or(Duration::ZERO, |last| begin - last);
        looks.count += 1;
        let faults = FAULT * found.written().min(u32::MAX.into()) as u32;
        looks.breath = took.max(faults) * SHARE;
        let report = self.report(&found, looks.count, interval, took);
        drop(looks);
        self.measures.borrow_mut().looked(found.written(), took);
        self.reports.send_replace(report);
        found.stopped
    }

    fn report(&self, found: &TreeLook, count: u64, interval: Duration, took: Duration) -> Report {
        let tree = self.tree.borrow();
        let per_second = |pages: u64| match interval.as_secs_f64() {
            0.0 => 0,
            seconds => ((pages * PAGE) as f64 / seconds) as u64,
        };
        let processes: Vec<ProcessReport> = tree
            .processes
            .values()
            .map(|memory| {
                let look = found.looks.get(&memory.pid).copied().unwrap_or_default();
                ProcessReport {
                    pid: memory.pid.as_raw(),
                    comm: String::from_utf8_lossy(
                        &crate::kernel::proc::comm(memory.pid, memory.pid).unwrap_or_default(),
                    )
                    .into_owned(),
                    written_bytes_per_second: per_second(look.written),
                    pending_bytes: memory.written() * PAGE,
                    working_set_bytes: look.again * PAGE,
                    memory_bytes: crate::object::memory::estimate(memory.pid),
                    untracked: memory.untracked.clone(),
                }
            })
            .collect();
        let sum = |value: fn(&ProcessReport) -> u64| processes.iter().map(value).sum();
        Report {
            pid: tree.root().as_raw(),
            session: std::process::id() as i32,
            looks: count,
            interval_ms: interval.as_millis() as u64,
            look_us: took.as_micros() as u64,
            written_bytes_per_second: sum(|p| p.written_bytes_per_second),
            pending_bytes: sum(|p| p.pending_bytes),
            working_set_bytes: sum(|p| p.working_set_bytes),
            memory_bytes: sum(|p| p.memory_bytes),
            has_image: !self.since.borrow().is_empty(),
            predicted_freeze_us: 0,
            processes,
        }
    }

    /// Hands over what was written since the last image.
    fn cut(&self) -> Begun {
        let stopped = self.look();
        let mut tree = self.tree.borrow_mut();
        let processes = tree
            .processes
            .values_mut()
            .map(|memory| Tracked {
                pid: memory.pid.as_raw(),
                start_time: memory.start_time,
                written: memory.cut().to_bytes(),
                untracked: memory.untracked.clone(),
            })
            .collect();
        Begun { since: self.since.borrow().clone(), processes, stopped_us: Some(stopped.as_micros() as u64) }
    }

    fn commit(&self, id: Vec<u8>) {
        self.tree.borrow_mut().processes.values_mut().for_each(super::memory::Memory::commit);
        *self.since.borrow_mut() = id;
    }

    fn give_back(&self) {
        self.tree.borrow_mut().processes.values_mut().for_each(super::memory::Memory::give_back);
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
                let report = serde_json::to_string(&*self.shared.reports.borrow());
                report.map_or_else(|err| Answer::Error(err.to_string()), Answer::Report)
            }
            Ask::Begin(_) if self.guard.is_some() => Answer::Error("this connection has begun already".into()),
            Ask::Begin(_) => {
                self.guard = Some(self.shared.hold.clone().lock_owned().await);
                self.holding = Holding::Cut;
                Answer::Begun(self.shared.cut())
            }
            Ask::Arming(_) | Ask::Commit(_) if self.guard.is_none() => {
                Answer::Error("this connection has not begun".into())
            }
            Ask::Arming(_) => {
                self.holding = Holding::Armed;
                done
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
