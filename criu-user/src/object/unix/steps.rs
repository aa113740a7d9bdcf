//! What the engine does for unix sockets: the steps that a plan of theirs is made of.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use nix::unistd::Pid;

use super::super::sockopt::{self, Fresh};
use super::{is_path, path_bytes};
use crate::image::proto::{FilePermsEntry, SkPacketEntry, UnixSkEntry};
use crate::kernel::error::During;
use crate::kernel::pidfd::PidFd;
use crate::kernel::root::Root;
use crate::kernel::scratch::{self, Stand};
use crate::kernel::socket::{self, Extra};
use crate::kernel::{SysResult, fd};
use crate::plan::{Deed, FileRef, Opened, Opener};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// `struct sockaddr_un` of a name.
pub fn address(name: &[u8]) -> Vec<u8> {
    let mut bytes = (libc::AF_UNIX as u16).to_le_bytes().to_vec();
    bytes.extend_from_slice(name);
    bytes
}

fn file(opened: &Opened, file: FileRef) -> Result<&OwnedFd, Failure> {
    opened.get(file).ok_or_else(|| "a file that is not open".into())
}

/// Where a named socket can be reached.
#[derive(Debug, Clone)]
pub enum Place {
    /// By its name.
    Abstract(Vec<u8>),
    /// In this directory, by this name.
    Disk(PathBuf, PathBuf),
    /// In the file system of our own, by this name.
    Scratch(FileRef, String),
}

impl Place {
    /// Its address, for the engine.
    fn address(&self, opened: &Opened) -> Result<Vec<u8>, Failure> {
        Ok(match self {
            Place::Abstract(name) => address(name),
            Place::Disk(dir, name) => address(dir.join(name).as_os_str().as_bytes()),
            Place::Scratch(root, name) => {
                address(format!("/proc/self/fd/{}/{name}", file(opened, *root)?.as_raw_fd()).as_bytes())
            }
        })
    }
}

/// Opens a file system of our own.
#[derive(Debug)]
pub struct Scratch;

impl Opener for Scratch {
    fn describe(&self) -> String {
        "a file system that is mounted nowhere, for names that must not be on disk".into()
    }

    fn open(&self, _: &Opened) -> Result<OwnedFd, Failure> {
        Ok(scratch::filesystem()?)
    }
}

/// Opens a handle of the engine, so that tasks can fetch files from it.
#[derive(Debug)]
pub struct Engine;

impl Opener for Engine {
    fn describe(&self) -> String {
        "the engine itself, for fetching files from it".into()
    }

    fn open(&self, _: &Opened) -> Result<OwnedFd, Failure> {
        Ok(PidFd::open(Pid::this())?.as_fd().try_clone_to_owned()?)
    }
}

/// The ends of pairs that were made together with another end, until they are asked for.
pub type SecondEnd = Rc<RefCell<Option<OwnedFd>>>;

/// Makes a socket, or a pair of them of which it is one end.
#[derive(Debug)]
pub struct Make {
    /// SOCK_*.
    pub kind: u32,
    /// Where the other end goes, of a pair.
    pub second: Option<SecondEnd>,
    /// The name that it is bound to.
    pub binding: Option<Binding>,
}

impl Opener for Make {
    fn describe(&self) -> String {
        let what = if self.second.is_some() { "a pair of unix sockets" } else { "a unix socket" };
        match &self.binding {
            Some(binding) => format!("{what} of type {}, {}", self.kind, binding.describe()),
            None => format!("{what} of type {}", self.kind),
        }
    }

    fn open(&self, opened: &Opened) -> Result<OwnedFd, Failure> {
        let made = match &self.second {
            Some(second) => {
                let (one, two) = socket::pair(self.kind as i32)?;
                *second.borrow_mut() = Some(two);
                one
            }
            None => socket::new(libc::AF_UNIX, self.kind as i32, 0)?,
        };
        if let Some(binding) = &self.binding {
            binding.bind(&made, opened)?;
        }
        Ok(made)
    }
}

/// Takes the other end of a pair.
#[derive(Debug)]
pub struct TakeSecond {
    /// Where it is.
    pub second: SecondEnd,
    /// The name that it is bound to.
    pub binding: Option<Binding>,
}

impl Opener for TakeSecond {
    fn describe(&self) -> String {
        "the other end of the pair".into()
    }

    fn open(&self, opened: &Opened) -> Result<OwnedFd, Failure> {
        let made = self.second.borrow_mut().take().ok_or("the pair was not made")?;
        if let Some(binding) = &self.binding {
            binding.bind(&made, opened)?;
        }
        Ok(made)
    }
}

/// A name, and where it is to be.
#[derive(Debug, Clone)]
pub struct Binding {
    /// The name, word for word.
    pub name: Vec<u8>,
    /// Where it is.
    pub place: Place,
    /// Where paths start.
    pub root: Root,
    /// Mode and owner of the file.
    pub perms: Option<FilePermsEntry>,
    /// Where the file went after it was bound.
    pub moved_to: Option<PathBuf>,
}

