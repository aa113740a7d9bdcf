//! A copy of a process, made inside it: its memory as it is at that instant, copied on write, with an agent of its own.
//!
//! The process makes a helper that shares its memory (as vfork(2) does), and that makes the copy and ends. So the copy is
//! an orphan at once: the program has no child that it did not make, and somebody whose trade that is reaps the copy.
//! All of this is one batch, which the process runs to its end whether the engine lives or not.
//!
//! The copy gives up what it shares with the program (descriptors, session, shared memory), serves batches as a guest does,
//! and ends at the end of file of its socket: it has no way home. It is traced with `PTRACE_O_EXITKILL` from its first
//! instruction on, so that it dies with the engine whatever it does.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::unistd::Pid;

use crate::kernel::SysError;
use crate::kernel::error::During;
use crate::kernel::fd;
use crate::kernel::map::SharedMap;
use crate::kernel::mem::ProcessMemory;
use crate::kernel::ptrace::{self, Stop};

use super::AgentError;
use super::batch::{Arg, Batch, HEADER, Outcome, Room};
use super::code;
use super::guest::{self, COPY_AREA, COPY_ROOM, Guest, MAKER_AREA, Received};

/// Bytes of `struct clone_args` up to and with `tls`: CLONE_ARGS_SIZE_VER0.
const CLONE_ARGS: usize = 64;
/// No process has this pid: it is above the largest that the kernel gives (PID_MAX_LIMIT).
const NOBODY: u64 = i32::MAX as u64;

/// How long a process adopts no orphans at most. Only one whose engine died waits so long, and only for a descendant that
/// job control stopped on its way.
const ASIDE_MAX_MS: u64 = 10_000;

/// Whether orphans in its tree become children of the process (PR_SET_CHILD_SUBREAPER).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Orphans {
    /// They go to somebody else.
    Elsewhere,
    /// It adopts them.
    Here,
}

/// A task that this process traces: killed and collected when this is dropped.
#[derive(Debug)]
struct Tracee(Pid);

impl Drop for Tracee {
    fn drop(&mut self) {
        // As long as it has not been waited for, the number is its own.
        let _ = nix::sys::signal::kill(self.0, Signal::SIGKILL);
        ptrace::reap(self.0);
    }
}

impl Tracee {
    /// It has been collected already.
    fn forget(self) {
        std::mem::forget(self);
    }

    /// Waits for the stop in which a traced task begins, has it die with us from here on, and lets it go.
    fn begin(&self, options: i32) -> Result<(), AgentError> {
        loop {
            match ptrace::wait(self.0)? {
                Stop::Interrupt | Stop::Group(_) => break,
                Stop::Exited => return Err(AgentError::Gone { pid: self.0.as_raw() }),
                _ => ptrace::cont(self.0, 0)?,
            }
        }
        set_options(self.0, options | ptrace::EXIT_KILL)?;
        Ok(ptrace::cont(self.0, 0)?)
    }
}

/// Seccomp filters are suspended where that is possible at all, as in the freeze.
fn set_options(tid: Pid, options: i32) -> Result<(), AgentError> {
    let options = options | ptrace::TRACE_SYSGOOD;
    match ptrace::set_options(tid, options | ptrace::SUSPEND_SECCOMP) {
        Err(e) if matches!(e.errno, Errno::EINVAL | Errno::EPERM) => Ok(ptrace::set_options(tid, options)?),
        outcome => Ok(outcome?),
    }
}

/// What clone3(2) takes, up to `exit_signal`, which is none.
fn clone_args(batch: &mut Batch, flags: i32) -> Room {
    let args = batch.room(CLONE_ARGS);
    batch.set_u64(args, flags as u64);
    args
}

