//! signalfd(2): a set of signals. Those that wait in it are the process's own pending signals.

use std::os::fd::OwnedFd;

use super::ObjectError;
use super::file::{Capture, FileKind, Planner, Seen};
use crate::image::proto::{FdTypes, FileEntry, SignalfdEntry};
use crate::kernel::{self, events};
use crate::plan::{FileRef, Opened, Opener};

/// Descriptors for signals.
#[derive(Debug)]
pub struct SignalFd;

impl FileKind for SignalFd {
    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Signalfd]
    }

    fn is(&self, seen: &Seen) -> bool {
        seen.is_anon("signalfd")
    }

    fn capture(&self, seen: &Seen, _: &mut Capture<'_>) -> Result<FileEntry, ObjectError> {
        let sigmask = seen.info()?.number("sigmask", 16)?;
        let sgfd = SignalfdEntry { id: seen.id, flags: seen.flags, fown: seen.fown()?, sigmask };
        Ok(FileEntry { r#type: FdTypes::Signalfd as i32, id: seen.id, sgfd: Some(sgfd.into()), ..FileEntry::default() })
    }

    fn plan(&self, entry: &FileEntry, cx: &mut Planner<'_>) -> Result<FileRef, ObjectError> {
        let sgfd = entry.sgfd.as_deref().ok_or_else(|| ObjectError::empty(entry))?;
        Ok(cx.plan.open(OpenSignalFd { flags: sgfd.flags, mask: sgfd.sigmask }))
    }
}

/// Makes one.
#[derive(Debug)]
struct OpenSignalFd {
    flags: u32,
    mask: u64,
}

impl Opener for OpenSignalFd {
    fn describe(&self) -> String {
        format!("signalfd with flags {:#o} for the signals {:#x}", self.flags, self.mask)
    }

    fn open(&self, _: &Opened) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>> {
        let file = events::signalfd(self.mask, 0)?;
        kernel::fd::set_flags_of_new(&file, self.flags as i32)?;
        Ok(file)
    }
}
