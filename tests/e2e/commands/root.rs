//! `--root`: the paths of the images start in another directory, which becomes the root of the tree.

use std::{ffi::OsString, fs};

use e2e::{Options, Workload, engine, rows};

/// The whole system once more, in a mount namespace that goes away with the tree.
const ELSEWHERE: &str = r#"exec unshare -m --propagation private sh -c '
    mount --rbind / "$0/../root" && exec "$@"' "$0" "$@""#;

/// Restores below another root, and says what that is to the outside.
fn restore_elsewhere(row: &e2e::Row, workload: &Workload) {
    let mut program = workload.start();
    let images = row.dump(&program);
    let root = program.file("root");
    fs::create_dir(&root).expect("mkdir");
    let options = Options { restore: vec![OsString::from("--root"), root.clone().into()], ..Options::default() };
    let words = row.restorer.restore_words(&images, &options);
    engine::adopt(&program, &images, row.restorer.call_by(ELSEWHERE, &words, &images, "restore"));
    for link in ["root", "cwd", "exe"] {
        let to = fs::read_link(format!("/proc/{}/{link}", program.pid())).expect("a link of /proc");
        // It is in another mount namespace: the kernel names it from the root of that on, which need not be ours.
        let seen = to.to_string_lossy().into_owned();
        assert!(seen.contains(&*root.to_string_lossy()), "{link} is {seen}");
    }
    program.finish();
}

rows! {
    counter => |row| restore_elsewhere(row, &Workload::new("counter.py", "counter"));

    /// Open files, and one that has no name any more.
    files => |row| restore_elsewhere(row, &Workload::new("files.py", "unlinked"));

    /// Sockets with names in the file system.
    sockets => |row| restore_elsewhere(row, &Workload::new("unix.py", "named_server"));

    /// A root that is not there.
    no_such_root => |row| {
        let mut program = Workload::new("counter.py", "counter").start();
        let images = row.dump(&program);
        let options = Options { restore: ["--root", "/no/such/root"].map(OsString::from).into(), ..Options::default() };
        row.restorer.restore(&images, &options).expect_refusal("/no/such/root");
        row.restore(&program, &images);
        program.finish();
    };
}
