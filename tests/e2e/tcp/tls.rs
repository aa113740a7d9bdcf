//! Connections that the kernel encrypts. Where it does not, `check` has to say so.

use std::process::Command;
use std::sync::OnceLock;

use e2e::{Engine, Survey};
use serde_json::Value;

use super::*;

/// Whether the kernel does, by a socket of a program's; `check` says the same.
fn is_there() -> bool {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    *KNOWN.get_or_init(ask)
}

fn ask() -> bool {
    let mut program = Workload::new("tls.py", "is_there").start();
    let is_there = program.log().lines().any(|line| line == "it is");
    program.finish();
    let output = Command::new(Engine::Ours(Survey::Ebpf).binary()).args(["check", "--json"]).output();
    let report: Value = serde_json::from_slice(&output.expect("starting the engine").stdout).expect("a report");
    let row = report["rows"].as_array().into_iter().flatten().find(|row| row["name"] == "tls").expect("a row");
    assert_eq!(row["status"] == "present", is_there, "what check says of TLS: {row}");
    is_there
}

fn pair(case: &str, cipher: &str, family: &str) -> Pair {
    Pair::of("tls.py", case, &[("E2E_FAMILY", family), ("E2E_CIPHER", cipher)])
}

fn moved(row: &Row, case: &str, cipher: &str, family: &str) {
    if !is_there() {
        return;
    }
    let pair = pair(case, cipher, family);
    for _ in 0..3 {
        move_once(&kept(row), &pair.program);
    }
    pair.finish();
}

fn refused(row: &Row, case: &str, reason: &str) {
    if is_there() {
        let pair = pair(case, "tls12-aes128", "v4");
        let images = row.next_images(&pair.program);
        row.dumper.dump(&pair.program, &images, &kept(row).options).expect_refusal(reason);
        pair.finish();
    }
}

/// The peer says something between dump and restore.
fn meanwhile(row: &Row) {
    if !is_there() {
        return;
    }
    let row = kept(row);
    let mut pair = pair("meanwhile", "tls13-aes256", "v4");
    let images = row.dump(&pair.program);
    pair.peer.next();
    row.restore(&pair.program, &images);
    pair.finish();
}

/// What `criu-ebpf tcp` says of one, and of its images.
fn shown(row: &Row) {
    if is_there() {
        look_at_both(row, pair("both_ways", "tls13-chacha", "v4"), |said| {
            assert!(said.contains(r#""refused":null"#), "{said}");
        });
    }
}

rows! {
    tls12 => |row| moved(row, "both_ways", "tls12-aes128", "v4");
    tls13 => |row| moved(row, "both_ways", "tls13-aes256", "v6");
    chacha => |row| moved(row, "both_ways", "tls13-chacha", "mapped");
    one_way => |row| moved(row, "one_way", "tls13-aes256", "v4");
    begun_record => |row| moved(row, "begun", "tls12-aes128", "v4");
    while_away => meanwhile;
    unread_record => |row| refused(row, "unread_record", "was not read yet");
    record_read_in_part => |row| refused(row, "read_in_part", "was not read yet");
    in_the_table => shown;
}
