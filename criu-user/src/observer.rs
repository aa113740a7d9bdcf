//! What a dump or restore tells whoever runs it while it goes on, and where it lets them act. The engine itself prints
//! nothing and starts no programs.

use std::error::Error;
use std::fmt;

use nix::unistd::Pid;

/// A moment at which somebody may act, by CRIU's names for it. CRIU has a few more: they are about namespaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// Before the tree is touched.
    PreDump,
    /// The images are complete, and the tree still stands.
    PostDump,
    /// Before anything is created.
    PreRestore,
    /// Everything is there, and nothing runs.
    PostRestore,
    /// The same with all registers in place: the last moment to object.
    PreResume,
    /// The tree runs.
    PostResume,
}

impl Moment {
    /// CRIU's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::PreDump => "pre-dump",
            Self::PostDump => "post-dump",
            Self::PreRestore => "pre-restore",
            Self::PostRestore => "post-restore",
            Self::PreResume => "pre-resume",
            Self::PostResume => "post-resume",
        }
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why an observer does not let things go on.
#[derive(Debug, thiserror::Error)]
#[error("stopped at {moment}: {source}")]
pub struct Objection {
    /// When.
    pub moment: Moment,
    /// Its reason.
    pub source: Box<dyn Error + Send + Sync>,
}

/// Somebody who is told how things go. Memory is moved by several threads at once.
pub trait Observer: Sync {
    /// A moment has come; the root of the tree is known from [`Moment::PostRestore`] on, and in a dump always. With an
    /// error everything is undone; after [`Moment::PostResume`] that is too late, and the error is only logged.
    fn reached(&self, _moment: Moment, _root: Option<Pid>) -> Result<(), Box<dyn Error + Send + Sync>> {
        Ok(())
    }

    /// Whether the tree must stand still at [`Moment::PostDump`] even if it is to run on: it stands longer for that.
    fn acts_after_dump(&self) -> bool {
        false
    }

    /// Whether [`Observer::expects`] is of interest: finding out costs time in the freeze.
    fn counts_memory(&self) -> bool {
        false
    }

    /// About so many more bytes of memory are to be moved.
    fn expects(&self, _bytes: u64) {}

    /// So many bytes have been moved.
    fn moved(&self, _bytes: u64) {}
}

/// Nobody.
#[derive(Debug, Clone, Copy)]
pub struct Nobody;

impl Observer for Nobody {}

/// Tells an observer of a moment.
pub(crate) fn tell(observer: &dyn Observer, moment: Moment, root: Option<Pid>) -> Result<(), Objection> {
    observer.reached(moment, root).map_err(|source| Objection { moment, source })
}
