//! The images that a dump consists of: bytes only, nothing of processes.
//!
//! The layout, the magic numbers and the messages are CRIU's, so that either program can restore the other's dumps and
//! `crit` shows ours. Readers believe nothing: see [`check`] for what they
//! do with a single file and [`references`] for what files say of each other.

pub mod check;
mod dedup;
mod dir;
mod error;
mod ghost;
mod kind;
mod pages;
mod pages_write;
mod payload;
pub mod proto;
mod read;
pub mod references;
mod values;
mod write;

pub use dedup::dedup;
pub use dir::{ImageDir, Lasting, write_service};
pub use error::ImageError;
pub(crate) use error::room;
pub use ghost::{Ghost, GhostPiece};
pub use kind::{Content, Head, IMG_COMMON_MAGIC, IMG_SERVICE_MAGIC, IMG_VERSION, ImageKind, ImageName, Numbered};
pub use pages::{FoundRun, PAGE_SIZE, PageFlags, PageMap, PageRange, PageRun, PageStore};
pub use pages_write::{PageCounts, PagesWriter};
pub use payload::WithPayload;
pub use read::{ImageReader, Messages};
pub use values::{TaskState, UnixFlags, VmaStatus, kernel_dev, user_dev};
pub use write::ImageWriter;

#[cfg(test)]
mod check_tests;
#[cfg(test)]
mod dir_tests;
#[cfg(test)]
mod pages_tests;
