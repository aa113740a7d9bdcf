//! Open file descriptions and descriptor tables: what all kinds of file have in common.
//!
//! At dump, every description is read once, through a duplicate of its first descriptor, by the kind that it belongs
//! to. At restore the engine opens every description once; tasks inherit all of them at high numbers and put their own
//! in place with dup3(2).

use std::any::{Any, TypeId};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;

use nix::unistd::Pid;
use tracing::debug;

use super::inet_ahead::Ahead;
use super::memory::Past;
pub use super::seen::Seen;
use super::seen::{AT_ONCE, Glance, Looked};
use super::{KINDS, ObjectError, Refusal, locks, unsupported};
use crate::call;
use crate::image::proto::{FdTypes, FdinfoEntry, FileEntry, FownEntry};
use crate::image::{ImageDir, ImageKind, references};
use crate::kernel::survey::Descriptor;
use crate::kernel::sys::{Compare, kcmp};
use crate::kernel::{self, error::During, pidfd::PidFd};
use crate::observer::Observer;
use crate::parallel;
use crate::plan::{Deed, FileRef, Opened, Plan, Stage, TaskRef, Why};

/// A kind of open file description.
pub trait FileKind: Sync {
    /// Its types in images.
    fn types(&self) -> &'static [FdTypes];

    /// Whether a description is of this kind.
    fn is(&self, seen: &Seen) -> bool;

    /// Reads it. What cannot be dumped is entered in [`Capture::refuse`], and any entry returned.
    fn capture(&self, seen: &Seen, cx: &mut Capture<'_>) -> Result<FileEntry, ObjectError>;

    /// After all descriptions have been read: writes images of the kind's own, refuses what only the whole shows.
    fn finish(&self, _cx: &mut Capture<'_>) -> Result<(), ObjectError> {
        Ok(())
    }

    /// Plans how it is made.
    fn plan(&self, entry: &FileEntry, cx: &mut Planner<'_>) -> Result<FileRef, ObjectError>;

    /// Plans what needs every descriptor in place.
    fn wire(&self, _entry: &FileEntry, _cx: &mut Planner<'_>) -> Result<(), ObjectError> {
        Ok(())
    }
}

/// Things of any type, one of each: where the kinds keep what they must remember between descriptions.
#[derive(Debug, Default)]
pub struct Shelf(HashMap<TypeId, Box<dyn Any>>);

impl Shelf {
    /// The thing of type `T`, made on first use.
    pub fn get<T: Default + 'static>(&mut self) -> &mut T {
        self.0
            .entry(TypeId::of::<T>())
            .or_insert_with(|| Box::<T>::default())
            .downcast_mut()
            .unwrap_or_else(|| unreachable!("entries are keyed by their type"))
    }

    /// Takes the thing of type `T` off the shelf.
    pub fn take<T: Default + 'static>(&mut self) -> T {
        std::mem::take(self.get::<T>())
    }
}

/// A dump in progress, as the kinds see it.
pub struct Capture<'a> {
    /// Where images go.
    pub dir: &'a ImageDir,
    /// What the user asked for.
    pub options: &'a crate::dump::DumpOptions,
    /// Who is told how it goes.
    pub observer: &'a dyn Observer,
    /// Who has which descriptions: (pid, fd) by description id.
    pub holders: BTreeMap<u32, Vec<(Pid, i32)>>,
    /// The processes of the tree.
    pub pids: Vec<Pid>,
    /// What the kinds remember.
    pub shelf: Shelf,
    /// What cannot be dumped.
    pub refusals: Vec<Refusal>,
    /// What is known of the tree's memory from before.
    pub past: Past,
    files: Vec<FileEntry>,
    next_id: u32,
    /// Descriptions that are in no table, only on their way in a socket; held so that they are known again.
    in_flight: Vec<(u32, OwnedFd)>,
    /// Regular files that are no descriptors (programs, mapped files, directories), by path and flags.
    paths: HashMap<(PathBuf, u32), u32>,
}

