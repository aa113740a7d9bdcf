"""Regular files, directories and devices, and the descriptors on them."""

import fcntl
import os
import signal
import stat
import struct
import time

from lib import Child, case, check, equal, main, path, wait_for

F_SETSIG, F_GETSIG, F_GETOWN_EX = 10, 11, 16
O_TMPFILE = 0o20200000
F_OFD_SETLK, F_OFD_GETLK = 37, 36
F_SETLEASE, F_GETLEASE = 1024, 1025


def make(name, content=b""):
    """A file with a content."""
    with open(path(name), "wb") as file:
        file.write(content)
    return path(name)


def flags(fd):
    """The status flags, without what the kernel adds."""
    return fcntl.fcntl(fd, fcntl.F_GETFL)


def position(fd):
    """Where a descriptor stands."""
    return os.lseek(fd, 0, os.SEEK_CUR)


def link(fd):
    """What /proc says is open."""
    return os.readlink(f"/proc/self/fd/{fd}")


def shares(one, other):
    """Whether two descriptors share one description: they then share its position."""
    before = position(one)
    os.lseek(one, before + 1, os.SEEK_SET)
    shared = position(other) == before + 1
    os.lseek(one, before, os.SEEK_SET)
    return shared


@case
def positions_and_flags():
    """The same file opened in many ways."""
    name = make("data", b"0123456789" * 1000)
    ways = [os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND, os.O_RDONLY | os.O_NONBLOCK,
            os.O_RDWR | os.O_SYNC, os.O_RDWR | os.O_DSYNC, os.O_RDONLY | os.O_NOATIME, os.O_RDONLY | os.O_NOFOLLOW]
    fds = [os.open(name, way) for way in ways]
    for n, fd in enumerate(fds):
        os.lseek(fd, 100 * n + 7, os.SEEK_SET)
    before = [flags(fd) for fd in fds]
    yield
    equal([flags(fd) for fd in fds], before, "flags")
    equal([position(fd) for fd in fds], [100 * n + 7 for n in range(len(fds))], "positions")
    os.write(fds[3], b"end")
    equal(open(name, "rb").read()[-3:], b"end", "what was appended")
    equal(os.path.getsize(name), 10003, "the size")


@case
def far_positions():
    """Beyond 4 GiB, and beyond the end."""
    fd = os.open(make("data", b"x"), os.O_RDWR)
    os.ftruncate(fd, 5 << 30)
    os.lseek(fd, (6 << 30) + 1, os.SEEK_SET)
    yield
    equal(position(fd), (6 << 30) + 1, "position")


@case
def high_numbers():
    """Descriptors with large numbers and gaps between them."""
    fd = os.open(make("data", b"abc"), os.O_RDONLY)
    for number in (10, 63, 64, 65, 255, 256, 800):
        os.dup2(fd, number)
    yield
    for number in (10, 63, 64, 65, 255, 256, 800):
        equal(link(number), path("data"), f"descriptor {number}")
    equal(sorted(int(n) for n in os.listdir("/proc/self/fd"))[-7:], [10, 63, 64, 65, 255, 256, 800], "numbers")


@case
def unlinked():
    """Open, but without a name: the content is kept, with its holes, and stays nameless."""
    name = make("data")
    fd = os.open(name, os.O_RDWR)
    os.pwrite(fd, b"start", 0)
    os.pwrite(fd, b"end", 64 << 20)
    os.fchmod(fd, 0o640)
    os.lseek(fd, 3, os.SEEK_SET)
    os.unlink(name)
    yield
    equal(os.fstat(fd).st_nlink, 0, "names")
    equal(os.fstat(fd).st_size, (64 << 20) + 3, "size")
    equal(os.pread(fd, 5, 0), b"start", "the start")
    equal(os.pread(fd, 4, (64 << 20) - 1), b"\0end", "the end")
    equal(position(fd), 3, "position")
    equal(stat.S_IMODE(os.fstat(fd).st_mode), 0o640, "mode")
    check(os.fstat(fd).st_blocks < 2048, f"the hole was filled: {os.fstat(fd).st_blocks} blocks")
    check(not os.path.exists(name), "it has a name again")


