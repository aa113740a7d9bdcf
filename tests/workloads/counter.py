"""A program that counts, and one that was dumped before."""

import os
import time

from lib import case, check, equal, main


@case
def counter():
    """Counts on from where it stood."""
    total = sum(range(1000))
    squares = {n: n * n for n in range(1000)}
    pid = os.getpid()
    yield
    equal(sum(squares), total, "sum")
    equal(os.getpid(), pid, "pid")
    equal(squares[999], 998001, "an entry")


@case
def again():
    """Three dumps, each of what the last restore made."""
    seen = []
    for number in range(3):
        seen.append(number)
        started = time.monotonic()
        yield
        check(time.monotonic() >= started, "the clock stepped back")
    equal(seen, [0, 1, 2], "numbers")


main()