impl<'a> Capture<'a> {
    /// A new one.
    pub fn new(
        dir: &'a ImageDir,
        options: &'a crate::dump::DumpOptions,
        observer: &'a dyn Observer,
        pids: Vec<Pid>,
    ) -> Self {
        Self {
            dir,
            options,
            observer,
            holders: BTreeMap::new(),
            pids,
            shelf: Shelf::default(),
            refusals: Vec::new(),
            past: Past::default(),
            files: Vec::new(),
            next_id: 1,
            in_flight: Vec::new(),
            paths: HashMap::new(),
        }
    }

    /// Enters something that cannot be dumped.
    pub fn refuse(&mut self, refusal: Refusal) {
        if !self.refusals.contains(&refusal) {
            self.refusals.push(refusal);
        }
    }

    /// A new id in files.img.
    pub fn new_id(&mut self) -> u32 {
        self.next_id += 1;
        self.next_id - 1
    }

    /// Adds an entry of files.img that belongs to no descriptor.
    pub fn add_file(&mut self, entry: FileEntry) {
        self.files.push(entry);
    }

    /// Changes entries of files.img that were made already: what only a later look has shown.
    pub fn amend(&mut self, change: impl FnMut(&mut FileEntry)) {
        self.files.iter_mut().for_each(change);
    }

    /// The id of a regular file that is no descriptor: the same path and flags give the same id.
    pub fn path_id(
        &mut self,
        path: PathBuf,
        flags: u32,
        make: impl FnOnce(&mut Self, u32) -> Result<FileEntry, ObjectError>,
    ) -> Result<u32, ObjectError> {
        if let Some(&id) = self.paths.get(&(path.clone(), flags)) {
            return Ok(id);
        }
        let id = self.new_id();
        let entry = make(self, id)?;
        self.files.push(entry);
        self.paths.insert((path, flags), id);
        Ok(id)
    }

    /// Reads all descriptions, and gives the descriptor table of every process.
    pub fn descriptions(
        &mut self,
        tables: &BTreeMap<Pid, Vec<Descriptor>>,
        pidfds: &BTreeMap<Pid, &PidFd>,
    ) -> Result<BTreeMap<Pid, Vec<FdinfoEntry>>, ObjectError> {
        self.next_id = 1 + tables.values().flatten().map(|d| d.description).max().unwrap_or(0);
        for (&pid, table) in tables {
            for d in table {
                self.holders.entry(d.description).or_default().push((pid, d.fd));
            }
        }
        let mut known = HashSet::new();
        let ahead: Ahead = self.shelf.take();
        let mut all = Vec::new();
        for (&pid, table) in tables {
            let pidfd = *pidfds.get(&pid).ok_or_else(|| ObjectError::contradiction(format!("pid {pid} unheld")))?;
            let glance = |d| Glance { pid, pidfd, d, ahead: &ahead, is_first: known.insert(d.description) };
            all.extend(table.iter().map(glance));
        }
        let mut types: HashMap<u32, FdTypes> = HashMap::new();
        let mut out: BTreeMap<Pid, Vec<FdinfoEntry>> = tables.keys().map(|&pid| (pid, Vec::new())).collect();
        for some in all.chunks(AT_ONCE) {
            let looked = parallel::map(some, Glance::look);
            for (&Glance { pid, d, .. }, looked) in some.iter().zip(looked) {
                let entry = self.descriptor(pid, d, looked?, &mut types)?;
                out.entry(pid).or_default().push(entry);
            }
        }
        *self.shelf.get() = ahead;
        for kind in KINDS {
            kind.finish(self)?;
        }
        Ok(out)
    }

