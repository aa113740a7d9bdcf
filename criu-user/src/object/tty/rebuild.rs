//! Terminals at restore.
//!
//! The engine opens the master of a pair, under its old number, then the slave; gives the pair back what waited in it
//! and its settings; and opens every description of either end. The leader of a session takes its terminal itself.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid};

use super::buffer::{self, End};
use super::{from_image, info_id};
use crate::call;
use crate::image::ImageKind;
use crate::image::proto::{FdTypes, FileEntry, TtyDataEntry, TtyFileEntry, TtyInfoEntry, TtyType};
use crate::kernel::error::During;
use crate::kernel::{apart, proc, sys, tty};
use crate::object::file::Planner;
use crate::object::{ObjectError, regfile};
use crate::plan::{Deed, FileRef, Opened, Opener, Stage};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// What the images say of terminals, and what was planned of it.
#[derive(Debug, Default)]
pub struct Terminals {
    read: bool,
    infos: BTreeMap<u32, TtyInfoEntry>,
    data: BTreeMap<u32, Vec<u8>>,
    pairs: BTreeMap<u32, Pair>,
    controlled: std::collections::BTreeSet<u32>,
}

/// A pair as it was planned.
#[derive(Debug, Clone, Copy)]
enum Pair {
    /// Both ends are ours; the slave may stay closed.
    Own { master: FileRef, slave: Option<FileRef> },
    /// The caller's terminal stands for it.
    Callers,
}

fn load(cx: &mut Planner<'_>) -> Result<(), ObjectError> {
    if std::mem::replace(&mut cx.shelf.get::<Terminals>().read, true) {
        return Ok(());
    }
    let infos: Vec<TtyInfoEntry> = cx.dir.read_all(ImageKind::TtyInfo)?;
    let data: Vec<TtyDataEntry> = match cx.dir.exists(ImageKind::TtyData)? {
        true => cx.dir.read_all(ImageKind::TtyData)?,
        false => Vec::new(),
    };
    let terminals = cx.shelf.get::<Terminals>();
    for info in infos {
        if terminals.infos.insert(info.id, info).is_some() {
            return Err(ObjectError::contradiction("tty-info.img has two terminals with one id"));
        }
    }
    for entry in data {
        terminals.data.entry(entry.tty_id).or_default().extend(entry.data);
    }
    Ok(())
}

fn info(cx: &mut Planner<'_>, id: u32) -> Result<TtyInfoEntry, ObjectError> {
    load(cx)?;
    let known = cx.shelf.get::<Terminals>().infos.get(&id).cloned();
    known.ok_or_else(|| ObjectError::contradiction(format!("tty-info.img has no terminal {id}")))
}

fn tty_of(entry: &FileEntry) -> Result<&TtyFileEntry, ObjectError> {
    entry.tty.as_deref().ok_or_else(|| ObjectError::contradiction(format!("file {} is empty", entry.id)))
}

/// The name that a description was opened by.
fn name_of(cx: &Planner<'_>, tty: &TtyFileEntry) -> Option<PathBuf> {
    tty.regf_id.and_then(|id| cx.files.get(&id)).and_then(|file| file.reg.as_deref()).map(regfile::path_of)
}

fn index_of(info: &TtyInfoEntry) -> Result<u32, ObjectError> {
    /// What a pair's number may be: NR_UNIX98_PTY_MAX of include/linux/tty.h.
    const MOST: u32 = 1 << 20;
    info.pty
        .map(|pty| pty.index)
        .filter(|&index| index < MOST)
        .ok_or_else(|| ObjectError::contradiction(format!("terminal {} has no number", info.id)))
}

