"""Connections that the kernel encrypts, as in tcp.py. `E2E_CIPHER` says how."""

import os
import socket
import struct

from lib import case, equal, log, main, wait_for
from network import call, exactly, serve, unread

TCP_ULP = 31
SOL_TLS = 282
TX, RX = 1, 2
SET_RECORD_TYPE = 1

# Version, cipher, and how long its nonce, key and salt are.
CIPHERS = {
    "tls12-aes128": (0x0303, 51, 8, 16, 4),
    "tls13-aes256": (0x0304, 52, 8, 32, 4),
    "tls13-chacha": (0x0304, 54, 12, 32, 0),
}


def keys(seed):
    """What both ends know of one way."""
    version, cipher, *lengths = CIPHERS[os.environ.get("E2E_CIPHER", "tls12-aes128")]
    nonce, key, salt = (bytes((seed + i) % 256 for i in range(length)) for length in lengths)
    return struct.pack("HH", version, cipher) + nonce + key + salt + bytes(8)


def encrypt(sock, tx, rx):
    """From now on the kernel encrypts what goes out with the keys of `tx`, and what comes in was with those of `rx`."""
    sock.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
    for way, seed in ((TX, tx), (RX, rx)):
        if seed is not None:
            sock.setsockopt(SOL_TLS, way, keys(seed))
    return sock


def told(sock):
    """What the kernel tells of both ways."""
    return [sock.getsockopt(SOL_TLS, way, len(keys(0))) for way in (TX, RX)]


def say(sock, own, rounds=3):
    for number in range(rounds):
        sock.sendall(b"%s %d" % (own, number))


def hear(sock, other, rounds=3):
    for number in range(rounds):
        equal(exactly(sock, len(other) + 2), b"%s %d" % (other, number), "what the other end says")


def begin(tx=1, rx=2):
    sock = encrypt((yield from serve()), tx, rx)
    hear(sock, b"peer")
    say(sock, b"program")
    return sock


def begin_peer(tx=2, rx=1):
    """What the program says it reads later: it is not asked to go on before that."""
    sock = encrypt(call(), tx, rx)
    say(sock, b"peer")
    return sock


def say_more():
    """A peer that says one word more, before the program is moved."""
    sock = begin_peer()
    sock.sendall(b"more")
    yield
    hear(sock, b"program")


@case
def both_ways():
    sock = yield from begin()
    before = told(sock)
    yield
    equal(told(sock), before, "keys, and the numbers of the next records")
    say(sock, b"program", 8)
    hear(sock, b"peer", 8)
    sock.shutdown(socket.SHUT_WR)
    equal(sock.recv(10), b"", "the peer's end")


@case
def both_ways_peer():
    sock = begin_peer()
    yield
    hear(sock, b"program")
    hear(sock, b"program", 8)
    say(sock, b"peer", 8)
    equal(sock.recv(10), b"", "the program's end")
    sock.shutdown(socket.SHUT_WR)


@case
def one_way():
    """What comes in is plain text."""
    sock = yield from begin(1, None)
    yield
    say(sock, b"program")
    hear(sock, b"peer")


@case
def one_way_peer():
    sock = begin_peer(None, 1)
    yield
    hear(sock, b"program")
    hear(sock, b"program")
    say(sock, b"peer")


@case
def begun():
    """A record that the program has begun, and not ended."""
    sock = yield from begin()
    sock.send(b"begun,", socket.MSG_MORE)
    yield
    sock.sendall(b" ended")
    equal(sock.recv(10), b"thanks", "what the peer says")


@case
def begun_peer():
    sock = begin_peer()
    yield
    hear(sock, b"program")
    equal(exactly(sock, 12), b"begun, ended", "what the program says")
    sock.sendall(b"thanks")


@case
def meanwhile():
    """The peer says something while the program is away."""
    sock = yield from begin()
    yield
    equal(exactly(sock, 14), b"while you were", "what the peer says")
    sock.sendall(b"away")


@case
def meanwhile_peer():
    sock = begin_peer()
    yield
    sock.sendall(b"while you were")
    yield
    hear(sock, b"program")
    equal(exactly(sock, 4), b"away", "what the program says")


@case
def unread_record():
    sock = yield from begin()
    wait_for(lambda: unread(sock) > 0, "a record", 20)
    yield
    equal(exactly(sock, 4), b"more", "what the peer says")


@case
def unread_record_peer():
    yield from say_more()


@case
def read_in_part():
    """A part of a record was read."""
    sock = yield from begin()
    equal(exactly(sock, 2), b"mo", "the beginning of what the peer says")
    yield
    equal(exactly(sock, 2), b"re", "the rest of it")


@case
def read_in_part_peer():
    yield from say_more()


@case
def is_there():
    """Says whether this kernel encrypts connections."""
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    try:
        encrypt(client, 1, 2)
        log("it is")
    except FileNotFoundError:
        log("it is not")
    yield


main()
