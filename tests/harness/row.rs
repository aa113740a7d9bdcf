//! One row of what has to be carried over: the course of a test, and the macros that make tests of it.

use std::{cell::Cell, collections::BTreeMap, time::Duration};

use crate::{Engine, Options, Program, Restored, Survey, Workload, engine::adopt, proc};

/// Who dumps and who restores, with which options.
#[derive(Debug)]
pub struct Row {
    /// Who dumps.
    pub dumper: Engine,
    /// Who restores.
    pub restorer: Engine,
    /// What is said to them.
    pub options: Options,
    /// How many dumps were made: each has a directory of its own.
    dumps: Cell<u32>,
}

impl Row {
    /// Our engine on both sides.
    pub fn ours(survey: Survey) -> Self {
        Self::between(Engine::Ours(survey), Engine::Ours(survey))
    }

    /// Any two engines.
    pub fn between(dumper: Engine, restorer: Engine) -> Self {
        Self { dumper, restorer, options: Options::default(), dumps: Cell::new(0) }
    }

    /// The same with further options.
    pub fn with(&self, options: Options) -> Self {
        Self { dumper: self.dumper, restorer: self.restorer, options, dumps: Cell::new(0) }
    }

    /// The usual course: start, dump, be gone, restore, check from inside.
    pub fn check(&self, workload: &Workload) {
        let mut program = workload.start();
        self.cycle(&program);
        program.finish();
    }

    /// The same for programs that change all the time by themselves: nothing is compared from outside.
    pub fn check_from_inside(&self, workload: &Workload) {
        let mut program = workload.start();
        let images = self.dump(&program);
        self.restore(&program, &images);
        program.finish();
    }

    /// Dumps, makes sure that every process is gone, restores, and compares what can be seen from outside: the
    /// processes and threads, their mappings, and their descriptors.
    pub fn cycle(&self, program: &Program) -> Restored {
        let before = Look::settled(program);
        let images = self.dump(program);
        let restored = adopt(program, &images, self.restorer.restore(&images, &self.options));
        // A thread that waits in sigsuspend(2) has its own mask again until it waits again.
        before.expect_again(program);
        restored
    }

    /// The first half of a cycle; gives back where the images are.
    pub fn dump(&self, program: &Program) -> std::path::PathBuf {
        let tree = program.tree();
        let images = self.next_images(program);
        self.dumper.dump(program, &images, &self.options).expect_success();
        program.expect_gone(&tree);
        images
    }

    /// The second half of a cycle.
    pub fn restore(&self, program: &Program, images: &std::path::Path) -> Restored {
        adopt(program, images, self.restorer.restore(images, &self.options))
    }

    /// A dump that must be refused for `reason`, after which the program must be unharmed.
    pub fn refused(&self, workload: &Workload, reason: &str) {
        let mut program = workload.start();
        let before = Look::at(&program);
        let images = self.next_images(&program);
        self.dumper.dump(&program, &images, &self.options).expect_refusal(reason);
        assert!(!images.join("inventory.img").exists(), "refused, but it left an inventory behind");
        before.compare(&Look::at(&program));
        program.finish();
    }

    /// A directory that no dump has used yet.
    pub fn next_images(&self, program: &Program) -> std::path::PathBuf {
        self.dumps.set(self.dumps.get() + 1);
        program.file(&format!("images-{}", self.dumps.get()))
    }
}

/// What a tree looks like from outside.
#[derive(Debug, Eq, PartialEq)]
pub struct Look {
    /// By pid: what of it must stay the same, by name.
    processes: BTreeMap<i32, Vec<(&'static str, String)>>,
}

impl Look {
    /// Looks at every process of a program.
    pub fn at(program: &Program) -> Self {
        let look = |&pid: &i32| {
            let status = proc::status(pid);
            let field = |name: &str| status.get(name).cloned().unwrap_or_default();
            let (state, numbers) = proc::stat(pid).unwrap_or(('?', vec![0; 5]));
            let mut seen = vec![
                ("name", field("Name")),
                ("parent, group, session, tty, foreground", format!("{:?}", &numbers[..5])),
            ];
            if state == 'Z' {
                seen.push(("state", "zombie".to_owned()));
                return (pid, seen);
            }
            seen.push(("command line", proc::cmdline(pid)));
            seen.push(("threads", format!("{:?}", proc::threads(pid))));
            seen.push(("descriptors", format!("{:?}", proc::descriptors(pid).keys())));
            seen.extend(["Uid", "Gid", "Groups", "Umask", "NoNewPrivs"].map(|name| (name, field(name))));
            seen.extend(["SigBlk", "SigIgn", "SigCgt", "CapInh", "CapPrm"].map(|name| (name, field(name))));
            seen.extend(["CapEff", "CapBnd", "CapAmb", "Cpus_allowed"].map(|name| (name, field(name))));
            seen.push(("mappings", proc::maps(pid).join("\n")));
            (pid, seen)
        };
        Self { processes: program.tree().iter().map(look).collect() }
    }

