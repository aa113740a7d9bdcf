//! eBPF: the programs that are compiled into the engine, their loading, and what they tell.

pub mod admit;
pub mod bpf;
pub mod btf;
pub mod cache;
mod convert;
pub mod error;
pub mod gate;
pub mod gathered;
pub mod latch;
pub mod links;
pub mod maps;
pub mod numbers;
pub mod object;
pub mod pending;
pub mod pieces;
pub mod restart;
pub mod survey;
pub mod touched;
pub mod waiting;
pub mod watch;

pub use error::{EbpfError, EbpfResult};
pub use gate::Gate;
pub use survey::EbpfSurvey;
pub use watch::Watch;
