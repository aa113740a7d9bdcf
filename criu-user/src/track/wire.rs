//! The control socket of a session: where it is, and what a message looks like.
//!
//! A stream of messages (proto/session.proto), each behind its length in four bytes, big-endian. The socket is 0600 in a
//! directory that is 0700, and the session looks at who is there besides.

use std::path::PathBuf;

use nix::unistd::Pid;

pub use crate::image::proto::session::{
    Begun, Confirmed, Empty, Reply, Request, Told, Tracked, reply::Answer, request::Ask,
};
use crate::kernel::kept;

/// Longest message: the written pages of a few terabytes.
pub const LONGEST: usize = 256 << 20;

/// The socket of the session that tracks the tree below `root`.
pub fn socket_path(root: Pid) -> PathBuf {
    PathBuf::from(kept::DIR).join(format!("{PREFIX}{root}{SUFFIX}"))
}

const PREFIX: &str = "session-";
const SUFFIX: &str = ".sock";

/// The roots of all trees for which there is a socket, dead ones of killed sessions included.
pub fn roots() -> Vec<Pid> {
    let entries = std::fs::read_dir(kept::DIR).into_iter().flatten().flatten();
    let mut roots: Vec<Pid> = entries
        .filter_map(|entry| {
            let name = entry.file_name();
            name.to_str()?.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?.parse().ok().map(Pid::from_raw)
        })
        .collect();
    roots.sort_unstable();
    roots
}
