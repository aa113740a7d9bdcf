"""Pseudo-terminals: pairs of which both sides belong to the tree, and one whose master is outside."""

import fcntl
import os
import select
import signal
import struct
import termios
import time

from lib import Child, Failed, case, check, equal, main, path, touch, wait_for

TIOCGPKT, TIOCPKT = 0x80045438, 0x5420


def quiet(fd):
    """A terminal that hands bytes on as they are."""
    mode = termios.tcgetattr(fd)
    mode[0] = mode[1] = 0
    mode[3] &= ~(termios.ICANON | termios.ECHO | termios.ISIG)
    termios.tcsetattr(fd, termios.TCSANOW, mode)
    return mode


def resize(fd, rows, columns):
    """Sets the window size."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 11, 12))


def size(fd):
    """Rows, columns, pixels."""
    return struct.unpack("4H", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))


@case
def pair():
    """Master and slave: settings, size, number, and both directions."""
    master, slave = os.openpty()
    mode = quiet(slave)
    mode[6][termios.VINTR] = b"\x07"
    termios.tcsetattr(slave, termios.TCSANOW, mode)
    mode = termios.tcgetattr(slave)
    resize(master, 33, 101)
    name = os.ttyname(slave)
    yield
    equal(termios.tcgetattr(slave), mode, "settings")
    equal(size(slave), (33, 101, 11, 12), "size")
    equal(os.ttyname(slave), name, "name")
    os.write(master, b"down")
    equal(os.read(slave, 100), b"down", "towards the slave")
    os.write(slave, b"up")
    equal(os.read(master, 100), b"up", "towards the master")


@case
def buffered():
    """Bytes that nobody has read yet, in both directions."""
    master, slave = os.openpty()
    quiet(slave)
    os.write(master, b"typed ahead")
    os.write(slave, b"printed")
    yield
    equal(os.read(slave, 100), b"typed ahead", "what was typed")
    equal(os.read(master, 100), b"printed", "what was printed")


@case
def buffered_lines():
    """A line and the start of another in a terminal that hands over whole lines."""
    master, slave = os.openpty()
    mode = termios.tcgetattr(slave)
    mode[3] &= ~termios.ECHO
    termios.tcsetattr(slave, termios.TCSANOW, mode)
    os.write(master, b"a line\nhalf of")
    time.sleep(0.05)
    yield
    equal(os.read(slave, 100), b"a line\n", "the line")
    os.write(master, b" another\n")
    equal(os.read(slave, 100), b"half of another\n", "the other line")


@case
def several():
    """Three pairs that keep their numbers, and a descriptor of the same slave opened again."""
    pairs = [os.openpty() for _ in range(3)]
    names = [os.ttyname(slave) for _, slave in pairs]
    again = os.open(names[1], os.O_RDWR | os.O_NOCTTY)
    yield
    equal([os.ttyname(slave) for _, slave in pairs], names, "names")
    for number, (master, slave) in enumerate(pairs):
        quiet(slave)
        os.write(master, b"%d" % number)
    equal(os.read(again, 10), b"1", "through the second descriptor")


@case
def only_master():
    """The slave is closed: the master says so, as before."""
    master, slave = os.openpty()
    quiet(slave)
    name = os.ttyname(slave)
    os.write(slave, b"last words")
    time.sleep(0.02)
    os.close(slave)
    yield
    slave = os.open(name, os.O_RDWR | os.O_NOCTTY)
    os.write(master, b"x")
    equal(os.read(slave, 10), b"x", "towards a slave opened later")


@case
def session():
    """A child leads a session with the slave as controlling terminal, in the foreground of it a group of its own."""
    master, slave = os.openpty()
    pid = os.fork()
    if pid == 0:
        os.close(master)
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        foreground = os.fork()
        if foreground == 0:
            os.setpgid(0, 0)
            signal.signal(signal.SIGINT, lambda *_: os._exit(55))
            touch("foreground")
            while True:
                signal.pause()
        wait_for(lambda: os.path.exists(path("foreground")), "the foreground process")
        os.tcsetpgrp(slave, foreground)
        touch("leader")
        _, status = os.waitpid(foreground, 0)
        os._exit(os.waitstatus_to_exitcode(status))
    wait_for(lambda: os.path.exists(path("leader")), "the session leader")
    foreground = os.tcgetpgrp(master)
    yield
    equal(os.tcgetpgrp(master), foreground, "the foreground group")
    os.write(master, b"\x03")
    equal(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 55, "Ctrl-C reached the foreground process")


@case
def hang_up():
    """Closing the master hangs up on the session."""
    master, slave = os.openpty()
    pid = os.fork()
    if pid == 0:
        os.close(master)
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, lambda *_: os._exit(66))
        touch("ready to hang up")
        while True:
            signal.pause()
    os.close(slave)
    wait_for(lambda: os.path.exists(path("ready to hang up")), "the child")
    yield
    os.close(master)
    equal(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 66, "the child's exit status")


@case
def packet_mode():
    """Packet mode of the master."""
    master, slave = os.openpty()
    quiet(slave)
    fcntl.ioctl(master, TIOCPKT, struct.pack("i", 1))
    yield
    equal(struct.unpack("i", fcntl.ioctl(master, TIOCGPKT, bytes(4)))[0], 1, "packet mode")
    os.write(slave, b"x")
    equal(os.read(master, 10), b"\0x", "a packet")


@case
def between_processes():
    """The child has the slave, the parent the master."""
    master, slave = os.openpty()
    quiet(slave)

    def child():
        os.close(master)
        yield
        equal(os.read(slave, 10), b"question", "what came")
        os.write(slave, b"answer")

    process = Child(child())
    os.close(slave)
    yield
    os.write(master, b"question")
    process.finish()
    equal(os.read(master, 10), b"answer", "the answer")


def read_until(fd, wanted, seconds=20):
    """What a terminal says until it has said something, or not."""
    said = b""
    for _ in range(seconds * 50):
        if select.select([fd], [], [], 0.02)[0]:
            said += os.read(fd, 1000)
            if wanted in said:
                return said
    raise Failed(f"waited for {wanted!r}, and got {said!r}")


@case
def shell():
    """An interactive bash with a sleep and a pipeline in the background: jobs, fg, Ctrl-C, Ctrl-Z and bg still work."""
    pid, master = os.forkpty()
    if pid == 0:
        os.environ["PS1"] = "prompt> "
        os.execv("/bin/bash", ["bash", "--norc", "--noprofile", "--noediting", "-i"])

    def type_in(line, answer):
        os.write(master, line + b"\n")
        return read_until(master, answer)

    type_in(b"stty -echo; variable=kept", b"> ")
    type_in(b"sleep 1000 & echo started $((1+1))", b"started 2")
    type_in(b"(while sleep 0.1; do echo x; done) | wc -l & echo started $((2+2))", b"started 4")
    type_in(b"fifo() { echo function $variable; }; echo ready $((3+3))", b"ready 6")
    yield
    said = type_in(b"jobs; echo done $((4+4))", b"done 8")
    check(said.count(b"Running") == 2, f"jobs says {said!r}")
    type_in(b"fifo", b"function kept")
    os.write(master, b"fg %1\n")
    read_until(master, b"sleep 1000")
    time.sleep(0.2)
    os.write(master, b"\x1a")
    read_until(master, b"Stopped")
    type_in(b"bg %1; echo done $((5+5))", b"done 10")
    os.write(master, b"fg %1\n")
    read_until(master, b"sleep 1000")
    time.sleep(0.2)
    os.write(master, b"\x03")
    type_in(b"echo status $?", b"status 130")
    type_in(b"kill %2; wait; exit 5", b"exit")
    equal(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 5, "the shell's status")


@case
def controlling():
    """/dev/tty, opened by a session leader and by its child, one shared and one opened later."""
    master, slave = os.openpty()
    quiet(slave)
    pid = os.fork()
    if pid == 0:
        os.close(master)
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        os.close(slave)
        tty = os.open("/dev/tty", os.O_RDWR)

        def member():
            yield
            os.write(tty, b"member")
            os.write(os.open("/dev/tty", os.O_RDWR), b" again")

        process = Child(member())
        touch("controlled")
        wait_for(lambda: os.path.exists(path("told")), "the word to go on")
        process.finish()
        equal(os.read(tty, 10), b"word", "what came through /dev/tty")
        os._exit(0)
    os.close(slave)
    wait_for(lambda: os.path.exists(path("controlled")), "the session")
    yield
    os.write(master, b"word")
    touch("told")
    equal(os.waitpid(pid, 0)[1], 0, "the session leader's status")
    equal(os.read(master, 100), b"member again", "what was written to /dev/tty")


@case
def restricted():
    """A pair for exclusive use, and one whose slave is locked."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCEXCL)
    locked = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)
    exclusive, lock = 0x80045440, 0x80045439

    def ask(fd, what):
        return struct.unpack("i", fcntl.ioctl(fd, what, bytes(4)))[0]

    yield
    equal((ask(slave, exclusive), ask(master, exclusive)), (1, 0), "exclusive use")
    equal((ask(locked, lock), ask(master, lock)), (1, 0), "locks")


