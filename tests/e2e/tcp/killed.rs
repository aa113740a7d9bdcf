//! The engine is killed at random moments: the connection lives on, in the program that was to be dumped or in the one
//! that a second restore brings back.

use std::time::Instant;

use e2e::{proc, reaper};

use super::*;
use crate::killed::{Moments, Span, kills, wait_unharmed};

/// Waits until more of the stream has passed, both ways.
fn wait_for_progress(pair: &Pair) {
    let progress = || fs::read_to_string(pair.program.file("progress")).ok()?.parse::<u64>().ok();
    let (before, end) = (progress(), Instant::now() + Duration::from_secs(20));
    while progress() <= before {
        assert!(Instant::now() < end, "the stream stands still at {before:?}\n{}", said(pair));
        sleep(Duration::from_millis(5));
    }
}

fn said(pair: &Pair) -> String {
    [&pair.program, &pair.peer].map(|p| fs::read_to_string(p.file("out")).unwrap_or_default()).join("peer: ")
}

fn runs(program: &Program) -> bool {
    proc::stat(program.pid()).is_some_and(|(state, _)| state != 'Z')
}

/// Whether it runs on after its engine was killed. Who has gone on without the engine may have told it to die, and it may
/// take its time.
fn lives_on(program: &Program) -> bool {
    const SIGKILL: u64 = 1 << (9 - 1);
    /// PF_EXITING of include/linux/sched.h, and where flags are behind the state in /proc/PID/stat.
    const EXITING: i64 = 4;
    const FLAGS: usize = 5;
    let is_told = || {
        let status = fs::read_to_string(format!("/proc/{}/status", program.pid())).unwrap_or_default();
        let pending = status.lines().filter_map(|line| line.strip_prefix("SigPnd:").or(line.strip_prefix("ShdPnd:")));
        pending.filter_map(|set| u64::from_str_radix(set.trim(), 16).ok()).any(|set| set & SIGKILL != 0)
    };
    let is_ending = || proc::stat(program.pid()).is_some_and(|(_, fields)| fields[FLAGS] & EXITING != 0);
    for _ in 0..2 {
        while runs(program) && (is_told() || is_ending()) {
            sleep(Duration::from_millis(1));
        }
        // Between the one and the other.
        sleep(Duration::from_millis(10));
    }
    reaper::try_reap(program.pid());
    runs(program)
}

fn wait_for_no_gate(row: &Row, pair: &Pair, images: &Path) {
    for _ in 0..100 {
        if gates_of(row, &pair.program, images).is_empty() {
            return;
        }
        sleep(Duration::from_millis(10));
    }
    panic!("the program runs, and its gate is closed: {:?}", gates_of(row, &pair.program, images));
}

/// `goes_on` is how it is seen that the connection does, if it is seen before the end.
fn in_a_dump(row: &Row, pair: Pair, goes_on: fn(&Pair)) {
    let row = kept(row);
    let images = row.next_images(&pair.program);
    let whole = row.dumper.dump(&pair.program, &images, &row.options).expect_success().took;
    let mut span = Span::new(whole.mul_f32(1.3));
    pair.program.expect_gone(&[pair.program.pid()].into());
    row.restore(&pair.program, &images);
    let mut moments = Moments::new();
    let mut restored = 0;
    for _ in 0..kills() {
        goes_on(&pair);
        let images = row.next_images(&pair.program);
        fs::create_dir_all(&images).expect("creating a directory");
        let words = row.dumper.dump_words(&pair.program, &images, &row.options);
        span.kill(row.dumper, &words, &mut moments);
        if lives_on(&pair.program) {
            wait_unharmed(&pair.program);
            assert_eq!(gates_of(&row, &pair.program, &images), [""; 0], "the program runs, and its gate is closed");
        } else {
            pair.program.expect_gone(&[pair.program.pid()].into());
            row.restore(&pair.program, &images);
            restored += 1;
        }
    }
    println!("{restored} of {} dumps were complete", kills());
    goes_on(&pair);
    pair.finish();
}

fn in_a_restore(row: &Row, pair: Pair, goes_on: fn(&Pair)) {
    let row = kept(row);
    let images = row.dump(&pair.program);
    let mut span = Span::new(row.restore(&pair.program, &images).outcome.took);
    let mut moments = Moments::new();
    for kill in 0..kills() {
        goes_on(&pair);
        let images = row.dump(&pair.program);
        let words = row.restorer.restore_words(&images, &row.options);
        span.kill(row.restorer, &words, &mut moments);
        let alive = lives_on(&pair.program);
        println!("after kill {kill}: the program {}", if alive { "runs" } else { "is gone" });
        if alive {
            // All but the last step was done, and that is done by somebody else.
            wait_for_no_gate(&row, &pair, &images);
        } else {
            pair.program.expect_gone(&[pair.program.pid()].into());
            row.restore(&pair.program, &images);
        }
    }
    goes_on(&pair);
    pair.finish();
}

pub(super) fn stream_in_a_dump(row: &Row) {
    in_a_dump(row, Pair::start("endless", "v4", 1), wait_for_progress);
}

pub(super) fn stream_in_a_restore(row: &Row) {
    in_a_restore(row, Pair::start("endless", "v4", 1), wait_for_progress);
}

/// Clients that wait to be accepted, from the first kill to the last.
fn clients() -> Pair {
    Pair::of("clients.py", "some", &[])
}

rows! {
    dump => stream_in_a_dump;
    restore => stream_in_a_restore;
    dump_with_clients => |row| in_a_dump(row, clients(), |_| {});
    restore_with_clients => |row| in_a_restore(row, clients(), |_| {});
}
