//! A plan for readers: what `restore --explain` prints.

use std::fmt::Write;

use serde::Serialize;

use crate::execute::describe;
use crate::plan::{Arg, Call, Expect, KernelArea, Plan, Role, Stage, Task, Why};

impl Plan {
    /// Bytes of memory that it fills.
    pub fn memory(&self) -> u64 {
        let calls = self.tasks.iter().flat_map(|task| &task.calls).flat_map(|(_, calls)| calls);
        let engines = self.assists.iter().flat_map(|assist| &assist.pieces).map(|(_, len, _)| len);
        let opened = self.opens.iter().map(|opener| opener.memory());
        calls.map(Call::memory).sum::<u64>() + engines.sum::<u64>() + opened.sum::<u64>()
    }
}

/// The whole plan as text: files, then for each task its calls, each with its reason.
pub fn text(plan: &Plan) -> String {
    let mut out = String::new();
    for (n, opener) in plan.opens.iter().enumerate() {
        let _ = writeln!(out, "file {n}: {}", opener.describe());
    }
    for (n, task) in plan.tasks.iter().enumerate() {
        let _ = writeln!(out, "\ntask {} of process {} ({:?})", task.tid, task.pid, task.role);
        for area in &task.kernel_areas {
            let _ = writeln!(out, "  {:?}  {} at {:#x}", Stage::Empty, area.name, area.start);
        }
        for stage in Stage::ALL {
            for call in task.stage(stage) {
                let _ = writeln!(out, "  {stage:?}  {}  # {}", describe(call), call.why);
            }
            if stage == Stage::Fill {
                for assist in plan.assists.iter().filter(|assist| assist.task.0 == n) {
                    let bytes: u64 = assist.pieces.iter().map(|(_, len, _)| len).sum();
                    let (pieces, file) = (assist.pieces.len(), assist.file.0);
                    let _ =
                        writeln!(out, "  {stage:?}  by the engine: {bytes} bytes in {pieces} pieces from file {file}");
                }
            }
        }
        if let Some(resume) = &task.resume {
            let _ = writeln!(out, "  {resume:?}");
        }
    }
    for (stage, deed) in &plan.deeds {
        let _ = writeln!(out, "after {stage:?}: {}", deed.describe());
    }
    out
}

/// A plan as data: what `restore --explain --json` prints.
#[derive(Debug, Serialize)]
pub struct Explained<'p> {
    /// Files that the engine opens; calls name them by their place in this list.
    files: Vec<String>,
    tasks: Vec<ExplainedTask<'p>>,
    /// What the engine does between the stages.
    deeds: Vec<ExplainedDeed>,
    /// Bytes of memory that are filled.
    memory: u64,
}

/// A task with its calls in their order.
#[derive(Debug, Serialize)]
struct ExplainedTask<'p> {
    tid: i32,
    pid: i32,
    role: Role,
    kernel_areas: &'p [KernelArea],
    calls: Vec<ExplainedCall<'p>>,
    /// The call that it goes on in, where it was asleep.
    resumes_in: Option<ExplainedCall<'p>>,
}

/// A call and its reason.
#[derive(Debug, Serialize)]
struct ExplainedCall<'p> {
    stage: Stage,
    call: std::borrow::Cow<'static, str>,
    args: &'p [Arg],
    /// As strace(1) would show it.
    text: String,
    why: &'p Why,
    expect: Expect,
}

/// Something that the engine does.
#[derive(Debug, Serialize)]
struct ExplainedDeed {
    after: Stage,
    what: String,
}

impl<'p> Explained<'p> {
    /// Of a plan.
    pub fn new(plan: &'p Plan) -> Self {
        let deed = |(after, deed): &(Stage, Box<dyn crate::plan::Deed>)| ExplainedDeed {
            after: *after,
            what: deed.describe(),
        };
        Self {
            files: plan.opens.iter().map(|opener| opener.describe()).collect(),
            tasks: plan.tasks.iter().map(ExplainedTask::new).collect(),
            deeds: plan.deeds.iter().map(deed).collect(),
            memory: plan.memory(),
        }
    }
}

impl<'p> ExplainedTask<'p> {
    fn new(task: &'p Task) -> Self {
        let of_stage = |stage| task.stage(stage).iter().map(move |call| ExplainedCall::new(stage, call));
        let wait = task.resume.as_ref().and_then(|resume| resume.wait.as_ref());
        Self {
            tid: task.tid.as_raw(),
            pid: task.pid.as_raw(),
            role: task.role,
            kernel_areas: &task.kernel_areas,
            calls: Stage::ALL.into_iter().flat_map(of_stage).collect(),
            resumes_in: wait.map(|call| ExplainedCall::new(Stage::Last, call)),
        }
    }
}

impl<'p> ExplainedCall<'p> {
    fn new(stage: Stage, call: &'p Call) -> Self {
        Self { stage, call: call.name(), args: &call.args, text: describe(call), why: &call.why, expect: call.expect }
    }
}
