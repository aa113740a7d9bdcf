//! Every byte of a stopped tree's memory, to be compared later.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{Program, proc, reaper::POLL};

const PAGE: usize = 4096;

/// The memory of all processes of a tree.
#[derive(Debug, Eq, PartialEq)]
pub struct Bytes {
    /// By pid and address of the area.
    areas: BTreeMap<(i32, u64), Vec<u8>>,
}

impl Bytes {
    /// Stops every process of the tree (SIGSTOP), and takes its memory down.
    pub fn stop_and_take(program: &Program) -> Self {
        stop(program);
        Self::take(program)
    }

    /// Takes the memory of a stopped tree down.
    pub fn take(program: &Program) -> Self {
        let mut areas = BTreeMap::new();
        for pid in program.tree() {
            wait_stopped(pid);
            let Ok(memory) = File::open(format!("/proc/{pid}/mem")) else { continue };
            for line in proc::maps(pid) {
                let Some((start, end)) = area(&line) else { continue };
                let mut bytes = vec![0; (end - start) as usize];
                if memory.read_exact_at(&mut bytes, start).is_ok() {
                    areas.insert((pid, start), bytes);
                }
            }
        }
        assert!(!areas.is_empty(), "there is no memory to compare");
        Self { areas }
    }

    /// Fails with the first pages that differ.
    pub fn compare(&self, after: &Self) {
        let keys = |bytes: &Self| bytes.areas.keys().copied().collect::<Vec<_>>();
        assert_eq!(keys(self), keys(after), "other areas than before");
        let mut wrong = Vec::new();
        for ((pid, start), was) in &self.areas {
            let is = &after.areas[&(*pid, *start)];
            assert_eq!(was.len(), is.len(), "pid {pid}: the area at {start:#x} has another length");
            for (n, (was, is)) in was.chunks(PAGE).zip(is.chunks(PAGE)).enumerate() {
                if was != is {
                    wrong.push(format!("pid {pid}: {:#x}", start + (n * PAGE) as u64));
                }
            }
        }
        assert!(wrong.is_empty(), "{} pages are not what they were: {:?}", wrong.len(), &wrong[..wrong.len().min(20)]);
    }
}

/// Sends a signal to every process of a tree.
pub fn signal(program: &Program, signal: Signal) {
    for pid in program.tree() {
        // One that has ended meanwhile needs none.
        let _: nix::Result<()> = kill(Pid::from_raw(pid), signal);
    }
}

/// Stops every process of a tree, those as well that come out of a fork which the signal found under way.
fn stop(program: &Program) {
    let mut stopped = BTreeSet::new();
    loop {
        let tree = program.tree();
        if tree == stopped {
            return;
        }
        signal(program, Signal::SIGSTOP);
        tree.iter().copied().for_each(wait_stopped);
        stopped = tree;
    }
}

fn wait_stopped(pid: i32) {
    let end = Instant::now() + Duration::from_secs(10);
    while proc::stat(pid).is_some_and(|(state, _)| !"TtZ".contains(state)) {
        assert!(Instant::now() < end, "pid {pid} does not stop");
        std::thread::sleep(POLL);
    }
}

/// The ends of an area whose content is the program's own.
fn area(line: &str) -> Option<(u64, u64)> {
    if line.contains("[v") || line.contains("---p") {
        return None;
    }
    let (start, end) = line.split_ascii_whitespace().next()?.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}
