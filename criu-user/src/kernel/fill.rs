//! Filling the memory of other processes from files, by several threads.
//!
//! Where nothing exists yet, pages can be *placed*: UFFDIO_COPY makes a page with its content in one step, where a write
//! would have the kernel make a page of zeros in a fault, and only then copy. That costs two thirds of it. It takes a
//! userfaultfd of the process that is filled ([`Ground`]). Everywhere else pages are written: process_vm_writev(2).
//!
//! Both go by a buffer that stays in the processor's cache.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, pread, process_vm_writev};
use nix::unistd::Pid;

use super::error::During;
use super::uffd::{API, UFFDIO_API, UFFDIO_REGISTER};
use super::{SysError, SysResult};

/// UFFDIO_COPY: `_IOWR(0xaa, …)` with 40 bytes.
const COPY: u64 = 0xc028_aa03;
const MODE_MISSING: u64 = 1;
/// Nobody waits for the page.
const DONTWAKE: u64 = 1;

/// Bytes that are read at once.
const BUFFER: usize = 256 << 10;
/// Pieces written by one call: IOV_MAX.
const VECTOR: usize = 1024;

/// A piece of memory: address, length, offset in the file that has its content.
pub type Piece = (u64, u64, u64);

/// Memory of a process in which no page exists.
#[derive(Debug)]
pub struct Ground {
    userfault: OwnedFd,
}

impl Ground {
    /// Takes a fresh userfaultfd of the process into use for these ranges of anonymous memory. As long as it is open
    /// nothing but [`fill`] may touch them. userfaultfd(2), ioctl_userfaultfd(2).
    pub fn new(userfault: OwnedFd, ranges: &[(u64, u64)]) -> SysResult<Self> {
        let ground = Self { userfault };
        ground.ioctl(UFFDIO_API, &mut [API, 0, 0]).during("ioctl(UFFDIO_API)", "")?;
        for &(start, end) in ranges {
            ground
                .ioctl(UFFDIO_REGISTER, &mut [start, end - start, MODE_MISSING, 0])
                .during("ioctl(UFFDIO_REGISTER)", format!("{start:#x}-{end:#x}"))?;
        }
        Ok(ground)
    }

    fn ioctl<const N: usize>(&self, request: u64, words: &mut [u64; N]) -> Result<(), Errno> {
        // SAFETY: the words live for the call and are as many as the request says; what UFFDIO_COPY reads from is
        // alive, as `place` sees to.
        Errno::result(unsafe { libc::ioctl(self.userfault.as_raw_fd(), request as _, words.as_mut_ptr()) }).map(|_| ())
    }

    /// Makes the pages at `address` with this content.
    fn place(&self, address: u64, content: &[u8]) -> SysResult<()> {
        let mut done = 0;
        while done < content.len() as u64 {
            let source = content.as_ptr().expose_provenance() as u64 + done;
            let mut copy = [address + done, source, content.len() as u64 - done, DONTWAKE, 0];
            let outcome = self.ioctl(COPY, &mut copy);
            match (outcome, copy[4] as i64) {
                (Ok(()), _) => return Ok(()),
                // Interrupted on the way, as by a change of areas.
                (Err(Errno::EAGAIN), copied) if copied > 0 => done += copied as u64,
                (Err(Errno::EAGAIN), _) => {}
                (Err(errno), _) => {
                    let what = format!("{} bytes at {address:#x}", content.len());
                    return Err(SysError::new("ioctl(UFFDIO_COPY)", what, errno));
                }
            }
        }
        Ok(())
    }
}

/// Whether the first touch of anonymous memory makes a huge page though nobody has asked for it. Pages that are placed
/// are small ones.
pub fn huge_by_default() -> bool {
    const SIZES: &str = "/sys/kernel/mm/transparent_hugepage";
    let always = |path: &std::path::Path| std::fs::read_to_string(path).is_ok_and(|text| text.contains("[always]"));
    let sizes = std::fs::read_dir(SIZES).into_iter().flatten().flatten();
    always(&std::path::Path::new(SIZES).join("enabled"))
        || sizes.map(|size| size.path().join("enabled")).any(|p| always(&p))
}

/// Pieces of one process to be filled from one file.
#[derive(Debug, Clone, Copy)]
pub struct Job<'a> {
    /// Whose memory.
    pub pid: Pid,
    /// Where pages are placed; else they are written.
    pub ground: Option<&'a Ground>,
    /// Where the content is.
    pub file: &'a OwnedFd,
    /// What goes where.
    pub pieces: &'a [Piece],
}

/// Pieces that fit into the buffer and lie one after the other in the file.
struct Step<'a> {
    job: &'a Job<'a>,
    offset: u64,
    total: usize,
    /// Address and length.
    targets: Vec<(u64, usize)>,
}

