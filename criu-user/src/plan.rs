//! The plan of a restore: for every task the system calls that make it what it was, in order, each with its reason.
//!
//! A plan is plain data. It is made from images alone and can be printed (`restore --explain`); `restore` carries it
//! out. What the engine itself must do, opening files above all, is part of it as [`Open`].

use std::borrow::Cow;
use std::fmt;
use std::os::fd::OwnedFd;

use nix::unistd::Pid;
use serde::Serialize;

use crate::kernel::fill::Piece;

/// A reason, for a reader. Plans have tens of thousands: those about addresses become text only when somebody reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Why {
    /// As it stands.
    Text(Cow<'static, str>),
    /// Something with a number.
    Number(&'static str, u64),
    /// Something at an address.
    At(&'static str, u64),
    /// Something between two addresses.
    Range(&'static str, u64, u64),
    /// A descriptor's number, the file that it stands for, and what kind that is of.
    Descriptor(u32, u32, &'static str),
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::Text(text) => f.write_str(text),
            Why::Number(what, number) => write!(f, "{what} {number}"),
            Why::At(what, start) => write!(f, "{what} {start:#x}"),
            Why::Range(what, start, end) => write!(f, "{what} {start:#x}-{end:#x}"),
            Why::Descriptor(fd, file, kind) => write!(f, "descriptor {fd} is file {file} ({kind})"),
        }
    }
}

impl From<&'static str> for Why {
    fn from(text: &'static str) -> Self {
        Why::Text(text.into())
    }
}

impl From<String> for Why {
    fn from(text: String) -> Self {
        Why::Text(text.into())
    }
}

impl Serialize for Why {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A file that the engine opens and every task inherits, by its place in [`Plan::opens`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct FileRef(pub usize);

/// A task of the plan, by its place in [`Plan::tasks`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct TaskRef(pub usize);

/// A buffer that calls of one task share, by a name of the planner's choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Buffer {
    /// Its name; unique within the task and stage.
    pub name: u32,
    /// Its length in bytes.
    pub len: usize,
}

/// A structure that a call is given.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Structure {
    /// The structure, zeros where pointers go.
    pub bytes: Vec<u8>,
    /// Where in it a pointer goes, and what it points to.
    pub pointers: Vec<(usize, Vec<u8>)>,
    /// Where in it the (32-bit) number of an inherited file goes.
    pub files: Vec<(usize, FileRef)>,
}

/// An argument of a planned call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum Arg {
    /// A number or an address of the task.
    Value(u64),
    /// The descriptor under which the task inherits a file.
    File(FileRef),
    /// A pointer to these bytes.
    Bytes(Vec<u8>),
    /// A pointer to a structure that holds pointers. (In a box: there are few, and of arguments there are many.)
    Struct(Box<Structure>),
    /// The result of the call this many places before (1 is the one right before); both run in one batch.
    Earlier(usize),
    /// A pointer to a buffer that a call fills.
    Fill(Buffer),
    /// The eight bytes at an offset of a buffer that an earlier call filled.
    ValueAt(Buffer, usize),
}

macro_rules! arg_from {
    ($($t:ty),*) => { $(impl From<$t> for Arg { fn from(v: $t) -> Self { Arg::Value(v as u64) } })* };
}
arg_from!(u64, i64, u32, i32, usize);

impl From<FileRef> for Arg {
    fn from(file: FileRef) -> Self {
        Arg::File(file)
    }
}

impl From<Structure> for Arg {
    fn from(structure: Structure) -> Self {
        Arg::Struct(Box::new(structure))
    }
}

impl From<Vec<u8>> for Arg {
    fn from(bytes: Vec<u8>) -> Self {
        Arg::Bytes(bytes)
    }
}

/// What a call must give.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Expect {
    /// No error.
    Success,
    /// This number, such as the address that a mapping must have.
    Exactly(u64),
    /// Whatever it gives is fine.
    Anything,
}

/// A system call that a task makes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Call {
    /// Its number.
    pub nr: i64,
    /// Its arguments, up to six.
    pub args: Vec<Arg>,
    /// Why it is made.
    pub why: Why,
    /// What it must give.
    pub expect: Expect,
    /// The task that it creates.
    pub creates: Option<TaskRef>,
}

