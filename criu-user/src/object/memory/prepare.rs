//! Room for pages that is made before the tree stands still.
//!
//! To write a page into a new file is mostly work on the file: finding a page of memory for it, and a place on the
//! disk (in a virtual machine the host's work too, if it has taken free memory back). Where the file is as long as it will
//! be and in memory already, writing it is a copy. So files without a name are filled with zeros while the tree runs, and
//! get their names in the freeze.
//!
//! It is more work all in all, so it is done only where the time that the tree stands still is what counts: it runs on after
//! the dump, or was dumped before, so that little is left to be written.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::time::Instant;

use nix::sys::statvfs::fstatvfs;
use nix::unistd::Pid;
use tracing::debug;

use super::dump::estimate;
use super::history::History;
use crate::image::ImageDir;
use crate::kernel::headroom;
use crate::kernel::map::Reserve;
use crate::kernel::survey::PAGE;

/// Of the memory that is left, the part that may be filled: less than the kernel lets wait before it begins to write to
/// the disk (`vm.dirty_background_ratio`), so that no zeros get there.
const SHARE: u64 = 12;

/// Of the memory that is left, the part that may be taken besides, to be given back before the tree stands still.
const RESERVE: u64 = 3;

/// Files for the pages of processes.
#[derive(Debug, Default)]
pub struct Prepared {
    files: HashMap<Pid, File>,
    /// For the pages that have no room yet: the kernel finds them sooner in what was given back a moment ago.
    reserve: Option<Reserve>,
}

impl Prepared {
    /// Makes them for these processes, for what the parent does not have and what is `expected` to be written meanwhile, in
    /// pages. What cannot be made is left out: it is made in the freeze then.
    pub fn make(dir: &ImageDir, processes: &[Pid], history: &History, expected: impl Fn(Pid) -> u64) -> Self {
        /// Pages that a program writes until it stands still, besides half as much again as is expected, and a tenth of
        /// what it has written since its parent.
        const MORE: u64 = 256;
        let begin = Instant::now();
        let left = headroom::of(Pid::this()).map_or(0, |left| left.bytes);
        let mut room = (left / SHARE).min(free_on_disk(dir) / 2);
        let (mut files, mut lacking) = (HashMap::new(), 0);
        for &pid in processes {
            let all = estimate(pid);
            let bytes = match history.pages_of(pid) {
                0 => all,
                clean => (all.saturating_sub(clean * PAGE) / 10 * 11 / PAGE + expected(pid) * 3 / 2 + MORE) * PAGE,
            };
            let wanted = bytes.min(all);
            let bytes = wanted.min(room);
            lacking += wanted - bytes;
            if bytes == 0 {
                continue;
            }
            match filled(dir, bytes) {
                Some(file) => files.insert(pid, file),
                None => break,
            };
            room -= bytes;
        }
        let reserve = lacking.min(left / RESERVE) as usize;
        let reserve = if reserve == 0 { None } else { Reserve::take(reserve) };
        debug!(files = files.len(), lacking, took = ?begin.elapsed(), "room for pages is made");
        Self { files, reserve }
    }

    /// Gives back what is to be found again in the freeze.
    pub fn give_back(&mut self) {
        self.reserve = None;
    }

    /// That of one process.
    pub fn take(&mut self, pid: Pid) -> Option<File> {
        self.files.remove(&pid)
    }
}

fn free_on_disk(dir: &ImageDir) -> u64 {
    fstatvfs(dir).map_or(0, |stat| stat.blocks_available() * stat.fragment_size())
}

/// A file without a name that is so long.
fn filled(dir: &ImageDir, bytes: u64) -> Option<File> {
    const PIECE: usize = 1 << 20;
    let mut file = dir.nameless()?;
    let zeros = vec![0; PIECE.min(bytes as usize)];
    let mut left = bytes;
    while left > 0 {
        let piece = left.min(PIECE as u64);
        file.write_all(&zeros[..piece as usize]).ok()?;
        left -= piece;
    }
    Some(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;
    use crate::image::{ImageKind, PageRange, PagesWriter};

    #[test]
    fn a_prepared_file_becomes_as_long_as_its_pages() {
        let place = tempfile::tempdir().expect("a directory");
        let dir = ImageDir::create(place.path()).expect("an image directory");
        let mut prepared = Prepared::make(&dir, &[Pid::this()], &History::default(), |_| 0);
        // Nothing is to be seen of it: an earlier dump is still there.
        assert!(dir.list().expect("listing").is_empty());
        let file = prepared.take(Pid::this()).expect("this process has memory");
        assert!(file.metadata().expect("its size").size() > 4096);
        let mut writer =
            PagesWriter::create_with(&dir, ImageKind::Pagemap.id(7), 1, Some(file)).expect("the pages file");
        let at = writer.append(PageRange::new(0x1000, 0x2000).expect("a page")).expect("its place");
        File::from(writer.pages().try_clone_to_owned().expect("dup")).write_all_at(&[7; 4096], at).expect("writing");
        writer.finish().expect("all is there");
        let content = std::fs::read(place.path().join("pages-1.img")).expect("by its name");
        assert_eq!(content, [7; 4096]);
    }
}
