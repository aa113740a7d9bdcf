//! Where the pages of a process are: pagemap-*.img and the pages-*.img that it names.
//!
//! A pagemap is a list of runs of pages, sorted by address. The data of those that are *present* stands in the pages file
//! in the same order, with nothing between; so the offset of each is the sum of those before it. A run may be *in the
//! parent* instead: its data is in the dump that this one builds on, or in that one's parent, page by page.
//!
//! The data itself never passes through here. The reader says which bytes of which file belong where, so that they can be
//! read, mapped or spliced by whoever needs them; [`PagesWriter`](super::PagesWriter) hands out places in a file.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use super::{
    ImageDir, ImageError, ImageKind, ImageName,
    check::Budget,
    proto::{PagemapEntry, PagemapHead},
};

/// Size of a page on x86-64; huge pages are runs of these in images.
pub const PAGE_SIZE: u64 = 4096;

/// Whole pages from `start` up to `end`, which is outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageRange {
    start: u64,
    end: u64,
}

impl PageRange {
    /// The range, if both ends are at the border of a page and it is not empty.
    pub const fn new(start: u64, end: u64) -> Option<PageRange> {
        if start < end && start.is_multiple_of(PAGE_SIZE) && end.is_multiple_of(PAGE_SIZE) {
            Some(PageRange { start, end })
        } else {
            None
        }
    }

    /// The range of so many pages, if it is not empty and ends before the end of all addresses.
    pub fn of_pages(start: u64, pages: u64) -> Option<PageRange> {
        PageRange::new(start, start.checked_add(pages.checked_mul(PAGE_SIZE)?)?)
    }

    /// The first address.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// The first address behind.
    pub const fn end(self) -> u64 {
        self.end
    }

    /// In bytes.
    pub const fn bytes(self) -> u64 {
        self.end - self.start
    }

    /// In pages.
    pub const fn pages(self) -> u64 {
        self.bytes() / PAGE_SIZE
    }
}

bitflags::bitflags! {
    /// Where the data of a run is; the numbers are those of the images.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct PageFlags: u32 {
        /// In the parent dump.
        const PARENT = 1;
        /// It may be brought in when it is first touched.
        const LAZY = 2;
        /// In the pages file.
        const PRESENT = 4;
    }
}

/// A run of pages as its own pagemap tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// The addresses (in a shared memory object: the offsets).
    pub range: PageRange,
    /// Where the data is.
    pub flags: PageFlags,
    /// Where in the pages file, if it is present.
    pub offset: u64,
}

/// A run of pages with its data found, in this dump or in one that it builds on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FoundRun {
    /// The addresses (in a shared memory object: the offsets).
    pub range: PageRange,
    /// Which dump: 0 is this one, 1 its parent, and so on. See [`PageMap::pages`].
    pub dump: usize,
    /// Where in the pages file.
    pub offset: u64,
}

/// A dump and all those it builds on, opened once for all of its pagemaps.
#[derive(Debug)]
pub struct PageStore<'d> {
    dir: &'d ImageDir,
    parents: Vec<ImageDir>,
}

impl<'d> PageStore<'d> {
    /// Follows the chain of parents.
    pub fn open(dir: &'d ImageDir) -> Result<Self, ImageError> {
        Ok(Self { dir, parents: dir.parents()? })
    }

    /// The pages of a process.
    pub fn process(&self, pid: u32) -> Result<PageMap, ImageError> {
        self.map(ImageKind::Pagemap.id(pid.into()))
    }

    /// The pages of a shared memory object.
    pub fn shmem(&self, id: u64) -> Result<PageMap, ImageError> {
        self.map(ImageKind::PagemapShmem.id(id))
    }

    fn map(&self, name: ImageName) -> Result<PageMap, ImageError> {
        let mut layers = vec![Layer::open(self.dir, name)?];
        for dir in &self.parents {
            // No layer below is needed where the one above refers to nothing in it.
            if !layers.last().is_some_and(|above| above.any(PageFlags::PARENT)) {
                break;
            }
            match Layer::open(dir, name) {
                Ok(layer) => layers.push(layer),
                Err(ImageError::Missing { .. }) => break,
                Err(e) => return Err(e),
            }
        }
        Ok(PageMap { layers })
    }
}

/// A pagemap of one dump, and the file that it names.
#[derive(Debug)]
pub(super) struct Layer {
    path: PathBuf,
    pub(super) pages_path: PathBuf,
    pages: File,
    pub(super) runs: Vec<PageRun>,
}

impl Layer {
    pub(super) fn open(dir: &ImageDir, name: ImageName) -> Result<Layer, ImageError> {
        let mut reader = dir.reader(name)?;
        let path = reader.path().to_owned();
        let head: PagemapHead = reader.required()?;
        let mut runs = RunList { path: &path, runs: Vec::new(), end: 0 };
        let mut budget = Budget::default();
        loop {
            let at = reader.position();
            let Some(entry) = reader.message::<PagemapEntry>()? else { break };
            budget.spend::<PageRun>(&path, at, 0)?;
            runs.push(&entry)?;
        }
        let RunList { runs, end, .. } = runs;

        let pages_name = ImageKind::Pages.id(head.pages_id.into());
        let (pages, size) = dir.open_sized(pages_name)?;
        let pages_path = dir.path_of(pages_name);
        if size < end {
            let what = "the data of all pages";
            return Err(ImageError::Truncated { file: pages_path, offset: 0, what, need: end, left: size });
        }
        Ok(Layer { path, pages_path, pages, runs })
    }

