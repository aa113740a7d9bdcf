//! A guest in a running process: comes in, makes calls, and goes home, leaving no trace.
//!
//! From the moment in which a thread's registers point at the code, the way home needs no engine: should it be killed,
//! the guest finds the end of its socket and gives everything back (see `code`). When the engine lives, the last step
//! is its own: the thread is stopped at the end of the way and gets the registers that it was found with, so that the
//! kernel restarts an interrupted call exactly as if nothing had been there.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, recv, send, sendmsg};
use nix::unistd::Pid;

use crate::kernel::map::SharedMap;
use crate::kernel::mem::ProcessMemory;
use crate::kernel::pidfd::PidFd;
use crate::kernel::processors::Processors;
use crate::kernel::ptrace::{self, Stop};
use crate::kernel::regs::{self, is_entry};
use crate::kernel::sched;
use crate::kernel::{SysError, error::During};

use super::batch::{Arg, Batch, CallId, HEADER, Outcome, Room};
use super::beside::{Beside, Place};
use super::code::{self, GuestLayout, Home};
use super::{AgentError, slack};
use crate::kernel::survey::Vma;

/// Size of the area shared with a process.
pub const AREA: usize = 1 << 20;
/// Size of a further thread's own area.
pub(super) const THREAD_AREA: usize = 16 << 10;
/// The part in which a copy of the process runs its batches.
pub(super) const COPY_AREA: usize = AREA - COPY_ROOM;
/// Size of that part.
pub(super) const COPY_ROOM: usize = 256 << 10;
/// The part for the one that makes the copy.
pub(super) const MAKER_AREA: usize = COPY_AREA - (4 << 10);
const ALL_SIGNALS: u64 = u64::MAX;
/// Where the message with lent descriptors lies in the area (see `code`): a `struct cmsghdr` with one or two of them.
const LENT: usize = 64;
const LENT_LEN: u64 = 24;

/// A stopped thread, as it was found.
#[derive(Debug, Clone, Copy)]
pub struct Stopped {
    /// Its id.
    pub tid: Pid,
    /// Its registers at the stop.
    pub regs: libc::user_regs_struct,
    /// Its blocked signals.
    pub sigmask: u64,
    /// Whether a signal that is not blocked waits for it.
    pub signal_waits: bool,
}

/// A thread through which a process can be entered.
#[derive(Debug, Clone, Copy)]
pub struct Door<'d> {
    /// The thread.
    pub thread: Stopped,
    /// The processors that it may run on.
    pub processors: &'d Processors,
    /// Who waits for it on one of them.
    pub beside: Option<&'d Beside>,
}

/// The agent inside one process.
#[derive(Debug)]
pub struct Guest<'a> {
    pub(super) pid: Pid,
    pub(super) thread: Stopped,
    memory: &'a ProcessMemory,
    pub(super) code: u64,
    layout: GuestLayout,
    socket: Option<OwnedFd>,
    pub(super) area: Rc<SharedMap>,
    /// Where the process sees the area.
    pub(super) area_there: u64,
    /// The descriptor that it has been lent.
    lent: Option<Lent>,
    home: bool,
}

/// A descriptor that a process has been lent: its number there.
#[derive(Debug, Clone, Copy)]
struct Lent {
    fd: i32,
    /// A second one, with a higher number.
    second: Option<i32>,
    /// Whether it has served its turn, so that the next takes its number.
    done: bool,
}

impl<'a> Guest<'a> {
    /// Enters the process through one of its stopped threads.
    pub fn enter(
        pid: Pid,
        pidfd: &PidFd,
        door: Door<'_>,
        memory: &'a ProcessMemory,
        vmas: &[Vma],
    ) -> Result<Self, AgentError> {
        let thread = door.thread;
        let layout = code::guest_layout();
        let at = slack::find(pid, memory, vmas)?;
        let mut image = code::guest().to_vec();
        let home = Home::new(&regs::resumable(&thread.regs, thread.signal_waits), thread.sigmask).bytes();
        image[layout.home_data..layout.home_data + home.len()].copy_from_slice(&home);
        image[layout.size..layout.size + 8].copy_from_slice(&(AREA as u64).to_le_bytes());
        let place = door.beside.and_then(|beside| beside.place(thread.tid, door.processors));
        if let Some(Place { home, .. }) = &place {
            let home = home.bytes();
            image[layout.processors..layout.processors + 8].copy_from_slice(&(home.len() as u64).to_le_bytes());
            image[layout.processors + 8..layout.processors + 8 + home.len()].copy_from_slice(home);
        }
        memory.write(at, &image)?;

        match Self::arrive(pid, pidfd, thread, place.as_ref(), memory, at, layout) {
            Ok(guest) => Ok(guest),
            Err(err) => {
                // The thread is on its way home or was never sent: see that it arrives, then wipe.
                let _ = settle(&thread);
                if let Some(Place { home, .. }) = &place {
                    let _ = sched::set_affinity(thread.tid, home);
                }
                let _ = memory.write(at, &vec![0; image.len()]);
                Err(err)
            }
        }
    }

