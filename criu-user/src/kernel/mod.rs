//! Everything that talks to the kernel: thin, typed wrappers that own their descriptors and know nothing of images.
//! The raw system calls, and with them `unsafe`, live here and in the agent only.

mod anonymous;
pub mod apart;
pub mod cgroup;
pub mod clone;
pub mod ebpf;
pub mod error;
pub mod events;
pub mod fd;
pub mod fill;
pub mod gate;
pub mod headroom;
pub mod inet_diag;
pub mod interfaces;
pub mod ipc;
pub mod kept;
pub mod known;
pub mod limits;
pub mod map;
pub mod mem;
pub mod nftables;
pub mod packet_diag;
pub mod page_set;
pub mod pagemap;
pub mod pidfd;
pub mod pipe;
pub mod probe;
pub mod proc;
pub mod processors;
pub mod ptrace;
pub mod regs;
pub mod root;
pub mod sched;
pub mod scratch;
pub mod seccomp_bpf;
mod sock_diag;
pub mod socket;
pub mod survey;
pub mod survey_cache;
pub mod surveyor;
pub mod sys;
pub mod tcp;
pub mod threads;
pub mod tls;
pub mod traffic;
pub mod tty;
pub mod uffd;
pub mod unix_diag;
pub mod xsave;

pub use error::{SysError, SysResult};

/// The name of a system call, for messages.
pub fn syscall_name(nr: i64) -> std::borrow::Cow<'static, str> {
    match syscalls::Sysno::new(nr as usize) {
        Some(known) => known.name().into(),
        None => format!("syscall {nr}").into(),
    }
}
