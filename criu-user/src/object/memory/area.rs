//! What the areas of a process are, as messages.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::OnceLock;

use crate::image::VmaStatus;
use crate::image::proto::VmaEntry;
use crate::kernel::proc;
use crate::kernel::survey::{VmFlags, Vma, VmaName};

use super::super::file::Capture;
use super::super::{ObjectError, Refusal, hugetlb, memfd, regfile, shmem, unsupported};

/// Advice that is state of an area, with the flag that shows it.
const ADVICE: [(VmFlags, i32); 8] = [
    (VmFlags::SEQ_READ, libc::MADV_SEQUENTIAL),
    (VmFlags::RAND_READ, libc::MADV_RANDOM),
    (VmFlags::DONTCOPY, libc::MADV_DONTFORK),
    (VmFlags::DONTDUMP, libc::MADV_DONTDUMP),
    (VmFlags::MERGEABLE, libc::MADV_MERGEABLE),
    (VmFlags::HUGEPAGE, libc::MADV_HUGEPAGE),
    (VmFlags::NOHUGEPAGE, libc::MADV_NOHUGEPAGE),
    (VmFlags::WIPEONFORK, libc::MADV_WIPEONFORK),
];

/// Flags that mmap(2) takes.
const MAP_FLAGS: [(VmFlags, i32); 3] = [
    (VmFlags::GROWSDOWN, libc::MAP_GROWSDOWN),
    (VmFlags::NORESERVE, libc::MAP_NORESERVE),
    (VmFlags::LOCKED, libc::MAP_LOCKED),
];

/// The kernel's own areas, which are moved and not made.
fn kernel_area(vma: &Vma) -> Option<VmaStatus> {
    match vma.special()? {
        "[vdso]" => Some(VmaStatus::REGULAR | VmaStatus::VDSO | VmaStatus::ANON_PRIVATE),
        name if name.starts_with("[vvar") => Some(VmaStatus::REGULAR | VmaStatus::VVAR | VmaStatus::ANON_PRIVATE),
        _ => None,
    }
}

/// Whether an area's pages belong to the process alone.
pub fn is_private(vma: &Vma) -> bool {
    !vma.flags.contains(VmFlags::SHARED) && kernel_area(vma).is_none()
}

/// Whether an area has pages of hugetlbfs that belong to the process alone.
pub fn has_private_huge_pages(vma: &Vma) -> bool {
    is_private(vma) && vma.flags.contains(VmFlags::HUGETLB)
}

/// Describes the areas of a process. What is mapped is entered in files.img.
pub fn areas(cx: &mut Capture<'_>, pid: i32, vmas: &[Vma]) -> Result<Vec<VmaEntry>, ObjectError> {
    let mut entries: Vec<VmaEntry> = Vec::with_capacity(vmas.len());
    for vma in vmas {
        let entry = area(cx, pid, vma)?;
        // The kernel's data areas are one to the format, however many the kernel makes of them.
        let data = VmaStatus::VVAR.bits();
        match entries.last_mut() {
            Some(last) if last.status & entry.status & data != 0 && last.end == entry.start => last.end = entry.end,
            _ => entries.push(entry),
        }
    }
    entries.extend(vsyscall());
    Ok(entries)
}

