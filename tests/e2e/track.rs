//! Tracking of memory: pre-dumps of a program that writes its memory in every way, and a dump that builds on them.
//!
//! The program is stopped (SIGSTOP) before the last dump, and every byte of it taken down; what a restore brings back is
//! compared with that. `E2E_CYCLES` says how many times (once if it does not).

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use e2e::{Bytes, Engine, Look, Options, Program, Row, Workload, bytes::signal, rows};
use nix::sys::signal::Signal;

use crate::killed::Moments;

pub(crate) fn cycles() -> u32 {
    std::env::var("E2E_CYCLES").map_or(1, |text| text.parse().expect("E2E_CYCLES is a number"))
}

/// The kernel writes into a registered area of restartable sequences whenever it pleases.
pub(crate) fn writes(case: &str) -> Workload {
    Workload::new("writes.c", case).env("GLIBC_TUNABLES", "glibc.pthread.rseq=0")
}

/// Pre-dumps as many times, and gives the last images.
pub(crate) fn pre_dumps(row: &Row, program: &Program, times: u32, moments: &mut Moments) -> PathBuf {
    let mut parent: Option<PathBuf> = None;
    for _ in 0..times {
        let images = row.next_images(program);
        row.dumper.pre_dump(program, &images, parent.as_deref()).expect_success();
        std::thread::sleep(moments.within(Duration::from_millis(150)));
        parent = Some(images);
    }
    parent.expect("at least one pre-dump")
}

pub(crate) fn on(parent: &Path) -> Options {
    let mut options = Options::dump(&["--verify-cache", "--track-mem", "--prev-images-dir"]);
    options.dump.push(parent.into());
    options
}

/// How many pages of a dump are in its parent, by its log.
pub(crate) fn in_parent(images: &Path) -> u64 {
    let log = std::fs::read_to_string(images.join("dump.log")).expect("a log");
    let line = log.lines().find(|line| line.contains(") dump finished")).expect("a finished dump");
    let number = line.split("in_parent=").nth(1).and_then(|rest| rest.split_whitespace().next());
    number.and_then(|number| number.parse().ok()).expect("a number of pages")
}

/// Whether `check` finds something in this kernel.
fn kernel_has(capability: &str) -> bool {
    let engine = Engine::Ours(e2e::Survey::Proc).binary();
    let said = std::process::Command::new(engine).args(["check", "--json"]).output().expect("starting check");
    let found: serde_json::Value = serde_json::from_slice(&said.stdout).expect("JSON");
    let mut rows = found["rows"].as_array().expect("rows").iter();
    rows.any(|row| row["name"] == capability && row["status"] == "present")
}

/// How many microseconds a dump now would hold a program, by its session, which is started if need be.
fn predicted(row: &Row, program: &Program) -> u64 {
    let dir = row.next_images(program);
    std::fs::create_dir_all(&dir).expect("creating a directory");
    let pid = program.pid().to_string();
    row.dumper.call(&["track", "-d", &pid].map(Into::into), &dir, "track").expect_success();
    let list = row.dumper.call(&["track", "--list", "--json"].map(Into::into), &dir, "list").expect_success();
    let list: serde_json::Value = serde_json::from_str(list.printed.trim()).expect("JSON");
    let found = list.as_array().expect("a list").iter().find(|report| report["pid"] == program.pid());
    found.expect("its report")["predicted_freeze_us"].as_u64().expect("a number")
}

/// Makes room for the next cycle.
pub(crate) fn remove_images(program: &Program) {
    for entry in std::fs::read_dir(program.dir()).expect("its directory").flatten() {
        if entry.file_name().to_string_lossy().starts_with("images-") {
            std::fs::remove_dir_all(entry.path()).expect("removing images");
        }
    }
}

/// The last dump of a stopped program, and what it was, compared byte by byte.
pub(crate) fn dump_and_compare(row: &Row, program: &Program, parent: &Path, options: &Options) -> PathBuf {
    let before = Bytes::stop_and_take(program);
    let tree = program.tree();
    let images = row.next_images(program);
    row.dumper.dump(program, &images, options).expect_success();
    program.expect_gone(&tree);
    row.restore(program, &images);
    before.compare(&Bytes::take(program));
    signal(program, Signal::SIGCONT);
    assert!(parent.exists());
    images
}

/// Pre-dump three times, dump, restore, compare every byte.
pub(crate) fn exact(row: &Row, case: &str) {
    let mut program = writes(case).start();
    let mut moments = Moments::new();
    for _ in 0..cycles() {
        let parent = pre_dumps(row, &program, 3, &mut moments);
        let images = dump_and_compare(row, &program, &parent, &on(&parent));
        assert!(in_parent(&images) > 0, "nothing was left to the parent");
        remove_images(&program);
    }
    program.finish();
}

macro_rules! ways {
    ($($name:ident)*) => { rows! { $($name => |row| exact(row, stringify!($name));)* } };
}

