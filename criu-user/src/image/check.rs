//! How much of an image is believed: caps on what is read, and the reading of a file for its own sake.

use std::path::Path;

use prost::Message;

use super::{Ghost, ImageDir, ImageError, ImageKind, ImageName, WithPayload, pages, proto::*};

/// No message is longer. The longest that a dump makes is the memory map of a process with very many areas: 60 to 70
/// bytes each, and even a million areas (fifteen times the kernel's default limit) stay below this. CRIU has no limit.
pub const MESSAGE_MAX: u64 = 64 << 20;

/// No data that is read into memory at once is longer. What waits in a pipe or socket is limited by its buffer, and
/// buffers of this size do not exist outside of experiments; files and pages are never read into memory whole.
pub const PAYLOAD_MAX: u64 = 256 << 20;

/// No chain of parent dumps is longer. Every link costs a lookup for each page, and chains are made by hand or by a
/// loop that makes a full dump now and then.
pub const PARENTS_MAX: usize = 1024;

/// So much memory may the messages of one file take, all together, once they are decoded. Without a cap a small hostile
/// file could exhaust the machine: a decoded message is up to some hundred times as large as its bytes, because absent
/// fields take room as well. A million descriptors, the default limit of a system, stay below this.
const DECODED_MAX: u64 = 4 << 30;

/// Counts what the messages of a file take once they are decoded.
#[derive(Debug, Default)]
pub(super) struct Budget {
    spent: u64,
}

impl Budget {
    pub(super) fn spend<M>(&mut self, file: &Path, offset: u64, len: u64) -> Result<(), ImageError> {
        // The message itself, and what it owns: as much as its bytes, twice over for the slack of growing vectors.
        self.spent += size_of::<M>() as u64 + 2 * len;
        if self.spent <= DECODED_MAX {
            return Ok(());
        }
        let file = file.to_owned();
        Err(ImageError::TooLong { file, offset, what: "everything up to here", len: self.spent, max: DECODED_MAX })
    }
}

/// Decodes all of a file and forgets it: whether every length fits, every message is one, every offset is there.
/// Returns the number of messages.
pub fn file(dir: &ImageDir, name: ImageName) -> Result<usize, ImageError> {
    use ImageKind as K;
    match name.kind {
        K::Inventory => dir.inventory().map(|_| 1),
        K::Pstree => many::<PstreeEntry>(dir, name),
        K::Core => one::<CoreEntry>(dir, name),
        K::Ids => one::<TaskKobjIdsEntry>(dir, name),
        K::Mm => one::<MmEntry>(dir, name),
        K::Pagemap | K::PagemapShmem => pages::count(dir, name),
        K::Pages => dir.open_file(name).map(|_| 0),
        K::Fs => one::<FsEntry>(dir, name),
        K::Seccomp => one::<SeccompEntry>(dir, name),
        K::Apparmor => one::<ApparmorEntry>(dir, name),
        K::Cgroup => one::<CgroupEntry>(dir, name),
        K::Cpuinfo => one::<CpuinfoEntry>(dir, name),
        K::Fdinfo => many::<FdinfoEntry>(dir, name),
        K::Files => many::<FileEntry>(dir, name),
        K::RemapFpath => many::<RemapFilePathEntry>(dir, name),
        K::GhostFile => Ghost::read(dir, name.id).map(|ghost| 1 + ghost.pieces.len()),
        K::MemfdInode => many::<MemfdInodeEntry>(dir, name),
        K::FileLocks => many::<FileLockEntry>(dir, name),
        K::PipesData | K::FifoData => payload::<PipeDataEntry>(dir, name),
        K::SkQueues | K::UdpQueues => payload::<SkPacketEntry>(dir, name),
        K::TcpClients => payload::<TcpClientEntry>(dir, name),
        K::TcpStream | K::TcpTls => payload::<TcpStreamEntry>(dir, name),
        K::TtyInfo => many::<TtyInfoEntry>(dir, name),
        K::TtyData => many::<TtyDataEntry>(dir, name),
        K::IpcVar => one::<IpcVarEntry>(dir, name),
        K::IpcShm => payload::<IpcShmEntry>(dir, name),
        K::IpcSem => payload::<IpcSemEntry>(dir, name),
        K::IpcMsg => message_queues(dir, name),
        K::Utsns => one::<UtsnsEntry>(dir, name),
        K::Timens => one::<TimensEntry>(dir, name),
        K::Pidns => one::<PidnsEntry>(dir, name),
        K::Userns => one::<UsernsEntry>(dir, name),
        K::Mountpoints => many::<MntEntry>(dir, name),
        K::Netns => one::<NetnsEntry>(dir, name),
        K::Netdev => many::<NetDeviceEntry>(dir, name),
        K::BpfmapFile => many::<BpfmapFileEntry>(dir, name),
        K::BpfmapData => payload::<BpfmapDataEntry>(dir, name),
        K::StatsDump | K::StatsRestore => one::<StatsEntry>(dir, name),
        K::IrmapCache => many::<IrmapCacheEntry>(dir, name),
    }
}

fn one<M: Message + Default>(dir: &ImageDir, name: ImageName) -> Result<usize, ImageError> {
    dir.read_one::<M>(name).map(|_| 1)
}

fn many<M: Message + Default>(dir: &ImageDir, name: ImageName) -> Result<usize, ImageError> {
    dir.reader(name)?.messages::<M>().try_fold(0, |count, message| message.map(|_| count + 1))
}

fn payload<M: WithPayload>(dir: &ImageDir, name: ImageName) -> Result<usize, ImageError> {
    let mut reader = dir.reader(name)?;
    let mut count = 0;
    while reader.message_over_payload::<M>()?.is_some() {
        count += 1;
    }
    Ok(count)
}

fn message_queues(dir: &ImageDir, name: ImageName) -> Result<usize, ImageError> {
    let mut reader = dir.reader(name)?;
    let mut count = 0;
    while let Some(queue) = reader.message::<IpcMsgEntry>()? {
        for _ in 0..queue.qnum {
            let offset = reader.position();
            if reader.message_over_payload::<IpcMsg>()?.is_none() {
                let what = "a message of a queue";
                let file = reader.path().to_owned();
                return Err(ImageError::Truncated { file, offset, what, need: 4, left: 0 });
            }
        }
        count += 1;
    }
    Ok(count)
}