/// Plans one description.
pub fn description(entry: &FileEntry, cx: &mut Planner<'_>) -> Result<FileRef, ObjectError> {
    let tty = *tty_of(entry)?;
    let info = info(cx, tty.tty_info_id)?;
    let flags = tty.flags as i32;
    match info.r#type() {
        TtyType::Pty => {
            let index = index_of(&info)?;
            let pair = pair(cx, index)?;
            match pair {
                Pair::Own { master, .. } if info.id == info_id(index, true) => Ok(master),
                Pair::Own { master, .. } => {
                    let path = slave_name(cx, &tty, index);
                    Ok(cx.plan.open(OpenSlave { master, path, flags, set_up: None }))
                }
                Pair::Callers => Ok(cx.plan.open(OpenCallers { flags })),
            }
        }
        TtyType::Ctty => match controlled_pair(cx, &info)? {
            Some(Pair::Own { slave: Some(slave), .. }) => Ok(cx.plan.open(OpenControlling { slave, flags })),
            _ if cx.options.shell_job => Ok(cx.plan.open(OpenByName { path: "/dev/tty".into(), flags })),
            _ => Err(ObjectError::Unsupported {
                what: format!("file {}, /dev/tty of a session without a terminal", entry.id),
                advice: "give --shell-job to use the caller's terminal",
            }),
        },
        other => Err(ObjectError::Unsupported {
            what: format!("file {}, a terminal of type {}", entry.id, other.as_str_name()),
            advice: "only pseudo-terminals can be restored",
        }),
    }
}

/// The pair that `/dev/tty` stood for: by its number, which we write, or by its session.
fn controlled_pair(cx: &mut Planner<'_>, info: &TtyInfoEntry) -> Result<Option<Pair>, ObjectError> {
    let infos = &cx.shelf.get::<Terminals>().infos;
    let of_session = |i: &&TtyInfoEntry| i.r#type() == TtyType::Pty && i.sid == info.sid && i.sid != 0;
    let by_session = || infos.values().find(of_session).and_then(|i| i.pty);
    match info.pty.or_else(by_session).map(|pty| pty.index) {
        Some(index) if has_end(cx, info_id(index, true)).is_some() => pair(cx, index).map(Some),
        _ => Ok(None),
    }
}

/// The description of an end, where one is open.
fn has_end(cx: &Planner<'_>, info: u32) -> Option<Rc<FileEntry>> {
    let of_end = |file: &&Rc<FileEntry>| {
        file.r#type() == FdTypes::Tty && file.tty.as_deref().is_some_and(|tty| tty.tty_info_id == info)
    };
    cx.files.values().find(of_end).cloned()
}

/// The name of a slave whose master is gone has gone as well: the new pair has the usual one.
fn slave_name(cx: &Planner<'_>, tty: &TtyFileEntry, index: u32) -> PathBuf {
    let deleted = |path: &PathBuf| path.as_os_str().as_encoded_bytes().ends_with(b" (deleted)");
    name_of(cx, tty).filter(|path| !deleted(path)).unwrap_or_else(|| slave_path(index))
}

fn slave_path(index: u32) -> PathBuf {
    format!("/dev/pts/{index}").into()
}

/// Plans a pair.
fn pair(cx: &mut Planner<'_>, index: u32) -> Result<Pair, ObjectError> {
    load(cx)?;
    let terminals = cx.shelf.get::<Terminals>();
    if let Some(&known) = terminals.pairs.get(&index) {
        return Ok(known);
    }
    let ends = [true, false].map(|master| terminals.infos.get(&info_id(index, master)).cloned());
    let [of_master, of_slave] = &ends;
    let open_master = has_end(cx, info_id(index, true));
    let hung_up = of_slave.as_ref().is_some_and(|slave| slave.termios.is_none());
    let planned = match (&open_master, hung_up) {
        (None, false) => callers(cx, of_slave.as_ref())?,
        _ => own(cx, index, open_master.as_deref(), of_master.as_ref(), of_slave.as_ref())?,
    };
    cx.shelf.get::<Terminals>().pairs.insert(index, planned);
    Ok(planned)
}

fn callers(cx: &mut Planner<'_>, slave: Option<&TtyInfoEntry>) -> Result<Pair, ObjectError> {
    if !cx.options.shell_job {
        return Err(ObjectError::Unsupported {
            what: "a terminal whose other end is not part of the dump".into(),
            advice: "give --shell-job to use the caller's terminal instead",
        });
    }
    if let Some(info) = slave {
        let file = cx.plan.open(OpenCallers { flags: libc::O_RDWR });
        let pgrp = info.pgrp as i32;
        let foreground = cx.tasks.contains_key(&pgrp).then_some(pgrp);
        let settings = info.termios.as_ref().map(from_image);
        cx.plan.after(Stage::Groups, SetUpCallers { file, settings, foreground });
    }
    Ok(Pair::Callers)
}

