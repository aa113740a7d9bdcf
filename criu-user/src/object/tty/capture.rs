//! Terminals at dump.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::Pid;

use super::buffer::{self, End};
use super::{Device, info_id, slave_index, to_image};
use crate::image::ImageKind;
use crate::image::proto::{
    FdTypes, FileEntry, FownEntry, RegFileEntry, TtyDataEntry, TtyFileEntry, TtyInfoEntry, TtyPtyEntry, TtyType,
    WinsizeEntry,
};
use crate::kernel::error::During;
use crate::kernel::tty::{self, Settings};
use crate::kernel::{proc, sys};
use crate::object::file::{Capture, Seen};
use crate::object::{ObjectError, Refusal};

/// The id that CRIU gives `/dev/tty`; further ones, of other sessions, count up from `FURTHER`.
const CONTROLLING: u32 = 2012;
const FURTHER: u32 = 1 << 30;

/// The ends that were found, and for each a duplicate of ours.
#[derive(Debug, Default)]
pub struct Terminals {
    ends: BTreeMap<(u32, bool), Held>,
    controlling: BTreeMap<u32, Held>,
}

#[derive(Debug)]
struct Held {
    file: OwnedFd,
    readable: bool,
    hung_up: bool,
    pid: Pid,
    fd: i32,
    rdev: u64,
    dev: u64,
    uid: u32,
    gid: u32,
}

impl Held {
    fn of(seen: &Seen) -> Result<Self, ObjectError> {
        let file = seen.file.try_clone().during("dup", seen.link.display())?;
        let hung_up = tty::settings(&file).is_err_and(|e| e.errno == Errno::EIO);
        Ok(Self {
            hung_up,
            file,
            readable: seen.flags & libc::O_ACCMODE as u32 != libc::O_WRONLY as u32,
            pid: seen.pid,
            fd: seen.fd,
            rdev: seen.stat.st_rdev,
            dev: seen.stat.st_dev,
            uid: seen.stat.st_uid,
            gid: seen.stat.st_gid,
        })
    }

    fn refuse(&self, what: String, advice: &str) -> Refusal {
        Refusal { pid: self.pid.as_raw(), fd: Some(self.fd), what, advice: advice.into() }
    }
}

