//! Files for node_exporter.

use std::{
    fs,
    path::{Path, PathBuf},
};

use e2e::{Options, Row, Survey};

use super::{Session, eventually, promtool, sleeper, value};

/// A session's file is written again and again, whole each time, and goes with the session.
#[test]
fn of_a_session() {
    let mut program = sleeper();
    let path = program.file("tree.prom");
    // A path that is not absolute is the caller's, not that of the session in the background.
    let here = std::env::current_dir().expect("a working directory");
    let up: PathBuf = here.components().skip(1).map(|_| "..").collect();
    let from_here = up.join(path.strip_prefix("/").expect("an absolute path"));
    let session = Session::start(&program, &["--metrics-file", &from_here.to_string_lossy()]);
    let read = || fs::read_to_string(&path).expect("the file");
    let looks = |text: &str| value(text, "criu_ebpf_look_duration_seconds_count");
    let first = looks(&read());
    eventually("it is written again", || looks(&read()) > first + 2.0);
    promtool(&["check", "metrics"], &read());
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(fs::metadata(&path).expect("the file").permissions().mode() & 0o777, 0o644);
    session.stop();
    eventually("the file is gone", || !path.exists());
    drop(session);
    no_leavings(program.dir());
    program.finish();
}

/// Commands add up in a file of theirs, failures by their reasons, without any session.
#[test]
fn of_commands() {
    let row = Row::ours(Survey::Proc);
    let mut program = sleeper();
    let path = program.file("commands.prom");
    let word = format!("--metrics-file={}", path.display());
    let options = Options::both(&[&word]);
    let read = || fs::read_to_string(&path).expect("the file");
    let tree = program.tree();
    for _ in 0..2 {
        let images = row.next_images(&program);
        row.dumper.dump(&program, &images, &options).expect_success();
        program.expect_gone(&tree);
        let restored = row.restorer.restore(&images, &options);
        e2e::engine::adopt(&program, &images, restored);
        // Its pids are taken now.
        row.restorer.restore(&images, &options).expect_refusal("is in use");
    }
    let nothing = program.file("nothing");
    fs::create_dir(&nothing).expect("an empty directory");
    row.restorer.restore(&nothing, &options).expect_refusal("is not a complete dump");
    let mut refused = options.clone();
    refused.dump.extend(["--prev-images-dir".into(), "nowhere".into()]);
    let images = row.next_images(&program);
    assert!(!row.dumper.dump(&program, &images, &refused).status.success());
    let text = read();
    promtool(&["check", "metrics"], &text);
    for (series, expected) in [
        ("criu_ebpf_operations_total{operation=\"dump\",result=\"ok\"}", 2.0),
        ("criu_ebpf_operations_total{operation=\"dump\",result=\"failed\"}", 1.0),
        ("criu_ebpf_operations_total{operation=\"restore\",result=\"ok\"}", 2.0),
        ("criu_ebpf_operation_failures_total{operation=\"restore\",reason=\"pid\"}", 2.0),
        ("criu_ebpf_operation_failures_total{operation=\"restore\",reason=\"image\"}", 1.0),
        ("criu_ebpf_operation_failures_total{operation=\"dump\",reason=\"image\"}", 1.0),
        ("criu_ebpf_operation_duration_seconds_count{operation=\"dump\",phase=\"frozen\"}", 2.0),
        ("criu_ebpf_operation_duration_seconds_bucket{le=\"+Inf\",operation=\"restore\",phase=\"total\"}", 2.0),
    ] {
        assert_eq!(value(&text, series), expected, "{series}\n{text}");
    }
    let written = value(&text, "criu_ebpf_pages_total{operation=\"dump\",kind=\"written\"}");
    assert_eq!(value(&text, "criu_ebpf_image_bytes_total{operation=\"dump\"}"), written * 4096.0);
    assert!(written > 0.0);
    no_leavings(program.dir());
    program.finish();
}

/// A file of somebody else is refused before anything is done.
#[test]
fn of_somebody_else() {
    let row = Row::ours(Survey::Proc);
    let mut program = sleeper();
    let path = program.file("notes");
    fs::write(&path, "mine\n").expect("a file");
    let options = Options::dump(&["--metrics-file", &path.to_string_lossy()]);
    row.dumper.dump(&program, &row.next_images(&program), &options).expect_refusal("exists already");
    assert_eq!(fs::read_to_string(&path).expect("the file"), "mine\n");
    program.finish();
}

fn no_leavings(dir: &Path) {
    let names = fs::read_dir(dir).expect("its directory").flatten().map(|entry| entry.file_name());
    let left: Vec<_> = names.filter(|name| name.to_string_lossy().starts_with(".criu-ebpf-")).collect();
    assert!(left.is_empty(), "{left:?}");
}
