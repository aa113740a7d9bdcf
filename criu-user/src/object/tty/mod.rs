//! Terminals: pairs of pseudo-terminals, and `/dev/tty`.
//!
//! A pair is one device with two ends. What belongs to it (settings, size, what was typed ahead or printed and not yet
//! read) is written once for each end that is open, in `tty-info.img` and `tty-data.img`; every open description of an
//! end is an entry of `files.img` that refers to it. A pair of which the tree has the slave only belongs to somebody
//! outside, such as a terminal emulator: with `--shell-job` the restored tree gets the caller's terminal instead.

mod buffer;
mod capture;
mod rebuild;

use nix::sys::stat::{SFlag, major, minor};

use super::ObjectError;
use super::file::{Capture, FileKind, Planner, Seen};
use crate::image::proto::{FdTypes, FileEntry, TermiosEntry};
use crate::kernel::tty::{CONTROL_CHARACTERS, Settings};
use crate::plan::FileRef;

/// Terminals.
#[derive(Debug)]
pub struct Tty;

/// Which device a terminal's name leads to (Documentation/admin-guide/devices.txt).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// `/dev/ptmx`.
    Master,
    /// `/dev/pts/N`.
    Slave,
    /// `/dev/tty`.
    Controlling,
    /// `/dev/console`.
    Console,
    /// `/dev/ttyN`, `/dev/ttySN` and so on.
    Hardware,
}

impl Device {
    /// By the device's number.
    pub fn of(rdev: u64) -> Option<Self> {
        match (major(rdev), minor(rdev)) {
            (5, 0) => Some(Self::Controlling),
            (5, 1) => Some(Self::Console),
            (5, 2) => Some(Self::Master),
            (136..=143, _) => Some(Self::Slave),
            (4 | 166 | 188 | 204 | 207 | 229, _) => Some(Self::Hardware),
            _ => None,
        }
    }
}

/// The N of `/dev/pts/N`.
pub fn slave_index(rdev: u64) -> u32 {
    ((major(rdev) - 136) << 20 | minor(rdev)) as u32
}

/// Ids in `tty-info.img` are two for each pair: CRIU finds the two ends of one by them.
const fn info_id(index: u32, master: bool) -> u32 {
    index * 2 + master as u32
}

impl FileKind for Tty {
    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Tty]
    }

    fn is(&self, seen: &Seen) -> bool {
        seen.file_type() == SFlag::S_IFCHR
            && Device::of(seen.stat.st_rdev).is_some()
            && seen.flags & libc::O_PATH as u32 == 0
    }

    fn capture(&self, seen: &Seen, cx: &mut Capture<'_>) -> Result<FileEntry, ObjectError> {
        capture::description(seen, cx)
    }

    fn finish(&self, cx: &mut Capture<'_>) -> Result<(), ObjectError> {
        capture::finish(cx)
    }

    fn plan(&self, entry: &FileEntry, cx: &mut Planner<'_>) -> Result<FileRef, ObjectError> {
        rebuild::description(entry, cx)
    }

    fn wire(&self, entry: &FileEntry, cx: &mut Planner<'_>) -> Result<(), ObjectError> {
        rebuild::wire(entry, cx)
    }
}

/// CRIU copies the characters as bytes over an array of this many words, and takes no shorter one.
const CHARACTER_WORDS: usize = 32;

fn to_image(settings: &Settings) -> TermiosEntry {
    let [c_iflag, c_oflag, c_cflag, c_lflag] = settings.modes;
    let [c_ispeed, c_ospeed] = settings.speeds;
    let mut bytes = settings.characters.to_vec();
    bytes.resize(4 * CHARACTER_WORDS, 0);
    let c_cc = bytes.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect();
    TermiosEntry { c_iflag, c_oflag, c_cflag, c_lflag, c_line: settings.line.into(), c_ispeed, c_ospeed, c_cc }
}

fn from_image(entry: &TermiosEntry) -> Settings {
    let mut characters = [0; CONTROL_CHARACTERS];
    for (to, from) in characters.iter_mut().zip(entry.c_cc.iter().flat_map(|word| word.to_le_bytes())) {
        *to = from;
    }
    Settings {
        modes: [entry.c_iflag, entry.c_oflag, entry.c_cflag, entry.c_lflag],
        line: entry.c_line as u8,
        characters,
        speeds: [entry.c_ispeed, entry.c_ospeed],
    }
}
