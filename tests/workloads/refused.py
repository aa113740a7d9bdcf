"""What cannot be carried over, as much of it as one process can have: it must all be named, and none of it harmed."""

import ctypes
import fcntl
import mmap
import os
import signal
import socket
import struct

from lib import case, check, equal, libc, main

SYS_PERF_EVENT_OPEN = 298
SOL_PACKET, PACKET_RX_RING = 263, 5
SYS_FANOTIFY_INIT = 300
SYS_BPF = 321
SYS_USERFAULTFD = 323
SYS_IO_SETUP = 206
SYS_IO_URING_SETUP = 425
SYS_IO_URING_ENTER = 426


def call(number, *arguments):
    """A system call that must work."""
    libc.syscall.restype = ctypes.c_long
    result = libc.syscall(ctypes.c_long(number), *arguments)
    check(result >= 0, f"system call {number}: {os.strerror(ctypes.get_errno())}")
    return result


def io_uring():
    """An io_uring instance, mapped."""
    parameters = ctypes.create_string_buffer(120)
    ring = call(SYS_IO_URING_SETUP, 4, parameters)
    return ring, mmap.mmap(ring, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


def user_fault():
    """A userfaultfd."""
    fd = call(SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    fcntl.ioctl(fd, 0xC018AA3F, struct.pack("3Q", 0xAA, 0, 0))
    return fd


def perf():
    """A counter of page faults."""
    attributes = ctypes.create_string_buffer(struct.pack("IIQQ", 1, 112, 2, 0), 112)
    return call(SYS_PERF_EVENT_OPEN, attributes, 0, -1, -1, 0)


def bpf_map():
    """An array of one word."""
    attributes = ctypes.create_string_buffer(struct.pack("5I", 2, 4, 4, 1, 0))
    return call(SYS_BPF, 0, attributes, 20)


def aio():
    """A context of asynchronous I/O."""
    context = ctypes.c_ulong(0)
    call(SYS_IO_SETUP, 4, ctypes.byref(context))
    return context.value


def pidfd_on_its_way():
    """A pidfd in a message that nobody has received yet."""
    one, other = socket.socketpair()
    pidfd = os.pidfd_open(os.getpid())
    socket.send_fds(one, [b"x"], [pidfd])
    os.close(pidfd)
    return one, other


@case
def everything():
    """One of each."""
    ring, _mapped = io_uring()
    faults, counter, array, context = user_fault(), perf(), bpf_map(), aio()
    fuse = os.open("/dev/fuse", os.O_RDWR)
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    packets.setsockopt(SOL_PACKET, PACKET_RX_RING, struct.pack("4I", 4096, 1, 2048, 2))
    watcher = call(SYS_FANOTIFY_INIT, 0, os.O_RDONLY)
    _one, other = pidfd_on_its_way()
    child = os.fork()
    if child == 0:
        while True:
            signal.pause()
    held = os.pidfd_open(child)
    yield
    equal(call(SYS_IO_URING_ENTER, ring, 0, 0, 0, None, 0), 0, "what io_uring has to do")
    before = struct.unpack("Q", os.read(counter, 8))[0]
    mmap.mmap(-1, 4096)[0] = 1
    check(struct.unpack("Q", os.read(counter, 8))[0] > before, "perf counts no longer")
    check(context, "asynchronous I/O")
    _data, fds, _flags, _from = socket.recv_fds(other, 1, 1)
    check(b"Pid:\t%d\n" % os.getpid() in open(f"/proc/self/fdinfo/{fds[0]}", "rb").read(), "the pidfd on its way")
    signal.pidfd_send_signal(held, signal.SIGKILL)
    equal(os.waitpid(child, 0)[1], signal.SIGKILL, "the child's end")
    for fd in (faults, array, fuse, packets.fileno(), watcher):
        os.fstat(fd)


main()
