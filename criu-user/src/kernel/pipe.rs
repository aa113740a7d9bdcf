//! Pipes, buffer by buffer: what is in them is looked at without being taken, and put back as it lay there.
//!
//! A pipe is a ring of buffers, each at most a page as a rule. How many are taken, and not how many bytes there are,
//! decides whether it is full; and a buffer written in packet mode (O_DIRECT) is read by itself. tee(2) gives a second
//! reference to all buffers; splice(2) moves whole buffers between pipes with all their properties.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, SpliceFFlags, splice, tee};
use nix::unistd::pipe2;

use super::error::During;
use super::survey::PAGE;
use super::{SysResult, fd, sys};

/// So many bytes at most are moved by one call; more than any pipe holds.
const ALL: usize = 1 << 30;

/// What was written at once, or as much of it as lies in one buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Whether it is read by itself: it was written in packet mode.
    pub packet: bool,
}

fn pair(flags: OFlag, bytes: i32) -> SysResult<(std::fs::File, std::fs::File)> {
    let (read, write) = pipe2(flags | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).during("pipe2", "a pipe to look into")?;
    if bytes > 0 {
        fd::set_pipe_size(&write, bytes)?;
    }
    Ok((read.into(), write.into()))
}

/// What is in the pipe behind a read end. Nothing is taken out of it.
pub fn content(read_end: impl AsFd) -> SysResult<Vec<Piece>> {
    let mut pieces = Vec::new();
    if sys::readable_bytes(read_end.as_fd())? == 0 {
        return Ok(pieces);
    }
    let page = PAGE as i32;
    let (copy_out, copy_in) = pair(OFlag::empty(), fd::pipe_size(&read_end)?)?;
    tee(read_end.as_fd(), &copy_in, ALL, SpliceFFlags::SPLICE_F_NONBLOCK).during("tee", "a pipe's content")?;
    // A pipe of one buffer takes exactly one at a time.
    let (one_out, one_in) = pair(OFlag::empty(), page)?;
    let (mut two_out, mut two_in) = pair(OFlag::empty(), 2 * page)?;
    while move_buffers(&copy_out, &one_in)? {
        let len = sys::readable_bytes(one_out.as_fd())? as usize;
        move_buffers(&one_out, &two_in)?;
        // What comes behind a packet is not read together with it.
        two_in.write_all(b"|").during("write", "a pipe to look into")?;
        let mut bytes = vec![0; len + 1];
        let read = two_out.read(&mut bytes).during("read", "a pipe's content")?;
        let packet = read == len;
        if packet {
            two_out.read_exact(&mut bytes[len..]).during("read", "a pipe's content")?;
        }
        bytes.truncate(len);
        pieces.push(Piece { bytes, packet });
    }
    Ok(pieces)
}

/// Puts content into a pipe, every piece into a buffer of its own as it was.
pub fn fill(write_end: impl AsFd, pieces: &[Piece]) -> SysResult<()> {
    let write_end = write_end.as_fd();
    let mut ways = None;
    for (n, piece) in pieces.iter().enumerate() {
        // What is written goes into the last buffer if there is room in it, unless that is a packet.
        if !piece.packet && pieces[..n].last().is_none_or(|before| before.packet) {
            write_all(write_end, &piece.bytes)?;
            continue;
        }
        let (plain, packets) = match &ways {
            Some(ways) => ways,
            None => ways.insert((pair(OFlag::empty(), 0)?, pair(OFlag::O_DIRECT, 0)?)),
        };
        let (out, way_in) = if piece.packet { packets } else { plain };
        // More than a way in holds may come from images without pieces.
        for part in piece.bytes.chunks(PAGE as usize) {
            let mut way_in = way_in;
            way_in.write_all(part).during("write", "a pipe's content")?;
            if !move_buffers(out, write_end)? {
                return Err(super::SysError::new("splice", "a pipe's content", Errno::ENOSPC));
            }
        }
    }
    Ok(())
}

