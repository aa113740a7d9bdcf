//! Dumps of a program that has written much since their parent: most of it is copied while it still runs. The program
//! gives each page number after number, so what is from another instant shows itself.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use e2e::{Engine, Program, Row, Workload, rows};
use nix::{sys::signal::Signal, sys::signal::kill, unistd::Pid};

use crate::killed::{Moments, wait_unharmed};
use crate::track::{cycles, in_parent, on, remove_images};

/// Between the dump and its parent.
const PLACE: &str = "pre-dumps/last";

fn steady() -> Program {
    Workload::new("live.c", "steady").start()
}

/// Images that more than enough is written after.
fn parent(row: &Row, program: &Program) -> PathBuf {
    let images = row.next_images(program);
    row.dumper.pre_dump(program, &images, None).expect_success();
    std::thread::sleep(Duration::from_millis(400));
    images
}

/// A dump, of which most must have been copied beforehand.
fn dump(row: &Row, program: &Program, parent: &Path, more: &[&str]) -> PathBuf {
    let images = row.next_images(program);
    let mut options = on(parent);
    options.dump.extend(more.iter().map(Into::into));
    options.dump.push("--json".into());
    let said = row.dumper.dump(program, &images, &options).expect_success().printed;
    let line = said.lines().find(|line| line.starts_with('{')).expect("a summary");
    let summary: serde_json::Value = serde_json::from_str(line).expect("JSON");
    let [ahead, written] = ["pages_ahead", "pages_written"].map(|name| summary[name].as_u64().expect("a number"));
    assert!(ahead >= 2048 && written < ahead, "{written} pages in the freeze, {ahead} before: {summary}");
    assert!(in_parent(&images) >= ahead, "not all of what was copied beforehand is left to it");
    assert!(images.join(PLACE).join("inventory.img").exists());
    images
}

rows! {
    /// Nothing of what is written while it is copied gets lost, and the restored program can do it again.
    before_the_end => |row| {
        let mut program = steady();
        for _ in 0..cycles().max(2) {
            let parent = parent(row, &program);
            let tree = program.tree();
            let images = dump(row, &program, &parent, &[]);
            program.expect_gone(&tree);
            row.restore(&program, &images);
            remove_images(&program);
        }
        program.finish();
    };

    /// A dump that leaves the program running is a parent with all that is below it.
    of_a_running_program => |row| {
        let mut program = steady();
        let first = parent(row, &program);
        let second = dump(row, &program, &first, &["-R"]);
        std::thread::sleep(Duration::from_millis(400));
        let tree = program.tree();
        let third = dump(row, &program, &second, &[]);
        program.expect_gone(&tree);
        row.restore(&program, &third);
        program.finish();
    };

    /// All that is newer is freed in what is older, and the images are moved together.
    deduplicated_and_moved => |row| {
        let mut program = steady();
        let first = parent(row, &program);
        let images = row.next_images(&program);
        let name = Path::new("..").join(first.file_name().expect("a name"));
        let mut options = on(&name);
        options.dump.push("--auto-dedup".into());
        let tree = program.tree();
        let before = disk_use(&first);
        row.dumper.dump(&program, &images, &options).expect_success();
        program.expect_gone(&tree);
        assert!(images.join(PLACE).exists(), "nothing was copied beforehand");
        assert!(disk_use(&first) + (2048 << 12) <= before, "what was copied beforehand is still in the parent");
        let elsewhere = program.file("elsewhere");
        fs::create_dir(&elsewhere).expect("a directory");
        let moved = [&first, &images].map(|dir| elsewhere.join(dir.file_name().expect("a name")));
        fs::rename(&first, &moved[0]).and_then(|()| fs::rename(&images, &moved[1])).expect("moved");
        row.restore(&program, &moved[1]);
        program.finish();
    };

    /// What was copied goes away with a dump that fails, and the next one builds on the same parent.
    for_a_dump_that_fails => |row| {
        let mut program = steady();
        let script = program.file("objects");
        fs::write(&script, "#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" != post-dump ]\n").expect("a script");
        fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("its mode");
        let parent = parent(row, &program);
        for _ in 0..2 {
            let images = row.next_images(&program);
            let mut options = on(&parent);
            options.dump.extend(["--action-script".into(), script.clone().into()]);
            let log = row.dumper.dump(&program, &images, &options).expect_refusal("objects failed").log;
            assert!(log.contains("copied beforehand"), "nothing was copied beforehand\n{log}");
            assert!(!images.join(PLACE).exists(), "what was copied is still there");
            wait_unharmed(&program);
        }
        let tree = program.tree();
        let images = dump(row, &program, &parent, &[]);
        program.expect_gone(&tree);
        row.restore(&program, &images);
        program.finish();
    };

    /// The engine is killed at any moment of it: the program goes on, and so does the session.
    engine_killed => |row| {
        let mut program = steady();
        let mut moments = Moments::new();
        let parent = parent(row, &program);
        for _ in 0..8 {
            let images = row.next_images(&program);
            fs::create_dir_all(&images).expect("creating a directory");
            let mut options = on(&parent);
            options.dump.push("-R".into());
            let mut engine = Command::new(row.dumper.binary());
            engine.args(row.dumper.dump_words(&program, &images, &options));
            let mut engine = engine.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("starting the engine");
            // Before the tree stands still, mostly: the session still has all.
            std::thread::sleep(moments.within(Duration::from_millis(100)));
            kill(Pid::from_raw(engine.id() as i32), Signal::SIGKILL).expect("SIGKILL");
            engine.wait().expect("waiting for the engine");
            wait_unharmed(&program);
        }
        let images = row.next_images(&program);
        let tree = program.tree();
        row.dumper.dump(&program, &images, &on(&parent)).expect_success();
        program.expect_gone(&tree);
        row.restore(&program, &images);
        program.finish();
    };
}

/// Bytes on disk.
fn disk_use(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).expect("a directory").flatten();
    entries.map(|entry| std::os::unix::fs::MetadataExt::blocks(&entry.metadata().expect("its metadata")) * 512).sum()
}

/// Whoever restores it may be CRIU.
#[test]
fn restored_by_criu() {
    let row = Row::between(Engine::Ours(e2e::Survey::Ebpf), Engine::Peer);
    let mut program = steady();
    let parent = parent(&row, &program);
    let tree = program.tree();
    let images = dump(&row, &program, &parent, &[]);
    program.expect_gone(&tree);
    row.restore(&program, &images);
    program.finish();
}
