"""Internet sockets that are not connected to anybody outside: listening TCP, and UDP. All on the loopback interface."""

import os
import random
import socket
import struct
import threading
import time

from lib import Child, case, check, equal, main, path, touch, wait_for

V4, V6 = "127.0.0.1", "::1"


def listening(family=socket.AF_INET, address=V4, **options):
    """A listening TCP socket on a port that was free."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    for name, value in options.items():
        level = socket.IPPROTO_TCP if name.startswith("TCP") else socket.IPPROTO_IPV6 if name.startswith("IPV6") else socket.SOL_SOCKET
        sock.setsockopt(level, getattr(socket, name), value)
    sock.bind((address, 0))
    sock.listen(7)
    return sock


def greeted(sock, family=socket.AF_INET):
    """Somebody can connect to it and talk."""
    client = socket.socket(family, socket.SOCK_STREAM)
    client.connect(sock.getsockname())
    session, _ = sock.accept()
    client.send(b"hello")
    equal(session.recv(10), b"hello", "what the client said")
    session.close()
    client.close()


@case
def tcp_listening():
    """Its address, its options, and that clients get through."""
    options = {"SO_REUSEADDR": 1, "SO_KEEPALIVE": 1, "TCP_NODELAY": 1, "TCP_DEFER_ACCEPT": 0, "SO_RCVBUF": 100000}
    sock = listening(**options)
    address = sock.getsockname()
    buffer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    yield
    equal(sock.getsockname(), address, "address")
    for name in ("SO_REUSEADDR", "SO_KEEPALIVE"):
        equal(sock.getsockopt(socket.SOL_SOCKET, getattr(socket, name)), 1, name)
    equal(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY), 1, "TCP_NODELAY")
    equal(sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF), buffer, "SO_RCVBUF")
    greeted(sock)


@case
def tcp_keepalive():
    """The times of the keep-alive."""
    sock = listening(SO_KEEPALIVE=1, TCP_KEEPIDLE=111, TCP_KEEPINTVL=22, TCP_KEEPCNT=3)
    yield
    for name, value in (("TCP_KEEPIDLE", 111), ("TCP_KEEPINTVL", 22), ("TCP_KEEPCNT", 3)):
        equal(sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)), value, name)


@case
def tcp6_listening():
    """IPv6, for IPv6 only."""
    sock = listening(socket.AF_INET6, V6, IPV6_V6ONLY=1)
    address = sock.getsockname()
    yield
    equal(sock.getsockname(), address, "address")
    equal(sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY), 1, "IPV6_V6ONLY")
    greeted(sock, socket.AF_INET6)


@case
def tcp_any_address():
    """Bound to all addresses of both families."""
    sock = listening(socket.AF_INET6, "::", IPV6_V6ONLY=0)
    yield
    client = socket.create_connection((V4, sock.getsockname()[1]))
    session, _ = sock.accept()
    client.send(b"x")
    equal(session.recv(10), b"x", "over IPv4")


@case
def tcp_port_shared():
    """SO_REUSEPORT: two sockets on one port."""
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    one.bind((V4, 0))
    one.listen(1)
    two = socket.socket()
    two.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    two.bind(one.getsockname())
    two.listen(1)
    yield
    equal(two.getsockname(), one.getsockname(), "addresses")
    equal([sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) for sock in (one, two)], [1, 1], "SO_REUSEPORT")


@case
def tcp_shared_by_workers():
    """A listening socket of a parent and its workers, one of which waits in accept."""
    sock = listening()

    def worker():
        yield
        session, _ = sock.accept()
        equal(session.recv(10), b"hello", "what the client said")

    process = Child(worker())
    yield
    client = socket.create_connection(sock.getsockname())
    client.send(b"hello")
    process.finish()


@case
def mptcp_listening():
    """MPTCP: clients of both kinds get through, and who asks for a connection can still be either."""
    mptcp = 262
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, mptcp)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((V4, 0))
    sock.listen(7)
    idle = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, mptcp)
    address = sock.getsockname()
    yield
    equal(sock.getsockname(), address, "address")
    equal([s.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL) for s in (sock, idle)], [mptcp] * 2, "SO_PROTOCOL")
    for protocol in (socket.IPPROTO_TCP, mptcp):
        client = socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol)
        client.connect(address)
        session, _ = sock.accept()
        client.send(b"hello")
        equal(session.recv(10), b"hello", "what the client said")
        equal(session.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL), protocol, "SO_PROTOCOL of the connection")


@case
def mptcp_established():
    """A connection of MPTCP, which says itself what it is made of."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
    sock.bind((V4, 0))
    sock.listen(7)
    client = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
    client.connect(sock.getsockname())
    session, _ = sock.accept()
    yield
    client.send(b"x")
    equal(session.recv(10), b"x", "the connection")


