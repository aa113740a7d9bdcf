//! criu-ebpf: a checkpoint/restore engine for Linux.
#![deny(unsafe_code)]

#[expect(unsafe_code, reason = "the code that runs inside other processes")]
pub mod agent;
pub mod attend;
pub mod check;
pub mod cli;
pub mod dump;
pub mod execute;
pub mod explain;
pub mod freeze;
pub mod head_start;
pub mod image;
#[expect(unsafe_code, reason = "the room for raw system calls")]
pub mod kernel;
pub mod lineage;
pub mod live;
pub mod metrics;
pub mod object;
pub mod observer;
pub mod outcome;
pub mod parallel;
pub mod plan;
pub mod predump;
pub mod restore;
pub mod rounds;
pub mod track;
mod waiting;
