//! What dumps, pre-dumps and restores came to, as the metrics have it: times and numbers, or one of a few reasons.

use nix::errno::Errno;

use crate::dump::{self, DumpError};
use crate::execute::ExecuteError;
use crate::image::ImageError;
use crate::kernel::SysError;
use crate::kernel::survey::PAGE;
use crate::kernel::survey_cache::CacheUse;
use crate::lineage::LineageError;
use crate::metrics::{Operation, Pages, Phase, Reason, Run};
use crate::object::ObjectError;
use crate::predump::{PreDumpError, PreDumpSummary};
use crate::restore::{self, RestoreError};

/// Of a dump.
pub fn of_dump(result: &Result<dump::Summary, DumpError>) -> Run {
    let operation = Operation::Dump;
    match result {
        Ok(summary) => Run {
            operation,
            failure: None,
            phases: vec![
                (Phase::Freezing, summary.freezing),
                (Phase::Frozen, summary.frozen),
                (Phase::Writing, summary.writing),
                (Phase::Total, summary.total),
            ],
            pages: Pages {
                written: summary.pages_written + summary.pages_ahead,
                in_parent: summary.pages_in_parent.saturating_sub(summary.pages_ahead),
                skipped: 0,
            },
            maps: summary.maps_read_ahead,
            connections: summary.connections_asked_ahead,
            bytes: summary.bytes_written + summary.pages_ahead * PAGE,
        },
        Err(err) => Run::failed(operation, dump_reason(err)),
    }
}

/// Of a pre-dump.
pub fn of_pre_dump(result: &Result<PreDumpSummary, PreDumpError>) -> Run {
    let operation = Operation::PreDump;
    match result {
        Ok(summary) => Run {
            operation,
            failure: None,
            phases: vec![(Phase::Frozen, summary.frozen), (Phase::Total, summary.total)],
            pages: Pages {
                written: summary.pages_written,
                in_parent: summary.pages_in_parent,
                skipped: summary.pages_skipped,
            },
            maps: CacheUse::default(),
            connections: CacheUse::default(),
            bytes: summary.bytes_written,
        },
        Err(err) => Run::failed(operation, pre_dump_reason(err)),
    }
}

/// Of a restore.
pub fn of_restore(result: &Result<restore::Summary, RestoreError>) -> Run {
    let operation = Operation::Restore;
    match result {
        Ok(summary) => Run {
            operation,
            failure: None,
            phases: vec![
                (Phase::Planning, summary.planning),
                (Phase::Executing, summary.total.saturating_sub(summary.planning)),
                (Phase::Total, summary.total),
            ],
            pages: Pages::default(),
            maps: CacheUse::default(),
            connections: CacheUse::default(),
            bytes: summary.bytes_filled,
        },
        Err(err) => Run::failed(operation, restore_reason(err)),
    }
}

/// Whether a file system had no room. Errors here are transparent: those inside are not found by their `source`.
fn is_full(errno: Errno) -> bool {
    matches!(errno, Errno::ENOSPC | Errno::EDQUOT)
}

fn sys_reason(err: &SysError, otherwise: Reason) -> Reason {
    if is_full(err.errno) { Reason::NoSpace } else { otherwise }
}

fn image_reason(err: &ImageError) -> Reason {
    match err {
        ImageError::Dir { source, .. } | ImageError::File { source, .. }
            if source.raw_os_error().map(Errno::from_raw).is_some_and(is_full) =>
        {
            Reason::NoSpace
        }
        _ => Reason::Image,
    }
}

fn dump_reason(err: &DumpError) -> Reason {
    match err {
        DumpError::Freeze(_) => Reason::Freeze,
        DumpError::Image(err) => image_reason(err),
        DumpError::Object(err) => object_reason(err),
        DumpError::Survey(_) => Reason::Survey,
        DumpError::Objection(_) => Reason::Script,
        DumpError::Lineage(err) => lineage_reason(err),
        DumpError::Refused(_) => Reason::Refused,
    }
}

