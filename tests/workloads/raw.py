"""Raw sockets, ping sockets and packet sockets, as ping, routing daemons and sniffers have them. All on the loopback interface.

Others may use that interface at the same time: everything that is sent names this process.
"""

import os
import socket
import struct

from lib import case, check, equal, main

V4, V6 = "127.0.0.1", "::1"
SOL_RAW, SOL_ICMPV6, SOL_PACKET, ICMP_FILTER = 255, 58, 263, 1
# A protocol for experiments (RFC 3692).
EXPERIMENT = 253
ETH_P_ALL, ETH_P_IP = 3, 0x0800
OWN = b"e2e %d" % os.getpid()


def checksum(data):
    """That of RFC 1071."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def echo(kind, number):
    """A request of ICMP."""
    body = struct.pack("!HH", os.getpid() & 0xFFFF, number) + OWN.ljust(16)
    return struct.pack("!BBH", kind, 0, checksum(struct.pack("!BBH", kind, 0, 0) + body)) + body


def heard(sock, wanted, ours=OWN):
    """What is ours of that which comes, until one thing is as wanted."""
    sock.settimeout(5)
    found = []
    while True:
        data, sender = sock.recvfrom(3000)
        if ours in data:
            found.append(data)
            if wanted(data, sender):
                return found


def options(sock, level, *names):
    """The values of several options."""
    return [sock.getsockopt(level, name) for name in names]


@case
def raw_ping():
    """Takes answers only, as its filter says; ping's usual options."""
    ip = socket.IPPROTO_IP
    sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    sock.setsockopt(SOL_RAW, ICMP_FILTER, struct.pack("I", 0xFFFFFFFE))
    names = (socket.IP_TTL, socket.IP_TOS, 11, 12, 10)  # RECVERR, RECVTTL, MTU_DISCOVER
    for name, value in zip(names, (77, 0x10, 1, 1, 2)):
        sock.setsockopt(ip, name, value)
    yield
    equal(options(sock, ip, *names), [77, 0x10, 1, 1, 2], "options")
    equal(sock.getsockopt(SOL_RAW, ICMP_FILTER, 4), struct.pack("I", 0xFFFFFFFE), "the filter")
    sock.sendto(echo(8, 1), (V4, 0))
    answers = heard(sock, lambda data, _: data[20] == 0)
    equal(len(answers), 1, "packets: the request is not wanted")
    equal(answers[0][8], 64, "the TTL of the answer")


