"""The shape of a process tree: sessions, groups, parents, and the dead that nobody has buried yet."""

import ctypes
import os
import signal
import time

from lib import Child, call, case, check, equal, main, path, syscall, touch, wait_for

PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37


def place(pid=0):
    """Parent, process group and session."""
    words = open(f"/proc/{pid or 'self'}/stat").read().rsplit(") ", 1)[1].split()
    return tuple(int(word) for word in words[1:4])


def stays(setup=lambda: None):
    """A child that must find itself in the same place."""
    setup()
    before = place()
    yield
    equal(place(), before, "parent, group, session")


@case
def family():
    """Three generations, seven processes."""

    def parent_of(children):
        processes = [Child(parent_of(below)) for below in children]
        before = place()
        yield
        equal(place(), before, "parent, group, session")
        for process in processes:
            process.finish()

    yield from parent_of([[[], []], [], [[]]])


@case
def sessions_and_groups():
    """Children in their own groups, in each other's groups, and in their own sessions."""
    leader = Child(stays(lambda: os.setpgid(0, 0)))
    member = Child(stays(lambda: os.setpgid(0, leader.pid)))
    own_session = Child(stays(os.setsid))

    def with_group():
        os.setsid()
        inner = Child(stays(lambda: os.setpgid(0, 0)))
        before = place()
        yield
        equal(place(), before, "parent, group, session")
        inner.finish()

    session_with_group = Child(with_group())
    yield
    for process in (leader, member, own_session, session_with_group):
        process.finish()


@case
def group_without_leader():
    """A process group whose leader is gone: its number lives on in the members."""
    leader = os.fork()
    if leader == 0:
        os.setpgid(0, 0)
        wait_for(lambda: os.path.exists(path("leader-ends")), "the member")
        os._exit(0)
    wait_for(lambda: place(leader)[1] == leader, "the leader's group")
    member = Child(stays(lambda: os.setpgid(0, leader)))
    touch("leader-ends")
    os.waitpid(leader, 0)
    yield
    equal(place(member.pid)[1], leader, "the member's group")
    member.finish()


@case
def session_without_leader():
    """A session whose leader is gone, as a daemon's is."""
    # Before there is anybody who could lose its parent.
    call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    outer = os.fork()
    if outer == 0:
        os.setsid()
        leader = os.getpid()
        inner = os.fork()
        if inner == 0:
            wait_for(lambda: os.getppid() != leader, "the session leader's end")
            before = place()
            with open(path("place"), "w") as out:
                out.write(f"{os.getpid()} {before}")
            os.rename(path("place"), path("placed"))
            wait_for(lambda: os.path.exists(path("told")), "the word to go on")
            os._exit(0 if place() == before else 1)
        os._exit(0)
    os.waitpid(outer, 0)
    wait_for(lambda: os.path.exists(path("placed")), "the daemon")
    pid = int(open(path("placed")).read().split()[0])
    yield
    equal(place(pid)[1:], (outer, outer), "the daemon's group and session")
    touch("told")
    equal(os.waitpid(pid, 0)[1], 0, "the daemon's status")


@case
def own_exit_signal():
    """A child whose end is told by another signal than SIGCHLD, as clone(2) allows."""
    signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    heard = []
    pid = syscall(56, signal.SIGUSR1, 0, 0, 0, 0)  # clone: a fork with that signal
    if pid == 0:
        wait_for(lambda: os.path.exists(path("told")), "the word to end")
        os._exit(4)
    yield
    touch("told")
    wait_for(lambda: heard, "the signal of its end")
    equal(os.waitpid(pid, 0x40000000)[1], 4 << 8, "its status")  # __WALL


