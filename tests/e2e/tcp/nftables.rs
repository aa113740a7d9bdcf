//! Connections that are held by rules of the packet filter instead of eBPF (`--network-lock nftables`).

use std::process::Command;

use e2e::proc;

use super::*;
use crate::net::Network;

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

fn remote_stream(number: u8, family: &str) {
    let network = Network::new(number);
    filtered(&Row::ours(e2e::Survey::Proc), |row| {
        let row = kept(row);
        let mut pair = Pair::across(&network, ["tcp.py", "stream"], family, cycles(), [&[], &[]]);
        for _ in 0..cycles() {
            move_once(&row, &pair.program);
            pair.program.next();
        }
        pair.finish();
    });
}

#[test]
fn remote_v4() {
    remote_stream(8, "v4");
}

#[test]
fn remote_v6() {
    remote_stream(9, "v6");
}

#[test]
fn remote_mapped() {
    remote_stream(10, "mapped");
}

rows! {
    stream_v4 => |row| filtered(row, |row| streams(row, "v4"));
    stream_v6 => |row| filtered(row, |row| streams(row, "v6"));
    stream_mapped => |row| filtered(row, |row| streams(row, "mapped"));
    stuffed => |row| filtered(row, |row| state(row, "stuffed", "v4"));
    close_wait => |row| filtered(row, |row| state(row, "close_wait", "v6"));
    fin_wait1 => |row| filtered(row, |row| unsent_end(row, "fin_wait1", "v4"));
    fin_wait2 => |row| filtered(row, |row| state(row, "fin_wait2", "mapped"));
    reset => |row| filtered(row, |row| state(row, "reset", "v4"));
    many_connections => |row| filtered(row, many);
    client_asks_later => |row| filtered(row, late_client);
    gate_is_cleared => |row| filtered(row, cleared);
    restore_that_fails => |row| filtered(row, second_restore);

    clients => |row| filtered(row, |row| {
        let pair = Pair::of("clients.py", "some", &[]);
        move_once(&kept(row), &pair.program);
        pair.finish();
    });

    /// The tree runs on, and so does its connection.
    left_running => |row| filtered(row, |row| {
        let row = kept(row);
        let pair = Pair::start("quiet", "v4", 1);
        let images = row.next_images(&pair.program);
        row.dumper.dump(&pair.program, &images, &also(&row, &["-R"], &[]).options).expect_success();
        assert_eq!(gates_of(&row, &pair.program, &images), [""; 0], "gates are left");
        pair.finish();
    });

    killed_in_a_dump => |row| filtered(row, killed::stream_in_a_dump);
    killed_in_a_restore => |row| filtered(row, killed::stream_in_a_restore);
}
