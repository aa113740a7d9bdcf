//! The directory that holds a dump.
//!
//! Only one engine writes to it (it holds an exclusive flock(2) on the directory; readers hold a shared one). Files are
//! private to their owner and never opened through a symbolic link. A dump exists from the instant in which its
//! inventory gets its name: all else is written by then ([`Lasting`] says how far), and the inventory of an earlier dump in
//! the same directory went away before the first file was written.

use std::{
    fs::{DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag, openat, readlinkat, renameat},
    sys::memfd::{MFdFlags, memfd_create},
    sys::stat::{Mode, SFlag, fstatat},
    sys::statfs::{self, FsType},
    unistd::{UnlinkatFlags, linkat, symlinkat, syncfs, unlinkat},
};
use prost::Message;

use super::{
    Head, ImageError, ImageKind, ImageName, ImageReader, ImageWriter, check,
    kind::IMG_VERSION,
    proto::{InventoryEntry, Lsmtype},
};

/// The link to the dump that this one builds on; CRIU's name for it.
const PARENT: &str = "parent";

/// How far files have come when they are made a dump.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lasting {
    /// The kernel has them, and brings them to disk by and by. What a crash of the machine leaves of them until then is
    /// shorter than it should be, and no restore takes it. On file systems that do not do so, or that tell only then
    /// that they are full, the same as `OnDisk`.
    Written,
    /// They are on disk.
    OnDisk,
}

/// File systems that say at once when they are full, not when files are brought to disk or closed, and whose files are no
/// longer on disk than what was brought there.
const SAY_AT_ONCE: [FsType; 4] =
    [statfs::EXT4_SUPER_MAGIC, statfs::XFS_SUPER_MAGIC, statfs::BTRFS_SUPER_MAGIC, statfs::TMPFS_MAGIC];

/// The inventory until it has its name.
const UNFINISHED_INVENTORY: &str = ".inventory.img.new";

/// An image directory, open and locked.
#[derive(Debug)]
pub struct ImageDir {
    place: Arc<Place>,
    /// Whether the inventory of an earlier dump is out of the way. Only of interest to a writer.
    cleared: Mutex<bool>,
}

/// Where files are made. Small ones that are complete wait in memory: to make a file takes longer than all that goes into
/// it. For a tree of hundreds of tasks that is most of a dump, and nothing that the tree has to stand still for.
#[derive(Debug)]
pub(super) struct Place {
    path: PathBuf,
    dir: File,
    waiting: Mutex<Vec<(ImageName, Vec<u8>)>>,
    /// Whether any do: threads that read thousands of files need not take turns to find that none does.
    do_wait: AtomicBool,
    /// New files that have no name yet.
    spare: Mutex<Vec<File>>,
}

/// So many bytes wait at most.
const WAITING_MAX: usize = 256 << 20;

impl Place {
    fn new(path: PathBuf, dir: File) -> Arc<Self> {
        Arc::new(Self { path, dir, waiting: Mutex::default(), do_wait: AtomicBool::default(), spare: Mutex::default() })
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<(ImageName, Vec<u8>)>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the content of a whole file.
    pub(super) fn take(&self, name: ImageName, content: Vec<u8>) -> Result<(), ImageError> {
        let mut waiting = self.waiting();
        waiting.push((name, content));
        self.do_wait.store(true, Ordering::Release);
        if waiting.iter().map(|(_, content)| content.len()).sum::<usize>() <= WAITING_MAX {
            return Ok(());
        }
        drop(waiting);
        self.make_waiting()
    }

    /// Makes all files that wait.
    fn make_waiting(&self) -> Result<(), ImageError> {
        if !self.do_wait.load(Ordering::Acquire) {
            return Ok(());
        }
        self.do_wait.store(false, Ordering::Release);
        let waiting = std::mem::take(&mut *self.waiting());
        waiting.into_iter().try_for_each(|(name, content)| {
            let failed = |source| ImageError::File { file: self.path_of(name), offset: 0, call: "write", source };
            self.make(name)?.write_all(&content).map_err(failed)
        })
    }

    /// A new and empty file.
    pub(super) fn make(&self, name: ImageName) -> Result<File, ImageError> {
        let name = name.to_string();
        tracing::debug!("image {name}");
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        // A name that is taken is not for a spare file to take away.
        match spare.filter(|file| self.link(file, &name).is_ok()) {
            Some(file) => Ok(file),
            None => fresh(&self.dir, &self.path, &name),
        }
    }

    /// A new and empty file without a name; `None` where the file system has no such files.
    fn nameless(&self) -> Option<File> {
        let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        openat(&self.dir, ".", flags, Mode::S_IRUSR | Mode::S_IWUSR).map(File::from).ok()
    }

    /// Gives a file that has none a name.
    fn link(&self, file: &File, name: &str) -> nix::Result<()> {
        // AT_EMPTY_PATH would need CAP_DAC_READ_SEARCH.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        linkat(AT_FDCWD, path.as_str(), &self.dir, name, AtFlags::AT_SYMLINK_FOLLOW)
    }

    pub(super) fn path_of(&self, name: ImageName) -> PathBuf {
        self.path.join(name.to_string())
    }
}

impl ImageDir {
    /// Opens a directory for a dump, makes it (0700) if it is not there, and locks it against everyone else.
    ///
    /// The files of an earlier dump go away when the first one is written; they go on to exist for those who have them
    /// open.
    pub fn create(path: impl AsRef<Path>) -> Result<ImageDir, ImageError> {
        let path = path.as_ref();
        match DirBuilder::new().mode(0o700).create(path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(failed(path, "mkdir", e)),
            _ => {}
        }
        let dir = open_dir(path, libc::O_NOFOLLOW)?;
        lock(path, dir.try_lock())?;
        Ok(ImageDir { place: Place::new(path.to_owned(), dir), cleared: Mutex::new(false) })
    }

