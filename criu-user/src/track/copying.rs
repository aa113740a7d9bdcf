//! How fast this machine copies pages into files, which is most of what a dump of much memory takes. It is measured once
//! after each boot: the first dump of a tree is foretold when no other has told yet.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::time::Instant;

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::kernel::kept;
use crate::kernel::survey::PAGE;

/// More than what processors have of caches of their own.
const SIZE: usize = 16 << 20;
const PIECE: usize = 1 << 20;
/// The best of so many attempts counts: others had the processor in between.
const ATTEMPTS: usize = 3;

/// Microseconds for a page, as it was measured since the machine booted, or is now; `None` where it cannot be.
pub fn cost() -> Option<f64> {
    let name = kept::name("copying", [])?;
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

/// Writes memory into a file in memory that has its pages already, as it is done in a freeze.
fn measure() -> std::io::Result<f64> {
    let content: Vec<u8> = (0..SIZE).map(|at| (at / 512) as u8).collect();
    let mut file = File::from(memfd_create("criu-ebpf-copying", MFdFlags::MFD_CLOEXEC)?);
    let mut best = f64::INFINITY;
    for attempt in 0..=ATTEMPTS {
        file.seek(SeekFrom::Start(0))?;
        let begin = Instant::now();
        content.chunks(PIECE).try_for_each(|piece| file.write_all(piece))?;
        // The first has found the pages.
        if attempt > 0 {
            best = best.min(begin.elapsed().as_secs_f64());
        }
    }
    Ok(best * 1e6 / (SIZE as u64 / PAGE) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_one() {
        let cost = measure().expect("a file in memory");
        assert!(is_sane(cost), "{cost} µs for a page");
        assert!(!is_sane(0.0) && !is_sane(f64::NAN));
    }
}
