//! Making processes as they were: pids, addresses, clocks, timers; and telling what they share.

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::sched::CloneFlags;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use super::helper::Helper;
use super::{Absent, Answer, apart, apart_in, ensure};
use crate::kernel::clone::CloneArgs;
use crate::kernel::error::During;
use crate::kernel::pidfd::PidFd;
use crate::kernel::sys::{self, Compare};
use crate::kernel::{events, proc};

/// pidfd_open(2) and pidfd_send_signal(2).
pub fn pidfd() -> Answer {
    let helper = Helper::start(|| Ok(()))?;
    PidFd::open(helper.pid())?.kill(Signal::SIGCONT)?;
    Ok(String::new())
}

/// pidfd_getfd(2): an open file of another process.
pub fn pidfd_getfd() -> Answer {
    let file = memfd_create(c"criu-ebpf-check", MFdFlags::MFD_CLOEXEC).during("memfd_create", "a new file")?;
    let helper = Helper::start(|| Ok(()))?;
    PidFd::open(helper.pid())?.get(file.as_raw_fd())?;
    Ok(String::new())
}

/// clone3(2) with `set_tid`: a pid that has just become free is given out again.
pub fn clone3_set_tid() -> Answer {
    apart(|| {
        let free = {
            let helper = Helper::start(|| Ok(()))?;
            helper.pid()
        };
        let wanted = free.as_raw();
        let set_tid = (&raw const wanted).expose_provenance() as u64;
        let args = CloneArgs { exit_signal: libc::SIGCHLD as u64, set_tid, set_tid_size: 1, ..CloneArgs::default() };
        let at = (&raw const args).expose_provenance() as u64;
        // SAFETY: a fork, with arguments that live for the call; the child leaves at once.
        match unsafe { sys::raw(libc::SYS_clone3, [at, size_of::<CloneArgs>() as u64, 0, 0, 0, 0]) } {
            // SAFETY: ends the child alone.
            Ok(0) => unsafe { libc::_exit(0) },
            Ok(pid) => {
                let pid = Pid::from_raw(pid as i32);
                let _ = waitpid(pid, None);
                ensure(pid == free, "clone3 gives another pid than was asked for")?;
                Ok(String::new())
            }
            Err(errno) => Err(Absent::because(format!("clone3(set_tid): {}", errno.desc()))),
        }
    })
}

/// prctl(2) with PR_SET_MM_MAP: the addresses of code, data, heap, stack, arguments and environment.
pub fn mm_map() -> Answer {
    apart(|| set_mm_map().map(|()| String::new()))
}

/// Sets the addresses of this process to what they are.
fn set_mm_map() -> Result<(), Absent> {
    const PR_SET_MM_MAP: u64 = 14;
    let stat = proc::stat(Pid::this(), None)?;
    // SAFETY: asks where the heap ends.
    let brk = unsafe { libc::sbrk(0) }.addr() as u64;
    // struct prctl_mm_map of include/uapi/linux/prctl.h, its last two fields in one word: no auxiliary vector, no file.
    let map: [u64; 13] = [
        stat.start_code,
        stat.end_code,
        stat.start_data,
        stat.end_data,
        stat.start_brk,
        brk,
        stat.start_stack,
        stat.arg_start,
        stat.arg_end,
        stat.env_start,
        stat.env_end,
        0,
        u64::from(u32::MAX) << 32,
    ];
    let args = [libc::PR_SET_MM as u64, PR_SET_MM_MAP, map.as_ptr().expose_provenance() as u64, 104, 0, 0];
    // SAFETY: the map lives for the call and has the size that is said.
    unsafe { sys::raw(libc::SYS_prctl, args) }.during("prctl(PR_SET_MM_MAP)", "own addresses")?;
    Ok(())
}

/// kcmp(2): two descriptors of one open file.
pub fn kcmp() -> Answer {
    let file = memfd_create(c"criu-ebpf-check", MFdFlags::MFD_CLOEXEC).during("memfd_create", "a new file")?;
    let helper = Helper::start(|| Ok(()))?;
    let what = Compare::File(file.as_raw_fd() as u64, file.as_raw_fd() as u64);
    ensure(sys::kcmp(Pid::this(), helper.pid(), what)?.is_eq(), "kcmp takes one open file for two")?;
    Ok(String::new())
}