impl<'a> Guest<'a> {
    /// Makes a copy of the process as it is now. [`AgentError::NoCopy`] where the process cannot have one: nothing has
    /// changed then. `busy` is what [`Aside`] watches: the process has it until it is home, whatever becomes of the engine.
    pub fn copy(&mut self, orphans: Orphans, busy: BorrowedFd<'_>) -> Result<Copied, AgentError> {
        let (near, far) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .during("socketpair", "copy")?;
        let socket = self.lend_anew(far.as_fd(), Some(busy)).map_err(|err| match err {
            AgentError::NoRoom { pid, errno, .. } => AgentError::NoCopy { pid, errno },
            other => other,
        })?;
        drop(far);
        self.prepare(MAKER_AREA, socket, &self.makers_batch());
        let first = first_batch(socket);
        self.prepare(COPY_AREA, socket, &first);
        // From here on what the process makes is traced from its first instruction.
        guest::stop(self.thread.tid)?;
        set_options(self.thread.tid, ptrace::TRACE_CHILDREN)?;
        ptrace::cont(self.thread.tid, 0)?;

        let mut batch = Batch::new();
        let adopts = |batch: &mut Batch, value: u64| {
            if orphans == Orphans::Here {
                batch.try_call(libc::SYS_prctl, &[libc::PR_SET_CHILD_SUBREAPER.into(), value.into()]);
            }
        };
        adopts(&mut batch, 0);
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES | libc::CLONE_FS | libc::CLONE_PARENT_SETTID;
        let (args, maker) = (clone_args(&mut batch, flags), batch.bytes(&NOBODY.to_le_bytes()));
        batch.link(args.at(24), maker);
        let make =
            batch.try_fork(libc::SYS_clone3, &[args.into(), CLONE_ARGS.into()], self.area_there + MAKER_AREA as u64);
        batch.try_call(libc::SYS_wait4, &[Arg::ValueAt(maker), 0u64.into(), libc::__WALL.into(), 0u64.into()]);
        adopts(&mut batch, 1);
        self.begin(&batch)?;
        let born = self.attend_birth();
        let made = self.end(&batch)?;
        self.takes_another();
        let no_copy = |errno| AgentError::NoCopy { pid: self.pid.as_raw(), errno };
        made.ret(make).map_err(no_copy)?;
        let Some(tracee) = born? else {
            let at = MAKER_AREA + HEADER + super::batch::RET;
            return Err(no_copy(Errno::from_raw((self.area.read_u64(at) as i64).wrapping_neg() as i32)));
        };
        let pid = tracee.0;
        let copied = Copied {
            of: self.pid,
            socket: near,
            area: self.area.clone(),
            area_there: self.area_there,
            code: self.code,
            socket_there: socket,
            lent: None,
            memory: ProcessMemory::open(pid)?,
            tracee,
        };
        let outcome = copied.outcome(&first)?;
        match outcome.failed() {
            Some((_, errno)) => Err(no_copy(errno)),
            None => Ok(copied),
        }
    }

    /// What the helper does: make the copy, and end.
    fn makers_batch(&self) -> Batch {
        let mut batch = Batch::new();
        let args = clone_args(&mut batch, libc::CLONE_FILES);
        batch.try_fork(libc::SYS_clone3, &[args.into(), CLONE_ARGS.into()], self.area_there + COPY_AREA as u64);
        batch.call(libc::SYS_exit_group, &[0u64.into()]);
        batch
    }

    /// Puts a batch into an area of its own, with which a new process is to begin.
    fn prepare(&self, at: usize, socket: i32, batch: &Batch) {
        self.area.write(at, &[0; HEADER]);
        self.area.write_u64(at, socket as u64);
        self.area.write_u64(at + 8, 1);
        self.area.write_u64(at + 16, batch.len() as u64);
        self.area.write_u64(at + 24, HEADER as u64);
        self.area.write(at + HEADER, &batch.encode(self.area_there + at as u64));
    }

    /// Sees the helper and the copy through their births, and the helper to its end. `None` where there is no copy.
    fn attend_birth(&self) -> Result<Option<Tracee>, AgentError> {
        let Some(maker) = self.child_born()? else { return Ok(None) };
        maker.begin(ptrace::TRACE_CHILDREN)?;
        let mut copy = None;
        loop {
            match ptrace::wait(maker.0)? {
                Stop::Event(_) => {
                    copy = Some(Tracee(Pid::from_raw(ptrace::event_message(maker.0)? as i32)));
                    ptrace::cont(maker.0, 0)?;
                }
                Stop::Exited => break,
                Stop::Signal(signal) => ptrace::cont(maker.0, signal)?,
                _ => ptrace::cont(maker.0, 0)?,
            }
        }
        maker.forget();
        if let Some(copy) = &copy {
            copy.begin(0)?;
            // The program is the last that is to die for the room that its copy takes.
            let _ = std::fs::write(format!("/proc/{}/oom_score_adj", copy.0), "1000");
        }
        Ok(copy)
    }