    fn arrive(
        pid: Pid,
        pidfd: &PidFd,
        thread: Stopped,
        place: Option<&Place>,
        memory: &'a ProcessMemory,
        code: u64,
        layout: GuestLayout,
    ) -> Result<Self, AgentError> {
        send_to(&thread, code)?;
        // From here on it is given back on the way home. A thread with a deadline (sched(7)) cannot be moved.
        if let Some(Place { here, .. }) = place
            && let Err(err) = sched::set_affinity(thread.tid, here)
        {
            tracing::debug!(%err, "the thread stays where it is");
        }
        let arrived = code + layout.after_socketpair as u64;
        let run_home = || run_home(&thread, layout.way_home(code));
        let regs = loop {
            let regs = next_syscall_stop(thread.tid)?;
            if is_entry(&regs) {
                continue;
            }
            let failed = -(regs.rax as i64);
            if regs.rip == arrived && failed <= 0 {
                break regs;
            }
            if (1..4096).contains(&failed) {
                let errno = Errno::from_raw(failed as i32);
                run_home()?;
                return Err(AgentError::NoRoom { pid: pid.as_raw(), area: AREA, errno });
            }
        };
        let area_there = regs.r12;
        let taken = take(pidfd, memory, area_there, regs.r14 as i32);
        let (socket, area) = match taken {
            Ok(taken) => taken,
            Err(err) => {
                // Nobody holds the far end: at the end of file it goes home.
                run_home()?;
                return Err(err);
            }
        };
        ptrace::cont(thread.tid, 0)?;
        let area = Rc::new(area);
        Ok(Self { pid, thread, memory, code, layout, socket: Some(socket), area, area_there, lent: None, home: false })
    }

    /// The process.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Makes the calls of a batch in the process, in its first thread.
    pub fn run(&mut self, batch: &Batch) -> Result<Outcome, AgentError> {
        self.run_with(batch, &[])
    }

