//! Carries a plan out: opens its files, spawns the crew, has every task make its calls stage by stage, and lets all of
//! them go at once.
//!
//! Until that last step, whatever fails ends the whole crew: they die with the engine, and the images stay as they are.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::unistd::Pid;
use tracing::{debug, info, warn};

use crate::agent::batch::{HEADER, RECORD};
use crate::agent::crew::{LEADER_SLOT, THREAD_SLOT};
use crate::agent::{AgentError, Arg as BatchArg, Batch, CallId, Crew, Member, Outcome, Room, crew};
use crate::kernel::clone;
use crate::kernel::ebpf::Gate;
use crate::kernel::mem::ProcessMemory;
use crate::kernel::ptrace::{self, Stop};
use crate::kernel::survey::{self, PAGE, Vma};
use crate::kernel::{SysError, error::During};
use crate::object::{ObjectError, clocks};
use crate::observer::{Moment, Objection, Observer, tell};
use crate::plan::{Arg, Call, Deed, Expect, KernelArea, Opened, Plan, Role, Stage, Task, TaskRef};
use crate::restore::RestoreOptions;
use crate::waiting;

/// Why a plan could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum ExecuteError {
    /// A call of the engine failed.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// The crew failed.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// An object failed.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// Somebody does not let it go on.
    #[error(transparent)]
    Objection(#[from] Objection),
    /// A file could not be opened.
    #[error("{what}: {source}")]
    Open {
        /// The file.
        what: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The engine could not do its part.
    #[error("{what}: {source}")]
    Deed {
        /// Its part.
        what: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Connections stay held.
    #[error(
        "{source}; the connections of the tree are still held: restore again, or give them up with `criu-ebpf gate clear {gate}`"
    )]
    Locked {
        /// The gate.
        gate: String,
        /// Why the restore failed.
        source: Box<ExecuteError>,
    },
    /// A task's call failed.
    #[error("tid {tid}: {call} = {result} while restoring: {why}")]
    Call {
        /// The task.
        tid: i32,
        /// The call with its arguments.
        call: String,
        /// What it gave.
        result: String,
        /// Why it was made.
        why: String,
    },
    /// The pid is taken.
    #[error("pid {pid} is in use by {comm}; end that process, or restore in a pid namespace of its own")]
    PidTaken {
        /// The pid.
        pid: i32,
        /// Who has it.
        comm: String,
    },
    /// The pid is still taken.
    #[error("pid {pid} is in use by {comm}, which has ended, but its parent {parent} has not taken note of it yet")]
    PidOfZombie {
        /// The pid.
        pid: i32,
        /// Who should wait(2) for it.
        parent: i32,
        /// Who had it.
        comm: String,
    },
    /// No hole in the address space.
    #[error("no {needed} bytes of address space are free in all processes of the dump")]
    NoHole {
        /// Bytes needed.
        needed: u64,
    },
    /// This kernel's vDSO is another.
    #[error("the vDSO of pid {pid} differs from this kernel's ({what}); restore on the kernel of the dump")]
    OtherVdso {
        /// The process.
        pid: i32,
        /// How.
        what: String,
    },
}

/// Carries out a plan and gives the root of the tree.
pub fn execute(plan: &Plan, options: &RestoreOptions, observer: &dyn Observer) -> Result<Pid, ExecuteError> {
    execute_locked(plan, options, observer).map_err(|source| match &plan.connections.gate {
        Some(gate) if Gate::is_pinned(gate) => ExecuteError::Locked { gate: gate.clone(), source: Box::new(source) },
        _ => source,
    })
}

