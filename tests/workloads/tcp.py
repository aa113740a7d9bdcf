"""TCP connections whose other end is outside of the tree.

Cases come in pairs: `NAME` is the program that is dumped and restored, `NAME_peer` goes on meanwhile, and must not notice.
The program listens and writes its port into a file; the peer gets that port as its second argument. Both are ready for
the first time when they know of each other, and for the second when the connection is in the state to be carried over.
`E2E_FAMILY` says how they talk: v4, v6, or mapped (the program's socket is IPv6, the peer's IPv4). `E2E_SLOW` makes one
end of a stream read and write so slowly that the other's queues are full, and `E2E_OPTIONS` says what both must have
agreed on (bits of TCP_INFO).
"""

import os
import select
import socket
import struct
import sys
import threading
import time

from lib import case, check, equal, log, main, path, wait_for
from network import (
    CLOSE,
    CLOSE_WAIT,
    CLOSING,
    ESTABLISHED,
    FAMILY,
    FIN_WAIT1,
    FIN_WAIT2,
    LAST_ACK,
    SYN_SENT,
    announce,
    call,
    everything,
    exactly,
    info,
    listener,
    piece,
    reach,
    round_trip,
    same,
    segment,
    serve,
    state,
    unread,
)

ROUNDS = int(os.environ.get("E2E_ROUNDS", "1"))
SLOW = float(os.environ.get("E2E_SLOW", "0"))
OPTIONS = int(os.environ["E2E_OPTIONS"]) if "E2E_OPTIONS" in os.environ else None


def stuff(sock):
    """Writes until nothing more fits in, and gives back how much did."""
    sock.setblocking(False)
    total, quiet = 0, 0
    while quiet < 20:
        try:
            total += sock.send(piece(total, 1 << 16))
            quiet = 0
        except BlockingIOError:
            quiet += 1
            time.sleep(0.01)
    sock.setblocking(True)
    return total


class Stream(threading.Thread):
    """Sends and receives at the same time, checks every byte, and ends when told to."""

    def __init__(self, sock, slow=0.0):
        super().__init__()
        self.sock, self.slow, self.sent, self.received = sock, slow, 0, 0
        self.stop, self.failure = threading.Event(), None
        self.start()

    def run(self):
        try:
            self.flow()
        except BaseException as error:  # it is raised again by whoever waits for us
            self.failure = error
            print(f"after {self.sent} sent, {self.received} received: {error!r}", file=sys.stderr, flush=True)

    def flow(self):
        self.sock.setblocking(False)
        sending = receiving = True
        while sending or receiving:
            if sending and self.stop.is_set():
                self.sock.shutdown(socket.SHUT_WR)
                sending = False
            readable, writable, _ = select.select([self.sock] if receiving else [], [self.sock] if sending else [], [], 0.05)
            if writable:
                self.sent += self.sock.send(piece(self.sent, 1 + self.sent * 7 % 20000))
            if readable:
                data = self.sock.recv(30000)
                same(data, self.received, "the stream")
                self.received += len(data)
                receiving = bool(data)
            time.sleep(self.slow)

    def alive(self):
        """Fails if the stream has."""
        if self.failure:
            raise self.failure

    def end(self):
        self.stop.set()
        self.join(120)
        check(not self.is_alive(), f"the stream does not end: {self.sent} sent, {self.received} received")
        self.alive()
        with open(path("totals"), "w") as file:
            file.write(f"{self.sent} {self.received}")


@case
def stream():
    """Numbered bytes both ways, over and over."""
    sock = yield from serve()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    flow = Stream(sock, SLOW)
    before = info(sock)
    check(OPTIONS in (None, before[1] & 7), f"agreed on {before[1]}, not on {OPTIONS}")
    for _ in range(ROUNDS + 1):
        seen = flow.sent, flow.received
        wait_for(lambda: flow.failure or flow.sent > seen[0] and flow.received > seen[1], f"the stream after {seen}", 30)
        flow.alive()
        equal(info(sock), before, "state, options and scales")
        yield
    flow.end()


@case
def stream_peer():
    sock = call()
    flow = Stream(sock, SLOW or 0.0005)
    before = info(sock)[1:]
    yield
    equal(info(sock)[1:], before, "options and scales")
    flow.end()


