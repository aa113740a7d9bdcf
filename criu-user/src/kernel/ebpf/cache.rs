//! What was looked up in the kernel's BTF, kept for as long as this boot lasts.
//!
//! Reading and walking 5 MB costs milliseconds, a small dump as a whole costs few: so the result is put into
//! /run/criu-ebpf, under a name that tells the boot and the table that was asked for. Nobody but the engine's own user
//! may be able to write there, or the file is not believed; and whatever it says, the verifier checks each offset against
//! the types. Without /run, or as another user, everything works as well, a little later.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use criu_common::offsets::SOURCES;

use super::EbpfResult;
use super::btf::Layout;

const DIR: &str = "/run/criu-ebpf";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Longest file that is read: the table has some hundred numbers.
const LONGEST: u64 = 64 << 10;

/// The layout of this kernel's types: from the cache, else from BTF and into the cache.
pub fn layout(functions: &[&str]) -> EbpfResult<Layout> {
    let path = path(functions);
    if let Some(layout) = path.as_deref().and_then(|path| read(path, functions)) {
        return Ok(layout);
    }
    let layout = Layout::of_this_kernel(functions)?;
    if let Some(path) = path
        && let Err(error) = write(&path, &layout)
    {
        tracing::debug!(path = %path.display(), %error, "cannot keep the kernel's type layout for the next time");
    }
    Ok(layout)
}

/// Named after the boot and what was asked for: another engine with another table has another file.
fn path(functions: &[&str]) -> Option<PathBuf> {
    let boot = fs::read_to_string(BOOT_ID).ok()?;
    let boot: String = boot.chars().filter(char::is_ascii_hexdigit).collect();
    let mut hash = Fnv::default();
    SOURCES.iter().for_each(|source| {
        hash.add(source.of);
        hash.add(source.field);
    });
    functions.iter().for_each(|function| hash.add(function));
    Some(Path::new(DIR).join(format!("btf-{boot}-{:016x}", hash.0)))
}

fn read(path: &Path, functions: &[&str]) -> Option<Layout> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path).ok()?;
    let about = file.metadata().ok()?;
    if !about.is_file() || !is_ours(&about) || !is_ours(&fs::symlink_metadata(DIR).ok()?) {
        return None;
    }
    let mut text = String::new();
    file.take(LONGEST).read_to_string(&mut text).ok()?;
    parse(&text, functions.len())
}

fn parse(text: &str, functions: usize) -> Option<Layout> {
    // The last line ends with a line feed: a file that was cut short is not taken for a whole one.
    let (offsets, rest) = text.split_once('\n')?;
    let ids = rest.strip_suffix('\n')?;
    let numbers = |line: &str| line.split(' ').map(|word| word.parse().ok()).collect::<Option<Vec<u32>>>();
    let layout = Layout { offsets: numbers(offsets)?, functions: numbers(ids)? };
    (layout.offsets.len() == SOURCES.len() && layout.functions.len() == functions).then_some(layout)
}

/// Written beside and renamed: another engine reads all of it or nothing.
fn write(path: &Path, layout: &Layout) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(DIR) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    if !is_ours(&fs::symlink_metadata(DIR)?) {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("{DIR} is not ours alone")));
    }
    let beside = path.with_extension(std::process::id().to_string());
    let mut file: File = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&beside)?;
    let line = |numbers: &[u32]| numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
    file.write_all(format!("{}\n{}\n", line(&layout.offsets), line(&layout.functions)).as_bytes())?;
    fs::rename(&beside, path)
}

/// Whether nobody else could have written it.
fn is_ours(about: &fs::Metadata) -> bool {
    about.uid() == nix::unistd::geteuid().as_raw() && about.mode() & 0o022 == 0
}

/// FNV-1a: this is to tell tables apart, not to withstand anybody.
struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    fn add(&mut self, text: &str) {
        for byte in text.bytes().chain([0]) {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_taken_whole_or_not_at_all() {
        let offsets = (0..SOURCES.len()).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
        let text = format!("{offsets}\n7 8 9\n");
        let layout = parse(&text, 3).expect("what write writes");
        assert_eq!(layout.functions, [7, 8, 9]);
        assert_eq!(layout.offsets.last(), Some(&(SOURCES.len() as u32 - 1)));
        assert_eq!(parse(&text, 2), None);
        for end in 0..text.len() {
            assert_eq!(parse(&text[..end], 3), None, "cut at {end}");
        }
    }
}