fn execute_locked(plan: &Plan, options: &RestoreOptions, observer: &dyn Observer) -> Result<Pid, ExecuteError> {
    refuse_taken_pids(plan)?;
    let gate = options.network_lock.close(&plan.connections).map_err(ObjectError::from)?;
    let mut opened = Opened::default();
    for opener in &plan.opens {
        debug!("{}", opener.describe());
        let file = opener.open(&opened).map_err(|source| ExecuteError::Open { what: opener.describe(), source })?;
        observer.moved(opener.memory());
        opened.push(crate::kernel::fd::duplicate_above(&file, plan.first_free_fd)?);
    }
    info!(files = opened.len(), "files are open");
    // Until they go on, nothing may interrupt the tasks.
    let mask = |set: &SigSet| sigprocmask(SigmaskHow::SIG_SETMASK, Some(set), None).during("sigprocmask", "restore");
    let before = SigSet::thread_get_mask().during("sigprocmask", "restore")?;
    mask(&SigSet::all())?;
    let outcome = execute_blocked(plan, options, observer, opened, gate);
    mask(&before)?;
    outcome
}

fn execute_blocked(
    plan: &Plan,
    options: &RestoreOptions,
    observer: &dyn Observer,
    opened: Opened,
    gate: Option<Gate>,
) -> Result<Pid, ExecuteError> {
    if let Some(offsets) = &plan.clocks {
        clocks::enter(offsets)?;
    }
    let layout = Layout::choose(plan)?;
    let crew = Crew::new(layout.crew, &layout.members(plan))?;
    let mut kernel_at = vec![Vec::new(); plan.tasks.len()];
    kernel_at[0] = layout.kernel.clone();
    let mut run = Run { plan, options, observer, crew, layout, opened, gate, kernel_at, rseq: None };
    let root = run.spawn()?;
    info!(pid = root.as_raw(), "the root of the tree is there");
    if plan.clocks.is_some()
        && let Err(err) = clocks::leave()
    {
        warn!(%err, "scripts will see the clocks of the tree");
    }
    let outcome = run.adopt(root).and_then(|()| run.all(root));
    if outcome.is_err() {
        run.kill(root);
    } else if let Some(Err(err)) = run.gate.take().map(Gate::remove) {
        tracing::warn!(%err, "the gate holds nothing any more, but is still there");
    }
    outcome.map(|()| root)
}

/// How long an ended process may take to be noted by its parent; init is slow at it.
const LATE: Duration = Duration::from_secs(2);

fn refuse_taken_pids(plan: &Plan) -> Result<(), ExecuteError> {
    let begin = Instant::now();
    for task in &plan.tasks {
        let holder = || crate::kernel::proc::stat(task.tid, None);
        while begin.elapsed() < LATE && holder().is_ok_and(|stat| stat.state == 'Z') {
            std::thread::sleep(Duration::from_millis(2));
        }
        if let Ok(stat) = holder() {
            let (pid, parent) = (task.tid.as_raw(), stat.ppid.as_raw());
            return Err(match stat.state {
                'Z' => ExecuteError::PidOfZombie { pid, parent, comm: stat.comm },
                _ => ExecuteError::PidTaken { pid, comm: stat.comm },
            });
        }
    }
    Ok(())
}

/// Where things go that must be out of the way of everything else.
struct Layout {
    /// Code and slots.
    crew: u64,
    /// Where the kernel's own areas wait while the address space is emptied.
    parking: u64,
    /// The kernel's own areas of the engine, which the first task inherits.
    kernel: Vec<KernelArea>,
}

/// End of the address space of a program.
const TASK_SIZE: u64 = (1 << 47) - PAGE;

fn kernel_area(vma: &Vma) -> Option<KernelArea> {
    let name = vma.special().filter(|n| *n == "[vdso]" || n.starts_with("[vvar"))?;
    Some(KernelArea { name: name.to_owned(), start: vma.start, len: vma.len() })
}

