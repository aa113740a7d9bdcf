"""A link between two interfaces that loses packets by chance, and delays them so that they overtake each other.

There is no netem everywhere: the interfaces are TUN devices, and what comes out of one is put into the other by this
program. The first is named by `E2E_INTERFACE`, the second has a `p` behind that name; the test moves it elsewhere.
"""

import fcntl
import heapq
import os
import random
import select
import struct
import threading
import time

from lib import case, main, path

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 1, 0x1000
LOSS = 0.02
DELAY, JITTER = 0.002, 0.006


def interface(name):
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return fd


def tell(late, lost):
    with open(path("troubles.new"), "w") as file:
        file.write(f"{late} {lost}")
    os.rename(path("troubles.new"), path("troubles"))


def put(fd, packet):
    try:
        os.write(fd, packet)
    except OSError:  # the interface is down, or gone
        pass


class Forwarder(threading.Thread):
    def __init__(self, ends, other):
        super().__init__(daemon=True)
        self.ends, self.other = ends, other

    def run(self):
        chance, queue, number, late, lost, told = random.Random(7), [], 0, 0, 0, 0.0
        while True:
            now = time.monotonic()
            while queue and queue[0][0] <= now:
                _, _, fd, packet = heapq.heappop(queue)
                put(fd, packet)
            if now > told + 0.2:
                told = now
                tell(late, lost)
            patience = max(0.0, queue[0][0] - now) if queue else 0.1
            for fd in select.select(self.ends, [], [], patience)[0]:
                try:
                    packet = os.read(fd, 65536)
                except OSError:
                    continue
                if chance.random() < LOSS:
                    lost += 1
                    continue
                late, number = late + 1, number + 1
                due = time.monotonic() + DELAY + chance.random() * JITTER
                heapq.heappush(queue, (due, number, self.other[fd], packet))


@case
def link():
    name = os.environ["E2E_INTERFACE"]
    ends = [interface(name), interface(name + "p")]
    other = dict(zip(ends, reversed(ends)))
    tell(0, 0)
    Forwarder(ends, other).start()
    yield


main()
