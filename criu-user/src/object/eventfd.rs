//! eventfd(2): a counter.

use std::os::fd::OwnedFd;

use super::ObjectError;
use super::file::{Capture, FileKind, Planner, Seen};
use crate::image::proto::{EventfdFileEntry, FdTypes, FileEntry};
use crate::kernel::{self, events};
use crate::plan::{FileRef, Opened, Opener};

/// Event counters.
#[derive(Debug)]
pub struct EventFd;

impl FileKind for EventFd {
    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Eventfd]
    }

    fn is(&self, seen: &Seen) -> bool {
        seen.is_anon("eventfd")
    }

    fn capture(&self, seen: &Seen, _: &mut Capture<'_>) -> Result<FileEntry, ObjectError> {
        // Shown since Linux 6.5; before, nobody can tell, and a plain counter is far more likely. The format has no
        // field for it: like CRIU we set the bit of eventfd(2), which is no status flag's.
        let semaphore = seen.info()?.get("eventfd-semaphore").is_some_and(|value| value != "0");
        let flags = seen.flags | if semaphore { events::EFD_SEMAPHORE } else { 0 };
        let counter = seen.info()?.number("eventfd-count", 16)?;
        let efd = EventfdFileEntry { id: seen.id, flags, fown: seen.fown()?, counter };
        Ok(FileEntry { r#type: FdTypes::Eventfd as i32, id: seen.id, efd: Some(efd.into()), ..FileEntry::default() })
    }

    fn plan(&self, entry: &FileEntry, cx: &mut Planner<'_>) -> Result<FileRef, ObjectError> {
        let efd = entry.efd.as_deref().ok_or_else(|| ObjectError::empty(entry))?;
        Ok(cx.plan.open(OpenEventFd { flags: efd.flags, counter: efd.counter }))
    }
}

/// Makes a counter.
#[derive(Debug)]
struct OpenEventFd {
    flags: u32,
    counter: u64,
}

impl Opener for OpenEventFd {
    fn describe(&self) -> String {
        format!("eventfd with flags {:#o} at {}", self.flags, self.counter)
    }

    fn open(&self, _: &Opened) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>> {
        let file = events::eventfd(self.flags & events::EFD_SEMAPHORE)?;
        if self.counter != 0 {
            // eventfd(2) itself takes only the lower half as a start.
            nix::unistd::write(&file, &self.counter.to_ne_bytes())?;
        }
        kernel::fd::set_flags_of_new(&file, (self.flags & !events::EFD_SEMAPHORE) as i32)?;
        Ok(file)
    }
}
