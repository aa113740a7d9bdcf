//! Live dumps from copies: the memory of one instant, written while the program runs on and notices nothing.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use e2e::{Claim, Look, Options, Program, Restored, Row, Workload, proc, reaper, rows};
use serde_json::Value;

use crate::killed::{Moments, Span, kills, wait_unharmed};

/// What is said to the engine.
fn options() -> Options {
    Options { dump: words(&["-R", "--live=copies", "--json", "--file-locks"]), ..Options::both(&["--file-locks"]) }
}

fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(OsString::from).collect()
}

fn live(case: &str) -> Workload {
    Workload::new("live.c", case)
}

/// Dumps a program live, into a directory of its own, and gives back that and what the engine had to say.
fn dump(row: &Row, program: &Program) -> (PathBuf, Value) {
    let images = row.next_images(program);
    let outcome = row.dumper.dump(program, &images, &row.options).expect_success();
    reap_copies(program, &images);
    let said = outcome.printed.lines().find(|line| line.starts_with('{')).expect("a summary");
    (images, serde_json::from_str(said).expect("the summary as JSON"))
}

/// Dumps a program live, ends it, and restores it from that.
fn cycle(row: &Row, program: &Program) -> Restored {
    let tree = program.tree();
    let (images, summary) = dump(row, program);
    assert_eq!(summary["not_copied"], Value::Array(Vec::new()), "not live");
    assert!(summary["copied"].as_u64() > Some(0), "nothing was copied: {summary}");
    reaper::kill_trees([program.pid()]);
    program.expect_gone(&tree);
    row.restore(program, &images)
}

/// What a workload is after a live dump and a restore.
fn check(row: &Row, workload: &Workload) {
    let row = row.with(options());
    let mut program = workload.start();
    cycle(&row, &program);
    program.finish();
}

/// Orphans of the program that are no part of it: its copies become children of this process.
fn copies(program: &Program) -> BTreeSet<i32> {
    let me = i32::try_from(std::process::id()).expect("a pid");
    let marker = program.file("").to_string_lossy().trim_end_matches('/').to_owned();
    let tree = program.tree();
    let of_it = |pid: &i32| !tree.contains(pid) && proc::has_environment(*pid, "E2E_DIR", &marker);
    proc::children(me).into_iter().filter(of_it).collect()
}

/// Waits until no copy of a program is left. Dead ones are collected, as far as they were seen alive or the engine tells of
/// them: that is the trade of whoever adopts orphans.
pub(crate) fn reap_copies(program: &Program, images: &Path) {
    let end = Instant::now() + Duration::from_secs(10);
    let log = fs::read_to_string(images.join("dump.log")).unwrap_or_default();
    let told = log.lines().filter_map(|line| line.split_once("it is copied copy=")?.1.trim().parse().ok());
    let mut seen: BTreeSet<i32> = told.collect();
    loop {
        let left = copies(program);
        seen.extend(&left);
        seen.retain(|&pid| reaper::try_reap(pid).is_none());
        if left.is_empty() {
            return;
        }
        assert!(Instant::now() < end, "copies are left: {left:?}");
        sleep(reaper::POLL);
    }
}

/// A control group (version 1) with one setting, and everything of a program in it; removed when dropped.
pub(crate) struct Group(PathBuf);

impl Group {
    pub(crate) fn new(controller: &str, program: &Program, file: &str, value: impl FnOnce(&Path) -> String) -> Self {
        let dir = PathBuf::from(format!("/sys/fs/cgroup/{controller}/e2e-live-{}", program.pid()));
        fs::create_dir(&dir).unwrap_or_else(|error| panic!("creating {}: {error}", dir.display()));
        let group = Self(dir);
        fs::write(group.0.join("cgroup.procs"), program.pid().to_string()).expect("moving the program");
        fs::write(group.0.join(file), value(&group.0)).unwrap_or_else(|error| panic!("{file}: {error}"));
        group
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let parent = self.0.parent().expect("a hierarchy");
        for pid in fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default().lines() {
            let _: std::io::Result<()> = fs::write(parent.join("cgroup.procs"), pid);
        }
        let _: std::io::Result<()> = fs::remove_dir(&self.0);
    }
}

