//! The watch: what a tracked tree does while it runs. One object with several programs, because all of them look into
//! the same tracked set; those that are not asked for are not loaded.
//!
//! | file | asks |
//! | --- | --- |
//! | `follow.rs` | puts a process into the set, when the engine says so |
//! | `lifecycle.rs` | who forks, executes, ends; keeps the set |
//! | `cgroups.rs` | who is put into a control group |
//! | `memory.rs` | where is written for the first time since it was protected |
//! | `syscalls.rs` | which kinds of state are touched, and by which call it becomes undumpable |
//! | `sockets.rs` | how connections move |
//!
//! These run at every system call, fault and segment of the whole machine, so what comes first is the way out for
//! those that nobody watches: a load of the process number, and one of a byte in the *sieve*. Only where that is set
//! is a map asked.
//!
//! On another target than BPF this is an empty program: so that clippy and the editor can look at it.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

#[expect(dead_code, reason = "shared with the survey")]
mod access;
mod cgroups;
mod contexts;
mod follow;
mod ids;
mod lifecycle;
mod memory;
mod sockets;
mod syscalls;
mod tracked;

use criu_common::watch::offsets::Offsets;

/// Filled in by the engine before the programs are loaded.
#[unsafe(no_mangle)]
static OFFSETS: Offsets = Offsets::UNKNOWN;

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