    fn run_with(&mut self, batch: &Batch, files: &[BorrowedFd<'_>]) -> Result<Outcome, AgentError> {
        self.begin(batch)?;
        if !files.is_empty() {
            send_files(self.socket()?, files)?;
        }
        self.end(batch)
    }

    /// Has the process begin a batch.
    pub(super) fn begin(&mut self, batch: &Batch) -> Result<(), AgentError> {
        let room = MAKER_AREA;
        if batch.size() > room {
            return Err(AgentError::TooLarge { needed: batch.size(), room });
        }
        self.area.write(HEADER, &batch.encode(self.area_there));
        send_header(self.socket()?, batch)
    }

    /// Waits until the process has done the batch.
    pub(super) fn end(&mut self, batch: &Batch) -> Result<Outcome, AgentError> {
        let left = wait_for_reply(self.socket()?, self.thread.tid, self.pid)?;
        Ok(batch.outcome(left, &self.area.read(0, batch.size())))
    }

    pub(super) fn socket(&self) -> Result<&OwnedFd, AgentError> {
        self.socket.as_ref().ok_or(AgentError::Gone { pid: self.pid.as_raw() })
    }

    /// The number of its own end of the socket.
    pub(super) fn socket_there(&self) -> u32 {
        self.area.read_u64(0) as u32
    }

    /// Makes the calls of a batch in another thread of the process, which stands still before and after.
    pub fn run_in(&mut self, thread: &Stopped, batch: &Batch) -> Result<Outcome, AgentError> {
        if batch.size() > THREAD_AREA {
            return Err(AgentError::TooLarge { needed: batch.size(), room: THREAD_AREA });
        }
        let layout = self.layout;
        let home = Home::new(&regs::resumable(&thread.regs, thread.signal_waits), thread.sigmask).bytes();
        self.memory.write(self.code + layout.thread_home_data as u64, &home)?;
        send_to(thread, self.code + layout.thread_entry as u64)?;
        let area = loop {
            let regs = next_syscall_stop(thread.tid)?;
            if regs.rip == self.code + layout.thread_area as u64 && !is_entry(&regs) {
                break regs.rax;
            }
        };
        let ran = self.run_there(thread, area, batch);
        if ran.is_ok() {
            // It stands before the last call.
            settle(thread)?;
            return ran;
        }
        run_home(thread, layout.thread_way_home(self.code))?;
        ran
    }

    /// Runs a batch in a thread that has just made its area, up to the call that takes it away.
    fn run_there(&self, thread: &Stopped, area: u64, batch: &Batch) -> Result<Outcome, AgentError> {
        if let errno @ 1..4096 = (area as i64).wrapping_neg() {
            let errno = Errno::from_raw(errno as i32);
            return Err(AgentError::NoRoom { pid: self.pid.as_raw(), area: THREAD_AREA, errno });
        }
        self.memory.write(area + HEADER as u64, &batch.encode(area))?;
        self.memory.write(area + 16, &[batch.len() as u64, HEADER as u64].map(u64::to_le_bytes).concat())?;
        loop {
            let regs = next_syscall_stop(thread.tid)?;
            if regs.rip == self.code + self.layout.thread_unmap as u64 && is_entry(&regs) {
                break;
            }
        }
        let bytes = self.memory.read(area, batch.size())?;
        let mut left = [0; 8];
        left.copy_from_slice(&bytes[16..24]);
        Ok(batch.outcome(u64::from_le_bytes(left) as usize, &bytes))
    }

    /// Gives the process a descriptor of a file of ours, and tells its number there. It keeps the one that it has, until
    /// [`Guest::takes_another`]: it is the last thing that is closed on the way home, with the engine's help or without.
    pub fn lend(&mut self, file: impl AsFd) -> Result<i32, AgentError> {
        match self.lent {
            Some(lent) if !lent.done => Ok(lent.fd),
            _ => self.lend_anew(file.as_fd(), None),
        }
    }

    /// Gives it a file, and perhaps a second one, in place of what it has. What it has no second one for takes both places.
    pub(super) fn lend_anew(
        &mut self,
        file: BorrowedFd<'_>,
        second: Option<BorrowedFd<'_>>,
    ) -> Result<i32, AgentError> {
        let (mut batch, socket) = (Batch::new(), self.socket_there());
        let files: Vec<BorrowedFd<'_>> = [Some(file), second].into_iter().flatten().collect();
        let received = match self.lent {
            Some(lent) => {
                // Under the numbers that stand where the guest looks for them on its way home.
                let received = Received::ask(&mut batch, socket, None);
                let numbers = [Some(lent.fd), lent.second];
                for (n, number) in numbers.into_iter().flatten().enumerate() {
                    let from = received.fd(n.min(files.len() - 1));
                    batch.call(libc::SYS_dup3, &[from, number.into(), libc::O_CLOEXEC.into()]);
                }
                for n in 0..files.len() {
                    batch.call(libc::SYS_close, &[received.fd(n)]);
                }
                received
            }
            None => Received::ask(&mut batch, socket, Some(self.area_there + LENT as u64)),
        };
        let outcome = self.run_with(&batch, &files)?;
        if self.lent.is_none() {
            // Where there was no room for all, some may have come.
            let number = |at: usize| (self.area.read_u64(at) as u32 as i32, self.area.read_u64(LENT) != 0);
            let ((fd, any), (second, _)) = (number(LENT + 16), number(LENT + 20));
            self.lent = any.then_some(Lent { fd, second: (second != 0).then_some(second), done: true });
        }
        let no_room = |errno| AgentError::NoRoom { pid: self.pid.as_raw(), area: AREA, errno };
        received.check(&outcome).map_err(no_room)?;
        let lent = self.lent.as_mut().ok_or_else(|| no_room(Errno::EBADF))?;
        lent.done = false;
        Ok(lent.fd)
    }

    /// What it was lent has served its turn: the next takes its place.
    pub fn takes_another(&mut self) {
        if let Some(lent) = &mut self.lent {
            lent.done = true;
        }
    }

    /// Whether the agent's code stands between two addresses.
    pub fn stands_in(&self, start: u64, end: u64) -> bool {
        self.code < end && start < self.code + code::guest_len() as u64
    }

    /// Makes bytes read from `start` on look as if the agent were not there.
    pub fn hide(&self, start: u64, bytes: &mut [u8]) {
        hide(self.code, start, bytes);
    }

    /// Leaves the process as it was found.
    pub fn leave(mut self) -> Result<(), AgentError> {
        self.go_home()
    }

    fn go_home(&mut self) -> Result<(), AgentError> {
        if std::mem::replace(&mut self.home, true) {
            return Ok(());
        }
        stop(self.thread.tid)?;
        // End of file: the guest closes, unmaps and gives the signal mask back.
        self.socket = None;
        run_home(&self.thread, self.layout.way_home(self.code))?;
        self.memory.write(self.code, &vec![0; code::guest_len()])?;
        Ok(())
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        if let Err(err) = self.go_home() {
            tracing::debug!(pid = self.pid.as_raw(), %err, "the agent found its way home by itself");
        }
    }
}

/// Puts zeros where the code stands at address `code`, in bytes read from `start` on.
pub(super) fn hide(code: u64, start: u64, bytes: &mut [u8]) {
    let len = bytes.len();
    let from = code.saturating_sub(start).min(len as u64) as usize;
    let to = (code + code::guest_len() as u64).saturating_sub(start).min(len as u64) as usize;
    bytes[from..to].fill(0);
}

/// The call that receives a descriptor which [`send_files`] has sent.
#[derive(Debug)]
pub(super) struct Received {
    call: CallId,
    /// A `struct msghdr`: name, namelen, iov, iovlen, control, controllen, flags.
    header: Room,
    control: Room,
}

impl Received {
    /// Asks for it; the control message that brings it goes to the address `control` of the process, or into the batch.
    pub(super) fn ask(batch: &mut Batch, socket: u32, control: Option<u64>) -> Self {
        let byte = batch.room(1);
        let iov = batch.bytes(&[0, 1].map(u64::to_le_bytes).concat());
        batch.link(iov, byte);
        // Behind it is room for a call to take eight bytes from the second number.
        let room = batch.room(LENT_LEN as usize + 8);
        let header = batch.bytes(&[0, 0, 0, 1, control.unwrap_or(0), LENT_LEN, 0].map(u64::to_le_bytes).concat());
        batch.link(header.at(16), iov);
        if control.is_none() {
            batch.link(header.at(32), room);
        }
        let flags = (libc::MSG_CMSG_CLOEXEC as u64).into();
        let call = batch.call(libc::SYS_recvmsg, &[socket.into(), header.into(), flags]);
        Self { call, header, control: room }
    }

