//! Pipes: their ends, what is in them, and ends that somebody outside of the tree holds.
//!
//! All ends of one pipe have its inode's number in common. At restore the engine makes the pipe and fills it. The two ends
//! that it has then are the first that are needed; further ones are opened through /proc, so that each is a description
//! with flags of its own.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::rc::Rc;

use nix::poll::PollFlags;
use nix::sys::stat::SFlag;

use super::file::{Capture, FileKind, Planner, Seen};
use super::outside::{self, Name};
use super::{ObjectError, Refusal};
use crate::image::proto::{FdTypes, FileEntry, PipeDataEntry, PipeEntry};
use crate::image::{ImageDir, ImageError, ImageKind};
use crate::kernel::pipe::{self, Piece};
use crate::kernel::{self, SysError};
use crate::plan::{FileRef, Opened, Opener};

/// Ends of pipes.
#[derive(Debug)]
pub struct Pipe;

/// What was found of one pipe or FIFO.
#[derive(Debug, Default)]
pub struct Found {
    /// Whether any end reads.
    reads: bool,
    /// Whether any end writes.
    writes: bool,
    /// Whether somebody holds the other end, said by an end of each direction; ours are among them.
    other_end: bool,
    /// What is in it, once an end was met that can tell, and its capacity.
    content: Option<(Vec<Piece>, u32)>,
    /// Where it was met first.
    first: Option<(i32, i32)>,
}

/// Pipes met in a dump, by inode.
#[derive(Debug, Default)]
struct Pipes(BTreeMap<u32, Found>);

/// Access mode of a description's flags.
fn access(flags: u32) -> i32 {
    flags as i32 & libc::O_ACCMODE
}

impl Found {
    /// Looks at one more end.
    pub fn look(&mut self, seen: &Seen) -> Result<(), ObjectError> {
        let mode = access(seen.flags);
        self.first.get_or_insert((seen.pid.as_raw(), seen.fd));
        self.reads |= mode != libc::O_WRONLY;
        self.writes |= mode != libc::O_RDONLY;
        // A reader is told when the last writer is gone, and a writer when the last reader is (fs/pipe.c, pipe_poll);
        // before the first writer of a FIFO came nothing is said.
        let said = kernel::fd::poll_now(&seen.file, PollFlags::empty())?;
        self.other_end |= match mode {
            libc::O_RDONLY => !said.contains(PollFlags::POLLHUP),
            libc::O_WRONLY => !said.contains(PollFlags::POLLERR),
            _ => true,
        };
        if self.content.is_none() && mode != libc::O_WRONLY {
            self.read(&seen.file)?;
        }
        Ok(())
    }

    /// Reads the content through an end that reads.
    pub fn read(&mut self, end: &OwnedFd) -> Result<(), ObjectError> {
        self.content = Some((pipe::content(end)?, kernel::fd::pipe_size(end)? as u32));
        Ok(())
    }

    /// Whether its content is known.
    pub fn is_read(&self) -> bool {
        self.content.is_some()
    }

    /// Whether the end that the tree has not got is held by somebody outside.
    pub fn is_shared(&self) -> bool {
        self.other_end && !(self.reads && self.writes)
    }

    /// Whether there is something in it.
    pub fn has_content(&self) -> bool {
        self.content.as_ref().is_some_and(|(pieces, _)| !pieces.is_empty())
    }

    /// A refusal of it.
    pub fn refuse(&self, what: String, advice: &str) -> Refusal {
        let (pid, fd) = self.first.unwrap_or_default();
        Refusal { pid, fd: Some(fd), what, advice: advice.into() }
    }
}

/// Writes the content of pipes or FIFOs.
pub fn write_content<'f>(
    dir: &ImageDir,
    kind: ImageKind,
    all: impl Iterator<Item = (u32, &'f Found)>,
) -> Result<(), ImageError> {
    let mut writer = None;
    for (pipe_id, found) in all {
        let Some((pieces, size)) = &found.content else { continue };
        let bytes: Vec<u8> = pieces.iter().flat_map(|p| &p.bytes).copied().collect();
        let entry = PipeDataEntry {
            pipe_id,
            bytes: bytes.len() as u32,
            size: Some(*size),
            pieces: pieces.iter().map(|p| (p.bytes.len() as u32) << 1 | u32::from(p.packet)).collect(),
        };
        let writer = match &mut writer {
            Some(writer) => writer,
            None => writer.insert(dir.writer(kind)?),
        };
        writer.message_with_payload(&entry, &bytes)?;
    }
    writer.map_or(Ok(()), |w| w.finish())
}

