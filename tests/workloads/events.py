"""eventfd, epoll, signalfd, timerfd and inotify, each with what is pending in it."""

import ctypes
import os
import select
import signal
import struct
import time

from lib import Child, call, case, check, equal, main, path

TFD_CLOEXEC, TFD_NONBLOCK = 0o2000000, 0o4000
CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_BOOTTIME = 0, 1, 7
EFD_SEMAPHORE, EFD_NONBLOCK = 1, 0o4000


def eventfd(value, flags=0):
    """eventfd(2)."""
    return call("eventfd", value, flags)


def read_number(fd):
    """Eight bytes as a number; None where reading would block."""
    try:
        return struct.unpack("Q", os.read(fd, 8))[0]
    except BlockingIOError:
        return None


@case
def event_counter():
    """The counter of an eventfd."""
    fd = eventfd(5)
    os.write(fd, struct.pack("Q", 37))
    yield
    equal(read_number(fd), 42, "counter")


@case
def event_flags():
    """A semaphore, a non-blocking one, and one that is nearly full."""
    semaphore = eventfd(3, EFD_SEMAPHORE | EFD_NONBLOCK)
    large = eventfd(0, EFD_NONBLOCK)
    os.write(large, struct.pack("Q", 0xFFFFFFFFFFFFFFFE))
    yield
    equal([read_number(semaphore) for _ in range(4)], [1, 1, 1, None], "the semaphore")
    equal(read_number(large), 0xFFFFFFFFFFFFFFFE, "the large one")


@case
def event_shared():
    """An eventfd between two processes."""
    fd = eventfd(0, EFD_NONBLOCK)

    def child():
        yield
        os.write(fd, struct.pack("Q", 9))

    process = Child(child())
    yield
    equal(read_number(fd), None, "counter before")
    process.finish()
    equal(read_number(fd), 9, "counter after")


class Epoll:
    """An epoll descriptor with any 64-bit data."""

    def __init__(self):
        self.fd = call("epoll_create1", 0)

    def control(self, operation, fd, events=0, data=0):
        """epoll_ctl(2)."""
        event = ctypes.create_string_buffer(struct.pack("=IQ", events, data))
        return call("epoll_ctl", self.fd, operation, fd, event)

    def wait(self, timeout=0):
        """The events, sorted by their data."""
        buffer = ctypes.create_string_buffer(12 * 64)
        count = call("epoll_wait", self.fd, buffer, 64, timeout)
        found = [struct.unpack_from("=IQ", buffer, 12 * n) for n in range(count)]
        return sorted((data, events) for events, data in found)


ADD, DELETE, MODIFY = 1, 2, 3
IN, OUT, HANGUP, ET, ONESHOT = 1, 4, 0x10, 1 << 31, 1 << 30


@case
def epoll_registrations():
    """What is watched, for what, and with which data; what was ready is ready."""
    epoll = Epoll()
    one, two = os.pipe(), os.pipe()
    os.write(one[1], b"x")
    epoll.control(ADD, one[0], IN, 0x1122334455667788)
    epoll.control(ADD, two[0], IN, 0xFFFFFFFFFFFFFFFF)
    epoll.control(ADD, two[1], OUT, 7)
    yield
    equal(epoll.wait(), [(7, OUT), (0x1122334455667788, IN)], "events")
    os.write(two[1], b"y")
    os.read(one[0], 1)
    equal(epoll.wait(), [(7, OUT), (0xFFFFFFFFFFFFFFFF, IN)], "events after a change")
    epoll.control(MODIFY, two[1], 0, 7)
    epoll.control(DELETE, two[0])
    equal(epoll.wait(), [], "events after another")


@case
def epoll_edge():
    """Edge-triggered and one-shot: a one-shot that has fired stays quiet until it is armed again."""
    epoll = Epoll()
    edge, once, fired = os.pipe(), os.pipe(), os.pipe()
    epoll.control(ADD, edge[0], IN | ET, 1)
    epoll.control(ADD, once[0], IN | ONESHOT, 2)
    epoll.control(ADD, fired[0], IN | ONESHOT, 3)
    os.write(fired[1], b"x")
    equal(epoll.wait(), [(3, IN)], "events before the dump")
    yield
    equal(epoll.wait(), [], "events at first")
    for pipe in (edge, once, fired):
        os.write(pipe[1], b"y")
    equal(epoll.wait(), [(1, IN), (2, IN)], "events")
    equal(epoll.wait(), [], "events once more")
    epoll.control(MODIFY, fired[0], IN | ONESHOT, 30)
    equal(epoll.wait(), [(30, IN)], "the one that was armed again")


