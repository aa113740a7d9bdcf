//! What a system call that was interrupted would do next: the task's restart block.
//!
//! A sleep, a poll or a futex wait that the freeze interrupts returns to user space as `restart_syscall(2)`, and what it
//! was waiting for stays in the kernel, in `task_struct.restart_block`: a function, and its arguments in a union. The
//! function is known by its address only; /proc/kallsyms names it.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};

use criu_common::offsets::{ABSENT, Offsets};
use criu_common::survey::Thread;

/// The functions, as they are called in kernel/time/hrtimer.c, kernel/time/posix-cpu-timers.c,
/// kernel/time/alarmtimer.c, fs/select.c and kernel/futex/waitwake.c.
const FUNCTIONS: [&str; 5] = [
    "hrtimer_nanosleep_restart",
    "posix_cpu_nsleep_restart",
    "alarm_timer_nsleep_restart",
    "do_restart_poll",
    "futex_wait_restart",
];

const FUTEX_WAIT: u64 = 0;
/// A futex operation without its flags: FUTEX_CMD_MASK of include/uapi/linux/futex.h.
const COMMAND: u64 = 127;

/// What `restart_syscall(2)` would do for a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restart {
    /// clock_nanosleep(2), or nanosleep(2), relative.
    Sleep {
        /// `CLOCK_*` that it counts on: CLOCK_MONOTONIC where a relative sleep was asked for on CLOCK_REALTIME.
        clock: i32,
        /// When it ends, on that clock, in nanoseconds.
        until_ns: u64,
        /// Where the program wants to know what remains, or 0.
        remaining: u64,
    },
    /// poll(2), or ppoll(2).
    Poll {
        /// The array.
        fds: u64,
        /// Its length.
        count: u32,
        /// When it ends, in nanoseconds of CLOCK_MONOTONIC; `None`: never.
        until_ns: Option<u64>,
    },
    /// futex(2) with `FUTEX_WAIT` and a timeout.
    Futex {
        /// The word.
        address: u64,
        /// What it was to hold.
        value: u32,
        /// `FLAGS_*` of kernel/futex/futex.h.
        flags: u32,
        /// Which wakers count.
        bitset: u32,
        /// When it ends, in nanoseconds of the clock that `flags` names.
        until_ns: u64,
    },
}

impl Restart {
    /// What a thread's restart block says, where no more is known than that the thread's system call is to be restarted
    /// from it: the call that the thread's registers still hold tells which of the kinds it is. `nr` and `args` are those
    /// registers; after an earlier restart the number is that of restart_syscall(2), and only the arguments tell.
    pub fn of_call(thread: &Thread, offsets: &Offsets, nr: i64, args: [u64; 4]) -> Option<(i64, Self)> {
        let block = Block { bytes: &thread.restart[..thread.restart.len().min(thread.restart_len as usize)], offsets };
        let matches_poll = || {
            block.poll().filter(|poll| {
                matches!(poll, Self::Poll { fds, count, .. }
            if *fds == args[0] && *count == args[1] as u32)
            })
        };
        let matches_futex = || {
            block.futex().filter(|futex| {
                matches!(futex, Self::Futex { address, value, .. }
            if *address == args[0] && *value == args[2] as u32)
            })
        };
        // Its fields lie where a poll's do; but for that, every bit of its set is set.
        let matches_plain_futex = || {
            let plain = |futex: &Self| matches!(futex, Self::Futex { bitset: u32::MAX, .. });
            matches_futex().filter(|futex| args[1] & COMMAND == FUTEX_WAIT && plain(futex))
        };
        let sleep_to = |remaining: u64| {
            block.sleep().filter(|sleep| {
                matches!(sleep, Self::Sleep { remaining: to, .. }
            if *to == remaining)
            })
        };
        match nr {
            libc::SYS_poll => matches_poll().map(|found| (nr, found)),
            libc::SYS_futex => matches_futex().map(|found| (nr, found)),
            libc::SYS_nanosleep => sleep_to(args[1]).map(|found| (nr, found)),
            libc::SYS_clock_nanosleep => sleep_to(args[3]).map(|found| (nr, found)),
            // A clock's number is no pointer.
            libc::SYS_restart_syscall if args[0] < 4096 => {
                sleep_to(args[3]).map(|found| (libc::SYS_clock_nanosleep, found))
            }
            libc::SYS_restart_syscall => matches_plain_futex()
                .map(|found| (libc::SYS_futex, found))
                .or_else(|| matches_poll().map(|found| (libc::SYS_poll, found)))
                .or_else(|| matches_futex().map(|found| (libc::SYS_futex, found)))
                .or_else(|| sleep_to(args[1]).map(|found| (libc::SYS_nanosleep, found))),
            _ => None,
        }
    }
}

