//! What is seen of open file descriptions: read by several threads at once, and by the kinds of file afterwards.

use std::cell::OnceCell;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use nix::sys::stat::{FileStat, SFlag};
use nix::unistd::Pid;

use super::file::FileKind;
use super::inet::{self, Inet};
use super::inet_ahead::Ahead;
use super::{ObjectError, Refusal};
use crate::image::proto::FownEntry;
use crate::kernel::proc::KeyValues;
use crate::kernel::survey::{Descriptor, Facts};
use crate::kernel::{self, error::During, pidfd::PidFd, proc};

/// A description as it was found.
#[derive(Debug)]
pub struct Seen {
    /// Its id in files.img.
    pub id: u32,
    /// The process whose table it was first seen in.
    pub pid: Pid,
    /// Its number there.
    pub fd: i32,
    /// A duplicate of ours: the same description. Whatever is changed through it is changed for the target.
    pub file: Arc<OwnedFd>,
    /// stat(2) of it.
    pub stat: FileStat,
    /// Where /proc/PID/fd/N points.
    pub link: PathBuf,
    /// Open flags and status flags, without O_CLOEXEC.
    pub flags: u32,
    /// Its position.
    pub pos: u64,
    /// /proc/PID/fdinfo/N, where it was needed so far.
    info: OnceCell<KeyValues>,
    /// What the survey knew of it.
    facts: Option<Facts>,
    /// The family, if it is a socket; asked once.
    family: OnceCell<Option<i32>>,
    /// What is known of an internet socket; asked once.
    inet: OnceCell<inet::Facts>,
}

impl Seen {
    /// Looks at a description through one of its descriptors.
    pub(super) fn look(pid: Pid, d: &Descriptor, file: OwnedFd) -> Result<Self, ObjectError> {
        let stat = nix::sys::stat::fstat(&file).during("fstat", format!("pid {pid}, fd {}", d.fd))?;
        let facts = d.facts.clone();
        // Sockets all look alike there, and have no path.
        let link = match SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) {
            SFlag::S_IFSOCK => format!("socket:[{}]", stat.st_ino).into(),
            _ => match facts.as_ref().and_then(|facts| facts.link.clone()) {
                Some(link) => link,
                None => proc::link(&format!("/proc/{pid}/fd/{}", d.fd))?,
            },
        };
        let (family, inet, info) = Default::default();
        let file = Arc::new(file);
        let mut seen =
            Self { id: d.description, pid, fd: d.fd, file, stat, link, flags: 0, pos: 0, info, facts, family, inet };
        let flags = seen.descriptor_flags()?;
        seen.flags = flags & !(libc::O_CLOEXEC as u32);
        seen.pos = match &seen.facts {
            Some(facts) => facts.pos,
            None => seen.info()?.number("pos", 10)?,
        };
        // What stands there and nowhere else.
        if seen.link_text().starts_with("anon_inode:") || seen.may_have_locks() {
            seen.info()?;
        }
        Ok(seen)
    }

    /// /proc/PID/fdinfo/N.
    pub fn info(&self) -> Result<&KeyValues, ObjectError> {
        match self.info.get() {
            Some(known) => Ok(known),
            None => {
                let info = KeyValues::fdinfo(self.pid, self.fd)?;
                Ok(self.info.get_or_init(|| info))
            }
        }
    }

    /// Its flags, with O_CLOEXEC if the descriptor that it was seen by is closed on exec.
    pub(super) fn descriptor_flags(&self) -> Result<u32, ObjectError> {
        match &self.facts {
            Some(facts) => Ok(facts.flags),
            None => Ok(self.info()?.number("flags", 8)? as u32),
        }
    }

    /// Whether fdinfo may show locks.
    pub(super) fn may_have_locks(&self) -> bool {
        self.facts.as_ref().is_none_or(|facts| facts.may_have_locks)
    }

    /// The number of the mount that it was opened by, as in mountinfo.
    pub fn mount(&self) -> Result<u64, ObjectError> {
        match self.facts.as_ref().and_then(|facts| facts.mount) {
            Some(mount) => Ok(mount),
            None => Ok(self.info()?.number("mnt_id", 10)?),
        }
    }

    /// What is known of it as an internet socket.
    pub fn inet(&self) -> Result<&inet::Facts, ObjectError> {
        match self.inet.get() {
            Some(known) => Ok(known),
            None => {
                let facts = inet::Facts::read(&self.file, self.stat.st_ino)?;
                Ok(self.inet.get_or_init(|| facts))
            }
        }
    }

    /// The file type bits.
    pub fn file_type(&self) -> SFlag {
        SFlag::from_bits_truncate(self.stat.st_mode & SFlag::S_IFMT.bits())
    }

    /// The family, if it is a socket.
    pub fn family(&self) -> Option<i32> {
        let is_socket = self.file_type() == SFlag::S_IFSOCK;
        *self.family.get_or_init(|| is_socket.then(|| super::sockopt::family(&self.file)).flatten())
    }

    /// The link's text; kinds without a path have names such as `anon_inode:[eventfd]`.
    pub fn link_text(&self) -> std::borrow::Cow<'_, str> {
        self.link.to_string_lossy()
    }

    /// Whether it is an anonymous inode of this name.
    pub fn is_anon(&self, name: &str) -> bool {
        self.link_text().strip_prefix("anon_inode:").is_some_and(|n| n.trim_matches(['[', ']']) == name)
    }

    /// Who gets its signals.
    pub fn fown(&self) -> Result<FownEntry, ObjectError> {
        let cannot = self.facts.as_ref().is_some_and(|facts| !facts.may_have_owner);
        // O_PATH handles have no owner, and fcntl(2) refuses to say so.
        if cannot || self.flags & libc::O_PATH as u32 != 0 {
            return Ok(FownEntry::default());
        }
        let owner = kernel::fd::owner(&self.file)?;
        Ok(FownEntry {
            uid: owner.uids[0],
            euid: owner.uids[1],
            signum: owner.signal as u32,
            // The image has the kernel's own numbering: PIDTYPE_PID + 1 …, see [`owner_kind`].
            pid_type: pid_type(owner.kind),
            pid: owner.id as u32,
        })
    }

    /// A refusal of it.
    pub fn refuse(&self, what: impl Into<String>, advice: impl Into<String>) -> Refusal {
        Refusal { pid: self.pid.as_raw(), fd: Some(self.fd), what: what.into(), advice: advice.into() }
    }
}

