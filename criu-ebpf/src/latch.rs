//! The latch: stands at interfaces for the gate where the kernel has no links to them (before Linux 6.6). A filter of
//! traffic control belongs to nobody, and stays when the engine is killed. So it is not the gate that stands there but
//! this, which hands packets on to the gate.
//!
//! It finds the gate in an array of programs. The kernel empties such an array when nobody holds it any more, neither by
//! a descriptor nor by a name: then everything passes, and what is left at the interface does nothing.
//!
//! On another target than BPF this is an empty program: so that clippy and the editor can look at it.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

use aya_ebpf::bindings::{__sk_buff, TC_ACT_UNSPEC};
use aya_ebpf::macros::map;
use aya_ebpf::maps::ProgramArray;
use aya_ebpf::programs::TcContext;

#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// The gate, as long as somebody holds it.
#[map]
static GATE: ProgramArray = ProgramArray::with_max_entries(1, 0);

/// Hands a packet to the gate, which decides.
#[unsafe(no_mangle)]
#[unsafe(link_section = "classifier")]
extern "C" fn latch(skb: *mut __sk_buff) -> i32 {
    // SAFETY: nothing in this function is to be dropped; the gate takes the same context.
    unsafe { GATE.tail_call(&TcContext::new(skb), 0) };
    TC_ACT_UNSPEC
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