impl Call {
    /// A call that must succeed.
    pub fn new(nr: i64, args: impl IntoIterator<Item = Arg>, why: impl Into<Why>) -> Self {
        Self { nr, args: args.into_iter().collect(), why: why.into(), expect: Expect::Success, creates: None }
    }

    /// The same, but it must give this number.
    pub fn giving(mut self, value: u64) -> Self {
        self.expect = Expect::Exactly(value);
        self
    }

    /// The same, but it may fail.
    pub fn trying(mut self) -> Self {
        self.expect = Expect::Anything;
        self
    }

    /// Bytes of memory that it fills from an image.
    pub fn memory(&self) -> u64 {
        match self.expect {
            Expect::Exactly(bytes) if self.nr == libc::SYS_preadv => bytes,
            _ => 0,
        }
    }

    /// The name of the system call.
    pub fn name(&self) -> Cow<'static, str> {
        crate::kernel::syscall_name(self.nr)
    }
}

/// Makes a [`Call`]: the call's name, its arguments, the reason.
#[macro_export]
macro_rules! call {
    ($name:ident ( $($arg:expr),* $(,)? ), $why:expr) => {
        $crate::plan::Call::new(::libc::$name, [$($crate::plan::Arg::from($arg)),*], $why)
    };
}

/// The calls by which a task gets a file from the engine, which it has not inherited (or a stand-in for it), under the
/// number that the engine has for it. `engine`: a pidfd of the engine, among the task's descriptors. pidfd_getfd(2).
pub fn fetch(engine: Arg, file: FileRef, why: &'static str) -> [Call; 3] {
    [
        call!(SYS_pidfd_getfd(engine, file, 0u32), why),
        call!(SYS_dup3(Arg::Earlier(1), file, libc::O_CLOEXEC), "under the number that the engine has for it"),
        call!(SYS_close(Arg::Earlier(2)), "it has its place"),
    ]
}

/// When a call is made. All tasks finish a stage before any begins the next, but for the stages up to `Tree`, which
/// are run generation by generation: a process has its memory before it forks, so that children share it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Stage {
    /// Out with what was inherited.
    Empty,
    /// Areas.
    Memory,
    /// Their pages.
    Fill,
    /// Their protection.
    Protect,
    /// Sessions and children.
    Tree,
    /// Process groups; helpers end.
    Groups,
    /// Sockets are connected by those who were connected: the sockets remember it.
    Connect,
    /// Files that others than the engine have made come to all who need them.
    Fetch,
    /// Descriptors in their places.
    Files,
    /// What needs all descriptors of all processes in place: queues, registrations, terminals, locks.
    Wiring,
    /// Working directory, root, umask, address-space facts, signal actions.
    Process,
    /// Threads are created.
    Threads,
    /// Each thread's own facts.
    Thread,
    /// Timers are armed, as late as possible.
    Timers,
    /// Limits, filters and credentials: afterwards the task may be unable to do anything else.
    Credentials,
    /// What a change of any thread's credentials undoes for its process. The engine's deeds after it are done when
    /// nothing can fail any more, with all files closed.
    Last,
}

impl Stage {
    /// All, in order.
    pub const ALL: [Stage; 16] = [
        Stage::Empty,
        Stage::Memory,
        Stage::Fill,
        Stage::Protect,
        Stage::Tree,
        Stage::Groups,
        Stage::Connect,
        Stage::Fetch,
        Stage::Files,
        Stage::Wiring,
        Stage::Process,
        Stage::Threads,
        Stage::Thread,
        Stage::Timers,
        Stage::Credentials,
        Stage::Last,
    ];
}

/// What a task is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Role {
    /// The leader of a process.
    Leader,
    /// A further thread of the process of this task.
    Thread(TaskRef),
    /// A process that has ended already, or ends before the tree runs.
    Ends,
}

/// How a thread goes on.
#[derive(Clone, PartialEq, Eq)]
pub struct Resume {
    /// General registers.
    pub regs: libc::user_regs_struct,
    /// Extended state in the processor's XSAVE layout.
    pub xstate: Vec<u8>,
    /// Blocked signals.
    pub sigmask: u64,
    /// The call that was interrupted, with what remained of its time: made and interrupted again, so that the kernel
    /// knows what to restart.
    pub wait: Option<Call>,
}

impl fmt::Debug for Resume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Resume {{ rip: {:#x}, rsp: {:#x}, rax: {:#x}, sigmask: {:#x}, wait: {:?} }}",
            self.regs.rip, self.regs.rsp, self.regs.rax, self.sigmask, self.wait
        )
    }
}