/// The content of a pipe as the image has it.
#[derive(Debug, Clone, Default)]
pub struct Content {
    /// Its capacity, if known.
    pub capacity: Option<u32>,
    /// What is in it.
    pub pieces: Vec<Piece>,
}

/// Reads the content of all pipes or FIFOs.
pub fn read_content(dir: &ImageDir, kind: ImageKind) -> Result<HashMap<u32, Content>, ObjectError> {
    let mut all = HashMap::new();
    if !dir.exists(kind)? {
        return Ok(all);
    }
    let mut reader = dir.reader(kind)?;
    while let Some((entry, bytes)) = reader.message_with_payload::<PipeDataEntry>()? {
        let pieces = cut(&entry, bytes)?;
        all.insert(entry.pipe_id, Content { capacity: entry.size, pieces });
    }
    Ok(all)
}

/// Cuts content into its pieces; images of others have it in one.
fn cut(entry: &PipeDataEntry, bytes: Vec<u8>) -> Result<Vec<Piece>, ObjectError> {
    if bytes.is_empty() {
        return Ok(Vec::new());
    }
    if entry.pieces.is_empty() {
        return Ok(vec![Piece { bytes, packet: false }]);
    }
    let mut rest = &bytes[..];
    let mut pieces = Vec::with_capacity(entry.pieces.len().min(bytes.len()));
    for word in &entry.pieces {
        let (piece, after) = rest
            .split_at_checked((word >> 1) as usize)
            .filter(|(piece, _)| !piece.is_empty())
            .ok_or_else(|| ObjectError::contradiction(format!("the pieces of pipe {}", entry.pipe_id)))?;
        pieces.push(Piece { bytes: piece.to_vec(), packet: word & 1 != 0 });
        rest = after;
    }
    if rest.is_empty() {
        Ok(pieces)
    } else {
        Err(ObjectError::contradiction(format!("the pieces of pipe {}", entry.pipe_id)))
    }
}

/// What is planned of pipes.
#[derive(Debug, Default)]
struct Planned {
    content: Option<HashMap<u32, Content>>,
    made: HashMap<u32, (FileRef, Rc<Spare>)>,
}

/// The end of a new pipe that is not the one it was made for: the first who needs such an end takes it.
#[derive(Debug, Default)]
struct Spare {
    /// What it can be used for.
    access: i32,
    /// Whether somebody will take it. If not, it must not stay open.
    wanted: Cell<bool>,
    end: RefCell<Option<OwnedFd>>,
}

fn entry_of(entry: &FileEntry) -> Result<&PipeEntry, ObjectError> {
    entry.pipe.as_deref().ok_or_else(|| ObjectError::contradiction(format!("file {} of type PIPE is empty", entry.id)))
}