impl Binding {
    fn describe(&self) -> String {
        let name = String::from_utf8_lossy(&self.name).replace('\0', "@");
        match &self.place {
            Place::Scratch(..) => format!("bound to the name {name} out of sight"),
            Place::Disk(dir, _) => format!("bound to {name} in {}", dir.display()),
            Place::Abstract(_) => format!("bound to {name}"),
        }
    }

    fn bind(&self, made: &OwnedFd, opened: &Opened) -> Result<(), Failure> {
        if !is_path(&self.name) {
            return Ok(socket::bind(made, &address(&self.name))?);
        }
        let name = Path::new(OsStr::from_bytes(path_bytes(&self.name)));
        let bound = address(path_bytes(&self.name));
        match &self.place {
            Place::Scratch(root, short) => {
                let root = file(opened, *root)?;
                scratch::from(&Stand::Below(root), || {
                    scratch::make_parents(name)?;
                    socket::bind(made, &bound)?;
                    // Whoever connects comes here, whatever the mode was.
                    set_mode(name, 0o777)?;
                    std::fs::rename(name, Path::new("/").join(short)).during("rename", name.display())
                })?;
            }
            Place::Disk(dir, _) => {
                let stand = Stand::In(self.root.clone(), dir.clone());
                scratch::from(&stand, || self.bind_on_disk(made, name, &bound))?;
            }
            Place::Abstract(_) => return Err("a path is no abstract name".into()),
        }
        Ok(())
    }

    fn bind_on_disk(&self, made: &OwnedFd, name: &Path, bound: &[u8]) -> SysResult<()> {
        // The dumped one has left its file behind.
        let place = self.moved_to.as_deref().unwrap_or(name);
        if std::fs::symlink_metadata(place).is_ok_and(|m| m.file_type().is_socket()) {
            std::fs::remove_file(place).during("unlink", place.display())?;
        }
        socket::bind(made, bound)?;
        if let Some(perms) = &self.perms {
            chown(name, Some(perms.uid), Some(perms.gid)).during("chown", name.display())?;
            set_mode(name, perms.mode & 0o7777)?;
        }
        match &self.moved_to {
            Some(to) => std::fs::rename(name, to).during("rename", name.display()),
            None => Ok(()),
        }
    }
}

fn set_mode(path: &Path, mode: u32) -> SysResult<()> {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).during("chmod", path.display())
}

/// Takes over files that a task has made under the numbers that the engine keeps for them.
#[derive(Debug)]
pub struct Collect {
    /// The task.
    pub from: Pid,
    /// The files.
    pub files: Vec<FileRef>,
}

impl Deed for Collect {
    fn describe(&self) -> String {
        format!("take {:?} over from {}, who has made them", self.files, self.from)
    }

    fn run(&self, opened: &Opened) -> Result<(), Failure> {
        let task = PidFd::open(self.from)?;
        for &made in &self.files {
            let own = file(opened, made)?;
            fd::replace(own, task.get(own.as_raw_fd())?)?;
        }
        Ok(())
    }
}

/// Listens.
#[derive(Debug)]
pub struct Listen {
    /// The socket.
    pub socket: FileRef,
    /// How many may wait.
    pub backlog: u32,
}

impl Deed for Listen {
    fn describe(&self) -> String {
        format!("listen({:?}, {})", self.socket, self.backlog)
    }

    fn run(&self, opened: &Opened) -> Result<(), Failure> {
        Ok(socket::listen(file(opened, self.socket)?, self.backlog)?)
    }
}

/// Connects.
#[derive(Debug)]
pub struct Connect {
    /// The socket.
    pub socket: FileRef,
    /// Where to.
    pub to: Place,
}

impl Deed for Connect {
    fn describe(&self) -> String {
        format!("connect {:?} to {:?}", self.socket, self.to)
    }

    fn run(&self, opened: &Opened) -> Result<(), Failure> {
        Ok(socket::connect(file(opened, self.socket)?, &self.to.address(opened)?)?)
    }
}

/// Accepts the connections that were made to a socket, and finds out by a word that each client sends which is whose.
#[derive(Debug)]
pub struct Accept {
    /// The listening socket.
    pub listener: FileRef,
    /// Clients, and which socket is to be their other end.
    pub pairs: Vec<(FileRef, FileRef)>,
}

impl Deed for Accept {
    fn describe(&self) -> String {
        format!("accept {} connection(s) from {:?}", self.pairs.len(), self.listener)
    }

    fn run(&self, opened: &Opened) -> Result<(), Failure> {
        for (n, (client, _)) in self.pairs.iter().enumerate() {
            socket::send(file(opened, *client)?, &(n as u32).to_le_bytes(), &Extra::default())?;
        }
        for _ in &self.pairs {
            let accepted = socket::accept(file(opened, self.listener)?)?;
            let mut word = [0; 4];
            nix::sys::socket::recv(accepted.as_raw_fd(), &mut word, nix::sys::socket::MsgFlags::MSG_DONTWAIT)
                .during("recv", "an accepted connection")?;
            let (_, session) = self.pairs.get(u32::from_le_bytes(word) as usize).ok_or("an unknown connection")?;
            fd::replace(file(opened, *session)?, accepted)?;
        }
        Ok(())
    }
}