@case
def zombies():
    """The dead with their statuses: an exit code, a signal, a core-less signal, of a child and of a grandchild."""

    def dead(end):
        pid = os.fork()
        if pid == 0:
            end()
            os._exit(99)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return pid

    def parent():
        pid = dead(lambda: os._exit(3))
        yield
        equal(os.waitpid(pid, 0), (pid, 3 << 8), "the grandchild")

    ends = [lambda: os._exit(0), lambda: os._exit(77), lambda: os.kill(os.getpid(), signal.SIGKILL),
            lambda: os.kill(os.getpid(), signal.SIGUSR1)]
    dead_children = [dead(end) for end in ends]
    process = Child(parent())
    yield
    statuses = [os.waitpid(pid, 0)[1] for pid in dead_children]
    equal(statuses, [0, 77 << 8, signal.SIGKILL, signal.SIGUSR1], "statuses")
    process.finish()


@case
def zombie_in_group():
    """A dead group leader with living members."""
    leader = os.fork()
    if leader == 0:
        os.setpgid(0, 0)
        wait_for(lambda: os.path.exists(path("leader-ends")), "the member")
        os._exit(5)
    wait_for(lambda: place(leader)[1] == leader, "the leader's group")
    member = Child(stays(lambda: os.setpgid(0, leader)))
    touch("leader-ends")
    os.waitid(os.P_PID, leader, os.WEXITED | os.WNOWAIT)
    yield
    member.finish()
    equal(os.waitpid(leader, 0), (leader, 5 << 8), "the leader's status")


@case
def subreaper():
    """A child subreaper gets the orphans of its descendants."""
    call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def child():
        yield
        orphan = os.fork()
        if orphan == 0:
            time.sleep(0.3)
            os._exit(44)
        touch(f"orphan.{orphan}")

    process = Child(child())
    yield
    found = ctypes.c_int()
    call("prctl", PR_GET_CHILD_SUBREAPER, ctypes.byref(found), 0, 0, 0)
    equal(found.value, 1, "the setting")
    process.finish()
    orphan = int(next(name for name in os.listdir(path("")) if name.startswith("orphan.")).split(".")[1])
    equal(os.waitpid(orphan, 0), (orphan, 44 << 8), "the orphan")


@case
def many():
    """Sixty children."""
    children = [Child(stays(), wait=False) for _ in range(60)]
    for child in children:
        child.wait_ready()
    yield
    for child in children:
        child.finish()


@case
def waiting_parent():
    """A parent in waitpid goes on waiting, and gets the status."""
    pid = os.fork()
    if pid == 0:
        inner = os.fork()
        if inner == 0:
            wait_for(lambda: os.path.exists(path("told")), "the word to end")
            os._exit(21)
        os._exit(0 if os.waitpid(inner, 0)[1] == 21 << 8 else 1)
    wait_for(lambda: open(f"/proc/{pid}/syscall").read().startswith("61 "), "the parent to wait")
    yield
    touch("told")
    equal(os.waitpid(pid, 0)[1], 0, "what the parent got")


@case
def executes():
    """Programs are started afterwards: the address space can still be replaced."""
    pid = os.fork()
    if pid == 0:
        os.execv("/bin/sh", ["sh", "-c", f"while test ! -e '{path('told')}'; do sleep 0.01; done; exec test 3 -gt 2"])
    wait_for(lambda: "sh" in open(f"/proc/{pid}/comm").read(), "the shell")
    yield
    touch("told")
    equal(os.waitpid(pid, 0)[1], 0, "the shell")


@case
def next_child():
    """Children made afterwards get pids that are not taken."""
    process = Child(stays())
    yield
    later = [os.fork() or os._exit(0) for _ in range(20)]
    check(process.pid not in later and len(set(later)) == 20, f"pids {later}")
    for pid in later:
        os.waitpid(pid, 0)
    process.finish()


@case
def cgroup_member():
    """A child in a cgroup of its own, made by the harness."""

    def child():
        name = open(path("cgroup")).read().strip()
        with open(os.path.join(name, "cgroup.procs"), "w") as procs:
            procs.write(str(os.getpid()))
        before = open("/proc/self/cgroup").read()
        yield
        equal(open("/proc/self/cgroup").read(), before, "cgroups")

    process = Child(child())
    before = open("/proc/self/cgroup").read()
    yield
    equal(open("/proc/self/cgroup").read(), before, "cgroups of the parent")
    process.finish()


main()