/// Does all of it, with a thread for each processor. `moved` is told the bytes of each step.
pub fn fill(jobs: &[Job<'_>], moved: impl Fn(u64) + Sync) -> SysResult<()> {
    let steps: Vec<Step<'_>> = jobs.iter().flat_map(steps).collect();
    if steps.is_empty() {
        return Ok(());
    }
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(steps.len());
    let next = AtomicUsize::new(0);
    let work = || -> SysResult<()> {
        let mut buffer = vec![0; BUFFER];
        while let Some(step) = steps.get(next.fetch_add(1, Ordering::Relaxed)) {
            step.run(&mut buffer).inspect_err(|_| next.store(steps.len(), Ordering::Relaxed))?;
            moved(step.total as u64);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let own = work();
        others.into_iter().fold(own, |outcome, thread| {
            outcome.and(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })
    })
}

fn steps<'a>(job: &'a Job<'a>) -> Vec<Step<'a>> {
    let mut out: Vec<Step<'a>> = Vec::new();
    for &(address, len, offset) in job.pieces {
        let mut done = 0;
        while done < len {
            let (at, from) = (address + done, offset + done);
            match out.last_mut() {
                Some(last)
                    if last.total < BUFFER
                        && last.targets.len() < VECTOR
                        && last.offset + last.total as u64 == from =>
                {
                    let part = (len - done).min((BUFFER - last.total) as u64);
                    last.targets.push((at, part as usize));
                    last.total += part as usize;
                    done += part;
                }
                _ => out.push(Step { job, offset: from, total: 0, targets: Vec::new() }),
            }
        }
    }
    out
}

impl Step<'_> {
    fn run(&self, buffer: &mut [u8]) -> SysResult<()> {
        let (pid, total) = (self.job.pid, self.total);
        let bytes = &mut buffer[..total];
        let what = || format!("pid {pid}, {total} bytes of pages at {}", self.offset);
        let read = pread(self.job.file.as_fd(), bytes, self.offset as i64).during("pread", what())?;
        if read != total {
            return Err(SysError::new("pread", what(), Errno::EIO));
        }
        if let Some(ground) = self.job.ground {
            let mut rest = &*bytes;
            for &(address, len) in &self.targets {
                let (content, others) = rest.split_at(len);
                ground.place(address, content)?;
                rest = others;
            }
            return Ok(());
        }
        let remote: Vec<_> = self.targets.iter().map(|&(base, len)| RemoteIoVec { base: base as usize, len }).collect();
        let written = process_vm_writev(pid, &[IoSlice::new(bytes)], &remote).during("process_vm_writev", what())?;
        if written == total { Ok(()) } else { Err(SysError::new("process_vm_writev", what(), Errno::EIO)) }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;

    use super::*;

    #[test]
    fn steps_cut_and_join_pieces_without_losing_a_byte() {
        let file: OwnedFd = File::open("/dev/null").expect("/dev/null").into();
        let pieces: Vec<Piece> = vec![
            (0x1000, 0x1000, 0),
            (0x9000, 0x2000, 0x1000),
            (0x10_0000, (BUFFER as u64) * 2, 0x3000),
            (0x5000, 0x1000, 0x100_0000),
        ];
        let job = Job { pid: Pid::this(), ground: None, file: &file, pieces: &pieces };
        let steps = steps(&job);
        let mut flat: Vec<(u64, u64, u64)> = Vec::new();
        for step in &steps {
            assert!(step.total <= BUFFER && step.targets.len() <= VECTOR);
            assert_eq!(step.total, step.targets.iter().map(|t| t.1).sum::<usize>());
            let mut offset = step.offset;
            for &(at, len) in &step.targets {
                match flat.last_mut() {
                    Some(last) if last.0 + last.1 == at && last.2 + last.1 == offset => last.1 += len as u64,
                    _ => flat.push((at, len as u64, offset)),
                }
                offset += len as u64;
            }
        }
        assert_eq!(flat, pieces);
        assert_eq!(steps.len(), 4, "the first two pieces and a part of the third; the middle; its end; the last");
    }

    #[test]
    fn own_memory_is_written() {
        let mut file = tempfile::tempfile().expect("a file");
        let content: Vec<u8> = (0..2 * BUFFER + 8192).map(|i| (i / 4096 + i) as u8).collect();
        file.write_all(&content).expect("content");
        let mut target = vec![0u8; content.len()];
        let at = target.as_mut_ptr().expose_provenance() as u64;
        let (half, len) = (content.len() as u64 / 2, content.len() as u64);
        let pieces = [(at, half, half), (at + half, len - half, 0)];
        let file = OwnedFd::from(file);
        let told = AtomicUsize::new(0);
        let job = Job { pid: Pid::this(), ground: None, file: &file, pieces: &pieces };
        fill(&[job], |bytes| {
            told.fetch_add(bytes as usize, Ordering::Relaxed);
        })
        .expect("written");
        let (a, b) = content.split_at(half as usize);
        assert!(std::hint::black_box(&target)[..] == [b, a].concat()[..]);
        assert_eq!(told.into_inner(), content.len());
    }
}
