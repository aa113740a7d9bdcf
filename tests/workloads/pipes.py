"""Pipes and FIFOs."""

import fcntl
import os
import select
import signal

from lib import Child, case, check, equal, main, path, wait_for

O_DIRECT = 0o40000


def size(fd):
    """The capacity of a pipe."""
    return fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)


def fill(fd):
    """Writes until nothing more fits, and says how much did."""
    os.set_blocking(fd, False)
    total = 0
    try:
        while True:
            total += os.write(fd, bytes(n % 251 for n in range(total, total + 1000)))
    except BlockingIOError:
        return total


@case
def content():
    """What is in a pipe comes out of it, then what is written later."""
    read_end, write_end = os.pipe()
    os.write(write_end, b"first ")
    os.write(write_end, b"second")
    yield
    os.write(write_end, b" third")
    equal(os.read(read_end, 100), b"first second third", "content")


@case
def empty():
    """An empty one."""
    read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    yield
    try:
        check(not os.read(read_end, 1), "something is in it")
        check(False, "end of file although the other end is open")
    except BlockingIOError:
        pass
    os.write(write_end, b"x")
    equal(os.read(read_end, 2), b"x", "content")
    equal([os.get_inheritable(fd) for fd in (read_end, write_end)], [False, False], "close-on-exec")


@case
def full():
    """A pipe that nothing more goes into; it is exactly as full as it was."""
    read_end, write_end = os.pipe()
    total = fill(write_end)
    yield
    equal(bool(select.select([], [write_end], [], 0)[1]), False, "there is room")
    os.set_blocking(read_end, False)
    found = b""
    try:
        while True:
            found += os.read(read_end, 65536)
    except BlockingIOError:
        pass
    equal(len(found), total, "bytes")
    equal(found == bytes(n % 251 for n in range(total)), True, "content")


@case
def larger():
    """F_SETPIPE_SZ to 1 MiB, filled."""
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 1 << 20)
    total = fill(write_end)
    check(total > 500000, f"{total} bytes in it before the dump")
    yield
    equal(size(read_end), 1 << 20, "capacity")
    found = 0
    os.set_blocking(read_end, False)
    try:
        while True:
            found += len(os.read(read_end, 1 << 20))
    except BlockingIOError:
        pass
    equal(found, total, "bytes")


@case
def smaller():
    """F_SETPIPE_SZ to one page."""
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    os.write(write_end, b"x" * 4096)
    yield
    equal(size(read_end), 4096, "capacity")
    equal(os.read(read_end, 5000), b"x" * 4096, "content")


@case
def packets():
    """Packet mode (O_DIRECT): what was written in one piece is read in one piece."""
    read_end, write_end = os.pipe2(O_DIRECT)
    for packet in (b"one", b"two and more", b"x" * 3000):
        os.write(write_end, packet)
    yield
    equal(os.read(read_end, 5000), b"one", "the first packet")
    equal(os.read(read_end, 3), b"two", "a packet's start: the rest of it is dropped")
    equal(os.read(read_end, 5000), b"x" * 3000, "the third packet")
    check(fcntl.fcntl(write_end, fcntl.F_GETFL) & O_DIRECT, "packet mode is off")


@case
def pieces():
    """Written in pieces that do not fill pages: it is the pieces that make a pipe full."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    os.set_blocking(read_end, False)
    count = 0
    try:
        while os.write(write_end, bytes([count]) * 3000):
            count += 1
    except BlockingIOError:
        pass
    check(count >= 16, f"{count} pieces in it before the dump")
    yield
    try:
        check(not os.write(write_end, b"x" * 3000), "there is room")
    except BlockingIOError:
        pass
    equal(os.read(read_end, 3000), bytes(3000), "the first piece")
    equal(os.write(write_end, b"x" * 3000), 3000, "room for one more")
    found = b""
    try:
        while True:
            found += os.read(read_end, 65536)
    except BlockingIOError:
        pass
    equal(found, b"".join(bytes([n]) * 3000 for n in range(1, count)) + b"x" * 3000, "content")


@case
def small_packets():
    """Packets of one byte whose writer is gone, and something that is no packet between them."""
    read_end, write_end = os.pipe2(O_DIRECT)
    for packet in (b"1", b"2"):
        os.write(write_end, packet)
    fcntl.fcntl(write_end, fcntl.F_SETFL, 0)
    os.write(write_end, b"plain")
    os.write(write_end, b" text")
    fcntl.fcntl(write_end, fcntl.F_SETFL, O_DIRECT)
    os.write(write_end, b"3")
    os.close(write_end)
    yield
    equal([os.read(read_end, 100) for _ in range(4)], [b"1", b"2", b"plain text3", b""], "what is read at once")


@case
def only_read_end():
    """The writer is gone: what it left is read, then comes the end of file."""
    read_end, write_end = os.pipe()
    os.write(write_end, b"legacy")
    os.close(write_end)
    yield
    equal(os.read(read_end, 100), b"legacy", "content")
    equal(os.read(read_end, 100), b"", "the end of file")


@case
def only_write_end():
    """The reader is gone: writing is an error."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    read_end, write_end = os.pipe()
    os.close(read_end)
    yield
    try:
        os.write(write_end, b"x")
    except BrokenPipeError:
        return
    check(False, "writing to a pipe without a reader worked")