impl FileKind for Pipe {
    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Pipe]
    }

    fn is(&self, seen: &Seen) -> bool {
        seen.file_type() == SFlag::S_IFIFO && seen.link_text().starts_with("pipe:[")
    }

    fn capture(&self, seen: &Seen, cx: &mut Capture<'_>) -> Result<FileEntry, ObjectError> {
        let pipe_id = seen.stat.st_ino as u32;
        let external = outside::is_external(cx.options, &Name::pipe(pipe_id));
        if !external {
            cx.shelf.get::<Pipes>().0.entry(pipe_id).or_default().look(seen)?;
        }
        let pipe = PipeEntry {
            id: seen.id,
            pipe_id,
            flags: seen.flags,
            fown: seen.fown()?,
            external: external.then_some(true),
        };
        Ok(FileEntry { r#type: FdTypes::Pipe as i32, id: seen.id, pipe: Some(pipe.into()), ..FileEntry::default() })
    }

    fn finish(&self, cx: &mut Capture<'_>) -> Result<(), ObjectError> {
        let pipes = cx.shelf.take::<Pipes>();
        for (id, found) in pipes.0.iter().filter(|(_, found)| found.is_shared()) {
            let which = if found.reads { "write" } else { "read" };
            let what = format!("the {which} end of pipe:[{id}] is held by a process outside of the tree");
            let advice = format!(
                "give --external pipe:[{id}] and at the restore --inherit-fd fd[N]:pipe:[{id}], or dump that process as well"
            );
            cx.refuse(found.refuse(what, &advice));
        }
        Ok(write_content(cx.dir, ImageKind::PipesData, pipes.0.iter().map(|(&id, found)| (id, found)))?)
    }

    fn plan(&self, entry: &FileEntry, cx: &mut Planner<'_>) -> Result<FileRef, ObjectError> {
        let pipe = *entry_of(entry)?;
        let name = Name::pipe(pipe.pipe_id);
        if let Some(given) = outside::given(cx.options, &name)? {
            return Ok(cx.plan.open(Given { name, flags: pipe.flags, given }));
        }
        if pipe.external() {
            return Err(ObjectError::Unsupported {
                what: format!("{}, whose other end was held outside of the tree", name.as_str()),
                advice: "say which descriptor stands for it with --inherit-fd fd[N]:pipe:[INODE]",
            });
        }
        let planned = cx.shelf.get::<Planned>();
        if planned.content.is_none() {
            planned.content = Some(read_content(cx.dir, ImageKind::PipesData)?);
        }
        if let Some((root, spare)) = planned.made.get(&pipe.pipe_id) {
            let spare = (access(pipe.flags) == spare.access && !spare.wanted.replace(true)).then(|| Rc::clone(spare));
            let root = *root;
            return Ok(cx.plan.open(End { what: name.as_str().to_owned(), root, flags: pipe.flags, spare }));
        }
        let content = planned.content.as_mut().and_then(|all| all.remove(&pipe.pipe_id)).unwrap_or_default();
        let other = if access(pipe.flags) == libc::O_RDONLY { libc::O_WRONLY } else { libc::O_RDONLY };
        let spare = Rc::new(Spare { access: other, ..Spare::default() });
        let root = cx.plan.open(Make { id: pipe.pipe_id, content, flags: pipe.flags, spare: Rc::clone(&spare) });
        cx.shelf.get::<Planned>().made.insert(pipe.pipe_id, (root, spare));
        Ok(root)
    }
}

/// Makes a pipe with its content, for its first end.
#[derive(Debug)]
struct Make {
    id: u32,
    content: Content,
    flags: u32,
    spare: Rc<Spare>,
}

impl Opener for Make {
    fn describe(&self) -> String {
        let bytes: usize = self.content.pieces.iter().map(|p| p.bytes.len()).sum();
        format!("make pipe:[{}] with {bytes} bytes in it, an end of flags {:#o}", self.id, self.flags)
    }

    fn open(&self, _: &Opened) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>> {
        let (read, write) = pipe::make(self.content.capacity, &self.content.pieces)?;
        let (end, other) = match access(self.flags) {
            libc::O_RDONLY => (read, write),
            libc::O_WRONLY => (write, read),
            both => (kernel::fd::reopen(&read, both | libc::O_NONBLOCK)?, read),
        };
        if self.spare.wanted.get() {
            self.spare.end.replace(Some(other));
        }
        set_flags(&end, self.flags)?;
        Ok(end)
    }
}

/// Opens an end of a pipe or FIFO that an earlier step has made.
#[derive(Debug)]
pub struct End {
    /// Its name, for a reader.
    pub what: String,
    /// The earlier step.
    pub root: FileRef,
    /// Access mode and status flags.
    pub flags: u32,
    /// What the earlier step has left over.
    spare: Option<Rc<Spare>>,
}

impl End {
    /// An end of a FIFO.
    pub fn new(what: String, root: FileRef, flags: u32) -> Self {
        Self { what, root, flags, spare: None }
    }
}

impl Opener for End {
    fn describe(&self) -> String {
        format!("an end of {}, flags {:#o}", self.what, self.flags)
    }

    fn open(&self, opened: &Opened) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>> {
        if let Some(end) = self.spare.as_ref().and_then(|spare| spare.end.take()) {
            set_flags(&end, self.flags)?;
            return Ok(end);
        }
        let root = opened.get(self.root).ok_or("it has not been made")?;
        Ok(open_end(root, self.flags)?)
    }
}

/// Opens one more end of a pipe.
fn open_end(root: &OwnedFd, flags: u32) -> Result<OwnedFd, SysError> {
    let end = kernel::fd::reopen(root, access(flags) | libc::O_NONBLOCK)?;
    set_flags(&end, flags)?;
    Ok(end)
}

/// Packet mode is asked for at pipe2(2) or by fcntl(2), never at open(2).
fn set_flags(end: &OwnedFd, flags: u32) -> Result<(), SysError> {
    kernel::fd::set_flags(end, flags as i32 & (libc::O_NONBLOCK | libc::O_DIRECT | libc::O_APPEND | libc::O_NOATIME))
}

/// An end that the caller has given.
#[derive(Debug)]
struct Given {
    name: Name,
    flags: u32,
    given: OwnedFd,
}

impl Opener for Given {
    fn describe(&self) -> String {
        format!("the descriptor given for {}", self.name.as_str())
    }

    fn open(&self, _: &Opened) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>> {
        let stat = nix::sys::stat::fstat(&self.given)?;
        // A description of its own where there is a pipe; whatever else was given is taken as it is.
        if stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFIFO.bits()
            && let Ok(end) = open_end(&self.given, self.flags)
        {
            return Ok(end);
        }
        Ok(self.given.try_clone()?)
    }
}
