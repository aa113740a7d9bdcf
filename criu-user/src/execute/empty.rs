//! Emptying a task that was just born: what it has inherited goes, but for the crew's area and the kernel's own.

use nix::unistd::Pid;

use super::layout::TASK_SIZE;
use super::{ExecuteError, Run};
use crate::plan::{Call, KernelArea, Role, Stage};

impl Run<'_> {
    /// Takes everything away that a task was born with, but for the crew's area and the kernel's own areas, which move
    /// to where the plan wants them.
    pub(super) fn empty(&mut self, n: usize) -> Result<(), ExecuteError> {
        let task = &self.plan.tasks[n];
        let mut calls: Vec<Call> = task.stage(Stage::Empty).to_vec();
        if task.role == Role::Ends {
            // It needs no memory of its own to end.
            return self.run_calls(Stage::Empty, &[(n, &calls)]);
        }
        if n == 0 {
            calls.extend(self.rseq.take());
        }
        let kernel = self.kernel_at[n].clone();
        let mut keep = task.keep.clone();
        // The parking place lies right below the crew's area.
        let (crew, len) = self.crew.range();
        keep.push((self.layout.parking, crew + len));
        let wanted = self.layout.split_data(&task.kernel_areas);
        if kernel == wanted {
            keep.extend(kernel.iter().map(|area| (area.start, area.start + area.len)));
            calls.extend(unmap_all_but(keep));
        } else {
            calls.extend(self.move_kernel_areas(task.pid, &kernel, &wanted, keep)?);
        }
        self.kernel_at[n] = wanted;
        self.run_calls(Stage::Empty, &[(n, &calls)])
    }

    /// The kernel's own areas wait in the parking place while everything else goes.
    fn move_kernel_areas(
        &self,
        pid: Pid,
        kernel: &[KernelArea],
        wanted: &[KernelArea],
        keep: Vec<(u64, u64)>,
    ) -> Result<Vec<Call>, ExecuteError> {
        let mut calls = Vec::new();
        let mut next = self.layout.parking;
        for area in kernel {
            calls.push(move_area(area.start, area.len, next, "out of the way"));
            next += area.len;
        }
        calls.extend(unmap_all_but(keep));
        let mut parked = self.layout.parking;
        for area in kernel {
            calls.push(match wanted.iter().find(|wanted| wanted.name == area.name) {
                Some(wanted) if wanted.len == area.len => move_area(parked, area.len, wanted.start, "where it was"),
                Some(wanted) => {
                    let what = format!("{} has {} bytes, had {}", area.name, area.len, wanted.len);
                    return Err(ExecuteError::OtherVdso { pid: pid.as_raw(), what });
                }
                None => crate::call!(SYS_munmap(parked, area.len), "the program had unmapped it"),
            });
            parked += area.len;
        }
        Ok(calls)
    }
}

/// Unmaps everything between these ranges.
fn unmap_all_but(mut keep: Vec<(u64, u64)>) -> Vec<Call> {
    keep.sort_unstable();
    keep.push((TASK_SIZE, TASK_SIZE));
    let mut calls = Vec::new();
    let mut at = 0;
    for (start, end) in keep {
        if start > at {
            calls.push(crate::call!(SYS_munmap(at, start - at), "what was inherited and is not wanted"));
        }
        at = at.max(end);
    }
    calls
}

fn move_area(from: u64, len: u64, to: u64, why: &'static str) -> Call {
    const FLAGS: i32 = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    crate::call!(SYS_mremap(from, len, len, FLAGS, to), format!("the kernel's own area, {why}")).giving(to)
}
