//! The shape of a process tree.

use std::{fs, path::PathBuf};

use e2e::{Look, Program, Workload, proc, rows, workload_rows};

workload_rows! { "tree.py";
    family
    sessions_and_groups
    group_without_leader
    session_without_leader
    own_exit_signal
    zombies
    zombie_in_group
    subreaper
    many
    waiting_parent
    next_child
}

/// A cgroup of our own, removed with everything in it gone.
pub(crate) struct Cgroup(pub(crate) PathBuf);

impl Cgroup {
    pub(crate) fn new(parent: &str, name: &str) -> Self {
        let path = PathBuf::from(parent).join(format!("e2e-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap_or_else(|error| panic!("creating {}: {error}", path.display()));
        Self(path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for _ in 0..500 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(e2e::reaper::POLL);
        }
    }
}

/// A child that sits in a cgroup of its own comes back into it.
fn in_cgroup(row: &e2e::Row, parent: &str, name: &str) {
    let cgroup = Cgroup::new(parent, name);
    let workload = Workload::new("tree.py", "cgroup_member");
    let mut program = Program::start_with(&workload, "setsid", |command, dir| {
        fs::write(dir.join("cgroup"), cgroup.0.as_os_str().as_encoded_bytes()).expect("writing the cgroup's name");
        let out = fs::File::create(dir.join("out")).expect("creating the output file");
        command.stdin(std::process::Stdio::null()).stdout(out.try_clone().expect("dup")).stderr(out);
    });
    let images = row.dump(&program);
    row.restore(&program, &images);
    program.finish();
    let left = program.tree();
    program.expect_gone(&left);
    assert!(!proc::exists(program.pid()));
    drop(cgroup);
}

/// Where cgroup v2 is mounted.
pub(crate) fn cgroup2() -> String {
    fs::read_to_string("/proc/self/mounts")
        .expect("reading the mounts")
        .lines()
        .find_map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            (words[2] == "cgroup2").then(|| words[1].to_owned())
        })
        .expect("cgroup v2 is mounted nowhere")
}

/// A version 1 hierarchy where there is one, else version 2 once more.
pub(crate) fn cgroup1() -> String {
    let freezer = "/sys/fs/cgroup/freezer";
    if proc::is_mount_point(freezer) { freezer.to_owned() } else { cgroup2() }
}

/// A name for a cgroup that no other test has.
pub(crate) fn survey_name(row: &e2e::Row, version: u32) -> String {
    let survey = if row.dumper == e2e::Engine::Ours(e2e::Survey::Ebpf) { "ebpf" } else { "proc" };
    format!("v{version}-{survey}")
}

rows! {
    /// A shell that starts a program after the other.
    executes => |row| row.check_from_inside(&Workload::new("tree.py", "executes"));

    /// What the engine was started to ignore (as by nohup, or in the background of a script) is the engine's own affair.
    ignored_by_the_engine => |row| {
        let mut program = Workload::new("tree.py", "family").start();
        let before = Look::settled(&program);
        let images = row.dump(&program);
        let words = row.restorer.restore_words(&images, &row.options);
        let script = "trap '' HUP INT QUIT USR1; exec \"$@\"";
        row.restorer.call_by(script, &words, &images, "restore").expect_success();
        before.compare(&Look::at(&program));
        program.finish();
    };

    /// The unified hierarchy.
    cgroup_v2 => |row| {
        in_cgroup(&row.with(e2e::Options::both(&["--manage-cgroups=soft"])), &cgroup2(), &survey_name(row, 2));
    };

    /// One of the hierarchies of version 1.
    cgroup_v1 => |row| {
        in_cgroup(&row.with(e2e::Options::both(&["--manage-cgroups=soft"])), &cgroup1(), &survey_name(row, 1));
    };
}

mod interop {
    e2e::interop_rows! { "tree.py"; family sessions_and_groups zombies group_without_leader }
}
