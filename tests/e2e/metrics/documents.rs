//! docs/metrics.md against what is served.

use std::fs;

use e2e::Workload;

use super::{Session, document, exposition, free_port};

/// Names and types in the document's table.
pub(super) fn documented() -> Vec<(String, String)> {
    let text = fs::read_to_string(document("metrics.md")).expect("docs/metrics.md");
    let row = |line: &str| {
        let cells: Vec<&str> = line.strip_prefix("| `")?.split('|').map(|cell| cell.trim().trim_matches('`')).collect();
        cells.first()?.starts_with("criu_ebpf_").then(|| (cells[0].to_owned(), cells[1].to_owned()))
    };
    text.lines().filter_map(row).collect()
}

/// The document has what is served, and nothing else: names, types, and the words of HELP.
#[test]
fn list_what_is_served() {
    let mut program = Workload::new("threads.c", "many").start();
    let port = free_port();
    let session = Session::start(&program, &["--metrics", &port.to_string()]);
    let text = exposition(port);
    let mut served: Vec<(String, String)> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '))
        .map(|(name, kind)| (name.to_owned(), kind.to_owned()))
        .collect();
    // These are told from the first dump on.
    for late in ["criu_ebpf_last_success_timestamp_seconds", "criu_ebpf_last_freeze_seconds"] {
        assert!(!served.iter().any(|(name, _)| name == late), "{late} before any dump");
        served.push((late.to_owned(), "gauge".to_owned()));
    }
    let mut documented = documented();
    served.sort();
    documented.sort();
    assert_eq!(served, documented);
    let text_of_document = fs::read_to_string(document("metrics.md")).expect("docs/metrics.md");
    for line in text.lines().filter_map(|line| line.strip_prefix("# HELP ")) {
        let (name, help) = line.split_once(' ').expect("words");
        assert!(text_of_document.contains(help), "docs/metrics.md does not say what {name} is: {help}");
    }
    session.stop();
    drop(session);
    program.finish();
}
