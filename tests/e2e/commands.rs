//! What is said on the command line, what comes back, and what must not be left behind.

use std::{collections::BTreeSet, fs, os::unix::fs::PermissionsExt, process::Command, time::Duration};

mod attended;
mod messages;
mod options;
mod reports;
mod root;
mod scripts;
mod verify;

use e2e::{Engine, Look, Options, Workload, proc, reaper, rows, workload_rows};

workload_rows! { "special.c"; seccomp_filters }

fn counter() -> Workload {
    Workload::new("counter.py", "counter")
}

/// What is left of a tree that should be gone is a failure.
fn nothing_left(tree: &BTreeSet<i32>) {
    let left = reaper::wait_gone(tree, Duration::from_secs(5));
    assert!(left.is_empty(), "left over: {left:?}");
}

rows! {
    /// What the program forbids itself the engine does all the same; that it then must not die is said.
    seccomp_forbids => |row| {
        let mut program = Workload::new("special.c", "seccomp_forbids").start();
        let images = row.dump(&program);
        let log = fs::read_to_string(images.join("dump.log")).expect("the log");
        assert!(row.dumper.is_peer() || log.contains("memfd_create"), "no warning in\n{log}");
        row.restore(&program, &images);
        program.finish();
    };

    /// A dump that leaves the program running leaves no trace in it: no descriptor, no mapping, no changed mask.
    no_trace_of_a_dump => |row| {
        let row = row.with(Options::dump(&["-R"]));
        let mut program = Workload::new("unharmed.c", "everything").start();
        let before = Look::at(&program);
        for _ in 0..5 {
            let images = row.next_images(&program);
            row.dumper.dump(&program, &images, &row.options).expect_success();
            before.compare(&Look::at(&program));
        }
        program.finish();
    };

    /// `-s`: stopped, until somebody says otherwise.
    left_stopped => |row| {
        let row = row.with(Options::dump(&["-s"]));
        let mut program = counter().start();
        let images = row.next_images(&program);
        row.dumper.dump(&program, &images, &row.options).expect_success();
        let state = proc::stat(program.pid()).map(|(state, _)| state);
        assert_eq!(state, Some('T'), "it is not stopped");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(program.pid()), nix::sys::signal::SIGCONT).expect("SIGCONT");
        program.finish();
    };

    /// `--sync`: nothing of the images is still waiting for its place on the disk.
    synced => |row| {
        let row = row.with(Options::dump(&["--sync"]));
        let mut program = Workload::new("bench.c", "memory").arg("16").start();
        let tree = program.tree();
        let images = row.next_images(&program);
        row.dumper.dump(&program, &images, &row.options).expect_success();
        let places = Command::new("filefrag").arg("-v").arg(images.join("pages-1.img")).output().expect("filefrag");
        let places = String::from_utf8_lossy(&places.stdout).into_owned();
        assert!(places.contains("pages-1.img") && !places.contains("delalloc"), "{places}");
        program.expect_gone(&tree);
        row.restore(&program, &images);
        program.next();
        program.finish();
    };

    /// A restore while the pids are in use is refused, names the reason, and harms nobody.
    pid_in_use => |row| {
        let mut program = counter().start();
        let images = row.dump(&program);
        row.restore(&program, &images);
        let before = Look::at(&program);
        let outcome = row.restorer.restore(&images, &row.options).expect_refusal(&program.pid().to_string());
        assert!(outcome.log.contains("exists") || outcome.log.contains("in use"), "{}", outcome.report());
        before.compare(&Look::at(&program));
        program.finish();
    };

    /// Nobody there.
    no_such_process => |row| {
        let mut program = counter().start();
        let images = row.next_images(&program);
        program.finish();
        let outcome = row.dumper.dump(&program, &images, &row.options);
        assert_eq!(outcome.status.code(), Some(1), "{}", outcome.report());
        assert!(!images.join("inventory.img").exists(), "an inventory of nothing");
    };

    /// Images are their owner's only.
    images_are_private => |row| {
        let program = counter().start();
        let images = row.dump(&program);
        for entry in fs::read_dir(&images).expect("listing the images").flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "img") {
                let mode = entry.metadata().expect("metadata").permissions().mode();
                assert_eq!(mode & 0o077, 0, "{} has mode {mode:o}", entry.path().display());
            }
        }
    };

    /// Images that were cut short or written over: refused, nothing is left over.
    damaged_images => |row| {
        let mut program = counter().start();
        let tree = program.tree();
        let images = row.dump(&program);
        let pid = program.pid();
        for name in ["inventory.img".to_owned(), "pstree.img".to_owned(), format!("core-{pid}.img"), format!("mm-{pid}.img"), "files.img".to_owned()] {
            let path = images.join(&name);
            let good = fs::read(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
            for bad in [good[..good.len() / 2].to_vec(), good.iter().map(|byte| byte ^ 0xa5).collect(), Vec::new()] {
                fs::write(&path, bad).expect("damaging an image");
                let outcome = row.restorer.restore(&images, &row.options);
                assert!(!outcome.status.success(), "restored from a damaged {name}");
                nothing_left(&tree);
            }
            fs::write(&path, good).expect("repairing an image");
        }
        row.restore(&program, &images);
        program.finish();
    };

    /// Without `-d` the engine stays, is the parent, and ends with the program's status.
    attached => |row| {
        let mut program = Workload::new("counter.py", "counter").start();
        let images = row.dump(&program);
        let words: Vec<_> = row.restorer.restore_words(&images, &row.options).into_iter().filter(|word| word != "-d").collect();
        let restorer = row.restorer;
        std::thread::scope(|scope| {
            let attached = scope.spawn(|| restorer.call(&words, &images, "restore"));
            while !proc::exists(program.pid()) || !images.join("pid").exists() {
                assert!(!attached.is_finished(), "the engine ended although the program runs");
                std::thread::sleep(reaper::POLL);
            }
            std::thread::sleep(Duration::from_millis(200));
            assert!(!attached.is_finished(), "the engine ended although the program runs");
            program.go();
            program.wait_for_log_line("ok");
            let outcome = attached.join().expect("the engine's thread");
            assert_eq!(outcome.status.code(), Some(0), "{}", outcome.report());
        });
        nothing_left(&program.tree());
    };

    /// `restore --leave-stopped`: complete, but not running until somebody says so.
    restored_stopped => |row| {
        let mut program = counter().start();
        let images = row.dump(&program);
        let stopped = Options { restore: vec!["--leave-stopped".into()], ..Options::default() };
        row.with(stopped).restore(&program, &images);
        for _ in 0..500 {
            if proc::stat(program.pid()).is_some_and(|(state, _)| state == 'T') {
                break;
            }
            std::thread::sleep(reaper::POLL);
        }
        assert_eq!(proc::stat(program.pid()).map(|(state, _)| state), Some('T'), "it is not stopped");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(program.pid()), nix::sys::signal::SIGCONT).expect("SIGCONT");
        program.finish();
    };

    /// Scripts are called at the known moments, with what they need in their environment.
    action_script => |row| {
        let mut program = counter().start();
        let script = program.file("script");
        let text = "#!/bin/sh\necho \"$CRTOOLS_SCRIPT_ACTION $CRTOOLS_INIT_PID $CRTOOLS_IMAGE_DIR\" >> \"${0%/*}/actions\"\n";
        fs::write(&script, text).expect("writing the script");
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("chmod");
        let row = row.with(Options::both(&["--action-script", script.to_str().expect("a path")]));
        row.cycle(&program);
        let said = fs::read_to_string(program.file("actions")).expect("the script was called");
        for moment in ["pre-dump", "post-dump", "pre-restore", "post-restore", "pre-resume", "post-resume"] {
            assert!(said.lines().any(|line| line.starts_with(moment)), "no {moment} in\n{said}");
        }
        let after = said.lines().find(|line| line.starts_with("post-restore")).expect("found before");
        assert!(after.contains(&program.pid().to_string()), "no pid in {after:?}");
        program.finish();
    };

    /// A script that fails before the dump keeps it from happening.
    action_script_fails => |row| {
        let mut program = counter().start();
        let script = program.file("script");
        fs::write(&script, "#!/bin/sh\nexit 1\n").expect("writing the script");
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("chmod");
        let images = row.next_images(&program);
        let options = Options::dump(&["--action-script", script.to_str().expect("a path")]);
        row.dumper.dump(&program, &images, &options).expect_refusal("script");
        program.finish();
    };

    /// Every image can be decoded by Debian's `crit`, and its summaries know the program.
    crit_reads_the_images => |row| {
        let program = Workload::new("pipes.py", "pipeline").start();
        let images = row.dump(&program);
        for entry in fs::read_dir(&images).expect("listing the images").flatten() {
            let name = entry.file_name().into_string().expect("a name");
            if !name.ends_with(".img") || name.starts_with("pages-") {
                continue;
            }
            let out = Command::new("crit").arg("show").arg(entry.path()).output().expect("starting crit");
            assert!(out.status.success(), "crit show {name}: {}", String::from_utf8_lossy(&out.stderr));
        }
        for what in ["ps", "fds", "mems", "rss"] {
            let out = Command::new("crit").arg("x").arg(&images).arg(what).output().expect("starting crit");
            let text = String::from_utf8_lossy(&out.stdout);
            assert!(out.status.success(), "crit x {what}: {}", String::from_utf8_lossy(&out.stderr));
            assert!(text.contains(&program.pid().to_string()), "crit x {what} does not know the program:\n{text}");
        }
    };
}

/// An option that nobody knows is wrong usage, and nothing happens.
#[test]
fn unknown_option() {
    let engine = Engine::Ours(e2e::Survey::Proc);
    let out = Command::new(engine.binary()).args(["dump", "--no-such-option"]).output().expect("starting the engine");
    let expected = if engine.is_peer() { 1 } else { 2 };
    assert_eq!(out.status.code(), Some(expected), "{}", String::from_utf8_lossy(&out.stderr));
}
