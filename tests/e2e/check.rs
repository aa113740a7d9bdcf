//! `criu-ebpf check`: what it says here, that it is true, and that it leaves nothing behind.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    process::{Command, Output},
    time::{Duration, Instant},
};

use e2e::{Engine, Survey, proc, reaper};
use serde_json::Value;

/// Features about which our answer is not CRIU's, and why.
const OTHER_ANSWERS: &[(&str, &str)] = &[
    ("compat_cr", "asks for 32-bit programs, which CRIU restores and this engine refuses"),
    ("external_net_ns", "asks whether the engine can join a network namespace, which ours cannot"),
    ("mem_dirty_track", "asks for soft-dirty bits, which this kernel lacks and this engine does without"),
];

fn ours() -> std::path::PathBuf {
    Engine::Ours(Survey::Proc).binary()
}

fn check(words: &[&str]) -> Output {
    Command::new(ours()).arg("check").args(words).output().expect("starting the engine")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Runs a script in a mount namespace with an empty /run; `$1` is our engine, `$2` CRIU, then come further words.
fn with_empty_run(script: &str, words: &[&str]) -> Output {
    let script = format!("set -e; mount -t tmpfs -o mode=755 tmpfs /run; {script}");
    // What the test runner was started with is nothing that a dumped program should have.
    close_fds::set_fds_cloexec(3, &[]);
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", &script, "sh"]).arg(ours()).arg(Engine::Peer.binary()).args(words);
    command.output().expect("starting unshare")
}

fn json(words: &[&str]) -> (Value, Option<i32>) {
    let output = check(&[&["--json"], words].concat());
    let value = serde_json::from_slice(&output.stdout);
    (value.unwrap_or_else(|error| panic!("{error}:\n{}", said(&output))), output.status.code())
}

/// Dumps and restores work where the tests run, and so it says.
#[test]
fn good_here() {
    let output = check(&[]);
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    let text = said(&output);
    assert!(text.ends_with("Looks good.\n") && !text.contains("MISSING"), "{text}");
    for name in ["iterators", "uffd_wp_async", "clone3_set_tid", "cap_sys_ptrace"] {
        assert!(text.lines().any(|line| line.contains(name) && line.trim_start().starts_with("ok")), "{name}:\n{text}");
    }
}

/// Each row has all fields, and says what it has to.
#[test]
fn as_json() {
    const WANTED: &[&str] = &[
        "btf",
        "iterators",
        "tp_btf",
        "ring_buffer",
        "tcx",
        "nftables",
        "bpffs",
        "uffd_wp_async",
        "uffd_wp_unpopulated",
        "uffd_wp_hugetlbfs_shmem",
        "soft_dirty",
        "pagemap_scan",
        "procmap_query",
        "pidfd_getfd",
        "clone3_set_tid",
        "prctl_mm_map",
        "rseq_configuration",
        "suspend_seccomp",
        "seccomp_filter",
        "kcmp",
        "tcp_repair",
        "tls",
        "tcp_clients",
        "connections_ahead",
        "raw_sockets",
        "time_namespace",
        "memfd",
        "unix_diag",
        "inet_diag_tcp",
        "cgroup_freezer_v1",
        "cgroup_freezer_v2",
        "proc_mem_write",
        "cap_sys_resource",
        "rlimit_nofile",
        "kernel",
    ];
    let (report, status) = json(&[]);
    assert_eq!((report["ok"].as_bool(), status), (Some(true), Some(0)));
    let rows = report["rows"].as_array().expect("rows");
    let names: BTreeSet<&str> = rows.iter().filter_map(|row| row["name"].as_str()).collect();
    for wanted in WANTED {
        assert!(names.contains(wanted), "no row {wanted}");
    }
    for row in rows {
        for field in ["name", "group", "status", "detail", "purpose", "advice"] {
            assert!(row[field].is_string(), "{field} in {row}");
        }
        match row["status"].as_str() {
            Some("present") => {}
            Some("fallback") => assert!(row["fallback"].is_string() && row["detail"] != "", "{row}"),
            other => panic!("{other:?} in {row}"),
        }
    }
}

/// What else serves counts only where that is asked for, as with CRIU, which finds no soft-dirty bits here.
#[test]
fn stricter() {
    let (report, _) = json(&[]);
    let rows = report["rows"].as_array().expect("rows");
    let whole = rows.iter().all(|row| row["status"] == "present");
    let output = check(&["--all"]);
    assert_eq!(output.status.code(), Some(i32::from(!whole)), "{}", said(&output));
    assert_eq!(whole, !said(&output).contains("not all that was asked for"), "{}", said(&output));
    assert_eq!(check(&["--extra", "--experimental"]).status.code(), output.status.code());
}

/// The names in CRIU's help.
fn features() -> Vec<String> {
    let help = Command::new(Engine::Peer.binary()).args(["check", "--help"]).output().expect("starting CRIU");
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    let list = help.split_once("only check a particular feature, one of:").expect("CRIU's list").1;
    let list = list.split_once("* Logging").expect("its end").0;
    list.split([',', '\n']).map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect()
}

/// Whether there can be further user namespaces: not in a chroot (user_namespaces(7)).
fn users_can_be_made() -> bool {
    Command::new("unshare").args(["--map-root-user", "true"]).output().expect("starting unshare").status.success()
}

/// Every feature that CRIU knows is there or not, by both of them.
#[test]
fn same_as_criu() {
    let features = features();
    assert!(features.len() > 40, "{features:?}");
    let script = "ours=$1; criu=$2; shift 2; for name; do set +e
        $ours check --feature $name >/dev/null 2>&1; one=$?
        $criu check --feature $name >/dev/null 2>&1; echo $name $one $?; done";
    let output = with_empty_run(script, &features.iter().map(String::as_str).collect::<Vec<_>>());
    let text = said(&output);
    let answers: BTreeMap<&str, (&str, &str)> = text
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            Some((words.next()?, (words.next()?, words.next()?)))
        })
        .collect();
    assert_eq!(answers.len(), features.len(), "{text}");
    for (name, (ours, criu)) in answers {
        match OTHER_ANSWERS.iter().find(|(other, _)| *other == name) {
            Some((_, why)) => assert_ne!(ours, criu, "{name} is no exception any more: it {why}"),
            // CRIU does not try.
            None if name == "userns" && !users_can_be_made() => assert_eq!(ours, "1", "{name}"),
            None => assert_eq!(ours, criu, "{name}: ours, CRIU's"),
        }
    }
}

