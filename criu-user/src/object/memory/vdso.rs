//! The vDSO: code that the kernel puts into every process. A program keeps addresses inside of it, so one that was
//! dumped under another vDSO cannot go on with this kernel's.

use std::os::unix::fs::FileExt;

use nix::unistd::Pid;

use crate::image::proto::VmaEntry;
use crate::image::{FoundRun, PageMap, VmaStatus};
use crate::kernel::SysError;
use crate::kernel::mem::ProcessMemory;
use crate::kernel::survey;
use crate::object::ObjectError;
use crate::object::file::Planner;

/// This kernel's, read once for a restore.
#[derive(Debug, Default)]
struct Own(Option<Vec<u8>>);

/// Compares the pages of a dumped vDSO with this kernel's. Areas of other kinds pass.
pub fn check(
    cx: &mut Planner<'_>,
    pid: i32,
    vma: &VmaEntry,
    runs: &[FoundRun],
    pages: &PageMap,
) -> Result<(), ObjectError> {
    if vma.status & VmaStatus::VDSO.bits() == 0 {
        return Ok(());
    }
    let own = match &cx.shelf.get::<Own>().0 {
        Some(known) => known.clone(),
        None => cx.shelf.get::<Own>().0.insert(own()?).clone(),
    };
    for run in runs {
        let Some((file, path)) = pages.pages(run.dump) else { continue };
        let mut bytes = vec![0; run.range.bytes() as usize];
        file.read_exact_at(&mut bytes, run.offset).map_err(|e| SysError::io("read", path.display(), &e))?;
        let at = (run.range.start() - vma.start) as usize;
        if own.get(at..at + bytes.len()) != Some(&bytes[..]) {
            return Err(ObjectError::Unsupported {
                what: format!("process {pid}, whose vDSO is not this kernel's"),
                advice: "restore it on the kernel that it was dumped on",
            });
        }
    }
    Ok(())
}

fn own() -> Result<Vec<u8>, ObjectError> {
    let areas = survey::layout_of(Pid::this())?;
    match areas.iter().find(|area| area.special() == Some("[vdso]")) {
        Some(area) => Ok(ProcessMemory::open(Pid::this())?.read(area.start, area.len() as usize)?),
        None => Ok(Vec::new()),
    }
}