/// Descriptors whose descriptions we hold at a time: far fewer than we may have open by default (1024), however many the
/// tree has.
pub(super) const AT_ONCE: usize = 256;

/// Descriptors that a table has room for as it is made (NR_OPEN_DEFAULT of include/linux/fdtable.h).
const FEW: usize = 64;

/// Makes room for the descriptors that we hold in the dump of these processes: for a connection, until it is over, and one
/// for its image. And for so many other files.
pub fn make_room(tree: &[Pid], files: usize) {
    let all: usize = tree.iter().map(|&pid| proc::count_descriptors(pid)).sum();
    // A tree with few needs no more than there is.
    if all + files > FEW {
        kernel::fd::make_room(i32::try_from(2 * all + files + 2 * AT_ONCE).unwrap_or(i32::MAX));
    }
}

/// A descriptor to be looked at.
pub(super) struct Glance<'g> {
    pub pid: Pid,
    pub pidfd: &'g PidFd,
    pub d: &'g Descriptor,
    /// What was asked before the freeze.
    pub ahead: &'g Ahead,
    /// Whether nobody has looked at its description yet.
    pub is_first: bool,
}

/// What there is to be seen.
pub(super) enum Looked {
    /// The description.
    Anew(Box<Seen>),
    /// One more descriptor, closed on exec or not, and its fdinfo if locks may stand there.
    Again { cloexec: bool, info: Option<KeyValues> },
}

impl Glance<'_> {
    /// Reads all that the dump need not be known for: several threads do so at once.
    pub fn look(&self) -> Result<Looked, ObjectError> {
        let &Self { pid, pidfd, d, ahead, is_first } = self;
        if !is_first {
            return self.look_again();
        }
        let seen = Seen::look(pid, d, pidfd.get(d.fd)?)?;
        if Inet.is(&seen) {
            let facts = ahead.facts(&seen)?;
            seen.inet.get_or_init(|| facts);
        }
        Ok(Looked::Anew(Box::new(seen)))
    }

    fn look_again(&self) -> Result<Looked, ObjectError> {
        let (info, flags) = match &self.d.facts {
            Some(facts) if !facts.may_have_locks => (None, facts.flags),
            _ => {
                let info = KeyValues::fdinfo(self.pid, self.d.fd)?;
                let flags = info.number("flags", 8)? as u32;
                (Some(info), flags)
            }
        };
        Ok(Looked::Again { cloexec: flags & libc::O_CLOEXEC as u32 != 0, info })
    }
}

/// F_OWNER_TID, F_OWNER_PID and F_OWNER_PGRP as the image writes them, which is as fcntl(2) does.
fn pid_type(kind: i32) -> u32 {
    kind as u32
}