/// The vsyscall page, the last area of every process where the kernel has one (arch/x86/entry/vsyscall). It is neither
/// read nor made, but readers of the format walk the areas up to it and miss it.
fn vsyscall() -> Option<VmaEntry> {
    static FOUND: OnceLock<Option<VmaEntry>> = OnceLock::new();
    let look = || {
        let maps = proc::read_text("/proc/self/maps").ok()?;
        let mut words = maps.lines().rfind(|line| line.ends_with("[vsyscall]"))?.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let readable = words.next()?.starts_with('r');
        Some(VmaEntry {
            start: u64::from_str_radix(start, 16).ok()?,
            end: u64::from_str_radix(end, 16).ok()?,
            prot: (libc::PROT_EXEC | if readable { libc::PROT_READ } else { 0 }) as u32,
            flags: (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u32,
            status: (VmaStatus::VSYSCALL | VmaStatus::ANON_PRIVATE).bits(),
            fd: -1,
            ..VmaEntry::default()
        })
    };
    *FOUND.get_or_init(look)
}

/// Files that are mapped, by device, inode and access mode: the name, and the id in files.img.
#[derive(Debug, Default)]
struct Mapped(HashMap<(u64, u64, u32), (PathBuf, u32)>);

/// The id of the file behind an area. All processes of a tree map the same few, each in several areas.
fn mapped_file(cx: &mut Capture<'_>, pid: i32, vma: &Vma, mode: u32) -> Result<u32, ObjectError> {
    let key = (vma.dev, vma.ino, mode);
    if let (VmaName::File(name), Some((known, id))) = (&vma.name, cx.shelf.get::<Mapped>().0.get(&key))
        && name == known
    {
        return Ok(*id);
    }
    let link = format!("/proc/{pid}/map_files/{:x}-{:x}", vma.start, vma.end);
    let id = regfile::by_path(cx, pid, &link, mode)?;
    if let VmaName::File(name) = &vma.name {
        cx.shelf.get::<Mapped>().0.insert(key, (name.clone(), id));
    }
    Ok(id)
}

fn area(cx: &mut Capture<'_>, pid: i32, vma: &Vma) -> Result<VmaEntry, ObjectError> {
    let shared = vma.flags.contains(VmFlags::SHARED);
    let kind = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
    let flags = MAP_FLAGS.iter().filter(|(f, _)| vma.flags.contains(*f)).fold(kind, |bits, (_, bit)| bits | bit);
    let mut entry = VmaEntry {
        start: vma.start,
        end: vma.end,
        pgoff: vma.offset,
        prot: vma.prot() as u32,
        flags: flags as u32 | hugetlb::map_flags(pid, vma)?,
        fd: -1,
        madv: Some(ADVICE.iter().filter(|(f, _)| vma.flags.contains(*f)).fold(0, |bits, (_, n)| bits | 1 << n)),
        lock_on_fault: vma.flags.contains(VmFlags::LOCKONFAULT).then_some(true),
        ..VmaEntry::default()
    };
    entry.status = if let Some(kernel) = kernel_area(vma) {
        kernel
    } else if let Some((what, advice)) = unsupported::mapping(vma) {
        refuse(cx, pid, vma, &what, advice);
        VmaStatus::empty()
    } else if vma.flags.intersects(VmFlags::PFNMAP | VmFlags::IO) {
        refuse(cx, pid, vma, "memory of a device", "devices cannot be dumped");
        VmaStatus::empty()
    } else if hugetlb::is_anonymous(vma) {
        VmaStatus::REGULAR | VmaStatus::ANON_PRIVATE
    } else if let Some(object) = shmem::mapped(cx, pid, vma)? {
        entry.shmid = object.id;
        object.status
    } else if vma.ino != 0 {
        // A private mapping and a read-only one can be of a file that was opened for reading only.
        let writing = shared && vma.flags.contains(VmFlags::WRITE);
        let mode = if writing { libc::O_RDWR } else { libc::O_RDONLY };
        entry.shmid = mapped_file(cx, pid, vma, mode as u32)?.into();
        entry.fdflags = Some(mode as u32);
        let memfd = match &vma.name {
            VmaName::File(name) if memfd::is_name(name) => VmaStatus::MEMFD,
            _ => VmaStatus::empty(),
        };
        VmaStatus::REGULAR | memfd | if shared { VmaStatus::FILE_SHARED } else { VmaStatus::FILE_PRIVATE }
    } else {
        let special = match vma.special() {
            Some("[heap]") => VmaStatus::HEAP,
            Some("[stack]") => VmaStatus::STACK,
            _ => VmaStatus::empty(),
        };
        VmaStatus::REGULAR | VmaStatus::ANON_PRIVATE | special
    }
    .bits();
    if entry.status & (VmaStatus::ANON_PRIVATE | VmaStatus::ANON_SHARED).bits() != 0 {
        entry.flags |= libc::MAP_ANONYMOUS as u32;
    }
    if entry.status & VmaStatus::ANON_PRIVATE.bits() != 0 {
        entry.pgoff = 0;
    }
    Ok(entry)
}

fn refuse(cx: &mut Capture<'_>, pid: i32, vma: &Vma, what: &str, advice: &str) {
    let name = match &vma.name {
        VmaName::None => String::new(),
        VmaName::Special(name) => format!(" ({name})"),
        VmaName::File(path) => format!(" ({})", path.display()),
    };
    let what = format!("{what} at {:#x}{name} cannot be dumped", vma.start);
    cx.refuse(Refusal { pid, fd: None, what, advice: advice.into() });
}
