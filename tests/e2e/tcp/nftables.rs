//! Connections that are held by rules of the packet filter instead of eBPF (`--network-lock nftables`).

use std::process::Command;

use e2e::proc;

use super::*;

/// The same with this lock; afterwards nothing of it may be left.
fn filtered(row: &Row, course: impl Fn(&Row)) {
    let words = ["--network-lock", "nftables"];
    course(&also(row, &words, &words));
    expect_no_tables();
}

/// Fails if the packet filter keeps a table of an engine that has ended. (Gates that stay are those of tests that run at
/// the same time.)
fn expect_no_tables() {
    let left = || {
        let listed = Command::new("python3").arg("workloads/nft_tables.py").output().expect("starting python");
        assert!(listed.status.success(), "{listed:?}");
        let names = String::from_utf8_lossy(&listed.stdout).into_owned();
        let ended = |name: &&str| {
            let owner: Option<i32> = name.strip_prefix("criu-ebpf-held-by-").map(|pid| pid.parse().expect("a pid"));
            owner.is_some_and(|pid| proc::stat(pid).is_none_or(|(state, _)| state == 'Z'))
        };
        names.lines().find(ended).map(str::to_owned)
    };
    // What a killed engine has begun is finished by somebody else, who holds the table as long.
    for _ in 0..200 {
        if left().is_none() {
            return;
        }
        sleep(Duration::from_millis(10));
    }
    assert_eq!(left(), None, "a table is left");
}

super::locks::lock_rows! { 8 }
