"""Servers as there are many: clients outside of the tree are connected all the time."""

import os
import pty
import select
import socket
import threading

from lib import case, main, path


def listener():
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(64)
    with open(path("port.new"), "w") as file:
        file.write(str(sock.getsockname()[1]))
    os.rename(path("port.new"), path("port"))
    return sock


def answer(end):
    """Counts what it is asked, and says so."""
    count = 0
    for line in end.makefile("r"):
        count += 1
        end.sendall(f"{count} {line}".encode())


@case
def forking():
    """A process for each connection, as PostgreSQL has."""
    sock = listener()

    def serve():
        while True:
            end, _ = sock.accept()
            if os.fork() == 0:
                sock.close()
                answer(end)
                os._exit(0)
            end.close()

    threading.Thread(target=serve, daemon=True).start()
    yield


def relay(end, terminal):
    """Carries what the client types to the terminal, and what the terminal shows to the client."""
    while True:
        for ready in select.select([end, terminal], [], [])[0]:
            data = end.recv(4096) if ready is end else os.read(terminal, 4096)
            if not data:
                return
            if ready is end:
                os.write(terminal, data)
            else:
                end.sendall(data)


@case
def terminal():
    """A shell at a terminal for each connection, as sshd has."""
    sock = listener()

    def serve():
        while True:
            end, _ = sock.accept()
            pid, master = pty.fork()
            if pid == 0:
                os.execv("/bin/sh", ["sh", "-c", 'while read -r n; do echo "square $((n * n)) of $n"; done'])
            threading.Thread(target=relay, args=(end, master), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield


main()