    /// Opens a complete dump for reading, and keeps writers away.
    pub fn open(path: impl AsRef<Path>) -> Result<ImageDir, ImageError> {
        let path = path.as_ref();
        Self::opened(path.to_owned(), open_dir(path, 0)?)
    }

    fn opened(path: PathBuf, dir: File) -> Result<ImageDir, ImageError> {
        lock(&path, dir.try_lock_shared())?;
        let dir = ImageDir { place: Place::new(path, dir), cleared: Mutex::new(true) };
        if !dir.exists(ImageKind::Inventory)? {
            return Err(ImageError::Incomplete { path: dir.path().to_owned() });
        }
        dir.inventory()?;
        Ok(dir)
    }

    /// The path that the directory was opened by.
    pub fn path(&self) -> &Path {
        &self.place.path
    }

    /// The path of a file in the directory, for messages.
    pub fn path_of(&self, name: impl Into<ImageName>) -> PathBuf {
        self.place.path.join(name.into().to_string())
    }

    // ---- writing ----

    /// Begins a file. Whatever had its name is unlinked first, never overwritten: somebody may have it mapped. Small
    /// files are made by [`ImageDir::commit`].
    pub fn writer(&self, name: impl Into<ImageName>) -> Result<ImageWriter, ImageError> {
        self.clear()?;
        Ok(ImageWriter::later(self.place.clone(), name.into()))
    }

    /// A new and empty file for raw content, open for reading and writing.
    pub fn create_file(&self, name: impl Into<ImageName>) -> Result<File, ImageError> {
        self.clear()?;
        self.place.make(name.into())
    }

    /// A new and empty file that [`ImageDir::adopt`] gives a name; `None` where the file system has no such files.
    /// Nothing of an earlier dump is touched.
    pub fn nameless(&self) -> Option<File> {
        self.place.nameless()
    }

    /// Makes about so many files without names now, which get them as files are needed: to make one takes ten times as long
    /// as to name it, and to fill a small one. Nothing of an earlier dump is touched. Those that are not needed go away.
    pub fn prepare(&self, files: usize) {
        let made = (0..files).map_while(|_| self.place.nameless()).collect();
        *self.place.spare.lock().unwrap_or_else(PoisonError::into_inner) = made;
    }

    /// Gives a file of [`ImageDir::nameless`] a name. What had it before is unlinked.
    pub fn adopt(&self, name: impl Into<ImageName>, file: File) -> Result<File, ImageError> {
        self.clear()?;
        let name = name.into().to_string();
        tracing::debug!("image {name}");
        match self.place.link(&file, &name) {
            Err(Errno::EEXIST) => {
                self.remove(&name)?;
                self.place.link(&file, &name)
            }
            other => other,
        }
        .map(|()| file)
        .map_err(|e| ImageError::File {
            file: self.place.path.join(&name),
            offset: 0,
            call: "link",
            source: e.into(),
        })
    }

    /// A file without a name on the same file system, for what has no place yet; where there is none to be had, in
    /// memory.
    pub fn scratch(&self) -> Result<File, ImageError> {
        let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        match openat(&self.place.dir, ".", flags, Mode::S_IRUSR | Mode::S_IWUSR) {
            Err(Errno::EOPNOTSUPP | Errno::EISDIR) => memfd_create(c"criu-ebpf-scratch", MFdFlags::MFD_CLOEXEC)
                .map_err(|e| failed(self.path(), "memfd_create", e.into())),
            other => other.map_err(|e| failed(self.path(), "open(O_TMPFILE)", e.into())),
        }
        .map(File::from)
    }

