//! What was found out about this kernel, kept for as long as this boot lasts.
//!
//! Files in /run/criu-ebpf, each under a name that tells the boot and what its content depends on. Nobody but the
//! engine's own user may be able to write there, or a file is not believed. Without /run, or as another user, everything
//! works as well, a little later.

use std::fs::{self, DirBuilder, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};

use nix::fcntl::{Flock, FlockArg, OFlag, openat, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

/// Where they are.
pub const DIR: &str = "/run/criu-ebpf";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Longest file that is read: a table of some hundred numbers, or of some hundred lines.
const LONGEST: u64 = 256 << 10;

/// Makes the directory, if it is not there.
fn make_directory() -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(DIR) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// The right to do what two engines must not do at once: held until it is dropped, by one of all at a time.
pub fn turn() -> io::Result<Flock<File>> {
    make_directory()?;
    Flock::lock(File::open(DIR)?, FlockArg::LockExclusive).map_err(|(_, errno)| errno.into())
}

/// The name of a file whose content holds for this boot and for all of `of`; `None` where the boot cannot be told.
pub fn name<'a>(kind: &str, of: impl IntoIterator<Item = &'a [u8]>) -> Option<String> {
    let boot = fs::read_to_string(BOOT_ID).ok()?;
    let boot: String = boot.chars().filter(char::is_ascii_hexdigit).collect();
    let mut hash = Fnv::default();
    of.into_iter().for_each(|part| hash.add(part));
    Some(format!("{kind}-{boot}-{:016x}", hash.0))
}

/// The content of a file, if it is there and can only be ours.
pub fn read(name: &str) -> Option<String> {
    let dir = directory().ok()?;
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = File::from(openat(&dir, name, flags, Mode::empty()).ok()?);
    let about = file.metadata().ok()?;
    if !about.is_file() || !is_ours(&about) {
        return None;
    }
    let mut text = String::new();
    file.take(LONGEST).read_to_string(&mut text).ok()?;
    Some(text)
}

/// Keeps a file. It is written beside and renamed: another engine reads all of it or nothing.
pub fn write(name: &str, text: &str) -> io::Result<()> {
    make_directory()?;
    let dir = directory()?;
    let beside = format!("{name}.{}", std::process::id());
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    // One of that name is left of an engine that died with our pid.
    let _ = unlinkat(&dir, beside.as_str(), UnlinkatFlags::NoRemoveDir);
    let mut file = File::from(openat(&dir, beside.as_str(), flags, Mode::from_bits_truncate(0o600))?);
    let written = file.write_all(text.as_bytes()).and_then(|()| Ok(renameat(&dir, beside.as_str(), &dir, name)?));
    if written.is_err() {
        let _ = unlinkat(&dir, beside.as_str(), UnlinkatFlags::NoRemoveDir);
    }
    written
}

/// Tells one build of the engine from another: its GNU build id, which the linker puts into the first page; without one,
/// what its file looks like from outside.
pub fn build_id() -> io::Result<Vec<u8>> {
    const NOTE: &[u8] = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0";
    let program = File::open("/proc/self/exe")?;
    let mut page = [0; 4096];
    let read = program.read_at(&mut page, 0)?;
    let note = page[..read].windows(NOTE.len()).position(|window| window == NOTE).map(|at| at + NOTE.len());
    if let Some(id) = note.and_then(|at| page[..read].get(at..at + 20)) {
        return Ok(id.to_vec());
    }
    let about = program.metadata()?;
    Ok([about.dev(), about.ino(), about.size(), about.mtime() as u64, about.mtime_nsec() as u64]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect())
}

/// The directory, opened so that nobody can put another in its place.
fn directory() -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let dir = fs::OpenOptions::new().read(true).custom_flags(flags).open(DIR)?;
    if is_ours(&dir.metadata()?) {
        Ok(dir)
    } else {
        Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("{DIR} is not ours alone")))
    }
}

/// Whether nobody else could have written it.
fn is_ours(about: &Metadata) -> bool {
    about.uid() == nix::unistd::geteuid().as_raw() && about.mode() & 0o022 == 0
}

/// FNV-1a: this is to tell names apart, not to withstand anybody.
struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    fn add(&mut self, part: &[u8]) {
        for byte in part.iter().chain(&[0]) {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_apart_what_they_depend_on() {
        let of = |parts: &[&[u8]]| name("kind", parts.iter().copied()).expect("a boot id");
        assert_eq!(of(&[b"a", b"b"]), of(&[b"a", b"b"]));
        assert_ne!(of(&[b"a", b"b"]), of(&[b"ab"]));
        assert!(of(&[]).starts_with("kind-"));
    }

    #[test]
    fn every_build_has_an_id() {
        assert!(build_id().expect("our own file").len() >= 20);
    }
}
