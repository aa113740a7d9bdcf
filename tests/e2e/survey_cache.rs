//! What is read before the freeze and believed in it: nothing that is not so any more.

use e2e::{Claim, Engine, Look, Options, Program, Row, Survey, Workload, reaper, rows};

/// A number from the line of a dump's log that tells of the survey.
fn told(images: &std::path::Path, name: &str) -> u64 {
    number(images, "the tree is surveyed", name)
}

/// How many connections were as they had told before the freeze, and how many were asked again.
fn connections(images: &std::path::Path) -> [u64; 2] {
    ["hits", "misses"].map(|name| number(images, "connections were asked before the freeze", name))
}

/// A number from a line of a dump's log.
fn number(images: &std::path::Path, line: &str, name: &str) -> u64 {
    let log = std::fs::read_to_string(images.join("dump.log")).expect("a log");
    let line = log.lines().find(|known| known.contains(line)).expect("such a line");
    let number = line.split(&format!("{name}=")).nth(1).and_then(|rest| rest.split_whitespace().next());
    number.and_then(|number| number.parse().ok()).expect("a number")
}

fn by_ebpf(row: &Row) -> bool {
    row.dumper == Engine::Ours(Survey::Ebpf) && !row.dumper.is_peer()
}

/// Dumps of a program that runs on, each with what was believed compared with the truth, until some connections were as they
/// had been and some were not.
fn dumps_that_notice(row: &Row, program: &Program) {
    let row = row.with(Options::dump(&["-R", "--verify-cache", "--tcp-established"]));
    let (mut dumps, mut found) = (0, [0, 0]);
    while dumps < 5 || by_ebpf(&row) && dumps < 100 && found.contains(&0) {
        dumps += 1;
        let images = row.next_images(program);
        row.dumper.dump(program, &images, &row.options).expect_success();
        let [hits, misses] = connections(&images);
        found = [found[0] + hits, found[1] + misses];
    }
    assert_eq!(found.contains(&0), !by_ebpf(&row), "hits and misses: {found:?}");
}

rows! {
    /// Many connections are not asked for their options in the freeze if nobody touches them.
    connections_that_stay => |row| {
        let row = row.with(Options::both(&["--tcp-established"]));
        let mut program = Workload::new("inet.py", "options_that_stay").with(Claim::Ports).start();
        let images = row.dump(&program);
        assert_eq!(connections(&images), if by_ebpf(&row) { [80, 0] } else { [0, 0] });
        row.restore(&program, &images);
        program.finish();
    };

    connections_that_change => |row| {
        let mut program = Workload::new("inet.py", "options_that_change").with(Claim::Ports).start();
        dumps_that_notice(row, &program);
        let row = row.with(Options::both(&["--tcp-established"]));
        let images = row.dump(&program);
        row.restore(&program, &images);
        program.finish();
    };

    connections_that_others_change => |row| {
        let mut program = Workload::new("inet.py", "options_changed_by_others").with(Claim::Ports).start();
        dumps_that_notice(row, &program);
        program.finish();
    };

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
