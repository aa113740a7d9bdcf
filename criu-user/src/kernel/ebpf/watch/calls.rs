//! Which system call touches what: by name, for the table that the program looks numbers up in.
//!
//! A call that is not in here touches nothing that a dump asks for. A number that the table does not know counts as one
//! that may touch anything.

use criu_common::watch::Kind::{self, *};
use criu_common::watch::calls::{CALLS, Check, Entry};
use syscalls::Sysno::{self, *};

/// Calls that touch kinds of state, whoever makes them and however.
const TOUCH: &[(&[Kind], &[Sysno])] = &[
    (
        &[Descriptors],
        &[
            open,
            openat,
            openat2,
            creat,
            close,
            close_range,
            dup,
            dup2,
            dup3,
            pipe,
            pipe2,
            eventfd,
            eventfd2,
            epoll_create,
            epoll_create1,
            inotify_init,
            inotify_init1,
            timerfd_create,
            socketpair,
            accept,
            accept4,
            open_by_handle_at,
            pidfd_getfd,
            landlock_create_ruleset,
        ],
    ),
    (&[Descriptors, Watches], &[signalfd, signalfd4]),
    (&[Files], &[lseek, fadvise64]),
    (&[Locks], &[flock]),
    (
        &[Memory],
        &[
            munmap,
            mremap,
            mprotect,
            pkey_mprotect,
            pkey_alloc,
            pkey_free,
            brk,
            madvise,
            mlock,
            mlock2,
            munlock,
            mlockall,
            munlockall,
            remap_file_pages,
            mseal,
            mbind,
            set_mempolicy_home_node,
            map_shadow_stack,
            process_madvise,
        ],
    ),
    (&[Memory, Ipc], &[shmat, shmdt]),
    (&[Actions], &[rt_sigaction]),
    (&[Masks], &[rt_sigprocmask, sigaltstack, rt_sigreturn, rt_sigsuspend]),
    (&[Timers], &[alarm, setitimer, timer_create, timer_settime, timer_delete]),
    (
        &[Credentials],
        &[setuid, setgid, setreuid, setregid, setresuid, setresgid, setfsuid, setfsgid, setgroups, capset],
    ),
    (&[Directories], &[chdir, fchdir, chroot, umask]),
    (&[Limits], &[setrlimit, prlimit64]),
    (&[Scheduling], &[sched_setscheduler, sched_setparam, sched_setaffinity, setpriority, ioprio_set, set_mempolicy]),
    (&[Sockets], &[bind, listen, connect, shutdown, setsockopt]),
    (&[Ipc], &[shmctl, semget, semctl, semop, semtimedop, msgget, msgctl, msgsnd, msgrcv, mq_unlink]),
    (&[Threads], &[set_tid_address, set_robust_list, rseq, arch_prctl]),
    (&[Children], &[wait4, waitid]),
    (&[Sessions], &[setsid, setpgid]),
    (&[Watches], &[epoll_ctl, inotify_add_watch, inotify_rm_watch, timerfd_settime]),
    (&[Settings], &[personality, membarrier]),
    (&[Asynchronous], &[io_submit, io_cancel, io_getevents]),
];

