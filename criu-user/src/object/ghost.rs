//! Files that are open or mapped, but have lost the name that they were opened by.
//!
//! Three things may have happened. The file has no name at all any more: then its content goes into an image, holes
//! left out, and a nameless file is made of it at restore. It has another name somewhere (a hard link): then nobody can
//! say where, so with `--link-remap` it gets one more name beside the old one, `link_remap.N`, until it is restored.
//! Or another file has taken the name: that one is left alone.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, open};
use nix::sys::stat::{FileStat, Mode, SFlag, UtimensatFlags, fchmodat, lstat, mknod, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, LinkatFlags, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, unlinkat};
use tracing::warn;

use super::file::{Capture, Planner};
use super::{ObjectError, Refusal, regfile};
use crate::image::proto::{GhostChunkEntry, GhostFileEntry, RegFileEntry, RemapFilePathEntry, RemapType, Timeval};
use crate::image::{Ghost, ImageKind, kernel_dev};
use crate::kernel::{self, SysError, error::During, root::Root};
use crate::plan::{Deed, FileRef, Opened, Opener, Stage};

/// What the kernel writes behind a name that is gone (fs/d_path.c).
pub const DELETED: &[u8] = b" (deleted)";

/// A file that somebody holds.
#[derive(Debug)]
pub struct Held<'a> {
    /// The process.
    pub pid: i32,
    /// Its descriptor, where it is one.
    pub fd: Option<i32>,
    /// Its id in files.img.
    pub id: u32,
    /// Its name as the kernel tells it.
    pub link: &'a Path,
    /// stat(2) of it.
    pub stat: &'a FileStat,
    /// A magic link of /proc that leads to it.
    pub way: String,
}

impl Held<'_> {
    fn refuse(&self, what: String, advice: impl Into<String>) -> Refusal {
        Refusal { pid: self.pid, fd: self.fd, what, advice: advice.into() }
    }

    fn kind(&self) -> SFlag {
        SFlag::from_bits_truncate(self.stat.st_mode & SFlag::S_IFMT.bits())
    }

    fn inode(&self) -> (u64, u64) {
        (self.stat.st_dev, self.stat.st_ino)
    }

    fn is_at(&self, path: &Path) -> Result<bool, Errno> {
        let named = if self.kind() == SFlag::S_IFLNK { lstat(path) } else { nix::sys::stat::stat(path) };
        match named {
            Ok(named) => Ok((named.st_dev, named.st_ino) == self.inode()),
            Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(false),
            Err(e) => Err(e),
        }
    }
}

/// What stands in for names that are gone, in a dump.
#[derive(Debug, Default)]
struct StandIns {
    /// Images of content, by inode.
    ghosts: HashMap<(u64, u64), u32>,
    /// Further names, by inode: the id of the file that has it.
    linked: HashMap<(u64, u64), u32>,
    remaps: Vec<RemapFilePathEntry>,
    links: Links,
}

/// Names that a dump has given; they go away with this unless they are kept.
#[derive(Debug, Default)]
pub struct Links(Vec<PathBuf>);

impl Links {
    /// The dump is complete, the names are part of it.
    pub fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        for path in &self.0 {
            if let Err(err) = std::fs::remove_file(path) {
                warn!(path = %path.display(), %err, "a name given for the dump is left over");
            }
        }
    }
}

