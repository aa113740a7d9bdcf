//! How a tree is made to stand still, and let go.

use std::{fs, path::Path, time::Duration};

use crate::tree::{Cgroup, cgroup1, cgroup2, survey_name};
use e2e::{Look, Options, Program, Row, Workload, reaper, rows};

/// Puts all processes of a program into a group.
fn enter(group: &Path, program: &Program) {
    for pid in program.tree() {
        fs::write(group.join("cgroup.procs"), pid.to_string()).expect("entering the group");
    }
}

fn by(group: &Path) -> Options {
    Options::dump(&["--freeze-cgroup", group.to_str().expect("a path")])
}

/// Whether the group says that it is frozen.
fn is_frozen(group: &Path) -> bool {
    let read = |name: &str| fs::read_to_string(group.join(name)).unwrap_or_default();
    read("freezer.state").trim() == "FROZEN" || read("cgroup.events").lines().any(|line| line == "frozen 1")
}

fn set_frozen(group: &Path, frozen: bool) {
    let (state, number) = if frozen { ("FROZEN", "1") } else { ("THAWED", "0") };
    let written = if group.join("freezer.state").exists() {
        fs::write(group.join("freezer.state"), state)
    } else {
        fs::write(group.join("cgroup.freeze"), number)
    };
    written.expect("freezing the group");
    for _ in 0..2500 {
        if is_frozen(group) == frozen {
            return;
        }
        std::thread::sleep(reaper::POLL);
    }
    panic!("{} does not change its state", group.display());
}

/// A whole cycle with the help of a group's freezer, which is thawed afterwards: the tree runs.
fn by_cgroup(row: &Row, parent: &str, name: &str) {
    let group = Cgroup::new(parent, &format!("freeze-{name}"));
    let mut program = Workload::new("tree.py", "family").start();
    enter(&group.0, &program);
    row.with(by(&group.0)).cycle(&program);
    assert!(!is_frozen(&group.0), "the group is still frozen");
    program.finish();
    drop(program);
}

/// A group that was frozen before is so again when the dump is done, and until somebody thaws it.
fn frozen_before(row: &Row, parent: &str, name: &str) {
    let group = Cgroup::new(parent, &format!("frozen-{name}"));
    let mut program = Workload::new("tree.py", "family").start();
    enter(&group.0, &program);
    set_frozen(&group.0, true);
    let row = row.with(Options { dump: [by(&group.0).dump, vec!["-R".into()]].concat(), ..Options::default() });
    let images = row.next_images(&program);
    let outcome = row.dumper.dump(&program, &images, &row.options);
    let frozen = is_frozen(&group.0);
    set_frozen(&group.0, false);
    outcome.expect_success();
    assert!(frozen, "the group was frozen, and is not any more");
    program.finish();
    drop(program);
}

rows! {
    /// The freezer of version 1.
    cgroup_v1 => |row| by_cgroup(row, &cgroup1(), &survey_name(row, 1));

    /// The freezer of version 2.
    cgroup_v2 => |row| by_cgroup(row, &cgroup2(), &survey_name(row, 2));

    /// Frozen by somebody else, version 1.
    frozen_before_v1 => |row| frozen_before(row, &cgroup1(), &survey_name(row, 1));

    /// Frozen by somebody else, version 2.
    frozen_before_v2 => |row| frozen_before(row, &cgroup2(), &survey_name(row, 2));

    /// A directory that is no control group.
    no_cgroup => |row| {
        let mut program = Workload::new("counter.py", "counter").start();
        let before = Look::at(&program);
        let images = row.next_images(&program);
        row.dumper.dump(&program, &images, &by(program.dir())).expect_refusal("no control group with a freezer");
        before.compare(&Look::at(&program));
        program.finish();
    };

    /// A tree that does not come to rest is let go after the time that was given, and its reason is named.
    timeout => |row| {
        let mut program = Workload::new("special.c", "vforks").start();
        let before = Look::at(&program);
        let images = row.next_images(&program);
        let outcome = row.dumper.dump(&program, &images, &Options::dump(&["--timeout", "1"])).expect_refusal("--timeout");
        assert!((1.0..5.0).contains(&outcome.took.as_secs_f64()), "it took {:?}", outcome.took);
        let report = outcome.report();
        outcome.expect_refusal(&format!("tid {}", program.pid()));
        assert!(report.contains("did not stand still within 1 s"), "{report}");
        assert!(!images.join("inventory.img").exists(), "an inventory of nothing");
        before.compare(&Look::at(&program));
        std::thread::sleep(Duration::from_millis(20));
        let traced = |&pid: &i32| e2e::proc::status(pid).get("TracerPid").is_some_and(|tracer| tracer != "0");
        assert!(!program.tree().iter().any(traced), "it is still traced");
        program.finish();
    };
}
