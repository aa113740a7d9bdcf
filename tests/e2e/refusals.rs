//! What cannot be dumped: all of it is found before anything is changed, each with where it is and what can be done, and
//! the tree goes on as if nobody had looked.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use e2e::{
    Look, Options, Program, Row, Workload, proc, rows,
    workload::{workloads, workspace},
};

/// Dumps a program, which must be refused for all of these reasons in one go; then lets it check itself.
fn refused_for(row: &Row, mut program: Program, reasons: &[String]) {
    let before = Look::at(&program);
    let images = row.next_images(&program);
    let mut outcome = row.dumper.dump(&program, &images, &row.options);
    for reason in reasons {
        outcome = outcome.expect_refusal(reason);
    }
    assert!(!images.join("inventory.img").exists(), "refused, but it left an inventory behind");
    before.compare(&Look::at(&program));
    program.finish();
}

/// A workload started through another program, such as unshare(1).
fn through(words: &[&str], mut workload: Workload) -> Workload {
    let command: Vec<OsString> = words.iter().map(OsString::from).collect();
    workload.command = [command, workload.command].concat();
    workload
}

/// A program in namespaces of its own, which are named.
fn in_namespace(row: &Row, command: &[&str], name: &str) {
    let workload = through(command, Workload::new("counter.py", "counter"));
    let program = workload.start();
    let reason = format!("pid {}: it is in another {name} namespace", program.pid());
    refused_for(row, program, &[reason, "nsenter".to_owned()]);
}

/// Assembles and links a 32-bit program, once: it needs no library and no compiler for 32 bits.
fn compat() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let dir = workspace().join("target/workloads");
        fs::create_dir_all(&dir).expect("creating a directory");
        let (object, program) = (dir.join("compat.o"), dir.join("compat"));
        let run = |command: &mut Command| assert!(command.status().expect("binutils").success(), "{command:?}");
        run(Command::new("as").arg("--32").arg(workloads().join("compat.s")).arg("-o").arg(&object));
        run(Command::new("ld").args(["-m", "elf_i386", "-o"]).arg(&program).arg(&object));
        program
    })
}

rows! {
    /// One process with one of each, and a child that has inherited them.
    everything => |row| {
        let program = Workload::new("refused.py", "everything").start();
        let pid = program.pid();
        let fd_of = |what: &str| {
            let found = proc::descriptors(pid).into_iter().find(|(_, path)| path.to_string_lossy().starts_with(what));
            found.unwrap_or_else(|| panic!("no {what}")).0
        };
        let mut reasons: Vec<String> = [
            ("anon_inode:[io_uring]", "an io_uring instance"),
            ("anon_inode:[userfaultfd]", "a userfaultfd"),
            ("anon_inode:[perf_event]", "a performance counter"),
            ("anon_inode:bpf-map", "an eBPF map"),
            ("/dev/fuse", "the device /dev/fuse (10:229)"),
            ("socket:", "a packet socket"),
            ("anon_inode:[fanotify]", "a fanotify group"),
            ("anon_inode:[pidfd]", "a pidfd of process"),
        ]
        .iter()
        .map(|(link, what)| format!("pid {pid}, fd {}: {what}", fd_of(link)))
        .collect();
        reasons.push(format!("on its way in a socket, a pidfd of process {pid}"));
        for process in program.tree() {
            reasons.push(format!("pid {process}: the ring of a context of asynchronous i/o"));
            reasons.push(format!("pid {process}: memory of an io_uring instance"));
        }
        reasons.extend(["kernel.io_uring_disabled", "io_destroy", "close it before the dump"].map(str::to_owned));
        refused_for(row, program, &reasons);
    };

    /// A network of its own.
    network_namespace => |row| in_namespace(row, &["unshare", "--net"], "network");

    /// Mounts of its own.
    mount_namespace => |row| in_namespace(row, &["unshare", "--mount"], "mount");

    /// A host name of its own.
    uts_namespace => |row| in_namespace(row, &["unshare", "--uts"], "UTS");

    /// System V objects of its own.
    ipc_namespace => |row| in_namespace(row, &["unshare", "--ipc"], "IPC");

    /// Users of its own. In a chroot the kernel makes no user namespaces (user_namespaces(7)): so the root of the mount
    /// namespace is gone to, and back from there.
    user_namespace => |row| {
        const THERE_AND_BACK: &str = r#"exec 9</ nsenter --mount=/proc/self/ns/mnt unshare --map-root-user \
            chroot /proc/self/fd/9 sh -c 'exec 9<&- "$@"' sh "$@""#;
        in_namespace(row, &["sh", "-c", THERE_AND_BACK, "sh"], "user");
    };

    /// Control groups of its own.
    cgroup_namespace => |row| in_namespace(row, &["unshare", "--cgroup"], "cgroup");

    /// Pids of its own: its first process, and the one outside of which it is a child.
    pid_namespace => |row| {
        let program = through(&["unshare", "--pid", "--fork"], Workload::new("counter.py", "counter")).start();
        let reasons: Vec<String> =
            program.tree().iter().map(|pid| format!("pid {pid}: it is in another pid namespace")).collect();
        assert_eq!(reasons.len(), 2, "{reasons:?}");
        refused_for(row, program, &reasons);
    };

    /// Several at once are all named.
    several_namespaces => |row| {
        let workload = through(&["unshare", "--net", "--uts", "--ipc", "--mount"], Workload::new("counter.py", "counter"));
        refused_for(row, workload.start(), &["another mount, network, uts, ipc namespace".to_owned()]);
    };

    /// Clocks of its own are no reason: every restored tree has some.
    time_namespace => |row| {
        let clocks = ["unshare", "--time", "--monotonic", "1000", "--boottime", "2000"];
        row.check(&through(&clocks, Workload::new("counter.py", "counter")));
    };

    /// A thread with descriptors of its own.
    thread_with_descriptors => |row| {
        let program = Workload::new("special.c", "thread_with_descriptors").start();
        refused_for(row, program, &["has descriptors of its own".to_owned()]);
    };

    /// A thread with a network of its own.
    thread_with_network => |row| {
        let program = Workload::new("special.c", "thread_with_network").start();
        refused_for(row, program, &["is in a network namespace of its own".to_owned()]);
    };

    /// A process that has nothing of its own.
    shares_with_child => |row| {
        let program = Workload::new("special.c", "shares_with_child").start();
        let shared = "shares its memory, descriptors, directories, signal actions with its parent";
        let reason = format!("{shared} {}", program.pid());
        refused_for(row, program, &[reason]);
    };

    /// A process that another one traces cannot be stopped: the tracer is named.
    traced => |row| {
        let program = Workload::new("special.c", "traces").start();
        let child = *program.tree().last().expect("a child");
        let reason = format!("tid {child} is traced by process {} (special)", program.pid());
        refused_for(row, program, &[reason]);
    };

    /// A 32-bit program is named, and runs on.
    compat_program => |row| {
        let program = Workload::program(&[compat().to_str().expect("a path")]).start();
        // exec(2) may still be on its way.
        while proc::stat(program.pid()).is_some_and(|_| proc::status(program.pid()).get("Name").is_some_and(|n| n != "compat")) {
            std::thread::sleep(e2e::reaper::POLL);
        }
        let before = Look::at(&program);
        let images = row.next_images(&program);
        let reason = format!("pid {} (compat) is a 32-bit program", program.pid());
        row.dumper.dump(&program, &images, &Options::default()).expect_refusal(&reason);
        before.compare(&Look::at(&program));
    };
}
