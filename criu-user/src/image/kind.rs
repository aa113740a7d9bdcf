//! Which files there are in an image directory: their names, the magic numbers in front, and what stands in them.
//!
//! All files but the raw ones look like this (numbers little-endian):
//!
//! ```text
//! u32  IMG_COMMON_MAGIC or IMG_SERVICE_MAGIC   (not in inventory.img, nor anywhere in version 1)
//! u32  the magic of the kind
//! then, until the end of the file:
//! u32  length of the message
//!      the message
//!      bytes that belong to the message, for some kinds
//! ```

use std::fmt;

/// In front of most files since version 2 of the format.
pub const IMG_COMMON_MAGIC: u32 = 0x5456_4319;

/// In front of files that say how a dump went, and are no part of it.
pub const IMG_SERVICE_MAGIC: u32 = 0x5510_5940;

/// The version of the format that we write: with the common magic in front. The one before, 1, is read as well.
pub const IMG_VERSION: u32 = 2;

/// What stands before the kind's own magic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// Nothing, in any version.
    Bare,
    /// [`IMG_COMMON_MAGIC`].
    Common,
    /// [`IMG_SERVICE_MAGIC`].
    Service,
    /// There is no magic at all: the content is not ours.
    Raw,
}

/// How the content of a file is made up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Exactly one message.
    One,
    /// Any number of messages.
    Many,
    /// Messages, each with bytes behind it whose number it tells.
    Payload,
    /// A `pagemap_head`, then any number of `pagemap_entry`.
    Pagemap,
    /// A `ghost_file_entry`, then the file, or `ghost_chunk_entry`s with a piece of the file behind each.
    Ghost,
    /// Bytes.
    Raw,
}

/// What in the file's name changes from file to file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Numbered {
    /// Nothing: there is one such file.
    No,
    /// A decimal number.
    Decimal,
    /// A hexadecimal number.
    Hex,
}

macro_rules! kinds {
    ($($kind:ident $prefix:literal $numbered:ident $suffix:literal $head:ident $magic:literal $content:ident $doc:literal)*) => {
        /// A kind of image file.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum ImageKind {
            $(#[doc = $doc] $kind,)*
        }

        impl ImageKind {
            /// Every kind there is.
            pub const ALL: &'static [ImageKind] = &[$(ImageKind::$kind,)*];

            const fn row(self) -> Row {
                match self {
                    $(ImageKind::$kind => Row {
                        prefix: $prefix,
                        numbered: Numbered::$numbered,
                        suffix: $suffix,
                        head: Head::$head,
                        magic: $magic,
                        content: Content::$content,
                    },)*
                }
            }
        }
    };
}

struct Row {
    prefix: &'static str,
    numbered: Numbered,
    suffix: &'static str,
    head: Head,
    magic: u32,
    content: Content,
}

