//! The crew: tasks that consist of nothing but the loop, and become what their plan says.
//!
//! All tasks of a restore share one area, mapped at the same address in each, in which every task has a slot of its
//! own: a word that says whose turn it is, and the batch. The loop's code lies beside it in a page of its own, which is
//! never writable. A task whose engine has died notices within a second, because its parent is another, and ends.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{Pid, ftruncate};

use crate::kernel::error::During;
use crate::kernel::map::SharedMap;
use crate::kernel::proc;
use crate::kernel::survey::PAGE;
use crate::kernel::{SysError, clone};

use super::batch::{Batch, HEADER, Outcome};
use super::{AgentError, code};

const NAME: &CStr = c"criu-ebpf";
/// Size of a slot for the leader of a process.
pub const LEADER_SLOT: usize = 256 << 10;
/// Size of a slot for a further thread.
pub const THREAD_SLOT: usize = 8 << 10;

/// The shared area of all tasks of a restore.
#[derive(Debug)]
pub struct Crew {
    map: SharedMap,
    code: u64,
    len: u64,
    slots: Vec<Slot>,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    offset: usize,
    size: usize,
    tid: Pid,
}

/// One task of the crew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member(pub usize);

/// Bytes of address space that a crew with these slots takes, code included.
pub fn space(slots: &[usize]) -> u64 {
    slots.iter().sum::<usize>() as u64 + PAGE
}

impl Crew {
    /// Makes the area at `address`, with one slot for each of `members` (its tid, and the size of its slot).
    pub fn new(address: u64, members: &[(Pid, usize)]) -> Result<Self, AgentError> {
        let sizes: Vec<usize> = members.iter().map(|&(_, size)| size).collect();
        let len = space(&sizes);
        let memfd: OwnedFd = memfd_create(NAME, MFdFlags::MFD_CLOEXEC).during("memfd_create", "crew")?;
        ftruncate(&memfd, len as i64).during("ftruncate", "crew")?;
        let map = SharedMap::new_at(&memfd, (len - PAGE) as usize, address + PAGE)?;
        clone::map_code(address, code::crew())?;
        let mut offset = 0;
        let slots = members
            .iter()
            .map(|&(tid, size)| {
                offset += size;
                Slot { offset: offset - size, size, tid }
            })
            .collect();
        Ok(Self { map, code: address, len, slots })
    }

    /// First address and length of code and slots, in every task.
    pub fn range(&self) -> (u64, u64) {
        (self.code, self.len)
    }

    /// Address of a task's slot.
    pub fn slot(&self, member: Member) -> u64 {
        self.map.address() + self.slots[member.0].offset as u64
    }

    /// Bytes that a batch of this task may have.
    pub fn room(&self, member: Member) -> usize {
        self.slots[member.0].size
    }

    /// Tells a task who its parent will be.
    pub fn expect_parent(&self, member: Member, parent: Pid) {
        self.map.write_u64(self.slots[member.0].offset + 48, parent.as_raw() as u64);
    }

    /// Creates the first task, a child of the calling thread, with a pid of its own choice.
    pub fn spawn(&self, member: Member, flags: u64) -> Result<Pid, AgentError> {
        let slot = self.slots[member.0];
        let pid = clone::clone_into(slot.tid, flags, self.code, self.slot(member))?;
        Ok(pid)
    }

    /// Hands a batch to a task.
    pub fn start(&self, member: Member, batch: &Batch) -> Result<(), AgentError> {
        let slot = self.slots[member.0];
        if batch.size() > slot.size {
            return Err(AgentError::TooLarge { needed: batch.size(), room: slot.size });
        }
        self.map.write(slot.offset + HEADER, &batch.encode(self.slot(member)));
        self.map.write_u64(slot.offset + 16, batch.len() as u64);
        self.map.write_u64(slot.offset + 24, HEADER as u64);
        self.map.set_and_wake(slot.offset, 1);
        Ok(())
    }

    /// Waits until a task has done its batch.
    pub fn finish(&self, member: Member, batch: &Batch) -> Result<Outcome, AgentError> {
        let slot = self.slots[member.0];
        let mut looked = Instant::now();
        while self.map.load(slot.offset) == 1 {
            self.map.wait_while(slot.offset, 1, Duration::from_millis(20));
            if looked.elapsed() > Duration::from_millis(20) {
                looked = Instant::now();
                // It may have ended in between, its last batch done.
                if !is_alive(slot.tid) && self.map.load(slot.offset) == 1 {
                    return Err(AgentError::Gone { pid: slot.tid.as_raw() });
                }
            }
        }
        Ok(self.read_outcome(slot, batch))
    }

    /// What came of a batch, if the task has done it.
    pub fn outcome(&self, member: Member, batch: &Batch) -> Option<Outcome> {
        let slot = self.slots[member.0];
        (self.map.load(slot.offset) != 1).then(|| self.read_outcome(slot, batch))
    }

    fn read_outcome(&self, slot: Slot, batch: &Batch) -> Outcome {
        let left = self.map.read_u64(slot.offset + 16) as usize;
        batch.outcome(left, &self.map.read(slot.offset, batch.size()))
    }
}

fn is_alive(tid: Pid) -> bool {
    proc::read_text(&format!("/proc/{tid}/stat"))
        .is_ok_and(|text| text.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X'])))
}

impl From<SysError> for Box<AgentError> {
    fn from(err: SysError) -> Self {
        Box::new(AgentError::Sys(err))
    }
}