    /// Reads a descriptor, and what it is of if that is not known yet.
    fn descriptor(
        &mut self,
        pid: Pid,
        d: &Descriptor,
        looked: Looked,
        types: &mut HashMap<u32, FdTypes>,
    ) -> Result<FdinfoEntry, ObjectError> {
        let cloexec = match &looked {
            Looked::Anew(seen) => {
                if seen.may_have_locks() {
                    locks::look(self, pid, d.fd, d.description, seen.info()?)?;
                }
                types.insert(d.description, self.describe(seen)?);
                seen.descriptor_flags()? & libc::O_CLOEXEC as u32 != 0
            }
            Looked::Again { cloexec, info } => {
                if let Some(info) = info {
                    locks::look(self, pid, d.fd, d.description, info)?;
                }
                *cloexec
            }
        };
        Ok(FdinfoEntry {
            id: d.description,
            flags: if cloexec { libc::FD_CLOEXEC as u32 } else { 0 },
            r#type: types.get(&d.description).copied().unwrap_or(FdTypes::Und) as i32,
            fd: d.fd as u32,
            ..FdinfoEntry::default()
        })
    }

    /// The id of a description that was found on its way in a socket: that of a known one, or one of its own.
    pub fn in_flight(&mut self, carrier: &Seen, file: OwnedFd) -> Result<u32, ObjectError> {
        let own = Pid::this();
        let same = |pid: Pid, fd: i32| {
            let files = Compare::File(file.as_raw_fd() as u64, fd as u64);
            Ok::<bool, ObjectError>(kcmp(own, pid, files)?.is_eq())
        };
        for (&id, holders) in &self.holders {
            if let Some(&(pid, fd)) = holders.first()
                && same(pid, fd)?
            {
                return Ok(id);
            }
        }
        for (id, known) in &self.in_flight {
            if same(own, known.as_raw_fd())? {
                return Ok(*id);
            }
        }
        let d = Descriptor { fd: file.as_raw_fd(), description: self.new_id(), facts: None };
        let ours = file.try_clone().during("fcntl(F_DUPFD_CLOEXEC)", format!("fd {}", d.fd))?;
        self.in_flight.push((d.description, file));
        let said = self.refusals.len();
        self.describe(&Seen::look(own, &d, ours)?)?;
        for refusal in self.refusals.iter_mut().skip(said).filter(|r| r.pid == own.as_raw()) {
            let what = format!("on its way in a socket, {}", refusal.what);
            *refusal = carrier.refuse(what, std::mem::take(&mut refusal.advice));
        }
        Ok(d.description)
    }

    fn describe(&mut self, seen: &Seen) -> Result<FdTypes, ObjectError> {
        let Some(kind) = KINDS.iter().find(|kind| kind.is(seen)) else {
            self.refuse(unsupported::refuse(seen));
            return Ok(FdTypes::Und);
        };
        let entry = kind.capture(seen, self)?;
        let r#type = entry.r#type();
        let Seen { pid, fd, id, .. } = seen;
        debug!(pid = pid.as_raw(), fd, id, "{} {}", r#type.as_str_name(), seen.link_text());
        self.files.push(entry);
        Ok(r#type)
    }

    /// All entries of files.img.
    pub fn take_files(&mut self) -> Vec<FileEntry> {
        std::mem::take(&mut self.files)
    }
}

/// A restore being planned, as the kinds see it.
pub struct Planner<'a> {
    /// The images.
    pub dir: &'a ImageDir,
    /// What the user asked for.
    pub options: &'a crate::restore::RestoreOptions,
    /// The plan so far.
    pub plan: Plan,
    /// files.img by id.
    pub files: BTreeMap<u32, Rc<FileEntry>>,
    /// Where each description was planned.
    pub refs: HashMap<u32, FileRef>,
    /// The same for files that are mapped in another way than their entries say, by id and access mode.
    pub mapped: HashMap<(u32, u32), FileRef>,
    /// Who has which descriptions: (task, fd) by description id.
    pub holders: BTreeMap<u32, Vec<(TaskRef, i32)>>,
    /// Which of these are closed on exec.
    pub cloexec: HashSet<(TaskRef, i32)>,
    /// Tasks by pid or tid.
    pub tasks: HashMap<i32, TaskRef>,
    /// What the kinds remember.
    pub shelf: Shelf,
}

impl Planner<'_> {
    /// The entry of a description.
    pub fn file(&self, id: u32) -> Result<&FileEntry, ObjectError> {
        self.entry(id).map(|entry| &**entry)
    }