    /// The number of the nth, for a later call of the batch that takes 32 bits.
    pub(super) fn fd(&self, nth: usize) -> Arg {
        Arg::ValueAt(self.control.at(16 + 4 * nth))
    }

    /// Its number, from what came of the batch.
    pub(super) fn number(&self, outcome: &Outcome) -> Result<i32, Errno> {
        self.check(outcome).map(|()| outcome.u32(self.control, 16) as i32)
    }

    fn check(&self, outcome: &Outcome) -> Result<(), Errno> {
        outcome.ret(self.call)?;
        let truncated = outcome.u32(self.header, 48) & libc::MSG_CTRUNC as u32 != 0;
        if truncated { Err(Errno::EMFILE) } else { Ok(()) }
    }
}

/// Tells an agent to run the batch that stands in its area.
pub(super) fn send_header(socket: &OwnedFd, batch: &Batch) -> Result<(), AgentError> {
    let mut message = [0u8; 16];
    message[..8].copy_from_slice(&(batch.len() as u64).to_le_bytes());
    message[8..].copy_from_slice(&(HEADER as u64).to_le_bytes());
    send(socket.as_raw_fd(), &message, MsgFlags::MSG_NOSIGNAL).during("send", "agent's socket")?;
    Ok(())
}

/// Sends an agent descriptors.
pub(super) fn send_files(socket: &OwnedFd, files: &[BorrowedFd<'_>]) -> Result<(), AgentError> {
    let fds: Vec<i32> = files.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(b"f")], &rights, MsgFlags::MSG_NOSIGNAL, None)
        .during("sendmsg", "agent's socket")?;
    Ok(())
}

/// Waits for the end of a batch, and says how many calls were not done.
pub(super) fn wait_for_reply(socket: &OwnedFd, tid: Pid, pid: Pid) -> Result<usize, AgentError> {
    let mut message = [0u8; 16];
    receive(socket, tid, pid, &mut message)?;
    let mut word = [0; 8];
    word.copy_from_slice(&message[..8]);
    Ok(u64::from_le_bytes(word) as usize)
}

/// Waits for a message that fills `message`.
pub(super) fn receive(socket: &OwnedFd, tid: Pid, pid: Pid, message: &mut [u8]) -> Result<(), AgentError> {
    loop {
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::from(50u8)) {
            Ok(0) => keep_going(tid, pid)?,
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(e) => return Err(SysError::new("poll", "agent's socket", e).into()),
        }
    }
    match recv(socket.as_raw_fd(), message, MsgFlags::empty()) {
        Ok(n) if n == message.len() => Ok(()),
        _ => Err(AgentError::Gone { pid: pid.as_raw() }),
    }
}

