//! A guest in a running process: comes in, makes calls, and goes home, leaving no trace.
//!
//! From the moment in which a thread's registers point at the code, the way home needs no engine: should it be killed,
//! the guest finds the end of its socket and gives everything back (see `code`). When the engine lives, the last step
//! is its own: the thread is stopped at the end of the way and gets the registers that it was found with, so that the
//! kernel restarts an interrupted call exactly as if nothing had been there.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, recv, send, sendmsg};
use nix::unistd::Pid;

use crate::kernel::map::SharedMap;
use crate::kernel::mem::ProcessMemory;
use crate::kernel::pidfd::PidFd;
use crate::kernel::ptrace::{self, Stop};
use crate::kernel::regs;
use crate::kernel::{SysError, error::During};

use super::batch::{Batch, HEADER, Outcome};
use super::code::{self, GuestLayout, Home};
use super::{AgentError, slack};
use crate::kernel::survey::Vma;

/// Size of the area shared with a process.
pub const AREA: usize = 1 << 20;
/// The part of it in which a further thread's batches run.
const THREAD_AREA: usize = AREA - (64 << 10);
const ALL_SIGNALS: u64 = u64::MAX;
/// Where the message with a lent descriptor lies in the area (see `code`): a `struct cmsghdr` with one descriptor, padded.
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

/// The agent inside one process.
#[derive(Debug)]
pub struct Guest<'a> {
    pid: Pid,
    thread: Stopped,
    memory: &'a ProcessMemory,
    code: u64,
    layout: GuestLayout,
    socket: Option<OwnedFd>,
    area: SharedMap,
    /// Where the process sees the area.
    area_there: u64,
    /// Number of the descriptor that it has been lent.
    lent: Option<i32>,
    home: bool,
}

impl<'a> Guest<'a> {
    /// Enters the process through one of its stopped threads.
    pub fn enter(
        pid: Pid,
        pidfd: &PidFd,
        thread: Stopped,
        memory: &'a ProcessMemory,
        vmas: &[Vma],
    ) -> Result<Self, AgentError> {
        let layout = code::guest_layout();
        let at = slack::find(pid, memory, vmas)?;
        let mut image = code::guest().to_vec();
        let home = Home::new(&regs::resumable(&thread.regs, thread.signal_waits), thread.sigmask).bytes();
        image[layout.home_data..layout.home_data + home.len()].copy_from_slice(&home);
        image[layout.size..layout.size + 8].copy_from_slice(&(AREA as u64).to_le_bytes());
        memory.write(at, &image)?;

        match Self::arrive(pid, pidfd, thread, memory, at, layout) {
            Ok(guest) => Ok(guest),
            Err(err) => {
                // The thread is on its way home or was never sent: see that it arrives, then wipe.
                let _ = settle(&thread);
                let _ = memory.write(at, &vec![0; image.len()]);
                Err(err)
            }
        }
    }

