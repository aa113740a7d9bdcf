//! Harness of the end-to-end tests: starts real programs, has an engine dump and restore them, and cleans up.
//!
//! A test is a [`Row`]: which engine dumps and which restores. [`Row::check`] is the usual course of a test: a
//! [`Workload`] is started, sets its state up and says `ready`; it is dumped, every process of it must be gone; it is
//! restored, told to `go`, and checks its own state from inside. What it finds is in its log.
//!
//! The engine is exchangeable:
//!
//! | variable | meaning |
//! | --- | --- |
//! | `CRIU_EBPF_BIN` | the engine under test (else `target/release/criu-ebpf`) |
//! | `CRIU_PEER_BIN` | CRIU, for exchanging images with (else `target/peer/criu`, made by `cargo xtask peer`) |
//! | `E2E_ENGINE=peer` | run everything with CRIU in place of the engine: proves the tests themselves |
//! | `E2E_KEEP=1` | keep the directory of a test that failed |
//!
//! # Pids
//!
//! A restored program needs the pids that it had. Nothing reserves them between dump and restore, and nothing has to:
//! the kernel hands pids out in a cycle (`idr_alloc_cyclic` in `kernel/pid.c`), so a pid that has just become free is
//! used again only after the 30 000 or more others have been, which takes far longer than a test. Only a process that
//! is still to be reaped would be in the way: so this process is the reaper of all that it starts
//! ([`reaper::become_subreaper`]), and reaps each by its own pid, since tests run side by side.

pub mod bytes;
pub mod claim;
pub mod engine;
pub mod proc;
pub mod program;
pub mod reaper;
pub mod row;
pub mod workload;

pub use bytes::Bytes;
pub use claim::Claim;
pub use engine::{Engine, Options, Outcome, Restored, Survey};
pub use program::Program;
pub use row::{Look, Row};
pub use workload::Workload;