/// A signal that cannot be blocked (SIGSTOP) may have stopped the thread while it works.
fn keep_going(tid: Pid, pid: Pid) -> Result<(), AgentError> {
    match ptrace::try_wait(tid)? {
        None => Ok(()),
        Some(Stop::Exited) => Err(AgentError::Gone { pid: pid.as_raw() }),
        Some(Stop::Signal(signal)) => Ok(ptrace::cont(tid, signal)?),
        Some(_) => Ok(ptrace::cont(tid, 0)?),
    }
}

/// Takes the far end of the guest's socket, and maps the area, of whose file it says the number.
fn take(
    pidfd: &PidFd,
    memory: &ProcessMemory,
    area_there: u64,
    memfd: i32,
) -> Result<(OwnedFd, SharedMap), AgentError> {
    let memfd = pidfd.get(memfd)?;
    let ends = memory.read(area_there, 8)?;
    let far_end = i32::from_le_bytes([ends[4], ends[5], ends[6], ends[7]]);
    Ok((pidfd.get(far_end)?, SharedMap::new(&memfd, AREA)?))
}

/// Points a stopped thread at the code. If the engine dies between the two calls, a signal may still be delivered on
/// top of the agent, which goes home all the same.
fn send_to(thread: &Stopped, entry: u64) -> Result<(), AgentError> {
    let mut regs = thread.regs;
    regs.rip = entry;
    // No system call is under way there: nothing for the kernel to restart.
    regs.orig_rax = u64::MAX;
    ptrace::set_regs(thread.tid, &regs)?;
    ptrace::set_sigmask(thread.tid, ALL_SIGNALS)?;
    Ok(())
}

/// Runs a thread to its next system-call stop.
fn next_syscall_stop(tid: Pid) -> Result<libc::user_regs_struct, AgentError> {
    let mut signal = 0;
    loop {
        if signal == 0 {
            ptrace::cont_to_syscall(tid)?;
        } else {
            ptrace::cont(tid, signal)?;
        }
        signal = 0;
        match ptrace::wait(tid)? {
            Stop::Syscall => return Ok(ptrace::regs(tid)?),
            Stop::Signal(s) => signal = s,
            Stop::Interrupt | Stop::Group(_) => {}
            Stop::Exited => return Err(AgentError::Gone { pid: tid.as_raw() }),
            other => return Err(AgentError::Strayed { tid: tid.as_raw(), stop: format!("{other:?}") }),
        }
    }
}

/// Lets a thread run home, and gives it what it was found with.
///
/// The addresses are those behind two calls: the last but that for the signal mask, and that one. Behind the first, a thread
/// only does by itself what it is given here, and may do it on any processor, where each stop takes twenty times as long.
/// So it is stopped there, if it comes that way.
fn run_home(thread: &Stopped, [last, home]: [u64; 2]) -> Result<(), AgentError> {
    loop {
        let regs = next_syscall_stop(thread.tid)?;
        if regs.rip == if is_entry(&regs) { last } else { home } {
            return settle(thread);
        }
    }
}

/// Stops a running thread.
pub(super) fn stop(tid: Pid) -> Result<(), AgentError> {
    ptrace::interrupt(tid)?;
    loop {
        match ptrace::wait(tid)? {
            Stop::Interrupt | Stop::Group(_) => return Ok(()),
            Stop::Signal(s) => ptrace::cont(tid, s)?,
            Stop::Exited => return Err(AgentError::Gone { pid: tid.as_raw() }),
            _ => ptrace::cont(tid, 0)?,
        }
    }
}

/// Puts a thread that stands at a system-call stop into an interrupt stop, behind the call if it stands before one, and gives
/// it the registers and signal mask that it was found with. From there the kernel looks at the registers for a call to restart
/// when it is let go.
fn settle(thread: &Stopped) -> Result<(), AgentError> {
    ptrace::interrupt(thread.tid)?;
    ptrace::cont(thread.tid, 0)?;
    loop {
        match ptrace::wait(thread.tid)? {
            Stop::Interrupt | Stop::Group(_) => break,
            Stop::Signal(s) => ptrace::cont(thread.tid, s)?,
            Stop::Exited => return Err(AgentError::Gone { pid: thread.tid.as_raw() }),
            _ => ptrace::cont(thread.tid, 0)?,
        }
    }
    ptrace::set_sigmask(thread.tid, thread.sigmask)?;
    ptrace::set_regs(thread.tid, &thread.regs)?;
    Ok(())
}