    /// The same, to be kept: entries are large.
    fn entry(&self, id: u32) -> Result<&Rc<FileEntry>, ObjectError> {
        self.files.get(&id).ok_or_else(|| ObjectError::contradiction(format!("files.img has no file {id}")))
    }

    /// Where a description is opened, planned on first use.
    pub fn file_ref(&mut self, id: u32) -> Result<FileRef, ObjectError> {
        if let Some(&known) = self.refs.get(&id) {
            return Ok(known);
        }
        let entry = Rc::clone(self.entry(id)?);
        let kind = kind_of(&entry)?;
        let file = kind.plan(&entry, self)?;
        self.refs.insert(id, file);
        let signals = flags_of(&entry) & libc::O_ASYNC as u32 != 0;
        if let Some(fown) = fown_of(&entry)
            && (fown.pid != 0 || fown.signum != 0 || signals)
        {
            // An owner may be a thread.
            self.plan.after(Stage::Threads, SetOwner { file, fown: *fown, signals });
        }
        Ok(file)
    }

    /// Where a file is opened that is to be mapped. One entry may serve mappings that need it open in different ways:
    /// `flags` says which, where an area knows.
    pub fn mapped_ref(&mut self, id: u32, flags: Option<u32>) -> Result<FileRef, ObjectError> {
        let mode = |flags: u32| flags & libc::O_ACCMODE as u32;
        let mut entry = self.file(id)?.clone();
        let place = match (&mut entry.reg, &mut entry.memfd) {
            (Some(reg), _) => &mut reg.flags,
            (_, Some(memfd)) => &mut memfd.flags,
            _ => return self.file_ref(id),
        };
        let Some(flags) = flags.filter(|&flags| mode(flags) != mode(*place)) else { return self.file_ref(id) };
        *place = flags;
        if let Some(&known) = self.mapped.get(&(id, mode(flags))) {
            return Ok(known);
        }
        let file = kind_of(&entry)?.plan(&entry, self)?;
        self.mapped.insert((id, mode(flags)), file);
        Ok(file)
    }