@case
def mptcp_client():
    """A client of MPTCP, whose server knows TCP only."""
    sock = listening()
    client = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
    client.connect(sock.getsockname())
    session, _ = sock.accept()
    client.send(b"to the server")
    session.send(b"to the client")
    # Nobody has read that yet, and both kernels have said that it is there.
    for end in (client, session):
        wait_for(lambda end=end: len(end.recv(100, socket.MSG_PEEK)) == 13, "what was sent")
    yield
    equal(client.recv(100), b"to the client", "what waited for the client")
    equal(session.recv(100), b"to the server", "what waited for the server")
    for n in range(3):
        client.send(b"x%d" % n)
        equal(session.recv(10), b"x%d" % n, "the connection")
        session.send(b"y%d" % n)
        equal(client.recv(10), b"y%d" % n, "the answer")
    session.close()
    equal(client.recv(10), b"", "the end")


@case
def mptcp_closed_by_restore():
    """A connection of MPTCP that is given up; its listener goes on."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((V4, 0))
    sock.listen(7)
    client = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
    client.connect(sock.getsockname())
    session, _ = sock.accept()
    yield
    for end in (client, session):
        end.setblocking(False)
        try:
            equal(end.recv(10), b"", "the end of file")
        except OSError:
            pass
        equal(end.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL), 262, "SO_PROTOCOL")
    greeted(sock)


@case
def mptcp_fallen_back():
    """A server of MPTCP, whose client knows TCP only."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
    sock.bind((V4, 0))
    sock.listen(7)
    client = socket.create_connection(sock.getsockname())
    session, _ = sock.accept()
    client.send(b"before")
    yield
    equal(session.recv(10), b"before", "what waited")
    client.send(b"x")
    equal(session.recv(10), b"x", "the connection")
    session.send(b"y")
    equal(client.recv(10), b"y", "the answer")


@case
def tcp_unbound():
    """Sockets that are nothing yet, and one that is only bound."""
    plain, bound = socket.socket(), socket.socket()
    bound.bind((V4, 0))
    address = bound.getsockname()
    yield
    equal(bound.getsockname(), address, "address")
    bound.listen(1)
    plain.connect(address)
    check(bound.accept()[0].getpeername() == plain.getsockname(), "the connection")


@case
def tcp_established():
    """A connection within the tree."""
    sock = listening()
    client = socket.create_connection(sock.getsockname())
    session, _ = sock.accept()
    yield
    client.send(b"x")
    equal(session.recv(10), b"x", "the connection")


@case
def tcp_closed_by_restore():
    """A connection that a dump with --tcp-close gives up: the program sees it closed, its listener goes on."""
    sock = listening(SO_REUSEADDR=1)
    client = socket.create_connection(sock.getsockname())
    session, _ = sock.accept()
    yield
    for end in (client, session):
        try:
            end.setblocking(False)
            equal(end.recv(10), b"", "the end of file")
        except OSError:
            pass
    greeted(sock)


def udp(family, address):
    """Two UDP sockets, one connected to the other."""
    server = socket.socket(family, socket.SOCK_DGRAM)
    server.bind((address, 0))
    client = socket.socket(family, socket.SOCK_DGRAM)
    client.connect(server.getsockname())
    return server, client


@case
def udp_sockets():
    """Bound and connected UDP over IPv4."""
    server, client = udp(socket.AF_INET, V4)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    names = server.getsockname(), client.getsockname(), client.getpeername()
    yield
    equal((server.getsockname(), client.getsockname(), client.getpeername()), names, "addresses")
    equal(server.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST), 1, "SO_BROADCAST")
    client.send(b"x")
    data, sender = server.recvfrom(10)
    equal(data, b"x", "a datagram")
    server.sendto(b"y", sender)
    equal(client.recv(10), b"y", "the answer")