@case
def across_processes():
    """From a child to its parent; when the child ends the parent sees the end of file."""
    read_end, write_end = os.pipe()

    def child():
        os.close(read_end)
        os.write(write_end, b"before ")
        yield
        os.write(write_end, b"after")

    process = Child(child())
    os.close(write_end)
    yield
    process.finish()
    data = b""
    while part := os.read(read_end, 100):
        data += part
    equal(data, b"before after", "content")


@case
def pipeline():
    """Five processes, each passing on what comes from the one before."""
    first_read, first_write = os.pipe()
    read_end, children = first_read, []
    for number in range(5):
        next_read, next_write = os.pipe()

        def child(source=read_end, sink=next_write, n=number):
            yield
            data = os.read(source, 100)
            os.write(sink, data + b"%d" % n)

        children.append(Child(child()))
        os.close(read_end)
        os.close(next_write)
        read_end = next_read
    os.write(first_write, b">")
    yield
    for process in children:
        process.finish()
    equal(os.read(read_end, 100), b">01234", "what came through")


@case
def blocked_reader():
    """A child that waits in read goes on waiting, and gets what is written later."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write_end)
        os._exit(0 if os.read(read_end, 10) == b"at last" else 1)
    os.close(read_end)
    wait_for(lambda: open(f"/proc/{pid}/syscall").read().startswith("0 "), "the child to wait in read")
    yield
    os.write(write_end, b"at last")
    equal(os.waitpid(pid, 0)[1], 0, "the child")


@case
def reopened():
    """One pipe, opened again through /proc: three descriptions."""
    read_end, write_end = os.pipe()
    again = os.open(f"/proc/self/fd/{read_end}", os.O_RDONLY | os.O_NONBLOCK)
    os.write(write_end, b"abcdef")
    yield
    equal(os.read(again, 3), b"abc", "through the second reader")
    equal(os.read(read_end, 3), b"def", "through the first")
    check(fcntl.fcntl(again, fcntl.F_GETFL) & os.O_NONBLOCK, "the second is no longer non-blocking")
    check(not fcntl.fcntl(read_end, fcntl.F_GETFL) & os.O_NONBLOCK, "the first has become non-blocking")


@case
def fifo():
    """A FIFO open at both ends, with content."""
    os.mkfifo(path("fifo"))
    read_end = os.open(path("fifo"), os.O_RDONLY | os.O_NONBLOCK)
    write_end = os.open(path("fifo"), os.O_WRONLY)
    os.write(write_end, b"content")
    yield
    equal(os.read(read_end, 100), b"content", "content")
    os.write(write_end, b"more")
    other = os.open(path("fifo"), os.O_RDONLY | os.O_NONBLOCK)
    equal(os.read(other, 100), b"more", "by its name it is the same")


@case
def fifo_both_ways():
    """A FIFO opened for reading and writing at once."""
    os.mkfifo(path("fifo"))
    fd = os.open(path("fifo"), os.O_RDWR)
    os.write(fd, b"content")
    yield
    equal(os.read(fd, 100), b"content", "content")


@case
def fifo_unlinked():
    """A FIFO whose name is gone."""
    os.mkfifo(path("fifo"))
    fd = os.open(path("fifo"), os.O_RDWR)
    os.write(fd, b"content")
    os.unlink(path("fifo"))
    yield
    equal(os.read(fd, 100), b"content", "content")
    check(not os.path.exists(path("fifo")), "it has a name again")


@case
def fifo_written():
    """The reader of a FIFO is gone; a later one finds what was written for it."""
    os.mkfifo(path("fifo"))
    read_end = os.open(path("fifo"), os.O_RDONLY | os.O_NONBLOCK)
    write_end = os.open(path("fifo"), os.O_WRONLY)
    os.write(write_end, b"content")
    os.close(read_end)
    yield
    read_end = os.open(path("fifo"), os.O_RDONLY | os.O_NONBLOCK)
    equal(os.read(read_end, 100), b"content", "content")
    os.close(write_end)
    equal(os.read(read_end, 100), b"", "the end of file")


@case
def fifo_lonely():
    """Only one end of a FIFO is open: writing non-blocking is refused, as before."""
    os.mkfifo(path("fifo"))
    fd = os.open(path("fifo"), os.O_RDONLY | os.O_NONBLOCK)
    yield
    equal(os.read(fd, 1), b"", "no writer")
    writer = os.open(path("fifo"), os.O_WRONLY | os.O_NONBLOCK)
    os.write(writer, b"x")
    equal(os.read(fd, 1), b"x", "content")


@case
def other_end_outside():
    """Standard input is a pipe of which this program has only one end."""
    yield
    equal(os.read(0, 100), b"from outside", "what came from outside")


main()
