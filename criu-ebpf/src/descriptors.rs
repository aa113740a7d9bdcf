//! From a descriptor's file to the socket that it is.

use crate::access::{get, off};

/// S_IFMT and S_IFSOCK.
const TYPE: u16 = 0o170_000;
const SOCKET: u16 = 0o140_000;

/// The number of the inode and the `struct sock` of a file that is a socket. Other files may have the same numbers.
///
/// # Safety
/// None of its own: the helpers check the addresses.
#[inline(always)]
pub(crate) unsafe fn socket_of(file: u64) -> Option<(u64, u64)> {
    // SAFETY: as said above.
    unsafe {
        if file == 0 {
            return None;
        }
        let inode: u64 = get(file, off!(file_inode));
        if get::<u16>(inode, off!(inode_mode)) & TYPE != SOCKET {
            return None;
        }
        Some((get(inode, off!(inode_ino)), get(get(file, off!(file_private_data)), off!(socket_sk))))
    }
}