    /// The same once it does not change any more: what a program has just started may still be on its way.
    pub fn settled(program: &Program) -> Self {
        let mut last = Self::at(program);
        for _ in 0..100 {
            std::thread::sleep(Duration::from_millis(15));
            let now = Self::at(program);
            if now == last {
                return now;
            }
            last = now;
        }
        last
    }

    /// Fails if it does not come to look like this again. Each thing may do so at a moment of its own: what it holds
    /// only now and then is not there in every look.
    pub fn expect_again(&self, program: &Program) {
        let mut missing = self.processes.clone();
        for _ in 0..100 {
            let now = Self::at(program);
            for (pid, expected) in &mut missing {
                let seen = now.processes.get(pid);
                expected.retain(|thing| seen.is_none_or(|seen| !seen.contains(thing)));
            }
            missing.retain(|_, expected| !expected.is_empty());
            if missing.is_empty() && now.processes.len() == self.processes.len() {
                return;
            }
            std::thread::sleep(Duration::from_millis(15));
        }
        let now = Self::at(program);
        if let Some((pid, (name, was))) = missing.iter().find_map(|(pid, expected)| Some((pid, expected.first()?))) {
            let is = now.processes.get(pid).and_then(|seen| seen.iter().find(|(other, _)| other == name));
            let is = is.map_or("nothing", |(_, is)| is);
            panic!("pid {pid}: {name} changed\n{}", differences(was, is));
        }
        self.compare(&now);
    }

    /// Fails with the first thing that differs.
    pub fn compare(&self, after: &Self) {
        let pids = |look: &Self| look.processes.keys().copied().collect::<Vec<_>>();
        assert_eq!(pids(self), pids(after), "other processes than before");
        for (pid, seen) in &self.processes {
            for ((name, was), (_, is)) in seen.iter().zip(&after.processes[pid]) {
                assert!(was == is, "pid {pid}: {name} changed\n{}", differences(was, is));
            }
        }
    }
}

/// The lines that only one of two texts has.
fn differences(was: &str, is: &str) -> String {
    let only = |a: &str, b: &str, mark: char| {
        a.lines()
            .filter(|line| !b.lines().any(|other| other == *line))
            .map(|line| format!("{mark} {line}\n"))
            .collect::<String>()
    };
    only(was, is, '-') + &only(is, was, '+')
}

/// Tests named `NAME::ebpf` and `NAME::proc`, for each survey of ours. `NAME => |row| …;` has a course of its own.
#[macro_export]
macro_rules! rows {
    ($($(#[$meta:meta])* $name:ident => $course:expr;)*) => {$(
        $(#[$meta])*
        mod $name {
            use super::*;

            fn course(row: &$crate::Row) {
                let course: fn(&$crate::Row) = $course;
                course(row);
            }

            #[test]
            fn ebpf() {
                course(&$crate::Row::ours($crate::Survey::Ebpf));
            }

            #[test]
            fn proc() {
                course(&$crate::Row::ours($crate::Survey::Proc));
            }
        }
    )*};
}

/// [`rows!`] for cases of one workload that take the usual course: `"FILE", ["--option"]; case case …`.
#[macro_export]
macro_rules! workload_rows {
    ($file:literal; $($rest:tt)*) => {
        $crate::workload_rows! { $file, []; $($rest)* }
    };
    ($file:literal, $options:tt; $($(#[$meta:meta])* $name:ident)*) => {
        $crate::rows! {$(
            $(#[$meta])*
            $name => |row| row
                .with($crate::Options::both(&$options))
                .check(&$crate::Workload::new($file, stringify!($name)));
        )*}
    };
}

/// Tests named `NAME::ours_to_criu` and `NAME::criu_to_ours`: images are exchanged with CRIU, both ways.
#[macro_export]
macro_rules! interop_rows {
    ($file:literal; $($rest:tt)*) => {
        $crate::interop_rows! { $file, []; $($rest)* }
    };
    ($file:literal, $options:tt; $($(#[$meta:meta])* $name:ident)*) => {$(
        $(#[$meta])*
        mod $name {
            fn check(dumper: $crate::Engine, restorer: $crate::Engine) {
                $crate::Row::between(dumper, restorer)
                    .with($crate::Options::both(&$options))
                    .check(&$crate::Workload::new($file, stringify!($name)));
            }

            #[test]
            fn ours_to_criu() {
                check($crate::Engine::Ours($crate::Survey::Ebpf), $crate::Engine::Peer);
            }

            #[test]
            fn criu_to_ours() {
                check($crate::Engine::Peer, $crate::Engine::Ours($crate::Survey::Ebpf));
            }
        }
    )*};
}
