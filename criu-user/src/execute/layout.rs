//! Where code, slots and the kernel's own areas go meanwhile: out of the way of all that the tree has.

use nix::unistd::Pid;

use super::ExecuteError;
use super::calls::arg_size;
use crate::agent::batch::{HEADER, RECORD};
use crate::agent::crew::{self, LEADER_SLOT, THREAD_SLOT};
use crate::kernel::survey::{self, PAGE, Vma};
use crate::plan::{KernelArea, Plan, Role, Task};

/// Where things go that must be out of the way of everything else.
pub(super) struct Layout {
    /// Code and slots.
    pub(super) crew: u64,
    /// Where the kernel's own areas wait while the address space is emptied.
    pub(super) parking: u64,
    /// The kernel's own areas of the engine, which the first task inherits.
    pub(super) kernel: Vec<KernelArea>,
}

/// End of the address space of a program.
pub(super) const TASK_SIZE: u64 = (1 << 47) - PAGE;

fn kernel_area(vma: &Vma) -> Option<KernelArea> {
    let name = vma.special().filter(|n| *n == "[vdso]" || n.starts_with("[vvar"))?;
    Some(KernelArea { name: name.to_owned(), start: vma.start, len: vma.len() })
}

impl Layout {
    pub(super) fn choose(plan: &Plan) -> Result<Self, ExecuteError> {
        let own = survey::vmas_of(Pid::this())?;
        let kernel: Vec<KernelArea> = own.iter().filter_map(kernel_area).collect();
        let parking: u64 = kernel.iter().map(|area| area.len).sum();
        let sizes: Vec<usize> = plan.tasks.iter().map(slot_size).collect();
        let needed = crew::space(&sizes) + parking + 2 * PAGE;
        let mut used: Vec<(u64, u64)> = plan.used.clone();
        used.extend(own.iter().map(|v| (v.start, v.end)));
        used.sort_unstable();
        let hole = hole(&used, needed).ok_or(ExecuteError::NoHole { needed })?;
        Ok(Self { crew: hole + parking + PAGE, parking: hole, kernel })
    }

    /// Images have the kernel's data areas as one, this kernel may have several: they lie one after the other.
    pub(super) fn split_data(&self, wanted: &[KernelArea]) -> Vec<KernelArea> {
        let own: Vec<&KernelArea> = self.kernel.iter().filter(|area| area.name.starts_with("[vvar")).collect();
        let len: u64 = own.iter().map(|area| area.len).sum();
        let mut out = Vec::with_capacity(wanted.len() + own.len());
        for area in wanted {
            if area.name == "[vvar]" && area.len == len {
                let mut start = area.start;
                for part in &own {
                    out.push(KernelArea { name: part.name.clone(), start, len: part.len });
                    start += part.len;
                }
            } else {
                out.push(area.clone());
            }
        }
        out
    }

    pub(super) fn members(&self, plan: &Plan) -> Vec<(Pid, usize)> {
        plan.tasks.iter().map(|t| (t.tid, slot_size(t))).collect()
    }
}

fn slot_size(task: &Task) -> usize {
    if !matches!(task.role, Role::Thread(_)) {
        return LEADER_SLOT;
    }
    // A thread's calls are few and small, but for its filters.
    let calls = task.calls.iter().flat_map(|(_, calls)| calls);
    let largest = calls.map(|call| RECORD + call.args.iter().map(arg_size).sum::<usize>()).max().unwrap_or(0);
    (largest + 2 * HEADER + 256).next_multiple_of(THREAD_SLOT)
}

/// The lowest hole of `needed` bytes between sorted ranges, well above what programs map at fixed addresses.
fn hole(used: &[(u64, u64)], needed: u64) -> Option<u64> {
    const LOWEST: u64 = 0x1000_0000;
    let mut at = LOWEST;
    for &(start, end) in used {
        if start > at && start - at >= needed + PAGE {
            return Some(at);
        }
        at = at.max(end.saturating_add(PAGE));
    }
    (TASK_SIZE.saturating_sub(at) >= needed).then_some(at)
}
