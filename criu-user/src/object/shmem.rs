//! Shared memory without a file: MAP_SHARED|MAP_ANONYMOUS, and System V segments.
//!
//! Behind both is a file of the kernel's internal tmpfs, which `/proc/PID/map_files` opens. Its content is read from
//! outside, once for the whole tree, whoever maps it. At restore the engine makes such a file again and fills it;
//! tasks map it.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use crate::image::proto::VmaEntry;
use crate::image::{ImageKind, PageRange, PageStore, PagesWriter, VmaStatus};
use crate::kernel::survey::{PAGE, VmFlags, Vma, VmaName};
use crate::kernel::{self, SysError, error::During};
use crate::plan::{FileRef, Opened, Opener};

use super::file::{Capture, Planner};
use super::hugetlb;
use super::memory::Pages;
use super::sysv;
use super::{ObjectError, Refusal};

/// An object that an area maps.
#[derive(Debug, Clone, Copy)]
pub struct Mapped {
    /// Its id in images: its inode's number.
    pub id: u64,
    /// What kind of area that makes.
    pub status: VmaStatus,
}

/// Objects met in a dump, by id.
#[derive(Debug, Default)]
struct Objects(BTreeMap<u64, Object>);

#[derive(Debug)]
struct Object {
    file: File,
    /// Where it was found, for messages.
    found: String,
    identity: Identity,
}

/// Which object it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    /// Device and inode.
    file: (u64, u64),
    is_segment: bool,
}

/// Tells whether an area maps an object of this kind, and remembers the object.
pub fn mapped(cx: &mut Capture<'_>, pid: i32, vma: &Vma) -> Result<Option<Mapped>, ObjectError> {
    let VmaName::File(name) = &vma.name else { return Ok(None) };
    let name = name.to_string_lossy();
    // Both have names that no file system gives (mm/shmem.c: shmem_zero_setup; ipc/shm.c: newseg).
    let anonymous = name == "/dev/zero (deleted)" && vma.flags.contains(VmFlags::SHARED);
    let sysv = name.starts_with("/SYSV") && name.ends_with(" (deleted)");
    if !anonymous && !sysv {
        return Ok(None);
    }
    let kind = if sysv { VmaStatus::SYSVIPC } else { VmaStatus::ANON_SHARED };
    let found = format!("/proc/{pid}/map_files/{:x}-{:x}", vma.start, vma.end);
    let identity = Identity { file: (vma.dev, vma.ino), is_segment: sysv };
    enter(cx, vma.ino, identity, &found, Some(pid), || Ok(File::open(&found).during("open", &found)?.into()))?;
    Ok(Some(Mapped { id: vma.ino, status: VmaStatus::REGULAR | kind }))
}

/// Enters a memory file (device, inode) under an id.
pub fn add(
    cx: &mut Capture<'_>,
    id: u64,
    file: (u64, u64),
    found: &str,
    open: impl FnOnce() -> Result<OwnedFd, SysError>,
) -> Result<(), ObjectError> {
    enter(cx, id, Identity { file, is_segment: false }, found, None, open)
}

fn enter(
    cx: &mut Capture<'_>,
    id: u64,
    identity: Identity,
    found: &str,
    pid: Option<i32>,
    open: impl FnOnce() -> Result<OwnedFd, SysError>,
) -> Result<(), ObjectError> {
    match cx.shelf.get::<Objects>().0.entry(id) {
        Entry::Vacant(slot) => {
            slot.insert(Object { file: open()?.into(), found: found.to_owned(), identity });
        }
        // A segment's inode has the segment's id for a number, others count up from one (ipc/shm.c, newseg), and files of
        // huge pages count by themselves.
        Entry::Occupied(known) if known.get().identity != identity => {
            let what = format!("{found} and {} have the same number {id}", known.get().found);
            let advice = "make one of the two anew: images tell pieces of shared memory apart by their numbers";
            cx.refuse(Refusal { pid: pid.unwrap_or(0), fd: None, what, advice: advice.into() });
        }
        Entry::Occupied(_) => {}
    }
    Ok(())
}

/// Writes the content of all objects, with pages files numbered from `pages_id` on.
pub fn dump_all(cx: &mut Capture<'_>, mut pages_id: u32) -> Result<Pages, ObjectError> {
    let mut pages = Pages::default();
    let objects = &cx.shelf.get::<Objects>().0;
    let segments = objects.iter().filter(|(_, object)| object.identity.is_segment);
    let segments: Vec<(u64, Option<u32>)> =
        segments.map(|(&id, object)| Ok((id, hugetlb::size_flag(&object.file)?))).collect::<Result<_, SysError>>()?;
    sysv::dump(cx, &segments)?;
    for (id, object) in cx.shelf.take::<Objects>().0 {
        let part = dump(cx, id, &object, pages_id)?;
        pages.scanned += part.scanned;
        pages.written += part.written;
        pages_id += 1;
    }
    Ok(pages)
}

