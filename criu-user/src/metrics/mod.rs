//! What is measured, in the form in which Prometheus and its like read it. docs/metrics.md lists all of it.
//!
//! An [`Exposition`] is made of plain numbers each time somebody asks ([`serve`]) or a file is written ([`textfile`]):
//! what is gone from the tree is gone from the metrics. The table of all metrics is [`table`].

pub mod address;
mod exposition;
mod histogram;
mod negotiate;
mod run;
pub mod serve;
pub mod table;
pub mod textfile;

pub use exposition::Exposition;
pub use histogram::Histogram;
pub use run::{Operation, Pages, Phase, Reason, Run, Runs};
