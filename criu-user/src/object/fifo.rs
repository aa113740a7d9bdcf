//! FIFOs: pipes with a name. The name is kept as a regular file's is, also where it is gone; the rest is as with pipes.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::stat::SFlag;

use super::file::{Capture, FileKind, Planner, Seen};
use super::pipe::{Content, End, Found, read_content, write_content};
use super::{ObjectError, regfile};
use crate::image::ImageKind;
use crate::image::proto::{FdTypes, FifoEntry, FileEntry};
use crate::kernel::{self, pipe, sys};
use crate::plan::{FileRef, Opened, Opener};

/// Open FIFOs.
#[derive(Debug)]
pub struct Fifo;

/// FIFOs met in a dump, by inode.
#[derive(Debug, Default)]
struct Fifos(BTreeMap<u32, Found>);

/// What is planned of FIFOs.
#[derive(Debug, Default)]
struct Planned {
    content: Option<HashMap<u32, Content>>,
    made: HashMap<u32, FileRef>,
}

impl FileKind for Fifo {
    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Fifo]
    }

    fn is(&self, seen: &Seen) -> bool {
        let o_path = seen.flags & libc::O_PATH as u32 != 0;
        seen.file_type() == SFlag::S_IFIFO && seen.link.is_absolute() && !o_path
    }

    fn capture(&self, seen: &Seen, cx: &mut Capture<'_>) -> Result<FileEntry, ObjectError> {
        let pipe_id = seen.stat.st_ino as u32;
        let found = cx.shelf.get::<Fifos>().0.entry(pipe_id).or_default();
        found.look(seen)?;
        if !found.is_read() {
            // Only writers so far. Whoever opens it for reading later would find what they wrote.
            found.read(&kernel::fd::reopen(&seen.file, libc::O_RDONLY | libc::O_NONBLOCK)?)?;
        }
        let name = cx.new_id();
        let file = regfile::entry_of_seen(cx, seen, name)?;
        cx.add_file(file);
        let fifo = FifoEntry { id: seen.id, pipe_id, regf_id: Some(name) };
        Ok(FileEntry { r#type: FdTypes::Fifo as i32, id: seen.id, fifo: Some(fifo.into()), ..FileEntry::default() })
    }

    fn finish(&self, cx: &mut Capture<'_>) -> Result<(), ObjectError> {
        let fifos = cx.shelf.take::<Fifos>();
        Ok(write_content(cx.dir, ImageKind::FifoData, fifos.0.iter().map(|(&id, found)| (id, found)))?)
    }

    fn plan(&self, entry: &FileEntry, cx: &mut Planner<'_>) -> Result<FileRef, ObjectError> {
        let missing = |what| ObjectError::contradiction(format!("FIFO {} has no {what}", entry.id));
        let fifo = entry.fifo.as_deref().ok_or_else(|| missing("content"))?;
        let name = cx.file(fifo.regf_id.ok_or_else(|| missing("name"))?)?;
        let name = name.reg.as_deref().cloned().ok_or_else(|| missing("name"))?;
        let planned = cx.shelf.get::<Planned>();
        if planned.content.is_none() {
            planned.content = Some(read_content(cx.dir, ImageKind::FifoData)?);
        }
        let what = regfile::path_of(&name).display().to_string();
        let root = match planned.made.get(&fifo.pipe_id) {
            Some(&root) => root,
            None => {
                let content = planned.content.as_mut().and_then(|all| all.remove(&fifo.pipe_id)).unwrap_or_default();
                let place = regfile::plan_place(cx, &name)?;
                let root = cx.plan.open(Make { what: what.clone(), place, content });
                cx.shelf.get::<Planned>().made.insert(fifo.pipe_id, root);
                root
            }
        };
        Ok(cx.plan.open(End::new(what, root, name.flags)))
    }
}

/// Opens a FIFO both ways, which never waits for anyone, and fills it.
#[derive(Debug)]
struct Make {
    what: String,
    place: FileRef,
    content: Content,
}

impl Opener for Make {
    fn describe(&self) -> String {
        let bytes: usize = self.content.pieces.iter().map(|p| p.bytes.len()).sum();
        format!("FIFO {} with {bytes} bytes in it", self.what)
    }

    fn open(&self, opened: &Opened) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>> {
        let place = opened.get(self.place).ok_or("its name has not been found")?;
        let fifo = kernel::fd::reopen(place, libc::O_RDWR | libc::O_NONBLOCK)?;
        // Somebody outside of the tree may have kept it open all the while, and its content with it.
        if sys::readable_bytes(fifo.as_fd())? == 0 {
            pipe::prepare(&fifo, self.content.capacity, &self.content.pieces)?;
        }
        Ok(fifo)
    }
}
