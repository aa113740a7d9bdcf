//! Options of CRIU: known by the same name and meaning, or refused with a reason.

use std::process::{Command, Output};

use e2e::{Engine, Options, Survey, rows};

use super::counter;

fn call(words: &[&str]) -> Output {
    Command::new(Engine::Ours(Survey::Proc).binary()).args(words).output().expect("starting the engine")
}

rows! {
    /// What container engines and users of CRIU type, all at once.
    what_container_engines_say => |row| {
        let mut program = counter().start();
        let work = program.file("work");
        std::fs::create_dir(&work).expect("mkdir");
        let common = ["--no-default-config", "--work-dir", work.to_str().expect("a path"), "--shell-job", "--ext-unix-sk",
            "--tcp-close", "--file-locks", "--manage-cgroups=soft", "--link-remap", "--cpu-cap=none", "-v", "-v"];
        let mut options = Options::both(&common);
        options.dump.extend(["--timeout", "20", "--ghost-limit", "2M", "--ghost-fiemap", "--display-stats"].map(Into::into));
        options.restore.extend(["--restore-sibling", "--skip-file-rwx-check", "--display-stats"].map(Into::into));
        let row = row.with(options);
        row.cycle(&program);
        for name in ["dump.log", "restore.log", "stats-dump", "stats-restore"] {
            assert!(work.join(name).exists(), "{name} is not in the work directory");
        }
        program.finish();
    };
}

/// Options may come before the command.
#[test]
fn options_before_the_command() {
    let out = call(&["-v4", "-t", "0", "--images-dir", "restore", "dump"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("for '--tree <PID>'"), "not taken for a dump of pid 0: {said}");
    let dir = tempfile::tempdir().expect("a directory");
    let out = call(&["-D", dir.path().to_str().expect("a path"), "-o", "log", "restore", "-d"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.code() == Some(1) && said.contains("inventory.img"), "not taken for a restore: {said}");
    assert!(dir.path().join("log").exists(), "the log is elsewhere");
}

/// What has no meaning here is wrong usage with a reason, and not ignored.
#[test]
fn options_of_criu_that_are_none_of_ours() {
    let cases: &[(&[&str], &str)] = &[
        (&["dump", "-t", "1", "--lazy-pages"], "--lazy-pages"),
        (&["dump", "-t", "1", "--page-server", "--address", "localhost"], "--page-server"),
        (&["dump", "-t", "1", "--log-pid"], "begin with the pid"),
        (&["dump", "-t", "1", "--enable-fs", "all"], "namespaces"),
        (&["dump", "-t", "1", "--cpu-cap=all"], "processor"),
        (&["dump", "-t", "1", "--cpu-cap"], "processor"),
        (&["dump", "-t", "1", "--no-display-stats"], "negated"),
        (&["dump", "-t", "1", "--timeout", "0"], "timeout"),
        (&["dump", "-t", "1", "-v9x"], "levels are 0 to 4"),
        (&["restore", "-t", "1"], "the images know"),
        (&["restore", "-J", "net:1"], "namespaces"),
        (&["restore", "--empty-ns", "net"], "namespaces"),
        (&["restore", "--lsm-profile", "apparmor:x"], "security"),
        (&["restore", "--config=x"], "configuration"),
        (&["restore", "-S"], "--restore-detached"),
        (&["restore", "-d", "--exec-cmd", "--", "true"], "cannot be used with"),
        (&["restore", "--exec-cmd"], "COMMAND"),
    ];
    for (words, reason) in cases {
        let out = call(words);
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{words:?}: {said}");
        assert!(said.contains(reason), "{words:?}: nothing of {reason:?} in\n{said}");
    }
}

/// Everywhere where CRIU says it.
#[test]
fn version() {
    for words in [&["-V"][..], &["--version"], &["dump", "--version"], &["restore", "-V"]] {
        let out = call(words);
        assert!(out.status.success());
        assert!(String::from_utf8_lossy(&out.stdout).contains(env!("CARGO_PKG_VERSION")));
    }
}

/// Completions and manual pages know every command and option.
#[test]
fn completions_and_manual_pages() {
    let dir = tempfile::tempdir().expect("a directory");
    let out = call(&["documents", dir.path().to_str().expect("a path")]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    for name in
        ["completions/criu-ebpf.bash", "completions/_criu-ebpf", "completions/criu-ebpf.fish", "man/criu-ebpf-dump.1"]
    {
        let text = std::fs::read_to_string(dir.path().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(text.replace('\\', "").contains("action-script"), "{name} does not know --action-script");
    }
    assert!(dir.path().join("man/criu-ebpf.1").exists());
}
