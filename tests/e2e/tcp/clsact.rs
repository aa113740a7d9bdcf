//! Connections that are held by filters of traffic control, as on kernels without links to interfaces (`--network-lock
//! clsact`).

use std::process::Command;

use serde_json::Value;

use super::*;

fn json(command: &mut Command) -> Value {
    let output = command.output().expect("starting a command");
    let said = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(said.trim()).unwrap_or_default()
}

/// The filters at `lo` that hand packets to a gate which nobody holds any more; 0 for the discipline that filters hang on,
/// where none does.
fn left() -> Vec<u64> {
    let (mut left, mut filters) = (Vec::new(), 0);
    for way in ["ingress", "egress"] {
        let all = json(Command::new("tc").args(["-j", "filter", "show", "dev", "lo", way]));
        for filter in all.as_array().into_iter().flatten() {
            filters += 1;
            let about = &filter["options"];
            if !about["bpf_name"].as_str().is_some_and(|name| name.starts_with("criu-ebpf gate")) {
                continue;
            }
            let number = about["prog"]["id"].as_u64().expect("a program");
            let program = json(Command::new("bpftool").args(["-j", "prog", "show", "id", &number.to_string()]));
            let Some(map) = program["map_ids"][0].as_u64() else { continue };
            let map = json(Command::new("bpftool").args(["-j", "map", "dump", "id", &map.to_string()]));
            // It may be gone meanwhile.
            if map.is_array() && map[0]["value"].as_array().is_none() {
                left.push(number);
            }
        }
    }
    let disciplines = json(Command::new("tc").args(["-j", "qdisc", "show", "dev", "lo"]));
    if filters == 0 && disciplines.as_array().into_iter().flatten().any(|one| one["kind"] == "clsact") {
        left.push(0);
    }
    left
}

/// The same with this lock; afterwards no filter is left that does nothing. (Others are those of tests that run at the
/// same time.)
fn filtered(row: &Row, course: impl Fn(&Row)) {
    let words = ["--network-lock", "clsact"];
    course(&also(row, &words, &words));
    // What a killed engine has left is taken away by somebody else.
    let end = std::time::Instant::now() + Duration::from_secs(5);
    while !left().is_empty() && std::time::Instant::now() < end {
        sleep(Duration::from_millis(20));
    }
    assert_eq!(left(), [0; 0], "filters are left at lo");
}

super::locks::lock_rows! { 90 }