fn dump(cx: &Capture<'_>, id: u64, object: &Object, pages_id: u32) -> Result<Pages, ObjectError> {
    let size = object.file.metadata().during("fstat", &object.found)?.len();
    let mut image = PagesWriter::create(cx.dir, ImageKind::PagemapShmem.id(id), pages_id)?;
    if hugetlb::size_flag(&object.file)?.is_some() {
        hugetlb::dump(&object.file, size, &mut image, cx.observer)?;
        return Ok(Pages { scanned: size.div_ceil(PAGE), written: image.finish()?.present, in_parent: 0 });
    }
    let mut at = 0;
    while let Some((start, end)) = kernel::fd::next_data(&object.file, at, size)? {
        let (start, end) = (start / PAGE * PAGE, end.next_multiple_of(PAGE));
        let range = PageRange::new(start, end)
            .ok_or_else(|| ObjectError::contradiction(format!("{}: data at {start:#x}", object.found)))?;
        let offset = image.append(range)?;
        cx.observer.expects(end - start);
        kernel::fd::copy(&object.file, start, image.pages(), offset, end - start)?;
        cx.observer.moved(end - start);
        at = end;
    }
    Ok(Pages { scanned: size.div_ceil(PAGE), written: image.finish()?.present, in_parent: 0 })
}

/// Objects planned so far, by id.
#[derive(Debug, Default)]
struct Planned(BTreeMap<u64, FileRef>);

/// How far the mappings of each object reach, by id.
#[derive(Debug, Default)]
struct Sizes(BTreeMap<u64, u64>);

/// Notes the areas of a process before any is planned: an object must be as large as all its mappings together.
pub fn note_sizes(cx: &mut Planner<'_>, areas: &[VmaEntry]) {
    let sizes = cx.shelf.get::<Sizes>();
    for vma in areas.iter().filter(|vma| vma.status & VmaStatus::ANON_SHARED.bits() != 0) {
        let end = vma.pgoff.saturating_add(vma.end.saturating_sub(vma.start));
        let size = sizes.0.entry(vma.shmid).or_default();
        *size = end.max(*size);
    }
}

/// Plans an anonymous object; everybody who maps it gets the same file.
pub fn plan_object(cx: &mut Planner<'_>, id: u64) -> Result<FileRef, ObjectError> {
    if let Some(&known) = cx.shelf.get::<Planned>().0.get(&id) {
        return Ok(known);
    }
    let content = Content::read(cx, id)?;
    let size = cx.shelf.get::<Sizes>().0.get(&id).copied().unwrap_or(0).max(content.size);
    let opener = MakeObject { id, size, content };
    let file = cx.plan.open(opener);
    cx.shelf.get::<Planned>().0.insert(id, file);
    Ok(file)
}

/// The content of an object, as it stands in the images.
#[derive(Debug)]
pub struct Content {
    /// Bytes up to the end of its last page.
    size: u64,
    /// Where in the object, where in which file, how much.
    pieces: Vec<(u64, usize, u64, u64)>,
    files: Vec<(File, PathBuf)>,
}

impl Content {
    /// Reads where it is.
    pub fn read(cx: &Planner<'_>, id: u64) -> Result<Self, ObjectError> {
        let map = PageStore::open(cx.dir)?.shmem(id)?;
        let mut content = Self { size: 0, pieces: Vec::new(), files: Vec::new() };
        for run in map.found()? {
            while content.files.len() <= run.dump {
                let (file, path) = map
                    .pages(content.files.len())
                    .ok_or_else(|| ObjectError::contradiction(format!("shared memory {id} has no pages")))?;
                let file = file.try_clone().map_err(|e| SysError::io("dup", path.display(), &e))?;
                content.files.push((file, path.to_owned()));
            }
            content.pieces.push((run.range.start(), run.dump, run.offset, run.range.bytes()));
            content.size = content.size.max(run.range.end());
        }
        Ok(content)
    }

    /// How far it reaches, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// How many bytes it has; holes are none.
    pub fn bytes(&self) -> u64 {
        self.pieces.iter().map(|(_, _, _, len)| len).sum()
    }

    /// Writes it into a file.
    pub fn write_to(&self, object: &OwnedFd) -> Result<(), SysError> {
        for &(at, dump, offset, len) in &self.pieces {
            hugetlb::copy(&self.files[dump].0, offset, object, at, len)?;
        }
        Ok(())
    }
}

/// Makes an anonymous shared object.
#[derive(Debug)]
struct MakeObject {
    id: u64,
    /// In bytes.
    size: u64,
    content: Content,
}

impl Opener for MakeObject {
    fn describe(&self) -> String {
        format!("shared memory {}", self.id)
    }

    fn memory(&self) -> u64 {
        self.content.bytes()
    }

    fn open(&self, _: &Opened) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>> {
        let object = kernel::map::anonymous_shared(self.size.max(PAGE))?;
        self.content.write_to(&object)?;
        Ok(object)
    }
}