@case
def raw_connected():
    """Bound to an address and connected, without a port."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, EXPERIMENT)
    sock.bind((V4, 0))
    sock.connect(("127.0.0.2", 0))
    other = socket.socket(socket.AF_INET, socket.SOCK_RAW, EXPERIMENT)
    other.bind(("127.0.0.2", 0))
    stranger = socket.socket(socket.AF_INET, socket.SOCK_RAW, EXPERIMENT)
    stranger.bind(("127.0.0.3", 0))
    yield
    sock.send(OWN)
    equal(heard(other, lambda *_: True)[0][12:20], socket.inet_aton(V4) + socket.inet_aton("127.0.0.2"), "addresses")
    stranger.sendto(OWN + b"!", (V4, 0))
    other.sendto(OWN + b"?", (V4, 0))
    packets = heard(sock, lambda data, _: data.endswith(b"?"))
    equal(len(packets), 1, "packets: the stranger's is not for it")


@case
def raw_headers():
    """Who makes the header of IP."""
    ip = socket.IPPROTO_IP
    all_own = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    own = socket.socket(socket.AF_INET, socket.SOCK_RAW, EXPERIMENT)
    own.setsockopt(ip, socket.IP_HDRINCL, 1)
    own.setsockopt(ip, 22, 1)
    usual = socket.socket(socket.AF_INET, socket.SOCK_RAW, EXPERIMENT)
    tcp = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
    yield
    equal([sock.getsockopt(ip, socket.IP_HDRINCL) for sock in (all_own, own, usual, tcp)], [1, 1, 0, 0], "IP_HDRINCL")
    equal(own.getsockopt(ip, 22), 1, "IP_NODEFRAG")
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 0, 0, 0, 33, EXPERIMENT, 0, socket.inet_aton(V4), socket.inet_aton(V4))
    own.sendto(header + OWN, (V4, 0))
    equal(heard(usual, lambda *_: True)[0][8], 33, "the TTL")


@case
def raw6_ping():
    """The same for ICMPv6."""
    v6 = socket.IPPROTO_IPV6
    sock = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    # Everything but echo replies, 129, is blocked.
    blocked = struct.pack("8I", *(0xFFFFFFFF if word != 4 else 0xFFFFFFFD for word in range(8)))
    sock.setsockopt(SOL_ICMPV6, ICMP_FILTER, blocked)
    names = (socket.IPV6_UNICAST_HOPS, socket.IPV6_TCLASS, 25, socket.IPV6_RECVHOPLIMIT, 23)  # RECVERR, MTU_DISCOVER
    for name, value in zip(names, (77, 0x10, 1, 1, 2)):
        sock.setsockopt(v6, name, value)
    yield
    equal(options(sock, v6, *names), [77, 0x10, 1, 1, 2], "options")
    equal(sock.getsockopt(SOL_ICMPV6, ICMP_FILTER, 32), blocked, "the filter")
    sock.sendto(echo(128, 1), (V6, 0))
    equal(len(heard(sock, lambda data, _: data[0] == 129)), 1, "packets: the request is not wanted")


@case
def ping_sockets():
    """Not bound, bound to an identifier, connected, of IPv6; nobody has to be root for them."""
    ip, v6 = socket.IPPROTO_IP, socket.IPPROTO_IPV6
    unbound, bound, connected = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP) for _ in range(3))
    six = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM, socket.IPPROTO_ICMPV6)
    bound.bind((V4, 4711))
    connected.connect(("127.0.0.2", 0))
    six.bind((V6, 4712))
    connected.setsockopt(ip, socket.IP_TTL, 77)
    connected.setsockopt(ip, 11, 1)  # IP_RECVERR
    six.setsockopt(v6, socket.IPV6_UNICAST_HOPS, 78)
    names = [sock.getsockname() for sock in (unbound, bound, connected, six)]
    check(names[2][1] != 0, "connected without an identifier")
    yield
    equal([sock.getsockname() for sock in (unbound, bound, connected, six)], names, "addresses and identifiers")
    equal(options(connected, ip, socket.IP_TTL, 11), [77, 1], "options")
    equal(options(six, v6, socket.IPV6_UNICAST_HOPS), [78], "options of IPv6")
    for sock, kind, to in ((unbound, 8, V4), (bound, 8, V4), (connected, 8, None), (six, 128, V6)):
        request = echo(kind, 1)
        sock.send(request) if to is None else sock.sendto(request, (to, 0))
        data, sender = sock.recvfrom(3000)
        equal(sender[0], to or "127.0.0.2", "who answers")
        equal(data[0], 0 if kind == 8 else 129, "the kind of the answer")
        equal(struct.unpack("!H", data[4:6])[0], sock.getsockname()[1], "its identifier")
        equal(data[8:], request[8:], "its data")


@case
def raw6_checksum():
    """Where the kernel puts a checksum; bound and connected."""
    v6 = socket.IPPROTO_IPV6
    sock = socket.socket(socket.AF_INET6, socket.SOCK_RAW, EXPERIMENT)
    sock.setsockopt(v6, socket.IPV6_CHECKSUM, 2)
    sock.bind((V6, 0))
    sock.connect((V6, 0))
    yield
    equal(sock.getsockopt(v6, socket.IPV6_CHECKSUM), 2, "IPV6_CHECKSUM")
    sock.send(bytes(4) + OWN)
    data = heard(sock, lambda *_: True)[0]
    check(data[2:4] != bytes(2), "there is no checksum")


def memberships(sock):
    """What packet_diag tells of a packet socket: (interface, count, type, address)."""
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4)
    netlink.send(struct.pack("=IHHIIBBHIIQ", 36, 20, 0x301, 0, 0, socket.AF_PACKET, 0, 0, 0, 7, 0))
    while True:
        answer = netlink.recv(1 << 16)
        while answer:
            length, kind = struct.unpack_from("=IH", answer)
            check(kind == 20, "packet_diag does not know the socket")
            if struct.unpack_from("=I", answer, 20)[0] == os.fstat(sock.fileno()).st_ino:
                attributes = answer[32:length]
                while attributes:
                    size, number = struct.unpack_from("=HH", attributes)
                    if number == 1:
                        groups = attributes[4:size]
                        split = (groups[at : at + 44] for at in range(0, len(groups), 44))
                        return sorted(struct.unpack("=IIHH", g[:12])[:3] + (g[12 : 12 + g[10]],) for g in split)
                    attributes = attributes[(size + 3) & ~3 :]
            answer = answer[(length + 3) & ~3 :]


def say(port=9):
    """A datagram over the loopback interface."""
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(OWN, (V4, port))


def mreq(kind, address=b""):
    """struct packet_mreq for the loopback interface."""
    return struct.pack("iHH8s", 1, kind, len(address), address)


@case
def packet_sniffer():
    """All packets of an interface that a filter lets pass, with what tcpdump asks for."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    # ldb [23]; jeq #17, 0, 1; ret #-1; ret #0: UDP only.
    code = ((0x30, 0, 0, 23), (0x15, 0, 1, 17), (0x06, 0, 0, 0xFFFFFFFF), (0x06, 0, 0, 0))
    program = b"".join(struct.pack("HBBI", *step) for step in code)
    import ctypes

    held = ctypes.create_string_buffer(program)
    sock.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HxxxxxxQ", len(code), ctypes.addressof(held)))
    names = (8, 9, 12, 17, 23)  # AUXDATA, ORIGDEV, RESERVE, TIMESTAMP, IGNORE_OUTGOING
    for name, value in zip(names, (1, 1, 16, 2, 1)):
        sock.setsockopt(SOL_PACKET, name, value)
    for request in (mreq(1), mreq(1), mreq(0, bytes.fromhex("01005e0000c7")), mreq(2)):
        sock.setsockopt(SOL_PACKET, 1, request)
    sock.bind(("lo", ETH_P_ALL))
    name, groups = sock.getsockname(), memberships(sock)
    yield
    equal(sock.getsockname(), name, "its address")
    equal(options(sock, SOL_PACKET, *names), [1, 1, 16, 2, 1], "options")
    equal(memberships(sock), groups, "memberships")
    say()
    sock.settimeout(5)
    while True:
        data, (interface, protocol, kind, _, _) = sock.recvfrom(3000)
        equal(data[23], 17, "protocol: there is a filter")
        if OWN in data:
            equal((interface, protocol, kind), ("lo", ETH_P_IP, 0), "where from: outgoing packets are ignored")
            break


