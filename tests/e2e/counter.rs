//! A single program that counts: the shortest way through everything.

use e2e::{Options, Workload, interop_rows, rows, workload_rows};

workload_rows! { "counter.py"; counter }

rows! {
    again => |row| {
        let mut program = Workload::new("counter.py", "again").start();
        for _ in 0..2 {
            row.cycle(&program);
            program.next();
        }
        row.cycle(&program);
        program.finish();
    };

    /// The images stay as they are: the same state comes back as often as one likes.
    restored_twice_from_the_same_images => |row| {
        let mut program = Workload::new("counter.py", "counter").start();
        let images = row.dump(&program);
        row.restore(&program, &images);
        let tree = program.tree();
        e2e::reaper::kill_trees([program.pid()]);
        program.expect_gone(&tree);
        row.restore(&program, &images);
        program.finish();
    };

    /// `-R`: nothing happens to the program, and the images are good all the same.
    left_running => |row| {
        let row = row.with(Options::dump(&["-R"]));
        let mut program = Workload::new("counter.py", "counter").start();
        let images = row.next_images(&program);
        row.dumper.dump(&program, &images, &row.options).expect_success();
        assert!(e2e::proc::exists(program.pid()), "gone in spite of -R");
        let tree = program.tree();
        e2e::reaper::kill_trees([program.pid()]);
        program.expect_gone(&tree);
        row.restore(&program, &images);
        program.finish();
    };

    /// An ordinary program that knows nothing of tests: `sleep` ends when its time is over, not before.
    sleeping => |row| {
        let program_start = std::time::Instant::now();
        let program = Workload::program(&["/usr/bin/sleep", "2"]).start();
        std::thread::sleep(std::time::Duration::from_millis(200));
        row.cycle(&program);
        assert!(matches!(program.wait_exit(), nix::sys::wait::WaitStatus::Exited(_, 0)));
        assert!(program_start.elapsed() >= std::time::Duration::from_secs(2), "sleep 2 was cut short");
    };
}

mod interop {
    super::interop_rows! { "counter.py"; counter }
}
