"""A tree of a bit of everything, for being dumped over and over: nothing may be lost, repeated, or left over."""

import fcntl
import hashlib
import mmap
import os
import signal
import struct
import termios
import threading
import time

from lib import case, check, equal, main, wait_for


def descriptors():
    """How many are open."""
    return len(os.listdir("/proc/self/fd"))


@case
def everything():
    """Runs until there are no more words to go on; each step is checked by all parts."""
    number_read, number_write = os.pipe()
    echo_read, echo_write = os.pipe()
    shared = mmap.mmap(-1, 1 << 20)
    memory = bytearray(os.urandom(4 << 20))
    digest = hashlib.sha256(memory).digest()
    master, slave = os.openpty()
    mode = termios.tcgetattr(slave)
    mode[3] &= ~(termios.ICANON | termios.ECHO)
    termios.tcsetattr(slave, termios.TCSANOW, mode)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 50, 132, 0, 0))

    # A child that counts what comes through the pipe and echoes it, and keeps its count in shared memory.
    child = os.fork()
    if child == 0:
        os.close(number_write)
        os.close(echo_read)
        expected = 0
        while data := os.read(number_read, 8):
            found = struct.unpack("Q", data)[0]
            if found != expected:
                os._exit(3)
            expected += 1
            shared[0:8] = struct.pack("Q", expected)
            os.write(echo_write, data)
        os._exit(0)
    os.close(number_read)
    os.close(echo_write)

    # Threads that count on their own.
    counts, stop = [0] * 4, threading.Event()

    def count(index):
        while not stop.wait(0.01):
            counts[index] += 1

    threads = [threading.Thread(target=count, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()

    ticks = 0

    def tick(*_):
        nonlocal ticks
        ticks += 1

    signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)

    number, open_before, last_clock = 0, descriptors(), time.monotonic()
    last_counts, last_ticks = [0] * 4, 0
    # The harness says how many dumps there will be.
    rounds = int(os.environ["E2E_ROUNDS"])
    for _ in range(rounds):
        os.write(number_write, struct.pack("Q", number))
        os.write(master, b"%d;" % number)
        yield
        equal(struct.unpack("Q", os.read(echo_read, 8))[0], number, "the number that came back")
        number += 1
        equal(struct.unpack("Q", shared[0:8])[0], number, "the count in shared memory")
        equal(os.read(slave, 100), b"%d;" % (number - 1), "what came through the terminal")
        equal(fcntl.ioctl(slave, termios.TIOCGWINSZ, bytes(8)), struct.pack("4H", 50, 132, 0, 0), "its size")
        equal(hashlib.sha256(memory).digest(), digest, "memory")
        memory[number * 4096] ^= 1
        digest = hashlib.sha256(memory).digest()
        equal(descriptors(), open_before, "descriptors")
        now = time.monotonic()
        check(now >= last_clock, "the clock stepped back")
        last_clock = now
        wait_for(lambda: ticks > last_ticks, "the timer to tick")
        wait_for(lambda: all(new > old for new, old in zip(counts, last_counts)), "all threads to go on")
        last_ticks, last_counts = ticks, counts[:]
    signal.setitimer(signal.ITIMER_REAL, 0)
    stop.set()
    for thread in threads:
        thread.join()
    os.close(number_write)
    equal(os.waitpid(child, 0)[1], 0, "the child")


main()
