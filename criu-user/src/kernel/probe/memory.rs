//! What the kernel tells of memory, and how it can be read and written from outside.

use std::fs::{self, File};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;

use super::helper::Helper;
use super::{Absent, Answer, apart, ensure};
use crate::kernel::anonymous::Pages;
use crate::kernel::error::During;
use crate::kernel::pagemap::{PageKind, PageMap, Query};
use crate::kernel::survey::PAGE;

/// The runs of pages of one kind.
fn scan(pages: &Pages, kind: PageKind) -> Result<Vec<(u64, u64)>, Absent> {
    let none = PageKind::empty();
    let mut found = Vec::new();
    let query = Query { all: kind, any: none, inverted: none, report: kind };
    let mut map = PageMap::open(Pid::this())?;
    map.scan(pages.start, pages.start + pages.len, query, &mut found)?;
    ensure(map.has_scan(), "there is no such ioctl")?;
    Ok(found.iter().map(|region| ((region.start - pages.start) / PAGE, (region.end - pages.start) / PAGE)).collect())
}

/// The PAGEMAP_SCAN ioctl: of three pages it finds the one that was written.
pub fn pagemap_scan() -> Answer {
    let pages = Pages::new(3)?;
    pages.touch(1);
    ensure(scan(&pages, PageKind::PRESENT)? == [(1, 2)], "PAGEMAP_SCAN does not find the page that was written")?;
    Ok(String::new())
}

/// Guard regions (MADV_GUARD_INSTALL), and PAGEMAP_SCAN tells where they are.
pub fn guard_regions() -> Answer {
    const GUARD_INSTALL: i32 = 102;
    let pages = Pages::new(3)?;
    let second = std::ptr::with_exposed_provenance_mut((pages.start + PAGE) as usize);
    // SAFETY: our own page, which nobody reads or writes any more.
    let installed = unsafe { libc::madvise(second, PAGE as usize, GUARD_INSTALL) };
    Errno::result(installed).during("madvise(GUARD_INSTALL)", "a page")?;
    ensure(scan(&pages, PageKind::GUARD)? == [(1, 2)], "PAGEMAP_SCAN does not find the guard region")?;
    Ok(String::new())
}

/// Soft-dirty bits: cleared by /proc/PID/clear_refs, set by a write.
pub fn soft_dirty() -> Answer {
    apart(|| {
        const SOFT_DIRTY: u64 = 1 << 55;
        let pagemap = File::open("/proc/self/pagemap").during("open", "/proc/self/pagemap")?;
        let pages = Pages::new(1)?;
        let bit = || {
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, pages.start / PAGE * 8).during("read", "/proc/self/pagemap")?;
            Ok::<_, Absent>(u64::from_ne_bytes(entry) & SOFT_DIRTY != 0)
        };
        pages.touch(0);
        fs::write("/proc/self/clear_refs", "4").during("write", "/proc/self/clear_refs")?;
        let cleared = bit()?;
        pages.touch(0);
        ensure(!cleared && bit()?, "the kernel keeps no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)")?;
        Ok(String::new())
    })
}

/// The PROCMAP_QUERY ioctl on /proc/PID/maps.
pub fn procmap_query() -> Answer {
    /// `struct procmap_query` of include/uapi/linux/fs.h in words: size, flags, address, start, end, …
    const WORDS: usize = 13;
    const PROCMAP_QUERY: u64 = (3 << 30) | ((WORDS as u64 * 8) << 16) | ((b'f' as u64) << 8) | 17;
    let pages = Pages::new(1)?;
    let maps = File::open("/proc/self/maps").during("open", "/proc/self/maps")?;
    let mut query = [0u64; WORDS];
    (query[0], query[2]) = (WORDS as u64 * 8, pages.start);
    // SAFETY: the query lives for the call and is as long as the request says; it asks for no name.
    let done = unsafe { libc::ioctl(maps.as_raw_fd(), PROCMAP_QUERY as _, query.as_mut_ptr()) };
    Errno::result(done).during("ioctl(PROCMAP_QUERY)", "/proc/self/maps")?;
    ensure(query[3] <= pages.start && pages.start < query[4], "PROCMAP_QUERY tells of another area")?;
    Ok(String::new())
}

/// memfd_create(2).
pub fn memfd() -> Answer {
    memfd_create(c"criu-ebpf-check", MFdFlags::MFD_CLOEXEC).during("memfd_create", "a new file")?;
    Ok(String::new())
}

/// memfd_create(2) with huge pages.
pub fn memfd_hugetlb() -> Answer {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB;
    memfd_create(c"criu-ebpf-check", flags).during("memfd_create(MFD_HUGETLB)", "a new file")?;
    Ok(String::new())
}

/// process_vm_readv(2) and process_vm_writev(2).
pub fn process_vm() -> Answer {
    let pages = Pages::new(1)?;
    pages.touch(0);
    // A copy of this process, with the same page at the same address.
    let helper = Helper::start(|| Ok(()))?;
    let there = [RemoteIoVec { base: pages.start as usize, len: 1 }];
    process_vm_writev(helper.pid(), &[IoSlice::new(&[7])], &there).during("process_vm_writev", helper.pid())?;
    let mut byte = [0];
    process_vm_readv(helper.pid(), &mut [IoSliceMut::new(&mut byte)], &there)
        .during("process_vm_readv", helper.pid())?;
    ensure(byte == [7], "process_vm_writev is without effect")?;
    Ok(String::new())
}

/// The rings of asynchronous I/O can be moved to another address, after which the context is called by that.
pub fn aio_ring_moves() -> Answer {
    apart(|| {
        let mut context = 0u64;
        // SAFETY: the result is written to a live local.
        Errno::result(unsafe { libc::syscall(libc::SYS_io_setup, 1, &raw mut context) })
            .during("io_setup", "a ring")?;
        let maps = crate::kernel::proc::read_text("/proc/self/maps")?;
        let line = maps.lines().find_map(|line| line.strip_prefix(&format!("{context:08x}-")));
        let end = line.and_then(|line| u64::from_str_radix(line.split(' ').next()?, 16).ok());
        let len = end.ok_or_else(|| Absent::because("the ring is not in /proc/self/maps"))? - context;
        let place = Pages::new(len / PAGE)?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let ring = std::ptr::with_exposed_provenance_mut::<libc::c_void>(context as usize);
        let new = std::ptr::with_exposed_provenance_mut::<libc::c_void>(place.start as usize);
        // SAFETY: the ring goes to a place of that size, which is ours and holds nothing.
        let moved = unsafe { libc::mremap(ring, len as usize, len as usize, flags, new) };
        ensure(moved != libc::MAP_FAILED, &format!("mremap of a ring: {}", Errno::last().desc()))?;
        // SAFETY: numbers only, apart from the empty list of results.
        let left = unsafe { libc::syscall(libc::SYS_io_getevents, place.start, 0, 0, 0, 0) };
        Errno::result(left).during("io_getevents", "a ring that was moved")?;
        Ok(String::new())
    })
}