impl Layout {
    fn choose(plan: &Plan) -> Result<Self, ExecuteError> {
        let own = survey::vmas_of(Pid::this())?;
        let kernel: Vec<KernelArea> = own.iter().filter_map(kernel_area).collect();
        let parking: u64 = kernel.iter().map(|area| area.len).sum();
        let sizes: Vec<usize> = plan.tasks.iter().map(slot_size).collect();
        let needed = crew::space(&sizes) + parking + 2 * PAGE;
        let mut used: Vec<(u64, u64)> = plan.used.clone();
        used.extend(own.iter().map(|v| (v.start, v.end)));
        used.sort_unstable();
        let hole = hole(&used, needed).ok_or(ExecuteError::NoHole { needed })?;
        Ok(Self { crew: hole + parking + PAGE, parking: hole, kernel })
    }

    /// Images have the kernel's data areas as one, this kernel may have several: they lie one after the other.
    fn split_data(&self, wanted: &[KernelArea]) -> Vec<KernelArea> {
        let own: Vec<&KernelArea> = self.kernel.iter().filter(|area| area.name.starts_with("[vvar")).collect();
        let len: u64 = own.iter().map(|area| area.len).sum();
        let mut out = Vec::with_capacity(wanted.len() + own.len());
        for area in wanted {
            if area.name == "[vvar]" && area.len == len {
                let mut start = area.start;
                for part in &own {
                    out.push(KernelArea { name: part.name.clone(), start, len: part.len });
                    start += part.len;
                }
            } else {
                out.push(area.clone());
            }
        }
        out
    }

    fn members(&self, plan: &Plan) -> Vec<(Pid, usize)> {
        plan.tasks.iter().map(|t| (t.tid, slot_size(t))).collect()
    }
}

fn slot_size(task: &Task) -> usize {
    if !matches!(task.role, Role::Thread(_)) {
        return LEADER_SLOT;
    }
    // A thread's calls are few and small, but for its filters.
    let calls = task.calls.iter().flat_map(|(_, calls)| calls);
    let largest = calls.map(|call| RECORD + call.args.iter().map(arg_size).sum::<usize>()).max().unwrap_or(0);
    (largest + 2 * HEADER + 256).next_multiple_of(THREAD_SLOT)
}

/// The lowest hole of `needed` bytes between sorted ranges, well above what programs map at fixed addresses.
fn hole(used: &[(u64, u64)], needed: u64) -> Option<u64> {
    const LOWEST: u64 = 0x1000_0000;
    let mut at = LOWEST;
    for &(start, end) in used {
        if start > at && start - at >= needed + PAGE {
            return Some(at);
        }
        at = at.max(end.saturating_add(PAGE));
    }
    (TASK_SIZE.saturating_sub(at) >= needed).then_some(at)
}

struct Run<'a> {
    plan: &'a Plan,
    options: &'a RestoreOptions,
    observer: &'a dyn Observer,
    crew: Crew,
    layout: Layout,
    opened: Opened,
    /// Holds the packets of connections.
    gate: Option<Gate>,
    /// Where the kernel's own areas of each task are just now.
    kernel_at: Vec<Vec<KernelArea>>,
    /// Gives up the first task's inherited registration of restartable sequences: its memory goes away.
    rseq: Option<Call>,
}

