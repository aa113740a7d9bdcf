//! What crosses the boundary between the eBPF programs and the engine: both sides compile these definitions.
#![no_std]

pub mod gate;
pub mod gathered;
pub mod kfuncs;
pub mod numbers;
pub mod offsets;
pub mod pending;
pub mod pieces;
pub mod survey;
pub mod touched;
pub mod waiting;
pub mod watch;
