"""Who a process is, what it may do, and how much of it."""

import ctypes
import os
import resource
import signal
import struct

from lib import Child, call, case, check, equal, libc, main, syscall

PR_SET_KEEPCAPS, PR_GET_KEEPCAPS = 8, 7
PR_SET_SECUREBITS, PR_GET_SECUREBITS = 28, 27
PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS = 38, 39
PR_SET_TIMERSLACK, PR_GET_TIMERSLACK = 29, 30
PR_CAPBSET_DROP = 24
PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 47, 2
PR_SET_PDEATHSIG, PR_GET_PDEATHSIG = 1, 2
SYS_IOPRIO_SET, SYS_IOPRIO_GET, SYS_CAPSET, SYS_MEMBARRIER = 251, 252, 126, 324
CAPABILITY_VERSION_3 = 0x20080522


def status():
    """The fields of /proc/self/status."""
    return dict(line.rstrip("\n").split(":\t", 1) for line in open("/proc/self/status") if ":\t" in line)


def identity():
    """All that credentials consist of."""
    now = status()
    names = "Uid Gid Groups CapInh CapPrm CapEff CapBnd CapAmb NoNewPrivs Seccomp".split()
    return {name: now[name] for name in names} | {
        "securebits": call("prctl", PR_GET_SECUREBITS),
        "keepcaps": call("prctl", PR_GET_KEEPCAPS),
    }


def set_capabilities(effective, permitted, inheritable):
    """capset for this thread."""
    header = struct.pack("Ii", CAPABILITY_VERSION_3, 0)
    parts = [value >> shift & 0xFFFFFFFF for shift in (0, 32) for value in (effective, permitted, inheritable)]
    syscall(SYS_CAPSET, ctypes.create_string_buffer(header), ctypes.create_string_buffer(struct.pack("6I", *parts)))


def unchanged(setup):
    """A case that makes itself somebody and must be the same afterwards."""

    def body():
        setup()
        before = identity()
        yield
        equal(identity(), before, "credentials")

    body.__name__ = setup.__name__
    return case(body)


@unchanged
def other_ids():
    """Four different users and groups at once, and supplementary groups."""
    os.setgroups([5, 17, 100, 65534, 4000000])
    os.setresgid(1001, 1002, 1003)
    libc.setfsgid(1004)
    os.setresuid(1001, 0, 1003)
    libc.setfsuid(0)


@case
def ordinary_user():
    """A user without any capability."""
    os.chmod(os.environ["E2E_DIR"], 0o777)
    os.setgroups([100])
    os.setresgid(1000, 1000, 1000)
    os.setresuid(1000, 1000, 1000)
    # Giving up root makes a process undumpable; one that was started as a user is not.
    call("prctl", 4, 1, 0, 0, 0)
    before = identity()
    yield
    equal(identity(), before, "credentials")
    try:
        os.setuid(0)
    except PermissionError:
        return
    check(False, "it became root")


@unchanged
def capabilities():
    """Different sets in all five, and a smaller bounding set."""
    for dropped in (16, 22, 39):
        call("prctl", PR_CAPBSET_DROP, dropped)
    all_but = int(status()["CapPrm"], 16) & ~(1 << 25) & ~(1 << 16)
    set_capabilities(all_but & ~(1 << 13), all_but, 1 << 10 | 1 << 12)
    call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, 10, 0, 0)


@unchanged
def secure_bits():
    """NO_SETUID_FIXUP, KEEP_CAPS_LOCKED and NOROOT."""
    call("prctl", PR_SET_SECUREBITS, 0x04 | 0x20 | 0x01)


@unchanged
def keep_capabilities():
    """PR_SET_KEEPCAPS."""
    call("prctl", PR_SET_KEEPCAPS, 1)


@unchanged
def no_new_privileges():
    """PR_SET_NO_NEW_PRIVS."""
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


