//! Planned calls as the agent's batches, and what came of them.

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;

use super::{ExecuteError, Run};
use crate::agent::batch::{HEADER, RECORD};
use crate::agent::{Arg as BatchArg, Batch, CallId, Member, Outcome, Room};
use crate::plan::{Arg, Call, Expect, Structure};

/// Bytes of memory that one batch fills, about.
const BATCH_MEMORY: u64 = 64 << 20;

impl Run<'_> {
    /// As many calls as fit into the slot, and do not keep those waiting who watch.
    pub(super) fn batch(&self, n: usize, calls: &[Call]) -> Result<(Batch, usize), ExecuteError> {
        let room = self.crew.room(Member(n)) - HEADER - 256;
        let mut batch = Batch::new();
        let mut buffers = BTreeMap::new();
        let (mut size, mut memory) = (0, 0);
        let mut taken = 0;
        for call in calls {
            size += RECORD + call.args.iter().map(arg_size).sum::<usize>();
            memory += call.memory();
            if taken > 0 && (size > room || memory > BATCH_MEMORY) {
                break;
            }
            self.add(&mut batch, &mut buffers, call);
            taken += 1;
        }
        Ok((batch, taken))
    }

    fn add(&self, batch: &mut Batch, buffers: &mut BTreeMap<u32, Room>, call: &Call) {
        let mut buffer =
            |batch: &mut Batch, b: &crate::plan::Buffer| *buffers.entry(b.name).or_insert_with(|| batch.room(b.len));
        let args: Vec<BatchArg> = call
            .args
            .iter()
            .map(|arg| match arg {
                Arg::Value(v) => BatchArg::Value(*v),
                Arg::File(file) => BatchArg::Value(self.fd(*file) as u64),
                Arg::Bytes(bytes) => batch.bytes(bytes).into(),
                Arg::Struct(structure) => {
                    let Structure { bytes, pointers, files } = &**structure;
                    let mut bytes = bytes.clone();
                    for (at, file) in files {
                        bytes[*at..*at + 4].copy_from_slice(&self.fd(*file).to_le_bytes());
                    }
                    let place = batch.bytes(&bytes);
                    for (at, target) in pointers {
                        let target = batch.bytes(target);
                        batch.link(place.at(*at), target);
                    }
                    place.into()
                }
                Arg::Earlier(back) => BatchArg::ResultOf(CallId(batch.len() - back)),
                Arg::Fill(b) => buffer(batch, b).into(),
                Arg::ValueAt(b, at) => BatchArg::ValueAt(buffer(batch, b).at(*at)),
            })
            .collect();
        match (call.creates, call.expect) {
            (Some(task), _) => batch.fork(call.nr, &args, self.crew.slot(Member(task.0))),
            (None, Expect::Anything) => batch.try_call(call.nr, &args),
            (None, _) => batch.call(call.nr, &args),
        };
    }

    fn fd(&self, file: crate::plan::FileRef) -> i32 {
        self.opened.get(file).map_or(-1, |f| f.as_raw_fd())
    }

    pub(super) fn check(&self, n: usize, calls: &[Call], outcome: &Outcome) -> Result<(), ExecuteError> {
        for (i, call) in calls.iter().enumerate() {
            let result = outcome.ret(CallId(i));
            let fine = match (call.expect, result) {
                (Expect::Anything, _) => true,
                (Expect::Success, result) => result.is_ok(),
                (Expect::Exactly(wanted), result) => result == Ok(wanted),
            };
            if !fine {
                let result = match result {
                    Ok(value) => format!("{value:#x}, which is not what was asked for"),
                    Err(errno) => format!("{errno:?} ({})", errno.desc()),
                };
                let tid = self.plan.tasks[n].tid.as_raw();
                return Err(ExecuteError::Call { tid, call: describe(call), result, why: call.why.to_string() });
            }
        }
        Ok(())
    }
}

/// Bytes that an argument takes in a slot.
pub(super) fn arg_size(arg: &Arg) -> usize {
    let padded = |n: usize| n + 16;
    match arg {
        Arg::Bytes(bytes) => padded(bytes.len()),
        Arg::Struct(structure) => {
            padded(structure.bytes.len()) + structure.pointers.iter().map(|(_, b)| padded(b.len())).sum::<usize>()
        }
        Arg::Fill(b) | Arg::ValueAt(b, _) => padded(b.len),
        Arg::Value(_) | Arg::File(_) | Arg::Earlier(_) => 0,
    }
}

/// A call as strace(1) would show it.
pub fn describe(call: &Call) -> String {
    let args: Vec<String> = call
        .args
        .iter()
        .map(|arg| match arg {
            Arg::Value(v) if *v > 0xffff_ffff_ffff_0000 => format!("{}", *v as i64),
            Arg::Value(v) if *v < 1 << 16 => format!("{v}"),
            Arg::Value(v) => format!("{v:#x}"),
            Arg::File(file) => format!("file {}", file.0),
            Arg::Bytes(bytes) => format!("<{} bytes>", bytes.len()),
            Arg::Struct(structure) => format!("<{} bytes>", structure.bytes.len()),
            Arg::Earlier(back) => format!("<result {back} before>"),
            Arg::Fill(b) => format!("<buffer {}>", b.name),
            Arg::ValueAt(b, at) => format!("<buffer {} at {at}>", b.name),
        })
        .collect();
    format!("{}({})", call.name(), args.join(", "))
}
