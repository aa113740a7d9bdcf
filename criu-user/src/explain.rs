//! A plan for readers: what `restore --explain` prints.

use std::fmt::Write;

use crate::execute::describe;
use crate::plan::Plan;

/// The whole plan as text: files, then for each task its calls, each with its reason.
pub fn text(plan: &Plan) -> String {
    let mut out = String::new();
    for (n, opener) in plan.opens.iter().enumerate() {
        let _ = writeln!(out, "file {n}: {}", opener.describe());
    }
    for task in &plan.tasks {
        let _ = writeln!(out, "\ntask {} of process {} ({:?})", task.tid, task.pid, task.role);
        for area in &task.kernel_areas {
            let _ = writeln!(out, "  {:?}  {} at {:#x}", crate::plan::Stage::Empty, area.name, area.start);
        }
        for stage in crate::plan::Stage::ALL {
            for call in task.stage(stage) {
                let _ = writeln!(out, "  {stage:?}  {}  # {}", describe(call), call.why);
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