impl Run<'_> {
    fn spawn(&mut self) -> Result<Pid, ExecuteError> {
        for (n, task) in self.plan.tasks.iter().enumerate() {
            let parent = match task.role {
                Role::Thread(leader) => self.parent_of(leader),
                _ => self.parent_of(TaskRef(n)),
            };
            self.crew.expect_parent(Member(n), parent);
        }
        let mut flags = clone::CLEAR_SIGHAND;
        if self.options.sibling {
            flags |= libc::CLONE_PARENT as u64;
        }
        Ok(self.crew.spawn(Member(0), flags)?)
    }

    /// Ties the first task's life to ours, and learns what it has inherited.
    fn adopt(&mut self, root: Pid) -> Result<(), ExecuteError> {
        ptrace::seize(root, self.tracing())?;
        ptrace::interrupt(root)?;
        wait_for_interrupt(root)?;
        if let Some(rseq) = ptrace::rseq_config(root).filter(|r| r.address != 0) {
            const UNREGISTER: u64 = 1;
            self.rseq = Some(crate::call!(
                SYS_rseq(rseq.address, rseq.size, UNREGISTER, rseq.signature),
                "give up the inherited restartable sequences"
            ));
        }
        Ok(ptrace::cont(root, 0)?)
    }

    fn parent_of(&self, task: TaskRef) -> Pid {
        match self.plan.tasks[task.0].parent {
            Some(parent) => self.plan.tasks[parent.0].pid,
            None if self.options.sibling => Pid::parent(),
            None => Pid::this(),
        }
    }

    fn all(&mut self, root: Pid) -> Result<(), ExecuteError> {
        self.generations()?;
        info!("memory is filled, and all processes are there");
        let rest = Stage::ALL.into_iter().filter(|s| *s > Stage::Tree);
        let mut born: Vec<usize> =
            (0..self.plan.tasks.len()).filter(|&n| !matches!(self.plan.tasks[n].role, Role::Thread(_))).collect();
        for stage in rest {
            if stage == Stage::Credentials {
                self.seize(root, &born)?;
            }
            if stage == Stage::Last && self.ends(0, stage) {
                // Its threads die with us from here on; a dead tracee that did would take them along at our very end.
                ptrace::interrupt(root)?;
                wait_for_interrupt(root)?;
                ptrace::set_options(root, 0)?;
                ptrace::detach(root)?;
            }
            self.stage(stage, &born)?;
            if stage == Stage::Threads {
                born = (0..self.plan.tasks.len()).collect();
            }
            if stage == Stage::Files {
                born.retain(|&n| self.plan.tasks[n].role != Role::Ends);
            }
            if stage != Stage::Last {
                self.deeds(stage)?;
            }
        }
        self.plan.connections.release.iter().try_for_each(|release| self.deed(release.as_ref()))?;
        info!(tasks = born.len(), "all tasks are complete");
        tell(self.observer, Moment::PostRestore, Some(root))?;
        // Whoever waits for the end of a pipe must not find us at the other one.
        self.opened.keep_only(&self.plan.connections.files);
        self.go(root, &born)
    }

    /// What the engine does after a stage.
    fn deeds(&self, stage: Stage) -> Result<(), ExecuteError> {
        self.plan.deeds.iter().filter(|(s, _)| *s == stage).try_for_each(|(_, deed)| self.deed(deed.as_ref()))
    }

    fn deed(&self, deed: &dyn Deed) -> Result<(), ExecuteError> {
        debug!("{}", deed.describe());
        deed.run(&self.opened).map_err(|source| ExecuteError::Deed { what: deed.describe(), source })
    }

    /// Lets packets of connections pass. Nothing can be taken back any more: what fails is told.
    fn connect(&mut self) {
        if let Some(Err(err)) = self.gate.as_ref().map(Gate::unlock) {
            tracing::error!(%err, "the connections of the tree are still held");
        }
        for deed in &self.plan.connections.resume {
            if let Err(err) = deed.run(&self.opened) {
                warn!(%err, "{} did not work", deed.describe());
            }
        }
        self.opened = Opened::default();
    }

    /// Processes get their memory before they fork: generation by generation.
    fn generations(&mut self) -> Result<(), ExecuteError> {
        let mut generation = vec![0];
        while !generation.is_empty() {
            for &n in &generation {
                self.empty(n)?;
            }
            self.stage(Stage::Memory, &generation)?;
            self.fill(&generation)?;
            self.stage(Stage::Protect, &generation)?;
            self.stage(Stage::Tree, &generation)?;
            let mut next = Vec::new();
            for &n in &generation {
                let created = self.plan.tasks[n].stage(Stage::Tree).iter().filter_map(|call| call.creates);
                for child in created {
                    self.kernel_at[child.0] = self.kernel_at[n].clone();
                    next.push(child.0);
                }
            }
            generation = next;
        }
        Ok(())
    }

    /// Takes everything away that a task was born with, but for the crew's area and the kernel's own areas, which move
    /// to where the plan wants them.
    fn empty(&mut self, n: usize) -> Result<(), ExecuteError> {
        let task = &self.plan.tasks[n];
        let mut calls: Vec<Call> = task.stage(Stage::Empty).to_vec();
        if task.role == Role::Ends {
            // It needs no memory of its own to end.
            return self.run_calls(Stage::Empty, &[(n, &calls)]);
        }
        if n == 0 {
            calls.extend(self.rseq.take());
        }
        let kernel = self.kernel_at[n].clone();
        let mut keep = task.keep.clone();
        // The parking place lies right below the crew's area.
        let (crew, len) = self.crew.range();
        keep.push((self.layout.parking, crew + len));
        let wanted = self.layout.split_data(&task.kernel_areas);
        if kernel == wanted {
            keep.extend(kernel.iter().map(|area| (area.start, area.start + area.len)));
            calls.extend(unmap_all_but(keep));
        } else {
            calls.extend(self.move_kernel_areas(task.pid, &kernel, &wanted, keep)?);
        }
        self.kernel_at[n] = wanted;
        self.run_calls(Stage::Empty, &[(n, &calls)])
    }

    /// The kernel's own areas wait in the parking place while everything else goes.
    fn move_kernel_areas(
        &self,
        pid: Pid,
        kernel: &[KernelArea],
        wanted: &[KernelArea],
        keep: Vec<(u64, u64)>,
    ) -> Result<Vec<Call>, ExecuteError> {
        let mut calls = Vec::new();
        let mut next = self.layout.parking;
        for area in kernel {
            calls.push(move_area(area.start, area.len, next, "out of the way"));
            next += area.len;
        }
        calls.extend(unmap_all_but(keep));
        let mut parked = self.layout.parking;
        for area in kernel {
            calls.push(match wanted.iter().find(|wanted| wanted.name == area.name) {
                Some(wanted) if wanted.len == area.len => move_area(parked, area.len, wanted.start, "where it was"),
                Some(wanted) => {
                    let what = format!("{} has {} bytes, had {}", area.name, area.len, wanted.len);
                    return Err(ExecuteError::OtherVdso { pid: pid.as_raw(), what });
                }
                None => crate::call!(SYS_munmap(parked, area.len), "the program had unmapped it"),
            });
            parked += area.len;
        }
        Ok(calls)
    }

    fn stage(&self, stage: Stage, tasks: &[usize]) -> Result<(), ExecuteError> {
        let work = self.work(stage, tasks);
        debug!(?stage, tasks = work.len(), "stage");
        self.run_calls(stage, &work)
    }

    fn work(&self, stage: Stage, tasks: &[usize]) -> Vec<(usize, &[Call])> {
        tasks.iter().map(|&n| (n, self.plan.tasks[n].stage(stage))).filter(|(_, calls)| !calls.is_empty()).collect()
    }

    /// The tasks fill their pages, and the engine those that it has been given, at the same time.
    fn fill(&self, tasks: &[usize]) -> Result<(), ExecuteError> {
        let assists: Vec<_> = self
            .plan
            .assists
            .iter()
            .filter(|a| tasks.contains(&a.task.0))
            .filter_map(|a| Some((self.plan.tasks[a.task.0].pid, self.opened.get(a.file)?, &a.pieces)))
            .collect();
        let observer = self.observer;
        std::thread::scope(|scope| {
            let engine = scope.spawn(move || {
                let moved = |bytes| observer.moved(bytes);
                assists.iter().try_for_each(|(pid, file, pieces)| crate::kernel::mem::fill(*pid, file, pieces, moved))
            });
            let outcome = self.stage(Stage::Fill, tasks);
            let engine = engine.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            outcome.and(engine.map_err(ExecuteError::from))
        })
    }

    /// Has several tasks make their calls at the same time.
    fn run_calls(&self, stage: Stage, work: &[(usize, &[Call])]) -> Result<(), ExecuteError> {
        let mut left = work.to_vec();
        while !left.is_empty() {
            let mut started = Vec::with_capacity(left.len());
            for (n, calls) in &left {
                let (batch, taken) = self.batch(*n, calls)?;
                self.crew.start(Member(*n), &batch)?;
                started.push((*n, &calls[..taken], batch));
            }
            for (n, calls, batch) in &started {
                match self.crew.finish(Member(*n), batch) {
                    Ok(outcome) => {
                        self.check(*n, calls, &outcome)?;
                        if stage == Stage::Fill {
                            self.observer.moved(calls.iter().map(Call::memory).sum());
                        }
                    }
                    Err(AgentError::Gone { .. }) if self.ends(*n, stage) => {}
                    Err(err) => return Err(err.into()),
                }
            }
            for (rest, (_, calls, _)) in left.iter_mut().zip(&started) {
                rest.1 = &rest.1[calls.len()..];
            }
            left.retain(|(_, calls)| !calls.is_empty());
        }
        Ok(())
    }

    /// Whether a task ends in this stage: a process that had ended, or the first thread of one that goes on.
    fn ends(&self, n: usize, stage: Stage) -> bool {
        let task = &self.plan.tasks[n];
        match task.role {
            Role::Ends => stage == Stage::Files,
            _ => task.resume.is_none() && stage == Stage::Last,
        }
    }

    /// As many calls as fit into the slot, and do not keep those waiting who watch.
    fn batch(&self, n: usize, calls: &[Call]) -> Result<(Batch, usize), ExecuteError> {
        let room = self.crew.room(Member(n)) - HEADER - 256;
        let mut batch = Batch::new();
        let mut buffers = BTreeMap::new();
        let (mut size, mut memory) = (0, 0);
        let mut taken = 0;
        for call in calls {
            size += RECORD + call.args.iter().map(arg_size).sum::<usize>();
            memory += call.memory();
            if taken > 0 && (size > room || memory > BATCH_MEMORY) {
                break;
            }
            self.add(&mut batch, &mut buffers, call);
            taken += 1;
        }
        Ok((batch, taken))
    }

    fn add(&self, batch: &mut Batch, buffers: &mut BTreeMap<u32, Room>, call: &Call) {
        let mut buffer =
            |batch: &mut Batch, b: &crate::plan::Buffer| *buffers.entry(b.name).or_insert_with(|| batch.room(b.len));
        let args: Vec<BatchArg> = call
            .args
            .iter()
            .map(|arg| match arg {
                Arg::Value(v) => BatchArg::Value(*v),
                Arg::File(file) => BatchArg::Value(self.fd(*file) as u64),
                Arg::Bytes(bytes) => batch.bytes(bytes).into(),
                Arg::Struct { bytes, pointers, files } => {
                    let mut bytes = bytes.clone();
                    for (at, file) in files {
                        bytes[*at..*at + 4].copy_from_slice(&self.fd(*file).to_le_bytes());
                    }
                    let place = batch.bytes(&bytes);
                    for (at, target) in pointers {
                        let target = batch.bytes(target);
                        batch.link(place.at(*at), target);
                    }
                    place.into()
                }
                Arg::Earlier(back) => BatchArg::ResultOf(CallId(batch.len() - back)),
                Arg::Fill(b) => buffer(batch, b).into(),
                Arg::ValueAt(b, at) => BatchArg::ValueAt(buffer(batch, b).at(*at)),
            })
            .collect();
        match (call.creates, call.expect) {
            (Some(task), _) => batch.fork(call.nr, &args, self.crew.slot(Member(task.0))),
            (None, Expect::Anything) => batch.try_call(call.nr, &args),
            (None, _) => batch.call(call.nr, &args),
        };
    }

    fn fd(&self, file: crate::plan::FileRef) -> i32 {
        self.opened.get(file).map_or(-1, |f| f.as_raw_fd())
    }

    fn check(&self, n: usize, calls: &[Call], outcome: &Outcome) -> Result<(), ExecuteError> {
        for (i, call) in calls.iter().enumerate() {
            let result = outcome.ret(CallId(i));
            let fine = match (call.expect, result) {
                (Expect::Anything, _) => true,
                (Expect::Success, result) => result.is_ok(),
                (Expect::Exactly(wanted), result) => result == Ok(wanted),
            };
            if !fine {
                let result = match result {
                    Ok(value) => format!("{value:#x}, which is not what was asked for"),
                    Err(errno) => format!("{errno:?} ({})", errno.desc()),
                };
                let tid = self.plan.tasks[n].tid.as_raw();
                return Err(ExecuteError::Call { tid, call: describe(call), result, why: call.why.to_string() });
            }
        }
        Ok(())
    }

    /// Gives every thread its registers, takes the crew's area away, and lets all go.
    fn go(&mut self, root: Pid, tasks: &[usize]) -> Result<(), ExecuteError> {
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
        let mut cleaned = BTreeSet::new();
        for task in &alive {
            if cleaned.insert(task.pid) {
                self.unmap_crew(task)?;
                // The kernel looks for a call to restart on the way out of an interrupt stop, not of this one.
                ptrace::interrupt(task.tid)?;
                ptrace::cont(task.tid, 0)?;
                wait_for_interrupt(task.tid)?;
            }
        }
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
    fn seize(&self, root: Pid, tasks: &[usize]) -> Result<(), ExecuteError> {
        for task in tasks.iter().map(|&n| &self.plan.tasks[n]).filter(|t| t.resume.is_some() && t.tid != root) {
            ptrace::seize(task.tid, self.tracing())?;
        }
        Ok(())
    }

    /// How tasks are traced.
    fn tracing(&self) -> i32 {
        let filters = |call: &Call| call.nr == libc::SYS_seccomp;
        let suspend = self.plan.tasks.iter().any(|task| task.stage(Stage::Credentials).iter().any(filters));
        ptrace::EXIT_KILL | ptrace::TRACE_SYSGOOD | if suspend { ptrace::SUSPEND_SECCOMP } else { 0 }
    }

    /// The crew's area goes last: by a call made at a `syscall` instruction of the program's own.
    fn unmap_crew(&self, task: &Task) -> Result<(), ExecuteError> {
        // The first thread may have ended.
        let memory = ProcessMemory::open(task.tid)?;
        let process = self.plan.tasks.iter().find(|t| t.tid == task.pid).unwrap_or(task);
        let place = find_syscall(&memory, task.tid, process)
            .ok_or(AgentError::NoSlack { pid: task.pid.as_raw(), needed: SYSCALL.len() })?;
        let (start, len) = self.crew.range();
        let mut regs = ptrace::regs(task.tid)?;
        regs.rip = place;
        regs.orig_rax = u64::MAX;
        regs.rax = libc::SYS_munmap as u64;
        regs.rdi = start;
        regs.rsi = len;
        ptrace::set_regs(task.tid, &regs)?;
        loop {
            ptrace::cont_to_syscall(task.tid)?;
            match ptrace::wait(task.tid)? {
                Stop::Syscall => {
                    let now = ptrace::regs(task.tid)?;
                    if now.rax as i64 != -(nix::errno::Errno::ENOSYS as i64) {
                        return match now.rax {
                            0 => Ok(()),
                            _ => {
                                Err(AgentError::Strayed { tid: task.tid.as_raw(), stop: "munmap failed".into() }.into())
                            }
                        };
                    }
                }
                Stop::Exited => return Err(AgentError::Gone { pid: task.tid.as_raw() }.into()),
                _ => {}
            }
        }
    }

    /// Ends everything that was spawned.
    fn kill(&self, root: Pid) {
        for task in &self.plan.tasks {
            // Only those that the plan has created and that are ours: children of the crew or the engine.
            let ours = crate::kernel::proc::read_text(&format!("/proc/{}/maps", task.tid))
                .is_ok_and(|maps| maps.contains("memfd:criu-ebpf"));
            if ours || task.tid == root {
                let _ = nix::sys::signal::kill(task.pid, nix::sys::signal::Signal::SIGKILL);
            }
        }
        // A process is gone only when those of its threads that we trace are collected.
        for task in self.plan.tasks.iter().filter(|task| task.tid != root) {
            ptrace::reap(task.tid);
        }
        ptrace::reap(root);
    }
}