fn own(
    cx: &mut Planner<'_>,
    index: u32,
    open_master: Option<&FileEntry>,
    of_master: Option<&TtyInfoEntry>,
    of_slave: Option<&TtyInfoEntry>,
) -> Result<Pair, ObjectError> {
    let (path, flags) = match open_master {
        Some(entry) => {
            let tty = tty_of(entry)?;
            (name_of(cx, tty).unwrap_or_else(|| "/dev/ptmx".into()), tty.flags as i32)
        }
        // A slave whose master is gone needs one for as long as it takes to open the slave.
        None => ("/dev/ptmx".into(), libc::O_RDWR),
    };
    let master = cx.plan.open(OpenMaster { path, index, flags });
    let terminals = cx.shelf.get::<Terminals>();
    let waiting = [true, false].map(|m| terminals.data.get(&info_id(index, m)).cloned().unwrap_or_default());
    let info = of_slave.or(of_master).filter(|info| info.termios.is_some());
    let set_up = info.map(|info| SetUp { index, info: info.clone(), waiting });
    let never = of_master.is_some_and(|m| m.slave_never_opened()) && of_slave.is_none();
    let (set_up, slave) = if never {
        (set_up, None)
    } else {
        let path = slave_path(index);
        (None, Some(cx.plan.open(OpenSlave { master, path, flags: libc::O_RDWR, set_up })))
    };
    let [of_master, of_slave] = [of_master, of_slave].map(|info| info.cloned().unwrap_or_default());
    cx.plan.after(Stage::Groups, Restrict { index, master, slave, set_up, of_master, of_slave });
    Ok(Pair::Own { master, slave })
}

/// Plans controlling terminals.
pub fn wire(entry: &FileEntry, cx: &mut Planner<'_>) -> Result<(), ObjectError> {
    let info = info(cx, tty_of(entry)?.tty_info_id)?;
    if info.r#type() != TtyType::Pty || info.sid == 0 {
        return Ok(());
    }
    let index = index_of(&info)?;
    let Pair::Own { slave: Some(slave), .. } = pair(cx, index)? else { return Ok(()) };
    if !cx.shelf.get::<Terminals>().controlled.insert(index) {
        return Ok(());
    }
    let Some(&leader) = cx.tasks.get(&(info.sid as i32)) else {
        let what = format!("the terminal {index} controls session {}, which is not part of it", info.sid);
        return Err(ObjectError::contradiction(what));
    };
    let why = format!("/dev/pts/{index} controls the session");
    // Children inherit it: the leader takes it before they are born.
    let take = call!(SYS_ioctl(slave, libc::TIOCSCTTY, 0u64), why);
    cx.plan.task(leader).insert_after(Stage::Tree, libc::SYS_setsid, take);
    if info.pgrp != 0 {
        let why = format!("group {} is in the foreground", info.pgrp);
        let group = info.pgrp.to_le_bytes().to_vec();
        let call = call!(SYS_ioctl(slave, libc::TIOCSPGRP, group), why);
        // The group may have ended and left its number behind.
        let there = cx.tasks.contains_key(&(info.pgrp as i32));
        cx.plan.push(leader, Stage::Wiring, if there { call } else { call.trying() });
    }
    Ok(())
}

/// Opens by name, and never makes it the engine's controlling terminal.
fn open_terminal(path: &Path, flags: i32) -> Result<OwnedFd, Failure> {
    let once = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC;
    let flags = OFlag::from_bits_retain(flags & !once | libc::O_NOCTTY | libc::O_CLOEXEC);
    Ok(open(path, flags, Mode::empty()).during("open", path.display())?)
}

/// Opens the master of a pair with a number of our choice: the kernel gives the lowest that is free.
#[derive(Debug)]
struct OpenMaster {
    path: PathBuf,
    index: u32,
    flags: i32,
}

/// Why a terminal cannot be opened.
#[derive(Debug, thiserror::Error)]
enum TerminalError {
    #[error("/dev/pts/{0} is in use; restore when that terminal is closed, or in a devpts of its own")]
    NumberTaken(u32),
    #[error("the caller has no terminal; run the restore in a shell on a terminal")]
    NoTerminal,
}

impl Opener for OpenMaster {
    fn describe(&self) -> String {
        format!("open {} as the master of /dev/pts/{} with flags {:#o}", self.path.display(), self.index, self.flags)
    }

