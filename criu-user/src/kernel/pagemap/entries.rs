//! The page map read entry by entry, as every kernel has it: 8 bytes a page, of pages that are not there as well.
//!
//! # References
//! Documentation/admin-guide/mm/pagemap.rst, fs/proc/task_mmu.c (`pagemap_read`), fs/proc/page.c (`kpageflags_read`).

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::unistd::Pid;

use super::{PageKind, Query, Region};
use crate::kernel::SysResult;
use crate::kernel::anonymous::Pages;
use crate::kernel::error::During;
use crate::kernel::survey::{self, PAGE};

bitflags::bitflags! {
    /// An entry of the page map; the bits below are the number of the page frame, for whoever may know it.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    struct Entry: u64 {
        const SOFT_DIRTY = 1 << 55;
        /// Of a file, or shared memory.
        const FILE = 1 << 61;
        const SWAPPED = 1 << 62;
        const PRESENT = 1 << 63;
        const _ = !0;
    }
}

/// Bits of the number of a page frame.
const FRAME: u64 = (1 << 55) - 1;
/// `KPF_ZERO_PAGE` of include/uapi/linux/kernel-page-flags.h.
const ZERO_PAGE: u64 = 1 << 24;
/// Pages of a huge one.
const HUGE: u64 = 512;
/// Entries read in one call: 256 MiB of memory.
const PIECE: u64 = 64 << 10;
/// Bytes from which on it pays to ask first which areas have any pages: their entries are 2 MiB.
const LARGE: u64 = 1 << 30;

/// Reads the entries of one process.
#[derive(Debug)]
pub(super) struct Entries {
    pid: Pid,
    bytes: Vec<u8>,
    /// What the kernel knows of page frames, and the frame of its page of zeros.
    frames: Option<(File, u64)>,
}

impl Entries {
    pub(super) fn new(pid: Pid) -> Self {
        let frames = File::open("/proc/kpageflags").ok().zip(zero_frame());
        Self { pid, bytes: Vec::new(), frames }
    }

    /// The runs of pages that are there, in memory or swapped out, and match; the first page alone, if one is enough. Guard
    /// regions and parts of huge pages are not told apart.
    pub(super) fn walk(
        &mut self,
        map: &File,
        (start, end): (u64, u64),
        query: Query,
        one_is_enough: bool,
        found: &mut Vec<Region>,
    ) -> SysResult<()> {
        for (start, end) in self.stretches(start, end)? {
            let mut at = start;
            while at < end {
                let until = end.min(at + PIECE * PAGE);
                self.bytes.resize(((until - at) / PAGE * 8) as usize, 0);
                let read = self.read(map, at)?;
                // The end of the address space.
                if read == 0 {
                    break;
                }
                self.matching(at, read, query, one_is_enough, found)?;
                if one_is_enough && !found.is_empty() {
                    return Ok(());
                }
                at += read * PAGE;
            }
        }
        Ok(())
    }

    /// Where to look: of a large range, only at areas that have pages.
    fn stretches(&self, start: u64, end: u64) -> SysResult<Vec<(u64, u64)>> {
        if end - start < LARGE {
            return Ok(vec![(start, end)]);
        }
        let inside = survey::inhabited_of(self.pid)?.into_iter();
        Ok(inside.map(|(from, to)| (from.max(start), to.min(end))).filter(|(from, to)| from < to).collect())
    }

    /// Fills `bytes` from the entry of the page at `at` on, and gives how many entries there were.
    fn read(&mut self, map: &File, at: u64) -> SysResult<u64> {
        let mut filled = 0;
        while filled < self.bytes.len() {
            let offset = at / PAGE * 8 + filled as u64;
            let n = map
                .read_at(&mut self.bytes[filled..], offset)
                .during("read", format_args!("/proc/{}/pagemap at {at:#x}", self.pid))?;
            if n == 0 {
                break;
            }
            filled += n;
        }
        Ok((filled / 8) as u64)
    }

    fn matching(&mut self, at: u64, count: u64, query: Query, one: bool, found: &mut Vec<Region>) -> SysResult<()> {
        let bytes = std::mem::take(&mut self.bytes);
        let entries = bytes
            .chunks_exact(8)
            .take(count as usize)
            .map(|entry| u64::from_ne_bytes(entry.try_into().unwrap_or_default()));
        // The verdict on a huge page holds for all of it.
        let mut huge: Option<(u64, bool)> = None;
        for (page, bits) in (at / PAGE..).zip(entries) {
            let entry = Entry::from_bits_retain(bits);
            if !entry.intersects(Entry::PRESENT | Entry::SWAPPED) {
                continue;
            }
            let mut kind = kind_of(entry);
            // Where pages of zeros cannot be told, one may stand where something was given up: it counts as written.
            kind.set(PageKind::SOFT_DIRTY, kind.contains(PageKind::SOFT_DIRTY) || self.frames.is_none());
            // Nobody's content; the huge one looks as if it were a file's.
            if entry.contains(Entry::PRESENT) && self.is_zeros(page, bits & FRAME, &mut huge)? {
                kind = (kind - PageKind::FILE) | PageKind::PFN_ZERO;
            }
            if !query.wants(kind) {
                continue;
            }
            push(found, page * PAGE, (kind & query.report).bits());
            if one {
                break;
            }
        }
        self.bytes = bytes;
        Ok(())
    }

    /// Whether a page is one of those of zeros that the kernel has once: one of the usual size, and one that is huge.
    fn is_zeros(&self, page: u64, frame: u64, huge: &mut Option<(u64, bool)>) -> SysResult<bool> {
        let Some((flags, zeros)) = &self.frames else { return Ok(false) };
        if frame == *zeros {
            return Ok(true);
        }
        // A part of a huge page has the place in it that it has in its frame.
        if frame % HUGE != page % HUGE {
            return Ok(false);
        }
        let first = frame - frame % HUGE;
        if let Some((_, verdict)) = huge.filter(|&(known, _)| known == first) {
            return Ok(verdict);
        }
        let mut word = [0; 8];
        flags.read_exact_at(&mut word, first * 8).during("read", "/proc/kpageflags")?;
        let verdict = u64::from_ne_bytes(word) & ZERO_PAGE != 0;
        *huge = Some((first, verdict));
        Ok(verdict)
    }
}

fn kind_of(entry: Entry) -> PageKind {
    let bits = [
        (Entry::PRESENT, PageKind::PRESENT),
        (Entry::SWAPPED, PageKind::SWAPPED),
        (Entry::FILE, PageKind::FILE),
        (Entry::SOFT_DIRTY, PageKind::SOFT_DIRTY),
    ];
    bits.into_iter().filter(|(bit, _)| entry.contains(*bit)).map(|(_, kind)| kind).collect()
}

/// Adds a page, to the last run if it goes on there.
fn push(found: &mut Vec<Region>, at: u64, categories: u64) {
    match found.last_mut() {
        Some(last) if last.end == at && last.categories == categories => last.end += PAGE,
        _ => found.push(Region { start: at, end: at + PAGE, categories }),
    }
}

/// The frame of the page of zeros: ours is the same as everybody's. `None` where we may not know it.
fn zero_frame() -> Option<u64> {
    let page = Pages::new(1).ok()?;
    page.look(0);
    let mut entry = [0; 8];
    File::open("/proc/self/pagemap").ok()?.read_exact_at(&mut entry, page.start / PAGE * 8).ok()?;
    Some(u64::from_ne_bytes(entry) & FRAME).filter(|&frame| frame != 0)
}