/// Bytes of memory that one batch fills, about.
const BATCH_MEMORY: u64 = 64 << 20;
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// A `syscall` instruction in the process's code: the vDSO has one, for clocks that it cannot read; any library has.
fn find_syscall(memory: &ProcessMemory, tid: Pid, process: &Task) -> Option<u64> {
    const PIECE: u64 = 64 << 10;
    let vdso = process.kernel_areas.iter().filter(|a| a.name == "[vdso]").map(|a| (a.start, a.start + a.len));
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
    vdso.map(search).next().flatten().or_else(|| others().find_map(search))
}

/// Unmaps everything between these ranges.
fn unmap_all_but(mut keep: Vec<(u64, u64)>) -> Vec<Call> {
    keep.sort_unstable();
    keep.push((TASK_SIZE, TASK_SIZE));
    let mut calls = Vec::new();
    let mut at = 0;
    for (start, end) in keep {
        if start > at {
            calls.push(crate::call!(SYS_munmap(at, start - at), "what was inherited and is not wanted"));
        }
        at = at.max(end);
    }
    calls
}

/// Waits until a thread stands at an interrupt that it was asked for.
pub(crate) fn wait_for_interrupt(tid: Pid) -> Result<(), AgentError> {
    loop {
        match ptrace::wait(tid)? {
            Stop::Interrupt | Stop::Group(_) => return Ok(()),
            Stop::Signal(signal) => ptrace::cont(tid, signal)?,
            Stop::Exited => return Err(AgentError::Gone { pid: tid.as_raw() }),
            _ => ptrace::cont(tid, 0)?,
        }
    }
}