/// Calls that are looked at more closely.
const CHECKED: &[(Check, &[Kind], &[Sysno])] = &[
    (
        Check::Report,
        &[Descriptors],
        &[perf_event_open, userfaultfd, fanotify_init, memfd_secret, pidfd_open, fsopen, fsmount, fspick, open_tree],
    ),
    (Check::Report, &[Descriptors, Memory], &[io_uring_setup]),
    (Check::Report, &[Descriptors, Ipc], &[mq_open]),
    (Check::Report, &[Memory, Asynchronous], &[io_setup, io_destroy]),
    (Check::Report, &[Asynchronous], &[io_uring_register]),
    (Check::Report, &[Mounts], &[mount, umount2, move_mount, mount_setattr, fsconfig]),
    (Check::Report, &[Mounts, Directories], &[pivot_root]),
    (Check::Report, &[Credentials], &[add_key, request_key, keyctl, landlock_restrict_self]),
    (Check::Report, &[Settings], &[iopl, ioperm, modify_ldt]),
    (Check::Socket, &[Descriptors, Sockets], &[socket]),
    (Check::Clone, &[], &[clone]),
    (Check::Clone3, &[Descriptors], &[clone3]),
    (Check::Map, &[Memory], &[mmap]),
    (Check::MemoryFile, &[Descriptors], &[memfd_create]),
    (Check::SharedMemory, &[Ipc], &[shmget]),
    (Check::Trace, &[Children], &[ptrace]),
    (Check::Filter, &[Seccomp, Descriptors], &[seccomp]),
    (Check::Bpf, &[Descriptors], &[bpf]),
    (Check::Scheduling, &[Scheduling], &[sched_setattr]),
    (Check::Fcntl, &[], &[fcntl]),
    (Check::Prctl, &[], &[prctl]),
    (Check::Ioctl, &[], &[ioctl]),
    (Check::Receive, &[Descriptors], &[recvmsg, recvmmsg]),
];

/// Calls of which every kind may follow, and that are reported: others than the process itself take part in them.
const ANYTHING: &[Sysno] = &[unshare, setns];

/// Calls that may do anything to the process, unreported: the kernel works for it on what it has submitted.
const EVERYTHING: &[Sysno] = &[io_uring_enter];

/// The table for this architecture.
pub fn table() -> [u32; CALLS] {
    let mut table = [0; CALLS];
    let mut enter = |call: &Sysno, entry: Entry| {
        if let Some(word) = table.get_mut(call.id() as usize) {
            *word = entry.0;
        }
    };
    let touching = |kinds: &[Kind]| kinds.iter().fold(Entry::NOTHING, |entry, kind| entry.and(*kind));
    for (kinds, calls) in TOUCH {
        calls.iter().for_each(|call| enter(call, touching(kinds)));
    }
    for (check, kinds, calls) in CHECKED {
        calls.iter().for_each(|call| enter(call, touching(kinds).check(*check)));
    }
    ANYTHING.iter().for_each(|call| enter(call, Entry::EVERYTHING.check(Check::Report)));
    EVERYTHING.iter().for_each(|call| enter(call, Entry::EVERYTHING));
    // Numbers that are newer than this table.
    for (number, word) in table.iter_mut().enumerate().skip(NEWEST + 1) {
        if Sysno::new(number).is_none() {
            *word = Entry::EVERYTHING.0;
        }
    }
    table
}

/// The newest call that was there when this table was written; gaps below it are numbers of no call.
const NEWEST: usize = mseal as usize;

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn each_call_stands_in_one_place() {
        let calls = TOUCH.iter().flat_map(|(_, calls)| calls.iter());
        let checked = CHECKED.iter().flat_map(|(_, _, calls)| calls.iter());
        let mut seen = HashSet::new();
        for call in calls.chain(checked).chain(ANYTHING).chain(EVERYTHING) {
            assert!(seen.insert(call.id()), "{call} is there twice");
        }
    }

    #[test]
    fn no_more_kinds_than_a_word_has_room_for() {
        for (kinds, calls) in TOUCH {
            assert!(kinds.len() <= 2 && !calls.is_empty());
        }
        assert!(CHECKED.iter().all(|(_, kinds, _)| kinds.len() <= 2));
    }

    #[test]
    fn words_say_what_was_put_in() {
        let table = table();
        let word = Entry(table[shmat.id() as usize]);
        assert_eq!((word.first(), word.second(), word.checks()), (Memory as u32 + 1, Ipc as u32 + 1, 0));
        let word = Entry(table[io_uring_setup.id() as usize]);
        assert_eq!((word.first(), word.checks()), (Descriptors as u32 + 1, Check::Report as u32));
        assert_eq!(table[read.id() as usize], 0);
        assert!(Entry(table[unshare.id() as usize]).is_everything());
        assert_eq!(table[CALLS - 1], Entry::EVERYTHING.0);
    }
}
