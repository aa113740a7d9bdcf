"""Unix sockets."""

import os
import signal
import socket
import struct

from lib import Child, case, check, equal, main, path, wait_for

STREAM, DGRAM, PACKET = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET
SO_PEERCRED, SO_PASSCRED = 17, 16


def unix(kind):
    """A unix socket."""
    return socket.socket(socket.AF_UNIX, kind)


def peer(sock):
    """pid, uid and gid of the other side."""
    return struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, SO_PEERCRED, 12))


def talk(one, other, what="talk"):
    """Both directions work."""
    one.send(b"there")
    equal(other.recv(100), b"there", f"{what}: there")
    other.send(b"back")
    equal(one.recv(100), b"back", f"{what}: back")


@case
def stream_pair():
    """socketpair of streams, idle."""
    one, two = socket.socketpair(socket.AF_UNIX, STREAM)
    yield
    talk(one, two)
    one.close()
    equal(two.recv(10), b"", "the end of file")


@case
def dgram_pair():
    """socketpair of datagrams."""
    one, two = socket.socketpair(socket.AF_UNIX, DGRAM)
    one.send(b"first")
    one.send(b"second")
    one.send(b"third")
    yield
    equal([two.recv(100, socket.MSG_DONTWAIT) for _ in range(3)], [b"first", b"second", b"third"], "datagrams")
    talk(one, two)


@case
def dgram_empty():
    """A datagram without content is a datagram."""
    one, two = socket.socketpair(socket.AF_UNIX, DGRAM)
    one.send(b"")
    one.send(b"x")
    yield
    equal([two.recv(100, socket.MSG_DONTWAIT) for _ in range(2)], [b"", b"x"], "datagrams")


@case
def seqpacket_pair():
    """socketpair of packets, with packets in both directions."""
    one, two = socket.socketpair(socket.AF_UNIX, PACKET)
    for n in range(5):
        one.send(b"%d" % n * (n + 1))
    two.send(b"back")
    yield
    equal([two.recv(100) for _ in range(5)], [b"%d" % n * (n + 1) for n in range(5)], "packets")
    equal(one.recv(100), b"back", "the packet back")
    talk(one, two)


@case
def stream_data():
    """Data in both directions of a stream, a lot of it in one."""
    one, two = socket.socketpair(socket.AF_UNIX, STREAM)
    data = bytes(n % 253 for n in range(100000))
    one.send(data)
    two.send(b"back")
    yield
    found = b""
    while len(found) < len(data):
        found += two.recv(65536)
    equal(found == data, True, "content")
    equal(one.recv(100), b"back", "content back")
    talk(one, two)


@case
def descriptors_in_flight():
    """Descriptors that were sent and not yet received: a file, a pipe's end, and a socket."""
    one, two = socket.socketpair(socket.AF_UNIX, STREAM)
    with open(path("data"), "w") as file:
        file.write("content")
    fd = os.open(path("data"), os.O_RDONLY)
    os.lseek(fd, 3, os.SEEK_SET)
    read_end, write_end = os.pipe()
    inner = socket.socketpair()
    socket.send_fds(one, [b"x"], [fd, write_end, inner[0].fileno()])
    os.close(fd)
    os.close(write_end)
    inner[0].close()
    yield
    data, fds, _, _ = socket.recv_fds(two, 10, 10)
    equal(data, b"x", "the byte with them")
    equal(len(fds), 3, "descriptors")
    equal(os.read(fds[0], 10), b"tent", "the file, with its position")
    os.write(fds[1], b"y")
    equal(os.read(read_end, 10), b"y", "the pipe")
    os.write(fds[2], b"z")
    equal(inner[1].recv(10), b"z", "the socket")


@case
def named_server():
    """A listening socket with a name in the file system: clients find it afterwards."""
    server = unix(STREAM)
    server.bind(path("socket"))
    server.listen(5)
    os.chmod(path("socket"), 0o700)
    yield
    equal(server.getsockname(), path("socket"), "name")
    equal(os.stat(path("socket")).st_mode & 0o777, 0o700, "mode")
    equal(server.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN), 1, "it listens")
    client = unix(STREAM)
    client.connect(path("socket"))
    talk(client, server.accept()[0])


@case
def abstract_server():
    """A listening socket with an abstract name, zeros in it."""
    name = b"\0e2e\0" + str(os.getpid()).encode()
    server = unix(PACKET)
    server.bind(name)
    server.listen(3)
    yield
    equal(server.getsockname(), name, "name")
    client = unix(PACKET)
    client.connect(name)
    talk(client, server.accept()[0])


@case
def relative_name():
    """Bound by a name relative to a directory that is no longer the working directory."""
    os.mkdir(path("dir"))
    os.chdir(path("dir"))
    server = unix(STREAM)
    server.bind("socket")
    server.listen(1)
    os.chdir("/")
    yield
    equal(server.getsockname(), "socket", "name")
    client = unix(STREAM)
    client.connect(path("dir/socket"))
    talk(client, server.accept()[0])