@case
def udp6_sockets():
    """The same over IPv6."""
    server, client = udp(socket.AF_INET6, V6)
    yield
    client.send(b"x")
    data, sender = server.recvfrom(10)
    server.sendto(b"y", sender)
    equal((data, client.recv(10)), (b"x", b"y"), "datagrams")


def to_group(source, group, port):
    """A datagram to a group by way of the loopback interface."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((source, 0))
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
    sock.sendto(source.encode(), (group, port))


def heard(sock):
    """All that waits."""
    sock.setblocking(False)
    found = []
    try:
        while True:
            found.append(sock.recv(100).decode())
    except BlockingIOError:
        return found


@case
def udp_multicast():
    """Memberships of groups, all sources or some, and how to send to groups."""
    lo, ip, v6 = socket.inet_aton("127.0.0.1"), socket.IPPROTO_IP, socket.IPPROTO_IPV6
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("", 0))
    port = sock.getsockname()[1]
    block_source, join_source, only_own = 38, 39, 49
    sock.setsockopt(ip, only_own, 0)
    sock.setsockopt(ip, socket.IP_MULTICAST_TTL, 7)
    sock.setsockopt(ip, socket.IP_MULTICAST_LOOP, 0)
    sock.setsockopt(ip, socket.IP_MULTICAST_IF, lo)
    sock.setsockopt(ip, socket.IP_ADD_MEMBERSHIP, socket.inet_aton("224.0.0.199") + lo)
    sock.setsockopt(ip, block_source, socket.inet_aton("224.0.0.199") + lo + socket.inet_aton("127.0.0.9"))
    sock.setsockopt(ip, join_source, socket.inet_aton("224.0.0.198") + lo + socket.inet_aton("127.0.0.7"))
    other = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    other.bind(("::", 0))
    other.setsockopt(v6, socket.IPV6_JOIN_GROUP, socket.inet_pton(socket.AF_INET6, "ff02::e2e") + struct.pack("i", 1))
    other.setsockopt(v6, socket.IPV6_MULTICAST_HOPS, 9)
    other.setsockopt(v6, socket.IPV6_MULTICAST_IF, 1)

    def joined():
        with open("/proc/net/igmp6") as file:
            return "ff020000000000000000000000000e2e" in file.read()

    def hears():
        for source, group in (("1", "199"), ("9", "199"), ("7", "198"), ("1", "198"), ("1", "197")):
            to_group(f"127.0.0.{source}", f"224.0.0.{group}", port)
        return heard(sock)

    expected = ["127.0.0.1", "127.0.0.7"]
    equal((hears(), joined()), (expected, True), "what is heard before")
    yield
    equal((hears(), joined()), (expected, True), "what is heard after")
    equal([sock.getsockopt(ip, name) for name in (socket.IP_MULTICAST_TTL, socket.IP_MULTICAST_LOOP, only_own)], [7, 0, 0], "options")
    equal(sock.getsockopt(ip, socket.IP_MULTICAST_IF, 4), lo, "IP_MULTICAST_IF")
    equal([other.getsockopt(v6, name) for name in (socket.IPV6_MULTICAST_HOPS, socket.IPV6_MULTICAST_IF)], [9, 1], "IPv6")
    other.close()
    equal(joined(), False, "whether the group was its own")


@case
def udp_queue():
    """Datagrams that wait: from whom, how long, in which order; also where anybody may send to any address."""
    server, client = udp(socket.AF_INET, V4)
    server6, client6 = udp(socket.AF_INET6, V6)
    anywhere = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    anywhere.bind(("::", 0))
    parts = [b"first", b"", b"x" * 60000, b"last"]
    for part in parts:
        client.send(part)
        client6.send(part)
    outside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    outside.sendto(b"mapped", (V4, anywhere.getsockname()[1]))
    senders = client.getsockname(), client6.getsockname(), outside.getsockname()
    server.sendto(b"answer", client.getsockname())
    yield
    for sock, sender in ((server, senders[0]), (server6, senders[1])):
        for part in parts:
            equal(sock.recvfrom(70000, socket.MSG_DONTWAIT), (part, sender), "a datagram")
    data, sender = anywhere.recvfrom(100, socket.MSG_DONTWAIT)
    equal((data, sender[:2]), (b"mapped", ("::ffff:127.0.0.1", senders[2][1])), "a datagram over IPv4")
    equal(client.recv(100, socket.MSG_DONTWAIT), b"answer", "the answer")
    for sock in (server, server6, anywhere, client):
        try:
            sock.recv(100, socket.MSG_DONTWAIT)
            check(False, "a datagram too many")
        except BlockingIOError:
            pass


@case
def udplite_queue():
    """The same for UDP-Lite."""
    pairs = []
    for family, address in ((socket.AF_INET, V4), (socket.AF_INET6, V6)):
        server = socket.socket(family, socket.SOCK_DGRAM, socket.IPPROTO_UDPLITE)
        server.bind((address, 0))
        client = socket.socket(family, socket.SOCK_DGRAM, socket.IPPROTO_UDPLITE)
        client.connect(server.getsockname())
        pairs.append((server, client))
    parts = [b"first", b"x" * 1001, b"last"]
    for _, client in pairs:
        for part in parts:
            client.send(part)
    yield
    for server, client in pairs:
        client.send(b"afterwards")
        for part in [*parts, b"afterwards"]:
            equal(server.recvfrom(2000, socket.MSG_DONTWAIT), (part, client.getsockname()), "a datagram")


@case
def udp_options():
    """Options of UDP and UDP-Lite alone."""
    names = 101, 102, 103, 104  # NO_CHECK6_TX, NO_CHECK6_RX, SEGMENT, GRO
    plain = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    for name, value in zip(names, (1, 1, 1200, 1)):
        plain.setsockopt(socket.IPPROTO_UDP, name, value)
    lite = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_UDPLITE) for _ in range(2)]
    for name, value in ((10, 12), (11, 10)):  # SEND_CSCOV, RECV_CSCOV
        lite[0].setsockopt(socket.IPPROTO_UDPLITE, name, value)
    yield
    equal([plain.getsockopt(socket.IPPROTO_UDP, name) for name in names], [1, 1, 1200, 1], "UDP")
    coverage = [[sock.getsockopt(socket.IPPROTO_UDPLITE, name) for name in (10, 11)] for sock in lite]
    equal(coverage, [[12, 10], [0, 0]], "UDP-Lite")


@case
def udp_more_to_come():
    """Half a datagram, by MSG_MORE."""
    server, client = udp(socket.AF_INET, V4)
    client.send(b"one ", socket.MSG_MORE)
    yield
    client.send(b"two")
    equal(server.recv(100), b"one two", "the datagram")


@case
def udp_corked():
    """Half a datagram."""
    server, client = udp(socket.AF_INET, V4)
    client.setsockopt(17, 1, 1)
    client.send(b"one ")
    yield
    client.send(b"two")
    client.setsockopt(17, 1, 0)
    equal(server.recv(100), b"one two", "the datagram")


@case
def udp_corked_later():
    """Corked, and nothing gathered yet."""
    server, client = udp(socket.AF_INET, V4)
    client.setsockopt(17, 1, 1)
    yield
    client.send(b"one ")
    client.send(b"two")
    client.setsockopt(17, 1, 0)
    equal(server.recv(100), b"one two", "the datagram")


@case
def udp_gathered():
    """Datagrams of many pieces and of all kinds, to where the socket is not connected to."""
    kinds = [
        (socket.AF_INET, V4, V4, 17),
        (socket.AF_INET6, V6, V6, 17),
        (socket.AF_INET6, V4, "::ffff:" + V4, 17),
        (socket.AF_INET, V4, V4, 136),
        (socket.AF_INET6, V6, V6, 136),
    ]
    pairs = []
    for family, bound, to, protocol in kinds:
        server = socket.socket(socket.AF_INET if bound == V4 else family, socket.SOCK_DGRAM, protocol)
        server.bind((bound, 0))
        server.settimeout(10)
        receive_hops(server)
        client = socket.socket(family, socket.SOCK_DGRAM, protocol)
        client.setsockopt(protocol, 1, 1)
        pieces = [bytes([65 + n]) * (1 + 4000 * n) for n in range(5)]
        address = to, server.getsockname()[1]
        hops = (socket.IPPROTO_IP, socket.IP_TTL) if bound == V4 else (socket.IPPROTO_IPV6, 52)  # IPV6_HOPLIMIT
        client.sendmsg([pieces[0]], [(*hops, struct.pack("i", 7))], 0, address)
        for piece in pieces[1:]:
            client.sendto(piece, address)
        pairs.append((server, client, protocol, pieces))
    yield
    for server, client, protocol, pieces in pairs:
        client.send(b"end")
        client.setsockopt(protocol, 1, 0)
        data, told, _, _ = server.recvmsg(1 << 16, 100)
        equal(data, b"".join(pieces) + b"end", "the datagram")
        equal([struct.unpack("i", content)[0] for _, _, content in told], [7], "hops")


def receive_hops(server):
    if server.family == socket.AF_INET:
        server.setsockopt(socket.IPPROTO_IP, 12, 1)  # IP_RECVTTL
    else:
        server.setsockopt(socket.IPPROTO_IPV6, 51, 1)  # IPV6_RECVHOPLIMIT


def connections(count):
    """As many connections with ourselves, both ends of each."""
    server = listening()
    ends = []
    for _ in range(count):
        client = socket.create_connection(server.getsockname())
        ends += [client, server.accept()[0]]
    return server, ends


@case
def options_that_stay():
    """Many connections, each with other options."""
    server, ends = connections(40)
    for n, end in enumerate(ends):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 100 + n)
        end.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 1 + n)
    yield
    for n, end in enumerate(ends):
        equal(end.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), 100 + n, "TCP_KEEPIDLE")
        equal(end.getsockopt(socket.IPPROTO_IP, socket.IP_TTL), 1 + n, "IP_TTL")
    for n in range(0, len(ends), 2):
        ends[n].send(b"hello")
        equal(ends[n + 1].recv(8), b"hello", "what was sent")


def set_at_random(sockets, stop, pause):
    """Sets options all the time, and looks each time whether they are what they were set to."""
    options = [
        (socket.SOL_SOCKET, socket.SO_PRIORITY, range(7)),
        (socket.SOL_SOCKET, socket.SO_MARK, range(100)),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, range(2)),
        (socket.IPPROTO_IP, socket.IP_TTL, range(1, 200)),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, range(1, 1000)),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, range(2)),
        (socket.IPPROTO_TCP, 18, range(10000)),  # TCP_USER_TIMEOUT
    ]
    known, changes = {}, 0
    while not stop():
        sock = random.choice(sockets)
        level, name, values = random.choice(options)
        if (sock, level, name) in known:
            equal(sock.getsockopt(level, name), known[sock, level, name], f"option {level} {name}")
        value = random.choice(values)
        sock.setsockopt(level, name, value)
        known[sock, level, name] = value
        changes += 1
        time.sleep(pause)
    for (sock, level, name), value in known.items():
        equal(sock.getsockopt(level, name), value, f"option {level} {name} in the end")
    return changes


@case
def options_that_change():
    """Connections whose options two threads change all the time."""
    server, ends = connections(40)
    stop, changes = threading.Event(), []
    work = lambda part: changes.append(set_at_random(part, stop.is_set, 0.002))
    threads = [threading.Thread(target=work, args=(ends[n::2],), daemon=True) for n in range(2)]
    for thread in threads:
        thread.start()
    yield
    time.sleep(0.05)
    check(all(thread.is_alive() for thread in threads), "a thread has found another value than it had set")
    stop.set()
    for thread in threads:
        thread.join()
    equal(len(changes), 2, "threads that found all as they had left it")


@case
def options_changed_by_others():
    """Connections whose options somebody changes who has them as well, and is none of ours."""
    server, ends = connections(40)
    child = os.fork()
    if child == 0:
        if os.fork() == 0:
            set_at_random(ends, lambda: os.path.exists(path("enough")), 0.002)
            touch("in order")
        os._exit(0)
    os.waitpid(child, 0)
    time.sleep(0.1)
    yield
    touch("enough")
    wait_for(lambda: os.path.exists(path("in order")), "the other to find all as it had left it")


@case
def udp_unbound():
    """A UDP socket that has no address yet."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 17)
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x10)
    yield
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((V4, 0))
    sock.sendto(b"x", server.getsockname())
    equal(server.recv(10), b"x", "a datagram")
    equal(sock.getsockopt(socket.IPPROTO_IP, socket.IP_TTL), 17, "TTL")
    equal(sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS), 0x10, "TOS")


main()
