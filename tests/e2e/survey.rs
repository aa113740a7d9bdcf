//! What eBPF finds out about a tree and what `/proc` says of it make the same images.

use std::{collections::BTreeMap, fs, path::Path};

use e2e::{Engine, Options, Survey, Workload};

/// The images that describe processes and what they have. Times and page contents are another matter: the program
/// runs between the two dumps.
const COMPARED: &[&str] = &["fdinfo", "files", "fs", "ids", "mm", "pstree"];

/// Every compared image by its name.
fn images(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    fs::read_dir(directory)
        .expect("listing the images")
        .flatten()
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, fs::read(entry.path()).ok()?)))
        .filter(|(name, _)| {
            let kind = name.strip_suffix(".img").map(|stem| stem.split('-').next().unwrap_or(stem));
            kind.is_some_and(|kind| COMPARED.contains(&kind))
        })
        .collect()
}

fn both_ways(workload: &Workload) {
    let mut program = workload.start();
    let options = Options::dump(&["-R"]);
    let [ebpf, proc] = [("ebpf", Survey::Ebpf), ("proc", Survey::Proc)].map(|(name, survey)| {
        let directory = program.file(name);
        Engine::Ours(survey).dump(&program, &directory, &options).expect_success();
        images(&directory)
    });
    assert!(ebpf.contains_key("files.img") && ebpf.contains_key("pstree.img"), "found {:?}", ebpf.keys());
    assert!(ebpf.keys().eq(proc.keys()), "other images: {:?} and {:?}", ebpf.keys(), proc.keys());
    for (name, bytes) in &ebpf {
        assert!(proc[name] == *bytes, "{name} differs: {} and {} bytes", bytes.len(), proc[name].len());
    }
    program.finish();
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
