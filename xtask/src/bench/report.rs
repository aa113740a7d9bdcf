//! The report: tables in Markdown, with what they were measured on.

use std::{fmt::Write, fs, process::Command, time::Duration};

use super::{
    Outcome, Row,
    sample::{Contender, Sample},
};

/// One thing that is compared.
struct Measure {
    title: &'static str,
    explanation: &'static str,
    value: fn(&Sample) -> f64,
    show: fn(f64) -> String,
}

/// What is compared, in the order of the tables.
const MEASURES: &[Measure] = &[
    Measure {
        title: "Frozen",
        explanation: "For how long the program stood still in a dump that left it running, as it saw it by the time of day.",
        value: |sample| sample.frozen.as_secs_f64(),
        show: show_time,
    },
    Measure {
        title: "Dump",
        explanation: "From the start of the engine to its end, for a dump that ends the program.",
        value: |sample| sample.dump.as_secs_f64(),
        show: show_time,
    },
    Measure {
        title: "Restore",
        explanation: "From the start of the engine to its end; then the program runs.",
        value: |sample| sample.restore.as_secs_f64(),
        show: show_time,
    },
    Measure {
        title: "Images",
        explanation: "All image files together.",
        value: |sample| sample.image_bytes as f64,
        show: |bytes| show_size(bytes),
    },
    Measure {
        title: "Peak memory, dump",
        explanation: "The engine's peak resident memory.",
        value: |sample| sample.dump_kib as f64 * 1024.0,
        show: |bytes| show_size(bytes),
    },
    Measure {
        title: "Peak memory, restore",
        explanation: "The same for the restore.",
        value: |sample| sample.restore_kib as f64 * 1024.0,
        show: |bytes| show_size(bytes),
    },
];

/// The whole report.
pub fn write(contenders: &[Contender; 2], measured: &[(&Row, [Outcome; 2])], rounds: usize) -> String {
    let mut text = format!(
        "# Bench\n\nMade by `cargo xtask bench` on {}. Medians of {rounds} rounds in which both engines took their turns on \
         the same programs; after each restore the program checked all its memory, threads, children and descriptors.\n\n\
         Machine: {}.\n\nTracking, dumps after pre-dumps and live dumps: [bench-tracking.md](bench-tracking.md). Connections: \
         [tcp.md](tcp.md#many-connections).\n",
        today(),
        machine()
    );
    let [ours, peer] = contenders;
    for measure in MEASURES {
        let _ = writeln!(text, "\n## {}\n\n{}\n", measure.title, measure.explanation);
        let _ = writeln!(text, "| row | {} | {} | ratio |\n| --- | ---: | ---: | ---: |", ours.name, peer.name);
        for (row, [our_outcome, peer_outcome]) in measured {
            let (our_median, peer_median) = (median(our_outcome, measure), median(peer_outcome, measure));
            let show = |value: Option<f64>| value.map_or_else(|| "fails".to_owned(), measure.show);
            let ratio = our_median.zip(peer_median).map(|(ours, theirs)| format!("{:.2}", ours / theirs));
            let ratio = ratio.unwrap_or_else(|| "–".to_owned());
            let _ = writeln!(text, "| {} | {} | {} | {ratio} |", row.title, show(our_median), show(peer_median));
        }
    }
    let failures: Vec<String> = measured
        .iter()
        .flat_map(|(row, outcomes)| contenders.iter().zip(outcomes).map(move |(who, outcome)| (row, who, outcome)))
        .filter_map(|(row, who, outcome)| {
            outcome.failure.as_ref().map(|reason| format!("* {} with {}: `{reason}`\n", row.title, who.name))
        })
        .collect();
    if !failures.is_empty() {
        let _ = write!(text, "\n## What fails\n\n{}", failures.concat());
    }
    text
}

/// The middle of what the rounds measured; nothing if one of them failed.
fn median(outcome: &Outcome, measure: &Measure) -> Option<f64> {
    let mut values: Vec<f64> = outcome.samples.iter().map(measure.value).collect();
    values.sort_by(f64::total_cmp);
    let middle = values.get(values.len() / 2).copied();
    if outcome.failure.is_some() { None } else { middle }
}

fn show_time(seconds: f64) -> String {
    format!("{:.1?}", Duration::from_secs_f64(seconds))
}

fn show_size(bytes: f64) -> String {
    if bytes < 1048576.0 { format!("{:.0} KiB", bytes / 1024.0) } else { format!("{:.1} MiB", bytes / 1048576.0) }
}

/// Processor, memory and kernel.
pub fn machine() -> String {
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ").map(|(_, name)| name));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = memory.lines().next().and_then(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok());
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!(
        "{}, {cores} processors, {:.0} GiB of memory, Linux {}",
        model.unwrap_or("unknown processor"),
        kib.unwrap_or_default() / 1048576.0,
        kernel.trim()
    )
}

/// The date.
pub fn today() -> String {
    first_word_of(Command::new("date").args(["-u", "+%F"]))
}

fn first_word_of(command: &mut Command) -> String {
    let out = command.output().map(|out| out.stdout).unwrap_or_default();
    String::from_utf8_lossy(&out).split_whitespace().next().unwrap_or("an unknown day").to_owned()
}