@case
def name_unlinked():
    """The name is gone from the file system, the socket still has it."""
    server = unix(STREAM)
    server.bind(path("socket"))
    server.listen(1)
    client = unix(STREAM)
    client.connect(path("socket"))
    session = server.accept()[0]
    os.unlink(path("socket"))
    yield
    equal(server.getsockname(), path("socket"), "name")
    check(not os.path.exists(path("socket")), "the name is there again")
    talk(client, session)


@case
def connected():
    """Server and client of a named socket, in two processes."""
    server = unix(STREAM)
    server.bind(path("socket"))
    server.listen(1)

    def child():
        client = unix(STREAM)
        client.connect(path("socket"))
        client.send(b"hello")
        yield
        client.send(b" again")
        equal(client.recv(100), b"welcome", "what the server said")

    process = Child(child())
    session, _ = server.accept()
    yield
    wait = b""
    session.send(b"welcome")
    process.finish()
    while part := session.recv(100):
        wait += part
    equal(wait, b"hello again", "what the client said")


@case
def peer_names():
    """getsockname and getpeername of both sides of a connection."""
    server = unix(STREAM)
    server.bind(path("socket"))
    server.listen(1)
    client = unix(STREAM)
    client.bind(path("client"))
    client.connect(path("socket"))
    session, _ = server.accept()

    def names():
        return [end() for sock in (client, session) for end in (sock.getsockname, sock.getpeername)]

    before = names()
    yield
    equal(names(), before, "names")


@case
def backlog():
    """Connections that nobody has accepted yet."""
    server, clients = waiting_clients()
    yield
    for number, client in enumerate(clients):
        client.send(b"%d" % number)
        session, _ = server.accept()
        equal(session.recv(10), b"%d" % number, "in the order in which they came")
        talk(client, session)


@case
def backlog_with_data():
    """The same with data, which nobody can read before it is accepted."""
    server, clients = waiting_clients()
    for number, client in enumerate(clients):
        client.send(b"%d" % number)
        client.send(b" and more" * 100)
    yield
    for number, client in enumerate(clients):
        session, _ = server.accept()
        equal(session.recv(2000), b"%d" % number + b" and more" * 100, "what was sent before it was accepted")
        talk(client, session)


@case
def backlog_with_packets():
    """Packets, one of them empty, from a client that has said its last word; the server wants to know who sent them."""
    server = unix(socket.SOCK_SEQPACKET)
    server.bind("\0" + path("packets"))
    server.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    server.listen(5)
    sizes = [1, 0, 3000, 9000]

    def child():
        client = unix(socket.SOCK_SEQPACKET)
        client.connect("\0" + path("packets"))
        for size in sizes:
            client.send(b"x" * size)
        client.shutdown(socket.SHUT_WR)
        yield
        equal(client.recv(100), b"heard", "the answer")

    process = Child(child())
    yield
    session, _ = server.accept()
    for size in sizes:
        data, control, _, _ = session.recvmsg(20000, 1000)
        equal(len(data), size, "a packet")
        senders = [struct.unpack("iII", sent)[0] for level, kind, sent in control if kind == socket.SCM_CREDENTIALS]
        equal(senders, [process.pid], "who sent it")
    equal(session.recv(100), b"", "the end of file")
    session.send(b"heard")
    process.finish()


@case
def backlog_with_pages():
    """So much data at once that the kernel keeps it in pages, as much as goes in, and many small pieces."""
    server, clients = waiting_clients()
    pattern = b"".join(struct.pack("<I", n) for n in range(60000))
    clients[0].send(pattern[:20000])
    clients[1].setblocking(False)
    sent = 0
    try:
        while True:
            sent += clients[1].send(pattern[sent : sent + 50000])
    except BlockingIOError:
        pass
    check(sent > 100000, f"only {sent} bytes go in")
    clients[1].setblocking(True)
    for n in range(200):
        clients[2].send(b"%d," % n)
    yield
    wanted = pattern[:20000], pattern[:sent], b"".join(b"%d," % n for n in range(200))
    for client, data in zip(clients, wanted):
        session, _ = server.accept()
        check(session.recv(len(data), socket.MSG_WAITALL) == data, "what was sent before it was accepted")
        talk(client, session)


@case
def backlog_with_descriptors():
    """A descriptor on its way to who has not accepted."""
    server, clients = waiting_clients()
    reader, writer = os.pipe()
    socket.send_fds(clients[0], [b"take it"], [writer])
    yield
    session, _ = server.accept()
    _, files, _, _ = socket.recv_fds(session, 100, 1)
    os.write(files[0], b"taken")
    equal(os.read(reader, 100), b"taken", "through the descriptor")


