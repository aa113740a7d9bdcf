//! What a command says: the log, the summary, the statistics, the plan, progress.

use std::{collections::BTreeSet, ffi::OsString, fs, path::Path, process::Command};

use e2e::{Options, Outcome, Row, Workload, proc, rows};
use serde_json::Value;

use super::{counter, nothing_left};

/// Dumps with these words, and restores; gives back how the dump went.
fn dump_with(row: &Row, words: &[&str]) -> (e2e::Program, std::path::PathBuf, Outcome) {
    let program = Workload::new("pipes.py", "pipeline").start();
    let row = row.with(Options::dump(words));
    let images = row.next_images(&program);
    let outcome = row.dumper.dump(&program, &images, &row.options).expect_success();
    (program, images, outcome)
}

/// Pages in all pages files.
fn pages_in(images: &Path) -> u64 {
    let entries = fs::read_dir(images).expect("listing the images").flatten();
    let pages = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("pages-"));
    pages.map(|entry| entry.metadata().expect("metadata").len() / 4096).sum()
}

/// What is printed on standard output with `--json`; both streams go to one file, and only it is JSON.
fn json(outcome: &Outcome) -> Value {
    let line = outcome.printed.lines().find(|line| line.starts_with('{')).unwrap_or_default();
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line:?}\n{}", outcome.report()))
}

/// `(00.001234)` and then, where it concerns one, a pid.
fn has_the_shape(line: &str) -> bool {
    let Some((time, rest)) = line.strip_prefix('(').and_then(|rest| rest.split_once(") ")) else { return false };
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    time.split_once('.').is_some_and(|(s, us)| s.len() >= 2 && us.len() == 6 && digits(s) && digits(us))
        && !rest.is_empty()
}

