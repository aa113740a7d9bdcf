//! Clients of TCP servers that nobody has accepted: the server is moved, and accepts them afterwards.

use e2e::{Options, Row, Survey, Workload, rows};

use crate::net::Network;
use crate::tcp::{Pair, also, gates_of, kept, look_at_both, move_once, script};

fn some(family: &str) -> Pair {
    Pair::of("clients.py", "some", &[("E2E_FAMILY", family)])
}

fn moved(row: &Row, family: &str) {
    let pair = some(family);
    move_once(&kept(row), &pair.program);
    pair.finish();
}

/// They wait all the longer.
fn moved_twice(row: &Row) {
    let pair = some("v4");
    move_once(&kept(row), &pair.program);
    move_once(&kept(row), &pair.program);
    pair.finish();
}

/// A receive buffer that the program has chosen, with as much in it as goes in.
fn small_buffer(row: &Row) {
    let pair = Pair::of("clients.py", "some", &[("E2E_BUFFER", "20000")]);
    move_once(&kept(row), &pair.program);
    pair.finish();
}

fn many(row: &Row) {
    let pair = Pair::of("clients.py", "many", &[("E2E_CLIENTS", "300")]);
    move_once(&kept(row), &pair.program);
    pair.finish();
}

/// A program that runs on has its clients as it had them.
fn left_running(row: &Row, how: &[&str]) {
    let pair = some("v4");
    let running = also(&kept(row), how, &[]);
    let images = running.next_images(&pair.program);
    running.dumper.dump(&pair.program, &images, &running.options).expect_success();
    assert_eq!(gates_of(row, &pair.program, &images), [""; 0], "gates are left");
    pair.finish();
}

/// A restore that fails when they are there again leaves them to the next one.
fn second_restore(row: &Row) {
    let row = kept(row);
    let pair = some("v4");
    let images = row.dump(&pair.program);
    let script = script(&pair.program, "[ $CRTOOLS_SCRIPT_ACTION != post-restore ]");
    let failing = also(&row, &[], &["--action-script", script.to_str().expect("a path")]);
    row.restorer.restore(&images, &failing.options).expect_refusal("gate");
    row.restore(&pair.program, &images);
    pair.finish();
}

/// The server has not heard of them yet.
fn deferred(row: &Row, family: &str) {
    let pair = Pair::of("clients.py", "deferred", &[("E2E_FAMILY", family)]);
    move_once(&kept(row), &pair.program);
    pair.finish();
}

/// They may be dropped, at the dump or at the restore; without a word about connections nothing is done.
fn dropped(row: &Row) {
    let pair = some("v4");
    let images = row.next_images(&pair.program);
    row.dumper.dump(&pair.program, &images, &row.options).expect_refusal("skip-in-flight");
    let images = kept(row).dump(&pair.program);
    row.restorer.restore(&images, &row.options).expect_refusal("--tcp-established");
    let skipping = row.with(Options { restore: vec!["--skip-in-flight".into()], ..Options::default() });
    skipping.restore(&pair.program, &images);
    let skipping = row.with(Options { dump: vec!["--skip-in-flight".into()], ..Options::default() });
    move_once(&skipping, &pair.program);
}

/// What `criu-ebpf tcp` says of them, in the program and in its images.
fn shown(row: &Row) {
    look_at_both(row, some("v4"), |said| {
        assert_eq!(said.matches(r#""accepted":false"#).count(), 6, "{said}");
        let parts = [
            r#""state":"CloseWait","accepted":false,"received":8"#,
            r#""state":"Close","accepted":false,"received":4"#,
        ];
        parts.iter().for_each(|part| assert!(said.contains(part), "no {part} in {said}"));
    });
}

fn refused(row: &Row, case: &str, reason: &str) {
    kept(row).refused(&Workload::new("clients.py", case), reason);
}

rows! {
    table => shown;
    in_one_tree => |row| kept(row).check(&Workload::new("clients.py", "both_ends"));
    urgent_data => |row| refused(row, "urgent", "has sent urgent data");
    at_one_interface => |row| refused(row, "at_one_interface", "at one interface alone");
    of_mptcp => |row| refused(row, "of_mptcp", "MPTCP");
    v4 => |row| moved(row, "v4");
    v6 => |row| moved(row, "v6");
    mapped => |row| moved(row, "mapped");
    twice => moved_twice;
    deferred_v4 => |row| deferred(row, "v4");
    deferred_v6 => |row| deferred(row, "v6");
    deferred_mapped => |row| deferred(row, "mapped");
    with_a_small_buffer => small_buffer;
    many_of_them => many;
    runs_on => |row| left_running(row, &["--leave-running"]);
    runs_on_after_a_live_dump => |row| left_running(row, &["--leave-running", "--live"]);
    restore_that_fails => second_restore;
    may_be_dropped => dropped;
}

/// Their clients are in a network namespace of their own, at the other end of a cable.
mod remote {
    use super::*;

    fn moved(network: &Network, family: &str, environment: &[(&str, &str)]) {
        let pair = Pair::across(network, ["clients.py", "some"], family, 1, [environment; 2]);
        move_once(&kept(&Row::ours(Survey::Ebpf)), &pair.program);
        pair.finish();
    }

    /// With and without what two ends may agree on.
    fn whatever_was_agreed_on(number: u8, family: &str) {
        let network = Network::new(number);
        let options = ["timestamps", "sack", "window_scaling"];
        for without in [&options[..], &options[..1], &options[1..2], &options[2..], &[]] {
            for option in options {
                network.set(&format!("net.ipv4.tcp_{option}"), if without.contains(&option) { "0" } else { "1" });
            }
            moved(&network, family, &[]);
        }
    }

    #[test]
    fn v4() {
        whatever_was_agreed_on(70, "v4");
    }

    #[test]
    fn v6() {
        whatever_was_agreed_on(71, "v6");
    }

    /// One that has asked, and has not heard the answer.
    fn asking(number: u8, family: &str) {
        let network = Network::new(number);
        network.lose_answers();
        let row = Row::ours(Survey::Ebpf).with(Options {
            dump: ["--tcp-established", "--lock-listeners"].map(Into::into).into(),
            restore: vec!["--tcp-established".into()],
            ..Options::default()
        });
        let pair = Pair::across(&network, ["clients.py", "asking"], family, 1, [&[], &[]]);
        let images = row.dump(&pair.program);
        network.find_answers();
        row.restore(&pair.program, &images);
        pair.finish();
    }

    #[test]
    fn asking_v4() {
        asking(74, "v4");
    }

    #[test]
    fn asking_v6() {
        asking(75, "v6");
    }

    /// A reset that is lost is not sent again, so nobody sends one.
    #[test]
    fn over_a_lossy_link() {
        let network = Network::lossy(72);
        moved(&network, "v4", &[("E2E_WITHOUT", "reset")]);
    }

    /// Congestion is told, not guessed (ECN).
    #[test]
    fn with_congestion_notification() {
        let network = Network::new(73);
        network.set("net.ipv4.tcp_ecn", "1");
        moved(&network, "v4", &[]);
    }
}
