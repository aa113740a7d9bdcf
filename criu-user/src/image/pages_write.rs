//! Writing pagemap-*.img, and handing out places in its pages-*.img.

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
};

use super::{
    ImageDir, ImageError, ImageKind, ImageName, ImageWriter,
    pages::{PAGE_SIZE, PageFlags, PageRange},
    proto::{PagemapEntry, PagemapHead},
};

/// Runs are cut at this length (4 GiB), because older readers count the pages of a run in 32 bits or fewer.
const RUN_MAX: u64 = 1 << 20;

/// A pagemap and its pages file under construction.
///
/// The data is not written by this: [`PagesWriter::append`] says at which offset of [`PagesWriter::pages`] it belongs,
/// and someone (the dumped process itself, as a rule) puts it there with pwrite(2), at any time before
/// [`PagesWriter::finish`].
#[derive(Debug)]
pub struct PagesWriter {
    map: ImageWriter,
    pages: File,
    pages_path: PathBuf,
    /// The last run, which may still grow.
    last: Option<(PageRange, PageFlags)>,
    entries: usize,
    written: PageCounts,
}

/// How many pages went where.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// Into the pages file.
    pub present: u64,
    /// Left in the parent dump.
    pub in_parent: u64,
}

impl PagesWriter {
    /// Begins the pagemap `name` (a [`ImageKind::Pagemap`] or [`ImageKind::PagemapShmem`]) and its pages file, whose
    /// number must be one that no other pagemap of this dump has.
    pub fn create(dir: &ImageDir, name: ImageName, pages_id: u32) -> Result<Self, ImageError> {
        Self::create_with(dir, name, pages_id, None)
    }

    /// The same with a pages file that was made beforehand by [`ImageDir::nameless`]. What it holds does not count, and
    /// where it is too long it is cut in the end.
    pub fn create_with(
        dir: &ImageDir,
        name: ImageName,
        pages_id: u32,
        prepared: Option<File>,
    ) -> Result<Self, ImageError> {
        let pages_name = ImageKind::Pages.id(pages_id.into());
        let mut map = dir.writer(name)?;
        map.message(&PagemapHead { pages_id })?;
        let pages = match prepared {
            Some(file) => dir.adopt(pages_name, file)?,
            None => dir.create_file(pages_name)?,
        };
        let pages_path = dir.path_of(pages_name);
        Ok(Self { map, pages, pages_path, last: None, entries: 0, written: PageCounts::default() })
    }

    /// Adds pages whose data goes into the pages file, and says at which offset. Runs come in the order of their
    /// addresses; neighbours become one entry.
    pub fn append(&mut self, range: PageRange) -> Result<u64, ImageError> {
        let offset = self.end();
        self.push(range, PageFlags::PRESENT)?;
        self.written.present += range.pages();
        Ok(offset)
    }

    /// Adds pages whose data is in the parent dump.
    pub fn in_parent(&mut self, range: PageRange) -> Result<(), ImageError> {
        self.push(range, PageFlags::PARENT)?;
        self.written.in_parent += range.pages();
        Ok(())
    }

    /// The pages file; open for reading and writing, to be passed on.
    pub fn pages(&self) -> BorrowedFd<'_> {
        self.pages.as_fd()
    }

    /// The path of the pages file.
    pub fn pages_path(&self) -> &Path {
        &self.pages_path
    }

    /// How long the pages file has to become by now.
    pub fn end(&self) -> u64 {
        self.written.present * PAGE_SIZE
    }

    /// Completes the pagemap, once all data is in the pages file; that it is not shorter is checked.
    pub fn finish(mut self) -> Result<PageCounts, ImageError> {
        self.flush()?;
        self.map.finish()?;
        let need = self.written.present * PAGE_SIZE;
        let failed = |call| {
            let file = self.pages_path.clone();
            move |source| ImageError::File { file, offset: 0, call, source }
        };
        let left = self.pages.metadata().map_err(failed("fstat"))?.len();
        if left > need {
            self.pages.set_len(need).map_err(failed("ftruncate"))?;
        }
        if left < need {
            let what = "the data of all pages, as just written,";
            return Err(ImageError::Truncated { file: self.pages_path, offset: 0, what, need, left });
        }
        Ok(self.written)
    }

    fn push(&mut self, range: PageRange, flags: PageFlags) -> Result<(), ImageError> {
        match &mut self.last {
            Some((last, _)) if last.end() > range.start() => Err(ImageError::Pagemap {
                file: self.map.path().to_owned(),
                entry: self.entries,
                vaddr: range.start(),
                pages: range.pages(),
                what: "pages must be written in the order of their addresses",
            }),
            Some((last, of)) if last.end() == range.start() && *of == flags => {
                *last = PageRange::new(last.start(), range.end()).unwrap_or(*last);
                Ok(())
            }
            _ => {
                self.flush()?;
                self.last = Some((range, flags));
                Ok(())
            }
        }
    }

    fn flush(&mut self) -> Result<(), ImageError> {
        let Some((range, flags)) = self.last.take() else { return Ok(()) };
        let mut vaddr = range.start();
        while vaddr < range.end() {
            let pages = RUN_MAX.min((range.end() - vaddr) / PAGE_SIZE);
            self.map.message(&PagemapEntry {
                vaddr,
                compat_nr_pages: pages as u32,
                nr_pages: Some(pages),
                in_parent: None,
                flags: Some(flags.bits()),
            })?;
            self.entries += 1;
            vaddr += pages * PAGE_SIZE;
        }
        Ok(())
    }
}
