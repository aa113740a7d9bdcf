//! The engine is killed at random moments: a dump that dies harms nobody, a restore that dies leaves nothing behind.
//!
//! `E2E_KILLS` says how often (25 times if it does not).

use std::{
    env,
    ffi::OsString,
    time::{Duration, SystemTime},
};

use e2e::{Engine, Look, Options, Workload, proc, reaper, rows};

/// How often the engine is killed in each test.
pub(crate) fn kills() -> u32 {
    env::var("E2E_KILLS").map_or(25, |text| text.parse().expect("E2E_KILLS is a number"))
}

/// Numbers that are different in every run, and known when it fails.
pub(crate) struct Moments(u64);

impl Moments {
    pub(crate) fn new() -> Self {
        let seed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_nanos() as u64;
        println!("seed {seed}");
        Self(seed)
    }

    /// Somewhere between the start and a bit more than `whole`.
    pub(crate) fn within(&mut self, whole: Duration) -> Duration {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        whole.mul_f64((self.0 >> 33) as f64 / f64::from(1u32 << 31) * 1.1)
    }
}

/// How long runs take at whose moments the engine is killed. The first may have been a slow one: each that ends before it
/// was to be killed makes it shorter, and each that was killed longer again.
pub(crate) struct Span {
    now: Duration,
    first: Duration,
}

impl Span {
    pub(crate) fn new(first: Duration) -> Self {
        Self { now: first, first }
    }

    /// Starts the engine, and kills it at some moment unless it has ended by then. Says whether it was killed.
    pub(crate) fn kill(&mut self, engine: Engine, words: &[OsString], moments: &mut Moments) -> bool {
        let life = moments.within(self.now);
        let killed = engine.killed_after(words, life);
        self.now = if killed { self.now.mul_f32(1.05).min(self.first) } else { life };
        killed
    }
}

/// Waits until nothing of a killed engine holds the program any more.
pub(crate) fn wait_unharmed(program: &e2e::Program) {
    for _ in 0..1000 {
        let stopped = |&pid: &i32| {
            let traced = proc::status(pid).get("TracerPid").is_some_and(|tracer| tracer != "0");
            traced || proc::stat(pid).is_none_or(|(state, _)| "tTZ".contains(state))
        };
        if !program.tree().iter().any(stopped) {
            return;
        }
        std::thread::sleep(reaper::POLL);
    }
    let told = |&pid: &i32| {
        let status = proc::status(pid);
        let field = |name: &str| status.get(name).cloned().unwrap_or_default();
        format!("pid {pid}: {}, traced by {}, {}", field("State"), field("TracerPid"), proc::threads(pid).len())
    };
    let states: Vec<String> = program.tree().iter().map(told).collect();
    panic!("the program is still stopped or traced: {states:?}");
}

rows! {
    /// The program checks itself all the time; it must not notice anything, and a dump afterwards works.
    in_a_dump => |row| {
        let running = row.with(Options::dump(&["-R"]));
        let mut program = Workload::new("unharmed.c", "everything").start();
        let images = running.next_images(&program);
        let mut span = Span::new(running.dumper.dump(&program, &images, &running.options).expect_success().took);
        let before = Look::at(&program);
        let mut moments = Moments::new();
        let mut killed = 0;
        for _ in 0..kills() {
            let images = running.next_images(&program);
            std::fs::create_dir_all(&images).expect("creating a directory");
            let words = running.dumper.dump_words(&program, &images, &running.options);
            killed += u32::from(span.kill(running.dumper, &words, &mut moments));
            wait_unharmed(&program);
        }
        assert!(killed > 0, "the engine was always faster than its end");
        std::thread::sleep(Duration::from_millis(50));
        before.compare(&Look::at(&program));
        let tree = program.tree();
        let images = row.next_images(&program);
        row.dumper.dump(&program, &images, &row.options).expect_success();
        program.expect_gone(&tree);
        row.restore(&program, &images);
        program.finish();
    };

    /// Everything that was spawned is gone, and the next restore works.
    in_a_restore => |row| {
        let mut program = Workload::new("tree.py", "family").start();
        let tree = program.tree();
        let images = row.dump(&program);
        let mut span = Span::new(row.restore(&program, &images).outcome.took);
        reaper::kill_trees([program.pid()]);
        program.expect_gone(&tree);
        let mut moments = Moments::new();
        let mut killed = 0;
        for _ in 0..kills() {
            let words = row.restorer.restore_words(&images, &row.options);
            if span.kill(row.restorer, &words, &mut moments) {
                killed += 1;
                // Killed after its last word it has done its work: then the tree runs.
                let left = reaper::wait_gone(&tree, Duration::from_secs(10));
                let complete = images.join("pid").exists() && left == tree;
                let states: Vec<_> = left.iter().map(|&pid| (pid, proc::stat(pid), proc::status(pid))).collect();
                assert!(left.is_empty() || complete, "left over from a killed restore: {states:?}");
            }
            reaper::kill_trees([program.pid()]);
            program.expect_gone(&tree);
        }
        assert!(killed > 0, "the engine was always faster than its end");
        row.restore(&program, &images);
        program.finish();
    };
}