/// The name under which a file goes into files.img. Where it is gone, a stand-in is entered.
pub fn name(cx: &mut Capture<'_>, held: &Held<'_>) -> Result<PathBuf, ObjectError> {
    let link = held.link;
    match held.is_at(link) {
        Ok(true) => return Ok(link.to_owned()),
        Ok(false) => {}
        Err(errno) => {
            let what = format!("the name {} cannot be looked up ({})", link.display(), errno.desc());
            cx.refuse(held.refuse(what, "close it before the dump"));
            return Ok(link.to_owned());
        }
    }
    let bytes = link.as_os_str().as_bytes();
    let Some(name) = bytes.strip_suffix(DELETED) else {
        let what = format!("{} is hidden: another file or file system is there by now", link.display());
        cx.refuse(held.refuse(what, "unmount what hides it, or close it before the dump"));
        return Ok(link.to_owned());
    };
    let name = PathBuf::from(OsString::from_vec(name.to_owned()));
    if name.starts_with("/proc") {
        let what = format!("{} belongs to a process that has ended", name.display());
        cx.refuse(held.refuse(what, "close it before the dump"));
    } else if held.stat.st_nlink == 0 || held.kind() == SFlag::S_IFDIR {
        dump_ghost(cx, held, &name)?;
    } else {
        link_again(cx, held, &name)?;
    }
    Ok(name)
}

/// Gives a file that has a name elsewhere one more beside the old one.
fn link_again(cx: &mut Capture<'_>, held: &Held<'_>, name: &Path) -> Result<(), ObjectError> {
    if !cx.options.link_remap {
        let what = format!("{} has lost this name, but has another one that nobody can find", name.display());
        let advice = "give --link-remap, and it gets one more beside it until it is restored";
        cx.refuse(held.refuse(what, advice));
        return Ok(());
    }
    let remap_id = match cx.shelf.get::<StandIns>().linked.get(&held.inode()) {
        Some(&known) => known,
        None => {
            let id = cx.new_id();
            let path = match make_link(held, name, id) {
                Ok(path) => path,
                Err(err) => {
                    let what = format!("{} cannot be given another name ({err})", name.display());
                    cx.refuse(held.refuse(what, "close it before the dump"));
                    return Ok(());
                }
            };
            let entry = regfile::entry_of(id, &path, held.stat, libc::O_RDONLY as u32, 0, Default::default());
            cx.add_file(regfile::wrap(entry));
            let stand_ins = cx.shelf.get::<StandIns>();
            stand_ins.links.0.push(path);
            stand_ins.linked.insert(held.inode(), id);
            id
        }
    };
    remap(cx, held.id, remap_id, RemapType::Linked);
    Ok(())
}

/// Makes the further name in the directory of the old one, or in the nearest one above that is still there.
fn make_link(held: &Held<'_>, name: &Path, id: u32) -> Result<PathBuf, SysError> {
    let mut last = SysError::new("link", name.display(), Errno::ENOENT);
    for dir in name.ancestors().skip(1) {
        let path = dir.join(format!("link_remap.{id}"));
        match linkat(AT_FDCWD, held.way.as_str(), AT_FDCWD, &path, AtFlags::AT_SYMLINK_FOLLOW) {
            Ok(()) => return Ok(path),
            Err(e @ (Errno::ENOENT | Errno::ENOTDIR)) => last = SysError::new("link", path.display(), e),
            Err(e) => return Err(SysError::new("link", path.display(), e)),
        }
    }
    Err(last)
}

fn remap(cx: &mut Capture<'_>, orig_id: u32, remap_id: u32, kind: RemapType) {
    cx.shelf.get::<StandIns>().remaps.push(RemapFilePathEntry { orig_id, remap_id, remap_type: Some(kind as i32) });
}

/// Writes the content of a file without a name, once for all who hold it.
fn dump_ghost(cx: &mut Capture<'_>, held: &Held<'_>, name: &Path) -> Result<(), ObjectError> {
    let ghosts = &cx.shelf.get::<StandIns>().ghosts;
    let id = match ghosts.get(&held.inode()) {
        Some(&known) => known,
        None => {
            let id = ghosts.len() as u32 + 1;
            let kind = held.kind();
            let bytes = held.stat.st_blocks as u64 * 512;
            if kind == SFlag::S_IFREG && bytes > cx.options.ghost_limit {
                let what = format!("{} is deleted, and has {bytes} bytes of content", name.display());
                let advice = format!("give --ghost-limit {} to keep it in the images", bytes.next_multiple_of(1 << 20));
                cx.refuse(held.refuse(what, advice));
                return Ok(());
            }
            if kind == SFlag::S_IFSOCK {
                cx.refuse(held.refuse(format!("{} is a deleted socket", name.display()), "close it before the dump"));
                return Ok(());
            }
            write_ghost(cx, held, id)?;
            cx.shelf.get::<StandIns>().ghosts.insert(held.inode(), id);
            id
        }
    };
    remap(cx, held.id, id, RemapType::Ghost);
    Ok(())
}