@case
def unlinked_of_two():
    """One nameless file that two processes opened separately."""
    name = make("data", b"content")
    one = os.open(name, os.O_RDWR)

    def child():
        two = os.open(name, os.O_RDWR)
        yield
        equal(os.pread(two, 7, 0), b"content", "the child's view")
        os.pwrite(two, b"CHILD", 0)

    process = Child(child())
    os.unlink(name)
    yield
    process.finish()
    equal(os.pread(one, 7, 0), b"CHILDnt", "still one file")


@case
def unlinked_large():
    """Two megabytes without a name."""
    fd = os.open(make("data", b"0123456789abcdef" * (2 << 16)), os.O_RDWR)
    os.unlink(path("data"))
    yield
    equal(os.pread(fd, 3 << 20, 0), b"0123456789abcdef" * (2 << 16), "content")


@case
def unlinked_link():
    """A symbolic link that was removed while somebody held it."""
    os.symlink("nowhere", path("link"))
    fd = os.open(path("link"), os.O_PATH | os.O_NOFOLLOW)
    os.unlink(path("link"))
    yield
    equal(os.readlink("", dir_fd=fd), "nowhere", "where it points")
    check(not os.path.lexists(path("link")), "it has a name again")


@case
def unlinked_below():
    """A file whose directory was removed with it."""
    os.makedirs(path("one/two"))
    fd = os.open(make("one/two/data", b"content"), os.O_RDWR)
    name = os.open(path("one/two"), os.O_PATH | os.O_DIRECTORY)
    os.unlink(path("one/two/data"))
    os.rmdir(path("one/two"))
    os.rmdir(path("one"))
    yield
    equal(os.pread(fd, 7, 0), b"content", "content")
    equal(link(fd), path("one/two/data (deleted)"), "name")
    equal(link(name), path("one/two (deleted)"), "name of the directory")
    check(not os.path.exists(path("one")), "the directory is there again")


@case
def unlinked_surroundings():
    """A working directory that was removed."""
    os.mkdir(path("gone"))
    os.chdir(path("gone"))
    os.rmdir(path("gone"))
    yield
    equal(os.readlink("/proc/self/cwd"), path("gone (deleted)"), "working directory")
    check(not os.path.exists(path("gone")), "the directory is there again")


@case
def temporary():
    """O_TMPFILE: a file that never had a name."""
    fd = os.open(os.environ["E2E_DIR"], O_TMPFILE | os.O_RDWR, 0o600)
    os.write(fd, b"content")
    yield
    equal(os.pread(fd, 7, 0), b"content", "content")
    equal(position(fd), 7, "position")


@case
def unlinked_directory():
    """A directory that was removed while it was open, and is somebody's working directory."""
    os.mkdir(path("gone"))
    fd = os.open(path("gone"), os.O_RDONLY | os.O_DIRECTORY)
    os.rmdir(path("gone"))
    yield
    equal(stat.S_ISDIR(os.fstat(fd).st_mode), True, "a directory")
    check(not os.path.exists(path("gone")), "it has a name again")


@case
def other_name():
    """Renamed while open: it is found under the new name."""
    fd = os.open(make("data", b"content"), os.O_RDWR)
    os.rename(path("data"), path("renamed"))
    yield
    equal(link(fd), path("renamed"), "name")
    equal(os.pread(fd, 7, 0), b"content", "content")


@case
def replaced():
    """Replaced by another of the same name while open: the old one is what is open."""
    fd = os.open(make("data", b"the old one"), os.O_RDWR)
    make("other", b"the new one")
    os.rename(path("other"), path("data"))
    yield
    equal(os.pread(fd, 11, 0), b"the old one", "what is open")
    equal(open(path("data"), "rb").read(), b"the new one", "what has the name")


