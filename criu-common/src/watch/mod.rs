//! What the watching programs and the engine share: the tracked set, the records of the ring buffer, the values of the
//! maps, and the table that says what each system call touches.
//!
//! Process ids in records are those of the engine's pid namespace; `key`s are the kernel's own numbers, under which a
//! process stands in the maps.

pub mod calls;
pub mod offsets;

/// Kinds of state that system calls touch. Which of them a generation tells everything about stands in docs/tracking.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Kind {
    /// Which descriptors there are, and what they refer to.
    Descriptors,
    /// Flags, offsets and settings of what is open: fcntl, lseek, ioctl.
    Files,
    /// The memory map.
    Memory,
    /// Signal actions.
    Actions,
    /// Signal masks, alternate stacks.
    Masks,
    /// Which timers there are, and how they are set.
    Timers,
    /// User and group ids, capabilities, keys, Landlock.
    Credentials,
    /// Seccomp filters.
    Seccomp,
    /// Working directory, root, umask.
    Directories,
    /// Resource limits.
    Limits,
    /// Policies, priorities, affinity.
    Scheduling,
    /// Names, connections and options of sockets.
    Sockets,
    /// Locks and leases.
    Locks,
    /// System V and POSIX message queues, semaphores, shared memory.
    Ipc,
    /// Namespaces.
    Namespaces,
    /// Mounts.
    Mounts,
    /// Threads come and go; what each has registered (robust list, rseq, name).
    Threads,
    /// Children come and go.
    Children,
    /// Sessions, process groups.
    Sessions,
    /// What is watched: epoll, inotify, timerfds, signalfds.
    Watches,
    /// Settings of the process: prctl, personality.
    Settings,
    /// Asynchronous requests: io_submit, io_uring_enter.
    Asynchronous,
}

/// How many kinds there are.
pub const KINDS: usize = 22;

impl Kind {
    /// All of them, in order.
    pub const ALL: [Self; KINDS] = [
        Self::Descriptors,
        Self::Files,
        Self::Memory,
        Self::Actions,
        Self::Masks,
        Self::Timers,
        Self::Credentials,
        Self::Seccomp,
        Self::Directories,
        Self::Limits,
        Self::Scheduling,
        Self::Sockets,
        Self::Locks,
        Self::Ipc,
        Self::Namespaces,
        Self::Mounts,
        Self::Threads,
        Self::Children,
        Self::Sessions,
        Self::Watches,
        Self::Settings,
        Self::Asynchronous,
    ];
}

/// A process of the tracked set; the value of its map. The key is the kernel's number of the process.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Process {
    /// Its pid.
    pub pid: u32,
    /// Its parent's, if it was forked while it was watched.
    pub parent: u32,
    /// How often it has called execve(2).
    pub images: u32,
    /// [`SHARES_MEMORY`], [`BY_CGROUP`], [`SHARED_DESCRIPTORS`].
    pub flags: u32,
    /// When it began, on the boot clock.
    pub started_ns: u64,
    /// Under which key the process stands that it shares memory with.
    pub lender: u32,
    /// Padding.
    pub zero: u32,
    /// Write faults on pages that were there, and on pages that were not.
    pub write_faults: [u64; 2],
    /// What counts for every kind.
    pub everything: u64,
    /// How often each [`Kind`] was touched.
    pub kinds: [u64; KINDS],
}

/// It was made by vfork(2) or the like, and has its parent's memory until it calls execve(2) or ends.
pub const SHARES_MEMORY: u32 = 1;
/// It is followed because of its control group.
pub const BY_CGROUP: u32 = 2;

/// It has, or has had, its table of descriptors in common with another process (CLONE_FILES): calls of the other change it.
pub const SHARED_DESCRIPTORS: u32 = 4;

/// How many processes can be followed at once.
pub const MOST_PROCESSES: u32 = 1 << 14;

/// What the sieve tells apart: the lower bits of process numbers.
pub const SIEVE: usize = 1 << 15;