fn write_ghost(cx: &Capture<'_>, held: &Held<'_>, id: u32) -> Result<(), ObjectError> {
    let stat = held.stat;
    let regular = held.kind() == SFlag::S_IFREG;
    let device = matches!(held.kind(), SFlag::S_IFCHR | SFlag::S_IFBLK);
    let time = |sec: i64, nsec: i64| Some(Timeval { tv_sec: sec as u64, tv_usec: nsec as u64 / 1000 });
    let sparse = regular && (stat.st_blocks * 512) < stat.st_size;
    let target = (held.kind() == SFlag::S_IFLNK)
        .then(|| read_symlink(&held.way))
        .transpose()
        .during("readlink", held.link.display())?;
    let entry = GhostFileEntry {
        uid: stat.st_uid,
        gid: stat.st_gid,
        mode: stat.st_mode,
        dev: Some(kernel_dev(stat.st_dev)),
        ino: Some(stat.st_ino),
        rdev: device.then_some(stat.st_rdev as u32),
        atim: time(stat.st_atime, stat.st_atime_nsec),
        mtim: time(stat.st_mtime, stat.st_mtime_nsec),
        chunks: regular.then_some(sparse),
        size: regular.then_some(stat.st_size as u64),
        symlnk_target: target,
    };
    let mut writer = cx.dir.writer(ImageKind::GhostFile.id(id.into()))?;
    writer.message(&entry)?;
    if regular {
        let flags = libc::O_NOATIME | libc::O_NONBLOCK;
        let mut file =
            File::options().read(true).custom_flags(flags).open(&held.way).during("open", held.link.display())?;
        let size = stat.st_size as u64;
        if sparse {
            let mut at = 0;
            while let Some((start, end)) = kernel::fd::next_data(&file, at, size)? {
                let len = end.min(size) - start;
                file.seek(SeekFrom::Start(start)).during("lseek", held.link.display())?;
                writer.message(&GhostChunkEntry { len, off: start })?;
                writer.payload_from(&mut file, len)?;
                at = end;
            }
        } else {
            writer.payload_from(&mut file, size)?;
        }
    }
    writer.finish()?;
    Ok(())
}