@case
def hard_link():
    """The name it was opened by is gone, another one is there (needs --link-remap)."""
    name = make("data", b"content")
    os.link(name, path("other name"))
    fd = os.open(name, os.O_RDWR)
    os.unlink(name)
    yield
    equal(os.pread(fd, 7, 0), b"content", "content")
    os.pwrite(fd, b"CON", 0)
    equal(open(path("other name"), "rb").read(), b"CONtent", "still one file with the other name")
    check(not os.path.exists(name), "the first name is there again")


@case
def hard_link_and_lock():
    """The same, and something that is refused."""
    name = make("data", b"content")
    os.link(name, path("other name"))
    fd = os.open(name, os.O_RDWR)
    os.unlink(name)
    fcntl.flock(fd, fcntl.LOCK_EX)
    yield
    equal(os.pread(fd, 7, 0), b"content", "content")


@case
def directory():
    """A directory, read halfway."""
    os.mkdir(path("many"))
    for n in range(300):
        make(f"many/{n}")
    fd = os.open(path("many"), os.O_RDONLY | os.O_DIRECTORY)
    yield
    equal(len(os.listdir(fd)), 300, "entries")
    equal(link(fd), path("many"), "name")
    equal(os.readlink("/proc/self/cwd"), os.environ["E2E_DIR"], "the working directory")


@case
def path_only():
    """O_PATH descriptors: a file, a directory, and a symbolic link itself."""
    name = make("data", b"content")
    os.symlink("data", path("link"))
    fds = [os.open(name, os.O_PATH), os.open(os.environ["E2E_DIR"], os.O_PATH | os.O_DIRECTORY)]
    before = [flags(fd) for fd in fds]
    yield
    equal([flags(fd) for fd in fds], before, "flags")
    equal(link(fds[0]), name, "name")
    equal(os.open("data", os.O_RDONLY, dir_fd=fds[1]) > 2, True, "opening below it")
    try:
        os.read(fds[0], 1)
    except OSError:
        return
    check(False, "an O_PATH descriptor can be read")


@case
def path_only_link():
    """O_PATH | O_NOFOLLOW on a symbolic link."""
    os.symlink("nowhere", path("link"))
    fd = os.open(path("link"), os.O_PATH | os.O_NOFOLLOW)
    yield
    equal(stat.S_ISLNK(os.fstat(fd).st_mode), True, "a link")
    equal(os.readlink("", dir_fd=fd), "nowhere", "where it points")


@case
def surroundings():
    """Working directory, umask, and those of a child; a directory name with blanks and newlines."""
    os.mkdir(path("a dir\n with (deleted)"))
    os.chdir(path("a dir\n with (deleted)"))
    os.umask(0o027)

    def child():
        os.chdir("/proc")
        os.umask(0o777)
        yield
        equal(os.getcwd(), "/proc", "the child's working directory")
        equal(os.umask(0), 0o777, "the child's umask")

    process = Child(child())
    yield
    equal(os.getcwd(), path("a dir\n with (deleted)"), "working directory")
    equal(os.umask(0), 0o027, "umask")
    process.finish()


@case
def other_root():
    """A child in a chroot."""
    os.mkdir(path("jail"))
    os.mkdir(path("jail/inside"))

    pid = os.fork()
    if pid == 0:
        os.chroot(path("jail"))
        os.chdir("/inside")
        for _ in range(60000):
            time.sleep(0.005)
            if os.path.exists("/told"):
                os._exit(0 if os.getcwd() == "/inside" and sorted(os.listdir("/")) == ["inside", "told"] else 1)
        os._exit(2)
    wait_for(lambda: os.readlink(f"/proc/{pid}/root") == path("jail"), "the chroot")
    yield
    equal(os.readlink(f"/proc/{pid}/root"), path("jail"), "the child's root")
    equal(os.readlink(f"/proc/{pid}/cwd"), path("jail/inside"), "the child's working directory")
    make("jail/told")
    equal(os.waitpid(pid, 0)[1], 0, "the child in the jail")


