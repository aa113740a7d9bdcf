//! Address spaces: areas, their pages, and the facts about them that the kernel keeps beside.
//!
//! Pages are written by the process itself, straight from its memory into the image (one copy); what it cannot read
//! itself is read from outside. They come back the same way: `preadv` of the task's own into fresh mappings. A process
//! is forked when its parent's memory is complete, so that what both have in common is shared again.

mod area;
mod copy;
mod dump;
mod facts;
mod inherit;
mod plan;
mod vdso;

pub use area::areas;
pub use copy::Snapshot;
pub use dump::{Pages, dump_private, estimate};
pub use facts::plan_facts;
pub use plan::{OpenImage, plan};