fn pre_dump_reason(err: &PreDumpError) -> Reason {
    match err {
        PreDumpError::Lineage(err) => lineage_reason(err),
        PreDumpError::Track(_) => Reason::Session,
        PreDumpError::Image(err) => image_reason(err),
        PreDumpError::Sys(err) => sys_reason(err, Reason::Memory),
        PreDumpError::Objection(_) => Reason::Script,
        PreDumpError::Untracked { .. } => Reason::Refused,
    }
}

fn restore_reason(err: &RestoreError) -> Reason {
    match err {
        RestoreError::Image(err) => image_reason(err),
        RestoreError::PreDump { .. } => Reason::Image,
        RestoreError::Object(err) => object_reason(err),
        RestoreError::Objection(_) => Reason::Script,
        RestoreError::Execute(err) => execute_reason(err),
    }
}

fn execute_reason(err: &ExecuteError) -> Reason {
    match err {
        ExecuteError::PidTaken { .. } | ExecuteError::PidOfZombie { .. } => Reason::Pid,
        ExecuteError::Agent(_) | ExecuteError::Call { .. } => Reason::Agent,
        ExecuteError::Object(err) => object_reason(err),
        ExecuteError::Objection(_) => Reason::Script,
        ExecuteError::NoHole { .. } => Reason::Memory,
        ExecuteError::Locked { source, .. } => execute_reason(source),
        ExecuteError::Sys(err) => sys_reason(err, Reason::Other),
        ExecuteError::Open { .. } | ExecuteError::Deed { .. } | ExecuteError::OtherVdso { .. } => Reason::Other,
    }
}

fn object_reason(err: &ObjectError) -> Reason {
    match err {
        ObjectError::Memory { errno, .. } | ObjectError::Inside { errno, .. } if is_full(*errno) => Reason::NoSpace,
        ObjectError::Memory { .. } | ObjectError::CopyGone { .. } => Reason::Memory,
        ObjectError::Agent(_) | ObjectError::Inside { .. } => Reason::Agent,
        ObjectError::Image(err) => image_reason(err),
        ObjectError::Contradiction { .. } => Reason::Image,
        ObjectError::Unsupported { .. } => Reason::Refused,
        ObjectError::Stale { .. } => Reason::Survey,
        ObjectError::Sys(err) => sys_reason(err, Reason::Other),
        ObjectError::Lock(_)
        | ObjectError::Connection { .. }
        | ObjectError::Clients { .. }
        | ObjectError::Unpinned { .. } => Reason::Other,
    }
}

fn lineage_reason(err: &LineageError) -> Reason {
    match err {
        LineageError::Image(err) => image_reason(err),
        LineageError::Track(_) => Reason::Session,
        LineageError::Sys(err) => sys_reason(err, Reason::Other),
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_full_disk_is_found_behind_whatever_it_stopped() {
        let full = || io::Error::from_raw_os_error(Errno::ENOSPC as i32);
        let file = ImageError::File { file: "pages-1.img".into(), offset: 0, call: "pwrite", source: full() };
        let memory = ObjectError::Memory { pid: 1, file: "pages-1.img".into(), errno: Errno::EDQUOT };
        let call = SysError::new("syncfs", "images", Errno::ENOSPC);
        let errors = [
            DumpError::Image(file),
            DumpError::Object(memory),
            DumpError::Object(ObjectError::Sys(call.clone())),
            DumpError::Lineage(LineageError::Sys(call)),
        ];
        for err in errors {
            let text = err.to_string();
            assert_eq!(of_dump(&Err(err)).failure, Some(Reason::NoSpace), "{text}");
        }
        let other = ObjectError::Memory { pid: 1, file: "pages-1.img".into(), errno: Errno::EIO };
        assert_eq!(of_dump(&Err(DumpError::Object(other))).failure, Some(Reason::Memory));
    }
}
