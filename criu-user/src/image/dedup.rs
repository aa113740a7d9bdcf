//! Giving up pages of parent images that a newer image has as well: holes are punched into their pages files.
//!
//! Afterwards the parent serves only those that build on it. Its pagemap goes on to tell of the pages; nobody who starts
//! from the newest image ever asks the parent for them.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;

use nix::fcntl::{FallocateFlags, fallocate};

use super::pages::{Layer, PageFlags, PageRun};
use super::{Content, ImageDir, ImageError};

/// Punches holes into all parents of a dump where it has the data itself. Gives the number of bytes given up.
pub fn dedup(dir: &ImageDir) -> Result<u64, ImageError> {
    let parents = dir.parents()?;
    let mut freed = 0;
    for name in dir.list()? {
        if !matches!(name.kind.content(), Content::Pagemap) {
            continue;
        }
        let newest = Layer::open(dir, name)?;
        for parent in &parents {
            match Layer::open(parent, name) {
                Ok(older) => freed += punch(&newest, &older)?,
                Err(ImageError::Missing { .. }) => {}
                Err(err) => return Err(err),
            }
        }
    }
    Ok(freed)
}

fn punch(newest: &Layer, older: &Layer) -> Result<u64, ImageError> {
    let mut file: Option<File> = None;
    let mut freed = 0;
    let failed = |call, offset, source| ImageError::File { file: older.pages_path.clone(), offset, call, source };
    for (offset, len) in overlaps(&newest.runs, &older.runs) {
        let file = match &mut file {
            Some(file) => file,
            none => {
                let mut options = OpenOptions::new();
                options.write(true).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC);
                none.insert(options.open(&older.pages_path).map_err(|err| failed("open", 0, err))?)
            }
        };
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&*file, flags, offset as i64, len as i64)
            .map_err(|errno| failed("fallocate", offset, errno.into()))?;
        freed += len;
    }
    Ok(freed)
}

/// Pieces of the older pages file (offset, length) whose pages the newer one has. Both lists are sorted.
fn overlaps(newer: &[PageRun], older: &[PageRun]) -> Vec<(u64, u64)> {
    let present = |run: &&PageRun| run.flags.contains(PageFlags::PRESENT);
    let mut pieces: Vec<(u64, u64)> = Vec::new();
    let mut old = older.iter().filter(present).peekable();
    for new in newer.iter().filter(present) {
        while let Some(run) = old.peek().filter(|run| run.range.start() < new.range.end()) {
            let (start, end) = (run.range.start().max(new.range.start()), run.range.end().min(new.range.end()));
            if start < end {
                let offset = run.offset + (start - run.range.start());
                match pieces.last_mut() {
                    Some(last) if last.0 + last.1 == offset => last.1 += end - start,
                    _ => pieces.push((offset, end - start)),
                }
            }
            if run.range.end() > new.range.end() {
                break;
            }
            old.next();
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::super::PageRange;
    use super::*;

    fn runs(list: &[(u64, u64, PageFlags)]) -> Vec<PageRun> {
        let mut offset = 0;
        let run = |&(start, end, flags): &(u64, u64, PageFlags)| {
            let range = PageRange::new(start * 4096, end * 4096).unwrap_or_else(|| panic!("{start}-{end}"));
            let run = PageRun { range, flags, offset };
            if flags.contains(PageFlags::PRESENT) {
                offset += range.bytes();
            }
            run
        };
        list.iter().map(run).collect()
    }

    #[test]
    fn only_data_that_both_have_is_given_up() {
        const HERE: PageFlags = PageFlags::PRESENT;
        const PARENT: PageFlags = PageFlags::PARENT;
        let newer = runs(&[(0, 2, HERE), (2, 4, PARENT), (5, 9, HERE)]);
        let older = runs(&[(1, 3, HERE), (3, 6, HERE), (6, 7, PARENT), (8, 12, HERE)]);
        // Page 1 at offset 0, page 5 at 4, page 8 at 5.
        assert_eq!(overlaps(&newer, &older), [(0, 4096), (4 * 4096, 2 * 4096)]);
        assert!(overlaps(&newer, &runs(&[(2, 5, HERE)])).is_empty());
        assert!(overlaps(&[], &older).is_empty());
    }
}
