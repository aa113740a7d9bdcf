//! Sessions that are killed, dumps that fail and sessions side by side, while a program writes its memory in every way:
//! whatever happened before, a dump has every byte as it was.
//!
//! `E2E_CYCLES` says how many times (once if it does not).

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use e2e::{Program, Row, rows};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::killed::{Moments, wait_unharmed};
use crate::sessions::track;
use crate::track::{cycles, dump_and_compare, in_parent, on, pre_dumps, remove_images, writes};

/// The process of the session of a program, if there is one.
fn session_of(program: &Program) -> Option<Pid> {
    let list = track(&["--list", "--json"]);
    let list: Value = serde_json::from_slice(&list.stdout).ok()?;
    let report = list.as_array()?.iter().find(|report| report["pid"] == program.pid())?.clone();
    report["session"].as_i64().map(|pid| Pid::from_raw(pid as i32))
}

/// Kills the session of a program, wherever it is.
fn kill_session(program: &Program) -> bool {
    session_of(program).is_some_and(|session| kill(session, Signal::SIGKILL).is_ok())
}

/// A pre-dump or dump during which the session is killed after `life`. Whether it succeeded all the same.
fn with_a_killed_session(row: &Row, program: &Program, words: &[std::ffi::OsString], life: Duration) -> bool {
    let session = session_of(program).expect("a session");
    let mut engine = Command::new(row.dumper.binary());
    engine.args(words).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut engine = engine.spawn().expect("starting the engine");
    std::thread::sleep(life);
    // It may have ended with the tree.
    let _: nix::Result<()> = kill(session, Signal::SIGKILL);
    engine.wait().expect("waiting for the engine").success()
}

fn words(verb: &str, program: &Program, images: &Path, parent: &Path) -> Vec<std::ffi::OsString> {
    fs::create_dir_all(images).expect("creating a directory");
    let pid = program.pid().to_string();
    let mut words: Vec<std::ffi::OsString> = [verb, "-t", &pid, "-v4", "-D"].map(Into::into).to_vec();
    words.extend([images.into(), "-o".into(), format!("{verb}.log").into()]);
    words.extend(["--track-mem".into(), "--prev-images-dir".into(), parent.into()]);
    words
}

