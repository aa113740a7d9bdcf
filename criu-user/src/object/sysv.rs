//! System V shared memory segments that the tree has attached.
//!
//! A segment belongs to the machine and outlives its users unless it was removed. So a restore that finds the segment
//! of the dump still there attaches to it, content and all; otherwise it makes it again, under the same id.

use std::os::fd::OwnedFd;

use nix::errno::Errno;

use super::ObjectError;
use super::file::{Capture, Planner};
use super::hugetlb;
use super::shmem::Content;
use crate::call;
use crate::image::ImageKind;
use crate::image::proto::{IpcDescEntry, IpcShmEntry, VmaEntry};
use crate::kernel::ipc::{self, SHM_DEST, Segment};
use crate::plan::{Deed, FileRef, Opened, Opener, Stage, TaskRef, Why};

/// The IPC namespace that segments are noted under: the engine's own.
const NAMESPACE: u64 = 0;

/// Notes the segments with these ids, and the size of their pages if those are huge; their content is shared memory like any
/// other.
pub fn dump(cx: &Capture<'_>, segments: &[(u64, Option<u32>)]) -> Result<(), ObjectError> {
    if segments.is_empty() {
        return Ok(());
    }
    let mut entries = Vec::with_capacity(segments.len());
    for &(id, huge) in segments {
        let segment = ipc::stat(id as i32)?;
        entries.push(IpcShmEntry {
            desc: IpcDescEntry {
                key: segment.key as u32,
                id: segment.id as u32,
                uid: segment.owner.0,
                gid: segment.owner.1,
                cuid: segment.creator.0,
                cgid: segment.creator.1,
                mode: segment.mode,
            },
            size: segment.size,
            in_pagemaps: Some(true),
            hugetlb_flag: huge.map(|size| libc::SHM_HUGETLB as u32 | size),
        });
    }
    Ok(cx.dir.write_all(ImageKind::IpcShm.id(NAMESPACE), &entries)?)
}

/// Segments planned so far.
#[derive(Debug, Default)]
struct Planned(Vec<(Segment, FileRef)>);

/// Plans the attachment of a segment.
pub fn plan_attach(cx: &mut Planner<'_>, task: TaskRef, vma: &VmaEntry, why: Why) -> Result<(), ObjectError> {
    let segment = plan_segment(cx, vma.shmid)?;
    let len = vma.end - vma.start;
    if vma.pgoff != 0 || segment.attached_size() != len {
        return Err(ObjectError::Unsupported {
            what: format!("{why}, which is only a part of segment {}", segment.id),
            advice: "a segment must be attached as a whole",
        });
    }
    let read_only = vma.prot & libc::PROT_WRITE as u32 == 0;
    let execute = vma.prot & libc::PROT_EXEC as u32 != 0;
    let flags = if read_only { libc::SHM_RDONLY } else { 0 } | if execute { libc::SHM_EXEC } else { 0 };
    let attach = call!(SYS_shmat(segment.id, vma.start, flags), why).giving(vma.start);
    cx.plan.push(task, Stage::Memory, attach);
    Ok(())
}

fn plan_segment(cx: &mut Planner<'_>, id: u64) -> Result<Segment, ObjectError> {
    if let Some((segment, _)) = cx.shelf.get::<Planned>().0.iter().find(|(s, _)| s.id as u64 == id) {
        return Ok(*segment);
    }
    let entries = read(cx)?;
    let entry = entries
        .iter()
        .find(|e| u64::from(e.desc.id) == id)
        .ok_or_else(|| ObjectError::contradiction(format!("segment {id} is in no image")))?;
    let segment = Segment {
        key: entry.desc.key as i32,
        id: entry.desc.id as i32,
        size: entry.size,
        owner: (entry.desc.uid, entry.desc.gid),
        creator: (entry.desc.cuid, entry.desc.cgid),
        mode: entry.desc.mode,
        huge: entry.hugetlb_flag.filter(|flag| *flag != 0).map(|flag| flag & !(libc::SHM_HUGETLB as u32)),
    };
    let content = Content::read(cx, id)?;
    let file = cx.plan.open(MakeSegment { segment, content });
    if segment.mode & SHM_DEST != 0 {
        cx.plan.after(Stage::Groups, Remove { id: segment.id });
    }
    cx.shelf.get::<Planned>().0.push((segment, file));
    Ok(segment)
}

fn read(cx: &Planner<'_>) -> Result<Vec<IpcShmEntry>, ObjectError> {
    let mut reader = cx.dir.reader(ImageKind::IpcShm.id(NAMESPACE))?;
    let mut entries = Vec::new();
    while let Some((entry, _)) = reader.message_over_payload::<IpcShmEntry>()? {
        entries.push(entry);
    }
    Ok(entries)
}

/// Makes a segment, or takes the one that is still there.
#[derive(Debug)]
struct MakeSegment {
    segment: Segment,
    content: Content,
}

impl Opener for MakeSegment {
    fn describe(&self) -> String {
        format!("System V segment {} with key {:#x}", self.segment.id, self.segment.key)
    }

    fn memory(&self) -> u64 {
        self.content.bytes()
    }

    fn open(&self, _: &Opened) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>> {
        let Segment { id, size, key, .. } = self.segment;
        match ipc::stat(id) {
            Ok(found) if found.size == size && found.key == key => return Ok(ipc::file(&self.segment)?),
            Ok(_) => return Err("another segment has this id by now; remove it with ipcrm -m".into()),
            Err(e) if matches!(e.errno, Errno::EINVAL | Errno::EIDRM) => {}
            Err(e) => return Err(e.into()),
        }
        match self.segment.huge {
            Some(_) => ipc::create(&self.segment).map_err(hugetlb::with_advice)?,
            None => ipc::create(&self.segment)?,
        }
        let file = ipc::file(&self.segment)?;
        self.content.write_to(&file)?;
        Ok(file)
    }
}

/// Removes a segment that had been removed while it was in use.
#[derive(Debug)]
struct Remove {
    id: i32,
}

impl Deed for Remove {
    fn describe(&self) -> String {
        format!("let System V segment {} go at its last detach", self.id)
    }

    fn run(&self, _: &Opened) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(ipc::remove(self.id)?)
    }
}
