//! What the kernel keeps of an address space beside its areas.

use crate::call;
use crate::image::proto::MmEntry;
use crate::plan::{Stage, Structure, TaskRef};

use super::super::ObjectError;
use super::super::file::Planner;

/// What PR_SET_MM_MAP takes: addresses within the areas, checked by the kernel.
pub fn plan_facts(cx: &mut Planner<'_>, task: TaskRef, mm: &MmEntry) -> Result<(), ObjectError> {
    const PR_SET_MM: u32 = 35;
    const PR_SET_MM_MAP: u32 = 14;
    /// Offsets in `struct prctl_mm_map` of include/uapi/linux/prctl.h.
    const AUXV: usize = 88;
    const EXE_FD: usize = 100;
    let exe = cx.file_ref(mm.exe_file_id)?;
    let mut bytes: Vec<u8> = [
        mm.mm_start_code,
        mm.mm_end_code,
        mm.mm_start_data,
        mm.mm_end_data,
        mm.mm_start_brk,
        mm.mm_brk,
        mm.mm_start_stack,
        mm.mm_arg_start,
        mm.mm_arg_end,
        mm.mm_env_start,
        mm.mm_env_end,
    ]
    .iter()
    .flat_map(|w| w.to_le_bytes())
    .collect();
    let auxv: Vec<u8> = mm.mm_saved_auxv.iter().flat_map(|w| w.to_le_bytes()).collect();
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(&(auxv.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    let size = bytes.len();
    let map = Structure { bytes, pointers: vec![(AUXV, auxv)], files: vec![(EXE_FD, exe)] };
    cx.plan.push(
        task,
        Stage::Process,
        call!(
            SYS_prctl(PR_SET_MM, PR_SET_MM_MAP, map, size, 0u64),
            "the program, and where code, data, heap, arguments and environment lie"
        ),
    );
    const PR_SET_THP_DISABLE: u32 = 41;
    if mm.thp_disabled == Some(true) {
        let call = call!(SYS_prctl(PR_SET_THP_DISABLE, 1u64, 0u64, 0u64, 0u64), "no transparent huge pages");
        cx.plan.push(task, Stage::Process, call);
    }
    Ok(())
}
