//! What the tree shares with the world outside of it: `--external` names it at dump, `--inherit-fd` gives it at restore.

use std::os::fd::OwnedFd;
use std::str::FromStr;

use super::ObjectError;
use crate::kernel;

/// Kinds of object that may be named.
const KINDS: [&str; 5] = ["file", "pipe", "tty", "unix", "socket"];

/// The name of an object outside: `pipe:[INODE]`, `file[MOUNT:INODE]`, `tty[RDEV:DEV]`, `unix[INODE]`, or a path.
///
/// Names are compared as CRIU's users write them: with or without a colon before the bracket, with or without the slash
/// in front of a path.
#[derive(Debug, Clone)]
pub struct Name(String);

impl Name {
    /// A pipe.
    pub fn pipe(inode: u32) -> Self {
        Self(format!("pipe:[{inode}]"))
    }

    /// A file of a mount; CRIU writes both numbers in hexadecimal.
    pub fn file(mount: u64, inode: u64) -> Self {
        Self(format!("file[{mount:x}:{inode:x}]"))
    }

    /// A file by its path.
    pub fn path(path: impl Into<String>) -> Self {
        Self(path.into())
    }

    /// As it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn essence(&self) -> String {
        self.0.trim_start_matches('/').replacen(":[", "[", 1)
    }
}

impl PartialEq for Name {
    fn eq(&self, other: &Self) -> bool {
        self.essence() == other.essence()
    }
}

/// Why a word on the command line is no such name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Another kind.
    #[error("nothing outside of the kind {0:?} is supported; there are file, pipe, tty, unix and socket")]
    Kind(String),
    /// No `fd[N]:` in front.
    #[error("{0:?} is not of the form fd[NUMBER]:RESOURCE")]
    Descriptor(String),
}

/// An object that belongs to somebody else, as `--external` names it.
#[derive(Debug, Clone, PartialEq)]
pub struct External(pub Name);

impl FromStr for External {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let kind = text.split(['[', ':']).next().unwrap_or_default();
        if !KINDS.contains(&kind) || !text.ends_with(']') {
            return Err(NameError::Kind(kind.to_owned()));
        }
        Ok(Self(Name(text.to_owned())))
    }
}

/// A descriptor that stands for an object of the dump: `fd[N]:RESOURCE`.
#[derive(Debug, Clone, PartialEq)]
pub struct Inherit {
    /// Its number, in whoever started the engine and in the engine.
    pub fd: i32,
    /// What it stands for.
    pub name: Name,
}

impl FromStr for Inherit {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let parts = || {
            let (number, name) = text.strip_prefix("fd[")?.split_once("]:")?;
            let fd = number.parse().ok().filter(|&fd| fd >= 0)?;
            (!name.is_empty()).then(|| Self { fd, name: Name(name.to_owned()) })
        };
        parts().ok_or_else(|| NameError::Descriptor(text.to_owned()))
    }
}

/// Whether a name is among those of `--external`, or of `--inherit-fd`, which says as much at a dump.
pub fn is_external(options: &crate::dump::DumpOptions, name: &Name) -> bool {
    options.external.iter().any(|e| e.0 == *name) || options.inherit.iter().any(|i| i.name == *name)
}

/// A duplicate of the descriptor that was given for a name.
pub fn given(options: &crate::restore::RestoreOptions, name: &Name) -> Result<Option<OwnedFd>, ObjectError> {
    match options.inherit.iter().find(|i| i.name == *name) {
        Some(inherit) => Ok(Some(kernel::fd::inherited(inherit.fd)?)),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_same_however_they_are_written() {
        assert_eq!("fd[7]:pipe:[12]".parse(), Ok(Inherit { fd: 7, name: Name::pipe(12) }));
        assert_eq!("pipe[12]".parse(), Ok(External(Name::pipe(12))));
        assert_eq!("fd[1]:var/log/x".parse(), Ok(Inherit { fd: 1, name: Name::path("/var/log/x") }));
        assert_ne!(Name::pipe(1), Name::pipe(11));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "fd[x]:a", "fd[-1]:a", "fd[3]", "fd[3]:"] {
            assert!(text.parse::<Inherit>().is_err(), "{text}");
        }
        for text in ["", "net[1]:x", "pipe:12"] {
            assert!(text.parse::<External>().is_err(), "{text}");
        }
    }
}
