//! seccomp(2): the filters of a thread, or strict mode.
//!
//! Filters are a chain that threads and children share from the point where they parted. seccomp.img has each filter
//! once, with the one installed before it; a thread names its last. The tracer's option to suspend seccomp
//! (PTRACE_O_SUSPEND_SECCOMP) keeps them from acting on what the engine makes the thread do.

use std::collections::HashMap;

use nix::unistd::Pid;

use super::file::{Capture, Planner};
use super::{ObjectError, Refusal};
use crate::call;
use crate::freeze::FrozenThread;
use crate::image::proto::{SeccompEntry, SeccompFilter, SeccompMode, ThreadCoreEntry};
use crate::image::{ImageKind, references};
use crate::plan::{Stage, Structure, TaskRef};

const SET_MODE_STRICT: u32 = 0;
const SET_MODE_FILTER: u32 = 1;
/// Bytes of a `struct sock_filter`.
const INSTRUCTION: usize = 8;

/// The filters met so far.
#[derive(Debug, Default)]
struct Filters {
    list: Vec<SeccompFilter>,
    known: HashMap<(Option<u32>, Vec<u8>, u32), u32>,
}

impl Filters {
    fn add(&mut self, prev: Option<u32>, filter: Vec<u8>, flags: u32) -> u32 {
        let Self { list, known } = self;
        *known.entry((prev, filter.clone(), flags)).or_insert_with(|| {
            list.push(SeccompFilter { filter, prev, flags: Some(flags) });
            list.len() as u32 - 1
        })
    }
}

/// Mode and last filter of a thread, as the image has them.
pub fn capture(
    cx: &mut Capture<'_>,
    pid: Pid,
    thread: &FrozenThread,
    mode: u32,
) -> Result<(Option<i32>, Option<u32>), ObjectError> {
    let tid = thread.tid();
    let mode = SeccompMode::try_from(mode as i32)
        .map_err(|_| ObjectError::contradiction(format!("tid {tid} has the unknown seccomp mode {mode}")))?;
    let mut last = None;
    if mode == SeccompMode::Filter {
        let Some(chain) = &thread.filters else {
            cx.refuse(Refusal {
                pid: pid.as_raw(),
                fd: None,
                what: format!("the seccomp filters of thread {tid} may not be read"),
                advice: "dump with CAP_SYS_ADMIN, and not from under a seccomp filter".into(),
            });
            return Ok((None, None));
        };
        let filters = cx.shelf.get::<Filters>();
        for (code, flags) in chain {
            last = Some(filters.add(last, code.clone(), *flags));
        }
    }
    Ok(((mode != SeccompMode::Disabled).then_some(mode as i32), last))
}

/// Writes all filters that were met.
pub fn write(cx: &mut Capture<'_>) -> Result<(), ObjectError> {
    let seccomp_filters = cx.shelf.take::<Filters>().list;
    if !seccomp_filters.is_empty() {
        cx.dir.write_one(ImageKind::Seccomp, &SeccompEntry { seccomp_filters })?;
    }
    Ok(())
}

/// Plans filters and mode of a thread. A filter may be installed by whoever has CAP_SYS_ADMIN, so this comes before the
/// change of credentials.
pub fn plan(cx: &mut Planner<'_>, task: TaskRef, thread: &ThreadCoreEntry) -> Result<(), ObjectError> {
    let mode = thread.seccomp_mode.map_or(SeccompMode::Disabled as i32, |mode| mode);
    if mode == SeccompMode::Strict as i32 {
        let strict = call!(SYS_seccomp(SET_MODE_STRICT, 0u64, 0u64), "strict seccomp");
        cx.plan.push(task, Stage::Credentials, strict);
    }
    if mode != SeccompMode::Filter as i32 {
        return Ok(());
    }
    if cx.shelf.get::<SeccompEntry>().seccomp_filters.is_empty() {
        let read: SeccompEntry = cx.dir.read_one(ImageKind::Seccomp)?;
        references::filters(&cx.dir.path_of(ImageKind::Seccomp), &read)?;
        *cx.shelf.get::<SeccompEntry>() = read;
    }
    let filters = &cx.shelf.get::<SeccompEntry>().seccomp_filters;
    let mut chain = Vec::new();
    let mut next = Some(thread.seccomp_filter.unwrap_or(0));
    while let Some(index) = next {
        let filter = filters.get(index as usize).filter(|_| chain.len() < filters.len());
        let filter = filter.ok_or_else(|| {
            ObjectError::contradiction(format!("seccomp.img has no end of the chain of filters at {index}"))
        })?;
        let count = filter.filter.len() / INSTRUCTION;
        chain.push((index, filter.flags.unwrap_or(0), count as u16, filter.filter.clone()));
        next = filter.prev;
    }
    for (index, flags, count, code) in chain.into_iter().rev() {
        // struct sock_fprog: how many, where.
        let mut bytes = vec![0u8; 16];
        bytes[..2].copy_from_slice(&count.to_le_bytes());
        let program = Structure { bytes, pointers: vec![(8, code)], ..Structure::default() };
        let call = call!(SYS_seccomp(SET_MODE_FILTER, flags, program), format!("seccomp filter {index}"));
        cx.plan.push(task, Stage::Credentials, call);
    }
    Ok(())
}
