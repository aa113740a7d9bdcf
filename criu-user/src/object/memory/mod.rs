//! Address spaces: areas, their pages, and the facts about them that the kernel keeps beside.
//!
//! Pages are written by the process itself, straight from its memory into the image (one copy); what it cannot read
//! itself is read from outside. They come back by `preadv` of the task's own into fresh mappings, or, where they are many,
//! by the engine. A process is forked when its parent's memory is complete, so that what both have in common is shared again.

mod ahead;
mod area;
mod copy;
mod crowded;
mod dump;
mod facts;
mod fill;
mod history;
mod inherit;
mod plan;
mod prepare;
mod vdso;

pub use area::{areas, has_private_huge_pages, is_private};
pub use copy::Snapshot;
pub use crowded::Crowded;
pub use dump::{Pages, dump_private, estimate, has_own_pages, own_pages};
pub use facts::plan_facts;
pub use fill::OpenImage;
pub use history::{Clean, History, Past, Place};
pub use plan::plan;
pub use prepare::Prepared;