    fn any(&self, flag: PageFlags) -> bool {
        self.runs.iter().any(|run| run.flags.contains(flag))
    }

    fn wrong(&self, entry: usize, what: &'static str) -> ImageError {
        let PageRun { range, .. } = self.runs[entry];
        ImageError::Pagemap { file: self.path.clone(), entry, vaddr: range.start, pages: range.pages(), what }
    }
}

/// Runs while they are read, and how much of the pages file they take.
struct RunList<'p> {
    path: &'p Path,
    runs: Vec<PageRun>,
    end: u64,
}

impl RunList<'_> {
    fn push(&mut self, entry: &PagemapEntry) -> Result<(), ImageError> {
        let pages = entry.nr_pages.unwrap_or(entry.compat_nr_pages.into());
        let wrong = |what| {
            let file = self.path.to_owned();
            Err(ImageError::Pagemap { file, entry: self.runs.len(), vaddr: entry.vaddr, pages, what })
        };
        let Some(range) = PageRange::of_pages(entry.vaddr, pages) else {
            return wrong("these are no pages that could exist; the file is damaged");
        };
        if self.runs.last().is_some_and(|before| before.range.end > range.start) {
            return wrong("it comes before the end of the entry before it; the file is damaged");
        }
        // Dumps of old say `in_parent`, and nothing of what is simply there.
        let bits = match (entry.flags, entry.in_parent()) {
            (flags, true) => flags.unwrap_or(0) | PageFlags::PARENT.bits(),
            (Some(flags), false) => flags,
            (None, false) => PageFlags::PRESENT.bits(),
        };
        let Some(flags) = PageFlags::from_bits(bits) else {
            return wrong("it has flags that are not known here; restore with the program that made it");
        };
        if flags.contains(PageFlags::PARENT | PageFlags::PRESENT) {
            return wrong("it is said to be both here and in the parent dump; the file is damaged");
        }
        let offset = self.end;
        if flags.contains(PageFlags::PRESENT) {
            match self.end.checked_add(range.bytes()) {
                Some(end) => self.end = end,
                None => return wrong("all pages together are more than a file can hold; the file is damaged"),
            }
        }
        self.runs.push(PageRun { range, flags, offset });
        Ok(())
    }
}

/// The pages of one process or shared memory object, through all dumps of the chain.
#[derive(Debug)]
pub struct PageMap {
    layers: Vec<Layer>,
}

impl PageMap {
    /// The runs as the newest dump tells them, sorted by address.
    pub fn runs(&self) -> &[PageRun] {
        &self.layers[0].runs
    }

    /// The pages file of a dump, for pread(2), mmap(2) and splice(2), and its path for messages.
    pub fn pages(&self, dump: usize) -> Option<(&File, &Path)> {
        self.layers.get(dump).map(|layer| (&layer.pages, &*layer.pages_path))
    }

    /// All pages with their data found, sorted by address, neighbours joined where their data is.
    /// A page that no dump has data of is an error.
    pub fn found(&self) -> Result<Vec<FoundRun>, ImageError> {
        let mut found = Vec::with_capacity(self.layers[0].runs.len());
        // Every layer is walked from its start to its end once: all lists are sorted.
        let mut at = vec![0; self.layers.len()];
        for (entry, run) in self.layers[0].runs.iter().enumerate() {
            if !self.find(0, run.range, &mut at, &mut found)? {
                let lazy = run.flags == PageFlags::LAZY;
                return Err(self.layers[0].wrong(
                    entry,
                    if lazy {
                        "its data was left with the dumped process, to be fetched later; dump again without lazy pages"
                    } else {
                        "its data should be in a parent dump and is not; bring the chain of `parent` links in order"
                    },
                ));
            }
        }
        Ok(found)
    }

    /// Finds a range from a layer downwards; whether all of it was found.
    fn find(
        &self,
        dump: usize,
        range: PageRange,
        at: &mut [usize],
        found: &mut Vec<FoundRun>,
    ) -> Result<bool, ImageError> {
        // One frame for each dump of the chain, whose length is capped.
        let Some(layer) = self.layers.get(dump) else { return Ok(false) };
        let mut next = range.start;
        while next < range.end {
            while layer.runs.get(at[dump]).is_some_and(|run| run.range.end <= next) {
                at[dump] += 1;
            }
            let Some(run) = layer.runs.get(at[dump]).filter(|run| run.range.start <= next) else { return Ok(false) };
            let part = PageRange { start: next, end: range.end.min(run.range.end) };
            if run.flags.contains(PageFlags::PRESENT) {
                let offset = run.offset + (part.start - run.range.start);
                join(found, FoundRun { range: part, dump, offset });
            } else if !run.flags.contains(PageFlags::PARENT) || !self.find(dump + 1, part, at, found)? {
                return Ok(false);
            }
            next = part.end;
        }
        Ok(true)
    }
}

fn join(found: &mut Vec<FoundRun>, run: FoundRun) {
    match found.last_mut() {
        Some(last)
            if last.dump == run.dump
                && last.range.end == run.range.start
                && last.offset + last.range.bytes() == run.offset =>
        {
            last.range.end = run.range.end;
        }
        _ => found.push(run),
    }
}

/// How many entries a pagemap has, if it and its pages file are in order.
pub(super) fn count(dir: &ImageDir, name: ImageName) -> Result<usize, ImageError> {
    Layer::open(dir, name).map(|layer| layer.runs.len())
}
