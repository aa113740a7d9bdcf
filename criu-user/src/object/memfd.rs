//! Memory files: memfd_create(2).
//!
//! Their content is that of a shared memory object, which [`shmem`](super::shmem) writes; mappings name an entry of
//! files.img as mappings of other files do. At restore the engine makes each once, and every description is opened anew
//! through /proc. Seals come when nobody has to write any more.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod};
use nix::unistd::{Gid, Uid, fchown, ftruncate};

use super::ObjectError;
use super::file::{Capture, FileKind, Planner, Seen};
use super::hugetlb;
use super::shmem::{self, Content};
use crate::image::ImageKind;
use crate::image::proto::{FdTypes, FileEntry, FownEntry, MemfdFileEntry, MemfdInodeEntry};
use crate::kernel::{self, error::During};
use crate::plan::{Deed, FileRef, Opened, Opener, Stage};

/// Memory files.
#[derive(Debug)]
pub struct Memfd;

/// What the kernel writes in front of their names (mm/memfd.c).
const PREFIX: &[u8] = b"/memfd:";
/// A writable mapping from before this seal goes on to be writable (fcntl(2)).
const F_SEAL_FUTURE_WRITE: u32 = 0x10;
const F_SEAL_SEAL: u32 = 0x1;
/// Permissions that a memory file is made with.
const MODE: u32 = 0o777;

/// Whether a file's name in /proc is that of a memory file, or of huge pages that processes share, which are one to images.
pub fn is_name(link: &Path) -> bool {
    let name = link.as_os_str().as_bytes().strip_suffix(super::ghost::DELETED);
    name.is_some_and(|name| name.starts_with(PREFIX) || name == hugetlb::ANONYMOUS)
}

fn name_of(link: &Path) -> Vec<u8> {
    let bytes = link.as_os_str().as_bytes();
    let bytes = bytes.strip_suffix(super::ghost::DELETED).unwrap_or(bytes);
    bytes.strip_prefix(PREFIX).unwrap_or(bytes).to_vec()
}

/// Memory files met in a dump, by device and inode.
#[derive(Debug, Default)]
struct Inodes(BTreeMap<(u64, u64), MemfdInodeEntry>);

/// Files of huge pages number their inodes by themselves; this keeps them from the numbers of others.
const OF_HUGE_PAGES: u32 = 1 << 31;

/// Enters the file itself, and gives its number in memfd.img.
fn enter(
    cx: &mut Capture<'_>,
    link: &Path,
    stat: &FileStat,
    open: impl Fn() -> Result<OwnedFd, kernel::SysError>,
) -> Result<u32, ObjectError> {
    let identity = (stat.st_dev, stat.st_ino);
    if let Some(known) = cx.shelf.get::<Inodes>().0.get(&identity) {
        return Ok(known.inode_id as u32);
    }
    let file = open()?;
    let huge = hugetlb::size_flag(&file)?;
    let number = u32::try_from(stat.st_ino)
        .map_err(|_| ObjectError::contradiction(format!("{} has inode {}", link.display(), stat.st_ino)))?;
    let shmid = if huge.is_some() { number ^ OF_HUGE_PAGES } else { number };
    let entry = MemfdInodeEntry {
        name: name_of(link),
        uid: stat.st_uid,
        gid: stat.st_gid,
        size: stat.st_size as u64,
        shmid,
        seals: kernel::fd::seals(&file)?,
        inode_id: cx.shelf.get::<Inodes>().0.len() as u64 + 1,
        hugetlb_flag: huge.map(|size| MFdFlags::MFD_HUGETLB.bits() | size),
        mode: Some(stat.st_mode & 0o7777),
    };
    let id = entry.inode_id as u32;
    shmem::add(cx, shmid.into(), identity, &link.to_string_lossy(), || Ok(file))?;
    cx.shelf.get::<Inodes>().0.insert(identity, entry);
    Ok(id)
}

