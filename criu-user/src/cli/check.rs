//! `criu-ebpf check`.

use std::process::ExitCode;

use clap::Args;
use serde::Serialize;

use super::Outcome;
use crate::check::{self, Demand, Report, Row, Status, features};

/// Everything is tried out, in child processes and namespaces that end with it. Exit status 1 says that a plain dump or
/// restore could not work, or that one of the features asked for is not there.
#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// Ask for one of CRIU's features only (may be given several times): exit status 0 if it is there, else 1
    #[arg(long, value_name = "NAME", conflicts_with_all = ["all", "extra", "experimental"])]
    feature: Vec<String>,
    /// Fail as well where some programs would be refused, or dumped more slowly
    #[arg(long)]
    extra: bool,
    /// Fail as well where something is absent although something else serves
    #[arg(long)]
    experimental: bool,
    /// The same as --extra --experimental
    #[arg(long)]
    all: bool,
    /// Print JSON: `ok`, and `rows` of name, group, status (present, fallback, missing), detail, purpose, fallback, advice
    #[arg(long)]
    json: bool,
    /// Print only what is absent and needed
    #[arg(long)]
    quiet: bool,
}

pub(super) fn run(args: CheckArgs) -> Outcome {
    if !args.feature.is_empty() {
        return ask_for(&args);
    }
    let report = check::run();
    let demand = Demand { extra: args.extra || args.all, experimental: args.experimental || args.all };
    let failing: Vec<&Row> = report.failing(demand).collect();
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print(&report, &failing, args.quiet);
    }
    Ok(status(failing.is_empty()))
}

fn status(good: bool) -> ExitCode {
    if good { ExitCode::SUCCESS } else { ExitCode::from(1) }
}

fn print(report: &Report, failing: &[&Row], quiet: bool) {
    let width = report.rows.iter().map(|row| row.name.len()).max().unwrap_or_default();
    let mut group = "";
    for row in report.rows.iter().filter(|row| !quiet || row.status == Status::Missing) {
        if group != row.group && !quiet {
            group = row.group;
            println!("{group}");
        }
        let (word, name, detail) = (word(row.status), row.name, &row.detail);
        println!("  {word:8} {name:width$}  {}", if detail.is_empty() { row.purpose } else { detail });
        if row.status != Status::Present {
            let indent = " ".repeat(width + 13);
            println!("{indent}for:     {}", row.purpose);
            println!("{indent}instead: {}", row.fallback.unwrap_or("nothing: dumps and restores need it"));
            println!("{indent}to do:   {}", row.advice);
        }
    }
    if failing.is_empty() && !quiet {
        println!("Looks good.");
    } else if report.ok && !failing.is_empty() {
        let names: Vec<&str> = failing.iter().map(|row| row.name).collect();
        println!("Dumps and restores work, but not all that was asked for is there: {}", names.join(", "));
    } else if !report.ok {
        let missing = report.rows.iter().filter(|row| row.status == Status::Missing);
        let names: Vec<&str> = missing.map(|row| row.name).collect();
        println!("Dumps and restores cannot work here. Missing: {}", names.join(", "));
    }
}

fn word(status: Status) -> &'static str {
    match status {
        Status::Present => "ok",
        Status::Fallback => "fallback",
        Status::Missing => "MISSING",
    }
}

/// What `check --feature --json` prints for each feature.
#[derive(Debug, Serialize)]
struct Answered {
    name: &'static str,
    supported: bool,
    detail: String,
}

fn ask_for(args: &CheckArgs) -> Outcome {
    let wanted: Result<Vec<_>, _> = args.feature.iter().map(|name| features::find(name)).collect();
    let wanted = match wanted {
        Ok(wanted) => wanted,
        Err(unknown) => {
            eprintln!("criu-ebpf: {unknown}");
            return Ok(ExitCode::from(2));
        }
    };
    let mut answers = Vec::with_capacity(wanted.len());
    for feature in wanted {
        let (supported, detail) = match (feature.ask)() {
            Ok(_) => (true, feature.unused.map(|why| format!("by the kernel; {why}")).unwrap_or_default()),
            Err(absent) => (false, absent.why),
        };
        answers.push(Answered { name: feature.name, supported, detail });
    }
    if args.json {
        println!("{}", serde_json::json!({ "features": answers }));
    } else {
        for Answered { name, supported, detail } in &answers {
            match (supported, detail.as_str()) {
                (true, "") => println!("{name} is supported"),
                (true, detail) => println!("{name} is supported {detail}"),
                (false, detail) => eprintln!("{name} is not supported: {detail}"),
            }
        }
    }
    Ok(status(answers.iter().all(|answer| answer.supported)))
}
