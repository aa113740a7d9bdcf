//! What iterators are handed: a part of the kernel's interface, so not looked up.

use aya_ebpf::cty::c_void;

/// `struct bpf_iter_meta`
#[repr(C)]
pub(crate) struct Meta {
    pub(crate) seq: *mut c_void,
}

/// `struct bpf_iter__task_file`
#[repr(C)]
pub(crate) struct FileContext {
    pub(crate) meta: *const Meta,
    pub(crate) task: *const c_void,
    pub(crate) fd: u32,
    pub(crate) file: *const c_void,
}

/// `struct bpf_iter__task`
#[repr(C)]
pub(crate) struct TaskContext {
    pub(crate) meta: *const Meta,
    pub(crate) task: *const c_void,
}
