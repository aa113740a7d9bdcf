//! What can be wrong with an image directory or a file in it.

use std::{io, path::PathBuf};

use nix::errno::Errno;

/// What to do about an error that means that a file system is full.
pub(crate) fn room(errno: Errno) -> &'static str {
    match errno {
        Errno::ENOSPC | Errno::EDQUOT => "; make room there, or dump into another directory",
        _ => "",
    }
}

fn errno_of(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw)
}

/// What can be wrong with an image directory or a file in it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// A system call on the directory itself failed.
    #[error("{call} of image directory {} failed: {source}; see that it exists, is a directory and no symbolic link, and is yours", path.display())]
    Dir {
        /// The directory.
        path: PathBuf,
        /// The system call.
        call: &'static str,
        /// What the kernel said.
        source: io::Error,
    },

    /// Someone else writes to the directory, or reads it while we want to write.
    #[error("image directory {} is in use by another dump or restore; wait for its end or take another directory", path.display())]
    Busy {
        /// The directory.
        path: PathBuf,
    },

    /// There is no inventory, which every dump gets last.
    #[error("{} is not a complete dump: it has no inventory.img; the dump failed or was killed, or this is another directory", path.display())]
    Incomplete {
        /// The directory.
        path: PathBuf,
    },

    /// The inventory names a version that we do not know.
    #[error("{}: images of version {found}, known are 1 and 2; restore with the program that made them", file.display())]
    Version {
        /// The inventory.
        file: PathBuf,
        /// Its version.
        found: u32,
    },

    /// A system call on a file failed.
    #[error("{call} of {} at offset {offset} failed: {source}{}", file.display(), room(errno_of(source)))]
    File {
        /// The file.
        file: PathBuf,
        /// Where in it.
        offset: u64,
        /// The system call.
        call: &'static str,
        /// What the kernel said.
        source: io::Error,
    },

    /// A file that should be there is not.
    #[error("{} is missing; the dump was moved incompletely, dump again or copy all of its files", file.display())]
    Missing {
        /// The file.
        file: PathBuf,
    },

    /// Something that is no regular file has the name of an image.
    #[error("{} is not a regular file; it was not written by a dump, remove it", file.display())]
    NotRegular {
        /// The file.
        file: PathBuf,
    },

    /// The first bytes are not those of this kind of file.
    #[error("{}: starts with {found:#010x} at offset {offset}, expected {expected:#010x}; it is no image of this kind, or damaged", file.display())]
    Magic {
        /// The file.
        file: PathBuf,
        /// Where in it.
        offset: u64,
        /// What is there.
        found: u32,
        /// What should be there.
        expected: u32,
    },

    /// The file ends in the middle of something.
    #[error("{}: cut off, {what} at offset {offset} takes {need} bytes and {left} are left; dump again or copy the file whole", file.display())]
    Truncated {
        /// The file.
        file: PathBuf,
        /// Where in it.
        offset: u64,
        /// What is cut off.
        what: &'static str,
        /// How long it is.
        need: u64,
        /// How much of it there is.
        left: u64,
    },

    /// Something is longer than it can be in a dump.
    #[error("{}: {what} at offset {offset} takes {len} bytes, more than the {max} that are taken for sane; the file is damaged", file.display())]
    TooLong {
        /// The file.
        file: PathBuf,
        /// Where in it.
        offset: u64,
        /// What is too long.
        what: &'static str,
        /// How long it says that it is.
        len: u64,
        /// How long it may be.
        max: u64,
    },

    /// A message cannot be decoded.
    #[error("{}: the message at offset {offset} is no valid one: {source}; the file is damaged", file.display())]
    Decode {
        /// The file.
        file: PathBuf,
        /// Where in it.
        offset: u64,
        /// What is wrong with it.
        source: prost::DecodeError,
    },

    /// There are fewer or more messages in the file than there should be.
    #[error("{}: holds {found} messages where there should be one; the file is damaged", file.display())]
    Count {
        /// The file.
        file: PathBuf,
        /// How many there are, counted no further than two.
        found: usize,
    },

    /// An entry of a pagemap makes no sense.
    #[error("{}: entry {entry} (address {vaddr:#x}, {pages} pages): {what}", file.display())]
    Pagemap {
        /// The pagemap.
        file: PathBuf,
        /// Which entry, from 0.
        entry: usize,
        /// The address that it names.
        vaddr: u64,
        /// The number of pages that it names.
        pages: u64,
        /// What is wrong.
        what: &'static str,
    },

    /// One file of the dump speaks against another.
    #[error("{}: {what}; the files are not of one dump, or damaged", file.display())]
    Contradiction {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        what: String,
    },

    /// The chain of parent directories does not end.
    #[error("{}: its chain of parent dumps {what}; repair the `parent` links", path.display())]
    Parents {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
}