def waiting_clients():
    """A server, and three connections to it that it has not accepted."""
    server = unix(STREAM)
    server.bind(path("socket"))
    server.listen(5)
    clients = [unix(STREAM) for _ in range(3)]
    for client in clients:
        client.connect(path("socket"))
    return server, clients


@case
def peer_credentials():
    """SO_PEERCRED: who connected, not who restored."""
    one, two = socket.socketpair()
    server = unix(STREAM)
    server.bind(path("socket"))
    server.listen(1)

    def child():
        client = unix(STREAM)
        client.connect(path("socket"))
        yield
        equal(peer(client)[0], os.getppid(), "the server in the child's eyes")

    process = Child(child())
    session, _ = server.accept()
    yield
    equal(peer(one)[0], os.getpid(), "of a pair")
    equal(peer(session)[0], process.pid, "of the child")
    process.finish()


@case
def half_closed():
    """One direction is shut down: data before it, then the end of file; the other direction works."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    one, two = socket.socketpair()
    one.send(b"last")
    one.shutdown(socket.SHUT_WR)
    three, four = socket.socketpair()
    three.shutdown(socket.SHUT_RD)
    yield
    equal(two.recv(100), b"last", "what was sent before")
    equal(two.recv(100), b"", "the end of file")
    two.send(b"back")
    equal(one.recv(100), b"back", "the other direction")
    try:
        one.send(b"x")
        check(False, "sending after SHUT_WR worked")
    except BrokenPipeError:
        pass
    equal(three.recv(10), b"", "receiving after SHUT_RD")
    del four


@case
def peer_gone():
    """The other side is closed; what it left is there."""
    one, two = socket.socketpair()
    one.send(b"legacy")
    one.close()
    yield
    equal(two.recv(100), b"legacy", "what was left")
    equal(two.recv(100), b"", "the end of file")


@case
def options():
    """Buffer sizes, timeouts, SO_PASSCRED, non-blocking."""
    one, two = socket.socketpair()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 50000)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 60000)
    one.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("qq", 3, 500000))
    two.setblocking(False)
    names = [socket.SO_SNDBUF, socket.SO_RCVBUF, SO_PASSCRED]
    before = [one.getsockopt(socket.SOL_SOCKET, name) for name in names]
    yield
    equal([one.getsockopt(socket.SOL_SOCKET, name) for name in names], before, "options")
    equal(struct.unpack("qq", one.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16)), (3, 500000), "timeout")
    equal(os.get_blocking(two.fileno()), False, "blocking")


@case
def dgram_server():
    """A bound datagram socket, clients that are connected to it and one that is not, datagrams waiting."""
    server = unix(DGRAM)
    server.bind(path("log-socket"))
    one, two = unix(DGRAM), unix(DGRAM)
    one.bind(path("client"))
    one.connect(path("log-socket"))
    one.send(b"from one")
    two.sendto(b"from two", path("log-socket"))
    yield
    equal(server.recvfrom(100), (b"from one", path("client")), "the first datagram")
    equal(server.recvfrom(100)[0], b"from two", "the second")
    one.send(b"again")
    equal(server.recv(100), b"again", "a later one")
    server.sendto(b"answer", path("client"))
    equal(one.recv(100), b"answer", "an answer")


@case
def unconnected():
    """Sockets that are neither bound nor connected."""
    socks = [unix(kind) for kind in (STREAM, DGRAM, PACKET)]
    bound = unix(STREAM)
    bound.bind(path("socket"))
    yield
    kinds = [sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) for sock in socks]
    equal(kinds, [STREAM, DGRAM, PACKET], "kinds")
    bound.listen(1)
    socks[0].connect(path("socket"))
    talk(socks[0], bound.accept()[0])


@case
def blocked_in_accept():
    """A child that waits in accept goes on waiting."""
    server = unix(STREAM)
    server.bind(path("socket"))
    server.listen(1)
    pid = os.fork()
    if pid == 0:
        session, _ = server.accept()
        os._exit(0 if session.recv(10) == b"x" else 1)
    wait_for(lambda: open(f"/proc/{pid}/syscall").read().split()[0] in ("43", "288"), "the child to wait")
    yield
    client = unix(STREAM)
    client.connect(path("socket"))
    client.send(b"x")
    equal(os.waitpid(pid, 0)[1], 0, "the child")


@case
def shared_socket():
    """One end of a pair in parent and child."""
    one, two = socket.socketpair()

    def child():
        yield
        two.send(b"from the child")

    process = Child(child())
    yield
    process.finish()
    equal(one.recv(100), b"from the child", "what the child sent")
    two.send(b"from the parent")
    equal(one.recv(100), b"from the parent", "what the parent sent")


@case
def peer_outside():
    """A client of a server that the harness runs: its directory holds the server's socket."""
    client = unix(STREAM)
    client.connect(path("outside"))
    yield
    client.send(b"still there")
    equal(client.recv(100), b"yes", "what the server outside says")


main()
