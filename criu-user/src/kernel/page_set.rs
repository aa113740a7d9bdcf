//! Sets of pages of one address space, as compressed bitmaps of page numbers: a million scattered pages take 2 MB, a
//! gigabyte in one piece a few bytes.

use roaring::RoaringTreemap;

use super::pagemap::Region;
use super::survey::PAGE;

/// A set of pages.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PageSet(RoaringTreemap);

impl PageSet {
    /// Adds the pages from address `start` to address `end`.
    pub fn add(&mut self, start: u64, end: u64) {
        self.0.insert_range(start / PAGE..end / PAGE);
    }

    /// Adds what a scan found.
    pub fn add_regions(&mut self, regions: &[Region]) {
        for region in regions {
            self.add(region.start, region.end);
        }
    }

    /// Number of pages.
    pub fn len(&self) -> u64 {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds all pages of another set.
    pub fn unite(&mut self, other: &PageSet) {
        self.0 |= &other.0;
    }

    /// Takes the pages of another set away.
    pub fn subtract(&mut self, other: &PageSet) {
        self.0 -= &other.0;
    }

    /// Number of pages that are in both.
    pub fn common(&self, other: &PageSet) -> u64 {
        self.0.intersection_len(&other.0)
    }

    /// The set as ranges of addresses, ascending, with a gap between neighbours.
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for page in &self.0 {
            let (start, end) = (page * PAGE, (page + 1) * PAGE);
            match ranges.last_mut() {
                Some(last) if last.1 == start => last.1 = end,
                _ => ranges.push((start, end)),
            }
        }
        ranges
    }

    /// As bytes: the portable format of roaring bitmaps.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.0.serialized_size());
        // Writing to memory does not fail.
        let _ = self.0.serialize_into(&mut bytes);
        bytes
    }

    /// Reads what [`PageSet::to_bytes`] wrote; `None` where it is no such thing.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        RoaringTreemap::deserialize_from(bytes).ok().map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(ranges: &[(u64, u64)]) -> PageSet {
        let mut set = PageSet::default();
        ranges.iter().for_each(|&(start, end)| set.add(start * PAGE, end * PAGE));
        set
    }

    #[test]
    fn ranges_are_joined_and_apart() {
        let mut pages = set(&[(7, 9), (0, 2), (2, 4)]);
        assert_eq!(pages.ranges(), [(0, 4 * PAGE), (7 * PAGE, 9 * PAGE)]);
        pages.subtract(&set(&[(1, 2)]));
        assert_eq!(pages.ranges(), [(0, PAGE), (2 * PAGE, 4 * PAGE), (7 * PAGE, 9 * PAGE)]);
        assert_eq!(pages.common(&set(&[(3, 8)])), 2);
    }

    #[test]
    fn bytes_come_back_and_nonsense_does_not() {
        let pages = set(&[(0x7_ffff_fff0, 0x7_ffff_ffff), (12, 13)]);
        assert_eq!(PageSet::from_bytes(&pages.to_bytes()), Some(pages));
        assert_eq!(PageSet::from_bytes(b"nonsense that is long enough"), None);
    }
}
