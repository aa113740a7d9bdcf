//! Could the guest come home alone?
//!
//! The target's seccomp filters are suspended while its tracer lives. A guest whose engine was killed makes its last
//! calls under them: one that does not pass kills the program, or leaves it without its signal mask.

use super::guest::{AREA, THREAD_AREA};
use crate::kernel::seccomp_bpf::{Call, Filter, Verdict, verdict};

/// A call of the guest's code, and the hardest verdict with which the way home still ends well.
struct Step {
    name: &'static str,
    call: Call,
    bearable: Verdict,
}

const fn step(name: &'static str, nr: i64, args: [u64; 6], bearable: Verdict) -> Step {
    Step { name, call: Call { nr, args, address: 0 }, bearable }
}

/// What the guest does by itself, in its order. On the way in, an error makes it turn round.
const STEPS: &[Step] = &[
    step("rt_sigprocmask", libc::SYS_rt_sigprocmask, [2, 0, 0, 8, 0, 0], Verdict::Allowed),
    step("memfd_create", libc::SYS_memfd_create, [0, 1, 0, 0, 0, 0], Verdict::Fails),
    step("ftruncate", libc::SYS_ftruncate, [0; 6], Verdict::Fails),
    step("mmap", libc::SYS_mmap, [0, AREA as u64, 3, 1, 0, 0], Verdict::Fails),
    step("socketpair", libc::SYS_socketpair, [1, 0x80005, 0, 0, 0, 0], Verdict::Fails),
    step("read", libc::SYS_read, [0, 0, 16, 0, 0, 0], Verdict::Fails),
    step("sendto", libc::SYS_sendto, [0, 0, 16, 0x4000, 0, 0], Verdict::Fails),
    step("close", libc::SYS_close, [0; 6], Verdict::Allowed),
    step("munmap", libc::SYS_munmap, [0, AREA as u64, 0, 0, 0, 0], Verdict::Allowed),
    // A further thread:
    step("mmap", libc::SYS_mmap, [0, THREAD_AREA as u64, 3, 0x22, u64::MAX, 0], Verdict::Fails),
    step("munmap", libc::SYS_munmap, [0, THREAD_AREA as u64, 0, 0, 0, 0], Verdict::Allowed),
];

/// The first call that a thread with these filters could not make alone.
pub fn obstacle(filters: &[Filter]) -> Option<&'static str> {
    let stuck = STEPS.iter().find(|step| verdict(filters, &step.call) > step.bearable);
    stuck.map(|step| step.name)
}

/// Whether a thread with these filters can be given back its processors on its way home (see `beside`).
pub fn can_be_moved(filters: &[Filter]) -> bool {
    let step = step("sched_setaffinity", libc::SYS_sched_setaffinity, [0, 8, 0, 0, 0, 0], Verdict::Allowed);
    verdict(filters, &step.call) <= step.bearable
}

/// What a process does beside that while a copy of it is made (see `copy`): in a batch, which goes on without the engine.
const COPYING: &[Step] = &[
    step("clone3", libc::SYS_clone3, [0, 64, 0, 0, 0, 0], Verdict::Fails),
    step("wait4", libc::SYS_wait4, [0, 0, libc::__WALL as u64, 0, 0, 0], Verdict::Allowed),
    step("prctl", libc::SYS_prctl, [libc::PR_SET_CHILD_SUBREAPER as u64, 1, 0, 0, 0, 0], Verdict::Allowed),
];

/// The first call that a thread with these filters could not make alone while it is copied.
pub fn obstacle_to_copying(filters: &[Filter]) -> Option<&'static str> {
    let stuck = COPYING.iter().find(|step| verdict(filters, &step.call) > step.bearable);
    stuck.map(|step| step.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A filter that answers one call so, and lets all others pass.
    fn about(nr: i64, answer: u32) -> Vec<Filter> {
        let code =
            [(0x20u16, 0u8, 0u8, 0u32), (0x15, 0, 1, nr as u32), (0x06, 0, 0, answer), (0x06, 0, 0, 0x7fff_0000)];
        let bytes =
            code.iter().flat_map(|(code, jt, jf, k)| [&code.to_le_bytes()[..], &[*jt, *jf], &k.to_le_bytes()].concat());
        vec![(bytes.collect(), 0)]
    }

    #[test]
    fn calls_that_the_guest_needs_are_known() {
        const ERRNO: u32 = 0x0005_0001;
        assert_eq!(obstacle(&[]), None);
        assert_eq!(obstacle(&about(libc::SYS_munmap, ERRNO)), Some("munmap"));
        assert_eq!(obstacle(&about(libc::SYS_memfd_create, ERRNO)), None);
        assert_eq!(obstacle(&about(libc::SYS_memfd_create, 0)), Some("memfd_create"));
        assert_eq!(obstacle(&about(libc::SYS_execve, 0)), None);
        assert!(can_be_moved(&[]) && can_be_moved(&about(libc::SYS_munmap, 0)));
        assert!(!can_be_moved(&about(libc::SYS_sched_setaffinity, ERRNO)));
        assert_eq!(obstacle_to_copying(&about(libc::SYS_clone3, ERRNO)), None);
        assert_eq!(obstacle_to_copying(&about(libc::SYS_clone3, 0)), Some("clone3"));
        assert_eq!(obstacle_to_copying(&about(libc::SYS_wait4, ERRNO)), Some("wait4"));
    }
}
