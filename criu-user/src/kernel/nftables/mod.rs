//! Rules of the kernel's packet filter (nf_tables), by messages as nft(8) sends them: a gate that needs no eBPF.

mod batch;
pub mod gate;
mod rules;

pub use gate::Gate;
