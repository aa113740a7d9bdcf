//! How fast this machine copies pages into files, which is most of what a dump of much memory takes. It is measured once
//! after each boot: the first dump of a tree is foretold when no other has told yet.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::time::Instant;

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::kernel::kept;
use crate::kernel::survey::PAGE;

/// So much that neither the pages that are read nor those that are written are in a cache, whatever the processor has.
const SIZE: usize = 64 << 20;
const PIECE: usize = 1 << 20;
/// The best of so many attempts counts: others had the processor in between, or the memory was slow to come by.
const ATTEMPTS: usize = 3;
/// A directory on a disk, as those for images mostly are.
const PLACE: &str = "/var/tmp";

/// Microseconds for a page, as it was measured since the machine booted, or is now; `None` where it cannot be.
pub fn cost() -> Option<f64> {
    let name = kept::name("copying-cold", [])?;
    if let Some(known) = kept::read(&name).and_then(|text| text.trim().parse().ok()).filter(|cost| is_sane(*cost)) {
        return Some(known);
    }
    let cost = measure().ok().filter(|cost| is_sane(*cost))?;
    if let Err(err) = kept::write(&name, &format!("{cost:.4}\n")) {
        tracing::debug!(%err, "the next session will measure again how fast pages are copied");
    }
    Some(cost)
}

/// Whether a machine may be so fast or slow.
fn is_sane(cost: f64) -> bool {
    (0.01..100.0).contains(&cost)
}

/// Writes memory into a file that has no pages yet, as it is done in a freeze. It has no name, and is gone before it gets to
/// the disk.
fn measure() -> std::io::Result<f64> {
    let mut content = vec![0; SIZE];
    content.iter_mut().step_by(512).enumerate().for_each(|(at, byte)| *byte = at as u8);
    let in_memory = || memfd_create("criu-ebpf-copying", MFdFlags::MFD_CLOEXEC).map(File::from);
    let mut file = tempfile::tempfile_in(PLACE).or_else(|_| in_memory())?;
    let mut best = f64::INFINITY;
    for _ in 0..ATTEMPTS {
        file.set_len(0)?;
        file.seek(SeekFrom::Start(0))?;
        let begin = Instant::now();
        content.chunks(PIECE).try_for_each(|piece| file.write_all(piece))?;
        best = best.min(begin.elapsed().as_secs_f64());
    }
    Ok(best * 1e6 / (SIZE as u64 / PAGE) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_one() {
        let cost = measure().expect("a file");
        assert!(is_sane(cost), "{cost} µs for a page");
        assert!(!is_sane(0.0) && !is_sane(f64::NAN));
    }
}