    /// The child that the process makes; `None` if it reports instead that there is none.
    fn child_born(&self) -> Result<Option<Tracee>, AgentError> {
        /// An engine that comes before all others on its processor would never let the thread run.
        const TRIES: u32 = 50;
        let tid = self.thread.tid;
        for n in 0.. {
            match ptrace::try_wait(tid)? {
                Some(Stop::Event(_)) => {
                    let child = Tracee(Pid::from_raw(ptrace::event_message(tid)? as i32));
                    ptrace::cont(tid, 0)?;
                    return Ok(Some(child));
                }
                Some(Stop::Exited) => return Err(AgentError::Gone { pid: self.pid.as_raw() }),
                Some(Stop::Signal(signal)) => ptrace::cont(tid, signal)?,
                Some(_) => ptrace::cont(tid, 0)?,
                None if !fd::poll_now(self.socket()?, PollFlags::POLLIN)?.is_empty() => break,
                None if n < TRIES => std::thread::yield_now(),
                None => std::thread::sleep(Duration::from_micros(50)),
            }
        }
        Ok(None)
    }

    /// Has the process adopt no orphans until nobody has the other end of the pipe `idle` any more.
    fn step_aside(mut self, idle: BorrowedFd<'_>) -> Result<Held<'a>, AgentError> {
        let pipe = self.lend_anew(idle, None)?;
        let mut batch = Batch::new();
        let (socket, byte) = (self.socket_there(), batch.room(1));
        let adopt = |value: u64| [libc::PR_SET_CHILD_SUBREAPER.into(), value.into()];
        let no_signal = libc::MSG_NOSIGNAL.into();
        batch.try_call(libc::SYS_prctl, &adopt(0));
        batch.try_call(
            libc::SYS_sendto,
            &[socket.into(), byte.into(), 1u64.into(), no_signal, 0u64.into(), 0u64.into()],
        );
        // struct pollfd: a hang-up is always looked for.
        let wait = batch.bytes(&(pipe as u64).to_le_bytes());
        batch.try_call(libc::SYS_poll, &[wait.into(), 1u64.into(), ASIDE_MAX_MS.into()]);
        batch.try_call(libc::SYS_prctl, &adopt(1));
        self.begin(&batch)?;
        guest::receive(self.socket()?, self.thread.tid, self.pid, &mut [0])?;
        Ok(Held { guest: self, batch })
    }
}

/// A process that adopts no orphans for the moment.
#[derive(Debug)]
struct Held<'a> {
    guest: Guest<'a>,
    batch: Batch,
}

/// Processes that adopt orphans (PR_SET_CHILD_SUBREAPER) and must not while their descendants are copied. They wait for the
/// end of a pipe whose other end the engine has, and each process that is being copied: so even if the engine dies, they
/// adopt again only when nobody makes a copy any more.
#[derive(Debug)]
pub struct Aside<'a> {
    busy: Option<OwnedFd>,
    idle: OwnedFd,
    held: Vec<Held<'a>>,
}

impl<'a> Aside<'a> {
    /// Nobody so far.
    pub fn new() -> Result<Self, AgentError> {
        let (idle, busy) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).during("pipe2", "copies")?;
        Ok(Self { busy: Some(busy), idle, held: Vec::new() })
    }

    /// What a process that is copied has to have.
    pub fn busy(&self) -> Result<BorrowedFd<'_>, AgentError> {
        // It is given up together with all of this.
        self.busy.as_ref().map(AsFd::as_fd).ok_or_else(|| SysError::new("pipe2", "copies", Errno::EBADF).into())
    }

    /// Takes a process in.
    pub fn take(&mut self, guest: Guest<'a>) -> Result<(), AgentError> {
        self.held.push(guest.step_aside(self.idle.as_fd())?);
        Ok(())
    }

    /// All adopt orphans again, and are left as they were found.
    pub fn come_back(mut self) -> Result<(), AgentError> {
        self.busy = None;
        for mut held in std::mem::take(&mut self.held) {
            held.guest.end(&held.batch)?;
            held.guest.leave()?;
        }
        Ok(())
    }
}

impl Drop for Aside<'_> {
    fn drop(&mut self) {
        // Those that are held go home only then.
        self.busy = None;
    }
}

