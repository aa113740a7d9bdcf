"""What workloads with TCP connections have in common; see `tcp.py`."""

import fcntl
import os
import socket
import struct
import sys
import termios

from lib import check, path, wait_for

FAMILY = os.environ.get("E2E_FAMILY", "v4")
# Where the program listens, as its peer sees it.
ADDRESS = os.environ.get("E2E_ADDRESS", "::1" if FAMILY == "v6" else "127.0.0.1")
ESTABLISHED, SYN_SENT, FIN_WAIT1, FIN_WAIT2, CLOSE, CLOSE_WAIT, LAST_ACK, CLOSING = 1, 2, 4, 5, 7, 8, 9, 11

# What every stream carries: any piece of it tells where it belongs.
PERIOD = 1 << 20
PATTERN = b"".join(struct.pack("<I", n * 2654435761 & 0xFFFFFFFF) for n in range(PERIOD // 4))
PATTERN2 = PATTERN + PATTERN


def piece(start, length):
    """The stream's bytes from `start` on."""
    begin = start % PERIOD
    return PATTERN2[begin : begin + length]


def same(data, start, what):
    """Fails unless these are the stream's bytes from `start` on."""
    done = 0
    while done < len(data):
        part = data[done : done + PERIOD]
        check(part == piece(start + done, len(part)), f"{what}: other bytes than were sent, after {start + done}")
        done += len(part)


def listener():
    """The program's listening socket."""
    family = socket.AF_INET if FAMILY == "v4" else socket.AF_INET6
    address = "::" if FAMILY == "mapped" else ADDRESS
    sock = socket.socket(family)
    if FAMILY == "mapped":
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind((address, 0))
    sock.listen(8)
    return sock


def announce(port):
    """Tells the test where the program listens."""
    with open(path("port.new"), "w") as file:
        file.write(str(port))
    os.rename(path("port.new"), path("port"))


def serve(**options):
    """The program's end of a connection; the listening socket is closed."""
    sock = listener()
    for name, value in options.items():
        sock.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    announce(sock.getsockname()[1])
    yield
    end, _ = sock.accept()
    sock.close()
    return end


def call(**options):
    """The peer's end."""
    sock = socket.socket(socket.AF_INET6 if FAMILY == "v6" else socket.AF_INET)
    for name, value in options.items():
        sock.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    sock.settimeout(60)
    sock.connect((ADDRESS, int(sys.argv[2])))
    return sock


def info(sock):
    """The state of a socket, and what was agreed on: options and window scales."""
    data = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 24)
    return data[0], data[5], data[6]


def segment(sock):
    """How large the segments are that it sends."""
    return struct.unpack_from("<I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 24), 16)[0]


def round_trip(sock):
    """How long a round trip takes as far as it knows, in microseconds."""
    return struct.unpack_from("<I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 72), 68)[0]


def state(sock):
    return info(sock)[0]


def reach(sock, wanted):
    """Waits until a socket is in a state."""
    wait_for(lambda: state(sock) == wanted, f"state {wanted}, it is {state(sock)}", 20)


def everything(sock):
    """All that comes until the end."""
    parts = []
    while True:
        data = sock.recv(1 << 16)
        if not data:
            return b"".join(parts)
        parts.append(data)


def unread(sock):
    """How many bytes wait."""
    return struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, b"\0" * 4))[0]


def exactly(sock, length):
    """So many bytes."""
    parts = []
    while length:
        data = sock.recv(min(length, 1 << 16))
        check(data, "the stream ended early")
        parts.append(data)
        length -= len(data)
    return b"".join(parts)
