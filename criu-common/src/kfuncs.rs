//! Functions of the kernel that programs call by the ids which the kernel's BTF gives them (kfuncs).
//!
//! A compiler that knows nothing of BTF can only call helpers, by number. So programs call numbers that no helper has, and
//! the engine puts in the id of the function that each stands for.

/// What stands for the first of [`NAMES`]; the others follow.
pub const FIRST: u32 = 0x7f00_0000;

/// Begins a loop (Linux 6.4).
pub const ITER_NUM_NEW: u32 = FIRST;
/// Takes its next step.
pub const ITER_NUM_NEXT: u32 = FIRST + 1;
/// Ends it.
pub const ITER_NUM_DESTROY: u32 = FIRST + 2;
/// Has a packet taken for the end of a handshake (Linux 6.9, CONFIG_SYN_COOKIES).
pub const SK_ASSIGN_TCP_REQSK: u32 = FIRST + 3;

/// What they are called, in the order of their numbers.
const NAMES: [&str; 4] = ["bpf_iter_num_new", "bpf_iter_num_next", "bpf_iter_num_destroy", "bpf_sk_assign_tcp_reqsk"];

/// Those that make a loop.
pub const LOOP: [&str; 3] = [NAMES[0], NAMES[1], NAMES[2]];
/// The one that has a packet taken for the end of a handshake.
pub const ASSIGN: &str = NAMES[3];

/// What stands for a function in programs.
pub fn number_of(name: &str) -> Option<u32> {
    NAMES.iter().position(|known| *known == name).map(|at| FIRST + at as u32)
}
