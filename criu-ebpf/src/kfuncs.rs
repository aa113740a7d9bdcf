//! Functions of the kernel that are called by their ids; see [`criu_common::kfuncs`].

use core::mem::{MaybeUninit, transmute};

use aya_ebpf::cty::c_void;
use criu_common::kfuncs;
use criu_common::pending::Attributes;

/// The kernel's `struct bpf_iter_num`.
type Numbers = MaybeUninit<u64>;

/// Makes steps until one says that it was the last, at most so many. The verifier looks at a step once or twice, however
/// many there are: so what one leaves to the next has to be in memory that it does not follow, such as a global.
///
/// # Safety
/// Only the verifier's rules.
#[inline(always)]
pub(crate) unsafe fn repeat(most: i32, mut step: impl FnMut() -> bool) {
    let mut numbers = Numbers::uninit();
    let numbers = &raw mut numbers;
    // SAFETY: the engine puts the functions' ids in for these numbers, and their types are these.
    unsafe {
        let new: unsafe extern "C" fn(*mut Numbers, i32, i32) -> i32 = transmute(kfuncs::ITER_NUM_NEW as usize);
        let next: unsafe extern "C" fn(*mut Numbers) -> *const i32 = transmute(kfuncs::ITER_NUM_NEXT as usize);
        let destroy: unsafe extern "C" fn(*mut Numbers) = transmute(kfuncs::ITER_NUM_DESTROY as usize);
        new(numbers, 0, most);
        while !next(numbers).is_null() {
            if step() {
                break;
            }
        }
        destroy(numbers);
    }
}

/// Has a packet at the way into the machine taken for the last one of a handshake with a listening socket; 0, or an
/// error's number, negative.
///
/// # Safety
/// Only the verifier's rules.
#[inline(always)]
pub(crate) unsafe fn assign_request(packet: *mut c_void, listener: *mut c_void, of: *const Attributes) -> i32 {
    // SAFETY: as in `repeat`.
    unsafe {
        let assign: unsafe extern "C" fn(*mut c_void, *mut c_void, *const Attributes, u32) -> i32 =
            transmute(kfuncs::SK_ASSIGN_TCP_REQSK as usize);
        assign(packet, listener, of, size_of::<Attributes>() as u32)
    }
}
