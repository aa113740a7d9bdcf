//! The last step: every thread gets its registers, the crew's area goes, and all run on at once.

use std::collections::{BTreeSet, HashMap};

use nix::unistd::Pid;

use super::{ExecuteError, Run, wait_for_interrupt};
use crate::agent::{AgentError, Batch, Member};
use crate::kernel::apart::Watchman;
use crate::kernel::error::During;
use crate::kernel::mem::ProcessMemory;
use crate::kernel::ptrace::{self, Stop};
use crate::kernel::regs::{self, SYSCALL};
use crate::kernel::survey;
use crate::observer::{Moment, tell};
use crate::plan::{Call, Role, Stage, Task};
use crate::waiting;

impl Run<'_> {
    /// Gives every thread its registers, takes the crew's area away, and lets all go.
    pub(super) fn go(&mut self, root: Pid, tasks: &[usize]) -> Result<(), ExecuteError> {
        let plan = self.plan;
        let numbers: Vec<usize> = tasks.iter().copied().filter(|&n| plan.tasks[n].resume.is_some()).collect();
        let alive: Vec<&Task> = numbers.iter().map(|&n| &plan.tasks[n]).collect();
        let mut waits = self.begin_waits(&numbers)?;
        for task in &alive {
            ptrace::interrupt(task.tid)?;
        }
        let mut waiting = HashMap::new();
        for (&n, task) in numbers.iter().zip(&alive) {
            match waits.remove(&n) {
                Some((call, batch)) => {
                    waiting.insert(task.tid, waiting::settle(&self.crew, Member(n), &batch, call, task)?);
                }
                None => wait_for_interrupt(task.tid)?,
            }
        }
        self.unmap_crew(&alive)?;
        for task in &alive {
            let Some(resume) = &task.resume else { continue };
            ptrace::set_xstate(task.tid, &resume.xstate)?;
            ptrace::set_sigmask(task.tid, resume.sigmask)?;
            let regs = waiting.get(&task.tid).map_or_else(
                || libc::user_regs_struct { orig_rax: u64::MAX, ..resume.regs },
                |waiting| waiting.registers(&resume.regs),
            );
            ptrace::set_regs(task.tid, &regs)?;
        }
        for task in plan.tasks.iter().filter(|task| task.role == Role::Leader) {
            if task.stopped || self.options.leave_stopped {
                nix::sys::signal::kill(task.pid, nix::sys::signal::Signal::SIGSTOP).during("kill", task.pid)?;
            }
        }
        tell(self.observer, Moment::PreResume, Some(root))?;
        self.deeds(Stage::Last)?;
        // The tree is whole. Once nobody dies with us any more, our own death lets all of them go as well as we do: the
        // kernel detaches whatever we have not.
        for task in &alive {
            ptrace::set_options(task.tid, 0)?;
        }
        if let Some(Err(err)) = self.watchman.as_ref().map(Watchman::pass) {
            tracing::warn!(%err, "nobody looks on at the last steps");
        }
        self.connect();
        for task in alive.iter().filter(|t| t.tid != root).chain(alive.iter().filter(|t| t.tid == root)) {
            ptrace::detach(task.tid)?;
        }
        Ok(())
    }

    /// Has threads that were asleep make their calls, which are not waited for.
    fn begin_waits(&self, tasks: &[usize]) -> Result<HashMap<usize, (&Call, Batch)>, ExecuteError> {
        let mut waits = HashMap::new();
        for &n in tasks {
            if let Some(call) = self.plan.tasks[n].resume.as_ref().and_then(|resume| resume.wait.as_ref()) {
                let (batch, _) = self.batch(n, std::slice::from_ref(call))?;
                self.crew.start(Member(n), &batch)?;
                waits.insert(n, (call, batch));
            }
        }
        Ok(waits)
    }

    /// Takes hold of all tasks, which work on. From here on their filters do not act on what they do for us.
    pub(super) fn seize(&self, root: Pid, tasks: &[usize]) -> Result<(), ExecuteError> {
        for task in tasks.iter().map(|&n| &self.plan.tasks[n]).filter(|t| t.resume.is_some() && t.tid != root) {
            ptrace::seize(task.tid, self.tracing())?;
        }
        Ok(())
    }

    /// How tasks are traced.
    pub(super) fn tracing(&self) -> i32 {
        let filters = |call: &Call| call.nr == libc::SYS_seccomp;
        let suspend = self.plan.tasks.iter().any(|task| task.stage(Stage::Credentials).iter().any(filters));
        ptrace::EXIT_KILL | ptrace::TRACE_SYSGOOD | if suspend { ptrace::SUSPEND_SECCOMP } else { 0 }
    }

    /// The crew's area goes last: by a call made at a `syscall` instruction of the program's own, in one thread of each
    /// process, all of them at the same time.
    fn unmap_crew(&self, tasks: &[&Task]) -> Result<(), ExecuteError> {
        let mut processes = BTreeSet::new();
        let one_of_each: Vec<&Task> = tasks.iter().copied().filter(|task| processes.insert(task.pid)).collect();
        let (start, len) = self.crew.range();
        let mut known = HashMap::new();
        for task in &one_of_each {
            let mut regs = ptrace::regs(task.tid)?;
            regs.rip = self.syscall_of(task, &mut known)?;
            regs.orig_rax = u64::MAX;
            regs.rax = libc::SYS_munmap as u64;
            regs.rdi = start;
            regs.rsi = len;
            ptrace::set_regs(task.tid, &regs)?;
            ptrace::cont_to_syscall(task.tid)?;
        }
        for task in &one_of_each {
            wait_for_syscall(task.tid, true)?;
            ptrace::cont_to_syscall(task.tid)?;
        }
        for task in &one_of_each {
            if wait_for_syscall(task.tid, false)? != 0 {
                return Err(AgentError::Strayed { tid: task.tid.as_raw(), stop: "munmap failed".into() }.into());
            }
            // The kernel looks for a call to restart on the way out of an interrupt stop, not of this one.
            ptrace::interrupt(task.tid)?;
            ptrace::cont(task.tid, 0)?;
        }
        one_of_each.iter().try_for_each(|task| Ok(wait_for_interrupt(task.tid)?))
    }

    /// Where a process has a `syscall` instruction. `known`: by the address of its vDSO, which is the same code for all.
    fn syscall_of(&self, task: &Task, known: &mut HashMap<u64, u64>) -> Result<u64, ExecuteError> {
        let process = self.plan.tasks.iter().find(|t| t.tid == task.pid).unwrap_or(task);
        let vdso = process.kernel_areas.iter().find(|area| area.name == "[vdso]");
        if let Some(place) = vdso.and_then(|area| known.get(&area.start)) {
            return Ok(*place);
        }
        // The first thread may have ended.
        let memory = ProcessMemory::open(task.tid)?;
        let area = vdso.map(|area| (area.start, area.start + area.len));
        let place = find_syscall(&memory, task.tid, area)
            .ok_or(AgentError::NoSlack { pid: task.pid.as_raw(), needed: SYSCALL.len() })?;
        if let Some((start, _)) = area.filter(|(start, end)| (*start..*end).contains(&place)) {
            known.insert(start, place);
        }
        Ok(place)
    }
}