    fn open(&self, _: &Opened) -> Result<OwnedFd, Failure> {
        let mut lower = Vec::new();
        loop {
            let master = open_terminal(&self.path, self.flags)?;
            match sys::pty_index(master.as_fd())? {
                found if found == self.index => {
                    sys::set_pty_lock(master.as_fd(), 0)?;
                    return Ok(master);
                }
                found if found < self.index => lower.push(master),
                _ => return Err(TerminalError::NumberTaken(self.index).into()),
            }
        }
    }
}

/// Opens the slave of a pair.
#[derive(Debug)]
struct OpenSlave {
    master: FileRef,
    path: PathBuf,
    flags: i32,
    /// The first description of a slave brings the pair to what it was: before it controls a session, which would be
    /// told of every change.
    set_up: Option<SetUp>,
}

impl Opener for OpenSlave {
    fn describe(&self) -> String {
        let (path, master, flags) = (self.path.display(), self.master.0, self.flags);
        let set_up = self.set_up.as_ref().map(|s| format!("; {}", s.describe())).unwrap_or_default();
        format!("open {path}, of the master in file {master}, with flags {flags:#o}{set_up}")
    }

    fn open(&self, opened: &Opened) -> Result<OwnedFd, Failure> {
        let slave = open_terminal(&self.path, self.flags)?;
        if let Some(set_up) = &self.set_up {
            let Some(master) = opened.get(self.master) else { return Err("the master is not open".into()) };
            set_up.apply(master.as_fd(), Some(slave.as_fd()))?;
        }
        Ok(slave)
    }
}

/// Opens `/dev/tty` of a session that does not exist yet.
#[derive(Debug)]
struct OpenControlling {
    slave: FileRef,
    flags: i32,
}

impl Opener for OpenControlling {
    fn describe(&self) -> String {
        format!("open /dev/tty as file {} for its controlling terminal, with flags {:#o}", self.slave.0, self.flags)
    }

    fn open(&self, opened: &Opened) -> Result<OwnedFd, Failure> {
        let Some(slave) = opened.get(self.slave) else { return Err("the terminal is not open".into()) };
        Ok(apart::open_as_controlling(slave, self.flags)?)
    }
}

/// Opens a terminal by a name that needs nothing else.
#[derive(Debug)]
struct OpenByName {
    path: PathBuf,
    flags: i32,
}

impl Opener for OpenByName {
    fn describe(&self) -> String {
        format!("open {} with flags {:#o}", self.path.display(), self.flags)
    }

    fn open(&self, _: &Opened) -> Result<OwnedFd, Failure> {
        open_terminal(&self.path, self.flags)
    }
}

/// Opens the caller's terminal.
#[derive(Debug)]
struct OpenCallers {
    flags: i32,
}

impl Opener for OpenCallers {
    fn describe(&self) -> String {
        format!("open the caller's terminal with flags {:#o}", self.flags)
    }

    fn open(&self, _: &Opened) -> Result<OwnedFd, Failure> {
        open_terminal(&callers_terminal().ok_or(TerminalError::NoTerminal)?, self.flags)
    }
}

/// The terminal of the caller's session; failing that, that of its standard streams.
fn callers_terminal() -> Option<PathBuf> {
    let stat = proc::stat(nix::unistd::Pid::this(), None).ok()?;
    let device = tty::decode_device(stat.tty as u32);
    if super::Device::of(device) == Some(super::Device::Slave) {
        return Some(slave_path(super::slave_index(device)));
    }
    let on_terminal = |fd: &&i32| {
        let path = format!("/proc/self/fd/{fd}");
        nix::sys::stat::stat(path.as_str()).is_ok_and(|s| super::Device::of(s.st_rdev) == Some(super::Device::Slave))
    };
    [0, 1, 2].iter().find(on_terminal).and_then(|fd| proc::link(&format!("/proc/self/fd/{fd}")).ok())
}

/// What a new pair is given.
#[derive(Debug)]
struct SetUp {
    index: u32,
    /// Settings and size, which both ends share.
    info: TtyInfoEntry,
    /// What waits at the master and at the slave.
    waiting: [Vec<u8>; 2],
}

impl SetUp {
    fn describe(&self) -> String {
        let [printed, typed] = self.waiting.each_ref().map(Vec::len);
        format!("its settings, {printed} bytes printed and {typed} bytes typed that wait to be read")
    }

