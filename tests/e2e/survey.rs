//! What eBPF finds out about a tree and what `/proc` says of it make the same images.

use std::{collections::BTreeMap, fs, path::Path};

use e2e::{Engine, Options, Program, Survey, Workload, proc, reaper};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// The images that describe processes and what they have. Times and page contents are another matter: the program
/// runs between the two dumps.
const COMPARED: &[&str] = &["fdinfo", "files", "fs", "ids", "mm", "pstree"];

/// Images that are not the same twice even if nothing runs in between: clocks, what the dumps took, in pages the number of
/// the processor (rseq), in cores what remains of a sleep, which eBPF alone tells, and each dump has a name of its own.
const NEVER_THE_SAME: &[&str] = &["timens", "stats", "pages", "core", "inventory"];

/// Every image that is chosen by the first word of its name.
fn images(directory: &Path, chosen: impl Fn(&str) -> bool) -> BTreeMap<String, Vec<u8>> {
    fs::read_dir(directory)
        .expect("listing the images")
        .flatten()
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, fs::read(entry.path()).ok()?)))
        .filter(|(name, _)| {
            let kind = name.strip_suffix(".img").map(|stem| stem.split('-').next().unwrap_or(stem));
            kind.is_some_and(&chosen)
        })
        .collect()
}

/// Dumps a program by each survey, and compares the images.
fn compare(program: &Program, options: &[&str], chosen: impl Fn(&str) -> bool) {
    let options = Options::dump(&[&["-R"], options].concat());
    let [ebpf, proc] = [("ebpf", Survey::Ebpf), ("proc", Survey::Proc)].map(|(name, survey)| {
        let directory = program.file(name);
        Engine::Ours(survey).dump(program, &directory, &options).expect_success();
        images(&directory, &chosen)
    });
    assert!(ebpf.contains_key("files.img") && ebpf.contains_key("pstree.img"), "found {:?}", ebpf.keys());
    assert!(ebpf.keys().eq(proc.keys()), "other images: {:?} and {:?}", ebpf.keys(), proc.keys());
    for (name, bytes) in &ebpf {
        assert!(proc[name] == *bytes, "{name} differs: {} and {} bytes", bytes.len(), proc[name].len());
    }
}

fn both_ways(workload: &Workload) {
    let mut program = workload.start();
    compare(&program, &[], |kind| COMPARED.contains(&kind));
    program.finish();
}

/// A program in the middle of its work: it is stopped where it happens to be, so that both see the same moment, and all
/// images are compared that can be.
fn busy(workload: &Workload, options: &[&str]) {
    let mut program = workload.start();
    // In the middle of what it does by then.
    std::thread::sleep(std::time::Duration::from_millis(50));
    signal(&program, Signal::SIGSTOP);
    let stopped = |&pid: &i32| proc::stat(pid).is_some_and(|(state, _)| "TZ".contains(state));
    while !program.tree().iter().all(stopped) {
        std::thread::sleep(reaper::POLL);
        signal(&program, Signal::SIGSTOP);
    }
    compare(&program, options, |kind| !NEVER_THE_SAME.contains(&kind));
    signal(&program, Signal::SIGCONT);
    program.finish();
}

fn signal(program: &Program, signal: Signal) {
    for pid in program.tree() {
        // One that has just ended needs none.
        let _: nix::Result<()> = kill(Pid::from_raw(pid), signal);
    }
}

#[test]
fn of_a_tree() {
    both_ways(&Workload::new("tree.py", "family"));
}

#[test]
fn of_threads() {
    both_ways(&Workload::new("threads.c", "many"));
}

#[test]
fn of_shared_descriptions() {
    both_ways(&Workload::new("files.py", "shared_across_fork"));
}

#[test]
fn of_many_mappings() {
    both_ways(&Workload::new("memory.py", "many_mappings"));
}

#[test]
fn of_pipes() {
    both_ways(&Workload::new("pipes.py", "pipeline"));
}

#[test]
fn of_sockets() {
    both_ways(&Workload::new("unix.py", "connected"));
}

#[test]
fn of_terminals() {
    both_ways(&Workload::new("terminals.py", "several"));
}

#[test]
fn of_event_descriptors() {
    both_ways(&Workload::new("events.py", "epoll_many"));
}

#[test]
fn of_shared_memory() {
    both_ways(&Workload::new("memory.py", "shared_anonymous_apart"));
}

#[test]
fn of_deleted_files() {
    both_ways(&Workload::new("files.py", "unlinked_surroundings"));
}

#[test]
fn of_a_busy_pool() {
    busy(&Workload::new("pools.py", "processes"), &[]);
}

#[test]
fn of_busy_threads() {
    busy(&Workload::new("pools.py", "threads"), &[]);
}

#[test]
fn of_a_busy_event_loop() {
    busy(&Workload::new("pools.py", "event_loop"), &[]);
}

#[test]
fn of_a_bit_of_everything() {
    busy(&Workload::new("unharmed.c", "everything"), &[]);
}

#[test]
fn of_many_processes() {
    busy(&Workload::new("tree.py", "many"), &[]);
}