/// The beginning of every record in the ring buffer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Header {
    /// One of [`RecordKind`].
    pub kind: u32,
    /// Key of the process that it is about.
    pub key: u32,
    /// Its pid.
    pub pid: u32,
    /// The thread.
    pub tid: u32,
    /// When, on the monotonic clock.
    pub time_ns: u64,
}

/// What a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RecordKind {
    /// [`Fork`]
    Fork = 1,
    /// [`Exec`]
    Exec,
    /// [`Exit`]
    Exit,
    /// [`Block`]
    Block,
    /// [`Call`]
    Call,
    /// [`SocketState`]
    Socket,
    /// [`Moved`]
    Moved,
}

/// A process or a thread was made by the one in the header.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Fork {
    /// The maker.
    pub header: Header,
    /// Key of the new process, or of the maker for a thread.
    pub child_key: u32,
    /// The new process, or the maker's for a thread.
    pub child_pid: u32,
    /// The new thread.
    pub child_tid: u32,
    /// Whether it is a thread.
    pub is_thread: u32,
}

/// A process has another program.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Exec {
    /// Who.
    pub header: Header,
    /// Its new name.
    pub comm: [u8; 16],
}

/// A thread, or with it the process, has ended.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Exit {
    /// Who.
    pub header: Header,
    /// As wait(2) gives it.
    pub code: i32,
    /// Whether it was the last thread.
    pub is_process: u32,
}

/// The first write fault in a block of memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Block {
    /// Who.
    pub header: Header,
    /// Start of the block.
    pub address: u64,
}

/// Frames of the user stack that a [`Call`] has room for.
pub const FRAMES: usize = 16;

/// A system call after which a dump may be refused.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Call {
    /// Who.
    pub header: Header,
    /// Its number.
    pub number: u32,
    /// How many frames there are.
    pub frames: u32,
    /// Its arguments.
    pub arguments: [u64; 6],
    /// What it gave.
    pub result: i64,
    /// The flags that were behind a pointer (clone3), the policy (sched_setattr); else 0.
    pub detail: u64,
    /// Return addresses, the innermost first, as far as frame pointers lead.
    pub stack: [u64; FRAMES],
}

/// A connection has changed its state.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SocketState {
    /// Whose it is.
    pub header: Header,
    /// Cookie of the socket.
    pub cookie: u64,
    /// States by their numbers in the kernel (`TCP_ESTABLISHED` is 1).
    pub from: u32,
    /// The new one.
    pub to: u32,
}

/// A process was put into the watched control group, or taken out of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Moved {
    /// Who.
    pub header: Header,
    /// Whether it is in it now.
    pub is_in: u32,
    /// Padding.
    pub zero: u32,
}

/// Size of the blocks by which write faults are counted, as a power of two: that of a huge page.
pub const BLOCK_SHIFT: u32 = 21;

/// Key of the map of write faults.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct BlockKey {
    /// Key of the process.
    pub key: u32,
    /// Which of its programs: [`Process::images`].
    pub image: u32,
    /// Address, shifted by [`BLOCK_SHIFT`].
    pub block: u64,
}

/// Write faults in a block, on one processor.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// On pages that were there: write-protected, or shared until then.
    pub protected: u64,
    /// On pages that were not.
    pub missing: u64,
    /// The last of them, on the monotonic clock.
    pub last_ns: u64,
}

/// How many blocks are counted at most.
pub const MOST_BLOCKS: u32 = 1 << 17;