/// Waits until a thread stands at the entry of a system call, or at its exit, and gives its result.
fn wait_for_syscall(tid: Pid, at_entry: bool) -> Result<u64, ExecuteError> {
    loop {
        match ptrace::wait(tid)? {
            Stop::Syscall => {
                let regs = ptrace::regs(tid)?;
                if regs::is_entry(&regs) == at_entry {
                    return Ok(regs.rax);
                }
            }
            Stop::Exited => return Err(AgentError::Gone { pid: tid.as_raw() }.into()),
            _ => {}
        }
        ptrace::cont_to_syscall(tid)?;
    }
}

/// A `syscall` instruction in the process's code: the vDSO has one, for clocks that it cannot read; any library has.
fn find_syscall(memory: &ProcessMemory, tid: Pid, vdso: Option<(u64, u64)>) -> Option<u64> {
    const PIECE: u64 = 64 << 10;
    let others = || {
        let vmas = survey::vmas_of(tid).unwrap_or_default();
        vmas.into_iter().filter(|v| v.flags.contains(survey::VmFlags::EXEC) && v.ino != 0).map(|v| (v.start, v.end))
    };
    let search = |(start, end): (u64, u64)| {
        (start..end).step_by(PIECE as usize).find_map(|at| {
            let bytes = memory.read(at, (end - at).min(PIECE) as usize).ok()?;
            bytes.windows(SYSCALL.len()).position(|w| w == SYSCALL).map(|found| at + found as u64)
        })
    };
    vdso.and_then(search).or_else(|| others().find_map(search))
}
