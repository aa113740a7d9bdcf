//! Live dumps in rounds: the memory is copied while the program runs, and what it writes meanwhile in the freeze.
//!
//! `E2E_CYCLES` says how many times where a program writes all the while (once if it does not).

use std::{ffi::OsString, fs, path::PathBuf};

use e2e::{Claim, Engine, Look, Options, Program, Restored, Row, Workload, reaper, rows};
use serde_json::Value;

use crate::killed::{Moments, Span, kills, wait_unharmed};
use crate::live::reap_copies;
use crate::sessions::track;
use crate::track::{cycles, in_parent, on, remove_images, writes};

fn options(words: &[&str]) -> Options {
    let words = ["-R", "--json", "--verify-cache"].iter().chain(words).map(OsString::from).collect();
    Options { dump: words, ..Options::default() }
}

/// Dumps a program live, into a directory of its own, and gives back that and what the engine had to say.
fn dump(row: &Row, program: &Program, words: &[&str]) -> (PathBuf, Value) {
    let images = row.next_images(program);
    let outcome = row.dumper.dump(program, &images, &options(words)).expect_success();
    reap_copies(program, &images);
    let said = outcome.printed.lines().find(|line| line.starts_with('{')).expect("a summary");
    (images, serde_json::from_str(said).expect("the summary as JSON"))
}

/// Ends a program, and restores it.
fn replace(row: &Row, program: &Program, images: &std::path::Path) -> Restored {
    let tree = program.tree();
    reaper::kill_trees([program.pid()]);
    program.expect_gone(&tree);
    row.restore(program, images)
}

fn is_tracked(program: &Program) -> bool {
    let list: Value = serde_json::from_slice(&track(&["--list", "--json"]).stdout).expect("JSON");
    list.as_array().expect("a list").iter().any(|report| report["pid"] == program.pid())
}

/// Dumps a program while it writes, and has what was restored look at all of it.
fn while_it_writes(row: &Row, case: &str) {
    let mut program = writes(case).start();
    for _ in 0..cycles() {
        let (images, summary) = dump(row, &program, &["--live=rounds"]);
        // Those that are younger than the round are copied.
        assert!(summary["spared"].as_u64() > Some(0), "only copies were made: {summary}");
        assert!(in_parent(&images) > 0, "nothing was left to the round");
        assert!(!is_tracked(&program), "the session is left");
        replace(row, &program, &images);
        remove_images(&program);
    }
    program.finish();
}

