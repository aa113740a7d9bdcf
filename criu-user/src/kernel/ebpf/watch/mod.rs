//! The watch: eBPF programs that look at a process tree while it runs, loaded with aya, and what they tell.
//!
//! The tracked set is in the kernel, and kept there: a child is in it before it runs. What happens often is counted in maps
//! and read when somebody asks; what happens seldom comes as an [`Event`]. Nothing of it is pinned, so all of it goes when
//! the [`Watch`] is dropped, or with the process that has it.
//!
//! All of it says *where to look and when*; truth comes from sources that cannot lose records. How the programs work,
//! which generations can be believed and what it costs: docs/tracking.md.

mod calls;
mod cgroups;
mod connections;
mod counts;
mod events;
mod plain;
mod programs;
mod trust;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};

use aya::maps::{Array, HashMap, MapData, PerCpuArray, PerCpuHashMap, RingBuf};
use aya::programs::Iter;
use aya::{Btf, Ebpf};
pub use criu_common::watch::Kind;
use criu_common::watch::{BlockKey, Faults, Followed, Group, Loss, MOST_PROCESSES, Order, Process, Socket};
use nix::unistd::Pid;
use tokio::io::unix::AsyncFd;

pub use connections::Connection;
pub use counts::{BlockFaults, FaultTotals, Generations, Lost, Tracked};
pub use events::{Call, Event, What};
use plain::{Plain, read};
pub use programs::Questions;
use programs::failed;
pub use trust::{Trust, trust};

use super::bpf;
use super::{EbpfError, EbpfResult};

/// Programs that watch a tracked set of processes. Dropping it takes all of them away.
///
/// # Minimum kernel version
/// 5.13, with type information (CONFIG_DEBUG_INFO_BTF); CAP_BPF and CAP_PERFMON.
pub struct Watch {
    object: Ebpf,
    kernel: Btf,
    questions: Questions,
    missing: Vec<&'static str>,
    ring: RingBuf<MapData>,
    /// Another descriptor of the ring, to wait at; made when somebody first waits.
    readiness: Option<AsyncFd<OwnedFd>>,
    processes: HashMap<MapData, u32, Plain<Process>>,
    faults: PerCpuHashMap<MapData, Plain<BlockKey>, Plain<Faults>>,
    groups: HashMap<MapData, Plain<Group>, u32>,
    order: Array<MapData, u32>,
    lost: PerCpuArray<MapData, u64>,
    undecoded: u64,
    /// How often [`Self::ask`] has begun to look at system calls.
    session: u64,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch")
            .field("questions", &self.questions)
            .field("missing", &self.missing)
            .finish_non_exhaustive()
    }
}

impl Watch {
    /// Loads the programs of these questions and attaches them. Nobody is followed yet.
    pub fn start(questions: Questions) -> EbpfResult<Self> {
        let (mut object, kernel) = programs::open()?;
        let mut take = |name: &str| {
            let missing = || EbpfError::BadObject { object: "watch", why: format!("there is no map {name}") };
            object.take_map(name).ok_or_else(missing)
        };
        let ring = take("RECORDS")?.try_into().map_err(failed("use the map", "RECORDS"))?;
        let processes = take("PROCESSES")?.try_into().map_err(failed("use the map", "PROCESSES"))?;
        let faults = take("FAULTS")?.try_into().map_err(failed("use the map", "FAULTS"))?;
        let groups = take("GROUPS")?.try_into().map_err(failed("use the map", "GROUPS"))?;
        let order = take("ORDER")?.try_into().map_err(failed("use the map", "ORDER"))?;
        let lost = take("LOST")?.try_into().map_err(failed("use the map", "LOST"))?;
        let mut watch = Self {
            object,
            kernel,
            questions: Questions::empty(),
            missing: Vec::new(),
            ring,
            readiness: None,
            processes,
            faults,
            groups,
            order,
            lost,
            undecoded: 0,
            session: 0,
        };
        watch.ask(questions)?;
        Ok(watch)
    }