/// A dump that falls back for `reason`, is good all the same, and does the program no harm.
pub(crate) fn falls_back(row: &Row, mut program: Program, reason: &str, group: Option<Group>) {
    let mut options = options();
    options.dump.push("--manage-cgroups=ignore".into());
    let row = row.with(options);
    let before = Look::at(&program);
    let (images, summary) = dump(&row, &program);
    let said = summary["not_copied"].to_string();
    assert!(said.contains(reason), "nothing of {reason:?} in {summary}");
    assert_eq!(summary["copied"], 0);
    before.compare(&Look::at(&program));
    drop(group);
    let tree = program.tree();
    reaper::kill_trees([program.pid()]);
    program.expect_gone(&tree);
    row.restore(&program, &images);
    program.finish();
}

/// Kills the engine at random moments of live dumps of a program, which must not notice.
fn killed(row: &Row, mut program: Program) {
    let row = row.with(options());
    let images = row.next_images(&program);
    let mut span = Span::new(row.dumper.dump(&program, &images, &row.options).expect_success().took);
    reap_copies(&program, &images);
    fs::remove_dir_all(&images).expect("removing images");
    let before = Look::settled(&program);
    let mut moments = Moments::new();
    let mut killed = 0;
    for _ in 0..kills() {
        let images = row.next_images(&program);
        fs::create_dir_all(&images).expect("creating a directory");
        let words = row.dumper.dump_words(&program, &images, &row.options);
        killed += u32::from(span.kill(row.dumper, &words, &mut moments));
        wait_unharmed(&program);
        reap_copies(&program, &images);
        fs::remove_dir_all(&images).expect("removing images");
    }
    assert!(killed > 0, "the engine was always faster than its end");
    before.expect_again(&program);
    let tree = program.tree();
    let (images, _) = dump(&row, &program);
    reaper::kill_trees([program.pid()]);
    program.expect_gone(&tree);
    row.restore(&program, &images);
    program.finish();
}

/// Cases of other files: their state is carried over as by any other dump.
macro_rules! cases {
    ($($module:ident, $file:literal: $($case:ident)*;)*) => {$(
        mod $module {
            use super::*;
            rows! {$( $case => |row| check(row, &Workload::new($file, stringify!($case))); )*}
        }
    )*};
}

cases! {
    memory, "memory.py":
        private_anonymous scattered_pages zeroed_pages file_private shared_anonymous shared_file memfd memfd_sealed
        memfd_private deleted_backing_private protection_none executable many_mappings advice_dontfork advice_wipeonfork
        wiped_on_fork guard_regions locked copy_on_write copy_on_write_apart huge_pages sysv_shared vdso;
    stack, "stack.c": program_break deep_stack grows_down;
    threads, "threads.c": many;
    pipes, "pipes.py": content full;
}

