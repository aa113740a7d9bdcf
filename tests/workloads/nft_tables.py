"""Prints the names of the packet filter's tables that are the engine's, one a line: NFT_MSG_GETTABLE."""

import socket
import struct

NETLINK_NETFILTER = 12
GETTABLE = 10 << 8 | 1
NAME = 1
REQUEST, DUMP = 1, 0x300
DONE, ERROR = 3, 2

netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
netlink.send(struct.pack("=IHHII", 20, GETTABLE, REQUEST | DUMP, 0, 0) + bytes(4))
while True:
    answer = netlink.recv(1 << 16)
    while answer:
        length, kind = struct.unpack_from("=IH", answer)
        if kind in (DONE, ERROR):
            raise SystemExit(0 if kind == DONE else f"error {struct.unpack_from('=i', answer, 16)[0]}")
        attributes = answer[20:length]
        while attributes:
            size, attribute = struct.unpack_from("=HH", attributes)
            name = attributes[4:size].rstrip(b"\0")
            if attribute == NAME and name.startswith(b"criu-ebpf"):
                print(name.decode())
            attributes = attributes[(size + 3) & ~3 :]
        answer = answer[(length + 3) & ~3 :]