rows! {
    /// Ten lines or so tell the story, many more the details, and no library talks of itself.
    log => |row| {
        for (level, lines) in [("-v0", 0..=0), ("-v1", 0..=0), ("-v2", 0..=0), ("-v3", 6..=16), ("-v4", 30..=400)] {
            let (_program, images, outcome) = dump_with(row, &[level, "-R"]);
            let said: Vec<&str> = outcome.log.lines().collect();
            assert!(lines.contains(&said.len()), "{level}: {} lines\n{}", said.len(), outcome.log);
            assert!(said.iter().all(|line| has_the_shape(line)), "{level}:\n{}", outcome.log);
            assert!(!outcome.log.contains("Error") && !outcome.log.contains("reloc"), "{level}:\n{}", outcome.log);
            if level == "-v3" {
                assert!(said.last().is_some_and(|line| line.contains("frozen=") && line.contains("pages=")));
            }
            drop(images);
        }
    };

    /// Errors are in the log as such, line by line, and on standard error.
    log_of_an_error => |row| {
        let program = Workload::new("pipes.py", "pipeline").start();
        let images = row.next_images(&program);
        let child = *program.tree().last().expect("a child");
        let part = program.part(child);
        let outcome = row.dumper.dump(&part, &images, &Options::dump(&["-v1"]));
        assert_eq!(outcome.status.code(), Some(1), "{}", outcome.report());
        assert!(outcome.log.lines().count() > 1, "{}", outcome.log);
        assert!(outcome.log.lines().all(|line| has_the_shape(line) && line.contains("Error (")), "{}", outcome.log);
        assert!(outcome.printed.starts_with("criu-ebpf: "), "{}", outcome.printed);
    };

    /// The summary for programs, and the statistics file, count what is in the images.
    page_counts => |row| {
        for workload in [("pipes.py", "pipeline"), ("memory.py", "memfd")] {
            let program = Workload::new(workload.0, workload.1).start();
            let tree = program.tree();
            let images = row.next_images(&program);
            let outcome = row.dumper.dump(&program, &images, &Options::dump(&["--json"])).expect_success();
            let (summary, held) = (json(&outcome), pages_in(&images));
            assert!(held > 0);
            assert_eq!(summary["pages_written"], held);
            assert_eq!(summary["bytes_written"], held * 4096);
            assert_eq!(summary["processes"], tree.len());
            assert!(summary["frozen_us"].as_u64().is_some_and(|us| us > 0) && summary["bytes_per_second"].as_u64().is_some());
            let out = Command::new("crit").arg("show").arg(images.join("stats-dump")).output().expect("starting crit");
            let stats: Value = serde_json::from_slice(&out.stdout).expect("crit speaks JSON");
            assert_eq!(stats["entries"][0]["dump"]["pages_written"], held);
        }
    };

    /// Of a restore as well.
    json_of_a_restore => |row| {
        let mut program = counter().start();
        let images = row.dump(&program);
        let row = row.with(Options { restore: vec!["--json".into()], ..Options::default() });
        let restored = row.restore(&program, &images);
        let summary = json(&restored.outcome);
        assert_eq!(summary["pid"], program.pid());
        assert!(summary["bytes_filled"].as_u64().is_some_and(|bytes| bytes > 0), "{summary}");
        program.finish();
    };

    /// `--quiet` prints nothing, `--display-stats` more than usual.
    printed => |row| {
        let (_quiet, _, outcome) = dump_with(row, &["--quiet"]);
        assert_eq!(outcome.printed, "");
        let (_loud, _, outcome) = dump_with(row, &["--display-stats"]);
        assert!(outcome.printed.contains("frozen for") && outcome.printed.contains("pages written:"), "{}", outcome.printed);
    };

    /// A plan as data: every task with its calls, each with its reason. Nothing is created.
    plan_as_json => |row| {
        let mut program = Workload::new("threads.c", "many").start();
        let (pid, threads, tree) = (program.pid(), proc::threads(program.pid()), program.tree());
        let images = row.dump(&program);
        let explain = Options { restore: ["--explain", "--json"].map(OsString::from).into(), ..Options::default() };
        let outcome = row.restorer.restore(&images, &explain).expect_success();
        nothing_left(&tree);
        let plan = json(&outcome);
        let tasks = plan["tasks"].as_array().expect("tasks");
        let tids: BTreeSet<i64> = tasks.iter().filter_map(|task| task["tid"].as_i64()).collect();
        assert_eq!(tids, threads.iter().map(|&tid| i64::from(tid)).collect());
        for task in tasks {
            assert_eq!(task["pid"], pid);
            for call in task["calls"].as_array().expect("calls") {
                let said = |key: &str| call[key].as_str().is_some_and(|text| !text.is_empty());
                assert!(said("stage") && said("call") && said("why") && said("text") && call["args"].is_array(), "{call}");
            }
        }
        assert!(tasks[0]["calls"].as_array().expect("calls").iter().any(|call| call["call"] == "mmap"));
        // The same for people.
        let explain = Options { restore: vec!["--explain".into()], ..Options::default() };
        let outcome = row.restorer.restore(&images, &explain).expect_success();
        assert!(outcome.printed.contains(&format!("task {pid} of process {pid}")), "{}", outcome.printed);
        nothing_left(&tree);
        row.restore(&program, &images);
        program.finish();
    };

    /// On a terminal there is a bar, for writing and for filling.
    progress_on_a_terminal => |row| {
        let mut program = counter().start();
        let tree = program.tree();
        let images = row.next_images(&program);
        fs::create_dir(&images).expect("mkdir");
        // script(1) gives the engine a terminal, and passes its status on.
        let terminal = "words=; for word; do words=\"$words '$word'\"; done; exec script -qefc \"$words\" /dev/null";
        let words = row.dumper.dump_words(&program, &images, &row.options);
        let outcome = row.dumper.call_by(terminal, &words, &images, "dump").expect_success();
        assert!(outcome.printed.contains("writing memory [") && outcome.printed.contains("iB/s"), "{}", outcome.printed);
        assert!(outcome.printed.contains("left\r\ndumped 1 processes"), "{:?}", outcome.printed);
        program.expect_gone(&tree);
        let words = row.restorer.restore_words(&images, &row.options);
        let outcome = row.restorer.call_by(terminal, &words, &images, "restore");
        assert!(outcome.printed.contains("filling memory ["), "{}", outcome.report());
        e2e::engine::adopt(&program, &images, outcome);
        program.finish();
    };
}
