//! Pages files while a large tree is made. Each process reads from its own: if all inherited all of them, their number
//! would count twice, at each fork and each time that descriptors are closed.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::unistd::Pid;

use super::{ExecuteError, Run};
use crate::kernel::SysResult;
use crate::kernel::fd::duplicate_above;
use crate::kernel::pidfd::PidFd;
use crate::plan::{Arg, Call, FileRef, Plan, Stage, fetch};

/// Fewer may be inherited.
const MANY: usize = 32;
/// Numbers left for what else the engine opens.
const ROOM: i32 = 64;

/// Descriptors that tasks only fill their memory from, which are not inherited.
#[derive(Debug)]
pub(super) struct Images {
    /// All of them have this number or a higher one, and nothing else has.
    first: i32,
    /// The engine itself, by which tasks get theirs.
    engine: OwnedFd,
}

impl Images {
    /// `None` where there are few.
    pub(super) fn of(plan: &Plan) -> SysResult<Option<Self>> {
        let images = plan.opens.iter().filter(|opener| opener.only_fills()).count();
        if images < MANY {
            return Ok(None);
        }
        let others = (plan.opens.len() - images) as i32;
        let engine = duplicate_above(PidFd::open(Pid::this())?.as_fd(), plan.first_free_fd)?;
        Ok(Some(Self { first: plan.first_free_fd + others + ROOM, engine }))
    }

    /// The lowest number that one of them may have.
    pub(super) fn first(&self) -> i32 {
        self.first
    }
}

impl Run<'_> {
    /// The root gives up what it has inherited of them.
    pub(super) fn give_up_images(&self) -> Result<(), ExecuteError> {
        let Some(images) = &self.images else { return Ok(()) };
        let why = "pages files: each process gets its own from the engine";
        self.run_calls(Stage::Tree, &[(0, &[crate::call!(SYS_close_range(images.first, u32::MAX, 0u32), why)])])
    }

    /// Has tasks that have not inherited their pages files fill their memory from them.
    pub(super) fn fill_by_themselves(&self, tasks: &[usize]) -> Result<(), ExecuteError> {
        let Some(images) = self.images.as_ref().filter(|_| tasks != [0]) else {
            return self.stage(Stage::Fill, tasks);
        };
        let calls: Vec<(usize, Vec<Call>)> =
            self.work(Stage::Fill, tasks).into_iter().map(|(n, calls)| (n, self.with_files(images, calls))).collect();
        let work: Vec<(usize, &[Call])> = calls.iter().map(|(n, calls)| (*n, calls.as_slice())).collect();
        self.run_calls(Stage::Fill, &work)
    }

    /// The same calls, with those before them that get the files under the numbers that the engine has for them.
    fn with_files(&self, images: &Images, calls: &[Call]) -> Vec<Call> {
        let file = |call: &Call| match call.args.first() {
            Some(Arg::File(file)) if self.is_image(*file) => Some(*file),
            _ => None,
        };
        let files: BTreeSet<FileRef> = calls.iter().filter_map(file).collect();
        let get = |file| fetch(images.engine.as_raw_fd().into(), file, "its pages file");
        files.into_iter().flat_map(get).chain(calls.iter().cloned()).collect()
    }

    fn is_image(&self, file: FileRef) -> bool {
        self.plan.opens.get(file.0).is_some_and(|opener| opener.only_fills())
    }
}
