//! A connection in a plan of a restore: what is done with its socket when.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use super::course::Step;
use super::rebuild::{Wire, perform};
use super::state::Numbers;
use super::{Course, Ends, State, course, streams};
use crate::image::proto::{InetSkEntry, TcpStreamEntry};
use crate::kernel::{fd, socket};
use crate::object::file::Planner;
use crate::object::{ObjectError, sockopt};
use crate::plan::{Deed, FileRef, Opened, Resumption};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Any port will do for a peer that is gone: the one that discards everything.
const DISCARD: u16 = 9;

/// A connection on its way back.
#[derive(Debug)]
pub struct Revival {
    ends: Ends,
    state: State,
    stream: TcpStreamEntry,
    /// What is left of the course when the socket is there.
    left: OnceLock<Course>,
    data: Vec<u8>,
    entry: Arc<InetSkEntry>,
    wire: Arc<Wire>,
}

impl Revival {
    /// What the images say of a connection; `None` where they have none of this socket.
    pub fn read(entry: &Arc<InetSkEntry>, scope: u32, cx: &mut Planner<'_>) -> Result<Option<Self>, ObjectError> {
        let Some(state) = State::of_number(entry.state) else { return Ok(None) };
        let contradiction =
            |what: String| ObjectError::contradiction(format!("the connection of socket {}: {what}", entry.ino));
        let Some(image) = streams::of(entry, cx)? else { return Ok(None) };
        let (mut stream, data) = image.ok_or_else(|| contradiction("its image is empty".into()))?;
        // The byte of which the acknowledgement is waited for is the gate's to swallow.
        let left = cx.plan.connections.gate.as_deref();
        if stream.timestamp.is_none() && stream.rtt.is_some() && !cx.options.network_lock.swallows(left) {
            stream.rtt = None;
        }
        let mut ends = Ends::of(entry, scope);
        if ends.remote.port() == 0 {
            ends.remote.set_ip(ends.local.ip());
            ends.remote.set_port(DISCARD);
        }
        Numbers::of(state, &stream).map_err(|e| contradiction(e.to_string()))?;
        Ok(Some(Self {
            ends,
            state,
            stream,
            left: OnceLock::new(),
            data,
            entry: Arc::clone(entry),
            wire: Arc::clone(cx.shelf.get()),
        }))
    }

    /// Whether it can be made at the same time as others. For a moment, all that are closed have the same peer, and those of
    /// one port the same name.
    pub fn is_apart(&self) -> bool {
        self.state != State::Close
    }

    /// For a reader.
    pub fn describe(&self) -> String {
        format!("the TCP connection {} ({:?})", self.ends, self.state)
    }

    /// Makes the socket what it was, in repair mode.
    pub fn make(&self, made: &OwnedFd) -> Result<(), Failure> {
        // Queues may hold more than buffers of the usual size, and far more than they had of memory for them: the kernel
        // packs bytes its own way. The socket's own sizes come back when it is full.
        const SPARE: usize = 1 << 20;
        if !self.data.is_empty() {
            let room = (self.data.len() * 4 + SPARE).min(i32::MAX as usize / 2) as i32;
            for name in [libc::SO_SNDBUFFORCE, libc::SO_RCVBUFFORCE] {
                socket::set_number(made, libc::SOL_SOCKET, name, room)?;
            }
        }
        let mut course = Course::of(self.state, &self.stream)?;
        self.steps(made.as_fd(), &std::mem::take(&mut course.make))?;
        self.left.get_or_init(|| course);
        // What has nothing in its queues need not wait for that.
        if self.data.is_empty() {
            sockopt::restore_buffers_over(made, &self.entry.opts, &sockopt::adapted_buffers(made)?)?;
        }
        Ok(())
    }

    fn left(&self) -> Result<&Course, Failure> {
        self.left.get().ok_or_else(|| "the socket was not made".into())
    }

    fn steps(&self, made: BorrowedFd<'_>, steps: &[Step]) -> Result<(), Failure> {
        Ok(perform(made, &self.ends, &self.data, steps, &self.wire)?)
    }

    /// Gives the socket what repair mode, full queues and the way that it was made have let it have otherwise.
    fn settle(&self, made: &OwnedFd) -> Result<(), Failure> {
        /// Flags that a new socket can be given at once.
        const AT_ONCE: u32 = (libc::O_ACCMODE | libc::O_NONBLOCK) as u32;
        let entry = &self.entry;
        if !self.data.is_empty() {
            sockopt::restore_buffers(made, &entry.opts)?;
        }
        if entry.opts.reuseaddr() {
            socket::set_number(made, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        }
        if entry.flags & !AT_ONCE != 0 {
            fd::set_flags(made, entry.flags as i32)?;
        }
        Ok(())
    }

    /// Plans what is done with the socket when all tasks are ready.
    pub fn plan(self: &Arc<Self>, file: FileRef, cx: &mut Planner<'_>) {
        let connections = &mut cx.plan.connections;
        connections.locked.push(self.ends.key());
        connections.files.push(file);
        connections.release.push(Box::new(Release { file, revival: Arc::clone(self) }));
        let resume = Box::new(Resume { file, revival: Arc::clone(self) });
        let quiet = course::is_quiet(self.state, &self.stream);
        connections.resume.push(Resumption { of: self.ends.key(), quiet, deed: resume });
    }
}

/// Out of repair mode.
#[derive(Debug)]
struct Release {
    file: FileRef,
    revival: Arc<Revival>,
}

impl Deed for Release {
    fn describe(&self) -> String {
        format!("release {}", self.revival.describe())
    }

    fn run(&self, opened: &Opened) -> Result<(), Failure> {
        let Some(file) = opened.get(self.file) else { return Err("the socket is not open".into()) };
        self.revival.steps(file.as_fd(), &self.revival.left()?.release)?;
        self.revival.settle(file)
    }
}

/// Packets pass: what was queued goes out.
#[derive(Debug)]
struct Resume {
    file: FileRef,
    revival: Arc<Revival>,
}

impl Deed for Resume {
    fn describe(&self) -> String {
        format!("resume {}", self.revival.describe())
    }

    fn run(&self, opened: &Opened) -> Result<(), Failure> {
        let Some(file) = opened.get(self.file) else { return Err("the socket is not open".into()) };
        self.revival.steps(file.as_fd(), &self.revival.left()?.resume)
    }
}