@case
def devices():
    """The character devices that everybody has open."""
    fds = [os.open(f"/dev/{name}", os.O_RDWR) for name in ("null", "zero", "full", "random", "urandom")]
    yield
    equal(os.write(fds[0], b"x"), 1, "/dev/null")
    equal(os.read(fds[0], 1), b"", "/dev/null")
    equal(os.read(fds[1], 4), bytes(4), "/dev/zero")
    try:
        os.write(fds[2], b"x")
        check(False, "/dev/full took a byte")
    except OSError as error:
        equal(error.errno, 28, "/dev/full")
    equal(len(os.read(fds[3], 8)), 8, "/dev/random")
    equal(len(os.read(fds[4], 8)), 8, "/dev/urandom")


@case
def proc_files():
    """Files of /proc: its own, and the system's."""
    own = os.open("/proc/self/status", os.O_RDONLY)
    version = os.open("/proc/version", os.O_RDONLY)
    os.read(version, 5)
    folder = os.open("/proc/self", os.O_RDONLY | os.O_DIRECTORY)
    yield
    check(f"Pid:\t{os.getpid()}\n" in os.pread(own, 4096, 0).decode(), "its own status")
    equal(position(version), 5, "position in /proc/version")
    check("fd" in os.listdir(folder), "its own directory")


@case
def duplicates():
    """Duplicated descriptors share one description; the same file opened twice does not."""
    name = make("data", b"0123456789")
    one = os.open(name, os.O_RDWR)
    two = os.dup(one)
    three = os.open(name, os.O_RDWR)
    os.set_inheritable(two, True)
    yield
    check(shares(one, two), "the duplicate is a description of its own")
    check(not shares(one, three), "two descriptions have become one")
    equal([os.get_inheritable(fd) for fd in (one, two, three)], [False, True, False], "close-on-exec")


@case
def shared_across_fork():
    """Parent, child and grandchild have one description."""
    fd = os.open(make("data", b"0123456789"), os.O_RDWR)
    own = os.open(path("data"), os.O_RDWR)

    def grandchild():
        yield
        equal(os.read(fd, 3), b"012", "the grandchild's reading")

    def child():
        mine = os.dup2(fd, 77)
        process = Child(grandchild())
        yield
        process.finish()
        equal(os.read(mine, 3), b"345", "the child's reading")

    process = Child(child())
    yield
    process.finish()
    equal(os.read(fd, 3), b"678", "the parent's reading")
    equal(os.read(own, 3), b"012", "another description")


@case
def close_on_exec():
    """Closed by exec where it was marked, after the restore."""
    one, two = (os.open(make("data"), os.O_RDONLY) for _ in range(2))
    os.set_inheritable(two, True)
    yield
    pid = os.fork()
    if pid == 0:
        os.execv("/bin/sh", ["sh", "-c", f"test ! -e /proc/self/fd/{one} && test -e /proc/self/fd/{two}"])
    equal(os.waitpid(pid, 0)[1], 0, "what exec left open")


@case
def owner():
    """F_SETOWN, F_SETOWN_EX and F_SETSIG."""
    import socket

    one, two = socket.socketpair()
    fcntl.fcntl(one, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(one, F_SETSIG, signal.SIGRTMIN + 4)
    fcntl.fcntl(two, fcntl.F_SETOWN, -os.getpgrp())
    yield
    equal(fcntl.fcntl(one, fcntl.F_GETOWN), os.getpid(), "owner")
    equal(fcntl.fcntl(one, F_GETSIG), signal.SIGRTMIN + 4, "signal")
    equal(struct.unpack("ii", fcntl.fcntl(two, F_GETOWN_EX, bytes(8))), (2, os.getpgrp()), "owner group")


@case
def owner_of_pipe():
    """An owner that was set on behalf of another user, a signal without an owner, and signals that are asked for."""
    F_GETOWNER_UIDS = 17
    one, two = os.pipe()
    os.seteuid(1234)
    fcntl.fcntl(one, fcntl.F_SETOWN, os.getpid())
    os.seteuid(0)
    signal.signal(signal.SIGRTMIN + 4, lambda number, frame: None)
    fcntl.fcntl(one, F_SETSIG, signal.SIGRTMIN + 4)
    fcntl.fcntl(one, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    fcntl.fcntl(two, F_SETSIG, signal.SIGUSR1)
    yield
    equal(fcntl.fcntl(one, fcntl.F_GETOWN), os.getpid(), "owner")
    equal(struct.unpack("II", fcntl.fcntl(one, F_GETOWNER_UIDS, bytes(8))), (0, 1234), "uids of the owner")
    equal(fcntl.fcntl(two, F_GETSIG), signal.SIGUSR1, "signal without an owner")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGRTMIN + 4})
    os.write(two, b"x")
    equal(signal.sigtimedwait({signal.SIGRTMIN + 4}, 5) is not None, True, "the signal came")