ways! {
    stores reading o_direct other_process proc_mem shared dontneed remap fresh protection huge_pages program_break
    file_private memory_file merging forks family pageout vmspliced everything
}

rows! {
    /// A dump that leaves the program running is a parent as well.
    of_a_running_program => |row| {
        let mut program = writes("everything").start();
        let first = row.next_images(&program);
        row.dumper.dump(&program, &first, &Options::dump(&["--track-mem", "-R"])).expect_success();
        std::thread::sleep(Duration::from_millis(100));
        let second = row.next_images(&program);
        let mut options = on(&first);
        options.dump.push("-R".into());
        row.dumper.dump(&program, &second, &options).expect_success();
        assert!(in_parent(&second) > 0, "nothing was left to the parent");
        std::thread::sleep(Duration::from_millis(100));
        let before = Bytes::stop_and_take(&program);
        let third = row.next_images(&program);
        let tree = program.tree();
        row.dumper.dump(&program, &third, &on(&second)).expect_success();
        program.expect_gone(&tree);
        row.restore(&program, &third);
        before.compare(&Bytes::take(&program));
        signal(&program, Signal::SIGCONT);
        program.finish();
    };

    /// Soft-dirty bits in place of userfaultfds, where the kernel keeps them; elsewhere that is said.
    soft_dirty => |row| {
        let mut program = writes("other_process").start();
        let first = row.next_images(&program);
        let outcome = row.dumper.dump(&program, &first, &Options::dump(&["--track-mem=soft-dirty", "-R"]));
        if !kernel_has("soft_dirty") {
            outcome.expect_refusal("this kernel keeps no soft-dirty bits");
            return program.finish();
        }
        outcome.expect_success();
        let parent = row.next_images(&program);
        std::thread::sleep(Duration::from_millis(100));
        row.dumper.pre_dump(&program, &parent, Some(&first)).expect_success();
        std::thread::sleep(Duration::from_millis(100));
        let other = Options::dump(&["--track-mem=uffd"]);
        let images = row.next_images(&program);
        row.dumper.dump(&program, &images, &other).expect_refusal("not by what --track-mem says");
        let images = dump_and_compare(row, &program, &parent, &on(&parent));
        assert!(in_parent(&images) > 0, "nothing was left to the parent");
        program.finish();
    };

    /// Images that were made in between leave no trail: what does not build on the last image is written whole.
    on_another_parent => |row| {
        let mut program = writes("stores").start();
        let old = row.next_images(&program);
        row.dumper.pre_dump(&program, &old, None).expect_success();
        let new = row.next_images(&program);
        row.dumper.pre_dump(&program, &new, None).expect_success();
        let before = Bytes::stop_and_take(&program);
        let images = row.next_images(&program);
        let tree = program.tree();
        row.dumper.dump(&program, &images, &on(&old)).expect_success();
        program.expect_gone(&tree);
        assert_eq!(in_parent(&images), 0, "believed a session that had gone on from another image");
        row.restore(&program, &images);
        before.compare(&Bytes::take(&program));
        signal(&program, Signal::SIGCONT);
        program.finish();
    };

    /// Areas that lie one behind the other, with pages in all of them, are all tracked from the first look on.
    many_areas => |row| {
        let mut program = Workload::new("bench.c", "areas").arg("2000").start();
        let parent = pre_dumps(row, &program, 2, &mut Moments::new());
        let images = row.next_images(&program);
        let tree = program.tree();
        row.dumper.dump(&program, &images, &on(&parent)).expect_success();
        program.expect_gone(&tree);
        assert!(in_parent(&images) > 1900, "only {} of 2000 pages were left to the parent", in_parent(&images));
        row.restore(&program, &images);
        program.next();
        program.finish();
    };

    /// Room is freed in the parents, and the last images are as good as before.
    deduplicated => |row| {
        let mut program = writes("everything").start();
        let mut moments = Moments::new();
        let parent = pre_dumps(row, &program, 3, &mut moments);
        let before = Bytes::stop_and_take(&program);
        let images = row.next_images(&program);
        let mut options = on(&parent);
        options.dump.push("--auto-dedup".into());
        let tree = program.tree();
        row.dumper.dump(&program, &images, &options).expect_success();
        program.expect_gone(&tree);
        row.restore(&program, &images);
        before.compare(&Bytes::take(&program));
        signal(&program, Signal::SIGCONT);
        program.finish();
    };

    /// A pre-dump leaves the program as it was, and so does the end of the session.
    leaves_no_trace => |row| {
        let mut program = Workload::new("threads.c", "many").start();
        let before = Look::settled(&program);
        let images = row.next_images(&program);
        row.dumper.pre_dump(&program, &images, None).expect_success();
        before.compare(&Look::at(&program));
        let words = ["track".into(), "--stop".into(), program.pid().to_string().into()];
        row.dumper.call(&words, &images, "track").expect_success();
        before.compare(&Look::at(&program));
        let words = ["track".into(), "--stop".into(), program.pid().to_string().into()];
        row.dumper.call(&words, &images, "track").expect_refusal("is not tracked");
        program.finish();
    };

    /// Rounds end, and the last one is a parent.
    until_converged => |row| {
        let mut program = writes("stores").start();
        let base = row.next_images(&program);
        std::fs::create_dir_all(&base).expect("creating a directory");
        let words = ["pre-dump", "-t", &program.pid().to_string(), "--until-converged", "--json", "-D"].map(Into::into);
        let outcome = row.dumper.call(&[&words[..], &[base.clone().into()]].concat(), &base, "rounds").expect_success();
        let json = outcome.printed.lines().find(|line| line.starts_with('{')).expect("a line of JSON");
        let json: serde_json::Value = serde_json::from_str(json).expect("JSON");
        let rounds = json["rounds"].as_array().expect("rounds").len();
        assert!(rounds >= 2, "one round cannot tell that it was the last: {json}");
        assert!(json["rounds"][0]["frozen_us"].as_u64() > Some(0), "it was stopped to be tracked: {json}");
        assert!(base.join("stats-dump").exists(), "there are no statistics");
        let last = PathBuf::from(json["last"].as_str().expect("the last"));
        assert_eq!(last, base.join(rounds.to_string()));
        let before = Bytes::stop_and_take(&program);
        let tree = program.tree();
        let images = row.next_images(&program);
        row.dumper.dump(&program, &images, &on(&last)).expect_success();
        program.expect_gone(&tree);
        assert!(in_parent(&images) > 0, "nothing was left to the parent");
        row.restore(&program, &images);
        before.compare(&Bytes::take(&program));
        signal(&program, Signal::SIGCONT);
        program.finish();
    };

    /// Pre-dumps come before a dump that would take too long, and the dump builds on them.
    max_freeze => |row| {
        let mut program = Workload::new("bench.c", "dirtying").arg("512").start();
        let images = row.next_images(&program);
        // All of it takes longer than this, what is written in some milliseconds does not.
        let limit = Options::dump(&["--max-freeze", "60ms"]);
        let tree = program.tree();
        let first = predicted(row, &program);
        row.dumper.dump(&program, &images, &limit).expect_success();
        program.expect_gone(&tree);
        if first > 60_000 {
            assert!(in_parent(&images) > 0, "no pre-dump was made, though {first} us were expected");
        }
        row.restore(&program, &images);
        program.next();
        program.finish();
    };

    /// What cannot be is not tried.
    max_freeze_that_cannot_be => |row| {
        let mut program = writes("stores").start();
        let images = row.next_images(&program);
        row.dumper.dump(&program, &images, &Options::dump(&["--max-freeze", "0ms"])).expect_refusal("another would not help");
        assert!(!images.join("inventory.img").exists(), "a dump was made all the same");
        program.finish();
    };

    when_quiet => |row| {
        let mut program = writes("everything").start();
        let images = row.next_images(&program);
        let tree = program.tree();
        row.dumper.dump(&program, &images, &Options::dump(&["--when-quiet=3"])).expect_success();
        program.expect_gone(&tree);
        row.restore(&program, &images);
        program.finish();
    };

    /// With a session, what is in the way is known before anything stands still, and how it came.
    early_refusal => |row| {
        let mut program = Workload::new("refused.py", "everything").start();
        predicted(row, &program);
        let images = row.next_images(&program);
        let outcome = row.dumper.dump(&program, &images, &Options::default());
        let outcome = outcome.expect_refusal("io_uring");
        assert!(!outcome.log.contains("the tree stands still"), "it was stopped to find out\n{}", outcome.report());
        program.finish();
    };

    /// There is nothing to restore in memory alone.
    a_pre_dump_is_no_dump => |row| {
        let mut program = writes("stores").start();
        let images = row.next_images(&program);
        row.dumper.pre_dump(&program, &images, None).expect_success();
        row.dumper.restore(&images, &Options::default()).expect_refusal("is a pre-dump");
        program.finish();
    };
}

/// Whoever restores a chain may be CRIU.
#[test]
fn chain_to_criu() {
    let row = Row::between(Engine::Ours(e2e::Survey::Ebpf), Engine::Peer);
    let mut program = Workload::new("memory.py", "scattered_pages").start();
    let mut moments = Moments::new();
    let parent = pre_dumps(&row, &program, 2, &mut moments);
    let tree = program.tree();
    let images = row.next_images(&program);
    row.dumper.dump(&program, &images, &on(&parent)).expect_success();
    program.expect_gone(&tree);
    assert!(in_parent(&images) > 0, "nothing was left to the parent");
    row.restore(&program, &images);
    program.finish();
}
