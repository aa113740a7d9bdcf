"""Clients that have connected to the program, which has not accepted them: it does when it is told to go on.

As in `tcp.py`, the peer is the case with `_peer` behind its name. `E2E_BUFFER` is the size of the program's receive
buffer, where it is not the kernel's; `E2E_WITHOUT` is a kind of client that is left out.
"""

import errno
import os
import select
import socket
import struct
import sys
import time

from lib import case, check, equal, main, wait_for
from network import ADDRESS, CLOSE_WAIT, ESTABLISHED, FAMILY, announce, call, everything, info, listener, piece, same, segment, state

BUFFER = int(os.environ.get("E2E_BUFFER", "0"))
# What the one sends in all that has filled the program's buffer.
TOTAL = 3 << 20
SMALL = b"".join(b"%d," % n for n in range(300))
# Those that wait, in order.
KINDS = [kind for kind in ("idle", "small", "ended", "stuffed", "reset", "said") if kind != os.environ.get("E2E_WITHOUT")]


def waiting(sock):
    """How many wait to be accepted."""
    return struct.unpack_from("<I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 24)[0]


def agreed(sock):
    """Timestamps, selective acknowledgements, scales. Congestion notification is lost."""
    _, options, scales = info(sock)
    return options & 7, scales


@case
def some():
    sock = listener()
    sock.listen(64)
    if BUFFER:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    announce(sock.getsockname()[1])
    yield
    wait_for(lambda: waiting(sock) == len(KINDS), "the clients", 20)
    time.sleep(0.3)
    yield
    sock.settimeout(20)
    equal(waiting(sock), len(KINDS), "clients that wait")
    ends = {name: sock.accept()[0] for name in KINDS}
    equal(state(ends["idle"]), ESTABLISHED, "the state of the idle one")
    equal(state(ends["ended"]), CLOSE_WAIT, "the state of the one that has ended")
    equal(ends["said"].recv(100), b"said", "what the last one has said")
    small = ends["small"].recv(len(SMALL), socket.MSG_WAITALL)
    equal(small, SMALL, "what was sent in small pieces")
    equal(everything(ends["ended"]), b"the last", "what was sent before the end")
    if "reset" in ends:
        equal(ends["reset"].recv(100), b"gone", "what was sent before the reset")
        try:
            ends["reset"].recv(100)
            check(False, "the reset is forgotten")
        except ConnectionResetError:
            pass
    data = everything(ends["stuffed"])
    equal(len(data), TOTAL, "the length of the large one")
    same(data, 0, "the large one")
    equal(ends["idle"].recv(100), b"late", "what the idle one says")
    for name in ("idle", "small", "ended"):
        ends[name].sendall(b"to the %s one" % name.encode())
        ends[name].close()
    fresh = sock.accept()[0]
    for name in ("said", "stuffed"):
        equal(agreed(ends[name]), agreed(fresh), f"what was agreed on with the one that has {name}")
        equal(segment(ends[name]), segment(fresh), "segments")
    buffer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    check(ends["said"].getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) >= buffer, "the receive buffer is another")
    fresh.sendall(b"done")


def stuff(sock):
    """Sends until nothing more is taken; how much it was."""
    sock.setblocking(False)
    sent, since = 0, time.monotonic()
    while sent < TOTAL and time.monotonic() - since < 0.2:
        try:
            sent += sock.send(piece(sent, min(TOTAL - sent, 50000)))
            since = time.monotonic()
        except BlockingIOError:
            time.sleep(0.01)
    check(sent < TOTAL, "all of it was taken")
    sock.settimeout(60)
    return sent


@case
def some_peer():
    ends = {}
    for name in KINDS:
        ends[name] = call(SO_SNDBUF=200000) if name == "stuffed" else call()
        if name == "small":
            ends[name].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for n in range(len(SMALL)):
                ends[name].sendall(SMALL[n : n + 1])
        elif name == "ended":
            ends[name].sendall(b"the last")
            ends[name].shutdown(socket.SHUT_WR)
        elif name == "stuffed":
            sent = stuff(ends[name])
        elif name == "reset":
            ends[name].sendall(b"gone")
            time.sleep(0.05)
            ends[name].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            ends[name].close()
        elif name == "said":
            ends[name].sendall(b"said")
    yield
    while sent < TOTAL:
        sent += ends["stuffed"].send(piece(sent, min(TOTAL - sent, 50000)))
    ends["stuffed"].shutdown(socket.SHUT_WR)
    ends["idle"].sendall(b"late")
    for name in ("idle", "small", "ended"):
        equal(everything(ends[name]), b"to the %s one" % name.encode(), "the answer")
    fresh = call()
    equal(fresh.recv(100), b"done", "the last word")
    for name in ("said", "stuffed"):
        equal(everything(ends[name]), b"", "the end")


