//! What is read before the freeze and believed in it: nothing that is not so any more.

use e2e::{Engine, Look, Options, Row, Survey, Workload, reaper, rows};

/// A number from the line of a dump's log that tells of the survey.
fn told(images: &std::path::Path, name: &str) -> u64 {
    let log = std::fs::read_to_string(images.join("dump.log")).expect("a log");
    let line = log.lines().find(|line| line.contains("the tree is surveyed")).expect("a survey");
    let number = line.split(&format!("{name}=")).nth(1).and_then(|rest| rest.split_whitespace().next());
    number.and_then(|number| number.parse().ok()).expect("a number")
}

fn by_ebpf(row: &Row) -> bool {
    row.dumper == Engine::Ours(Survey::Ebpf) && !row.dumper.is_peer()
}

rows! {
    /// A large map that stays as it is is not read again.
    that_stays => |row| {
        let mut program = Workload::new("bench.c", "areas").arg("2000").start();
        let before = Look::settled(&program);
        let images = row.dump(&program);
        row.restore(&program, &images);
        before.compare(&Look::at(&program));
        assert_eq!(told(&images, "hits"), u64::from(by_ebpf(row)));
        assert_eq!(told(&images, "misses"), 0);
        program.next();
        program.finish();
    };

    /// One that changes all the time is, and what changes in between is found.
    that_changes => |row| {
        let row = row.with(Options::dump(&["-R", "--verify-cache"]));
        let mut program = crate::track::writes("fresh").start();
        let (mut dumps, mut hits, mut misses) = (0, 0, 0);
        // From the reading ahead to the freeze takes a fraction of what is between two changes: one dump in five notices.
        while dumps < 20 || misses == 0 && dumps < 200 && by_ebpf(&row) {
            dumps += 1;
            let images = row.next_images(&program);
            row.dumper.dump(&program, &images, &row.options).expect_success();
            hits += told(&images, "hits");
            misses += told(&images, "misses");
        }
        if by_ebpf(&row) {
            // A map that is being changed at the very moment of reading is not kept: neither the one nor the other.
            assert!((dumps / 2..=dumps).contains(&(hits + misses)), "{hits} hits and {misses} misses of {dumps}");
            println!("{hits} hits and {misses} misses of {dumps}");
            assert!(misses > 0, "it maps memory every other millisecond, and nobody has noticed");
        }
        let images = row.next_images(&program);
        row.dumper.dump(&program, &images, &row.options).expect_success();
        let tree = program.tree();
        reaper::kill_trees([program.pid()]);
        program.expect_gone(&tree);
        row.restore(&program, &images);
        program.finish();
    };

    /// A tree of them, each with its own.
    of_a_tree => |row| {
        let row = row.with(Options { dump: vec!["--verify-cache".into()], ..Options::default() });
        let mut program = Workload::new("tree.py", "family").start();
        let processes = program.tree().len() as u64;
        let before = Look::settled(&program);
        let images = row.dump(&program);
        if by_ebpf(&row) {
            assert!((1..=processes).contains(&told(&images, "hits")));
        }
        row.restore(&program, &images);
        before.compare(&Look::at(&program));
        program.finish();
    };
}