@case
def proc_files_shared():
    """A file of /proc of a child that parent and child share."""

    def child():
        fd = os.open("/proc/self/stat", os.O_RDONLY)
        os.dup2(fd, 50)
        os.read(fd, 3)
        check(shares(fd, 50), "before")
        yield
        check(shares(fd, 50), "the duplicate is a description of its own")
        equal(position(fd), 3, "position")
        check(os.pread(fd, 100, 0).startswith(b"%d " % os.getpid()), "whose file it is")

    process = Child(child())
    theirs = os.open(f"/proc/{process.pid}/comm", os.O_RDONLY)
    again = os.dup(theirs)

    def other():
        yield
        check(os.pread(again, 100, 0).startswith(b"python"), "the other child's view")

    second = Child(other())
    yield
    os.lseek(theirs, 2, os.SEEK_SET)
    equal(position(again), 2, "position")
    second.finish()
    process.finish()


def lock_of(fd, kind=fcntl.F_WRLCK, start=0, length=0, command=fcntl.F_GETLK):
    """Who would be in the way of a lock."""
    asked = struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0)
    kind, _, start, length, pid = struct.unpack("hhqqi4x", fcntl.fcntl(fd, command, asked))
    return kind, start, length, pid


@case
def posix_locks():
    """POSIX locks of two processes on ranges of one file (needs --file-locks)."""
    name = make("data", bytes(1000))
    fd = os.open(name, os.O_RDWR)
    fcntl.lockf(fd, fcntl.LOCK_EX, 100, 10)

    def child():
        mine = os.open(name, os.O_RDWR)
        fcntl.lockf(mine, fcntl.LOCK_SH, 50, 300)
        yield
        equal(lock_of(mine, start=0, length=200), (fcntl.F_WRLCK, 10, 100, os.getppid()), "the parent's lock")

    process = Child(child())
    yield
    equal(lock_of(fd, start=200, length=200), (fcntl.F_RDLCK, 300, 50, process.pid), "the child's lock")
    process.finish()


@case
def flock_locks():
    """flock: of the description, shared by parent and child."""
    name = make("data")
    fd = os.open(name, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)

    def child():
        yield
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        other = os.open(name, os.O_RDWR)
        try:
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        check(False, "the lock is gone")

    process = Child(child())
    yield
    process.finish()


@case
def ofd_locks():
    """Open-file-description locks."""
    name = make("data", bytes(100))
    fd = os.open(name, os.O_RDWR)
    other = os.open(name, os.O_RDWR)
    fcntl.fcntl(fd, F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 20, 30, 0))
    yield
    equal(lock_of(other, command=F_OFD_GETLK), (fcntl.F_WRLCK, 20, 30, -1), "the lock")


@case
def lease():
    """A lease: its holder is asked before others may open."""
    name = make("data")
    fd = os.open(name, os.O_RDONLY)
    fcntl.fcntl(fd, F_SETLEASE, fcntl.F_RDLCK)
    yield
    equal(fcntl.fcntl(fd, F_GETLEASE), fcntl.F_RDLCK, "lease")


@case
def waits():
    """A file and nothing else: what the refusals are tried on."""
    fd = os.open(make("data", b"content"), os.O_RDONLY)
    yield
    equal(os.read(fd, 7), b"content", "content")


main()
