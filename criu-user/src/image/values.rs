//! Numbers that stand in messages and have a name in CRIU only, not in the kernel's headers.

use super::proto::CoreEntry;

bitflags::bitflags! {
    /// `vma_entry.status`: what kind of area it is.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct VmaStatus: u32 {
        /// An area that is made again, as opposed to one that the kernel makes.
        const REGULAR = 1 << 0;
        /// Grows down.
        const STACK = 1 << 1;
        /// The page at the end of all addresses.
        const VSYSCALL = 1 << 2;
        /// The vDSO.
        const VDSO = 1 << 3;
        /// What brk(2) moves the end of.
        const HEAP = 1 << 5;
        /// A private mapping of a file.
        const FILE_PRIVATE = 1 << 6;
        /// A shared mapping of a file.
        const FILE_SHARED = 1 << 7;
        /// Shared memory without a name; `shmid` is its id.
        const ANON_SHARED = 1 << 8;
        /// Private memory.
        const ANON_PRIVATE = 1 << 9;
        /// System V shared memory; `shmid` is its id.
        const SYSVIPC = 1 << 10;
        /// The ring of a packet socket.
        const SOCKET = 1 << 11;
        /// The data pages of the vDSO.
        const VVAR = 1 << 12;
        /// The ring of io_setup(2).
        const AIORING = 1 << 13;
        /// A memory file; together with [`VmaStatus::FILE_SHARED`] or [`VmaStatus::FILE_PRIVATE`] or
        /// [`VmaStatus::ANON_SHARED`], as the dump saw fit.
        const MEMFD = 1 << 14;
        /// A shadow stack.
        const SHADOW_STACK = 1 << 15;
        /// No area but pages guarded by `MADV_GUARD_INSTALL`. These stand behind all areas.
        const GUARD = 1 << 16;
        /// The kernel's area for uprobes.
        const UPROBES = 1 << 17;
    }
}

/// `task_core_entry.task_state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TaskState {
    /// It runs on after a restore.
    Alive,
    /// It is gone, and nobody has waited for it.
    Dead,
    /// It is stopped after a restore as it was before.
    Stopped,
    /// The same, in images that make a difference between the two.
    Zombie,
}

impl TaskState {
    /// Whether a process's message says that it is gone; one without the process's part says nothing else.
    pub fn is_gone(core: &CoreEntry) -> bool {
        let state = core.tc.as_ref().and_then(|tc| TaskState::from_raw(tc.task_state));
        state.is_none_or(|state| !state.lives())
    }

    /// The number in the message.
    pub const fn to_raw(self) -> u32 {
        match self {
            TaskState::Alive => 1,
            TaskState::Dead => 2,
            TaskState::Stopped => 3,
            TaskState::Zombie => 6,
        }
    }

    /// The state of a number, if it is one that a dump can contain.
    pub const fn from_raw(raw: u32) -> Option<TaskState> {
        match raw {
            1 => Some(TaskState::Alive),
            2 => Some(TaskState::Dead),
            3 => Some(TaskState::Stopped),
            6 => Some(TaskState::Zombie),
            _ => None,
        }
    }

    /// Whether it has memory, files and registers.
    pub const fn lives(self) -> bool {
        matches!(self, TaskState::Alive | TaskState::Stopped)
    }
}

bitflags::bitflags! {
    /// `unix_sk_entry.uflags`: how the other end comes to be.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct UnixFlags: u32 {
        /// It is outside of the dump; connect to its name.
        const EXTERN = 1 << 0;
        /// It is the dumping engine's own, of old.
        const SERVICE = 1 << 1;
        /// A plugin makes it.
        const CALLBACK = 1 << 2;
        /// It is given to the restore (`--inherit-fd`).
        const INHERIT = 1 << 3;
    }
}

/// A device number as most messages have it, the kernel's own notation: 12 bits, then 20 bits.
/// (`ghost_file_entry.rdev` and `irmap_cache_entry.dev` have it as stat(2) tells it.)
pub const fn kernel_dev(dev: libc::dev_t) -> u32 {
    libc::major(dev) << 20 | (libc::minor(dev) & 0xf_ffff)
}

/// The other way round from [`kernel_dev`].
pub const fn user_dev(dev: u32) -> libc::dev_t {
    libc::makedev(dev >> 20, dev & 0xf_ffff)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_back() {
        for (major, minor) in [(0, 0), (136, 5), (259, 1 << 19), (4095, 0xf_ffff)] {
            let dev = libc::makedev(major, minor);
            assert_eq!(user_dev(kernel_dev(dev)), dev);
        }
        for raw in 0..10 {
            assert!(TaskState::from_raw(raw).is_none_or(|state| state.to_raw() == raw));
        }
    }
}
