//! How the programs read the kernel's structures.

use core::cell::UnsafeCell;

use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::bpf_probe_read_kernel;

/// The offset of a field, or `ABSENT`.
macro_rules! off {
    ($field:ident) => {
        $crate::access::constant(&$crate::OFFSETS.$field)
    };
}
pub(crate) use off;

/// A value that the engine puts in before the program is loaded. Volatile, or the compiler would use the one that it sees.
#[inline(always)]
pub(crate) fn constant(value: &u32) -> u32 {
    // SAFETY: it is a reference.
    unsafe { core::ptr::read_volatile(value) }
}

/// A buffer that is too large for the stack of 512 bytes. One engine loads the programs and runs one iterator at a time,
/// so nobody else writes it meanwhile.
pub(crate) struct Scratch<T>(UnsafeCell<T>);

// SAFETY: see above.
unsafe impl<T> Sync for Scratch<T> {}

impl<T> Scratch<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    #[inline(always)]
    pub(crate) const fn get(&self) -> *mut T {
        self.0.get()
    }
}

/// The field at `offset`. Volatile, so that the compiler neither joins loads nor makes one of half the width: the
/// verifier compares each with the type of the field.
///
/// # Safety
/// `base` must be a typed kernel pointer; the verifier sees to the rest.
#[inline(always)]
pub(crate) unsafe fn load<T: Copy>(base: *const c_void, offset: u32) -> T {
    // SAFETY: as said above.
    unsafe { core::ptr::read_volatile(base.cast::<u8>().add(offset as usize).cast::<T>()) }
}

/// The pointer at `offset`, typed again. Dear: for every such load the verifier searches the names of all types of the
/// kernel, several times, and takes a third of a millisecond. Only for what a helper wants typed.
///
/// # Safety
/// As [`load`].
#[inline(always)]
pub(crate) unsafe fn load_pointer(base: *const c_void, offset: u32) -> *const c_void {
    // SAFETY: as said above.
    unsafe { load(base, offset) }
}

/// The field at `offset` of what is at an address that is only a number to the verifier: cheap to verify, and one call
/// of a helper to run. Zero where nothing can be read.
///
/// # Safety
/// As [`read`].
#[inline(always)]
pub(crate) unsafe fn get<T: Copy + Default>(base: u64, offset: u32) -> T {
    // SAFETY: as said above.
    unsafe { read(base + u64::from(offset)) }
}

/// A value at an address that is only a number to the verifier; zero where nothing can be read.
///
/// # Safety
/// None of its own: the helper checks the address. `T` must be plain data.
#[inline(always)]
pub(crate) unsafe fn read<T: Copy + Default>(address: u64) -> T {
    let mut value = T::default();
    // SAFETY: `value` is writable for its size; the helper zeroes it when it fails.
    unsafe { bpf_probe_read_kernel((&raw mut value).cast(), size_of::<T>() as u32, address as *const c_void) };
    value
}

/// Copies a block of the kernel's memory; zeros where it cannot be read.
///
/// # Safety
/// `to` must be writable for `length` bytes.
#[inline(always)]
pub(crate) unsafe fn copy(to: *mut u8, length: u32, from: *const c_void) {
    // SAFETY: as said above.
    unsafe { bpf_probe_read_kernel(to.cast(), length, from) };
}

/// 1 for what is not zero; without a branch, over which the verifier would have to walk both ways.
#[inline(always)]
pub(crate) fn is_set(value: u64) -> u8 {
    ((value | value.wrapping_neg()) >> 63) as u8
}