    /// Asks these questions, and no others any more. The set stays as it is; forks that happen while
    /// [`Questions::LIFECYCLE`] is not asked are not in it.
    ///
    /// [`Questions::SYSCALLS`] costs every call of every process on the machine some 80 ns, so it is asked only as long as
    /// somebody uses its answers.
    pub fn ask(&mut self, questions: Questions) -> EbpfResult<()> {
        let stop = self.questions - questions;
        let begin = questions - self.questions;
        programs::detach(&mut self.object, stop)?;
        self.questions -= stop;
        // Half of the programs of a question are no answer: it is asked again as a whole.
        self.missing.extend(programs::attach(&mut self.object, &self.kernel, begin).inspect_err(|_| {
            let _ = programs::detach(&mut self.object, begin);
        })?);
        if begin.contains(Questions::SYSCALLS) || begin.contains(Questions::LIFECYCLE) {
            self.session += 1;
        }
        self.questions |= begin;
        Ok(())
    }

    /// What is asked.
    pub fn questions(&self) -> Questions {
        self.questions
    }

    /// Tracepoints that this kernel does not have, so that part of an answer is missing.
    pub fn missing(&self) -> &[&'static str] {
        &self.missing
    }

    /// Follows a process, its threads, and every child that it has from now on.
    ///
    /// Children that it already has are the caller's to follow, *after* this: a child is either there to be listed then,
    /// or forked by somebody who was already followed. [`Self::follow_tree`] does it.
    pub fn follow(&mut self, pid: Pid) -> EbpfResult<()> {
        self.follow_as(pid, Order::Follow)
    }

    fn follow_as(&mut self, pid: Pid, order: Order) -> EbpfResult<()> {
        let answer = self.run(pid, order)?.ok_or(EbpfError::NoProcess { pid: pid.as_raw() })?;
        if answer.is_in != 0 {
            return Ok(());
        }
        // It ended, or there was no room.
        if self.run(pid, Order::Tell)?.is_none() {
            return Err(EbpfError::NoProcess { pid: pid.as_raw() });
        }
        let is_full = self.processes.keys().count() >= MOST_PROCESSES as usize;
        if is_full {
            return Err(EbpfError::TooMany { pid: pid.as_raw(), most: MOST_PROCESSES });
        }
        // A zombie: there is nothing to follow.
        Err(EbpfError::NoProcess { pid: pid.as_raw() })
    }