    /// Writes a file with one message.
    pub fn write_one<M: Message>(&self, name: impl Into<ImageName>, message: &M) -> Result<(), ImageError> {
        self.write_all(name, [message])
    }

    /// Writes a file with any number of messages.
    pub fn write_all<'m, M: Message + 'm>(
        &self,
        name: impl Into<ImageName>,
        messages: impl IntoIterator<Item = &'m M>,
    ) -> Result<(), ImageError> {
        let mut writer = self.writer(name)?;
        for message in messages {
            writer.message(message)?;
        }
        writer.finish()
    }

    /// Makes the files that wait in memory. [`ImageDir::commit`] does so by itself.
    pub fn make_waiting(&self) -> Result<(), ImageError> {
        self.place.make_waiting()
    }

    /// Brings everything in the directory to disk: one syncfs(2), because thousands of small files with an fsync(2) each
    /// cost thousands of journal commits.
    pub fn sync(&self) -> Result<(), ImageError> {
        self.place.make_waiting()?;
        syncfs(&self.place.dir).map_err(|e| failed(&self.place.path, "syncfs", e.into()))
    }

    fn says_at_once(&self) -> bool {
        statfs::fstatfs(&self.place.dir).is_ok_and(|fs| SAY_AT_ONCE.contains(&fs.filesystem_type()))
    }

    /// Makes the files a dump: brings them so far, then writes the inventory and brings that as far.
    /// The inventory's version is filled in here.
    pub fn commit(&self, inventory: &InventoryEntry, lasting: Lasting) -> Result<(), ImageError> {
        let inventory = InventoryEntry { img_version: IMG_VERSION, ..inventory.clone() };
        self.clear()?;
        let on_disk = lasting == Lasting::OnDisk || !self.says_at_once();
        if on_disk {
            self.sync()?;
        } else {
            self.place.make_waiting()?;
        }
        let path = self.path_of(ImageKind::Inventory);
        let mut writer = ImageWriter::new(
            path.clone(),
            fresh(&self.place.dir, &self.place.path, UNFINISHED_INVENTORY)?,
            ImageKind::Inventory,
        );
        writer.message(&inventory)?;
        let of_file = |call| move |source| ImageError::File { file: path, offset: 0, call, source };
        let file = writer.into_file()?;
        if on_disk {
            file.sync_all().map_err(of_file.clone()("fsync"))?;
        }
        renameat(
            &self.place.dir,
            UNFINISHED_INVENTORY,
            &self.place.dir,
            &*ImageName::from(ImageKind::Inventory).to_string(),
        )
        .map_err(|e| of_file("rename")(e.into()))?;
        if on_disk {
            self.place.dir.sync_all().map_err(|e| failed(&self.place.path, "fsync", e))?;
        }
        Ok(())
    }

    /// Makes this dump build on another one. A relative path starts in this directory, as a link's does.
    pub fn set_parent(&self, parent: &Path) -> Result<(), ImageError> {
        self.clear()?;
        self.remove(PARENT)?;
        symlinkat(parent, &self.place.dir, PARENT)
            .map_err(|e| failed(&self.place.path.join(PARENT), "symlink", e.into()))
    }

    /// Takes the inventory away again: somebody has found fault with the dump.
    pub fn withdraw(&self) -> Result<(), ImageError> {
        self.remove(&ImageName::from(ImageKind::Inventory).to_string())?;
        self.place.dir.sync_all().map_err(|e| failed(&self.place.path, "fsync", e))
    }

    /// Takes an earlier dump away before the first file of this one is made: its inventory first, and for good, so that
    /// at no time anything looks like a dump and is none; then the rest, which nobody would tell from files of ours.
    fn clear(&self) -> Result<(), ImageError> {
        let mut cleared = self.cleared.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if !*cleared {
            if self.remove(&ImageName::from(ImageKind::Inventory).to_string())? {
                self.place.dir.sync_all().map_err(|e| failed(&self.place.path, "fsync", e))?;
            }
            // How the last dump went may still be of interest.
            for name in self.list()?.iter().filter(|name| name.kind.head() != Head::Service) {
                self.remove(&name.to_string())?;
            }
            self.remove(PARENT)?;
            *cleared = true;
        }
        Ok(())
    }

