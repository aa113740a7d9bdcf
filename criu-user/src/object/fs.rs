//! Working directory, root directory and umask of a process.

use super::file::{Capture, Planner};
use super::{ObjectError, regfile};
use crate::call;
use crate::image::proto::FsEntry;
use crate::kernel::proc::KeyValues;
use crate::plan::{Stage, TaskRef};
use nix::unistd::Pid;

/// How directories are held: CRIU writes the same flags.
const DIRECTORY: u32 = (libc::O_DIRECTORY | libc::O_NONBLOCK) as u32;

/// Reads them.
pub fn capture(cx: &mut Capture<'_>, pid: Pid) -> Result<FsEntry, ObjectError> {
    let umask = KeyValues::status(pid, pid)?.number("Umask", 8)?;
    Ok(FsEntry {
        cwd_id: regfile::by_path(cx, pid.as_raw(), &format!("/proc/{pid}/cwd"), DIRECTORY)?,
        root_id: regfile::by_path(cx, pid.as_raw(), &format!("/proc/{pid}/root"), DIRECTORY)?,
        umask: Some(umask as u32),
    })
}

/// Plans them. The root comes first: the working directory may lie outside of it.
pub fn plan(cx: &mut Planner<'_>, task: TaskRef, entry: &FsEntry) -> Result<(), ObjectError> {
    let root = cx.file(entry.root_id)?.reg.as_deref().map(regfile::path_of);
    if let Some(root) = root
        && (root.as_os_str() != "/" || cx.options.root.is_other())
    {
        let file = cx.file_ref(entry.root_id)?;
        cx.plan.push(task, Stage::Process, call!(SYS_fchdir(file), "on the way to the root directory"));
        cx.plan.push(task, Stage::Process, call!(SYS_chroot(b".\0".to_vec()), format!("root {}", root.display())));
    }
    let cwd = cx.file_ref(entry.cwd_id)?;
    cx.plan.push(task, Stage::Process, call!(SYS_fchdir(cwd), "working directory"));
    if let Some(umask) = entry.umask {
        cx.plan.push(task, Stage::Process, call!(SYS_umask(umask), "umask"));
    }
    Ok(())
}
