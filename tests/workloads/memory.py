"""Memory: every kind of mapping, its content, and what the kernel knows about it."""

import ctypes
import hashlib
import mmap
import os
import re
import signal

from lib import PAGE, Child, call, case, check, equal, libc, main, path, syscall

libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
for name in ("mprotect", "madvise", "mlock2"):
    getattr(libc, name).argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.shmat.restype = ctypes.c_void_p
libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
libc.shmdt.argtypes = [ctypes.c_void_p]

NONE, READ, WRITE, EXEC = 0, 1, 2, 4
SHARED, PRIVATE, FIXED, ANON = 1, 2, 0x10, 0x20
GROWSDOWN, NORESERVE = 0x100, 0x4000


def map_at(length, prot=READ | WRITE, flags=PRIVATE | ANON, fd=-1, offset=0, address=None):
    """mmap that gives an address."""
    found = libc.mmap(address, length, prot, flags, fd, offset)
    if found == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), f"mmap: {os.strerror(ctypes.get_errno())}")
    return found


def put(address, data):
    """Writes memory."""
    ctypes.memmove(address, data, len(data))


def get(address, length):
    """Reads memory."""
    return ctypes.string_at(address, length)


def pattern(length, seed=0):
    """Bytes that repeat nowhere near."""
    out = hashlib.shake_128(str(seed).encode()).digest(min(length, 65536))
    return (out * (length // len(out) + 1))[:length]


def area(address, pid="self"):
    """What smaps says about the mapping at an address: its first line's words, and the fields."""
    lines = open(f"/proc/{pid}/smaps").read().splitlines()
    found = None
    for line in lines:
        span = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) (\S+) \S+ (\S+)\s*(.*)", line)
        if span:
            if found:
                break
            start, end = int(span[1], 16), int(span[2], 16)
            if start <= address < end:
                found = {"start": start, "end": end, "prot": span[3], "offset": span[4], "inode": span[5], "path": span[6]}
        elif found:
            key, _, value = line.partition(":")
            found[key] = value.split() if key == "VmFlags" else value.strip()
    check(found, f"nothing is mapped at {address:#x}")
    return found


def kb(text):
    """`12 kB` as a number."""
    return int(text.split()[0])


@case
def private_anonymous():
    """64 MiB with a content of its own in every page, and holes that stay holes."""
    length = 64 << 20
    at = map_at(length)
    data = pattern(length // 2)
    put(at, data)
    digest = hashlib.sha256(data).hexdigest()
    del data
    yield
    equal(hashlib.sha256(get(at, length // 2)).hexdigest(), digest, "content")
    equal(kb(area(at)["Rss"]) <= length // 2048 + 1024, True, "untouched pages stayed untouched")
    equal(get(at + length // 2, 1 << 20), bytes(1 << 20), "untouched pages")


@case
def scattered_pages():
    """Every third page of a large area, which makes thousands of separate runs."""
    pages = 9000
    at = map_at(pages * PAGE)
    libc.madvise(at, pages * PAGE, 15)  # MADV_NOHUGEPAGE
    for page in range(0, pages, 3):
        put(at + page * PAGE + 100, b"page %d" % page)
    yield
    for page in range(0, pages, 3):
        want = b"page %d" % page
        equal(get(at + page * PAGE + 100, len(want)), want, f"page {page}")
    equal(get(at + PAGE, 2 * PAGE), bytes(2 * PAGE), "pages 1 and 2")


@case
def zeroed_pages():
    """Pages that were written to and hold zeros again, beside ones that were only read."""
    at = map_at(64 * PAGE)
    put(at, b"x" * (32 * PAGE))
    ctypes.memset(at, 0, 16 * PAGE)
    equal(get(at + 40 * PAGE, 8 * PAGE), bytes(8 * PAGE), "pages never written")
    yield
    equal(get(at, 16 * PAGE), bytes(16 * PAGE), "zeroed")
    equal(get(at + 16 * PAGE, 16 * PAGE), b"x" * (16 * PAGE), "full")
    equal(get(at + 32 * PAGE, 32 * PAGE), bytes(32 * PAGE), "never written")


@case
def file_private():
    """A private file mapping, some pages of which were changed: they differ from the file, the others follow it."""
    with open(path("data"), "wb") as file:
        file.write(pattern(32 * PAGE))
    fd = os.open(path("data"), os.O_RDONLY)
    at = map_at(24 * PAGE, READ | WRITE, PRIVATE, fd, 4 * PAGE)
    os.close(fd)
    put(at + 3 * PAGE, b"changed")
    put(at + 20 * PAGE + 5, b"changed too")
    yield
    want = bytearray(pattern(32 * PAGE)[4 * PAGE : 28 * PAGE])
    want[3 * PAGE : 3 * PAGE + 7] = b"changed"
    want[20 * PAGE + 5 : 20 * PAGE + 16] = b"changed too"
    equal(get(at, 24 * PAGE), bytes(want), "content")
    equal(open(path("data"), "rb").read(), pattern(32 * PAGE), "the file")
    equal(area(at)["path"], path("data"), "its path")
    equal(area(at)["offset"], "00004000", "its offset")


@case
def file_private_read_only():
    """The same, read-only again after the change, as a relocated data segment is."""
    with open(path("data"), "wb") as file:
        file.write(pattern(8 * PAGE))
    fd = os.open(path("data"), os.O_RDONLY)
    at = map_at(8 * PAGE, READ | WRITE, PRIVATE, fd)
    os.close(fd)
    put(at + 2 * PAGE, b"relocated")
    call("mprotect", at, 8 * PAGE, READ)
    yield
    equal(get(at + 2 * PAGE, 9), b"relocated", "the changed page")
    equal(get(at + 5 * PAGE, PAGE), pattern(8 * PAGE)[5 * PAGE : 6 * PAGE], "an unchanged page")
    equal(area(at)["prot"], "r--p", "protection")


@case
def shared_anonymous():
    """Shared anonymous memory of three processes: it is still one, and its content is there."""
    length = 4 << 20
    at = map_at(length, READ | WRITE, SHARED | ANON)
    put(at, pattern(length))

    def child(number):
        yield
        equal(get(at, length)[4096:], pattern(length)[4096:], "content in the child")
        put(at + number * 8, b"child %d" % number)

    children = [Child(child(number)) for number in (1, 2)]
    yield
    equal(hashlib.sha256(get(at, length)).hexdigest(), hashlib.sha256(pattern(length)).hexdigest(), "content")
    for process in children:
        process.finish()
    equal(get(at + 8, 16), b"child 1\0child 2\0"[:7] + pattern(length)[15:16] + b"child 2" + pattern(length)[23:24], "what the children wrote")


@case
def shared_anonymous_apart():
    """Two processes that map different parts of one shared memory, at different addresses."""
    at = map_at(8 * PAGE, READ | WRITE, SHARED | ANON)
    put(at, pattern(8 * PAGE))

    def child():
        call("munmap", at, 4 * PAGE)
        yield
        equal(get(at + 4 * PAGE, 4 * PAGE), pattern(8 * PAGE)[4 * PAGE :], "the child's half")
        put(at + 5 * PAGE, b"from the child")

    process = Child(child())
    yield
    process.finish()
    equal(get(at, 4 * PAGE), pattern(8 * PAGE)[: 4 * PAGE], "the first half")
    equal(get(at + 5 * PAGE, 14), b"from the child", "the other half")


@case
def shared_file():
    """A shared file mapping: writes go to the file."""
    with open(path("data"), "wb") as file:
        file.write(bytes(16 * PAGE))
    fd = os.open(path("data"), os.O_RDWR)
    at = map_at(8 * PAGE, READ | WRITE, SHARED, fd, 2 * PAGE)
    os.close(fd)
    put(at, b"before")
    yield
    equal(get(at, 6), b"before", "content")
    put(at + PAGE, b"after")
    equal(open(path("data"), "rb").read()[3 * PAGE : 3 * PAGE + 5], b"after", "the file")


@case
def shared_file_read_only():
    """A shared mapping of a file opened for reading: it cannot be made writable, before or after."""
    with open(path("data"), "wb") as file:
        file.write(pattern(PAGE))
    fd = os.open(path("data"), os.O_RDONLY)
    at = map_at(PAGE, READ, SHARED, fd)
    os.close(fd)
    yield
    equal(get(at, PAGE), pattern(PAGE), "content")
    equal(libc.mprotect(at, PAGE, READ | WRITE), -1, "mprotect to writable")


@case
def memfd():
    """A memfd with its name, size and content, mapped and open."""
    fd = os.memfd_create("a name", os.MFD_CLOEXEC)
    os.ftruncate(fd, 16 * PAGE)
    os.pwrite(fd, pattern(PAGE), 3 * PAGE)
    at = map_at(16 * PAGE, READ | WRITE, SHARED, fd)
    os.lseek(fd, 77, os.SEEK_SET)
    yield
    equal(os.readlink(f"/proc/self/fd/{fd}"), "/memfd:a name (deleted)", "name")
    equal(os.fstat(fd).st_size, 16 * PAGE, "size")
    equal(os.lseek(fd, 0, os.SEEK_CUR), 77, "position")
    equal(get(at + 3 * PAGE, PAGE), pattern(PAGE), "content")
    put(at, b"through the mapping")
    equal(os.pread(fd, 19, 0), b"through the mapping", "mapping and descriptor are one")


@case
def memfd_sealed():
    """The seals of a memfd."""
    import fcntl

    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.write(fd, b"content")
    seals = 0x0002 | 0x0004 | 0x0008  # SHRINK, GROW, WRITE
    fcntl.fcntl(fd, 1033, seals)
    yield
    equal(fcntl.fcntl(fd, 1034), seals, "seals")
    equal(os.pread(fd, 7, 0), b"content", "content")
    try:
        os.pwrite(fd, b"x", 0)
    except PermissionError:
        return
    check(False, "a sealed memfd was written to")


@case
def memfd_private():
    """A private mapping of a memfd, with a changed page."""
    fd = os.memfd_create("private")
    os.write(fd, pattern(4 * PAGE))
    at = map_at(4 * PAGE, READ | WRITE, PRIVATE, fd)
    put(at + PAGE, b"changed")
    yield
    equal(get(at + PAGE, 7), b"changed", "the changed page")
    equal(get(at, PAGE), pattern(4 * PAGE)[:PAGE], "an unchanged page")
    equal(os.pread(fd, 4 * PAGE, 0), pattern(4 * PAGE), "the memfd")


@case
def deleted_backing_private():
    """A private mapping of a file that was deleted since, as a running program's replaced library is."""
    with open(path("data"), "wb") as file:
        file.write(pattern(8 * PAGE))
    fd = os.open(path("data"), os.O_RDONLY)
    at = map_at(8 * PAGE, READ | WRITE, PRIVATE, fd)
    os.close(fd)
    put(at + PAGE, b"changed")
    os.unlink(path("data"))
    yield
    want = pattern(8 * PAGE)
    equal(get(at, 8 * PAGE), want[:PAGE] + b"changed" + want[PAGE + 7 :], "content")
    equal(os.path.exists(path("data")), False, "the file is there again")


@case
def deleted_backing_shared():
    """A shared mapping of a deleted file, of two processes."""
    with open(path("data"), "wb") as file:
        file.write(pattern(8 * PAGE))
    fd = os.open(path("data"), os.O_RDWR)
    at = map_at(8 * PAGE, READ | WRITE, SHARED, fd)
    os.close(fd)
    os.unlink(path("data"))

    def child():
        yield
        put(at, b"from the child")

    process = Child(child())
    yield
    equal(get(at, 8 * PAGE), pattern(8 * PAGE), "content")
    process.finish()
    equal(get(at, 14), b"from the child", "still shared")


@case
def protection_none():
    """Memory that nobody may touch keeps its content until somebody may."""
    at = map_at(8 * PAGE)
    put(at, pattern(8 * PAGE))
    call("mprotect", at, 8 * PAGE, NONE)
    guard = map_at(1 << 30, NONE, PRIVATE | ANON | NORESERVE)
    yield
    equal(area(at)["prot"], "---p", "protection")
    equal(area(guard)["end"] - area(guard)["start"] >= 1 << 30, True, "the reservation's size")
    call("mprotect", at, 8 * PAGE, READ)
    equal(get(at, 8 * PAGE), pattern(8 * PAGE), "content")


@case
def executable():
    """Code written at run time, run before and after."""
    at = map_at(PAGE, READ | WRITE)
    put(at, bytes.fromhex("b82a000000c3"))  # mov eax, 42; ret
    call("mprotect", at, PAGE, READ | EXEC)
    function = ctypes.CFUNCTYPE(ctypes.c_int)(at)
    equal(function(), 42, "the function before")
    yield
    equal(function(), 42, "the function after")
    equal(area(at)["prot"], "r-xp", "protection")


@case
def many_mappings():
    """2000 areas of alternating protection."""
    count = 2000
    at = map_at(count * PAGE)
    put(at, b"".join(b"%8d" % n + bytes(PAGE - 8) for n in range(count)))
    for n in range(0, count, 2):
        call("mprotect", at + n * PAGE, PAGE, READ)
    lines = [line for line in open("/proc/self/maps") if "[" not in line]
    yield
    for n in range(count):
        equal(get(at + n * PAGE, 8), b"%8d" % n, f"page {n}")
    equal(sum(at <= int(line.split("-")[0], 16) < at + count * PAGE for line in open("/proc/self/maps")), count, "areas")
    equal(len(lines) > count, True, "areas before")


@case
def many_protections():
    """Thousands of areas with a large one's pages: read-only ones of every content, ones of a private file among them, and
    advice for some. A child that has most of it in common."""
    with open(path("data"), "wb") as file:
        file.write(pattern(3000 * PAGE))
    fd = os.open(path("data"), os.O_RDONLY)
    count = 7000
    at = map_at(count * PAGE)
    put(at, b"".join(b"%8d" % n + bytes(PAGE - 8) for n in range(count)))
    of_file = range(2500, 3500)
    map_at(len(of_file) * PAGE, READ | WRITE, PRIVATE | 0x10, fd, 0, at + of_file.start * PAGE)  # MAP_FIXED
    os.close(fd)
    for n in of_file[::3]:
        put(at + n * PAGE, b"%8d" % n)
    call("madvise", at + 5000 * PAGE, 10 * PAGE, 16)  # MADV_DONTDUMP
    for n in range(0, count, 2):
        call("mprotect", at + n * PAGE, PAGE, READ)
    call("mprotect", at + 6001 * PAGE, PAGE, 0)

    def check():
        call("mprotect", at + 6001 * PAGE, PAGE, READ | WRITE)
        for n in range(count):
            want = b"%8d" % n
            if n in of_file and (n - of_file.start) % 3:
                start = (n - of_file.start) * PAGE
                want = pattern(3000 * PAGE)[start : start + 8]
            equal(get(at + n * PAGE, 8), want, f"page {n}")
        call("mprotect", at, PAGE, READ | WRITE)
        put(at, b"written")

    def child():
        put(at + PAGE + 8, b"the child's")
        yield
        check()
        equal(get(at + PAGE + 8, 11), b"the child's", "its own page")

    process = Child(child())
    yield
    check()
    process.finish()


@case
def large_protections():
    """Areas of alternating protection with many pages each, and without any here and there."""
    count, size = 2600, 9 * PAGE
    at = map_at(count * size)

    def wanted(n):
        return bytes(size) if n % 7 == 0 else b"%8d" % n + bytes([n % 251]) * (size - 8)

    for n in range(count):
        if n % 7:
            put(at + n * size, wanted(n))
    for n in range(0, count, 2):
        call("mprotect", at + n * size, size, READ)
    yield
    for n in range(count):
        if get(at + n * size, size) != wanted(n):
            raise AssertionError(f"area {n}")
    call("mprotect", at, count * size, READ | WRITE)
    put(at, pattern(size))


def advice(name, number, flag):
    """A case about one madvise setting, as smaps shows it."""

    def body():
        at = map_at(8 * PAGE)
        put(at, pattern(8 * PAGE))
        call("madvise", at + 2 * PAGE, 4 * PAGE, number)
        equal(flag in area(at + 2 * PAGE)["VmFlags"], True, f"{flag} before")
        yield
        equal(flag in area(at + 2 * PAGE)["VmFlags"], True, f"{flag} of the advised part")
        equal(flag in area(at)["VmFlags"], False, f"{flag} of the rest")
        equal(get(at, 8 * PAGE), pattern(8 * PAGE), "content")

    body.__name__ = name
    return case(body)


advice("advice_dontfork", 10, "dc")
advice("advice_dontdump", 16, "dd")
advice("advice_hugepage", 14, "hg")
advice("advice_nohugepage", 15, "nh")
advice("advice_mergeable", 12, "mg")
advice("advice_wipeonfork", 18, "wf")
advice("advice_sequential", 2, "sr")
advice("advice_random", 1, "rr")


@case
def wiped_on_fork():
    """MADV_WIPEONFORK does what it promises, after the restore."""
    at = map_at(2 * PAGE)
    put(at, pattern(2 * PAGE))
    call("madvise", at, PAGE, 18)
    yield
    pid = os.fork()
    if pid == 0:
        os._exit(0 if get(at, 2 * PAGE) == bytes(PAGE) + pattern(2 * PAGE)[PAGE:] else 1)
    equal(os.waitpid(pid, 0)[1], 0, "the child's view")


@case
def guard_regions():
    """Guard regions (MADV_GUARD_INSTALL): touching them is fatal, what is beside them is there."""
    at = map_at(8 * PAGE)
    put(at, pattern(8 * PAGE))
    call("madvise", at + 3 * PAGE, PAGE, 102)
    yield
    equal(get(at, 3 * PAGE), pattern(8 * PAGE)[: 3 * PAGE], "before the guard")
    equal(get(at + 4 * PAGE, 4 * PAGE), pattern(8 * PAGE)[4 * PAGE :], "behind the guard")
    pid = os.fork()
    if pid == 0:
        get(at + 3 * PAGE, 1)
        os._exit(0)
    equal(os.waitpid(pid, 0)[1] & 0x7F, signal.SIGSEGV, "the signal of who touches it")


@case
def locked():
    """mlock and mlock2(MLOCK_ONFAULT)."""
    at = map_at(16 * PAGE)
    put(at, pattern(4 * PAGE))
    call("mlock", at, 4 * PAGE)
    call("mlock2", at + 8 * PAGE, 4 * PAGE, 1)
    yield
    equal("lo" in area(at)["VmFlags"], True, "locked")
    equal("lo" in area(at + 8 * PAGE)["VmFlags"], True, "locked too")
    equal("lf" in area(at + 8 * PAGE)["VmFlags"], True, "locked on fault")
    equal(kb(area(at + 8 * PAGE)["Locked"]), 0, "kB locked that nobody has touched")
    equal("lo" in area(at + 6 * PAGE)["VmFlags"], False, "the rest is locked")
    equal(get(at, 4 * PAGE), pattern(4 * PAGE), "content")
    equal(kb(area(at)["Locked"]), 16, "kB locked")


@case
def secret():
    """Memory that the kernel itself cannot read."""
    number = 447  # memfd_secret
    fd = syscall(number, 0)
    os.ftruncate(fd, PAGE)
    held = mmap.mmap(fd, PAGE)
    held[0:3] = b"key"
    yield
    equal(held[0:3], b"key", "the secret")


@case
def copy_on_write():
    """Pages that parent and child share until one writes are shared again afterwards."""
    length = 16 << 20
    at = map_at(length)
    call("madvise", at, length, 15)
    put(at, pattern(length))

    def child():
        put(at + 100 * PAGE, b"child")
        yield
        equal(get(at + 100 * PAGE, 5), b"child", "the child's own page")
        equal(get(at, 100 * PAGE), pattern(length)[: 100 * PAGE], "the child's view")
        private = kb(area(at)["Private_Dirty"])
        check(private < 1024, f"{private} kB are no longer shared")

    process = Child(child())
    put(at + 200 * PAGE, b"parent")
    yield
    equal(get(at + 100 * PAGE, 5), pattern(length)[100 * PAGE : 100 * PAGE + 5], "the parent's view of the child's page")
    equal(get(at + 200 * PAGE, 6), b"parent", "the parent's own page")
    process.finish()
    private = kb(area(at)["Private_Dirty"])
    equal(get(at, 100 * PAGE), pattern(length)[: 100 * PAGE], "the parent's view")


@case
def copy_on_write_apart():
    """Three generations, each with pages of its own over those of the one before."""
    at = map_at(64 * PAGE)
    put(at, b"0" * 64 * PAGE)

    def generation(number):
        put(at + number * 16 * PAGE, b"%d" % number * 16 * PAGE)
        want = get(at, 64 * PAGE)
        process = Child(generation(number + 1)) if number < 3 else None
        yield
        equal(get(at, 64 * PAGE), want, f"memory of generation {number}")
        if process:
            process.finish()

    yield from generation(1)


@case
def huge_pages():
    """Transparent huge pages, where they are switched on, come back with their content (and as huge pages)."""
    length = 16 << 20
    at = (map_at(length + (2 << 20)) + (2 << 20) - 1) & ~((2 << 20) - 1)
    call("madvise", at, length, 14)
    put(at, pattern(length))
    before = kb(area(at)["AnonHugePages"])
    yield
    equal(get(at, length) == pattern(length), True, "content")
    after = kb(area(at)["AnonHugePages"])
    check(after >= before // 2, f"{after} kB in huge pages instead of {before}")


@case
def sysv_shared():
    """SysV shared memory of an IPC key, attached twice and in a child."""
    length = 8 * PAGE
    number = call("shmget", 0, length, 0o1600)
    at = libc.shmat(number, None, 0)
    check(at != ctypes.c_void_p(-1).value, "shmat")
    put(at, pattern(length))
    # Removed at the last detach, whatever happens to this program.
    call("shmctl", number, 0, None)

    def child():
        yield
        put(at, b"from the child")

    process = Child(child())
    yield
    equal(get(at, length), pattern(length), "content")
    process.finish()
    equal(get(at, 14), b"from the child", "still shared")
    call("shmdt", at)


@case
def dev_zero_shared():
    """A shared mapping of /dev/zero is shared anonymous memory by another name."""
    fd = os.open("/dev/zero", os.O_RDWR)
    at = map_at(4 * PAGE, READ | WRITE, SHARED, fd)
    os.close(fd)
    put(at, pattern(4 * PAGE))

    def child():
        yield
        put(at, b"from the child")

    process = Child(child())
    yield
    equal(get(at, 4 * PAGE), pattern(4 * PAGE), "content")
    process.finish()
    equal(get(at, 14), b"from the child", "still shared")


@case
def tmpfs_file():
    """A file in /dev/shm, as POSIX shared memory is, mapped by two processes."""
    name = f"/dev/shm/e2e-{os.getpid()}"
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.ftruncate(fd, 8 * PAGE)
    at = map_at(8 * PAGE, READ | WRITE, SHARED, fd)
    put(at, pattern(8 * PAGE))
    os.unlink(name)

    def child():
        yield
        put(at, b"from the child")

    process = Child(child())
    yield
    equal(get(at, 8 * PAGE), pattern(8 * PAGE), "content")
    process.finish()
    equal(os.pread(fd, 14, 0), b"from the child", "the descriptor sees it")


@case
def address_space_facts():
    """What PR_SET_MM_MAP sets: the exe link, the areas of the arguments and the environment, the auxiliary vector."""
    libc.getauxval.restype = ctypes.c_ulong

    def look():
        stat = open("/proc/self/stat").read().rsplit(") ", 1)[1].split()
        return {
            "exe": os.readlink("/proc/self/exe"),
            "cmdline": open("/proc/self/cmdline").read(),
            "environ": open("/proc/self/environ").read(),
            "auxv": open("/proc/self/auxv", "rb").read(),
            # start_code, end_code, start_stack, and start_data to env_end
            "addresses": stat[23:26] + stat[42:49],
        }

    before = look()
    yield
    after = look()
    for key, value in before.items():
        equal(after[key], value, key)


@case
def flags_of_the_process():
    """The dumpable flag, THP switched off, and the machine-check policy's neighbour: memory-deny-write-execute stays off."""
    call("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE
    call("prctl", 41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
    yield
    equal(call("prctl", 3, 0, 0, 0, 0), 0, "dumpable")
    equal(call("prctl", 42, 0, 0, 0, 0), 1, "THP disabled")
    call("prctl", 4, 1, 0, 0, 0)


@case
def vdso():
    """vvar and vdso are where they were: the C library still calls through them."""
    import time

    spots = [line.split()[0] for line in open("/proc/self/maps") if "[vdso]" in line]
    yield
    equal([line.split()[0] for line in open("/proc/self/maps") if "[vdso]" in line], spots, "the vdso's place")
    first = time.clock_gettime(time.CLOCK_MONOTONIC)
    check(time.clock_gettime(time.CLOCK_MONOTONIC) >= first, "the clock runs backwards")
    check(abs(time.time() - os.stat("/proc/self").st_ctime) < 3600, "the real-time clock is off")


main()
