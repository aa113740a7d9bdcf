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
use nix::sys::statfs;
use nix::unistd::{Gid, Uid, fchown, ftruncate};

use super::ObjectError;
use super::file::{Capture, FileKind, Planner, Seen};
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

/// Whether a file's name in /proc is that of a memory file.
pub fn is_name(link: &Path) -> bool {
    let bytes = link.as_os_str().as_bytes();
    bytes.starts_with(PREFIX) && bytes.ends_with(super::ghost::DELETED)
}

fn name_of(link: &Path) -> Vec<u8> {
    let bytes = link.as_os_str().as_bytes();
    let bytes = bytes.strip_suffix(super::ghost::DELETED).unwrap_or(bytes);
    bytes.strip_prefix(PREFIX).unwrap_or(bytes).to_vec()
}

/// Memory files met in a dump, by inode.
#[derive(Debug, Default)]
struct Inodes(BTreeMap<u64, MemfdInodeEntry>);

/// Enters the file itself, and gives its number in memfd.img.
fn enter(
    cx: &mut Capture<'_>,
    link: &Path,
    stat: &FileStat,
    open: impl Fn() -> Result<OwnedFd, kernel::SysError>,
) -> Result<u32, ObjectError> {
    if let Some(known) = cx.shelf.get::<Inodes>().0.get(&stat.st_ino) {
        return Ok(known.inode_id as u32);
    }
    let file = open()?;
    let shmid = u32::try_from(stat.st_ino)
        .map_err(|_| ObjectError::contradiction(format!("{} has inode {}", link.display(), stat.st_ino)))?;
    let entry = MemfdInodeEntry {
        name: name_of(link),
        uid: stat.st_uid,
        gid: stat.st_gid,
        size: stat.st_size as u64,
        shmid,
        seals: kernel::fd::seals(&file)?,
        inode_id: cx.shelf.get::<Inodes>().0.len() as u64 + 1,
        hugetlb_flag: None,
        mode: Some(stat.st_mode & 0o7777),
    };
    let id = entry.inode_id as u32;
    shmem::add(cx, stat.st_ino, link.display().to_string(), || Ok(file))?;
    cx.shelf.get::<Inodes>().0.insert(stat.st_ino, entry);
    Ok(id)
}

fn wrap(memfd: MemfdFileEntry) -> FileEntry {
    FileEntry { r#type: FdTypes::Memfd as i32, id: memfd.id, memfd: Some(memfd), ..FileEntry::default() }
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
        let fs = statfs::fstatfs(&seen.file).during("fstatfs", seen.link.display())?;
        let (id, flags, pos, fown) = (seen.id, seen.flags, seen.pos, seen.fown()?);
        if fs.filesystem_type() == statfs::HUGETLBFS_MAGIC {
            let what = format!("{} is a memory file of huge pages", seen.link_text());
            cx.refuse(seen.refuse(what, "make it without MFD_HUGETLB"));
            return Ok(wrap(MemfdFileEntry { id, flags, pos, fown, inode_id: 0 }));
        }
        // A description of our own: positions must not move.
        let inode_id = enter(cx, &seen.link, &seen.stat, || kernel::fd::reopen(&seen.file, libc::O_RDONLY))?;
        Ok(wrap(MemfdFileEntry { id, flags, pos, fown, inode_id }))
    }

    fn plan(&self, entry: &FileEntry, cx: &mut Planner<'_>) -> Result<FileRef, ObjectError> {
        let missing = |what| ObjectError::contradiction(format!("memory file {} has no {what}", entry.id));
        let file = entry.memfd.ok_or_else(|| missing("entry"))?;
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
        if inode.hugetlb_flag.is_some_and(|flag| flag != 0) {
            return Err(ObjectError::Unsupported {
                what: format!("memory file {} of huge pages", String::from_utf8_lossy(&inode.name)),
                advice: "make it without MFD_HUGETLB",
            });
        }
        let content = Content::read(cx, inode.shmid.into())?;
        if content.size() > inode.size.next_multiple_of(kernel::survey::PAGE) {
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
        let name = std::ffi::CString::new(inode.name.clone())?;
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = memfd_create(name.as_c_str(), flags).during("memfd_create", self.describe())?;
        self.content.write_to(&file)?;
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
