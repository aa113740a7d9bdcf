//! Who makes the survey: eBPF iterators or /proc. Both find the same.

use std::collections::BTreeMap;

use nix::unistd::Pid;

use super::SysError;
use super::ebpf::{EbpfError, EbpfSurvey};
use super::proc::{self, Shown};
use super::survey::{self, Descriptor, Vma};
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
}

/// The chosen source, made ready before the freeze.
#[derive(Debug)]
pub enum Surveyor {
    /// eBPF iterators.
    Ebpf(Box<EbpfSurvey>),
    /// /proc.
    Proc,
    /// /proc, and eBPF for what /proc does not tell: how long a thread was still going to sleep.
    Mixed(Option<Box<EbpfSurvey>>),
}

/// Threads, areas and descriptors together from which on loading the programs (2 to 3 ms, before the freeze) pays.
const WORTH_LOADING: usize = 400;

impl Surveyor {
    /// Chooses for a tree with this root.
    pub fn choose(source: Source, root: Pid) -> Result<Self, SurveyError> {
        match source {
            Source::Proc => return Ok(Self::Proc),
            Source::Auto if !EbpfSurvey::is_built_in() => return Ok(Self::Proc),
            Source::Auto => match look(root) {
                Look::Large => {}
                Look::Sleeps => return Ok(Self::Mixed(tasks_only())),
                Look::Small => return Ok(Self::Mixed(None)),
            },
            _ => {}
        }
        let ready = EbpfSurvey::new().and_then(|mut survey| survey.load_all().map(|()| survey));
        match (ready, source) {
            (Ok(survey), _) => Ok(Self::Ebpf(Box::new(survey))),
            (Err(err), Source::Auto) => {
                tracing::warn!(%err, "no survey by eBPF, /proc it is");
                Ok(Self::Proc)
            }
            (Err(err), _) => Err(err.into()),
        }
    }

    /// What it works by, for a reader.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ebpf(_) => "eBPF",
            Self::Proc => "/proc",
            Self::Mixed(None) => "/proc, for the tree is small",
            Self::Mixed(Some(_)) => "/proc, and eBPF for its sleepers",
        }
    }

    /// The areas of a process.
    pub fn areas(&mut self, process: Shown) -> Result<Vec<Vma>, SurveyError> {
        if let Self::Ebpf(survey) = self
            && let Some(areas) = survey.areas(process.pid)?
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
            Self::Ebpf(survey) => survey,
            Self::Mixed(survey) => {
                // It may have fallen asleep since the first look.
                if survey.is_none() && sleeps {
                    *survey = tasks_only();
                }
                match survey {
                    Some(survey) if sleeps => survey,
                    _ => return Ok(ThreadRecords::default()),
                }
            }
        };
        let offsets = *survey.offsets();
        let threads = survey.tasks_of(pid)?.map_or_else(Vec::new, |tasks| tasks.threads);
        Ok(ThreadRecords::new(threads, offsets))
    }
}

fn tasks_only() -> Option<Box<EbpfSurvey>> {
    let ready = EbpfSurvey::new().and_then(|mut survey| survey.load_tasks().map(|()| survey));
    ready.map(Box::new).inspect_err(|err| tracing::warn!(%err, "sleeps will start anew after a restore")).ok()
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