kinds! {
    Inventory        "inventory"         No      ".img"    Bare    0x5831_3116 One     "What the dump is. Written last."
    Pstree           "pstree"            No      ".img"    Common  0x5027_3030 Many    "All processes, parents first."
    Core             "core-"             Decimal ".img"    Common  0x5505_3847 One     "A thread, by its tid."
    Ids              "ids-"              Decimal ".img"    Common  0x5443_2030 One     "What a process shares with others, by pid."
    Mm               "mm-"               Decimal ".img"    Common  0x5749_2820 One     "An address space, by pid."
    Pagemap          "pagemap-"          Decimal ".img"    Common  0x5608_4025 Pagemap "Where the pages of an address space are, by pid."
    PagemapShmem     "pagemap-shmem-"    Decimal ".img"    Common  0x5608_4025 Pagemap "The same for a shared memory object, by its id."
    Pages            "pages-"            Decimal ".img"    Raw     0           Raw     "The pages, by the number that the pagemap names."
    Fs               "fs-"               Decimal ".img"    Common  0x5140_3912 One     "Working directory, root, umask, by pid."
    Seccomp          "seccomp"           No      ".img"    Common  0x6441_3049 One     "All seccomp filters."
    Apparmor         "apparmor"          No      ".img"    Common  0x5942_3047 One     "AppArmor policies."
    Cgroup           "cgroup"            No      ".img"    Common  0x5938_3330 One     "Control groups and who is in which."
    Cpuinfo          "cpuinfo"           No      ".img"    Common  0x6140_4013 One     "The processor's features."
    Fdinfo           "fdinfo-"           Decimal ".img"    Common  0x5621_3732 Many    "A descriptor table, by its id."
    Files            "files"             No      ".img"    Common  0x5630_3138 Many    "All open file descriptions."
    RemapFpath       "remap-fpath"       No      ".img"    Common  0x5913_3954 Many    "What stands in for files without a name."
    GhostFile        "ghost-file-"       Hex     ".img"    Common  0x5258_3605 Ghost   "A file without a name, by the number in the remaps."
    MemfdInode       "memfd"             No      ".img"    Common  0x4845_3499 Many    "Memory files."
    FileLocks        "filelocks"         No      ".img"    Common  0x5432_3616 Many    "Locks on files."
    PipesData        "pipes-data"        No      ".img"    Common  0x5645_3709 Payload "What was in pipes."
    FifoData         "fifo-data"         No      ".img"    Common  0x5933_3054 Payload "What was in FIFOs."
    SkQueues         "sk-queues"         No      ".img"    Common  0x5626_4026 Payload "What was in sockets."
    UdpQueues        "udp-queues"        No      ".img"    Common  0x5544_5051 Payload "What was in UDP sockets. Ours."
    TcpClients       "tcp-clients"       No      ".img"    Common  0x5443_4c49 Payload "Clients of TCP servers that nobody has accepted. Ours."
    TcpStream        "tcp-stream-"       Hex     ".img"    Common  0x5146_5506 Payload "A TCP connection, by its socket's inode."
    TcpTls           "tcp-tls-"          Hex     ".img"    Common  0x5454_4c53 Payload "The same of one that the kernel encrypts. Ours: whoever takes it for the other would go on in plain text."
    TtyInfo          "tty-info"          No      ".img"    Common  0x5945_3036 Many    "Terminals."
    TtyData          "tty-data"          No      ".img"    Common  0x5941_3026 Many    "What was typed ahead."
    IpcVar           "ipcns-var-"        Decimal ".img"    Common  0x5311_5007 One     "Limits of an IPC namespace, by its id."
    IpcShm           "ipcns-shm-"        Decimal ".img"    Common  0x4628_3044 Payload "Its shared memory segments."
    IpcMsg           "ipcns-msg-"        Decimal ".img"    Common  0x5545_3737 Payload "Its message queues."
    IpcSem           "ipcns-sem-"        Decimal ".img"    Common  0x5957_3019 Payload "Its semaphores."
    Utsns            "utsns-"            Decimal ".img"    Common  0x5447_3203 One     "Names of a host, by the namespace's id."
    Timens           "timens-"           Decimal ".img"    Common  0x4311_4433 One     "How the clocks stood, by the namespace's id."
    Pidns            "pidns-"            Decimal ".img"    Common  0x6115_7326 One     "A pid namespace."
    Userns           "userns-"           Decimal ".img"    Common  0x5547_4906 One     "Id maps of a user namespace."
    Mountpoints      "mountpoints-"      Decimal ".img"    Common  0x5556_3928 Many    "Mounts of a mount namespace."
    Netns            "netns-"            Decimal ".img"    Common  0x5593_3752 One     "Settings of a network namespace."
    Netdev           "netdev-"           Decimal ".img"    Common  0x5737_3951 Many    "Its devices."
    BpfmapFile       "bpfmap-file"       No      ".img"    Common  0x5750_6142 Many    "eBPF maps, in dumps of old."
    BpfmapData       "bpfmap-data"       No      ".img"    Common  0x6432_4033 Payload "What was in eBPF maps."
    StatsDump        "stats-dump"        No      ""        Service 0x5709_3306 One     "How a dump went."
    StatsRestore     "stats-restore"     No      ""        Service 0x5709_3306 One     "How a restore went."
    IrmapCache       "irmap-cache"       No      ""        Service 0x5700_4059 Many    "Paths of inodes, kept between pre-dumps."
}