/// A TCP socket that a process has open, as it is at this moment.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Socket {
    /// SO_COOKIE; 0 as long as nobody has asked for it.
    pub cookie: u64,
    /// Inode, as in /proc/PID/fd.
    pub inode: u64,
    /// Who has it.
    pub pid: u32,
    /// Under which descriptor.
    pub fd: u32,
    /// State, by its number in the kernel.
    pub state: u32,
    /// Address family.
    pub family: u16,
    /// Our port.
    pub port: u16,
    /// The peer's.
    pub peer_port: u16,
    /// Padding.
    pub zero: [u16; 3],
    /// Our address, IPv4 mapped into IPv6.
    pub address: [u8; 16],
    /// The peer's.
    pub peer_address: [u8; 16],
    /// Bytes that were sent, those sent again included.
    pub sent: u64,
    /// Bytes that came.
    pub received: u64,
    /// Segments that were sent again.
    pub retransmits: u32,
    /// Bytes that wait to be taken; of a listening socket the connections.
    pub unread: u32,
    /// Bytes that were written and not acknowledged.
    pub unacknowledged: u32,
    /// Padding.
    pub zero2: u32,
}

/// Whose a socket is.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// Key of the process.
    pub key: u32,
    /// Its pid.
    pub pid: u32,
}

/// A port of a network namespace.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Listener {
    /// Address of the namespace in the kernel.
    pub network: u64,
    /// The port.
    pub port: u64,
}

/// How many ports that somebody listens at are remembered at most.
pub const MOST_LISTENERS: u32 = 1 << 12;

/// How many connections are remembered at most.
pub const MOST_SOCKETS: u32 = 1 << 16;

/// A control group that is followed. One with id 0 stands for its whole hierarchy: moves within it are looked at.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Group {
    /// Inode of its directory.
    pub id: u64,
    /// Number of its hierarchy, 0 for version 2.
    pub hierarchy: u32,
    /// Padding.
    pub zero: u32,
}

/// How many groups can be followed at once.
pub const MOST_GROUPS: u32 = 64;

/// What can be lost: index into the map of losses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Loss {
    /// A process that did not fit into the tracked set: the set is not whole.
    Process,
    /// A record of lifecycle that did not fit into the ring.
    Lifecycle,
    /// A record of a first write.
    Block,
    /// A record of a system call.
    Call,
    /// A record of a connection's state.
    Socket,
    /// A write fault that was not counted.
    Fault,
    /// A connection that was not counted.
    Connection,
}

/// How many of [`Loss`] there are.
pub const LOSSES: u32 = 7;

/// Size of the ring buffer in bytes: some thousand records.
pub const RING: u32 = 1 << 19;

/// What the program that keeps the set by hand is to do with a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Order {
    /// Nothing but to tell of it.
    Tell,
    /// Put it into the set.
    Follow,
    /// Likewise, for the sake of its control group.
    FollowByCgroup,
    /// Take it out.
    Forget,
}

/// What the program that puts a process into the tracked set answers.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Followed {
    /// Under which key it stands.
    pub key: u32,
    /// Its pid.
    pub pid: u32,
    /// Sequence number of the writers of its memory map (`mm_struct.mm_lock_seq`); 0 where the kernel keeps none.
    pub map_sequence: u32,
    /// Whether it is in the set.
    pub is_in: u32,
}

macro_rules! layout {
    ($($record:ty: $size:literal, [$($field:ident: $at:literal),*];)*) => {
        $(const _: () = {
            assert!(size_of::<$record>() == $size && align_of::<$record>() <= 8);
            $(assert!(core::mem::offset_of!($record, $field) == $at);)*
        };)*
    };
}

// Compiled for BPF and for the engine: both have to agree.
layout! {
    Process: 232, [started_ns: 16, write_faults: 32, everything: 48, kinds: 56];
    Header: 24, [time_ns: 16];
    Fork: 40, [child_key: 24];
    Exec: 40, [comm: 24];
    Exit: 32, [code: 24];
    Block: 32, [address: 24];
    Call: 224, [arguments: 32, result: 80, stack: 96];
    SocketState: 40, [cookie: 24];
    Moved: 32, [is_in: 24];
    BlockKey: 16, [block: 8];
    Faults: 24, [last_ns: 16];
    Socket: 104, [family: 28, address: 40, sent: 72, unread: 92];
    Owner: 8, [pid: 4];
    Listener: 16, [port: 8];
    Group: 16, [hierarchy: 8];
    Followed: 16, [is_in: 12];
}