/// What a copy does first: it gives up what it has in common with the program, but for the memory.
fn first_batch(socket: i32) -> Batch {
    const UNSHARE: u64 = 2;
    let mut batch = Batch::new();
    // Its own table from here on, without what is above; then what is below.
    batch.call(libc::SYS_close_range, &[(socket + 1).into(), u32::MAX.into(), UNSHARE.into()]);
    if socket > 0 {
        batch.call(libc::SYS_close_range, &[0u64.into(), (socket - 1).into(), 0u64.into()]);
    }
    // Signals for the program's group and hang-ups of its terminal are not for it.
    batch.try_call(libc::SYS_setsid, &[]);
    let root = batch.bytes(b"/\0");
    batch.try_call(libc::SYS_chdir, &[root.into()]);
    // Whatever ends it, it leaves no file behind.
    let no_core = batch.bytes(&[0; 16]);
    batch.try_call(libc::SYS_prlimit64, &[0u64.into(), libc::RLIMIT_CORE.into(), no_core.into(), 0u64.into()]);
    // The program's processor and priority are the program's: processors as the engine has them.
    let mask = batch.bytes(&[0xff; 1024]);
    batch.try_call(libc::SYS_sched_setaffinity, &[0u64.into(), 1024u64.into(), mask.into()]);
    let priority = batch.bytes(&[0; 8]);
    batch.try_call(libc::SYS_sched_setscheduler, &[0u64.into(), libc::SCHED_BATCH.into(), priority.into()]);
    batch
}

/// The copy of a process. It is gone when this is.
#[derive(Debug)]
pub struct Copied {
    of: Pid,
    socket: OwnedFd,
    area: Rc<SharedMap>,
    area_there: u64,
    code: u64,
    socket_there: i32,
    lent: Option<i32>,
    memory: ProcessMemory,
    tracee: Tracee,
}

impl Copied {
    /// Its pid.
    pub fn pid(&self) -> Pid {
        self.tracee.0
    }

    /// The process that it is a copy of.
    pub fn of(&self) -> Pid {
        self.of
    }

    /// Its memory, from outside.
    pub fn memory(&self) -> &ProcessMemory {
        &self.memory
    }

    /// Makes the calls of a batch in the copy.
    pub fn run(&mut self, batch: &Batch) -> Result<Outcome, AgentError> {
        self.run_with(batch, &[])
    }

    fn run_with(&mut self, batch: &Batch, files: &[BorrowedFd<'_>]) -> Result<Outcome, AgentError> {
        if batch.size() > COPY_ROOM {
            return Err(AgentError::TooLarge { needed: batch.size(), room: COPY_ROOM });
        }
        self.area.write(COPY_AREA + HEADER, &batch.encode(self.area_there + COPY_AREA as u64));
        guest::send_header(&self.socket, batch)?;
        if !files.is_empty() {
            guest::send_files(&self.socket, files)?;
        }
        self.outcome(batch)
    }

    fn outcome(&self, batch: &Batch) -> Result<Outcome, AgentError> {
        let left = guest::wait_for_reply(&self.socket, self.pid(), self.pid())?;
        Ok(batch.outcome(left, &self.area.read(COPY_AREA, batch.size())))
    }

    /// Gives the copy a descriptor of a file of ours, once, and tells its number there.
    pub fn lend(&mut self, file: impl AsFd) -> Result<i32, AgentError> {
        if let Some(fd) = self.lent {
            return Ok(fd);
        }
        let mut batch = Batch::new();
        let received = Received::ask(&mut batch, self.socket_there as u32, None);
        let outcome = self.run_with(&batch, &[file.as_fd()])?;
        let no_room = |errno| AgentError::NoRoom { pid: self.of.as_raw(), area: guest::AREA, errno };
        Ok(*self.lent.insert(received.number(&outcome).map_err(no_room)?))
    }

    /// Whether the agent's code stands between two addresses.
    pub fn stands_in(&self, start: u64, end: u64) -> bool {
        self.code < end && start < self.code + code::guest_len() as u64
    }

    /// Makes bytes read from `start` on look as if the agent were not there.
    pub fn hide(&self, start: u64, bytes: &mut [u8]) {
        guest::hide(self.code, start, bytes);
    }
}
