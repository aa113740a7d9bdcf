//! What a system call touches, in a word for each number: compiled into the programs as a constant table that the engine
//! fills by name before they are loaded.

use super::Kind;

/// Numbers that the table has room for; those above touch everything.
pub const CALLS: usize = 512;

/// A word of the table: up to two kinds, and what else is to be looked at. 0: it touches nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Entry(pub u32);

const EVERYTHING: u32 = 1 << 31;

impl Entry {
    /// Touches nothing.
    pub const NOTHING: Self = Self(0);
    /// May touch anything.
    pub const EVERYTHING: Self = Self(EVERYTHING);

    /// Also touches this kind. There is room for two.
    pub const fn and(self, kind: Kind) -> Self {
        let number = kind as u32 + 1;
        if self.0 & 0xff == 0 { Self(self.0 | number) } else { Self(self.0 | number << 8) }
    }

    /// To be looked at more closely.
    pub const fn check(self, check: Check) -> Self {
        Self(self.0 | (check as u32) << 16)
    }

    /// The first kind, as its number plus one; 0 for none.
    #[inline(always)]
    pub const fn first(self) -> u32 {
        self.0 & 0xff
    }

    /// The second.
    #[inline(always)]
    pub const fn second(self) -> u32 {
        self.0 >> 8 & 0xff
    }

    /// Number of a [`Check`].
    #[inline(always)]
    pub const fn checks(self) -> u32 {
        self.0 >> 16 & 0xff
    }

    /// Whether it may touch anything.
    #[inline(always)]
    pub const fn is_everything(self) -> bool {
        self.0 & EVERYTHING != 0
    }
}

/// What is looked at more closely when a call returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Check {
    /// Reported whenever it succeeds.
    Report = 1,
    /// socket(2): reported for what cannot be dumped.
    Socket,
    /// clone(2): reported if processes share more than is usual, or for a new namespace.
    Clone,
    /// clone3(2): likewise.
    Clone3,
    /// mmap(2): reported for huge pages.
    Map,
    /// memfd_create(2): reported for huge pages.
    MemoryFile,
    /// shmget(2): reported for huge pages.
    SharedMemory,
    /// ptrace(2): reported if it begins.
    Trace,
    /// seccomp(2): reported for a supervisor's end.
    Filter,
    /// bpf(2): reported if it makes something.
    Bpf,
    /// sched_setattr(2): reported for deadlines.
    Scheduling,
    /// fcntl(2): kind by command.
    Fcntl,
    /// prctl(2): kind by option.
    Prctl,
    /// ioctl(2): kind by command.
    Ioctl,
    /// recvmsg(2) and the like: descriptors may have come.
    Receive,
}
