//! What comes out of the ring buffer.

use std::ffi::CStr;
use std::time::Duration;

use criu_common::watch::{self, FRAMES, RecordKind};
use nix::unistd::Pid;

use super::plain::read;

/// Something that a tracked process did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The process.
    pub pid: Pid,
    /// The thread.
    pub tid: Pid,
    /// When, on the monotonic clock.
    pub at: Duration,
    /// What.
    pub what: What,
}

/// What it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// It made a process, which is followed as well.
    Fork {
        /// The child.
        child: Pid,
    },
    /// It made a thread.
    Thread {
        /// The new one.
        tid: Pid,
    },
    /// It executes another program.
    Exec {
        /// Its name, as in /proc/PID/comm.
        name: String,
    },
    /// The thread has ended, and others of its process go on.
    ThreadExit {
        /// As wait(2) gives it.
        code: i32,
    },
    /// The process has ended, and is not followed any more.
    Exit {
        /// As wait(2) gives it.
        code: i32,
    },
    /// First write fault in a block of 2 MiB.
    FirstWrite {
        /// Where the block begins.
        address: u64,
    },
    /// A system call after which a dump may be refused. It has succeeded.
    Call(Box<Call>),
    /// A connection has another state.
    Socket {
        /// SO_COOKIE of the socket.
        cookie: u64,
        /// Its state until then, by the kernel's number.
        from: u32,
        /// The new one.
        to: u32,
    },
    /// It came into the followed control group, or left it.
    Moved {
        /// Whether it is in it, and followed.
        is_in: bool,
    },
}

/// A system call, and who called it from where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Its number; [`crate::kernel::syscall_name`] names it.
    pub number: i64,
    /// Its arguments.
    pub arguments: [u64; 6],
    /// Flags or policy that were behind a pointer (clone3, sched_setattr); else 0.
    pub detail: u64,
    /// What it gave.
    pub result: i64,
    /// Return addresses, the innermost first, as far as frame pointers lead.
    pub stack: Vec<u64>,
}

/// The event that a record tells of; `None` for one that makes no sense.
pub fn decode(bytes: &[u8]) -> Option<Event> {
    let header: watch::Header = read(bytes)?;
    let pid = |number: u32| Pid::from_raw(number as i32);
    let what = match header.kind {
        kind if kind == RecordKind::Fork as u32 => {
            let fork: watch::Fork = read(bytes)?;
            if fork.is_thread != 0 {
                What::Thread { tid: pid(fork.child_tid) }
            } else {
                What::Fork { child: pid(fork.child_pid) }
            }
        }
        kind if kind == RecordKind::Exec as u32 => {
            let exec: watch::Exec = read(bytes)?;
            let name = CStr::from_bytes_until_nul(&exec.comm).map(CStr::to_string_lossy).unwrap_or_default();
            What::Exec { name: name.into_owned() }
        }
        kind if kind == RecordKind::Exit as u32 => {
            let exit: watch::Exit = read(bytes)?;
            if exit.is_process != 0 { What::Exit { code: exit.code } } else { What::ThreadExit { code: exit.code } }
        }
        kind if kind == RecordKind::Block as u32 => What::FirstWrite { address: read::<watch::Block>(bytes)?.address },
        kind if kind == RecordKind::Call as u32 => What::Call(Box::new(call(&read(bytes)?))),
        kind if kind == RecordKind::Socket as u32 => {
            let socket: watch::SocketState = read(bytes)?;
            What::Socket { cookie: socket.cookie, from: socket.from, to: socket.to }
        }
        kind if kind == RecordKind::Moved as u32 => What::Moved { is_in: read::<watch::Moved>(bytes)?.is_in != 0 },
        _ => return None,
    };
    Some(Event { pid: pid(header.pid), tid: pid(header.tid), at: Duration::from_nanos(header.time_ns), what })
}

fn call(record: &watch::Call) -> Call {
    let frames = (record.frames as usize).min(FRAMES);
    Call {
        number: i64::from(record.number),
        arguments: record.arguments,
        detail: record.detail,
        result: record.result,
        stack: record.stack[..frames].to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes<T: Copy>(record: &T) -> Vec<u8> {
        let at = std::ptr::from_ref(record).cast::<u8>();
        // SAFETY: readable for its size; the records that are used here have no hidden padding.
        unsafe { std::slice::from_raw_parts(at, size_of::<T>()) }.to_vec()
    }

    #[test]
    fn a_record_is_told_by_its_kind() {
        let header = watch::Header { kind: RecordKind::Exec as u32, key: 9, pid: 7, tid: 8, time_ns: 1_500 };
        let mut exec = watch::Exec { header, comm: [0; 16] };
        exec.comm[..4].copy_from_slice(b"true");
        let event = decode(&bytes(&exec)).expect("a record");
        assert_eq!((event.pid.as_raw(), event.tid.as_raw(), event.at), (7, 8, Duration::from_nanos(1_500)));
        assert_eq!(event.what, What::Exec { name: "true".to_owned() });
        assert_eq!(decode(&bytes(&exec)[..39]), None, "cut short");
    }

    #[test]
    fn a_call_has_no_more_frames_than_there_is_room_for() {
        let header = watch::Header { kind: RecordKind::Call as u32, ..watch::Header::default() };
        let call = watch::Call { header, frames: 1 << 20, ..watch::Call::default() };
        let Some(Event { what: What::Call(call), .. }) = decode(&bytes(&call)) else { panic!("no call") };
        assert_eq!(call.stack.len(), FRAMES);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(kind in 0u32..9, noise in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut bytes = kind.to_ne_bytes().to_vec();
            bytes.extend(noise);
            // Either answer is right for noise; it has to be one.
            let _ = decode(&bytes);
        }
    }
}
