//! Filling the memory of other processes from files, by several threads.
//!
//! Where nothing exists yet, pages can be *placed*: UFFDIO_COPY makes a page with its content in one step, where a write
//! would have the kernel make a page of zeros in a fault, and only then copy. That costs two thirds of it. It takes a
//! userfaultfd of the process that is filled ([`Ground`]). Everywhere else pages are written: process_vm_writev(2).
//!
//! What is placed is copied from a mapping of the file, what is written goes by a buffer that stays in the processor's
//! cache.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, pread, process_vm_writev};
use nix::unistd::Pid;

use super::error::During;
use super::map::SourceMap;
use super::uffd::{API, UFFDIO_API, UFFDIO_REGISTER};
use super::{SysError, SysResult};
use crate::parallel::processors;

/// UFFDIO_COPY: `_IOWR(0xaa, …)` with 40 bytes.
const COPY: u64 = 0xc028_aa03;
/// UFFDIO_UNREGISTER: `_IOR(0xaa, …)` with 16 bytes.
const UNREGISTER: u64 = 0x8010_aa01;
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

    /// Gives a part of it up before the end. That takes as long as there are areas in it.
    pub fn leave(&self, start: u64, end: u64) -> SysResult<()> {
        let what = || format!("{start:#x}-{end:#x}");
        self.ioctl(UNREGISTER, &mut [start, end - start]).during("ioctl(UFFDIO_UNREGISTER)", what())
    }

    fn ioctl<const N: usize>(&self, request: u64, words: &mut [u64; N]) -> Result<(), Errno> {
        // SAFETY: the words live for the call and are as many as the request says. UFFDIO_COPY only reads our memory, and
        // fails where there is none.
        Errno::result(unsafe { libc::ioctl(self.userfault.as_raw_fd(), request as _, words.as_mut_ptr()) }).map(|_| ())
    }

    /// Makes the pages at `address`, with what stands in our memory at `source`.
    fn place(&self, address: u64, source: u64, len: u64) -> SysResult<()> {
        let mut done = 0;
        while done < len {
            let mut copy = [address + done, source + done, len - done, DONTWAKE, 0];
            let outcome = self.ioctl(COPY, &mut copy);
            match (outcome, copy[4] as i64) {
                (Ok(()), _) => return Ok(()),
                // Interrupted on the way, as by a change of areas.
                (Err(Errno::EAGAIN), copied) if copied > 0 => done += copied as u64,
                (Err(Errno::EAGAIN), _) => {}
                (Err(errno), _) => {
                    return Err(SysError::new("ioctl(UFFDIO_COPY)", format!("{len} bytes at {address:#x}"), errno));
                }
            }
        }
        Ok(())
    }
}

/// A file with the content of pages.
#[derive(Debug)]
pub struct Source<'a> {
    file: &'a OwnedFd,
    /// Where it can be mapped: what is placed needs not be read before it is copied.
    map: Option<SourceMap>,
}

impl<'a> Source<'a> {
    /// A file of which these pieces will be placed, each once; others may be written.
    pub fn new(file: &'a OwnedFd, placed: impl Iterator<Item = Piece> + Clone) -> Self {
        // Where there is nothing to be placed, there is nothing to map either, which is an error of mmap(2).
        Self { file, map: SourceMap::new(file, placed.map(|(_, len, offset)| (offset, len))).ok() }
    }

    fn read(&self, bytes: &mut [u8], offset: u64) -> SysResult<()> {
        let needed = bytes.len();
        let what = || format!("{needed} bytes of pages at {offset}");
        let read = pread(self.file.as_fd(), bytes, offset as i64).during("pread", what())?;
        if read == needed { Ok(()) } else { Err(SysError::new("pread", what(), Errno::EIO)) }
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
    pub source: &'a Source<'a>,
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
    let threads = processors().min(steps.len());
    let next = AtomicUsize::new(0);
    let work = || -> SysResult<()> {
        let mut buffer = Vec::new();
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

/// The same in this thread alone.
pub fn fill_alone(jobs: &[Job<'_>], moved: impl Fn(u64)) -> SysResult<()> {
    let mut buffer = Vec::new();
    jobs.iter().flat_map(steps).try_for_each(|step| {
        step.run(&mut buffer)?;
        moved(step.total as u64);
        Ok(())
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
    /// `buffer`: kept from step to step.
    fn run(&self, buffer: &mut Vec<u8>) -> SysResult<()> {
        let (source, total) = (self.job.source, self.total);
        if let (Some(ground), Some(map)) = (self.job.ground, &source.map) {
            let short = || SysError::new("mmap", format!("{total} bytes of pages at {}", self.offset), Errno::EIO);
            self.place(ground, map.part(self.offset, total as u64).ok_or_else(short)?)?;
            map.done_with(self.offset, total as u64);
            return Ok(());
        }
        buffer.resize(BUFFER, 0);
        let bytes = &mut buffer[..total];
        source.read(bytes, self.offset)?;
        match self.job.ground {
            Some(ground) => self.place(ground, bytes.as_ptr().expose_provenance() as u64),
            None => self.write(bytes),
        }
    }

    /// Makes its pages of what stands in our memory at `from`.
    fn place(&self, ground: &Ground, from: u64) -> SysResult<()> {
        let mut done = 0;
        self.targets.iter().try_for_each(|&(address, len)| {
            ground.place(address, from + done, len as u64)?;
            done += len as u64;
            Ok(())
        })
    }

    fn write(&self, bytes: &[u8]) -> SysResult<()> {
        let pid = self.job.pid;
        let what = || format!("pid {pid}, {} bytes of pages at {}", bytes.len(), self.offset);
        let remote: Vec<_> = self.targets.iter().map(|&(base, len)| RemoteIoVec { base: base as usize, len }).collect();
        let written = process_vm_writev(pid, &[IoSlice::new(bytes)], &remote).during("process_vm_writev", what())?;
        if written == bytes.len() { Ok(()) } else { Err(SysError::new("process_vm_writev", what(), Errno::EIO)) }
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
        let source = Source::new(&file, std::iter::empty());
        let job = Job { pid: Pid::this(), ground: None, source: &source, pieces: &pieces };
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
        let source = Source::new(&file, std::iter::empty());
        let job = Job { pid: Pid::this(), ground: None, source: &source, pieces: &pieces };
        fill(&[job], |bytes| {
            told.fetch_add(bytes as usize, Ordering::Relaxed);
        })
        .expect("written");
        let (a, b) = content.split_at(half as usize);
        assert!(std::hint::black_box(&target)[..] == [b, a].concat()[..]);
        assert_eq!(told.into_inner(), content.len());
    }
}