/// Reads one description.
pub fn description(seen: &Seen, cx: &mut Capture<'_>) -> Result<FileEntry, ObjectError> {
    let held = Held::of(seen)?;
    let info = match Device::of(seen.stat.st_rdev) {
        Some(Device::Master) => {
            let index = sys::pty_index(held.file.as_fd())?;
            cx.shelf.get::<Terminals>().ends.insert((index, true), held);
            info_id(index, true)
        }
        Some(Device::Slave) => {
            let index = slave_index(seen.stat.st_rdev);
            let known = cx.shelf.get::<Terminals>().ends.entry((index, false));
            // One that can be read from is of more use.
            let known = known.or_insert(held);
            if !known.readable {
                *known = Held::of(seen)?;
            }
            info_id(index, false)
        }
        Some(Device::Controlling) => controlling(seen, held, cx)?,
        _ => {
            cx.refuse(seen.refuse(
                format!("{} is a terminal of this machine, not a pseudo-terminal", seen.link_text()),
                "run the program in a terminal of its own (tmux, screen, script), or close it before the dump",
            ));
            0
        }
    };
    let name = RegFileEntry {
        id: cx.new_id(),
        flags: seen.flags,
        name: seen.link.as_os_str().as_bytes().to_vec(),
        mnt_id: Some(-1),
        mode: Some(seen.stat.st_mode),
        fown: FownEntry::default(),
        ..RegFileEntry::default()
    };
    let (fown, regf_id) = (seen.fown()?, Some(name.id));
    cx.add_file(FileEntry { r#type: FdTypes::Reg as i32, id: name.id, reg: Some(name.into()), ..FileEntry::default() });
    let entry = TtyFileEntry { id: seen.id, tty_info_id: info, flags: seen.flags, fown, regf_id };
    Ok(FileEntry { r#type: FdTypes::Tty as i32, id: seen.id, tty: Some(entry.into()), ..FileEntry::default() })
}

fn controlling(seen: &Seen, held: Held, cx: &mut Capture<'_>) -> Result<u32, ObjectError> {
    let device = match tty::device(&held.file) {
        Ok(device) => device,
        Err(e) if e.errno == Errno::EIO => {
            cx.refuse(seen.refuse("/dev/tty, whose terminal is gone", "close it before the dump"));
            return Ok(0);
        }
        Err(e) => return Err(e.into()),
    };
    if Device::of(device) != Some(Device::Slave) {
        let advice = "run the program in a terminal of its own (tmux, screen, script)";
        cx.refuse(seen.refuse("/dev/tty is a terminal of this machine", advice));
        return Ok(0);
    }
    let index = slave_index(device);
    let terminals = cx.shelf.get::<Terminals>();
    let first = terminals.controlling.keys().next().is_none_or(|&known| known == index);
    terminals.controlling.entry(index).or_insert(held);
    Ok(if first { CONTROLLING } else { FURTHER + index })
}

/// Session and foreground group of a terminal, as the tree's processes know them.
fn control(cx: &Capture<'_>) -> BTreeMap<u32, (i32, i32)> {
    let stats = cx.pids.iter().filter_map(|&pid| proc::stat(pid, None).ok());
    let on_slaves = stats.filter_map(|stat| {
        let device = tty::decode_device(stat.tty as u32);
        (Device::of(device) == Some(Device::Slave)).then(|| {
            let group = stat.foreground.max(0);
            (slave_index(device), (stat.sid.as_raw(), group))
        })
    });
    on_slaves.collect()
}

/// Writes what belongs to the pairs, and refuses those that belong to somebody else.
pub fn finish(cx: &mut Capture<'_>) -> Result<(), ObjectError> {
    let terminals = cx.shelf.take::<Terminals>();
    if terminals.ends.is_empty() && terminals.controlling.is_empty() {
        return Ok(());
    }
    let control = control(cx);
    let (mut infos, mut data) = (Vec::new(), Vec::new());
    refuse_foreign(&terminals, &control, cx)?;
    for (&(index, master), held) in &terminals.ends {
        let (sid, pgrp) = control.get(&index).copied().unwrap_or((0, 0));
        let mut entry = info(held, index, master, sid, pgrp)?;
        let alone = !terminals.ends.contains_key(&(index, false)) && !terminals.controlling.contains_key(&index);
        entry.slave_never_opened = Some(true).filter(|_| master && alone && sid == 0 && !is_hung_up(held));
        infos.push(entry);
        let complete = terminals.ends.contains_key(&(index, true));
        if cx.refusals.is_empty() && complete && !held.hung_up && held.readable {
            let bytes = waiting(held, terminals.ends.get(&(index, !master)), master)?;
            if !bytes.is_empty() {
                data.push(TtyDataEntry { tty_id: info_id(index, master), data: bytes });
            }
        }
    }
    let first = terminals.controlling.keys().next().copied();
    for (&index, held) in &terminals.controlling {
        let (sid, pgrp) = control.get(&index).copied().unwrap_or((0, 0));
        let id = if first == Some(index) { CONTROLLING } else { FURTHER + index };
        let pair = info(held, index, false, sid, pgrp)?;
        infos.push(TtyInfoEntry { id, r#type: TtyType::Ctty as i32, ..pair });
    }
    cx.dir.write_all(ImageKind::TtyInfo, &infos)?;
    cx.dir.write_all(ImageKind::TtyData, &data)?;
    Ok(())
}

fn refuse_foreign(
    terminals: &Terminals,
    control: &BTreeMap<u32, (i32, i32)>,
    cx: &mut Capture<'_>,
) -> Result<(), ObjectError> {
    let inside: BTreeSet<i32> = cx.pids.iter().map(|p| p.as_raw()).collect();
    let shell_job = cx.options.shell_job;
    let slaves = terminals.ends.iter().filter(|((_, master), held)| !master && !held.hung_up);
    let slaves = slaves.map(|(&(index, _), held)| (index, held));
    for (index, held) in slaves.chain(terminals.controlling.iter().map(|(&index, held)| (index, held))) {
        if !terminals.ends.contains_key(&(index, true)) && !shell_job {
            let what = format!("the master of the terminal /dev/pts/{index} is outside of the tree");
            let advice = "give --shell-job if it is the terminal that the program was started in, or redirect the \
                          program's standard streams";
            cx.refuse(held.refuse(what, advice));
        }
    }
    for (&(index, master), held) in &terminals.ends {
        // Only the master tells of sessions that are not ours.
        let sid = if master { sys::tty_session(held.file.as_fd()).unwrap_or(0) } else { 0 };
        if sid != 0 && !inside.contains(&sid) && control.get(&index).is_none_or(|c| c.0 != sid) {
            let what = format!("the terminal /dev/pts/{index} controls session {sid}, which is outside of the tree");
            cx.refuse(held.refuse(what, "dump that session as well, by a common ancestor, or end it"));
        }
    }
    Ok(())
}

fn info(held: &Held, index: u32, master: bool, sid: i32, pgrp: i32) -> Result<TtyInfoEntry, ObjectError> {
    let fd = held.file.as_fd();
    let mut entry = TtyInfoEntry {
        id: info_id(index, master),
        r#type: TtyType::Pty as i32,
        rdev: held.rdev as u32,
        dev: Some(held.dev as u32),
        uid: Some(held.uid),
        gid: Some(held.gid),
        pty: Some(TtyPtyEntry { index }),
        sid: sid as u32,
        pgrp: pgrp as u32,
        ..TtyInfoEntry::default()
    };
    if held.hung_up {
        return Ok(entry);
    }
    entry.exclusive = sys::tty_exclusive(fd)? != 0;
    if master {
        entry.locked = sys::pty_locked(fd)? != 0;
        entry.packet_mode = sys::pty_packet_mode(fd)? != 0;
    }
    entry.termios = Some(to_image(&tty::settings(fd)?));
    // CRIU takes a terminal with settings only if it is said which are locked.
    entry.termios_locked = Some(to_image(&tty::locked_settings(fd).unwrap_or_default()));
    let size = sys::window_size(fd)?;
    entry.winsize = Some(WinsizeEntry {
        ws_row: size.ws_row.into(),
        ws_col: size.ws_col.into(),
        ws_xpixel: size.ws_xpixel.into(),
        ws_ypixel: size.ws_ypixel.into(),
    });
    Ok(entry)
}

/// Whether a master's last slave was closed.
fn is_hung_up(held: &Held) -> bool {
    let mut fds = [PollFd::new(held.file.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok()
        && fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP))
}

fn waiting(held: &Held, peer: Option<&Held>, master: bool) -> Result<Vec<u8>, ObjectError> {
    let settings: Settings = tty::settings(&held.file)?;
    let end = End {
        fd: held.file.as_fd(),
        peer: peer.map(|p| p.file.as_fd()),
        slave: !master,
        packets: master && sys::pty_packet_mode(held.file.as_fd())? != 0,
    };
    if !buffer::may_hold(end, &settings) {
        return Ok(Vec::new());
    }
    Ok(buffer::read(end, &settings)?)
}