@case
def epoll_nested():
    """An epoll descriptor in another one."""
    outer, inner = Epoll(), Epoll()
    pipe = os.pipe()
    inner.control(ADD, pipe[0], IN, 5)
    outer.control(ADD, inner.fd, IN, 6)
    yield
    equal(outer.wait(), [], "events before")
    os.write(pipe[1], b"x")
    equal(outer.wait(), [(6, IN)], "the outer one's events")
    equal(inner.wait(), [(5, IN)], "the inner one's events")


@case
def epoll_duplicate():
    """Registered under a number that is closed since: its duplicate keeps the registration alive."""
    epoll = Epoll()
    read_end, write_end = os.pipe()
    other = os.dup(read_end)
    epoll.control(ADD, read_end, IN, 1)
    os.close(read_end)
    yield
    os.write(write_end, b"x")
    equal(epoll.wait(), [(1, IN)], "events")
    os.read(other, 1)
    equal(epoll.wait(), [], "events after reading through the duplicate")


@case
def epoll_many():
    """A thousand eventfds in one epoll."""
    epoll = Epoll()
    fds = [eventfd(0) for _ in range(1000)]
    for n, fd in enumerate(fds):
        epoll.control(ADD, fd, IN, n)
    yield
    for n in (0, 500, 999):
        os.write(fds[n], struct.pack("Q", 1))
    equal(epoll.wait(), [(0, IN), (500, IN), (999, IN)], "events")


@case
def epoll_child():
    """A child has the epoll descriptor, its parent the watched pipe's other end."""
    epoll = Epoll()
    read_end, write_end = os.pipe()
    epoll.control(ADD, read_end, IN, 3)

    def child():
        yield
        equal(epoll.wait(5000), [(3, IN)], "the child's events")

    process = Child(child())
    yield
    os.write(write_end, b"x")
    process.finish()


def signal_set(*numbers):
    """A sigset_t."""
    return ctypes.create_string_buffer(struct.pack("Q", sum(1 << n - 1 for n in numbers)) + bytes(120))


@case
def signals():
    """A signalfd with a signal in it, and one that comes later."""
    wanted = {signal.SIGUSR1, signal.SIGRTMIN + 1}
    signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
    fd = call("signalfd", -1, signal_set(*wanted), TFD_NONBLOCK)
    os.kill(os.getpid(), signal.SIGUSR1)
    yield
    first = os.read(fd, 128)
    equal(struct.unpack_from("Iii", first)[0], signal.SIGUSR1, "the pending one")
    equal(struct.unpack_from("I", first, 12)[0], os.getpid(), "who sent it")
    os.kill(os.getpid(), signal.SIGRTMIN + 1)
    equal(struct.unpack_from("I", os.read(fd, 128))[0], signal.SIGRTMIN + 1, "the later one")
    check("sigmask:" in open(f"/proc/self/fdinfo/{fd}").read(), "it is no signalfd")


def timer(clock, value, interval=0.0, flags=0, absolute=False):
    """A timerfd that is armed."""
    fd = call("timerfd_create", clock, flags)

    def parts(seconds):
        return int(seconds), int((seconds - int(seconds)) * 1e9)

    spec = ctypes.create_string_buffer(struct.pack("4q", *parts(interval), *parts(value)))
    call("timerfd_settime", fd, 1 if absolute else 0, spec, None)
    return fd


def remaining(fd):
    """What is left of it, and its interval."""
    buffer = ctypes.create_string_buffer(32)
    call("timerfd_gettime", fd, buffer)
    seconds = struct.unpack("4q", buffer.raw)
    return seconds[2] + seconds[3] / 1e9, seconds[0] + seconds[1] / 1e9


@case
def timers():
    """timerfds on three clocks: armed, periodic, and not armed."""
    fds = [timer(clock, 500, 60.5, TFD_NONBLOCK) for clock in (CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_BOOTTIME)]
    quiet = call("timerfd_create", CLOCK_MONOTONIC, 0)
    yield
    for fd in fds:
        left, interval = remaining(fd)
        check(400 < left <= 500, f"{left} s are left of 500")
        check(abs(interval - 60.5) < 0.001, f"interval {interval}")
        equal(read_number(fd), None, "expirations")
    equal(remaining(quiet), (0, 0), "the one that stands still")