/// One task: a process or a thread, from its creation until it runs.
#[derive(Debug, Clone)]
pub struct Task {
    /// Its pid, or tid.
    pub tid: Pid,
    /// The process that it belongs to.
    pub pid: Pid,
    /// Its parent process, where that is part of the plan.
    pub parent: Option<TaskRef>,
    /// What it is.
    pub role: Role,
    /// Its calls.
    pub calls: Vec<(Stage, Vec<Call>)>,
    /// How it goes on; a task that ends has none.
    pub resume: Option<Resume>,
    /// Whether job control had stopped it.
    pub stopped: bool,
    /// The kernel's own areas (vDSO and its data), which are moved to their places and not made.
    pub kernel_areas: Vec<KernelArea>,
    /// Ranges of memory that it is born with and keeps.
    pub keep: Vec<(u64, u64)>,
    /// Ranges of new anonymous memory that the engine fills.
    pub fresh: Vec<(u64, u64)>,
}

/// An area of the kernel's own in a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KernelArea {
    /// As /proc/PID/maps shows it: `[vdso]`, `[vvar]`, `[vvar_vclock]`.
    pub name: String,
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

impl Task {
    /// A task with nothing to do yet.
    pub fn new(tid: Pid, pid: Pid, parent: Option<TaskRef>, role: Role) -> Self {
        Self {
            tid,
            pid,
            parent,
            role,
            calls: Vec::new(),
            resume: None,
            stopped: false,
            kernel_areas: Vec::new(),
            keep: Vec::new(),
            fresh: Vec::new(),
        }
    }
}

impl Task {
    /// Adds a call.
    pub fn push(&mut self, stage: Stage, call: Call) {
        match self.calls.iter_mut().find(|(s, _)| *s == stage) {
            Some((_, calls)) => calls.push(call),
            None => self.calls.push((stage, vec![call])),
        }
    }

    /// Adds calls.
    pub fn extend(&mut self, stage: Stage, mut calls: Vec<Call>) {
        match self.calls.iter_mut().find(|(s, _)| *s == stage) {
            Some((_, known)) => known.append(&mut calls),
            None if calls.is_empty() => {}
            None => self.calls.push((stage, calls)),
        }
    }

    /// Adds a call right behind the first call `nr` of a stage; at its end, where there is none.
    pub fn insert_after(&mut self, stage: Stage, nr: i64, call: Call) {
        let known = self.calls.iter_mut().find(|(s, _)| *s == stage);
        let place = known.and_then(|(_, calls)| Some((calls.iter().position(|c| c.nr == nr)?, calls)));
        match place {
            Some((at, calls)) => calls.insert(at + 1, call),
            None => self.push(stage, call),
        }
    }

    /// The calls of a stage.
    pub fn stage(&self, stage: Stage) -> &[Call] {
        self.calls.iter().find(|(s, _)| *s == stage).map_or(&[], |(_, calls)| calls)
    }
}

/// Opens a file for the tree; the work of the kinds of object.
pub trait Opener: fmt::Debug {
    /// What is opened, for a reader.
    fn describe(&self) -> String;

    /// Bytes of memory that are filled meanwhile.
    fn memory(&self) -> u64 {
        0
    }

    /// Whether it is there only for tasks to fill their memory from: each has its own, and needs nobody else's.
    fn only_fills(&self) -> bool {
        false
    }

    /// The same by any thread, for one that needs no other file.
    fn apart(&self) -> Option<&dyn Apart> {
        None
    }

    /// Opens it. Earlier files of the plan are at hand.
    fn open(&self, opened: &Opened) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>>;
}

/// An opener that needs no other file and may work beside others.
pub trait Apart: Sync {
    /// Opens it.
    fn open(&self) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>>;
}

/// The files that the engine has opened so far.
#[derive(Debug, Default)]
pub struct Opened {
    files: Vec<Option<OwnedFd>>,
}

impl Opened {
    /// The file of an earlier step.
    pub fn get(&self, file: FileRef) -> Option<&OwnedFd> {
        self.files.get(file.0)?.as_ref()
    }

    /// Adds the next file.
    pub fn push(&mut self, file: OwnedFd) {
        self.files.push(Some(file));
    }