/// What a symbolic link that is held by an O_PATH descriptor points to: readlinkat(2) with an empty path.
fn read_symlink(way: &str) -> Result<Vec<u8>, Errno> {
    let link = open(way, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    nix::fcntl::readlinkat(&link, "").map(OsString::into_vec)
}

/// Writes what stands in for what. The names that were given go away again unless they are kept.
pub fn finish(cx: &mut Capture<'_>) -> Result<Links, ObjectError> {
    let stand_ins = cx.shelf.take::<StandIns>();
    if !stand_ins.remaps.is_empty() {
        cx.dir.write_all(ImageKind::RemapFpath, &stand_ins.remaps)?;
    }
    Ok(stand_ins.links)
}

/// Stand-ins in a restore.
#[derive(Debug, Default)]
struct Planned {
    remaps: Option<HashMap<u32, RemapFilePathEntry>>,
    /// What was planned for each, by kind and id.
    made: HashMap<(i32, u32), FileRef>,
}

/// Plans the stand-in for a file whose name is gone: a handle on it from which it can be opened in any way.
pub fn plan(cx: &mut Planner<'_>, reg: &RegFileEntry) -> Result<Option<FileRef>, ObjectError> {
    if cx.shelf.get::<Planned>().remaps.is_none() {
        let all: Vec<RemapFilePathEntry> = cx.dir.read_all(ImageKind::RemapFpath)?;
        cx.shelf.get::<Planned>().remaps = Some(all.into_iter().map(|r| (r.orig_id, r)).collect());
    }
    let planned = cx.shelf.get::<Planned>();
    let Some(remap) = planned.remaps.as_ref().and_then(|all| all.get(&reg.id)).copied() else { return Ok(None) };
    let key = (remap.remap_type() as i32, remap.remap_id);
    if let Some(&known) = planned.made.get(&key) {
        return Ok(Some(known));
    }
    let path = regfile::path_of(reg);
    let made = match remap.remap_type() {
        RemapType::Ghost => {
            let ghost = Ghost::read(cx.dir, remap.remap_id.into())?;
            cx.plan.open(MakeGhost { path, root: cx.options.root.clone(), id: remap.remap_id, ghost })
        }
        RemapType::Linked => {
            let missing = || ObjectError::contradiction(format!("file {} has no name", remap.remap_id));
            let linked = regfile::path_of(cx.file(remap.remap_id)?.reg.as_deref().ok_or_else(missing)?);
            // Last of all: as long as the restore may fail, the name is part of the images.
            let root = cx.options.root.clone();
            cx.plan.after(Stage::Last, Unlink { path: linked.clone(), root: root.clone() });
            cx.plan.open(FollowLink { path, root, linked })
        }
        RemapType::Procfs => {
            return Err(ObjectError::Unsupported {
                what: format!("{}, which belongs to a process that has ended", path.display()),
                advice: "close it before the dump",
            });
        }
    };
    cx.shelf.get::<Planned>().made.insert(key, made);
    Ok(Some(made))
}

/// A name that is only there for an instant, with the directories that lead to it.
struct Passing {
    path: PathBuf,
    directories: Vec<PathBuf>,
    flag: UnlinkatFlags,
}

impl Passing {
    /// Finds room for a name: the one that the file had, so that /proc shows it again, or one beside it.
    fn make(path: &Path, id: u32, make: impl Fn(&Path) -> Result<(), Errno>) -> Result<Self, SysError> {
        let mut directories = Vec::new();
        for dir in path.ancestors().skip(1) {
            match lstat(dir) {
                Ok(_) => break,
                Err(_) => directories.push(dir.to_owned()),
            }
        }
        for dir in directories.iter().rev() {
            nix::unistd::mkdir(dir, Mode::S_IRWXU).during("mkdir", dir.display())?;
        }
        let mut name = path.to_owned();
        let mut outcome = make(&name);
        for n in 0..100 {
            if outcome != Err(Errno::EEXIST) {
                break;
            }
            let mut other = path.as_os_str().to_owned();
            other.push(format!(".ghost-{id}-{n}"));
            name = other.into();
            outcome = make(&name);
        }
        let passing = Self { path: name, directories, flag: UnlinkatFlags::NoRemoveDir };
        match outcome {
            Ok(()) => Ok(passing),
            Err(e) => {
                passing.remove_directories();
                Err(SysError::new("create", path.display(), e))
            }
        }
    }

    fn remove_directories(&self) {
        for dir in &self.directories {
            // Somebody may have put something there meanwhile.
            let _ = std::fs::remove_dir(dir);
        }
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        if let Err(err) = unlinkat(AT_FDCWD, &self.path, self.flag) {
            warn!(path = %self.path.display(), err = err.desc(), "a name that was made for an instant is left over");
        }
        self.remove_directories();
    }
}

fn handle(path: &Path) -> Result<OwnedFd, SysError> {
    open(path, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty()).during("open", path.display())
}

/// Makes a file without a name.
#[derive(Debug)]
struct MakeGhost {
    path: PathBuf,
    root: Root,
    id: u32,
    ghost: Ghost,
}

impl Opener for MakeGhost {
    fn describe(&self) -> String {
        format!("make {}, which has no name, of {} bytes", self.path.display(), self.ghost.size)
    }

    fn open(&self, _: &Opened) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>> {
        let entry = &self.ghost.entry;
        let kind = SFlag::from_bits_truncate(entry.mode & SFlag::S_IFMT.bits());
        let private = Mode::S_IRUSR | Mode::S_IWUSR;
        let mut passing = Passing::make(&self.root.place(&self.path)?, self.id, |path| match kind {
            SFlag::S_IFDIR => nix::unistd::mkdir(path, Mode::S_IRWXU),
            SFlag::S_IFLNK => {
                let target = entry.symlnk_target.clone().unwrap_or_default();
                symlinkat(OsString::from_vec(target).as_os_str(), AT_FDCWD, path)
            }
            SFlag::S_IFSOCK => Err(Errno::EOPNOTSUPP),
            _ => mknod(path, kind, private, entry.rdev.unwrap_or(0).into()),
        })?;
        if kind == SFlag::S_IFDIR {
            passing.flag = UnlinkatFlags::RemoveDir;
        }
        self.fill(kind, &passing.path)?;
        Ok(handle(&passing.path)?)
    }
}

impl MakeGhost {
    fn fill(&self, kind: SFlag, path: &Path) -> Result<(), SysError> {
        let entry = &self.ghost.entry;
        if kind == SFlag::S_IFREG {
            let file = File::options().write(true).open(path).during("open", path.display())?;
            file.set_len(self.ghost.size).during("ftruncate", path.display())?;
            for piece in &self.ghost.pieces {
                kernel::fd::copy(&self.ghost.image, piece.image_offset, &file, piece.offset, piece.len)?;
            }
        }
        let nofollow = AtFlags::AT_SYMLINK_NOFOLLOW;
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        fchownat(AT_FDCWD, path, Some(uid), Some(gid), nofollow).during("chown", path.display())?;
        if kind != SFlag::S_IFLNK {
            let mode = Mode::from_bits_truncate(entry.mode);
            fchmodat(AT_FDCWD, path, mode, nix::sys::stat::FchmodatFlags::FollowSymlink)
                .during("chmod", path.display())?;
        }
        if let (Some(atim), Some(mtim)) = (&entry.atim, &entry.mtim) {
            let spec = |t: &Timeval| TimeSpec::new(t.tv_sec as i64, (t.tv_usec % 1_000_000 * 1000) as i64);
            utimensat(AT_FDCWD, path, &spec(atim), &spec(mtim), UtimensatFlags::NoFollowSymlink)
                .during("utimensat", path.display())?;
        }
        Ok(())
    }
}

/// Finds a file by the further name that the dump gave it.
#[derive(Debug)]
struct FollowLink {
    path: PathBuf,
    root: Root,
    linked: PathBuf,
}

impl Opener for FollowLink {
    fn describe(&self) -> String {
        format!("find {} by the name {}", self.path.display(), self.linked.display())
    }

    fn open(&self, _: &Opened) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>> {
        let (path, name) = (self.root.place(&self.path)?, self.root.place(&self.linked)?);
        let linked = Passing::make(&path, 0, |path| linkat(AT_FDCWD, &name, AT_FDCWD, path, LinkatFlags::empty()))?;
        Ok(handle(&linked.path)?)
    }
}

/// Takes away the further name, now that the file is held again.
#[derive(Debug)]
struct Unlink {
    path: PathBuf,
    root: Root,
}

impl Deed for Unlink {
    fn describe(&self) -> String {
        format!("unlink({}), which was there for the restore alone", self.path.display())
    }

    fn run(&self, _: &Opened) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let path = self.root.place(&self.path)?;
        Ok(unlinkat(AT_FDCWD, &path, UnlinkatFlags::NoRemoveDir).during("unlink", path.display())?)
    }
}