rows! {
    everything => |row| while_it_writes(row, "everything");
    huge_pages => |row| while_it_writes(row, "huge_pages");
    family => |row| while_it_writes(row, "family");
    file_private => |row| while_it_writes(row, "file_private");
    forks => |row| while_it_writes(row, "forks");
    fresh => |row| while_it_writes(row, "fresh");

    /// Much memory is not copied in the freeze, and nothing is left of how it was tracked.
    much_memory => |row| {
        let mut program = Workload::new("live.c", "large").start();
        let before = Look::settled(&program);
        let (images, summary) = dump(row, &program, &["--live"]);
        assert_eq!((&summary["spared"], &summary["copied"]), (&1.into(), &0.into()), "{summary}");
        assert!(summary["stopped_before_us"].as_u64() > Some(0), "it was stopped to be tracked: {summary}");
        assert!(in_parent(&images) >= 384 * 256, "the round has only {} pages", in_parent(&images));
        assert!(!is_tracked(&program), "the session is left");
        before.compare(&Look::at(&program));
        replace(row, &program, &images);
        program.finish();
    };

    /// Little memory is copied in less time than a round takes.
    little_memory => |row| {
        let mut program = Workload::new("live.c", "one_instant").start();
        let (images, summary) = dump(row, &program, &["--live"]);
        assert_eq!((&summary["spared"], &summary["copied"]), (&0.into(), &1.into()), "{summary}");
        assert!(!images.join("pre-dumps").exists(), "a round was made");
        program.finish();
    };

    /// Who writes to all of his memory all the time is copied.
    much_is_written => |row| {
        let mut program = Workload::new("live.c", "large_written").start();
        let (images, summary) = dump(row, &program, &["--live"]);
        assert_eq!((&summary["spared"], &summary["copied"]), (&0.into(), &1.into()), "{summary}");
        assert!(!is_tracked(&program), "the session is left");
        replace(row, &program, &images);
        program.finish();
    };

    /// An image that somebody else builds on stays the last one of the session.
    somebody_builds_on_another_image => |row| {
        let mut program = Workload::new("live.c", "large").start();
        let parent = row.next_images(&program);
        row.dumper.pre_dump(&program, &parent, None).expect_success();
        let (_, summary) = dump(row, &program, &["--live"]);
        assert_eq!((&summary["spared"], &summary["copied"]), (&0.into(), &1.into()), "{summary}");
        let tree = program.tree();
        let images = row.next_images(&program);
        row.dumper.dump(&program, &images, &on(&parent)).expect_success();
        program.expect_gone(&tree);
        assert!(in_parent(&images) > 0, "the live dump has taken the parent's place");
        row.restore(&program, &images);
        program.finish();
    };

    /// A parent of the user's own is the round.
    on_a_parent => |row| {
        let mut program = Workload::new("live.c", "large").start();
        let parent = row.next_images(&program);
        row.dumper.pre_dump(&program, &parent, None).expect_success();
        let (images, summary) = dump(row, &program, &["--live", "--track-mem", "--prev-images-dir", &parent.to_string_lossy()]);
        assert_eq!((&summary["spared"], &summary["copied"]), (&1.into(), &0.into()), "{summary}");
        assert!(!images.join("pre-dumps/1").exists(), "a round was made");
        assert!(is_tracked(&program), "the user's session is gone");
        replace(row, &program, &images);
        program.finish();
    };

    /// What is not tracked is copied, unless rounds were asked for.
    untracked => |row| {
        let mut program = Workload::new("live.c", "own_userfaultfd").start();
        let images = row.next_images(&program);
        let outcome = row.dumper.dump(&program, &images, &options(&["--live=rounds"]));
        outcome.expect_refusal("it uses userfaultfd(2) itself");
        assert!(!images.join("pre-dumps").exists(), "something of the round is left");
        assert!(!is_tracked(&program), "the session is left");
        program.finish();
    };

    /// The engine dies somewhere on the way, and its session with it.
    engine_killed => |row| {
        let mut program = Workload::new("unharmed.c", "everything").start();
        let images = row.next_images(&program);
        let options = options(&["--live=rounds"]);
        let mut span = Span::new(row.dumper.dump(&program, &images, &options).expect_success().took);
        fs::remove_dir_all(&images).expect("removing images");
        let before = Look::settled(&program);
        let mut moments = Moments::new();
        let mut killed = 0;
        for _ in 0..kills() {
            let images = row.next_images(&program);
            fs::create_dir_all(&images).expect("creating a directory");
            let words = row.dumper.dump_words(&program, &images, &options);
            killed += u32::from(span.kill(row.dumper, &words, &mut moments));
            wait_unharmed(&program);
            fs::remove_dir_all(&images).expect("removing images");
        }
        assert!(killed > 0, "the engine was always faster than its end");
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while is_tracked(&program) {
            assert!(std::time::Instant::now() < end, "the session has outlived the engine");
            std::thread::sleep(reaper::POLL);
        }
        before.expect_again(&program);
        let (images, _) = dump(row, &program, &["--live=rounds"]);
        replace(row, &program, &images);
        program.finish();
    };

    /// The disk is full in the round.
    no_space => |row| {
        let mut program = Workload::new("live.c", "large").start();
        let before = Look::settled(&program);
        let images = row.next_images(&program);
        fs::create_dir_all(&images).expect("creating a directory");
        let words = row.dumper.dump_words(&program, &images, &options(&["--live"]));
        let script = "mount -t tmpfs -o size=32m none \"$0\" || exit 3; \"$@\"; ended=$?; cat \"$0\"/dump.log; \
                      test ! -e \"$0\"/inventory.img || ended=4; test ! -e \"$0\"/pre-dumps || ended=5; umount \"$0\"; exit $ended";
        let outcome = row.dumper.call_by(script, &words, &images, "dump");
        assert_eq!(outcome.status.code(), Some(1), "{}", outcome.report());
        outcome.expect_refusal("no space left");
        assert!(!is_tracked(&program), "the session is left");
        before.compare(&Look::at(&program));
        program.finish();
    };

    /// Connections are held for the freeze alone.
    connections => |row| {
        let mut program = Workload::new("live.c", "unnoticed").with(Claim::Ports).start();
        for _ in 0..3 {
            let (_, summary) = dump(row, &program, &["--live=rounds", "--tcp-established", "--file-locks"]);
            assert_eq!(summary["copied"], 0);
        }
        program.finish();
    };
}

/// Whoever restores it may be CRIU.
#[test]
fn to_criu() {
    let row = Row::between(Engine::Ours(e2e::Survey::Ebpf), Engine::Peer);
    let mut program = Workload::new("live.c", "large").start();
    let (images, _) = dump(&row, &program, &["--live"]);
    assert!(in_parent(&images) >= 384 * 256, "the round has only {} pages", in_parent(&images));
    replace(&row, &program, &images);
    program.finish();
}