    /// Unlinks a file, and says whether it was there. What is no regular file nor a link is left where it is.
    fn remove(&self, name: &str) -> Result<bool, ImageError> {
        match unlinkat(&self.place.dir, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) => Ok(true),
            Err(Errno::ENOENT | Errno::EISDIR) => Ok(false),
            Err(e) => Err(failed(&self.place.path.join(name), "unlink", e.into())),
        }
    }

    // ---- reading ----

    /// Whether there is such a file.
    pub fn exists(&self, name: impl Into<ImageName>) -> Result<bool, ImageError> {
        let name = name.into();
        self.place.make_waiting()?;
        match fstatat(&self.place.dir, &*name.to_string(), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(e) => Err(ImageError::File { file: self.path_of(name), offset: 0, call: "stat", source: e.into() }),
        }
    }

    /// Opens a file behind its magic.
    pub fn reader(&self, name: impl Into<ImageName>) -> Result<ImageReader, ImageError> {
        let name = name.into();
        let (file, size) = self.open_sized(name)?;
        ImageReader::new(self.path_of(name), file, size, name.kind)
    }

    /// Opens a file at its very beginning.
    pub fn open_file(&self, name: impl Into<ImageName>) -> Result<File, ImageError> {
        self.open_sized(name.into()).map(|(file, _)| file)
    }

    /// Opens a file at its very beginning, and says how long it is.
    pub(super) fn open_sized(&self, name: ImageName) -> Result<(File, u64), ImageError> {
        self.place.make_waiting()?;
        let path = self.path_of(name);
        // Without O_NONBLOCK a FIFO of that name would hold us for ever.
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        // A time of reading would be written into each of thousands of files. Only their owner may leave it out.
        let open = |flags| openat(&self.place.dir, &*name.to_string(), flags, Mode::empty());
        let opened = match open(flags | OFlag::O_NOATIME) {
            Err(Errno::EPERM) => open(flags),
            other => other,
        };
        let file = match opened {
            Ok(fd) => File::from(fd),
            Err(Errno::ENOENT) => return Err(ImageError::Missing { file: path }),
            Err(Errno::ELOOP) => return Err(ImageError::NotRegular { file: path }),
            Err(e) => return Err(ImageError::File { file: path, offset: 0, call: "open", source: e.into() }),
        };
        match file.metadata() {
            Ok(meta) if meta.is_file() => Ok((file, meta.len())),
            Ok(_) => Err(ImageError::NotRegular { file: path }),
            Err(source) => Err(ImageError::File { file: path, offset: 0, call: "fstat", source }),
        }
    }

    /// Reads a file with one message.
    pub fn read_one<M: Message + Default>(&self, name: impl Into<ImageName>) -> Result<M, ImageError> {
        self.reader(name)?.only()
    }

    /// Reads a file with one message if the file is there.
    pub fn read_optional<M: Message + Default>(&self, name: impl Into<ImageName>) -> Result<Option<M>, ImageError> {
        match self.read_one(name) {
            Err(ImageError::Missing { .. }) => Ok(None),
            other => other.map(Some),
        }
    }

    /// Reads all messages of a file. For kinds with bytes behind their messages use [`ImageDir::reader`].
    /// A file that is not there is an empty one: dumps leave out what they have nothing of.
    pub fn read_all<M: Message + Default>(&self, name: impl Into<ImageName>) -> Result<Vec<M>, ImageError> {
        let mut all = Vec::new();
        self.read_each(name, |message| all.push(message))?;
        Ok(all)
    }

    /// The same, one message after the other: large ones need not be moved about.
    pub fn read_each<M: Message + Default>(
        &self,
        name: impl Into<ImageName>,
        mut each: impl FnMut(M),
    ) -> Result<(), ImageError> {
        let mut reader = match self.reader(name) {
            Err(ImageError::Missing { .. }) => return Ok(()),
            other => other?,
        };
        let mut budget = check::Budget::default();
        loop {
            let start = reader.position();
            let Some(message) = reader.message::<M>()? else { return Ok(()) };
            budget.spend::<M>(reader.path(), start, reader.position() - start)?;
            each(message);
        }
    }

    /// The inventory, its version checked.
    pub fn inventory(&self) -> Result<InventoryEntry, ImageError> {
        let inventory: InventoryEntry = self.read_one(ImageKind::Inventory)?;
        let contradiction =
            |what: String| Err(ImageError::Contradiction { file: self.path_of(ImageKind::Inventory), what });
        if !(1..=IMG_VERSION).contains(&inventory.img_version) {
            return Err(ImageError::Version { file: self.path_of(ImageKind::Inventory), found: inventory.img_version });
        }
        if !inventory.fdinfo_per_id() {
            return contradiction("its descriptor tables are named in a way that only dumps before 2013 had".into());
        }
        if let Some(lsm) = inventory.lsmtype
            && Lsmtype::try_from(lsm).is_err()
        {
            return contradiction(format!("unknown security module {lsm}"));
        }
        Ok(inventory)
    }