/// Words and exit status of single features.
#[test]
fn one_feature() {
    let there = check(&["--feature", "pagemap_scan"]);
    assert_eq!((there.status.code(), said(&there).as_str()), (Some(0), "pagemap_scan is supported\n"));
    let one_of_two = check(&["--feature", "pagemap_scan", "--feature", "compat_cr"]);
    assert_eq!(one_of_two.status.code(), Some(1), "{}", said(&one_of_two));
    assert!(said(&one_of_two).contains("compat_cr is not supported: "), "{}", said(&one_of_two));
    let unknown = check(&["--feature", "pagemap_scan", "--feature", "no_such_thing"]);
    assert_eq!(unknown.status.code(), Some(2), "{}", said(&unknown));
    assert!(said(&unknown).contains("Unknown feature no_such_thing"), "{}", said(&unknown));
    let (answer, status) = json(&["--feature", "timens"]);
    assert_eq!((answer["features"][0]["supported"].as_bool(), status), (Some(true), Some(0)), "{answer}");
}

/// Without privileges nothing works, and each that is missing is named, with what to do.
#[test]
fn unprivileged() {
    let run = |words: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(ours()).arg("check").args(words);
        command.output().expect("starting setpriv")
    };
    let output = run(&[]);
    let text = said(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    let last = text.lines().last().unwrap_or_default();
    for name in ["clone3_set_tid", "cap_sys_ptrace", "time_namespace"] {
        assert!(last.contains(name), "{name} is not named in {last:?}");
    }
    assert!(text.contains("or give the capability"), "{text}");
    let report: Value = serde_json::from_slice(&run(&["--json"]).stdout).expect("JSON");
    assert_eq!(report["ok"].as_bool(), Some(false));
}

/// The ids of all eBPF objects of the system, by kind.
fn ebpf_objects() -> BTreeSet<(&'static str, u64)> {
    let list = |kind: &'static str| {
        let output = Command::new("bpftool").args(["-j", kind, "list"]).output().expect("starting bpftool");
        let list: Value = serde_json::from_slice(&output.stdout).expect("a list");
        let ids: Vec<u64> = list.as_array().into_iter().flatten().filter_map(|object| object["id"].as_u64()).collect();
        ids.into_iter().map(move |id| (kind, id))
    };
    ["prog", "map", "link"].into_iter().flat_map(list).collect()
}