@case
def limits():
    """Resource limits, soft and hard, also below what is in use."""
    wanted = {
        resource.RLIMIT_NOFILE: (100, 200),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_STACK: (4 << 20, 16 << 20),
        resource.RLIMIT_NPROC: (5000, 6000),
        resource.RLIMIT_FSIZE: (1 << 30, 1 << 40),
        resource.RLIMIT_MEMLOCK: (1 << 16, 1 << 17),
        resource.RLIMIT_SIGPENDING: (500, 1000),
        resource.RLIMIT_RTPRIO: (0, 0),
        resource.RLIMIT_CPU: (10000, 20000),
    }
    fd = os.open("/dev/null", os.O_RDONLY)
    os.dup2(fd, 150)
    for which, (soft, hard) in wanted.items():
        limit = resource.getrlimit(which)[1]
        hard = hard if limit == resource.RLIM_INFINITY else min(hard, limit)
        resource.setrlimit(which, (min(soft, hard), hard))
    before = [resource.getrlimit(which) for which in range(16)]
    yield
    equal([resource.getrlimit(which) for which in range(16)], before, "limits")
    equal(os.readlink("/proc/self/fd/150"), "/dev/null", "the descriptor above the limit")


@case
def niceness():
    """Nice values, of a process and its child."""
    os.setpriority(os.PRIO_PROCESS, 0, 5)

    def child():
        os.setpriority(os.PRIO_PROCESS, 0, 11)
        yield
        equal(os.getpriority(os.PRIO_PROCESS, 0), 11, "the child's nice value")

    process = Child(child())
    yield
    equal(os.getpriority(os.PRIO_PROCESS, 0), 5, "the nice value")
    process.finish()


def policy(name, number, priority):
    """A case about one scheduling policy."""

    def body():
        os.sched_setscheduler(0, number, os.sched_param(priority))
        yield
        equal(os.sched_getscheduler(0), number, "policy")
        equal(os.sched_getparam(0).sched_priority, priority, "priority")

    body.__name__ = name
    return case(body)


policy("scheduled_fifo", os.SCHED_FIFO, 7)
policy("scheduled_round_robin", os.SCHED_RR, 9)
policy("scheduled_batch", os.SCHED_BATCH, 0)
policy("scheduled_idle", os.SCHED_IDLE, 0)
policy("scheduled_reset_on_fork", os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, 3)


@case
def affinity():
    """The processors it may run on."""
    last = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {last})
    yield
    equal(os.sched_getaffinity(0), {last}, "affinity")


@case
def io_priority():
    """Best effort, level 6."""
    wanted = 2 << 13 | 6
    syscall(SYS_IOPRIO_SET, 1, 0, wanted)
    yield
    equal(syscall(SYS_IOPRIO_GET, 1, 0), wanted, "I/O priority")


@case
def oom_score():
    """oom_score_adj, of a process and its child."""
    open("/proc/self/oom_score_adj", "w").write("500")

    def child():
        open("/proc/self/oom_score_adj", "w").write("777")
        yield
        equal(open("/proc/self/oom_score_adj").read().strip(), "777", "the child's")

    process = Child(child())
    yield
    equal(open("/proc/self/oom_score_adj").read().strip(), "500", "oom_score_adj")
    process.finish()


@case
def timer_slack():
    """The slack of its timers."""
    call("prctl", PR_SET_TIMERSLACK, 123456)
    yield
    equal(call("prctl", PR_GET_TIMERSLACK), 123456, "timer slack")


@case
def parent_death_signal():
    """A child that is to get a signal when its parent ends gets it."""

    def child():
        call("prctl", PR_SET_PDEATHSIG, signal.SIGUSR1)
        yield
        found = ctypes.c_int()
        call("prctl", PR_GET_PDEATHSIG, ctypes.byref(found))
        equal(found.value, signal.SIGUSR1, "the signal")

    process = Child(child())
    yield
    process.finish()


@case
def memory_barriers():
    """membarrier's registrations: a private expedited barrier needs one."""
    for command in (16, 64):
        syscall(SYS_MEMBARRIER, command, 0, 0)
    yield
    equal(syscall(SYS_MEMBARRIER, 8, 0, 0), 0, "private expedited")
    equal(syscall(SYS_MEMBARRIER, 32, 0, 0), 0, "private expedited, core serialising")


@case
def personality():
    """Address-space randomisation off, as a debugger leaves it."""
    call("personality", 0x0040000)
    yield
    equal(call("personality", 0xFFFFFFFF), 0x0040000, "personality")


@case
def name():
    """comm, with bytes that /proc/PID/stat makes hard to read."""
    call("prctl", 15, b") R 1 (\n\xff", 0, 0, 0)
    yield
    buffer = ctypes.create_string_buffer(16)
    call("prctl", 16, buffer, 0, 0, 0)
    equal(buffer.value, b") R 1 (\n\xff", "name")


main()
