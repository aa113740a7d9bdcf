//! Where the guest's code can stand in a process: executable bytes that nobody runs.
//!
//! The kernel's vDSO ends in a part-filled page; failing that, the last page of some library's text does (the linker
//! fills it with zeros). The bytes are written through /proc/PID/mem, which gives the process a private copy of that
//! page, and are zero again afterwards.

use nix::unistd::Pid;

use crate::kernel::mem::ProcessMemory;
use crate::kernel::survey::{PAGE, VmFlags, Vma};

use super::{AgentError, code};

/// Finds the address for the guest.
///
/// Where an engine died, its guest's code is still there (and harmless): the same place is taken again.
pub fn find(pid: Pid, memory: &ProcessMemory, vmas: &[Vma]) -> Result<u64, AgentError> {
    let needed = code::guest_len();
    let vdso = vmas.iter().filter(|v| v.special() == Some("[vdso]"));
    let texts = vmas.iter().filter(|v| {
        v.ino != 0 && v.flags.contains(VmFlags::EXEC | VmFlags::READ) && !v.flags.contains(VmFlags::SHARED)
    });
    for vma in vdso.chain(texts) {
        let start = vma.end.saturating_sub(2 * PAGE).max(vma.start);
        let Ok(tail) = memory.read(start, (vma.end - start) as usize) else { continue };
        if let Some(at) = left_behind(&tail) {
            return Ok(start + at as u64);
        }
        let used = tail.iter().rposition(|&b| b != 0).map_or(0, |last| last + 1);
        // A little distance keeps the zeros that end a table in the library.
        let at = (used + 16).next_multiple_of(16);
        if at + needed <= tail.len() {
            return Ok(start + at as u64);
        }
    }
    Err(AgentError::NoSlack { pid: pid.as_raw(), needed })
}

/// Offset of an earlier guest's code.
fn left_behind(bytes: &[u8]) -> Option<usize> {
    let prefix = &code::guest()[..64];
    bytes.windows(prefix.len()).step_by(16).position(|w| w == prefix).map(|n| n * 16)
}