impl ImageKind {
    /// The file of this kind with the given number (which is left out of the name where the kind has only one file).
    pub const fn id(self, id: u64) -> ImageName {
        ImageName { kind: self, id }
    }

    /// The magic that is this kind's own; 0 where it has none.
    pub const fn magic(self) -> u32 {
        self.row().magic
    }

    /// What stands before the kind's own magic.
    pub const fn head(self) -> Head {
        self.row().head
    }

    /// How the content is made up.
    pub const fn content(self) -> Content {
        self.row().content
    }

    /// Whether there are several such files, told apart by a number.
    pub const fn numbered(self) -> Numbered {
        self.row().numbered
    }

    /// The bytes that a file of this kind starts with, in the version that we write.
    pub fn header(self) -> Vec<u8> {
        let Row { head, magic, .. } = self.row();
        let words: &[u32] = match head {
            Head::Raw => &[],
            Head::Bare => &[magic],
            Head::Common => &[IMG_COMMON_MAGIC, magic],
            Head::Service => &[IMG_SERVICE_MAGIC, magic],
        };
        words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }
}

/// A kind and the number of one file of this kind; as text, the file's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageName {
    /// The kind.
    pub kind: ImageKind,
    /// The number; not used where the kind has one file only.
    pub id: u64,
}

impl ImageName {
    /// What file of ours has this name, if any.
    pub fn parse(name: &str) -> Option<ImageName> {
        ImageKind::ALL.iter().find_map(|&kind| {
            let row = kind.row();
            let number = name.strip_prefix(row.prefix)?.strip_suffix(row.suffix)?;
            let id = match row.numbered {
                Numbered::No => number.is_empty().then_some(0)?,
                Numbered::Decimal => number.parse().ok()?,
                Numbered::Hex => u64::from_str_radix(number, 16).ok()?,
            };
            // "+5" and "007" are numbers to Rust, but no names that anybody writes.
            let found = kind.id(id);
            (found.to_string() == name).then_some(found)
        })
    }
}

impl From<ImageKind> for ImageName {
    fn from(kind: ImageKind) -> Self {
        kind.id(0)
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Row { prefix, numbered, suffix, .. } = self.kind.row();
        match numbered {
            Numbered::No => write!(f, "{prefix}{suffix}"),
            Numbered::Decimal => write!(f, "{prefix}{}{suffix}", self.id),
            Numbered::Hex => write!(f, "{prefix}{:x}{suffix}", self.id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for &kind in ImageKind::ALL {
            for id in [0, 1, 10, 4095, u64::MAX] {
                let name = kind.id(id);
                let back = ImageName::parse(&name.to_string());
                match kind.numbered() {
                    Numbered::No => assert_eq!(back, Some(kind.into())),
                    _ => assert_eq!(back, Some(name)),
                }
            }
        }
        assert_eq!(ImageKind::GhostFile.id(255).to_string(), "ghost-file-ff.img");
        assert_eq!(ImageKind::PagemapShmem.id(7).to_string(), "pagemap-shmem-7.img");
        for wrong in ["", "core-.img", "core-+1.img", "core-01.img", "core-1", "parent", "pagemap-shmem-.img"] {
            assert_eq!(ImageName::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn headers_are_as_long_as_their_heads_say() {
        assert_eq!(ImageKind::Inventory.header(), 0x5831_3116_u32.to_le_bytes());
        assert!(ImageKind::Pages.header().is_empty());
        assert_eq!(ImageKind::Core.header(), [0x19, 0x43, 0x56, 0x54, 0x47, 0x38, 0x05, 0x55]);
        assert_eq!(ImageKind::StatsDump.header()[..4], [0x40, 0x59, 0x10, 0x55]);
    }
}