@case
def under_way():
    """Something is on its way, and the peer does not hear of it: how long a round trip takes is known all the same."""
    sock = yield from serve()
    sock.sendall(b"x")
    equal(sock.recv(1), b"y", "what the peer says")
    yield
    check(OPTIONS == info(sock)[1] & 7, f"agreed on {info(sock)[1]}, not on {OPTIONS}")
    measured = round_trip(sock)
    sock.sendall(bytes(3000))
    yield
    now = round_trip(sock)
    check(measured / 2 <= now <= measured + 50_000, f"a round trip takes {now} us, and took {measured}")
    yield
    equal(sock.recv(1), b"z", "what the peer says in the end")


@case
def under_way_peer():
    sock = call()
    sock.sendall(b"y")
    yield
    equal(sock.recv(1), b"x", "what the program says")
    equal(len(sock.recv(3000, socket.MSG_WAITALL)), 3000, "what was on its way")
    sock.sendall(b"z")


@case
def mptcp_client():
    """A client of MPTCP, whose server knows TCP only; something waits for it."""
    control = yield from serve()
    (port,) = struct.unpack("!H", exactly(control, 2))
    sock = socket.socket(control.family, socket.SOCK_STREAM, 262)
    sock.connect((control.getpeername()[0], port))
    waiting = b"waits"
    for n in range(ROUNDS):
        wait_for(lambda: sock.recv(100, socket.MSG_PEEK) == waiting, "what the peer says")
        yield
        equal(exactly(sock, len(waiting)), waiting, "what has waited")
        sock.sendall(b"round %03d" % n)
        waiting = b"again %03d" % n
    yield
    sock.shutdown(socket.SHUT_WR)
    equal(everything(sock), waiting, "what the peer says in the end")


@case
def mptcp_client_peer():
    control = call()
    server = socket.socket(control.family)
    server.bind((control.getsockname()[0], 0))
    server.listen(1)
    said = []

    def converse():
        sock, _ = server.accept()
        sock.sendall(b"waits")
        for n in range(ROUNDS):
            said.append(exactly(sock, 9))
            sock.sendall(b"again %03d" % n)
        said.append(everything(sock))
        sock.close()

    thread = threading.Thread(target=converse)
    thread.start()
    control.sendall(struct.pack("!H", server.getsockname()[1]))
    yield
    thread.join(30)
    equal(said, [b"round %03d" % n for n in range(ROUNDS)] + [b""], "what the program has said")


@case
def endless():
    """The same for as long as the test likes: says in a file how far the stream is."""
    sock = yield from serve()
    flow = Stream(sock)

    def tell():
        while not flow.stop.is_set():
            with open(path("progress.new"), "w") as file:
                file.write(str(0 if flow.failure else min(flow.sent, flow.received)))
            os.rename(path("progress.new"), path("progress"))
            time.sleep(0.01)

    threading.Thread(target=tell, daemon=True).start()
    yield
    flow.end()


@case
def endless_peer():
    yield from stream_peer()