    /// Follows a process and all its descendants, whatever they fork meanwhile. Gives those that were there.
    pub fn follow_tree(&mut self, root: Pid) -> EbpfResult<Vec<Pid>> {
        self.follow(root)?;
        let mut followed = vec![root];
        let mut next = 0;
        while let Some(parent) = followed.get(next).copied() {
            next += 1;
            for child in children(parent) {
                match self.follow(child) {
                    Ok(()) => followed.push(child),
                    // It has ended meanwhile; its own children have another parent by now.
                    Err(EbpfError::NoProcess { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(followed)
    }

    /// Follows a process no more. Its children stay in the set.
    pub fn forget(&mut self, pid: Pid) -> EbpfResult<()> {
        if self.run(pid, Order::Forget)?.is_none()
            && let Some((key, _)) = self.find(pid)?
        {
            // The kernel's sieve goes on letting its number through, which costs a look into the map.
            let _ = self.processes.remove(&key);
        }
        Ok(())
    }

    /// Has the iterator look at one process; `None` if there is no such process.
    fn run(&mut self, pid: Pid, order: Order) -> EbpfResult<Option<Followed>> {
        self.order.set(0, order as u32, 0).map_err(failed("write the map", "ORDER"))?;
        Ok(self.iterate(programs::FOLLOW, pid)?.and_then(|bytes| read(&bytes)))
    }

    /// What an iterator writes about one process; `None` if there is no such process.
    fn iterate(&mut self, program: &'static str, pid: Pid) -> EbpfResult<Option<Vec<u8>>> {
        let iterator: &mut Iter = programs::program(&mut self.object, program)?;
        let fd = iterator.fd().map_err(failed("use", program))?;
        let output = match bpf::iterate(fd.as_fd(), pid.as_raw() as u32) {
            Err((_, e)) if [Some(libc::ESRCH), Some(libc::ENOENT)].contains(&e.raw_os_error()) => return Ok(None),
            other => {
                other.map_err(|(command, source)| EbpfError::Call { command, on: format!("process {pid}"), source })?
            }
        };
        let mut bytes = Vec::new();
        let failed = |source| EbpfError::Read { program, pid: pid.as_raw(), source };
        File::from(output).read_to_end(&mut bytes).map_err(failed)?;
        Ok(Some(bytes))
    }

    /// The tracked set, from the kernel.
    pub fn tracked(&self) -> EbpfResult<Vec<Tracked>> {
        let mut all = Vec::new();
        for entry in self.processes.iter() {
            let (_, process) = entry.map_err(failed("read the map", "PROCESSES"))?;
            all.push(Tracked::new(&process.0));
        }
        all.sort_by_key(|process| process.pid);
        Ok(all)
    }

    /// Key and entry of a process.
    fn find(&self, pid: Pid) -> EbpfResult<Option<(u32, Process)>> {
        // Where the engine sees all processes, that is the key itself.
        if let Ok(process) = self.processes.get(&(pid.as_raw() as u32), 0)
            && process.0.pid == pid.as_raw() as u32
        {
            return Ok(Some((pid.as_raw() as u32, process.0)));
        }
        for entry in self.processes.iter() {
            let (key, process) = entry.map_err(failed("read the map", "PROCESSES"))?;
            if process.0.pid == pid.as_raw() as u32 {
                return Ok(Some((key, process.0)));
            }
        }
        Ok(None)
    }

    /// How often each kind of state of a process was touched; `None` if it is not followed, or nobody looks at system calls.
    pub fn generations(&mut self, pid: Pid) -> EbpfResult<Option<Generations>> {
        let needed = Questions::SYSCALLS | Questions::LIFECYCLE;
        if !self.questions.contains(needed) {
            return Ok(None);
        }
        // A call whose return was passed over may have touched anything.
        let missed: u64 = self.misses(needed)?;
        Ok(self.find(pid)?.map(|(_, process)| Generations::new(&process, self.session + missed)))
    }

    /// How often programs of these questions were passed over.
    fn misses(&mut self, questions: Questions) -> EbpfResult<u64> {
        let all = programs::misses(&mut self.object)?;
        Ok(all.iter().filter(|(question, _)| questions.contains(*question)).map(|(_, misses)| misses).sum())
    }

    /// Where a process has written since it is watched and has its present program, by blocks, in order of addresses.
    pub fn faults(&mut self, pid: Pid) -> EbpfResult<Vec<BlockFaults>> {
        let Some((key, process)) = self.find(pid)? else { return Ok(Vec::new()) };
        let mut found = Vec::new();
        let mut stale = Vec::new();
        for entry in self.faults.iter() {
            let (at, by_processor) = entry.map_err(failed("read the map", "FAULTS"))?;
            if at.0.key == key && at.0.image == process.images {
                found.push(BlockFaults::new(at.0.block, by_processor.iter().map(|faults| faults.0)));
            } else if self.processes.get(&at.0.key, 0).map_or(true, |owner| owner.0.images != at.0.image) {
                stale.push(at);
            }
        }
        for block in stale {
            // Of a process or a program that is gone; somebody else may have been quicker.
            let _ = self.faults.remove(&block);
        }
        found.sort_by_key(|block| block.address);
        Ok(found)
    }

    /// Write faults of each process since it is watched.
    pub fn fault_totals(&self) -> EbpfResult<Vec<(Pid, FaultTotals)>> {
        Ok(self.tracked()?.into_iter().map(|process| (process.pid, process.faults)).collect())
    }

    /// The TCP sockets that tracked processes have open at this moment, each once. From now on changes of their states
    /// come as events also of those that were there before; [`Questions::SOCKETS`] must be asked.
    pub fn connections(&mut self) -> EbpfResult<Vec<Connection>> {
        let mut by_inode = BTreeMap::new();
        for process in self.tracked()? {
            let Some(bytes) = self.iterate(programs::CONNECTIONS, process.pid)? else { continue };
            for record in bytes.chunks_exact(size_of::<Socket>()) {
                if let Some(socket) = read::<Socket>(record) {
                    by_inode.entry(socket.inode).or_insert_with(|| Connection::new(&socket));
                }
            }
        }
        Ok(by_inode.into_values().collect())
    }

    /// Sequence number of the writers of a process's memory map: as long as it stays the same, no area was made, changed or
    /// removed, by whomever. Odd while somebody writes. `None` where the kernel keeps none (CONFIG_PER_VMA_LOCK, since
    /// Linux 6.13) or the process is gone. Needs no question.
    pub fn map_sequence(&mut self, pid: Pid) -> EbpfResult<Option<u32>> {
        Ok(self.run(pid, Order::Tell)?.map(|answer| answer.map_sequence).filter(|sequence| *sequence != 0))
    }

    /// What could not be noted.
    pub fn lost(&mut self) -> EbpfResult<Lost> {
        let missed = self.misses(Questions::all())?;
        let count = |what: Loss| -> EbpfResult<u64> {
            let by_processor = self.lost.get(&(what as u32), 0).map_err(failed("read the map", "LOST"))?;
            Ok(by_processor.iter().sum())
        };
        Ok(Lost {
            processes: count(Loss::Process)?,
            lifecycle: count(Loss::Lifecycle)?,
            blocks: count(Loss::Block)?,
            calls: count(Loss::Call)?,
            sockets: count(Loss::Socket)?,
            faults: count(Loss::Fault)?,
            connections: count(Loss::Connection)?,
            undecoded: self.undecoded,
            missed,
        })
    }

    /// The next event, if one is there.
    pub fn try_next(&mut self) -> Option<Event> {
        loop {
            let item = self.ring.next()?;
            match events::decode(&item) {
                Some(event) => return Some(event),
                None => self.undecoded += 1,
            }
        }
    }

    /// Becomes readable when events come, for whoever cannot hold the watch itself while he waits: it is to be cleared
    /// *after* all was read with [`Self::try_next`].
    ///
    /// # Panics
    /// Outside of a tokio runtime with I/O enabled.
    pub fn readiness(&self) -> EbpfResult<AsyncFd<OwnedFd>> {
        let wait = |source| EbpfError::Wait { source };
        let fd = self.ring.as_fd().try_clone_to_owned().map_err(wait)?;
        // SAFETY: an owned descriptor gives the same number for as long as it lives, and closes it when dropped.
        let readiness = unsafe { AsyncFd::register(fd) };
        readiness.map_err(|error| wait(error.into()))
    }

    /// The next event. Nothing is lost if the caller stops waiting.
    ///
    /// # Panics
    /// Outside of a tokio runtime with I/O enabled.
    pub async fn next(&mut self) -> EbpfResult<Event> {
        loop {
            if let Some(event) = self.try_next() {
                return Ok(event);
            }
            let wait = |source| EbpfError::Wait { source };
            if self.readiness.is_none() {
                self.readiness = Some(self.readiness()?);
                continue;
            }
            let Some(readiness) = &self.readiness else { continue };
            let mut ready = readiness.readable().await.map_err(wait)?;
            // All was read before this: what has come since makes it ready again.
            ready.clear_ready();
        }
    }
}

/// The children that a process has at this moment, of all its threads. None if it is gone.
fn children(pid: Pid) -> Vec<Pid> {
    let mut found = Vec::new();
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return found };
    for thread in threads.flatten() {
        let text = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        found.extend(text.split_whitespace().filter_map(|word| word.parse().ok()).map(Pid::from_raw));
    }
    found
}