/// Who sends a packet.
#[derive(Debug, Clone)]
pub enum Sender {
    /// A socket that is connected with the receiver.
    Peer(FileRef),
    /// A socket that is not.
    Other(FileRef, Place),
    /// Nobody who is still there: a socket of this name (or none) for the time being.
    Nobody(Option<Binding>, Place),
}

/// Fills the queue of a socket.
#[derive(Debug)]
pub struct Fill {
    /// What waits, what descriptors come with it, and who sends it.
    pub packets: Vec<(SkPacketEntry, Vec<u8>, Vec<FileRef>, Sender)>,
    /// Whether the data is a stream.
    pub stream: bool,
}

impl Deed for Fill {
    fn describe(&self) -> String {
        let bytes: usize = self.packets.iter().map(|(_, data, ..)| data.len()).sum();
        format!("send what waits: {} packet(s), {bytes} bytes", self.packets.len())
    }

    fn run(&self, opened: &Opened) -> Result<(), Failure> {
        // The kernel adds less than this to each, and may take twice the room for its bytes.
        const EACH: usize = 2 << 10;
        let room: usize = self.packets.iter().map(|(_, data, ..)| 2 * data.len() + EACH).sum();
        for (entry, data, files, sender) in &self.packets {
            let files = files.iter().map(|&f| Ok(file(opened, f)?.as_fd())).collect::<Result<Vec<_>, Failure>>()?;
            let ucred = entry.ucred.as_ref().map(|u| [u.pid, u.uid, u.gid]);
            let made;
            let (from, to) = match sender {
                Sender::Peer(from) => (file(opened, *from)?, Vec::new()),
                Sender::Other(from, to) => (file(opened, *from)?, to.address(opened)?),
                Sender::Nobody(binding, to) => {
                    made =
                        Make { kind: libc::SOCK_DGRAM as u32, second: None, binding: binding.clone() }.open(opened)?;
                    (&made, to.address(opened)?)
                }
            };
            // All of it must fit; what the program had set comes back with the options.
            const ROOM: i32 = 1 << 29;
            // A sender that is not the peer may fill other queues as well.
            let fits = matches!(sender, Sender::Peer(_))
                && room <= socket::number(from, libc::SOL_SOCKET, libc::SO_SNDBUF)? as usize;
            if !fits {
                socket::set_number(from, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, ROOM)?;
            }
            self.send(from, data, Extra { files, sender: ucred, to: &to, ..Extra::default() })?;
        }
        Ok(())
    }
}

impl Fill {
    fn send(&self, from: &OwnedFd, data: &[u8], mut extra: Extra<'_>) -> Result<(), Failure> {
        let mut rest = data;
        loop {
            let sent = socket::send(from, rest, &extra).or_else(|err| {
                // A sender that has ended since cannot be named.
                if err.errno != nix::errno::Errno::ESRCH {
                    return Err(err);
                }
                extra.sender = None;
                socket::send(from, rest, &extra)
            })?;
            rest = &rest[sent..];
            extra.files.clear();
            if rest.is_empty() {
                return Ok(());
            }
            if !self.stream {
                return Err("a packet went only in part".into());
            }
        }
    }
}

/// Gives a socket what it has of its own: options, flags, halves that are shut down.
#[derive(Debug)]
pub struct Settle {
    /// The socket.
    pub socket: FileRef,
    /// What it was.
    pub entry: Rc<UnixSkEntry>,
    /// What a new one is like, unless it has something from who listened.
    pub fresh: Option<Rc<Fresh>>,
}

impl Deed for Settle {
    fn describe(&self) -> String {
        format!("options and flags of {:?}", self.socket)
    }

    fn run(&self, opened: &Opened) -> Result<(), Failure> {
        let socket = file(opened, self.socket)?;
        match &self.fresh {
            Some(fresh) => fresh.restore(socket, &self.entry.opts)?,
            None => sockopt::restore(socket, &self.entry.opts)?,
        }
        if let Some(how) = sockopt::shutdown_how(self.entry.shutdown()) {
            socket::shutdown(socket, how)?;
        }
        Ok(fd::set_flags_of_new(socket, self.entry.flags as i32)?)
    }
}

/// Takes the names out of the file system of our own: they were never meant to be there.
#[derive(Debug)]
pub struct Forget {
    /// Its root.
    pub root: FileRef,
}

impl Deed for Forget {
    fn describe(&self) -> String {
        format!("unlink all names in {:?}", self.root)
    }

    fn run(&self, opened: &Opened) -> Result<(), Failure> {
        let root = format!("/proc/self/fd/{}", file(opened, self.root)?.as_raw_fd());
        for entry in std::fs::read_dir(&root)? {
            let entry = entry?;
            if entry.file_type()?.is_socket() {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}