@case
def idle():
    """A connection on which nothing happens, and its options."""
    sock = yield from serve()
    options = {
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
        (socket.IPPROTO_TCP, socket.TCP_NODELAY): 1,
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): 77,
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): 11,
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): 3,
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT): 30000,
        (socket.SOL_SOCKET, socket.SO_PRIORITY): 3,
        (socket.SOL_SOCKET, socket.SO_MARK): 17,
        (socket.SOL_SOCKET, socket.SO_REUSEADDR): 1,
        (socket.SOL_SOCKET, 72): 0,
    }
    if FAMILY == "v4":
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x10)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 33)
    for (level, name), value in options.items():
        sock.setsockopt(level, name, value)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 5))
    seen = info(sock), sock.getsockname(), sock.getpeername()
    segments = segment(sock)
    sizes = [sock.getsockopt(socket.SOL_SOCKET, name) for name in (socket.SO_SNDBUF, socket.SO_RCVBUF)]
    yield
    equal((info(sock), sock.getsockname(), sock.getpeername()), seen, "state, options, scales, addresses")
    check(segments * 0.9 < segment(sock) < segments * 1.1, f"segments of {segment(sock)} bytes instead of {segments}")
    for (level, name), value in options.items():
        equal(sock.getsockopt(level, name), value, f"option {level}, {name}")
    equal(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0"), b"reno", "congestion control")
    equal(struct.unpack("ii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)), (1, 5), "SO_LINGER")
    if FAMILY == "v4":
        equal(sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS), 0x10, "IP_TOS")
        equal(sock.getsockopt(socket.IPPROTO_IP, socket.IP_TTL), 33, "IP_TTL")
    equal([sock.getsockopt(socket.SOL_SOCKET, name) for name in (socket.SO_SNDBUF, socket.SO_RCVBUF)], sizes, "buffers")
    sock.sendall(b"to the peer")
    equal(sock.recv(100), b"to the program", "what the peer says")


@case
def idle_peer():
    sock = call()
    yield
    equal(sock.recv(100), b"to the peer", "what the program says")
    sock.sendall(b"to the program")


@case
def quiet():
    """A connection that each end has said something on, and waits to be read."""
    sock = yield from serve()
    sock.sendall(b"to the peer")
    wait_for(lambda: unread(sock) == 14, "what the peer says", 20)
    seen = info(sock), sock.getsockname(), sock.getpeername()
    yield
    equal((info(sock), sock.getsockname(), sock.getpeername()), seen, "state, options, scales, addresses")
    equal(sock.recv(100), b"to the program", "what the peer said")
    sock.sendall(b"goodbye")
    sock.shutdown(socket.SHUT_WR)
    equal(everything(sock), b"farewell", "the end")


@case
def quiet_peer():
    sock = call()
    sock.sendall(b"to the program")
    yield
    equal(everything(sock), b"to the peergoodbye", "what the program says")
    sock.sendall(b"farewell")


@case
def stuffed():
    """As much as fits into the queues, both ways."""
    sock = yield from serve()
    sent = stuff(sock)
    wait_for(lambda: unread(sock) > 1 << 16, "the peer's bytes", 20)
    time.sleep(0.3)
    waiting = unread(sock)
    yield
    check(unread(sock) >= waiting, f"{unread(sock)} of {waiting} bytes are left to be read")
    equal(exactly(sock, 4), piece(0, 4), "the first bytes")
    sock.sendall(struct.pack("<Q", sent))
    sock.shutdown(socket.SHUT_WR)
    data = everything(sock)
    total = struct.unpack("<Q", data[-8:])[0]
    equal(len(data) + 4 - 8, total, "bytes from the peer")
    same(data[:-8], 4, "from the peer")


@case
def stuffed_peer():
    sock = call()
    sent = stuff(sock)
    yield
    sock.setblocking(False)
    trailer, received = bytearray(struct.pack("<Q", sent)), bytearray()
    ended = False
    while trailer or not ended:
        readable, writable, _ = select.select([] if ended else [sock], [sock] if trailer else [], [], 30)
        check(readable or writable, "nothing moves")
        if writable:
            del trailer[: sock.send(trailer)]
            if not trailer:
                sock.shutdown(socket.SHUT_WR)
        if readable:
            data = sock.recv(1 << 16)
            received += data
            ended = not data
    total = struct.unpack("<Q", received[-8:])[0]
    equal(len(received) - 8, total, "bytes from the program")
    same(bytes(received[:-8]), 0, "from the program")


@case
def close_wait():
    """The peer has ended its side; data waits before the end."""
    sock = yield from serve()
    reach(sock, CLOSE_WAIT)
    yield
    equal(state(sock), CLOSE_WAIT, "state")
    equal(everything(sock), b"all that I have", "what the peer said")
    sock.sendall(b"thanks")
    sock.shutdown(socket.SHUT_WR)
    reach(sock, CLOSE)


@case
def close_wait_peer():
    sock = call()
    sock.sendall(b"all that I have")
    sock.shutdown(socket.SHUT_WR)
    yield
    equal(everything(sock), b"thanks", "the answer")


@case
def fin_wait2():
    """The program has ended its side, and the peer knows."""
    sock = yield from serve()
    sock.sendall(b"all that I have")
    sock.shutdown(socket.SHUT_WR)
    reach(sock, FIN_WAIT2)
    yield
    equal(state(sock), FIN_WAIT2, "state")
    equal(everything(sock), b"thanks", "the answer")


@case
def fin_wait2_peer():
    sock = call()
    yield
    equal(everything(sock), b"all that I have", "what the program said")
    equal(state(sock), CLOSE_WAIT, "the peer's state")
    sock.sendall(b"thanks")
    sock.shutdown(socket.SHUT_WR)
    reach(sock, CLOSE)


def with_unsent_end(before, after, answer):
    """The program's end of a connection has more to say than the peer takes, and then its end."""
    sock = yield from serve()
    if before == LAST_ACK:
        reach(sock, CLOSE_WAIT)
    sent = stuff(sock)
    sock.shutdown(socket.SHUT_WR)
    reach(sock, before)
    announce(sent)
    yield
    equal(state(sock), before, "state")
    equal(everything(sock), answer, "what the peer said")
    del after


def reads_late(first, last):
    """The peer of such a program: says `first`, reads nothing until the program is back, then everything."""
    sock = call()
    if first is not None:
        sock.sendall(first)
        sock.shutdown(socket.SHUT_WR)
    yield
    data = everything(sock)
    same(data, 0, "from the program")
    with open(path("received"), "w") as file:
        file.write(str(len(data)))
    if last is not None:
        sock.sendall(last)
        sock.shutdown(socket.SHUT_WR)
    reach(sock, CLOSE)


@case
def fin_wait1():
    yield from with_unsent_end(FIN_WAIT1, None, b"late answer")


@case
def fin_wait1_peer():
    yield from reads_late(None, b"late answer")


@case
def last_ack():
    yield from with_unsent_end(LAST_ACK, None, b"first")


@case
def last_ack_peer():
    yield from reads_late(b"first", None)


@case
def closing():
    """Both ends close at the same time."""
    sock = yield from serve()
    sent = stuff(sock)
    sock.shutdown(socket.SHUT_WR)
    reach(sock, FIN_WAIT1)
    announce(sent)
    yield
    reach(sock, CLOSING)
    yield
    equal(state(sock), CLOSING, "state")
    equal(everything(sock), b"meanwhile", "what the peer said")


@case
def closing_peer():
    sock = call()
    yield
    sock.sendall(b"meanwhile")
    sock.shutdown(socket.SHUT_WR)
    yield
    data = everything(sock)
    same(data, 0, "from the program")
    with open(path("received"), "w") as file:
        file.write(str(len(data)))
    reach(sock, CLOSE)


@case
def closed():
    """Both ends have closed; what came before is still to be read."""
    sock = yield from serve()
    reach(sock, CLOSE_WAIT)
    sock.shutdown(socket.SHUT_WR)
    reach(sock, CLOSE)
    yield
    equal(state(sock), CLOSE, "state")
    equal(everything(sock), b"a last word", "what the peer said")
    try:
        sock.send(b"x")
        check(False, "it can be written to")
    except BrokenPipeError:
        pass


@case
def closed_peer():
    sock = call()
    sock.sendall(b"a last word")
    sock.shutdown(socket.SHUT_WR)
    yield
    equal(everything(sock), b"", "the program's end")


@case
def reset():
    """The peer has reset the connection, and the program does not know yet."""
    sock = yield from serve()
    reach(sock, CLOSE)
    yield
    equal(state(sock), CLOSE, "state")
    try:
        sock.recv(10)
        check(False, "it can be read from")
    except ConnectionResetError:
        pass
    equal(sock.recv(10), b"", "afterwards")


@case
def reset_peer():
    sock = call()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    time.sleep(0.2)
    sock.close()
    yield


@case
def never_connected():
    """A connection that was refused: the socket can try again."""
    sock = socket.socket()
    free = socket.socket()
    free.bind(("127.0.0.1", 0))
    try:
        sock.connect(free.getsockname())
    except ConnectionRefusedError:
        pass
    yield
    free.listen(1)
    sock.connect(free.getsockname())
    equal(state(sock), ESTABLISHED, "state")


@case
def urgent():
    """Urgent data that was not read."""
    sock = yield from serve()
    wait_for(lambda: select.select([], [], [sock], 0)[2], "urgent data", 20)
    yield
    equal(sock.recv(1, socket.MSG_OOB), b"!", "urgent data")


@case
def urgent_peer():
    sock = call()
    sock.send(b"!", socket.MSG_OOB)
    yield


@case
def signed():
    """Signed packets."""
    sock = listener()
    key = struct.pack("<HH4s120xBBHI80s", socket.AF_INET, 0, socket.inet_aton("127.0.0.1"), 0, 0, 3, 0, b"key")
    sock.setsockopt(socket.IPPROTO_TCP, 14, key)
    client = socket.socket()
    own = struct.pack("<H2s4s120xBBHI80s", socket.AF_INET, struct.pack(">H", 0), socket.inet_aton("127.0.0.1"), 0, 0, 3, 0, b"key")
    client.setsockopt(socket.IPPROTO_TCP, 14, own)
    client.connect(sock.getsockname())
    session, _ = sock.accept()
    yield
    client.send(b"x")
    equal(session.recv(10), b"x", "the connection")


@case
def syn_sent():
    """A connection that nobody has answered yet: the peer has so many clients that it answers no more of them."""
    wait_for(lambda: os.path.exists(path("peer")), "the peer's port", 20)
    with open(path("peer")) as file:
        port = int(file.read())
    sock = socket.socket()
    sock.setblocking(False)
    try:
        sock.connect(("127.0.0.1", port))
    except BlockingIOError:
        pass
    time.sleep(0.1)
    equal(state(sock), SYN_SENT, "state before")
    own = sock.getsockname()
    yield
    equal(state(sock), SYN_SENT, "state after")
    equal(sock.getsockname(), own, "address")
    reach(sock, ESTABLISHED)
    sock.setblocking(True)
    sock.sendall(b"here I am")


@case
def full():
    """The peer of that: takes a client when the program is back."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(0)
    waiting = [socket.create_connection(sock.getsockname())]
    announce(sock.getsockname()[1])
    yield
    waiting.append(sock.accept()[0])
    sock.settimeout(20)
    end, _ = sock.accept()
    equal(end.recv(100), b"here I am", "what the program says")


class Clock(threading.Thread):
    """Looks at the time over and over, and knows the longest time between two looks."""

    def __init__(self):
        super().__init__(daemon=True)
        self.longest, self.stop = 0, False
        self.start()

    def run(self):
        last = time.time_ns()
        while not self.stop:
            time.sleep(0.0005)
            now = time.time_ns()
            self.longest, last = max(self.longest, now - last), now

    def end(self):
        self.stop = True
        self.join()
        return self.longest


@case
def many():
    """As many connections as `E2E_CONNECTIONS` says."""
    number = int(os.environ.get("E2E_CONNECTIONS", "1000"))
    sock = listener()
    sock.listen(4096)
    announce(sock.getsockname()[1])
    yield
    ends = [sock.accept()[0] for _ in range(number)]
    clock = Clock()
    yield
    log(f"gap {clock.end()}")
    yield
    for end in ends:
        end.sendall(b"one")
    for end in ends:
        equal(end.recv(10), b"two", "what the peer says")


@case
def many_peer():
    ends = [call() for _ in range(int(os.environ.get("E2E_CONNECTIONS", "1000")))]
    yield
    for end in ends:
        equal(end.recv(10), b"one", "what the program says")
        end.sendall(b"two")


@case
def many_ended():
    """Connections of one port, of which every second has been reset and every fourth closed by both ends."""
    sock = listener()
    sock.listen(4096)
    announce(sock.getsockname()[1])
    yield
    ends = [sock.accept()[0] for _ in range(200)]
    for end in ends[::4]:
        reach(end, CLOSE_WAIT)
        end.shutdown(socket.SHUT_WR)
    for end in ends[::4] + ends[1::2]:
        reach(end, CLOSE)
    yield
    for end in ends[::4]:
        equal((state(end), everything(end)), (CLOSE, b""), "a closed one")
    for end in ends[1::2]:
        equal(state(end), CLOSE, "state of one that was reset")
        try:
            end.recv(10)
            check(False, "one that was reset can be read from")
        except ConnectionResetError:
            pass
    for end in ends[2::4]:
        end.sendall(b"one")
        equal(end.recv(10), b"two", "what the peer says")


@case
def many_ended_peer():
    ends = [call() for _ in range(200)]
    for end in ends[1::2]:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.close()
    for end in ends[::4]:
        end.shutdown(socket.SHUT_WR)
    yield
    for end in ends[2::4]:
        equal(end.recv(10), b"one", "what the program says")
        end.sendall(b"two")


@case
def late_client():
    """A client asks for a connection while the program is away. It listens at any address."""
    sock = socket.socket()
    sock.bind(("", 0))
    sock.listen(8)
    announce(sock.getsockname()[1])
    yield
    sock.settimeout(30)
    end, _ = sock.accept()
    equal(end.recv(100), b"at last", "what the client says")


@case
def pair():
    """Both ends in the tree."""
    sock = listener()
    client = socket.create_connection(sock.getsockname()[:2])
    session, _ = sock.accept()
    client.sendall(b"under way")
    wait_for(lambda: unread(session) == 9, "the bytes", 20)
    yield
    equal(session.recv(100), b"under way", "what was under way")
    for one, other in ((client, session), (session, client)):
        one.sendall(b"hello")
        equal(other.recv(100), b"hello", "afterwards")
    client.close()
    equal(everything(session), b"", "the end")


@case
def pair_half_closed():
    """Both ends in the tree, one of them closed."""
    sock = listener()
    client = socket.create_connection(sock.getsockname()[:2])
    session, _ = sock.accept()
    client.sendall(b"the last")
    client.shutdown(socket.SHUT_WR)
    reach(client, FIN_WAIT2)
    reach(session, CLOSE_WAIT)
    yield
    equal((state(client), state(session)), (FIN_WAIT2, CLOSE_WAIT), "states")
    equal(everything(session), b"the last", "what was under way")
    session.sendall(b"answer")
    session.close()
    equal(everything(client), b"answer", "the answer")


main()
