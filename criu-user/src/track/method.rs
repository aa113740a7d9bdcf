//! What tells a session which pages were written.

use std::ffi::OsString;

use super::TrackError;
use crate::kernel::pagemap::{self, Marks};
use crate::kernel::uffd;

/// What the user wants it to be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Method {
    /// What this kernel has; uffd, if it has both
    #[default]
    Auto,
    /// userfaultfd(2), write protection that the kernel resolves by itself
    Uffd,
    /// Soft-dirty bits, which CRIU uses; each image stops a process while all of its pages are looked at
    SoftDirty,
}

impl Method {
    /// What it is on this kernel. Where it has nothing, what is tried first tells why.
    pub fn marks(self) -> Result<Marks, TrackError> {
        match self {
            Self::Uffd => Ok(Marks::Userfaultfd),
            Self::SoftDirty if pagemap::keeps_soft_dirty()? => Ok(Marks::SoftDirty),
            Self::SoftDirty => Err(TrackError::NoSoftDirty),
            Self::Auto => {
                let is_wanted = uffd::can_track().is_err() && pagemap::keeps_soft_dirty()?;
                Ok(if is_wanted { Marks::SoftDirty } else { Marks::Userfaultfd })
            }
        }
    }

    /// The words that have `criu-ebpf track` use it.
    pub fn words(self) -> Vec<OsString> {
        match self {
            Self::Auto => Vec::new(),
            Self::Uffd => vec!["--track-mem".into(), "uffd".into()],
            Self::SoftDirty => vec!["--track-mem".into(), "soft-dirty".into()],
        }
    }

    /// Whether a session that goes by `marks` is what is wanted.
    pub fn admits(self, marks: Marks) -> bool {
        match self {
            Self::Auto => true,
            Self::Uffd => marks == Marks::Userfaultfd,
            Self::SoftDirty => marks == Marks::SoftDirty,
        }
    }
}