    fn arrive(
        pid: Pid,
        pidfd: &PidFd,
        thread: Stopped,
        memory: &'a ProcessMemory,
        code: u64,
        layout: GuestLayout,
    ) -> Result<Self, AgentError> {
        send_to(&thread, code)?;
        let arrived = code + layout.after_socketpair as u64;
        let home = code + layout.home as u64;
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
                run_home(&thread, home)?;
                return Err(AgentError::NoRoom { pid: pid.as_raw(), area: AREA, errno });
            }
        };
        let area_there = regs.r12;
        let taken = take(pidfd, memory, area_there, regs.r14 as i32);
        let (socket, area) = match taken {
            Ok(taken) => taken,
            Err(err) => {
                // Nobody holds the far end: at the end of file it goes home.
                run_home(&thread, home)?;
                return Err(err);
            }
        };
        ptrace::cont(thread.tid, 0)?;
        Ok(Self { pid, thread, memory, code, layout, socket: Some(socket), area, area_there, lent: None, home: false })
    }

    /// The process.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Makes the calls of a batch in the process, in its first thread.
    pub fn run(&mut self, batch: &Batch) -> Result<Outcome, AgentError> {
        self.run_with(batch, None)
    }

    fn run_with(&mut self, batch: &Batch, file: Option<BorrowedFd<'_>>) -> Result<Outcome, AgentError> {
        let room = THREAD_AREA;
        if batch.size() > room {
            return Err(AgentError::TooLarge { needed: batch.size(), room });
        }
        self.area.write(HEADER, &batch.encode(self.area_there));
        let mut message = [0u8; 16];
        message[..8].copy_from_slice(&(batch.len() as u64).to_le_bytes());
        message[8..].copy_from_slice(&(HEADER as u64).to_le_bytes());
        let socket = self.socket()?.as_raw_fd();
        send(socket, &message, MsgFlags::MSG_NOSIGNAL).during("send", "agent's socket")?;
        if let Some(file) = file {
            let fds = [file.as_raw_fd()];
            let rights = [ControlMessage::ScmRights(&fds)];
            sendmsg::<()>(socket, &[IoSlice::new(b"f")], &rights, MsgFlags::MSG_NOSIGNAL, None)
                .during("sendmsg", "agent's socket")?;
        }
        self.wait_for_reply(&mut message)?;
        let mut word = [0; 8];
        word.copy_from_slice(&message[..8]);
        Ok(batch.outcome(u64::from_le_bytes(word) as usize, &self.area.read(0, batch.size())))
    }

    fn socket(&self) -> Result<&OwnedFd, AgentError> {
        self.socket.as_ref().ok_or(AgentError::Gone { pid: self.pid.as_raw() })
    }

    fn wait_for_reply(&mut self, message: &mut [u8; 16]) -> Result<(), AgentError> {
        let gone = AgentError::Gone { pid: self.pid.as_raw() };
        let socket = self.socket()?;
        loop {
            let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::from(50u8)) {
                Ok(0) => self.keep_going()?,
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(e) => return Err(SysError::new("poll", "agent's socket", e).into()),
            }
        }
        match recv(socket.as_raw_fd(), message, MsgFlags::empty()) {
            Ok(16) => Ok(()),
            _ => Err(gone),
        }
    }

    /// A signal that cannot be blocked (SIGSTOP) may have stopped the thread while it works.
    fn keep_going(&self) -> Result<(), AgentError> {
        match ptrace::try_wait(self.thread.tid)? {
            None => Ok(()),
            Some(Stop::Exited) => Err(AgentError::Gone { pid: self.pid.as_raw() }),
            Some(Stop::Signal(signal)) => Ok(ptrace::cont(self.thread.tid, signal)?),
            Some(_) => Ok(ptrace::cont(self.thread.tid, 0)?),
        }
    }

    /// Makes the calls of a batch in another thread of the process, which stands still before and after.
    pub fn run_in(&mut self, thread: &Stopped, batch: &Batch) -> Result<Outcome, AgentError> {
        let room = AREA - THREAD_AREA;
        if batch.size() > room {
            return Err(AgentError::TooLarge { needed: batch.size(), room });
        }
        let there = self.area_there + THREAD_AREA as u64;
        self.area.write(THREAD_AREA + HEADER, &batch.encode(there));
        self.area.write_u64(THREAD_AREA + 16, batch.len() as u64);
        self.area.write_u64(THREAD_AREA + 24, HEADER as u64);
        self.area.write_u64(THREAD_AREA + 40, THREAD_AREA as u64);
        let home = Home::new(&regs::resumable(&thread.regs, thread.signal_waits), thread.sigmask).bytes();
        self.memory.write(self.code + self.layout.area as u64, &there.to_le_bytes())?;
        self.memory.write(self.code + self.layout.thread_home_data as u64, &home)?;
        // From here on the first thread leaves the area to this one, for a while: should we die before it is sent, the
        // first goes home in the end, and the area stays.
        self.area.write_u64(32, 1);
        send_to(thread, self.code + self.layout.thread_entry as u64)?;
        run_home(thread, self.code + self.layout.thread_home as u64)?;
        let left = self.area.read_u64(THREAD_AREA + 16) as usize;
        Ok(batch.outcome(left, &self.area.read(THREAD_AREA, batch.size())))
    }

    /// Gives the process a descriptor of a file of ours, and tells its number there. It keeps the one that it has: it is
    /// the last thing that is closed on the way home, with the engine's help or without.
    pub fn lend(&mut self, file: impl AsFd) -> Result<i32, AgentError> {
        if let Some(fd) = self.lent {
            return Ok(fd);
        }
        let ours = self.area.read_u64(0) as u32;
        let mut batch = Batch::new();
        let byte = batch.room(1);
        let iov = batch.bytes(&[0, 1].map(u64::to_le_bytes).concat());
        batch.link(iov, byte);
        // struct msghdr: name, namelen, iov, iovlen, control, controllen, flags. The control message goes to where the
        // guest looks for it on its way home.
        let control = self.area_there + LENT as u64;
        let header = batch.bytes(&[0, 0, 0, 1, control, LENT_LEN, 0].map(u64::to_le_bytes).concat());
        batch.link(header.at(16), iov);
        let receive =
            batch.call(libc::SYS_recvmsg, &[ours.into(), header.into(), (libc::MSG_CMSG_CLOEXEC as u64).into()]);
        let outcome = self.run_with(&batch, Some(file.as_fd()))?;
        let truncated = outcome.u32(header, 48) & libc::MSG_CTRUNC as u32 != 0;
        let no_room = |errno| AgentError::NoRoom { pid: self.pid.as_raw(), area: AREA, errno };
        outcome.ret(receive).map_err(no_room)?;
        if truncated {
            return Err(no_room(Errno::EMFILE));
        }
        Ok(*self.lent.insert(self.area.read_u64(LENT + 16) as i32))
    }

    /// Whether the agent's code stands between two addresses.
    pub fn stands_in(&self, start: u64, end: u64) -> bool {
        self.code < end && start < self.code + code::guest_len() as u64
    }

    /// Makes bytes read from `start` on look as if the agent were not there.
    pub fn hide(&self, start: u64, bytes: &mut [u8]) {
        let len = bytes.len();
        let from = self.code.saturating_sub(start).min(len as u64) as usize;
        let to = (self.code + code::guest_len() as u64).saturating_sub(start).min(len as u64) as usize;
        bytes[from..to].fill(0);
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
        run_home(&self.thread, self.code + self.layout.home as u64)?;
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

/// Lets a thread run to the end of its way home, and gives it what it was found with.
fn run_home(thread: &Stopped, home: u64) -> Result<(), AgentError> {
    loop {
        let regs = next_syscall_stop(thread.tid)?;
        if regs.rip == home && !is_entry(&regs) {
            return settle(thread);
        }
    }
}

/// At the entry of a call the kernel shows -ENOSYS as its result.
fn is_entry(regs: &libc::user_regs_struct) -> bool {
    regs.rax as i64 == -(Errno::ENOSYS as i64)
}

/// Stops a running thread.
fn stop(tid: Pid) -> Result<(), AgentError> {
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

/// Puts a thread that stands at a system-call stop into an interrupt stop, where the kernel looks at the registers for
/// a call to restart when it is let go, and gives it the registers and signal mask that it was found with.
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