@case
def timer_expired():
    """Expirations that nobody has read yet, of a one-shot and of a periodic timer."""
    once = timer(CLOCK_MONOTONIC, 0.01, 0, TFD_NONBLOCK)
    often = timer(CLOCK_MONOTONIC, 0.01, 0.02, TFD_NONBLOCK)
    time.sleep(0.1)
    yield
    equal(read_number(once), 1, "expirations of the one-shot")
    check(read_number(often) >= 4, "expirations of the periodic one")
    time.sleep(0.1)
    equal(read_number(once), None, "expirations of the one-shot afterwards")
    check(read_number(often) >= 3, "it is no longer periodic")


@case
def timer_absolute():
    """Armed for a time of day, and for a time of the monotonic clock."""
    day = timer(CLOCK_REALTIME, time.time() + 1, 0, 0, True)
    mono = timer(CLOCK_MONOTONIC, time.clock_gettime(CLOCK_MONOTONIC) + 1, 0, 0, True)
    due, due_mono = time.time() + 1, time.clock_gettime(CLOCK_MONOTONIC) + 1
    yield
    equal(read_number(day), 1, "expirations")
    check(time.time() >= due - 0.05, "the time of day: early")
    equal(read_number(mono), 1, "expirations")
    check(time.clock_gettime(CLOCK_MONOTONIC) >= due_mono - 0.05, "the monotonic clock: early")


@case
def inotify_watches():
    """Watches on a file and a directory, with their numbers."""
    os.mkdir(path("dir"))
    open(path("file"), "w").close()
    fd = call("inotify_init1", 0o4000)
    wrong = call("inotify_add_watch", fd, path("dir").encode(), 0x100)
    call("inotify_rm_watch", fd, wrong)
    directory = call("inotify_add_watch", fd, path("dir").encode(), 0x100 | 0x200)
    file = call("inotify_add_watch", fd, path("file").encode(), 0x2)
    try:
        os.read(fd, 4096)
    except BlockingIOError:
        pass
    yield
    open(path("dir/new"), "w").close()
    with open(path("file"), "w") as out:
        out.write("x")
    data, events = os.read(fd, 4096), []
    while data:
        watch, mask, _, length = struct.unpack_from("iIII", data)
        events.append((watch, mask, data[16 : 16 + length].rstrip(b"\0")))
        data = data[16 + length :]
    equal((directory, 0x100, b"new") in events, True, f"creation in the directory, of {events}")
    equal((file, 0x2, b"") in events, True, f"modification of the file, of {events}")


@case
def inotify_pending():
    """Events that nobody has read yet: nothing can put them back, so the program is told that some were lost
    (IN_Q_OVERFLOW), as it is when its queue is full. Watches go on."""
    os.mkdir(path("dir"))
    fd = call("inotify_init1", 0o4000)
    quiet = call("inotify_init1", 0o4000)
    watch = call("inotify_add_watch", fd, path("dir").encode(), 0x100)
    call("inotify_add_watch", quiet, path("dir").encode(), 0x200)
    open(path("dir/early"), "w").close()
    yield
    data = os.read(fd, 4096)
    equal(struct.unpack_from("iI", data), (-1, 0x4000), "the event")
    equal(len(data), 16, "length of the events")
    open(path("dir/late"), "w").close()
    data = os.read(fd, 4096)
    equal(struct.unpack_from("iI", data), (watch, 0x100), "the later event")
    equal(data[16:].rstrip(b"\0"), b"late", "its name")
    try:
        check(not os.read(quiet, 4096), "events where nothing had happened")
    except BlockingIOError:
        pass


@case
def polled():
    """A child in poll on a pipe and an eventfd goes on waiting, and sees what happens later."""
    event = eventfd(0)
    pipe = os.pipe()
    pid = os.fork()
    if pid == 0:
        found = select.select([pipe[0], event], [], [], 60)[0]
        os._exit(0 if found == [event] else 1)
    time.sleep(0.1)
    yield
    os.write(event, struct.pack("Q", 1))
    equal(os.waitpid(pid, 0)[1], 0, "the child")


main()