fn wrap(memfd: MemfdFileEntry) -> FileEntry {
    FileEntry { r#type: FdTypes::Memfd as i32, id: memfd.id, memfd: Some(memfd.into()), ..FileEntry::default() }
}

/// The entry of a memory file that is mapped, or runs as a program.
pub fn entry_by_path(
    cx: &mut Capture<'_>,
    held: &str,
    link: &Path,
    stat: &FileStat,
    flags: u32,
    id: u32,
) -> Result<FileEntry, ObjectError> {
    let open = || Ok(std::fs::File::open(held).during("open", held)?.into());
    let inode_id = enter(cx, link, stat, open)?;
    Ok(wrap(MemfdFileEntry { id, flags, pos: 0, fown: FownEntry::default(), inode_id }))
}

/// Writes the image of the files themselves; their content goes with all shared memory.
pub fn finish(cx: &mut Capture<'_>) -> Result<(), ObjectError> {
    let inodes = cx.shelf.take::<Inodes>().0;
    if !inodes.is_empty() {
        cx.dir.write_all(ImageKind::MemfdInode, inodes.values())?;
    }
    Ok(())
}

/// What is planned of memory files.
#[derive(Debug, Default)]
struct Planned {
    inodes: Option<HashMap<u32, MemfdInodeEntry>>,
    made: HashMap<u32, FileRef>,
}

impl FileKind for Memfd {
    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Memfd]
    }

    fn is(&self, seen: &Seen) -> bool {
        let o_path = seen.flags & libc::O_PATH as u32 != 0;
        seen.file_type() == SFlag::S_IFREG && !o_path && is_name(&seen.link) && seen.stat.st_nlink == 0
    }

    fn capture(&self, seen: &Seen, cx: &mut Capture<'_>) -> Result<FileEntry, ObjectError> {
        let (id, flags, pos, fown) = (seen.id, seen.flags, seen.pos, seen.fown()?);
        // A description of our own: positions must not move.
        let inode_id = enter(cx, &seen.link, &seen.stat, || kernel::fd::reopen(&seen.file, libc::O_RDONLY))?;
        Ok(wrap(MemfdFileEntry { id, flags, pos, fown, inode_id }))
    }

    fn plan(&self, entry: &FileEntry, cx: &mut Planner<'_>) -> Result<FileRef, ObjectError> {
        let missing = |what| ObjectError::contradiction(format!("memory file {} has no {what}", entry.id));
        let file = *entry.memfd.as_deref().ok_or_else(|| missing("entry"))?;
        if cx.shelf.get::<Planned>().inodes.is_none() {
            let all: Vec<MemfdInodeEntry> = cx.dir.read_all(ImageKind::MemfdInode)?;
            cx.shelf.get::<Planned>().inodes = Some(all.into_iter().map(|i| (i.inode_id as u32, i)).collect());
        }
        let planned = cx.shelf.get::<Planned>();
        if let Some(&root) = planned.made.get(&file.inode_id) {
            return Ok(cx.plan.open(Reopen { root, entry: file }));
        }
        let inodes = planned.inodes.as_ref();
        let inode = inodes.and_then(|all| all.get(&file.inode_id)).ok_or_else(|| missing("inode"))?.clone();
        let content = Content::read(cx, inode.shmid.into())?;
        if content.size() > inode.size.checked_next_multiple_of(kernel::survey::PAGE).unwrap_or(u64::MAX) {
            return Err(ObjectError::contradiction(format!("memory file {} is shorter than its pages", entry.id)));
        }
        // That seal must come after the mappings that it does not bind; then also what forbids further seals.
        let later = match inode.seals & F_SEAL_FUTURE_WRITE {
            0 => 0,
            seal => seal | inode.seals & F_SEAL_SEAL,
        };
        let seals = inode.seals & !later;
        let root = cx.plan.open(Make { inode, seals, content });
        if later != 0 {
            cx.plan.after(Stage::Groups, Seal { root, seals: later });
        }
        cx.shelf.get::<Planned>().made.insert(file.inode_id, root);
        Ok(cx.plan.open(Reopen { root, entry: file }))
    }
}

/// Makes a memory file with its content.
#[derive(Debug)]
struct Make {
    inode: MemfdInodeEntry,
    seals: u32,
    content: Content,
}

impl Opener for Make {
    fn describe(&self) -> String {
        format!("memory file {} of {} bytes", String::from_utf8_lossy(&self.inode.name), self.inode.size)
    }

    fn memory(&self) -> u64 {
        self.content.bytes()
    }

    fn open(&self, _: &Opened) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>> {
        let inode = &self.inode;
        let huge = MFdFlags::from_bits_retain(inode.hugetlb_flag.unwrap_or(0));
        if inode.name == hugetlb::ANONYMOUS {
            let file = kernel::map::anonymous_shared_huge(inode.size, huge.bits())?;
            self.content.write_to(&file).map_err(hugetlb::with_advice)?;
            return Ok(file);
        }
        let name = std::ffi::CString::new(inode.name.clone())?;
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | huge;
        let file = memfd_create(name.as_c_str(), flags).during("memfd_create", self.describe())?;
        let written = self.content.write_to(&file);
        if huge.is_empty() {
            written?
        } else {
            written.map_err(hugetlb::with_advice)?
        }
        // Pages are whole, the file need not be.
        ftruncate(&file, inode.size as i64).during("ftruncate", self.describe())?;
        fchown(&file, Some(Uid::from_raw(inode.uid)), Some(Gid::from_raw(inode.gid)))
            .during("fchown", self.describe())?;
        let mode = Mode::from_bits_truncate(inode.mode.unwrap_or(MODE));
        fchmod(&file, mode).during("fchmod", self.describe())?;
        if self.seals != 0 {
            kernel::fd::add_seals(&file, self.seals)?;
        }
        Ok(file)
    }
}

/// Opens a memory file once more.
#[derive(Debug)]
struct Reopen {
    root: FileRef,
    entry: MemfdFileEntry,
}

impl Opener for Reopen {
    fn describe(&self) -> String {
        format!("open memory file {} with flags {:#o} at {}", self.entry.inode_id, self.entry.flags, self.entry.pos)
    }

    fn open(&self, opened: &Opened) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>> {
        let root = opened.get(self.root).ok_or("it has not been made")?;
        let once = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_ASYNC | libc::O_NOFOLLOW;
        let file = kernel::fd::reopen(root, self.entry.flags as i32 & !once)?;
        if self.entry.pos != 0 {
            kernel::fd::seek(&file, self.entry.pos)?;
        }
        Ok(file)
    }
}

/// Adds the seals that must come late.
#[derive(Debug)]
struct Seal {
    root: FileRef,
    seals: u32,
}

impl Deed for Seal {
    fn describe(&self) -> String {
        format!("fcntl(F_ADD_SEALS, {:#x}) of {:?}", self.seals, self.root)
    }

    fn run(&self, opened: &Opened) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(kernel::fd::add_seals(opened.get(self.root).ok_or("it has not been made")?, self.seals)?)
    }
}