    /// Plans the descriptor table of a process.
    pub fn descriptors(&mut self, task: TaskRef, table: &[FdinfoEntry]) -> Result<(), ObjectError> {
        let mut kept: Vec<u32> = Vec::with_capacity(table.len());
        for entry in table {
            if entry.fd >= i32::MAX as u32 {
                return Err(ObjectError::contradiction(format!("descriptor {} is no descriptor", entry.fd)));
            }
            let file = self.file_ref(entry.id)?;
            self.holders.entry(entry.id).or_default().push((task, entry.fd as i32));
            let flags = if entry.flags & libc::FD_CLOEXEC as u32 != 0 { libc::O_CLOEXEC } else { 0 };
            if flags != 0 {
                self.cloexec.insert((task, entry.fd as i32));
            }
            let why = Why::Descriptor(entry.fd, entry.id, entry.r#type().as_str_name());
            self.plan.push(task, Stage::Files, call!(SYS_dup3(file, entry.fd, flags), why));
            kept.push(entry.fd);
        }
        kept.sort_unstable();
        let mut next = 0;
        for fd in kept {
            if fd > next {
                let why = "close what was inherited";
                self.plan.push(task, Stage::Files, call!(SYS_close_range(next, fd - 1, 0u32), why));
            }
            next = fd + 1;
        }
        // Everything above goes when nothing is fetched from there any more.
        self.plan.push(
            task,
            Stage::Timers,
            call!(SYS_close_range(next, u32::MAX, 0u32), "close the engine's files, all in their places"),
        );
        Ok(())
    }

    /// Plans what needs all descriptors in place.
    pub fn wiring(&mut self) -> Result<(), ObjectError> {
        // Wiring may plan further files: those that are only on their way in sockets.
        let mut done = BTreeSet::new();
        loop {
            let mut left: Vec<u32> = self.refs.keys().copied().filter(|id| !done.contains(id)).collect();
            if left.is_empty() {
                return Ok(());
            }
            left.sort_unstable();
            for id in left {
                done.insert(id);
                let entry = Rc::clone(self.entry(id)?);
                kind_of(&entry)?.wire(&entry, self)?;
            }
        }
    }
}

fn kind_of(entry: &FileEntry) -> Result<&'static dyn FileKind, ObjectError> {
    KINDS.iter().find(|kind| kind.types().contains(&entry.r#type())).copied().ok_or_else(|| ObjectError::Unsupported {
        what: format!("file {} of type {}", entry.id, entry.r#type().as_str_name()),
        advice: "this kind of file is not supported",
    })
}

/// The owner that an entry names, whichever kind it is.
fn fown_of(entry: &FileEntry) -> Option<&FownEntry> {
    None.or(entry.reg.as_ref().map(|e| &e.fown))
        .or(entry.pipe.as_ref().map(|e| &e.fown))
        .or(entry.usk.as_ref().map(|e| &e.fown))
        .or(entry.isk.as_ref().map(|e| &e.fown))
        .or(entry.psk.as_ref().map(|e| &e.fown))
        .or(entry.efd.as_ref().map(|e| &e.fown))
        .or(entry.epfd.as_ref().map(|e| &e.fown))
        .or(entry.sgfd.as_ref().map(|e| &e.fown))
        .or(entry.tfd.as_ref().map(|e| &e.fown))
        .or(entry.ify.as_ref().map(|e| &e.fown))
        .or(entry.tty.as_ref().map(|e| &e.fown))
        .or(entry.memfd.as_ref().map(|e| &e.fown))
}

/// The flags of an entry whose kind can send signals.
fn flags_of(entry: &FileEntry) -> u32 {
    None.or(entry.reg.as_ref().map(|e| e.flags))
        .or(entry.pipe.as_ref().map(|e| e.flags))
        .or(entry.usk.as_ref().map(|e| e.flags))
        .or(entry.isk.as_ref().map(|e| e.flags))
        .or(entry.psk.as_ref().map(|e| e.flags))
        .or(entry.tty.as_ref().map(|e| e.flags))
        .unwrap_or(0)
}

/// Sets who gets a description's signals, when the receivers are there.
#[derive(Debug)]
struct SetOwner {
    file: FileRef,
    fown: FownEntry,
    /// Whether signals are sent: O_ASYNC, which open(2) does not take.
    signals: bool,
}

impl Deed for SetOwner {
    fn describe(&self) -> String {
        format!("fcntl(F_SETOWN_EX) of {:?}: signal {} to {}", self.file, self.fown.signum, self.fown.pid)
    }

    fn run(&self, opened: &Opened) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let Some(file) = opened.get(self.file) else { return Err("the file is not open".into()) };
        let owner = kernel::fd::Owner {
            kind: self.fown.pid_type as i32,
            id: self.fown.pid as i32,
            signal: self.fown.signum as i32,
            uids: [self.fown.uid, self.fown.euid],
        };
        kernel::fd::set_owner(file, &owner)?;
        if self.signals {
            kernel::fd::set_flags(file, kernel::fd::flags(file)? | libc::O_ASYNC)?;
        }
        Ok(())
    }
}

/// Reads the descriptor table of a process.
pub fn read_table(cx: &Planner<'_>, files_id: u32) -> Result<Vec<FdinfoEntry>, ObjectError> {
    let name = ImageKind::Fdinfo.id(files_id.into());
    let table = cx.dir.read_all(name)?;
    references::descriptors(&cx.dir.path_of(name), &table, |id| cx.files.get(&id).map(|file| file.r#type))?;
    Ok(table)
}