    /// Closes all.
    pub fn close(&mut self) {
        self.keep_only(&[]);
    }

    /// Closes all but these.
    pub fn keep_only(&mut self, kept: &[FileRef]) {
        let kept: std::collections::HashSet<usize> = kept.iter().map(|file| file.0).collect();
        let closed = self.files.iter_mut().enumerate().filter(|(n, _)| !kept.contains(n));
        crate::kernel::fd::close_all(closed.filter_map(|(_, file)| file.take()).collect());
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }
}

/// Something that the engine does between two stages, such as sending a signal that a process was to find pending.
pub trait Deed: fmt::Debug {
    /// What is done, for a reader.
    fn describe(&self) -> String;

    /// Does it.
    fn run(&self, opened: &Opened) -> Result<(), Box<dyn std::error::Error + Send + Sync>>;
}

/// What is there before pages are filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Ground {
    /// One of the task's `fresh` ranges: new anonymous memory, without any page.
    Empty,
    /// Whatever can be written to.
    Any,
}

/// Pages of a task that the engine fills.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Assist {
    /// Whose.
    pub task: TaskRef,
    /// From which file.
    pub file: FileRef,
    /// Onto what.
    pub ground: Ground,
    /// What goes where.
    pub pieces: Vec<Piece>,
}

/// Connections to somebody outside, who must not hear of anything until all tasks are ready.
#[derive(Debug, Default)]
pub struct Connections {
    /// Whose packets are held.
    pub locked: Vec<criu_common::gate::Connection>,
    /// The gate that the dump has left.
    pub gate: Option<String>,
    /// Their sockets: kept open to the end.
    pub files: Vec<FileRef>,
    /// What is done when every task is ready, and packets are still held; by several threads at once.
    pub release: Vec<Box<dyn Deed + Sync>>,
    /// What is done as soon as they pass again.
    pub resume: Vec<Resumption>,
}

/// What is done about a connection as soon as its packets pass again.
#[derive(Debug)]
pub struct Resumption {
    /// The connection.
    pub of: criu_common::gate::Connection,
    /// Whether nothing need be done if none of its packets was held.
    pub quiet: bool,
    /// What is done.
    pub deed: Box<dyn Deed>,
}

/// A restore, before it happens.
#[derive(Debug, Default)]
pub struct Plan {
    /// Files that the engine opens, in order.
    pub opens: Vec<Box<dyn Opener>>,
    /// Tasks, parents before children and leaders before their threads.
    pub tasks: Vec<Task>,
    /// Pages that the engine fills while the tasks fill theirs: those of large processes, with all processors.
    pub assists: Vec<Assist>,
    /// What the engine does after a stage.
    pub deeds: Vec<(Stage, Box<dyn Deed>)>,
    /// Descriptors below this number may be the tree's own.
    pub first_free_fd: i32,
    /// Address ranges that the tree uses; the crew needs a hole.
    pub used: Vec<(u64, u64)>,
    /// How much the tree's monotonic and boot clocks are ahead of the host's, in nanoseconds; `None` leaves them.
    pub clocks: Option<ClockOffsets>,
    /// Connections to somebody outside.
    pub connections: Connections,
}

/// Offsets of a time namespace, time_namespaces(7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ClockOffsets {
    /// What CLOCK_MONOTONIC said at the dump, in nanoseconds.
    pub monotonic: i64,
    /// What CLOCK_BOOTTIME said.
    pub boottime: i64,
}

impl Plan {
    /// A task.
    pub fn task(&mut self, task: TaskRef) -> &mut Task {
        &mut self.tasks[task.0]
    }

    /// Adds a file to open.
    pub fn open(&mut self, opener: impl Opener + 'static) -> FileRef {
        self.opens.push(Box::new(opener));
        FileRef(self.opens.len() - 1)
    }

    /// Adds a call.
    pub fn push(&mut self, task: TaskRef, stage: Stage, call: Call) {
        self.tasks[task.0].push(stage, call);
    }

    /// Adds calls.
    pub fn extend(&mut self, task: TaskRef, stage: Stage, calls: Vec<Call>) {
        self.tasks[task.0].extend(stage, calls);
    }

    /// Adds something that the engine does after `stage`.
    pub fn after(&mut self, stage: Stage, deed: impl Deed + 'static) {
        self.deeds.push((stage, Box::new(deed)));
    }
}