rows! {
    /// All kinds of memory, written round by round by a thread each, and a thread that maps and unmaps.
    writers => |row| check(row, &live("writers"));

    /// A counter in memory that a copy gets and in memory that it does not.
    one_instant => |row| check(row, &live("one_instant"));

    /// Processes that count in turn.
    tree => |row| check(row, &live("tree"));

    /// Pipes, locks and ports are free at once; no child, no signal; again and again.
    unnoticed => |row| {
        let row = row.with(options());
        let mut program = live("unnoticed").with(Claim::Ports).start();
        for _ in 0..4 {
            let (_, summary) = dump(&row, &program);
            assert_eq!(summary["copied"], 1);
        }
        program.finish();
    };

    /// The same where sockets are looked at more closely.
    unnoticed_with_connections => |row| {
        let mut options = options();
        options.dump.push("--tcp-established".into());
        let row = row.with(options);
        let mut program = live("unnoticed").with(Claim::Ports).start();
        for _ in 0..4 {
            let (_, summary) = dump(&row, &program);
            assert_eq!(summary["copied"], 1);
        }
        program.finish();
    };

    /// One that adopts orphans does not adopt copies of itself or of its descendants.
    subreaper => |row| {
        let row = row.with(options());
        let mut program = live("subreaper").with(Claim::Ports).start();
        for _ in 0..4 {
            let (_, summary) = dump(&row, &program);
            assert_eq!(summary["copied"], 3);
        }
        program.finish();
    };

    /// The engine dies somewhere on the way: the program checks registers, sleeps, descriptors and mappings.
    engine_killed => |row| killed(row, Workload::new("unharmed.c", "everything").start());

    /// The same while large copies are written, of one that looks for what is held open, children and signals.
    engine_killed_while_writing => |row| killed(row, live("unnoticed").with(Claim::Ports).start());

    /// The same with processes that have stepped aside.
    engine_killed_with_a_subreaper => |row| killed(row, live("subreaper").with(Claim::Ports).start());

    /// The freeze is over long before the memory is written.
    short_freeze => |row| {
        let row = row.with(options());
        let mut program = live("large").start();
        let (_, summary) = dump(&row, &program);
        let (frozen, writing) = (summary["frozen_us"].as_u64(), summary["writing_us"].as_u64());
        assert!(frozen < writing, "frozen for all of it: {summary}");
        assert!(summary["pages_written"].as_u64() >= Some(384 * 256), "pages are missing: {summary}");
        program.finish();
    };

    /// Somebody kills the copy: no dump, and nothing else.
    copy_killed => |row| {
        let row = row.with(options());
        let mut program = live("large").start();
        let before = Look::at(&program);
        let images = row.next_images(&program);
        fs::create_dir_all(&images).expect("creating a directory");
        let mut engine = Command::new(row.dumper.binary());
        engine.args(row.dumper.dump_words(&program, &images, &row.options));
        engine.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut engine = engine.spawn().expect("starting the engine");
        let end = Instant::now() + Duration::from_secs(20);
        let copy = loop {
            let written = fs::metadata(images.join("pages-1.img")).is_ok_and(|meta| meta.len() > 0);
            match copies(&program).first() {
                Some(&copy) if written => break copy,
                _ => assert!(Instant::now() < end, "there is no copy"),
            }
            sleep(Duration::from_micros(200));
        };
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(copy), nix::sys::signal::SIGKILL).expect("SIGKILL");
        let status = engine.wait().expect("waiting for the engine");
        let log = fs::read_to_string(images.join("dump.log")).expect("the log");
        assert_eq!(status.code(), Some(1), "{:?}\n{log}", status.signal());
        assert!(log.contains("has ended early"), "it does not say why\n{log}");
        assert!(!images.join("inventory.img").exists(), "failed, but it left an inventory behind");
        reap_copies(&program, &images);
        before.compare(&Look::at(&program));
        program.finish();
    };

    /// The disk is full when the program runs already.
    no_space => |row| {
        let mut program = live("large").start();
        let before = Look::at(&program);
        let images = row.next_images(&program);
        fs::create_dir_all(&images).expect("creating a directory");
        let row = row.with(options());
        let words = row.dumper.dump_words(&program, &images, &row.options);
        let script = "mount -t tmpfs -o size=32m none \"$0\" || exit 3; \"$@\"; ended=$?; cat \"$0\"/dump.log; \
                      test ! -e \"$0\"/inventory.img || ended=4; umount \"$0\"; exit $ended";
        let outcome = row.dumper.call_by(script, &words, &images, "dump");
        assert_eq!(outcome.status.code(), Some(1), "{}", outcome.report());
        outcome.expect_refusal("no space left");
        reap_copies(&program, &images);
        before.compare(&Look::at(&program));
        program.finish();
    };

    /// A dump that ends the program has no use for it.
    without_leave_running => |row| {
        let row = row.with(Options::dump(&["--live"]));
        let mut program = live("one_instant").start();
        let images = row.next_images(&program);
        let outcome = row.dumper.dump(&program, &images, &row.options);
        assert_eq!(outcome.status.code(), Some(2), "{}", outcome.report());
        outcome.expect_refusal("--leave-running");
        program.finish();
    };

    /// No room for another process in its group.
    no_pid_left => |row| {
        let program = live("large").start();
        let group = Group::new("pids", &program, "pids.max", |_| "1".to_owned());
        falls_back(row, program, "no copy can be made", Some(group));
    };

    /// No room for twice its memory in its group.
    no_memory_left => |row| {
        let program = live("large").start();
        // Its memory was charged before it came here: what it would write anew is not.
        let group = Group::new("memory", &program, "memory.limit_in_bytes", |_| (64 << 20).to_string());
        falls_back(row, program, "if it wrote to all of its memory", Some(group));
    };

    /// A group that bears the copy of a program that writes to all of its memory, but not what the copy would write into a
    /// tmpfs as well.
    little_memory_left => |row| {
        let row = row.with(options());
        let mut program = live("large_written").start();
        let group = Group::new("memory", &program, "memory.limit_in_bytes", |_| (600 << 20).to_string());
        let images = crate::memory::on_tmpfs();
        let outcome = row.dumper.dump(&program, images.path(), &row.options).expect_success();
        reap_copies(&program, images.path());
        assert!(outcome.printed.contains("\"copied\":1"), "{}", outcome.printed);
        drop(group);
        program.finish();
    };

    /// A filter that would kill it if the engine died while it is copied.
    seccomp_forbids => |row| {
        let program = Workload::new("live.c", "without_clone").start();
        falls_back(row, program, "clone3", None);
    };
}