fn write_all(write_end: BorrowedFd<'_>, mut bytes: &[u8]) -> SysResult<()> {
    while !bytes.is_empty() {
        match nix::unistd::write(write_end, bytes) {
            Ok(0) | Err(Errno::EAGAIN) => {
                return Err(super::SysError::new("write", "a pipe's content", Errno::ENOSPC));
            }
            Ok(written) => bytes = &bytes[written..],
            Err(errno) => return Err(super::SysError::new("write", "a pipe's content", errno)),
        }
    }
    Ok(())
}

/// Moves as many buffers as fit, and says whether any did.
fn move_buffers(from: impl AsFd, to: impl AsFd) -> SysResult<bool> {
    match splice(from, None, to, None, ALL, SpliceFFlags::SPLICE_F_NONBLOCK) {
        Ok(n) => Ok(n > 0),
        Err(Errno::EAGAIN) => Ok(false),
        Err(e) => Err(super::SysError::new("splice", "a pipe's content", e)),
    }
}

/// Makes a pipe of a capacity in bytes with this content: its ends for reading and writing, neither of which waits.
pub fn make(capacity: Option<u32>, pieces: &[Piece]) -> SysResult<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).during("pipe2", "a pipe to restore")?;
    prepare(&write, capacity, pieces)?;
    Ok((read, write))
}

/// Gives a pipe its capacity and content. It is made larger if its pieces would not fit.
pub fn prepare(write_end: impl AsFd, capacity: Option<u32>, pieces: &[Piece]) -> SysResult<()> {
    let buffers: u64 = pieces.iter().map(|p| (p.bytes.len() as u64).div_ceil(PAGE)).sum();
    let now = fd::pipe_size(&write_end)?;
    let wanted = u64::from(capacity.unwrap_or(now as u32)).max(buffers * PAGE).min(i32::MAX as u64) as i32;
    if wanted != now {
        fd::set_pipe_size(&write_end, wanted)?;
    }
    fill(write_end, pieces)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_seen_and_put_back_as_it_lay_there() {
        let (read, mut write) = pair(OFlag::empty(), 0).expect("pipe");
        fd::set_flags(&write, libc::O_DIRECT | libc::O_NONBLOCK).expect("packet mode");
        write.write_all(b"a").expect("write");
        write.write_all(b"packet").expect("write");
        fd::set_flags(&write, libc::O_NONBLOCK).expect("no packet mode");
        write.write_all(&[1; 3000]).expect("write");
        write.write_all(&[2; 3000]).expect("write");
        let seen = content(&read).expect("content");
        let shape: Vec<(usize, bool)> = seen.iter().map(|p| (p.bytes.len(), p.packet)).collect();
        assert_eq!(shape, [(1, true), (6, true), (3000, false), (3000, false)]);
        assert_eq!(sys::readable_bytes(read.as_fd()).expect("FIONREAD"), 6007);

        let (again, _) = make(Some(8 << 12), &seen).expect("a pipe");
        assert_eq!(fd::pipe_size(&again).expect("size"), 8 << 12);
        assert_eq!(content(&again).expect("content"), seen);
    }

    #[test]
    fn pieces_stay_apart_however_they_follow_each_other() {
        let piece = |len: usize, packet| Piece { bytes: (0..len).map(|n| n as u8).collect(), packet };
        let all =
            [piece(3, false), piece(5, false), piece(7, true), piece(11, false), piece(13, false), piece(17, true)];
        for from in 0..all.len() {
            let (read, _) = make(None, &all[from..]).expect("a pipe");
            assert_eq!(content(&read).expect("content"), all[from..]);
        }
    }

    #[test]
    fn content_without_pieces_may_be_long() {
        let whole = Piece { bytes: (0..40_000).map(|n| n as u8).collect(), packet: false };
        let (read, _) = make(None, std::slice::from_ref(&whole)).expect("a pipe");
        let bytes: Vec<u8> = content(&read).expect("content").into_iter().flat_map(|piece| piece.bytes).collect();
        assert!(bytes == whole.bytes);
    }
}