    /// The names of all image files in the directory, sorted.
    pub fn list(&self) -> Result<Vec<ImageName>, ImageError> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let failed = |e: Errno| failed(&self.place.path, "readdir", e.into());
        self.place.make_waiting()?;
        let mut names = Vec::new();
        for entry in Dir::openat(&self.place.dir, ".", flags, Mode::empty()).map_err(failed)?.iter() {
            names.extend(entry.map_err(failed)?.file_name().to_str().ok().and_then(ImageName::parse));
        }
        names.sort();
        Ok(names)
    }

    /// The dump that this one builds on, if any.
    pub fn parent(&self) -> Result<Option<ImageDir>, ImageError> {
        let path = self.place.path.join(PARENT);
        let target = match readlinkat(&self.place.dir, PARENT) {
            Ok(target) => target,
            Err(Errno::ENOENT) => return Ok(None),
            Err(e) => return Err(failed(&path, "readlink", e.into())),
        };
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let dir =
            openat(&self.place.dir, &*target, flags, Mode::empty()).map_err(|e| failed(&path, "open", e.into()))?;
        Self::opened(path, dir.into()).map(Some)
    }

    /// All dumps that this one builds on, the nearest first.
    pub fn parents(&self) -> Result<Vec<ImageDir>, ImageError> {
        let wrong = |what| Err(ImageError::Parents { path: self.place.path.clone(), what });
        let mut seen = vec![self.identity()?];
        let mut chain: Vec<ImageDir> = Vec::new();
        while let Some(next) = chain.last().unwrap_or(self).parent()? {
            let identity = next.identity()?;
            if seen.contains(&identity) {
                return wrong("goes round in a circle");
            }
            if chain.len() >= check::PARENTS_MAX {
                return wrong("has more links than any sane one");
            }
            seen.push(identity);
            chain.push(next);
        }
        Ok(chain)
    }

    fn identity(&self) -> Result<(u64, u64), ImageError> {
        let meta = self.place.dir.metadata().map_err(|e| failed(&self.place.path, "fstat", e))?;
        Ok((meta.dev(), meta.ino()))
    }
}

impl AsFd for ImageDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.place.dir.as_fd()
    }
}

/// Writes a file that tells how a dump or restore went ([`ImageKind::StatsDump`], [`ImageKind::StatsRestore`]) into a
/// directory that need not hold a dump: such files go to the work directory.
pub fn write_service<M: Message>(directory: &Path, kind: ImageKind, message: &M) -> Result<(), ImageError> {
    let name = ImageName::from(kind).to_string();
    let dir = open_dir(directory, 0)?;
    let mut writer = ImageWriter::new(directory.join(&name), fresh(&dir, directory, &name)?, kind);
    writer.message(message)?;
    writer.into_file().map(drop)
}

fn open_dir(path: &Path, flags: i32) -> Result<File, ImageError> {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_DIRECTORY | libc::O_CLOEXEC | flags);
    options.open(path).map_err(|e| failed(path, "open", e))
}

fn lock(path: &Path, outcome: Result<(), TryLockError>) -> Result<(), ImageError> {
    outcome.map_err(|e| match e {
        TryLockError::WouldBlock => ImageError::Busy { path: path.to_owned() },
        TryLockError::Error(e) => failed(path, "flock", e),
    })
}

fn failed(path: &Path, call: &'static str, source: io::Error) -> ImageError {
    ImageError::Dir { path: path.to_owned(), call, source }
}

/// A new file of this name; what had the name before is unlinked.
fn fresh(dir: &File, path: &Path, name: &str) -> Result<File, ImageError> {
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let of_file = |call: &'static str| {
        move |e: Errno| ImageError::File { file: path.join(name), offset: 0, call, source: e.into() }
    };
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    match openat(dir, name, flags, mode) {
        Err(Errno::EEXIST) => {
            let stat = fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW).map_err(of_file("stat"))?;
            if stat.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
                return Err(ImageError::NotRegular { file: path.join(name) });
            }
            unlinkat(dir, name, UnlinkatFlags::NoRemoveDir).map_err(of_file("unlink"))?;
            openat(dir, name, flags, mode)
        }
        other => other,
    }
    .map(File::from)
    .map_err(of_file("open"))
}