/// kcmp(2) with KCMP_EPOLL_TFD: what an epoll instance watches.
pub fn kcmp_epoll() -> Answer {
    let (epoll, event) = (events::epoll()?, events::eventfd(0)?);
    let number = event.as_raw_fd();
    let watch = libc::EPOLLIN as u32;
    let mut wanted = libc::epoll_event { events: watch, u64: 0 };
    // SAFETY: the event lives for the call.
    Errno::result(unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, number, &raw mut wanted) })
        .during("epoll_ctl", "an eventfd")?;
    let same = events::epoll_watches(epoll.as_fd(), number as u32, 0, Pid::this(), number)?;
    ensure(same, "kcmp does not know what an epoll instance watches")?;
    Ok(String::new())
}

/// A time namespace whose clocks are set.
pub fn time_namespace() -> Answer {
    apart_in(CloneFlags::from_bits_retain(libc::CLONE_NEWTIME), || {
        let path = "/proc/self/timens_offsets";
        std::fs::write(path, "monotonic 1 0\nboottime 1 0\n").during("write", path)?;
        Ok(String::new())
    })
}

/// prctl(2) with PR_TIMER_CREATE_RESTORE_IDS: timer_create(2) takes a wish for the timer's id.
pub fn timer_ids() -> Answer {
    apart(|| {
        let wanted = 1234i32;
        let mut id = wanted;
        // SAFETY: numbers only.
        unsafe { sys::raw(libc::SYS_prctl, [sys::RESTORE_IDS.into(), 1, 0, 0, 0, 0]) }
            .during("prctl(PR_TIMER_CREATE_RESTORE_IDS)", "on")?;
        let at = (&raw mut id).expose_provenance() as u64;
        // SAFETY: the id lives for the call; without an event the kernel takes SIGALRM.
        unsafe { sys::raw(libc::SYS_timer_create, [libc::CLOCK_MONOTONIC as u64, 0, at, 0, 0, 0]) }
            .during("timer_create", "a timer with a chosen id")?;
        ensure(id == wanted, "timer_create gives another id than was asked for")?;
        Ok(String::new())
    })
}

/// membarrier(2) tells what a process is registered for.
pub fn membarrier_registrations() -> Answer {
    const GET_REGISTRATIONS: u64 = 1 << 9;
    // SAFETY: numbers only.
    unsafe { sys::raw(libc::SYS_membarrier, [GET_REGISTRATIONS, 0, 0, 0, 0, 0]) }
        .during("membarrier", "MEMBARRIER_CMD_GET_REGISTRATIONS")?;
    Ok(String::new())
}

/// The kernel maps its vDSO where it is told to: it refuses a second one as such. `abi` is ARCH_MAP_VDSO_64 or _32.
fn maps_vdso(abi: u64) -> Answer {
    apart(move || {
        // SAFETY: numbers only: there is a vDSO, so none is mapped.
        match unsafe { sys::raw(libc::SYS_arch_prctl, [abi, 1, 0, 0, 0, 0]) } {
            Ok(_) | Err(Errno::EEXIST) => Ok(String::new()),
            Err(errno) => Err(Absent::because(format!("arch_prctl(ARCH_MAP_VDSO): {}", errno.desc()))),
        }
    })
}

/// ARCH_MAP_VDSO_64.
pub fn vdso_64() -> Answer {
    maps_vdso(0x2003)
}

/// ARCH_MAP_VDSO_32, for 32-bit programs.
pub fn vdso_32() -> Answer {
    maps_vdso(0x2002)
}

/// A user namespace, in which the addresses of a process can be set.
pub fn user_namespace() -> Answer {
    apart_in(CloneFlags::CLONE_NEWUSER, || set_mm_map().map(|()| String::new()))
}

/// A cgroup namespace.
pub fn cgroup_namespace() -> Answer {
    apart_in(CloneFlags::CLONE_NEWCGROUP, || Ok(String::new()))
}

/// /proc/PID/task/TID/children: it shows a child.
pub fn children() -> Answer {
    let helper = Helper::start(|| Ok(()))?;
    let thread = nix::unistd::gettid();
    let known = proc::children(Pid::this(), thread)?.contains(&helper.pid());
    ensure(known, "/proc/PID/task/TID/children does not show a child")?;
    Ok(String::new())
}

/// The login uid of a process, by which audit knows it, can be written.
pub fn login_uid() -> Answer {
    apart(|| {
        let path = "/proc/self/loginuid";
        let uid = proc::read_text(path)?;
        std::fs::write(path, uid.trim()).during("write", path)?;
        Ok(String::new())
    })
}

/// /proc/PID/status shows a process's pid in each pid namespace.
pub fn ns_pid() -> Answer {
    let shown = proc::KeyValues::status(Pid::this(), Pid::this())?.get("NSpid").is_some();
    ensure(shown, "/proc/PID/status has no NSpid")?;
    Ok(String::new())
}