    fn apply(&self, master: BorrowedFd<'_>, slave: Option<BorrowedFd<'_>>) -> Result<(), Failure> {
        let settings = self.info.termios.as_ref().map(from_image).unwrap_or_default();
        let [printed, typed] = &self.waiting;
        buffer::fill(End { fd: master, peer: slave, slave: false, packets: false }, &settings, printed)?;
        if let Some(slave) = slave {
            buffer::fill(End { fd: slave, peer: Some(master), slave: true, packets: false }, &settings, typed)?;
        }
        let locked = self.info.termios_locked.as_ref().map(from_image);
        if let Some(locked) = locked.filter(|locked| *locked != tty::Settings::default()) {
            tty::lock_settings(master, &locked)?;
        }
        if let Some(size) = &self.info.winsize {
            let size = tty::size(size.ws_row, size.ws_col, size.ws_xpixel, size.ws_ypixel);
            sys::set_window_size(master, size)?;
        }
        self.node(slave)
    }

    /// Whose the slave's node is.
    fn node(&self, slave: Option<BorrowedFd<'_>>) -> Result<(), Failure> {
        let (Some(slave), Some(uid), Some(gid)) = (slave, self.info.uid, self.info.gid) else { return Ok(()) };
        if self.info.id != info_id(self.index, false) {
            return Ok(());
        }
        nix::unistd::fchown(slave, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            .during("fchown", format!("/dev/pts/{}", self.index))?;
        Ok(())
    }
}

/// What would be in the way while a pair's ends are opened.
#[derive(Debug)]
struct Restrict {
    index: u32,
    master: FileRef,
    slave: Option<FileRef>,
    /// Where no slave is opened.
    set_up: Option<SetUp>,
    of_master: TtyInfoEntry,
    of_slave: TtyInfoEntry,
}

impl Deed for Restrict {
    fn describe(&self) -> String {
        let of = [
            (self.of_master.packet_mode, "packet mode"),
            (self.of_master.locked, "lock"),
            (self.of_master.exclusive || self.of_slave.exclusive, "exclusive use"),
        ];
        let words: Vec<&str> = of.into_iter().filter_map(|(there, word)| there.then_some(word)).collect();
        let words = if words.is_empty() { "no restrictions".to_owned() } else { words.join(", ") };
        format!("/dev/pts/{}: {words}", self.index)
    }

    fn run(&self, opened: &Opened) -> Result<(), Failure> {
        let Some(master) = opened.get(self.master) else { return Err("the master is not open".into()) };
        let master = master.as_fd();
        if let Some(set_up) = &self.set_up {
            set_up.apply(master, None)?;
        }
        if self.of_master.packet_mode {
            sys::set_pty_packet_mode(master, 1)?;
        }
        if self.of_master.exclusive {
            tty::set_exclusive(master)?;
        }
        if self.of_master.locked {
            sys::set_pty_lock(master, 1)?;
        }
        match self.slave.and_then(|slave| opened.get(slave)) {
            Some(slave) if self.of_slave.exclusive => Ok(tty::set_exclusive(slave)?),
            _ => Ok(()),
        }
    }
}

/// Makes the caller's terminal what the tree's was.
#[derive(Debug)]
struct SetUpCallers {
    file: FileRef,
    settings: Option<tty::Settings>,
    foreground: Option<i32>,
}

impl Deed for SetUpCallers {
    fn describe(&self) -> String {
        match self.foreground {
            Some(group) => format!("settings of the caller's terminal, with group {group} in its foreground"),
            None => "settings of the caller's terminal".into(),
        }
    }

    fn run(&self, opened: &Opened) -> Result<(), Failure> {
        let Some(file) = opened.get(self.file) else { return Err("the terminal is not open".into()) };
        if let Some(settings) = &self.settings {
            tty::set_settings(file, settings)?;
        }
        // A restore in the background leaves its tree there.
        let own = nix::unistd::getpgrp().as_raw();
        match (self.foreground, sys::tty_pgrp(file.as_fd())) {
            (Some(group), Ok(now)) if now == own => match tty::set_foreground(file, group) {
                Err(e) if e.errno != Errno::EPERM && e.errno != Errno::ESRCH => Err(e.into()),
                _ => Ok(()),
            },
            _ => Ok(()),
        }
    }
}
