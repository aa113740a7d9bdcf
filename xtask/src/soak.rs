//! `cargo xtask soak [--kills N] [--restore-kills N] [--cycles N] [--minutes N]`: the tests that count, for much longer.
//!
//! The end-to-end tests kill the engine some dozens of times and take each program through a few cycles. Here the same
//! tests do it thousands of times, in rounds: a round is a run of the tests with a part of the numbers, so that there is
//! something to see meanwhile and an end when the time is up. The first round that fails ends the soak.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::process::{cargo, engine, run as run_command};

/// One line for the list of tasks.
pub const ABOUT: &str = "kill the engine thousands of times, take programs through hundreds of cycles (as root)";

/// Tests that are run over and over.
#[derive(Debug)]
struct Course {
    /// What the user calls their number.
    option: &'static str,
    /// Names of the tests begin so.
    tests: &'static str,
    /// The variable that tells them how often.
    variable: &'static str,
    /// How often in all, unless the user says otherwise.
    times: u32,
}

const COURSES: [Course; 3] = [
    Course { option: "--kills", tests: "killed::in_a_dump", variable: "E2E_KILLS", times: 10_000 },
    // After each the whole tree is waited for: its tasks notice within a second that they are alone.
    Course { option: "--restore-kills", tests: "killed::in_a_restore", variable: "E2E_KILLS", times: 1_000 },
    Course { option: "--cycles", tests: "programs::", variable: "E2E_CYCLES", times: 200 },
];

/// How many rounds the numbers are spread over.
const ROUNDS: u32 = 20;

/// What the command line asks for.
#[derive(Debug)]
struct Plan {
    /// How often each course is done in all.
    times: [u32; COURSES.len()],
    /// When no further course is begun.
    limit: Duration,
}

impl Plan {
    fn parse(args: &[String]) -> Result<Self> {
        let mut plan = Self { times: COURSES.map(|course| course.times), limit: Duration::from_secs(180 * 60) };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let value = args.next().with_context(|| format!("{arg} needs a number"))?;
            let value: u32 = value.parse().with_context(|| format!("{arg} needs a number, not {value}"))?;
            match COURSES.iter().position(|course| course.option == arg) {
                Some(course) => plan.times[course] = value,
                None if arg == "--minutes" => plan.limit = Duration::from_secs(60 * u64::from(value)),
                None => bail!("{arg}: there are --kills, --restore-kills, --cycles and --minutes"),
            }
        }
        ensure!(plan.times.iter().any(|&times| times > 0), "nothing is asked for");
        Ok(plan)
    }
}

/// What a course has to do in a round, so that all rounds together do it `times` times.
fn share(times: u32, round: u32) -> u32 {
    let upto = |round: u32| u64::from(times) * u64::from(round) / u64::from(ROUNDS);
    (upto(round + 1) - upto(round)) as u32
}

/// Runs the rounds.
pub fn run(args: &[String]) -> Result<()> {
    let plan = Plan::parse(args)?;
    crate::build::run(&[])?;
    let begin = Instant::now();
    let mut done = [0; COURSES.len()];
    'rounds: for round in 0..ROUNDS {
        for (n, course) in COURSES.iter().enumerate() {
            let times = share(plan.times[n], round);
            if times == 0 {
                continue;
            }
            if begin.elapsed() > plan.limit {
                break 'rounds;
            }
            eprintln!("soak: round {} of {ROUNDS}: {} {times} times", round + 1, course.tests);
            let mut tests = cargo();
            tests.env("CRIU_EBPF_BIN", engine()).env(course.variable, times.to_string());
            tests.args(["test", "--quiet", "--package", "e2e", "--tests", "--", "--test-threads=2", course.tests]);
            run_command(&mut tests).with_context(|| format!("after {}", summary(&done, begin)))?;
            done[n] += times;
        }
    }
    eprintln!("soak: {}; nothing failed", summary(&done, begin));
    ensure!(done == plan.times, "the time was up before all was done; --minutes gives it more");
    Ok(())
}

fn summary(done: &[u32], begin: Instant) -> String {
    let parts: Vec<_> =
        COURSES.iter().zip(done).map(|(course, times)| format!("{} {times} times", course.tests)).collect();
    format!("{} in {:.0?}, each test of a name", parts.join(", "), begin.elapsed())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rounds_together_do_all() {
        for times in [0, 1, 19, 20, 21, 10_000] {
            assert_eq!((0..ROUNDS).map(|round| share(times, round)).sum::<u32>(), times);
        }
    }

    #[test]
    fn options_are_numbers_with_a_name() {
        let parse = |words: &[&str]| Plan::parse(&words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>());
        let plan = parse(&["--cycles", "7", "--minutes", "2"]).expect("a plan");
        assert_eq!((plan.times, plan.limit), ([10_000, 1_000, 7], Duration::from_secs(120)));
        for wrong in [&["--kills"][..], &["--kills", "many"], &["--more", "1"]] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
