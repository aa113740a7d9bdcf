//! eBPF: the programs that are compiled into the engine, their loading, and what they tell.

pub mod bpf;
pub mod btf;
pub mod cache;
mod convert;
pub mod error;
pub mod object;
pub mod restart;
pub mod survey;

pub use error::{EbpfError, EbpfResult};
pub use survey::EbpfSurvey;
