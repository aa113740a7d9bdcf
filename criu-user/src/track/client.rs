//! Asking a session, from a command that dumps or only wants to know.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::unistd::Pid;
use prost::Message;

use super::TrackError;
use super::method::Method;
use super::report::Report;
use super::wire::{self, Answer, Ask, Begun, Empty, Reply, Request};
use crate::metrics::Run;

/// How long an answer may take: a look at hundreds of gigabytes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to a session.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    root: Pid,
}

impl Client {
    /// Connects to the session of the tree below `root`; `None` if there is none.
    pub fn connect(root: Pid) -> Result<Option<Self>, TrackError> {
        let path = wire::socket_path(root);
        let failed = |source| TrackError::Socket { path: path.clone(), source };
        match UnixStream::connect(&path) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
                Ok(Some(Self { stream, root }))
            }
            Err(err) if matches!(err.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => Ok(None),
            Err(err) => Err(failed(err)),
        }
    }

    /// Connects to the session, or starts one that goes on by itself and tracks memory by `method`.
    pub fn connect_or_start(root: Pid, method: Method) -> Result<Self, TrackError> {
        loop {
            if let Some(client) = Self::connect(root)? {
                return Ok(client);
            }
            if start(root, &method.words())? == Started::New {
                return Self::connect(root)?.ok_or(TrackError::NoSession { pid: root.as_raw() });
            }
        }
    }

    /// Takes what was written since the last image. The session touches the tree no more until this is dropped, and goes
    /// on as if nothing had been asked unless [`Client::commit`] comes before.
    pub fn begin(&mut self) -> Result<Begun, TrackError> {
        match self.ask(Ask::Begin(Empty {}))? {
            Answer::Begun(begun) => Ok(begun),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Asks, in the freeze, whose pages the session has tracked from the beginning until now. Without an answer it may have
    /// died on the way, and another may have armed pages in its place.
    pub fn confirm(&mut self) -> Result<Vec<Pid>, TrackError> {
        self.confirmed(Ask::Confirm(Empty {}))
    }

    /// The same, and says that the pages are about to be armed by the asker.
    pub fn arming(&mut self) -> Result<Vec<Pid>, TrackError> {
        self.confirmed(Ask::Arming(Empty {}))
    }

    fn confirmed(&mut self, ask: Ask) -> Result<Vec<Pid>, TrackError> {
        match self.ask(ask)? {
            Answer::Confirmed(confirmed) => Ok(confirmed.pids.into_iter().map(Pid::from_raw).collect()),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Says that the image with this id is complete.
    pub fn commit(&mut self, id: &[u8]) -> Result<(), TrackError> {
        self.done(Ask::Commit(id.to_vec()))
    }

    /// Ends the session, and waits until nothing of it is left.
    pub fn stop(mut self) -> Result<(), TrackError> {
        self.done(Ask::Stop(Empty {}))?;
        self.wait_for_its_end();
        Ok(())
    }

    /// Waits for the end of a session that has been told to end, or is about to.
    pub fn wait_for_its_end(mut self) {
        // Its connections end with it.
        while let Ok(Some(_)) = self.next_report() {}
    }

    /// Tells what a dump, pre-dump or restore came to. There is no answer to wait for: it is for the metrics only.
    pub fn tell(&mut self, run: &Run) -> Result<(), TrackError> {
        self.send(Ask::Told(run.into()))
    }

    /// What the session knows now.
    pub fn report(&mut self) -> Result<Report, TrackError> {
        let answer = self.ask(Ask::Status(Empty {}))?;
        self.as_report(answer)
    }

    /// Sets how long an answer may take.
    pub fn patience(&self, time: Duration) -> Result<(), TrackError> {
        let time = time.max(Duration::from_millis(1));
        self.stream.set_read_timeout(Some(time)).map_err(|source| self.failed(source))
    }

    /// Asks for a report each interval.
    pub fn follow(&mut self) -> Result<(), TrackError> {
        self.send(Ask::Follow(Empty {}))
    }

    /// The next report; `None` when the session has ended.
    pub fn next_report(&mut self) -> Result<Option<Report>, TrackError> {
        match self.receive() {
            Ok(answer) => self.as_report(answer).map(Some),
            Err(TrackError::Socket { source, .. }) if source.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(err) => Err(err),
        }
    }

    fn as_report(&self, answer: Answer) -> Result<Report, TrackError> {
        match answer {
            Answer::Report(json) => serde_json::from_str(&json).map_err(|err| self.protocol(err.to_string())),
            other => Err(self.unexpected(&other)),
        }
    }

    fn done(&mut self, ask: Ask) -> Result<(), TrackError> {
        match self.ask(ask)? {
            Answer::Done(_) => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }

    fn ask(&mut self, ask: Ask) -> Result<Answer, TrackError> {
        self.send(ask)?;
        match self.receive()? {
            Answer::Error(what) => Err(self.protocol(what)),
            answer => Ok(answer),
        }
    }

    fn send(&mut self, ask: Ask) -> Result<(), TrackError> {
        let body = Request { ask: Some(ask) }.encode_to_vec();
        let mut message = (body.len() as u32).to_be_bytes().to_vec();
        message.extend(body);
        self.stream.write_all(&message).map_err(|source| self.failed(source))
    }

    fn receive(&mut self) -> Result<Answer, TrackError> {
        let mut length = [0; 4];
        self.stream.read_exact(&mut length).map_err(|source| self.failed(source))?;
        let length = u32::from_be_bytes(length) as usize;
        if length > wire::LONGEST {
            return Err(self.protocol(format!("a message of {length} bytes")));
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).map_err(|source| self.failed(source))?;
        let reply = Reply::decode(&*body).map_err(|err| self.protocol(err.to_string()))?;
        reply.answer.ok_or_else(|| self.protocol("an empty answer".into()))
    }

    fn failed(&self, source: io::Error) -> TrackError {
        TrackError::Socket { path: wire::socket_path(self.root), source }
    }

    fn protocol(&self, what: String) -> TrackError {
        TrackError::Protocol { pid: self.root.as_raw(), what }
    }

    fn unexpected(&self, answer: &Answer) -> TrackError {
        let name = format!("{answer:?}");
        self.protocol(name.chars().take(60).collect())
    }
}

/// What a session that was started says when it is there.
pub const READY: &str = "ready\n";
/// What it says when another was there before it.
pub const TRACKED: &str = "tracked\n";

/// What came of starting a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Started {
    /// It is there.
    New,
    /// Another was there first.
    Other,
}

/// Starts a session for the tree below `root` that goes on when this process ends, and waits until it is there.
/// `options` are further words for `criu-ebpf track`.
pub fn start(root: Pid, options: &[std::ffi::OsString]) -> Result<Started, TrackError> {
    let failed = |what: String| TrackError::NotStarted { pid: root.as_raw(), what };
    let (mut says, end) = io::pipe().map_err(|err| failed(err.to_string()))?;
    let other_end = end.try_clone().map_err(|err| failed(err.to_string()))?;
    let mut command = Command::new("/proc/self/exe");
    command.arg("track").arg(root.to_string()).arg("--serve").args(options);
    command.stdin(Stdio::null()).stdout(end).stderr(other_end);
    let mut child = command.spawn().map_err(|err| failed(err.to_string()))?;
    // Ours of the two ends go with the command.
    drop(command);
    let mut said = String::new();
    let mut piece = [0; 512];
    loop {
        match says.read(&mut piece) {
            Ok(0) | Err(_) => break,
            Ok(n) => said.push_str(&String::from_utf8_lossy(&piece[..n])),
        }
        if said.ends_with(READY) {
            return Ok(Started::New);
        }
    }
    let _ = child.wait();
    if said.ends_with(TRACKED) {
        return Ok(Started::Other);
    }
    Err(failed(said.trim().trim_start_matches("criu-ebpf: ").to_owned()))
}
