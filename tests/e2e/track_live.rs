//! Live dumps of a program that writes its memory in every way, with and without a parent: every byte is as it was.
//!
//! The program is stopped (SIGSTOP) before the dump, and every byte of it taken down; what a restore brings back is
//! compared with that. `E2E_CYCLES` says how many times (once if it does not).

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use e2e::{Bytes, Options, Program, Row, bytes::signal, reaper, rows};
use nix::sys::signal::Signal;

use crate::killed::Moments;
use crate::live::reap_copies;
use crate::track::{cycles, in_parent, on, pre_dumps, remove_images, writes};

fn live(manner: &str, parent: Option<&Path>) -> Options {
    let mut options = parent.map_or_else(Options::default, on);
    options.dump.extend([format!("--live={manner}").into(), "-R".into()]);
    options
}

/// A live dump of a stopped program, which then is as if it were nothing but what the images say.
fn dump(row: &Row, program: &Program, options: &Options) -> (PathBuf, Bytes) {
    let before = Bytes::stop_and_take(program);
    let images = row.next_images(program);
    row.dumper.dump(program, &images, options).expect_success();
    reap_copies(program, &images);
    (images, before)
}

fn replace(row: &Row, program: &Program, images: &Path, before: &Bytes) {
    let tree = program.tree();
    reaper::kill_trees([program.pid()]);
    program.expect_gone(&tree);
    row.restore(program, images);
    before.compare(&Bytes::take(program));
    signal(program, Signal::SIGCONT);
}

/// Live, restore, compare every byte.
fn exact(row: &Row, manner: &str, case: &str) {
    let mut program = writes(case).start();
    let mut moments = Moments::new();
    for _ in 0..cycles() {
        std::thread::sleep(moments.within(Duration::from_millis(100)));
        let (images, before) = dump(row, &program, &live(manner, None));
        replace(row, &program, &images, &before);
        remove_images(&program);
    }
    program.finish();
}

/// Pre-dumps, live dumps that build on them and on each other, and at last a dump as any other.
fn chain(row: &Row, manner: &str, case: &str) {
    let mut program = writes(case).start();
    let mut moments = Moments::new();
    for _ in 0..cycles() {
        let parent = pre_dumps(row, &program, 2, &mut moments);
        let (first, _) = dump(row, &program, &live(manner, Some(&parent)));
        assert!(in_parent(&first) > 0, "nothing was left to the parent");
        signal(&program, Signal::SIGCONT);
        std::thread::sleep(moments.within(Duration::from_millis(100)));
        let (second, before) = dump(row, &program, &live(manner, Some(&first)));
        assert!(in_parent(&second) > 0, "nothing was left to the live dump");
        replace(row, &program, &second, &before);
        // The same, but the last of them is no live one.
        let parent = pre_dumps(row, &program, 1, &mut moments);
        let (first, _) = dump(row, &program, &live(manner, Some(&parent)));
        signal(&program, Signal::SIGCONT);
        std::thread::sleep(moments.within(Duration::from_millis(100)));
        let before = Bytes::stop_and_take(&program);
        let tree = program.tree();
        let images = row.next_images(&program);
        row.dumper.dump(&program, &images, &on(&first)).expect_success();
        program.expect_gone(&tree);
        assert!(in_parent(&images) > 0, "nothing was left to the live dump");
        row.restore(&program, &images);
        before.compare(&Bytes::take(&program));
        signal(&program, Signal::SIGCONT);
        remove_images(&program);
    }
    program.finish();
}

/// Both ways to write the memory of a live dump.
macro_rules! manners {
    ($($manner:ident)*) => {$(
        mod $manner {
            use super::*;
            rows! {
                everything => |row| exact(row, stringify!($manner), "everything");
                chain_of_everything => |row| chain(row, stringify!($manner), "everything");
                chain_of_huge_pages => |row| chain(row, stringify!($manner), "huge_pages");
                chain_of_a_family => |row| chain(row, stringify!($manner), "family");
                chain_of_file_private => |row| chain(row, stringify!($manner), "file_private");
            }
        }
    )*};
}

manners! { copies rounds }
