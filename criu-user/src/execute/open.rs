//! Opening the files of a plan, one after the other; many that need no other are opened by several threads.

use std::os::fd::{AsRawFd, OwnedFd};

use tracing::debug;

use super::ExecuteError;
use crate::kernel::SysResult;
use crate::kernel::fd::{close_all, duplicate_above, make_room, take_below};
use crate::observer::Observer;
use crate::parallel;
use crate::plan::{Apart, Opened, Opener, Plan};

/// Fewer are not worth a thread: it takes as long to start one as to make five sockets.
const MANY: usize = 64;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Opens all files, at numbers above those that the tree uses.
///
/// `images`: the lowest number for those that tasks only fill their memory from, where they are apart.
pub fn open_all(plan: &Plan, images: Option<i32>, observer: &dyn Observer) -> Result<Opened, ExecuteError> {
    let mut opened = Opened::default();
    let mut rest = plan.opens.as_slice();
    while let Some((opener, others)) = rest.split_first() {
        let many: Vec<&dyn Apart> = rest.iter().map_while(|opener| opener.apart()).collect();
        if many.len() < MANY {
            debug!("{}", opener.describe());
            let file = opener.open(&opened).map_err(|source| failed(opener.as_ref(), source))?;
            let lowest = images.filter(|_| opener.only_fills()).unwrap_or(plan.first_free_fd);
            opened.push(duplicate_above(&file, lowest)?);
            observer.moved(opener.memory());
            rest = others;
            continue;
        }
        for (file, opener) in beside_each_other(&many, opened.len(), plan.first_free_fd)?.into_iter().zip(rest) {
            opened.push(file.map_err(|source| failed(opener.as_ref(), source))?);
        }
        rest = &rest[many.len()..];
    }
    Ok(opened)
}

fn failed(opener: &dyn Opener, source: Failure) -> ExecuteError {
    ExecuteError::Open { what: opener.describe(), source }
}

fn beside_each_other(many: &[&dyn Apart], opened: usize, lowest: i32) -> SysResult<Vec<Result<OwnedFd, Failure>>> {
    let open = |opener: &&dyn Apart| {
        let file = opener.open()?;
        if file.as_raw_fd() >= lowest { Ok(file) } else { Ok(duplicate_above(&file, lowest)?) }
    };
    make_room(lowest + opened as i32 + many.len() as i32);
    // Where all numbers below are taken, no file need be moved.
    let taken = if lowest as usize <= many.len() * 2 { take_below(lowest)? } else { Vec::new() };
    let files = parallel::map(many, open);
    close_all(taken);
    Ok(files)
}
