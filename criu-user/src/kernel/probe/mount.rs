//! What is done with mounts, in a mount namespace that ends with its only process.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::CloneFlags;
use nix::unistd::pipe;

use super::{Absent, Answer, apart_in, ensure};
use crate::kernel::error::During;
use crate::kernel::{SysResult, proc, sys};

/// Covered by a file system of the child's own; every system has it.
const PLACE: &str = "/tmp";

/// Asks in a child that has its own mounts, and an empty file system at [`PLACE`].
fn with_place(question: impl FnOnce() -> Answer) -> Answer {
    apart_in(CloneFlags::CLONE_NEWNS, || {
        make("none", "/", "", MsFlags::MS_REC | MsFlags::MS_PRIVATE, "")?;
        make("criu-ebpf-check", PLACE, "tmpfs", MsFlags::empty(), "")?;
        question()
    })
}

fn make(source: &str, target: &str, kind: &str, flags: MsFlags, data: &str) -> SysResult<()> {
    mount(Some(source), target, Some(kind), flags, Some(data)).during("mount", format!("{kind} {target} {flags:?}"))
}

fn directory(name: &str) -> SysResult<String> {
    let path = format!("{PLACE}/{name}");
    fs::create_dir(&path).during("mkdir", &path)?;
    Ok(path)
}

/// move_mount(2) with MOVE_MOUNT_SET_GROUP: one mount joins the peer group of another.
pub fn set_group() -> Answer {
    const MOVE_MOUNT_SET_GROUP: u64 = 0x100;
    with_place(|| {
        let path = directory("copy")?;
        make(PLACE, &path, "", MsFlags::MS_BIND, "")?;
        make("none", PLACE, "", MsFlags::MS_SHARED, "")?;
        let (from, to) = (format!("{PLACE}\0"), format!("{path}\0"));
        let here = libc::AT_FDCWD as u64;
        let [from, to] = [&from, &to].map(|path| path.as_ptr().expose_provenance() as u64);
        // SAFETY: both paths live for the call and end in a zero.
        unsafe { sys::raw(libc::SYS_move_mount, [here, from, here, to, MOVE_MOUNT_SET_GROUP, 0]) }
            .during("move_mount(MOVE_MOUNT_SET_GROUP)", path)?;
        Ok(String::new())
    })
}

/// Files of an overlay are shown in /proc/PID/maps as what they are for stat(2).
pub fn overlay_maps() -> Answer {
    with_place(|| {
        let [lower, upper, work, merged] = ["lower", "upper", "work", "merged"].map(directory);
        let (lower, upper, work, merged) = (lower?, upper?, work?, merged?);
        let path = format!("{lower}/file");
        fs::write(&path, [0; 4096]).during("write", &path)?;
        make(
            "overlay",
            &merged,
            "overlay",
            MsFlags::empty(),
            &format!("lowerdir={lower},upperdir={upper},workdir={work}"),
        )?;
        let path = format!("{merged}/file");
        let file = File::open(&path).during("open", &path)?;
        let about = file.metadata().during("stat", &path)?;
        // SAFETY: the kernel chooses a place where nothing is, and this process ends before the file changes.
        let at =
            unsafe { libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd(), 0) };
        ensure(at != libc::MAP_FAILED, &format!("mmap of a file in an overlay: {}", Errno::last().desc()))?;
        let maps = proc::read_text("/proc/self/maps")?;
        let line = maps.lines().find(|line| line.ends_with(&path)).unwrap_or_default();
        let device = format!("{:02x}:{:02x}", libc::major(about.dev()), libc::minor(about.dev()));
        let words: Vec<&str> = line.split_whitespace().collect();
        let same = words.get(3) == Some(&device.as_str()) && words.get(4) == Some(&about.ino().to_string().as_str());
        ensure(same, "/proc/PID/maps shows the file behind the overlay")?;
        Ok(String::new())
    })
}

/// autofs, and mountinfo tells which pipe it speaks through.
pub fn autofs() -> Answer {
    with_place(|| {
        let path = directory("auto")?;
        let (_from, to) = pipe().during("pipe", "autofs")?;
        let group = nix::unistd::getpgrp();
        let data = format!("fd={},pgrp={group},minproto=5,maxproto=5,direct", to.as_raw_fd());
        make("criu-ebpf-check", &path, "autofs", MsFlags::empty(), &data)?;
        let mounts = proc::read_text("/proc/self/mountinfo")?;
        let line = mounts.lines().find(|line| line.contains(&path)).unwrap_or_default();
        ensure(line.contains("pipe_ino="), "mountinfo does not tell which pipe an autofs has")?;
        Ok(String::new())
    })
}

/// A file system of the new mount calls: fsopen(2), fsmount(2).
pub fn detached() -> Answer {
    crate::kernel::scratch::filesystem().map(|_| String::new()).map_err(Absent::from)
}