/// Whether a process has inherited the mark.
fn marked(mark: &str) -> Vec<i32> {
    let all = fs::read_dir("/proc").expect("/proc").flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|&pid| proc::has_environment(pid, "E2E_CHECK", mark))
        .collect()
}

/// No process, no eBPF object, no control group, no mount, and in /run nothing but what is kept.
#[test]
fn nothing_left() {
    reaper::become_subreaper();
    let mark = std::process::id().to_string();
    let before = ebpf_objects();
    let mut command = Command::new(ours());
    command.args(["check", "--quiet"]).env("E2E_CHECK", &mark);
    let mut child = command.spawn().expect("starting the engine");
    let pid = child.id();
    assert!(child.wait().expect("its end").success());
    assert_eq!(marked(&mark), Vec::<i32>::new(), "processes");
    let group = format!("criu-ebpf-check-{pid}");
    let find = Command::new("find").args(["/sys/fs/cgroup", "-name", &group]).output().expect("starting find");
    assert_eq!(said(&find), "", "control groups");
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    assert!(!mounts.contains("criu-ebpf-check"), "{mounts}");
    // Others may use eBPF meanwhile: what is there now and does not go is left over.
    let mut left: BTreeSet<_> = ebpf_objects().difference(&before).copied().collect();
    let end = Instant::now() + Duration::from_secs(10);
    while !left.is_empty() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(100));
        left = left.intersection(&ebpf_objects()).copied().collect();
    }
    assert!(left.is_empty(), "eBPF objects: {left:?}");
    let output = with_empty_run("\"$1\" check --quiet; ls -A /run /run/criu-ebpf", &[]);
    let text = said(&output);
    let kept = |line: &&str| line.starts_with("btf-") || line.starts_with("check-");
    // What the survey, the programs about clients and both about connections need to know of the kernel's types, and the
    // answers.
    assert_eq!(text.lines().filter(kept).count(), 5, "{text}");
    assert!(
        text.lines().filter(|line| !line.contains("/run") && !line.is_empty()).all(|l| kept(&l) || l == "criu-ebpf"),
        "{text}"
    );
}

/// What a check found out is used by the dumps that follow, but only if nobody else can have written it.
#[test]
fn what_is_kept() {
    /// A dump of a program that sleeps asks eBPF what remains of that, unless it is known not to work. It is started
    /// here because an engine dumps what lives in its own mount namespace.
    const SCRIPT: &str = r#"
        dump() {
            "$engine" dump -t $pid -R -v4 -D "$dir/$1" >/dev/null 2>"$dir/log" || tail -3 "$dir/log"
            echo "$1 $(grep -c planted "$dir/log")"
        }
        engine=$1; dir=$3
        setsid sleep 100 </dev/null >/dev/null 2>&1 & pid=$!
        trap "kill $pid" EXIT
        "$engine" check --quiet
        test "$(stat -c %a /run/criu-ebpf)" = 700
        file=$(ls /run/criu-ebpf/check-*)
        dump fresh
        printf '{"iterators":{"present":false,"why":"planted"}}' >$file
        dump believed
        chown 65534 $file; dump foreign; chown 0 $file
        chmod 666 $file; dump writable; chmod 600 $file
        mv $file $dir/elsewhere; ln -s $dir/elsewhere $file; dump link; rm $file
        mkfifo $file; dump fifo; rm $file
        mv $dir/elsewhere $file
        chmod 777 /run/criu-ebpf; dump open; chmod 700 /run/criu-ebpf
        mv /run/criu-ebpf /run/there; ln -s there /run/criu-ebpf; dump directory; rm /run/criu-ebpf
        mv /run/there /run/criu-ebpf
        dump again
        printf '{"iterators":{"present":false,"why":"planted"' >$file; dump short
        head -c 100000 /dev/urandom >$file; dump noise
        printf '{"iterators":{"present":false,"why":"planted"}}' >$file
        "$engine" check --quiet; dump checked
    "#;
    let dir = tempfile::TempDir::with_prefix("e2e-").expect("creating a directory");
    let output = with_empty_run(SCRIPT, &[dir.path().to_str().expect("a path")]);
    let text = said(&output);
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split(' ').collect()).collect();
    assert_eq!(lines.len(), 12, "{}: {text}", output.status);
    for line in lines {
        let believed = ["believed", "again"].contains(&line[0]);
        let times = if believed { "1" } else { "0" };
        assert_eq!(line[1..], [times], "{}: how often it was believed\n{text}", line[0]);
    }
}
