"""What the Python workloads share.

A case is a generator: it sets its state up, yields (there the program is dumped and restored), and checks its state:

    @case
    def position():
        fd = os.open("data", os.O_RDWR | os.O_CREAT)
        os.lseek(fd, 5, os.SEEK_SET)
        yield
        equal(os.lseek(fd, 0, os.SEEK_CUR), 5, "position")

The harness reads the file `log`: `ready N` at each yield, then `ok` or `FAIL: reason`. The program goes on from its Nth yield
when the file `go.N` appears. No descriptor is kept open for this: what a case has open is its own.
"""

import ctypes
import os
import sys
import time
import traceback

DIR = os.environ["E2E_DIR"]
# A program that nobody tells to go on ends by itself: no test takes this long.
PATIENCE = 300
PAGE = 4096

libc = ctypes.CDLL(None, use_errno=True)
_cases = {}


class Failed(Exception):
    """A check that did not hold."""


def case(generator):
    """Makes a generator function a case that the harness can ask for by its name."""
    _cases[generator.__name__] = generator
    return generator


def check(holds, what):
    """Fails the case unless `holds`."""
    if not holds:
        raise Failed(what)


def equal(found, expected, what):
    """Fails the case unless both are the same."""
    if found != expected:
        raise Failed(f"{what}: {brief(found)} instead of {brief(expected)}")


def brief(value):
    """A value as text of a bearable length."""
    text = repr(value)
    return text if len(text) < 300 else f"{text[:300]}… ({len(text)} characters)"


def path(name):
    """A file in the program's directory."""
    return os.path.join(DIR, name)


def log(line):
    """Adds a line to the log that the harness reads."""
    fd = os.open(path("log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(fd, (line + "\n").encode())
    os.close(fd)


def wait_for(condition, what, patience=PATIENCE):
    """Polls until a condition holds. Sleeps are counted, not clocks: those are under test."""
    for _ in range(patience * 200):
        if condition():
            return
        time.sleep(0.005)
    raise Failed(f"waited {patience} s for {what}")


def touch(name):
    """Makes an empty file in the program's directory."""
    os.close(os.open(path(name), os.O_WRONLY | os.O_CREAT, 0o644))


def call(name, *args):
    """Calls a function of libc; an error becomes an OSError."""
    result = getattr(libc, name)(*args)
    if result == -1:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{name}: {os.strerror(errno)}")
    return result


def syscall(number, *args):
    """Makes a system call by its number; an error becomes an OSError."""
    libc.syscall.restype = ctypes.c_long
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    if result == -1:
        errno = ctypes.get_errno()
        raise OSError(errno, f"system call {number}: {os.strerror(errno)}")
    return result


class Child:
    """A child process that runs a generator, in step with its parent: both stand at their yields in the dump."""

    count = 0

    def __init__(self, generator, wait=True):
        Child.count += 1
        self.name = f"child.{os.getpid()}.{Child.count}"
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self._run(generator))
        if wait:
            self.wait_ready()

    def wait_ready(self):
        """Waits until the child stands at its yield."""
        wait_for(lambda: os.path.exists(path(self.name + ".ready")), f"{self.name} to be ready")

    def _run(self, generator):
        try:
            next(generator)
            touch(self.name + ".ready")
            wait_for(lambda: os.path.exists(path(self.name + ".go")), "the parent")
            for _ in generator:
                pass
            return 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            return 1

    def finish(self):
        """Lets the child check its state, and fails unless it finds it in order."""
        touch(self.name + ".go")
        _, status = os.waitpid(self.pid, 0)
        equal(status, 0, f"wait status of {self.name} (its output says why)")


def main():
    """Runs the case that the first argument names."""
    os.closerange(3, 4096)
    try:
        steps = 0
        for _ in _cases[sys.argv[1]]():
            steps += 1
            log(f"ready {steps}")
            wait_for(lambda: os.path.exists(path(f"go.{steps}")), "the word to go on")
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        log(f"FAIL: {type(error).__name__}: {error}".replace("\n", " "))
        sys.exit(1)
    log("ok")