fn move_area(from: u64, len: u64, to: u64, why: &'static str) -> Call {
    const FLAGS: i32 = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    crate::call!(SYS_mremap(from, len, len, FLAGS, to), format!("the kernel's own area, {why}")).giving(to)
}

fn arg_size(arg: &Arg) -> usize {
    let padded = |n: usize| n + 16;
    match arg {
        Arg::Bytes(bytes) => padded(bytes.len()),
        Arg::Struct { bytes, pointers, .. } => {
            padded(bytes.len()) + pointers.iter().map(|(_, b)| padded(b.len())).sum::<usize>()
        }
        Arg::Fill(b) | Arg::ValueAt(b, _) => padded(b.len),
        Arg::Value(_) | Arg::File(_) | Arg::Earlier(_) => 0,
    }
}

/// A call as strace(1) would show it.
pub fn describe(call: &Call) -> String {
    let args: Vec<String> = call
        .args
        .iter()
        .map(|arg| match arg {
            Arg::Value(v) if *v > 0xffff_ffff_ffff_0000 => format!("{}", *v as i64),
            Arg::Value(v) if *v < 1 << 16 => format!("{v}"),
            Arg::Value(v) => format!("{v:#x}"),
            Arg::File(file) => format!("file {}", file.0),
            Arg::Bytes(bytes) => format!("<{} bytes>", bytes.len()),
            Arg::Struct { bytes, .. } => format!("<{} bytes>", bytes.len()),
            Arg::Earlier(back) => format!("<result {back} before>"),
            Arg::Fill(b) => format!("<buffer {}>", b.name),
            Arg::ValueAt(b, at) => format!("<buffer {} at {at}>", b.name),
        })
        .collect();
    format!("{}({})", call.name(), args.join(", "))
}
