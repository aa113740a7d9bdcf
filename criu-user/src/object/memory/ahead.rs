//! The page map of a process, read ahead of whoever writes its pages.
//!
//! A question about one area takes 2.5 µs however small it is, and there are programs with tens of thousands of areas: so
//! neighbours of the same kind are looked at together.
//!
//! To walk over the page tables takes 2 ms for a gigabyte. A second thread that did so while what was found was
//! written made the freeze no shorter on two processors: the walk took up to twice as long beside the writing.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::super::ObjectError;
use super::dump::{has_own_pages, own_pages};
use crate::kernel::pagemap::{PageMap, Query, Region};
use crate::kernel::survey::Vma;

/// How the page map is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    /// Nothing is changed.
    Looking,
    /// What is found is armed in the same step, where its area is tracked: what is written from then on will be found by the
    /// next image.
    Arming,
}

/// Bytes of a process that are looked at in one go.
const PIECE: u64 = 256 << 20;

/// Some neighbouring areas, or a part of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    start: u64,
    end: u64,
    query: Query,
}

/// What was found in the page map and not asked for yet.
pub(super) struct LookAhead {
    map: PageMap,
    how: How,
    pieces: VecDeque<Piece>,
    /// In the order of the addresses.
    found: VecDeque<Region>,
    /// Up to where was looked.
    until: u64,
    /// Up to where what was found is given out.
    at: u64,
    took: Duration,
}

fn pieces(vmas: &[Vma]) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for vma in vmas.iter().filter(|vma| has_own_pages(vma)) {
        let query = own_pages(vma);
        let mut start = vma.start;
        while start < vma.end {
            match pieces.last_mut() {
                Some(last) if last.end == start && last.query == query && last.end - last.start < PIECE => {
                    last.end = vma.end.min(last.start + PIECE);
                    start = last.end;
                }
                _ => {
                    let end = vma.end.min(start + PIECE);
                    pieces.push(Piece { start, end, query });
                    start = end;
                }
            }
        }
    }
    pieces
}

impl LookAhead {
    /// Begins to read the page map of a process with these areas.
    pub(super) fn new(map: PageMap, vmas: &[Vma], how: How) -> Self {
        let pieces = pieces(vmas).into();
        Self { map, how, pieces, found: VecDeque::new(), until: 0, at: 0, took: Duration::ZERO }
    }

    /// Some more regions of an area; `None` after the last. Areas have to be asked for in their order, all of those that
    /// have pages of their own.
    pub(super) fn regions(&mut self, vma: &Vma) -> Result<Option<Vec<Region>>, ObjectError> {
        let from = self.at.max(vma.start);
        if from >= vma.end {
            return Ok(None);
        }
        if from >= self.until {
            let Some(piece) = self.pieces.pop_front() else {
                return Err(ObjectError::contradiction(format!("nobody has looked at {from:#x}")));
            };
            let begin = Instant::now();
            let mut found = Vec::new();
            match self.how {
                How::Looking => self.map.scan(piece.start, piece.end, piece.query, &mut found)?,
                How::Arming => self.map.scan_and_arm(piece.start, piece.end, piece.query, &mut found)?,
            }
            self.found = found.into();
            self.took += begin.elapsed();
            self.until = piece.end;
        }
        self.at = self.until.min(vma.end);
        Ok(Some(take_of(&mut self.found, vma.start, self.at)))
    }

    /// Arms what could not be armed in the step that found it. All areas have been asked for.
    pub(super) fn finish(&mut self) -> Result<(), ObjectError> {
        let begin = Instant::now();
        if self.how == How::Arming {
            self.map.clear()?;
        }
        self.took += begin.elapsed();
        Ok(())
    }

    /// How long the page map was read so far.
    pub(super) fn took(&self) -> Duration {
        self.took
    }
}

/// Takes what is between two addresses; what comes before is dropped, and what reaches beyond is cut.
fn take_of(found: &mut VecDeque<Region>, start: u64, end: u64) -> Vec<Region> {
    let mut taken = Vec::new();
    while let Some(region) = found.front_mut() {
        if region.start >= end {
            break;
        }
        let part = Region { start: region.start.max(start), end: region.end.min(end), ..*region };
        if part.start < part.end {
            taken.push(part);
        }
        if region.end > end {
            region.start = end;
            break;
        }
        found.pop_front();
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_over_several_areas_is_cut_where_they_meet() {
        let region = |start, end, categories| Region { start, end, categories };
        let mut found = VecDeque::from([region(0x1000, 0x5000, 4), region(0x6000, 0x7000, 8)]);
        assert_eq!(take_of(&mut found, 0x1000, 0x3000), [region(0x1000, 0x3000, 4)]);
        assert_eq!(take_of(&mut found, 0x3000, 0x4000), [region(0x3000, 0x4000, 4)]);
        // An area between is not asked for.
        assert_eq!(take_of(&mut found, 0x4800, 0x6800), [region(0x4800, 0x5000, 4), region(0x6000, 0x6800, 8)]);
        assert_eq!(take_of(&mut found, 0x6800, 0x9000), [region(0x6800, 0x7000, 8)]);
        assert!(found.is_empty());
    }
}
