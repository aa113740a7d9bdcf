//! A connection in a plan of a restore: what is done with its socket when.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::course::Step;
use super::rebuild::perform;
use super::{Course, Ends, State};
use crate::image::ImageKind;
use crate::image::proto::{InetSkEntry, TcpStreamEntry};
use crate::kernel::{fd, socket};
use crate::object::file::Planner;
use crate::object::inet::ensure;
use crate::object::{ObjectError, sockopt};
use crate::plan::{Deed, FileRef, Opened};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Any port will do for a peer that is gone: the one that discards everything.
const DISCARD: u16 = 9;

/// A connection on its way back.
#[derive(Debug)]
pub struct Revival {
    ends: Ends,
    state: State,
    course: Course,
    data: Vec<u8>,
    entry: InetSkEntry,
}

impl Revival {
    /// What the images say of a connection; `None` where they have none of this socket.
    pub fn read(entry: &InetSkEntry, scope: u32, cx: &Planner<'_>) -> Result<Option<Self>, ObjectError> {
        let name = ImageKind::TcpStream.id(entry.ino.into());
        let Some(state) = State::of_number(entry.state).filter(|_| cx.dir.exists(name).unwrap_or(true)) else {
            return Ok(None);
        };
        let contradiction =
            |what: String| ObjectError::contradiction(format!("the connection of socket {}: {what}", entry.ino));
        let mut reader = cx.dir.reader(name)?;
        let (stream, data) = reader
            .message_with_payload::<TcpStreamEntry>()?
            .ok_or_else(|| contradiction("its image is empty".into()))?;
        let mut ends = Ends::of(entry, scope);
        if ends.remote.port() == 0 {
            ends.remote.set_ip(ends.local.ip());
            ends.remote.set_port(DISCARD);
        }
        let course = Course::of(state, &stream).map_err(|e| contradiction(e.to_string()))?;
        Ok(Some(Self { ends, state, course, data, entry: entry.clone() }))
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
        let room = (self.data.len() * 4 + SPARE).min(i32::MAX as usize / 2) as i32;
        for name in [libc::SO_SNDBUFFORCE, libc::SO_RCVBUFFORCE] {
            socket::set_number(made, libc::SOL_SOCKET, name, room)?;
        }
        Ok(perform(made, &self.ends, &self.data, &self.course.make)?)
    }

    fn steps(&self, made: BorrowedFd<'_>, steps: &[Step]) -> Result<(), Failure> {
        Ok(perform(made, &self.ends, &self.data, steps)?)
    }

    /// Plans what is done with the socket when all tasks are ready.
    pub fn plan(self: &Arc<Self>, file: FileRef, cx: &mut Planner<'_>) {
        let connections = &mut cx.plan.connections;
        connections.locked.push(self.ends.key());
        connections.files.push(file);
        connections.release.push(Box::new(Release { file, revival: Arc::clone(self) }));
        connections.resume.push(Box::new(Resume { file, revival: Arc::clone(self) }));
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
        let entry = &self.revival.entry;
        self.revival.steps(file.as_fd(), &self.revival.course.release)?;
        sockopt::restore_buffers(file.as_fd(), &entry.opts)?;
        // Repair mode has set it to what it wanted.
        ensure(file, libc::SOL_SOCKET, libc::SO_REUSEADDR, entry.opts.reuseaddr().into())?;
        Ok(fd::set_flags(file, entry.flags as i32)?)
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
        self.revival.steps(file.as_fd(), &self.revival.course.resume)
    }
}
