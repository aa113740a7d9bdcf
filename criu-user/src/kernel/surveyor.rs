//! Who makes the survey: eBPF iterators or /proc. Both find the same.

use std::collections::{BTreeMap, HashMap};

use criu_common::survey::Thread;
use nix::unistd::Pid;

use super::SysError;
use super::ebpf::{EbpfError, EbpfResult, EbpfSurvey};
use super::known::{ITERATORS, Known};
use super::probe::Absent;
use super::proc::{self, Shown};
use super::survey::{self, Descriptor, PAGE, Vma};
use super::survey_cache::{CacheUse, CachedSurvey, Caching};
use super::threads::ThreadRecords;

/// Which source the user wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Source {
    /// eBPF where that pays, /proc for small trees and where eBPF is not to be had.
    #[default]
    Auto,
    /// eBPF, or an error.
    Ebpf,
    /// /proc.
    Proc,
}

/// Why a survey failed.
#[derive(Debug, thiserror::Error)]
pub enum SurveyError {
    /// /proc could not be read.
    #[error(transparent)]
    Sys(#[from] SysError),
    /// The programs could not be loaded or run.
    #[error("{0}; --survey proc does without eBPF")]
    Ebpf(#[from] EbpfError),
    /// What was read before the freeze is not so in it, though it seemed to be.
    #[error(
        "the state cache is wrong about an area of process {pid}: it has {kept}, and the kernel has {read}; \
         this is an error of criu-ebpf, please report it; --survey proc does without the cache"
    )]
    Stale {
        /// The process.
        pid: i32,
        /// What was kept.
        kept: String,
        /// What was read in the freeze.
        read: String,
    },
}

/// The chosen source, made ready before the freeze.
#[derive(Debug)]
pub enum Surveyor {
    /// eBPF iterators.
    Ebpf(Box<CachedSurvey>),
    /// /proc.
    Proc,
    /// /proc, and eBPF for what /proc does not tell: how long a thread was still going to sleep.
    Mixed(Sleeps),
}

/// Where the kernel keeps what threads mostly share: the same places, the same descriptors, directories and namespaces (but
/// for the user namespace, which is the process's).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    files: u64,
    fs: u64,
    nsproxy: u64,
}

/// The program that tells of sleeps, for trees that need no other.
#[derive(Debug)]
pub enum Sleeps {
    /// Not needed so far.
    Unasked,
    /// Loaded.
    Ready(Box<EbpfSurvey>),
    /// Not to be had here.
    Absent,
}

/// Memory from which on loading the programs pays: /proc/PID/smaps, which has the flags of areas, walks over all pages (50
/// µs for a MiB).
const WORTH_LOADING_PAGES: u64 = (48 << 20) / PAGE;
/// Threads, areas and descriptors together from which on loading the programs (2 to 3 ms, before the freeze) pays.
const WORTH_LOADING: usize = 400;

impl Surveyor {
    /// Chooses for a tree with this root.
    pub fn choose(source: Source, root: Pid, caching: Caching) -> Result<Self, SurveyError> {
        match source {
            Source::Proc => return Ok(Self::Proc),
            Source::Auto if !EbpfSurvey::is_built_in() => return Ok(Self::Proc),
            Source::Auto => match look(root) {
                Look::Large => {}
                Look::Sleeps => return Ok(Self::Mixed(Sleeps::load())),
                Look::Small => return Ok(Self::Mixed(Sleeps::Unasked)),
            },
            _ => {}
        }
        if source == Source::Auto {
            let cached = |survey: Box<EbpfSurvey>| Self::Ebpf(Box::new(CachedSurvey::new(*survey, caching)));
            return Ok(loaded(EbpfSurvey::load_all).map_or(Self::Proc, cached));
        }
        let mut survey = EbpfSurvey::new()?;
        survey.load_all()?;
        Ok(Self::Ebpf(Box::new(CachedSurvey::new(survey, caching))))
    }

    /// Reads what takes long and may still be so in the freeze, while the tree runs.
    pub fn read_ahead(&mut self, root: Pid) {
        if let Self::Ebpf(survey) = self {
            survey.read_ahead(root);
        }
    }

    /// How often that was of use.
    pub fn cache_use(&self) -> CacheUse {
        if let Self::Ebpf(survey) = self { survey.used() } else { CacheUse::default() }
    }

    /// The identities of the threads of a process that stands still; empty without eBPF.
    pub fn identities(&mut self, pid: Pid) -> Result<HashMap<Pid, Identity>, SurveyError> {
        let Self::Ebpf(survey) = self else { return Ok(HashMap::new()) };
        let threads = survey.tasks(pid)?.map_or(&[][..], |tasks| &tasks.threads);
        let identity = |thread: &Thread| Identity { files: thread.files, fs: thread.fs, nsproxy: thread.nsproxy };
        Ok(threads.iter().map(|thread| (Pid::from_raw(thread.tid as i32), identity(thread))).collect())
    }

