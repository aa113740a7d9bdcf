//! Huge pages of hugetlbfs, which a program gets by MAP_HUGETLB, MFD_HUGETLB, SHM_HUGETLB, or from a mounted hugetlbfs.
//!
//! Behind each is a file of hugetlbfs, whose block size is that of its pages. Such a file can be read and mapped, but not
//! written or sent, and it does not tell where it has holes (Documentation/admin-guide/mm/hugetlbpage.rst).

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};

use super::ObjectError;
use crate::image::{PageRange, PagesWriter};
use crate::kernel::survey::{VmFlags, Vma, VmaName};
use crate::kernel::{self, SysError, SysResult, error::During};
use crate::observer::Observer;

/// The name that mmap(2) gives a file that it makes (mm/mmap.c, ksys_mmap_pgoff). CRIU's images have it for one that
/// processes share.
pub const ANONYMOUS: &[u8] = b"/anon_hugepage";

/// Where the flags of mmap(2), memfd_create(2) and shmget(2) have the logarithm of the page size: MAP_HUGE_SHIFT.
const SIZE_SHIFT: u32 = 26;

/// The size of a file's pages, as those calls take it; `None` if its pages are ordinary ones.
pub fn size_flag(file: impl AsFd) -> SysResult<Option<u32>> {
    let fs = fstatfs(file).during("fstatfs", "a file of memory")?;
    let is_huge = fs.filesystem_type() == HUGETLBFS_MAGIC;
    Ok(is_huge.then(|| (fs.block_size() as u64).trailing_zeros() << SIZE_SHIFT))
}

/// Bytes of a page.
fn page_size(flag: u32) -> u64 {
    1 << (flag >> SIZE_SHIFT)
}

/// The flags with which mmap(2) makes an area of such pages; none for others.
pub fn map_flags(pid: i32, vma: &Vma) -> Result<u32, ObjectError> {
    if !vma.flags.contains(VmFlags::HUGETLB) {
        return Ok(0);
    }
    let path = format!("/proc/{pid}/map_files/{:x}-{:x}", vma.start, vma.end);
    let file = File::open(&path).during("open", &path)?;
    Ok(libc::MAP_HUGETLB as u32 | size_flag(&file)?.unwrap_or(0))
}

/// Whether an area is anonymous: its file is nobody else's.
pub fn is_anonymous(vma: &Vma) -> bool {
    let anonymous = |name: &[u8]| name.strip_suffix(super::ghost::DELETED) == Some(ANONYMOUS);
    !vma.flags.contains(VmFlags::SHARED)
        && matches!(&vma.name, VmaName::File(name) if anonymous(name.as_os_str().as_encoded_bytes()))
}

/// Tells who gets no huge pages what to do.
pub fn with_advice(error: SysError) -> Box<dyn std::error::Error + Send + Sync> {
    const SHORT: &str = "that takes more huge pages than are free; vm.nr_hugepages or vm.nr_overcommit_hugepages has to be \
                         raised";
    match error.errno {
        Errno::ENOMEM => format!("{error}: {SHORT}").into(),
        _ => error.into(),
    }
}

/// Writes the content of a file of huge pages into images. What is all zeros takes no page before the restore either, or
/// takes one that nobody can tell from that.
pub fn dump(file: &File, size: u64, image: &mut PagesWriter, observer: &dyn Observer) -> Result<(), ObjectError> {
    /// Bytes that are looked at together. No huge page is smaller on this architecture.
    const PIECE: u64 = 2 << 20;
    let mut buffer = vec![0; PIECE as usize];
    for at in (0..size).step_by(PIECE as usize) {
        let bytes = &mut buffer[..(size - at).min(PIECE) as usize];
        file.read_exact_at(bytes, at).during("read", format!("huge pages at {at:#x}"))?;
        if bytes.iter().all(|byte| *byte == 0) {
            continue;
        }
        let range = PageRange::new(at, at + bytes.len() as u64)
            .ok_or_else(|| ObjectError::contradiction(format!("a file of huge pages with {size} bytes")))?;
        let offset = image.append(range)?;
        observer.expects(range.bytes());
        kernel::fd::write_all_at(image.pages(), bytes, offset)?;
        observer.moved(range.bytes());
    }
    Ok(())
}

/// Copies bytes of an image into a file of memory, whatever its pages.
pub fn copy(from: &File, from_at: u64, to: impl AsFd, to_at: u64, len: u64) -> Result<(), SysError> {
    match size_flag(&to)? {
        Some(flag) => kernel::map::read_into(to, to_at, page_size(flag), from, from_at, len),
        None => kernel::fd::copy(from, from_at, to, to_at, len),
    }
}