@case
def never_opened():
    """A master whose slave nobody has opened: reading would wait, as before."""
    master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    yield
    try:
        os.read(master, 1)
    except BlockingIOError:
        return
    check(False, "reading does not wait")


@case
def hung_up():
    """A slave whose master is gone."""
    master, slave = os.openpty()
    os.close(master)
    yield
    equal(os.read(slave, 10), b"", "the end of a terminal that has hung up")
    try:
        os.write(slave, b"x")
    except OSError:
        return
    check(False, "it can be written to")


@case
def full():
    """As much as a pair holds, in both directions."""
    master, slave = os.openpty()
    quiet(slave)
    sent = {}
    for end in (master, slave):
        os.set_blocking(end, False)
        sent[end] = b""
        try:
            for n in range(100000):
                piece = b"%07d\n" % n
                sent[end] += piece[:os.write(end, piece)]
        except BlockingIOError:
            pass
        os.set_blocking(end, True)
    check(min(len(data) for data in sent.values()) > 4095, "it takes more than a line discipline holds")
    yield
    for end, other in ((master, slave), (slave, master)):
        found = b""
        while len(found) < len(sent[end]):
            found += os.read(other, 65536)
        check(found == sent[end], f"other bytes than were written ({len(found)})")


@case
def console():
    """The machine's own terminal."""
    tty = os.open("/dev/console" if os.path.exists("/dev/console") else "/dev/tty0", os.O_RDWR | os.O_NOCTTY)
    yield
    os.fstat(tty)


@case
def no_terminal():
    """/dev/tty of a session that has none, and none comes by itself."""
    yield
    try:
        os.open("/dev/tty", os.O_RDWR)
    except OSError:
        return
    check(False, "it has a controlling terminal")


@case
def from_shell():
    """Its standard streams are a terminal whose master is outside: a program started in a shell."""
    size_before = size(0)
    mode = termios.tcgetattr(0)
    yield
    equal(size(0), size_before, "size")
    equal(termios.tcgetattr(0), mode, "settings")
    check(os.tcgetpgrp(0) > 0, "it has no controlling terminal")
    os.write(1, b"printed\n")


main()