    /// What it works by, for a reader.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ebpf(_) => "eBPF",
            Self::Proc => "/proc",
            Self::Mixed(Sleeps::Ready(_)) => "/proc, and eBPF for its sleepers",
            Self::Mixed(_) => "/proc, for the tree is small",
        }
    }

    /// The areas of a process.
    pub fn areas(&mut self, process: Shown) -> Result<Vec<Vma>, SurveyError> {
        if let Self::Ebpf(survey) = self
            && let Some(areas) = survey.areas(process)?
        {
            return Ok(areas);
        }
        let mut areas = survey::vmas_of(process.by)?;
        // It lies outside of the address space and is the same everywhere.
        areas.retain(|vma| vma.special() != Some("[vsyscall]"));
        Ok(areas)
    }

    /// The descriptors of processes, each under the name by which /proc shows it.
    pub fn descriptors(&mut self, processes: &[Shown]) -> Result<BTreeMap<Pid, Vec<Descriptor>>, SurveyError> {
        match self {
            Self::Ebpf(survey) => Ok(survey.descriptors(processes)?),
            Self::Proc | Self::Mixed(_) => {
                let names: Vec<Pid> = processes.iter().map(|process| process.by).collect();
                Ok(survey::descriptors_of(&names)?)
            }
        }
    }

    /// What eBPF tells of the threads of a process. `sleeps`: one of them is in a call that goes on with what remained
    /// of its time, which nothing else tells.
    pub fn threads(&mut self, pid: Pid, sleeps: bool) -> Result<ThreadRecords, SurveyError> {
        let survey = match self {
            Self::Proc => return Ok(ThreadRecords::default()),
            Self::Ebpf(survey) => {
                let threads = survey.tasks(pid)?.map_or_else(Vec::new, |tasks| tasks.threads.clone());
                return Ok(ThreadRecords::new(threads, *survey.programs().offsets()));
            }
            Self::Mixed(_) if !sleeps => return Ok(ThreadRecords::default()),
            Self::Mixed(program) => {
                // It may have fallen asleep since the first look.
                if matches!(program, Sleeps::Unasked) {
                    *program = Sleeps::load();
                }
                match program {
                    Sleeps::Ready(survey) => survey,
                    _ => return Ok(ThreadRecords::default()),
                }
            }
        };
        let offsets = *survey.offsets();
        let threads = survey.tasks_of(pid)?.map_or_else(Vec::new, |tasks| tasks.threads);
        Ok(ThreadRecords::new(threads, offsets))
    }
}

impl Sleeps {
    fn load() -> Self {
        loaded(EbpfSurvey::load_tasks).map_or(Self::Absent, Self::Ready)
    }
}

/// The programs, if they can be loaded. Where they cannot is tried once: the next dump knows.
fn loaded(load: impl FnOnce(&mut EbpfSurvey) -> EbpfResult<()>) -> Option<Box<EbpfSurvey>> {
    let mut known = Known::recall();
    if let Some(why) = known.absent(ITERATORS) {
        tracing::info!(
            why,
            "eBPF is known not to work here: /proc alone is asked, and sleeps start anew after a restore"
        );
        return None;
    }
    match EbpfSurvey::new().and_then(|mut survey| load(&mut survey).map(|()| survey)) {
        Ok(survey) => Some(Box::new(survey)),
        Err(err) => {
            tracing::warn!(%err, "no eBPF: /proc alone is asked, and sleeps start anew after a restore");
            if err.will_last() {
                known.learn(ITERATORS, &Err(Absent::from(err)));
                if let Err(err) = known.keep() {
                    tracing::debug!(%err, "the next dump has to find out again");
                }
            }
            None
        }
    }
}

/// What a tree looks like before the freeze.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    Large,
    Small,
    /// Small, with a thread in a call that has a restart block.
    Sleeps,
}

/// A rough look at the tree, which runs meanwhile.
fn look(root: Pid) -> Look {
    let mut size = 0;
    let mut sleeper = false;
    let mut waiting = vec![root];
    while let Some(pid) = waiting.pop() {
        let threads = proc::threads(pid).unwrap_or_default();
        let areas = std::fs::read(format!("/proc/{pid}/maps")).map_or(0, |b| b.iter().filter(|&&c| c == b'\n').count());
        if proc::resident_pages(pid) >= WORTH_LOADING_PAGES {
            return Look::Large;
        }
        size += areas + threads.len() + proc::descriptors(pid).map_or(0, |d| d.len());
        if size >= WORTH_LOADING {
            return Look::Large;
        }
        sleeper = sleeper || threads.iter().any(|&tid| sleeps(pid, tid));
        waiting.extend(threads.iter().flat_map(|&tid| proc::children(pid, tid).unwrap_or_default()));
    }
    if sleeper { Look::Sleeps } else { Look::Small }
}

/// Whether a thread is in a call that the kernel continues by restart_syscall(2) after an interruption.
fn sleeps(pid: Pid, tid: Pid) -> bool {
    const CALLS: [i64; 5] =
        [libc::SYS_nanosleep, libc::SYS_clock_nanosleep, libc::SYS_poll, libc::SYS_futex, libc::SYS_restart_syscall];
    let Ok(text) = proc::read_text(&format!("/proc/{pid}/task/{tid}/syscall")) else { return false };
    let mut words = text.split_ascii_whitespace();
    let Some(nr) = words.next().and_then(|word| word.parse().ok()) else { return false };
    let arg = |n: usize| words.clone().nth(n).unwrap_or_default();
    match nr {
        // Without a time limit nothing needs to be known.
        libc::SYS_poll => u64::from_str_radix(arg(2).trim_start_matches("0x"), 16).is_ok_and(|limit| limit as i32 >= 0),
        libc::SYS_futex => arg(3) != "0x0",
        nr => CALLS.contains(&nr),
    }
}