/// A `struct restart_block`, as it is in the kernel.
#[derive(Clone, Copy)]
struct Block<'a> {
    bytes: &'a [u8],
    offsets: &'a Offsets,
}

impl Block<'_> {
    fn word(&self, at: u32) -> Option<u64> {
        Some(u64::from_ne_bytes(*self.bytes.get(at as usize..)?.first_chunk()?))
    }

    fn half(&self, at: u32) -> Option<u32> {
        Some(u32::from_ne_bytes(*self.bytes.get(at as usize..)?.first_chunk()?))
    }

    fn poll(&self) -> Option<Restart> {
        let until_ns = match self.half(self.offsets.restart_poll_has_timeout)? {
            0 => None,
            _ => Some(poll_end(self.offsets, &|at| self.word(at))?),
        };
        let (fds, count) = (self.word(self.offsets.restart_poll_ufds)?, self.half(self.offsets.restart_poll_nfds)?);
        Some(Restart::Poll { fds, count, until_ns })
    }

    fn futex(&self) -> Option<Restart> {
        Some(Restart::Futex {
            address: self.word(self.offsets.restart_futex_uaddr)?,
            value: self.half(self.offsets.restart_futex_val)?,
            flags: self.half(self.offsets.restart_futex_flags)?,
            bitset: self.half(self.offsets.restart_futex_bitset)?,
            until_ns: self.word(self.offsets.restart_futex_time)?,
        })
    }

    fn sleep(&self) -> Option<Restart> {
        Some(Restart::Sleep {
            clock: self.half(self.offsets.restart_nanosleep_clockid)? as i32,
            until_ns: self.word(self.offsets.restart_nanosleep_expires)?,
            remaining: self.word(self.offsets.restart_nanosleep_rmtp)?,
        })
    }
}

/// Names of the functions by address.
#[derive(Clone, Debug, Default)]
pub struct RestartFunctions(HashMap<u64, &'static str>);

impl RestartFunctions {
    /// Reads /proc/kallsyms, which takes some 20 ms: to be asked for only where a thread's system call will be restarted
    /// and its number does not tell already what it is.
    pub fn of_this_kernel() -> std::io::Result<Self> {
        Self::from_symbols(BufReader::with_capacity(1 << 20, std::fs::File::open("/proc/kallsyms")?))
    }

    /// Takes lines as /proc/kallsyms has them. Addresses that are hidden from the reader are zero, and not taken.
    fn from_symbols(mut symbols: impl BufRead) -> std::io::Result<Self> {
        let mut found = HashMap::new();
        let mut line = Vec::new();
        while found.len() < FUNCTIONS.len() && symbols.read_until(b'\n', &mut line)? != 0 {
            let mut words = line.split(|byte| byte.is_ascii_whitespace());
            if let (Some(address), Some(name)) = (words.next(), words.nth(1))
                && let Some(name) = FUNCTIONS.iter().find(|function| function.as_bytes() == name)
                && let Ok(address) = u64::from_str_radix(&String::from_utf8_lossy(address), 16)
                && address != 0
            {
                found.insert(address, *name);
            }
            line.clear();
        }
        Ok(Self(found))
    }

    /// What a thread's restart block says; `None` where it says nothing, or nothing that is known.
    pub fn decode(&self, thread: &Thread, offsets: &Offsets) -> Option<Restart> {
        let block = Block { bytes: &thread.restart[..thread.restart.len().min(thread.restart_len as usize)], offsets };
        match *self.0.get(&block.word(offsets.restart_fn)?)? {
            "do_restart_poll" => block.poll(),
            "futex_wait_restart" => block.futex(),
            _ => block.sleep(),
        }
    }
}

/// Seconds and nanoseconds: two words, or since Linux 6.18 a `struct timespec64`, which is the same.
fn poll_end(offsets: &Offsets, word: &impl Fn(u32) -> Option<u64>) -> Option<u64> {
    let (seconds, nanoseconds) = match offsets.restart_poll_end {
        ABSENT => (offsets.restart_poll_sec, offsets.restart_poll_nsec),
        end => (end, end + 8),
    };
    word(seconds)?.checked_mul(1_000_000_000)?.checked_add(word(nanoseconds)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symbols_are_found_by_their_whole_name() {
        let text = "ffffffff81000000 T do_restart_poll_not\nffffffff81000010 t do_restart_poll\n\
                    ffffffff81000020 t hrtimer_nanosleep_restart\t[a_module]\n0000000000000000 t futex_wait_restart\n";
        let functions = RestartFunctions::from_symbols(text.as_bytes()).expect("memory can be read");
        assert_eq!(functions.0.get(&0xffff_ffff_8100_0010), Some(&"do_restart_poll"));
        assert_eq!(functions.0.get(&0xffff_ffff_8100_0020), Some(&"hrtimer_nanosleep_restart"));
        assert_eq!(functions.0.len(), 2);
    }
}