@case
def many():
    """As many as `E2E_CLIENTS` says, with a little from each."""
    number = int(os.environ["E2E_CLIENTS"])
    sock = listener()
    sock.listen(number)
    announce(sock.getsockname()[1])
    yield
    wait_for(lambda: waiting(sock) == number, "the clients", 20)
    time.sleep(0.1)
    yield
    sock.settimeout(20)
    for n in range(number):
        end = sock.accept()[0]
        equal(end.recv(100), b"%d" % n, "what a client says")
        end.sendall(b"%d" % -n)


@case
def many_peer():
    ends = [call() for _ in range(int(os.environ["E2E_CLIENTS"]))]
    for n, end in enumerate(ends):
        end.sendall(b"%d" % n)
    yield
    for n, end in enumerate(ends):
        equal(end.recv(100), b"%d" % -n, "the answer")


@case
def deferred():
    """A server that is told of clients when they have said something: until then, they have come and it has not heard."""
    sock = listener()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 100)
    announce(sock.getsockname()[1])
    yield
    time.sleep(0.2)
    equal(waiting(sock), 0, "clients that wait")
    yield
    sock.settimeout(20)
    ends = [sock.accept()[0] for _ in range(2)]
    fresh = sock.accept()[0]
    for end in (*ends, fresh):
        equal(end.recv(100), b"at last", "what the client says")
        end.sendall(b"answer")
        equal((agreed(end), segment(end)), (agreed(fresh), segment(fresh)), "what was agreed on")


@case
def deferred_peer():
    ends = [call(), call()]
    yield
    ends.append(call())
    for end in ends:
        end.sendall(b"at last")
    for end in ends:
        equal(end.recv(100), b"answer", "the answer")


@case
def asking():
    """A client that has asked for a connection, and has not heard the answer."""
    sock = listener()
    announce(sock.getsockname()[1])
    yield
    time.sleep(0.2)
    equal(waiting(sock), 0, "clients that wait")
    yield
    sock.settimeout(20)
    end = sock.accept()[0]
    end.sendall(b"welcome")
    equal(end.recv(100), b"thanks", "what the client says")
    fresh = sock.accept()[0]
    equal((agreed(end), segment(end)), (agreed(fresh), segment(fresh)), "what was agreed on")


@case
def asking_peer():
    sock = socket.socket(socket.AF_INET6 if FAMILY == "v6" else socket.AF_INET)
    sock.setblocking(False)
    equal(sock.connect_ex((ADDRESS, int(sys.argv[2]))), errno.EINPROGRESS, "what connect says")
    equal(select.select([], [sock], [], 0.3)[1], [], "connections")
    yield
    begin = time.monotonic()
    sock.settimeout(20)
    equal(sock.recv(100), b"welcome", "what the server says")
    check(time.monotonic() - begin < 0.5, "it took until the next request")
    sock.sendall(b"thanks")
    fresh = call()
    equal((agreed(sock), segment(sock)), (agreed(fresh), segment(fresh)), "what was agreed on")


def own(server, deed):
    """The program's own client, which does something; it is told whether it has come after all."""
    client = socket.create_connection(server.getsockname()[:2])
    deed(client)
    wait_for(lambda: waiting(server) == 1, "the client", 20)
    time.sleep(0.1)
    yield
    server.accept()


@case
def urgent():
    yield from own(listener(), lambda client: client.send(b"!", socket.MSG_OOB))


@case
def at_one_interface():
    server = listener()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
    yield from own(server, lambda client: client.send(b"hello"))


@case
def of_mptcp():
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
    server.bind(("127.0.0.1", 0))
    server.listen(8)
    client = socket.create_connection(server.getsockname())
    time.sleep(0.1)
    yield
    server.accept()
    client.close()


@case
def both_ends():
    """A server and its client in one tree, and the server waits by epoll."""
    server = listener()
    poll = select.epoll()
    poll.register(server, select.EPOLLIN | select.EPOLLET)
    client = socket.create_connection(server.getsockname()[:2])
    client.sendall(b"hello")
    equal(poll.poll(5), [(server.fileno(), select.EPOLLIN)], "what epoll says of the first")
    second = socket.create_connection(server.getsockname()[:2])
    yield
    server.settimeout(5)
    equal(poll.poll(5), [(server.fileno(), select.EPOLLIN)], "what epoll says of the second")
    first = server.accept()[0]
    equal(first.recv(100), b"hello", "what the client has said")
    other = server.accept()[0]
    for one, two in ((client, first), (first, client), (second, other), (other, second)):
        one.sendall(b"afterwards")
        equal(two.recv(100), b"afterwards", "what is said afterwards")
    client.close()
    equal(first.recv(100), b"", "the end")


main()
