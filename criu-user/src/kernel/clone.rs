//! Creating tasks with pids of our choice: clone3(2) with `set_tid` (CAP_CHECKPOINT_RESTORE).

use std::arch::asm;

use nix::errno::Errno;
use nix::unistd::Pid;

use super::survey::PAGE;
use super::{SysError, SysResult, sys};

/// `struct clone_args` of include/uapi/linux/sched.h, as far as `cgroup`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct CloneArgs {
    /// CLONE_*.
    pub flags: u64,
    /// Where to put a pidfd.
    pub pidfd: u64,
    /// Where to put the child's tid in the child.
    pub child_tid: u64,
    /// Where to put it in the parent.
    pub parent_tid: u64,
    /// Signal on exit.
    pub exit_signal: u64,
    /// Lowest address of the stack.
    pub stack: u64,
    /// Its size.
    pub stack_size: u64,
    /// Thread-local storage.
    pub tls: u64,
    /// Address of the wanted tids, one a pid namespace.
    pub set_tid: u64,
    /// How many.
    pub set_tid_size: u64,
    /// Descriptor of a cgroup.
    pub cgroup: u64,
}

/// Offset of `set_tid` in [`CloneArgs`].
pub const SET_TID: usize = 64;
/// Children of the new process start with all signal actions at their defaults.
pub const CLEAR_SIGHAND: u64 = 0x1_0000_0000;

impl CloneArgs {
    /// As bytes, for a batch.
    pub fn bytes(&self) -> Vec<u8> {
        [
            self.flags,
            self.pidfd,
            self.child_tid,
            self.parent_tid,
            self.exit_signal,
            self.stack,
            self.stack_size,
            self.tls,
            self.set_tid,
            self.set_tid_size,
            self.cgroup,
        ]
        .iter()
        .flat_map(|w| w.to_le_bytes())
        .collect()
    }
}

/// Maps a page with code at an address where nothing is. It stays until the process ends: tasks inherit it.
pub fn map_code(address: u64, code: &[u8]) -> SysResult<()> {
    assert!(code.len() as u64 <= PAGE, "the loop fits a page");
    let error = |call| SysError::new(call, format!("{address:#x}"), Errno::last());
    // SAFETY: nothing is mapped there, or the kernel refuses.
    let base = unsafe {
        libc::mmap(
            address as *mut _,
            PAGE as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
            -1,
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(error("mmap"));
    }
    // SAFETY: the page was just made for this, and is ours alone.
    unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), base.cast(), code.len()) };
    // SAFETY: our page; nothing writes to it any more.
    if unsafe { libc::mprotect(base, PAGE as usize, libc::PROT_READ | libc::PROT_EXEC) } != 0 {
        return Err(error("mprotect"));
    }
    Ok(())
}

/// Creates a process with pid `pid`, which runs the crew loop at `code` with its slot at `slot` and dies with its
/// parent, the calling thread.
pub(crate) fn clone_into(pid: Pid, flags: u64, code: u64, slot: u64) -> SysResult<Pid> {
    let tid = pid.as_raw();
    let args = CloneArgs {
        flags,
        exit_signal: if flags & libc::CLONE_PARENT as u64 != 0 { 0 } else { libc::SIGCHLD as u64 },
        set_tid: &raw const tid as u64,
        set_tid_size: 1,
        ..CloneArgs::default()
    };
    let parent = if flags & libc::CLONE_PARENT as u64 != 0 { Pid::parent() } else { Pid::this() };
    // SAFETY: without CLONE_VM this is a fork. The child makes system calls and jumps to the loop; it allocates nothing
    // and takes no lock.
    let ret =
        unsafe { sys::raw(libc::SYS_clone3, [&raw const args as u64, size_of::<CloneArgs>() as u64, 0, 0, 0, 0]) };
    match ret {
        Ok(0) => {
            // SAFETY: numbers only. Between our birth and this call the parent may have died.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                if libc::getppid() != parent.as_raw() {
                    libc::_exit(1);
                }
                // The loop uses no stack and never returns.
                asm!("mov r12, rdi", "jmp rsi", in("rdi") slot, in("rsi") code, options(noreturn));
            }
        }
        Ok(pid) => Ok(Pid::from_raw(pid as i32)),
        Err(e) => Err(SysError::new("clone3", format!("set_tid {pid}"), e)),
    }
}