rows! {
    /// Killed between images: what was written since nobody knows, and all is written.
    session_killed_between => |row| {
        let mut program = writes("everything").start();
        let mut moments = Moments::new();
        for _ in 0..cycles() {
            let mut parent = pre_dumps(row, &program, 1, &mut moments);
            for _ in 0..3 {
                std::thread::sleep(moments.within(Duration::from_millis(100)));
                assert!(kill_session(&program), "no session to kill");
                wait_unharmed(&program);
                let images = row.next_images(&program);
                row.dumper.pre_dump(&program, &images, Some(&parent)).expect_success();
                parent = images;
            }
            let images = dump_and_compare(row, &program, &parent, &on(&parent));
            assert!(in_parent(&images) > 0, "nothing was left to the parent");
            remove_images(&program);
        }
        program.finish();
    };

    /// Killed, and the dump builds on the image before, with a new session and without one.
    session_killed_before_the_dump => |row| {
        let mut program = writes("everything").start();
        let mut moments = Moments::new();
        for _ in 0..cycles() {
            for track_mem in [true, false] {
                let parent = pre_dumps(row, &program, 2, &mut moments);
                assert!(kill_session(&program), "no session to kill");
                wait_unharmed(&program);
                let mut options = on(&parent);
                options.dump.retain(|word| track_mem || word != "--track-mem");
                let images = dump_and_compare(row, &program, &parent, &options);
                assert_eq!(in_parent(&images), 0, "nobody knew what was written");
                remove_images(&program);
            }
        }
        program.finish();
    };

    /// Killed at any moment of a pre-dump, which may fail; those after it, and the dump, are right.
    session_killed_in_a_pre_dump => |row| {
        let mut program = writes("everything").start();
        let mut moments = Moments::new();
        for _ in 0..cycles() {
            let mut parent = pre_dumps(row, &program, 2, &mut moments);
            for _ in 0..4 {
                if session_of(&program).is_none() {
                    let images = row.next_images(&program);
                    row.dumper.pre_dump(&program, &images, Some(&parent)).expect_success();
                    parent = images;
                }
                let images = row.next_images(&program);
                let words = words("pre-dump", &program, &images, &parent);
                let words: Vec<_> = words.into_iter().filter(|word| word != "--track-mem").collect();
                let is_good = with_a_killed_session(row, &program, &words, moments.within(Duration::from_millis(60)));
                wait_unharmed(&program);
                if is_good {
                    parent = images;
                }
            }
            // One that failed may have been complete, and nobody may build on it for that.
            let failed = row.next_images(&program);
            let last = words("pre-dump", &program, &failed, &parent);
            let last: Vec<_> = last.into_iter().filter(|word| word != "--track-mem").collect();
            if session_of(&program).is_some() {
                with_a_killed_session(row, &program, &last, moments.within(Duration::from_millis(60)));
                wait_unharmed(&program);
            }
            let on_which = if failed.join("inventory.img").exists() { failed } else { parent };
            dump_and_compare(row, &program, &on_which, &on(&on_which));
            remove_images(&program);
        }
        program.finish();
    };

    /// Killed at any moment of dumps, while another session begins at once.
    session_killed_in_a_dump => |row| {
        let mut program = writes("everything").start();
        let pid = program.pid().to_string();
        let mut moments = Moments::new();
        for _ in 0..cycles() {
            let parent = pre_dumps(row, &program, 2, &mut moments);
            let images = row.next_images(&program);
            let mut words = words("dump", &program, &images, &parent);
            words.push("-R".into());
            let killed = session_of(&program).expect("a session");
            let life = moments.within(Duration::from_millis(120));
            let is_good = std::thread::scope(|scope| {
                let next = scope.spawn(|| {
                    std::thread::sleep(life);
                    // As soon as the other is gone.
                    (0..100).any(|_| {
                        track(&["-d", &pid]);
                        session_of(&program).is_some_and(|session| session != killed)
                    })
                });
                let is_good = with_a_killed_session(row, &program, &words, life);
                assert!(next.join().expect("the other session"), "no other session began");
                is_good
            });
            wait_unharmed(&program);
            let parent = if is_good { images } else { parent };
            dump_and_compare(row, &program, &parent, &on(&parent));
            remove_images(&program);
        }
        program.finish();
    };

    /// A dump that fails when all is read takes nothing from the one after it.
    after_dumps_that_failed => |row| {
        let mut program = writes("everything").start();
        let mut moments = Moments::new();
        let script = program.file("objects");
        fs::write(&script, "#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" != post-dump ]\n").expect("a script");
        fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("its mode");
        for _ in 0..cycles() {
            let parent = pre_dumps(row, &program, 2, &mut moments);
            // Those that would have killed the program, and one that would not.
            for further in [&["-R"][..], &[], &[], &[], &[]] {
                let images = row.next_images(&program);
                let mut options = on(&parent);
                options.dump.extend(["--action-script".into(), script.clone().into()]);
                options.dump.extend(further.iter().map(Into::into));
                row.dumper.dump(&program, &images, &options).expect_refusal("objects failed");
                wait_unharmed(&program);
                std::thread::sleep(moments.within(Duration::from_millis(20)));
            }
            dump_and_compare(row, &program, &parent, &on(&parent));
            remove_images(&program);
        }
        program.finish();
    };

    /// The session of a part of the tree takes nothing from that of the whole, and the other way round.
    sessions_within_sessions => |row| {
        let mut program = writes("family").start();
        let mut moments = Moments::new();
        for first in ["whole", "part"] {
            let part = program.tree().into_iter().find(|&pid| pid != program.pid()).expect("a child");
            let (whole, part) = (program.pid().to_string(), part.to_string());
            let both = if first == "whole" { [&whole, &part] } else { [&part, &whole] };
            for pid in both {
                let output = track(&["-d", "--interval", "100", pid]);
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            }
            let parent = pre_dumps(row, &program, 2, &mut moments);
            // The other one looks meanwhile.
            std::thread::sleep(Duration::from_millis(400));
            let images = dump_and_compare(row, &program, &parent, &on(&parent));
            assert!(in_parent(&images) > 0, "nothing was left to the parent");
            remove_images(&program);
        }
        program.finish();
    };
}