@case
def packet_without_headers():
    """Packets without their link's header, of one protocol, at all interfaces; and one that is nothing yet."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IP))
    sock.setsockopt(SOL_PACKET, 10, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 100000)
    idle = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    names = sock.getsockname(), idle.getsockname()
    yield
    equal((sock.getsockname(), idle.getsockname()), names, "addresses")
    equal(sock.getsockopt(SOL_PACKET, 10), 1, "PACKET_VERSION")
    equal(sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF), 200000, "SO_RCVBUF")
    # What came while it was restored does not count.
    sock.setblocking(False)
    try:
        while True:
            sock.recv(3000)
    except BlockingIOError:
        pass
    say()
    equal(heard(sock, lambda *_: True)[0][0], 0x45, "the header of IP")
    idle.settimeout(0.1)
    try:
        check(not idle.recv(3000), "a packet for nobody")
    except TimeoutError:
        pass
    idle.bind(("lo", ETH_P_IP))
    say()
    check(heard(idle, lambda *_: True), "no packet")


@case
def packet_fanout():
    """Two sockets that share the packets of an interface."""
    pair = [socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) for _ in range(2)]
    for sock in pair:
        sock.bind(("lo", ETH_P_IP))
        # Each in turn: PACKET_FANOUT_LB.
        sock.setsockopt(SOL_PACKET, 18, os.getpid() & 0xFFFF | 1 << 16)
    yield
    equal([sock.getsockopt(SOL_PACKET, 18) for sock in pair], [os.getpid() & 0xFFFF | 1 << 16] * 2, "PACKET_FANOUT")
    for _ in range(8):
        say()
    found = []
    for sock in pair:
        sock.settimeout(0.3)
        own = 0
        try:
            while True:
                own += OWN in sock.recv(3000)
        except TimeoutError:
            found.append(own)
    # Each packet leaves and arrives.
    equal(sum(found), 16, "packets")


@case
def packet_ring():
    """A ring of packets in shared memory."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    sock.setsockopt(SOL_PACKET, 5, struct.pack("4I", 4096, 1, 2048, 2))
    yield
    equal(sock.getsockopt(SOL_PACKET, 10), 0, "PACKET_VERSION")


main()
