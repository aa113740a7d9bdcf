"""CPython as people use it: pools of processes and threads, queues, subprocesses, asyncio."""

import asyncio
import hashlib
import multiprocessing
import os
import queue
import subprocess
import threading
import time

from lib import case, check, equal, main, path, touch


def slow_square(number):
    """Work that takes a while."""
    while not os.path.exists(path("told")):
        time.sleep(0.01)
    return number * number


@case
def processes():
    """A multiprocessing pool in the middle of its work."""
    with multiprocessing.Pool(4) as pool:
        pending = pool.map_async(slow_square, range(40), chunksize=1)
        time.sleep(0.1)
        yield
        touch("told")
        equal(pending.get(30), [n * n for n in range(40)], "results")
        equal(pool.map(len, ["a", "bb", "ccc"]), [1, 2, 3], "work given out afterwards")


@case
def threads():
    """64 threads that hand numbers on through queues."""
    queues = [queue.Queue() for _ in range(65)]

    def worker(number):
        while (item := queues[number].get()) is not None:
            queues[number + 1].put(item + 1)
        queues[number + 1].put(None)

    running = [threading.Thread(target=worker, args=(n,)) for n in range(64)]
    for thread in running:
        thread.start()
    for item in range(100):
        queues[0].put(item)
    yield
    for item in range(100, 200):
        queues[0].put(item)
    queues[0].put(None)
    found = []
    while (item := queues[64].get(timeout=30)) is not None:
        found.append(item)
    equal(found, [item + 64 for item in range(200)], "what came through all threads")
    for thread in running:
        thread.join()


@case
def subprocesses():
    """A pipeline of programs, with data on its way."""
    first = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    second = subprocess.Popen(["sha256sum"], stdin=first.stdout, stdout=subprocess.PIPE)
    first.stdout.close()
    data = os.urandom(100000)
    first.stdin.write(data)
    first.stdin.flush()
    yield
    first.stdin.write(b"more")
    first.stdin.close()
    equal(second.stdout.read().split()[0].decode(), hashlib.sha256(data + b"more").hexdigest(), "the sum")
    equal((first.wait(), second.wait()), (0, 0), "statuses")


@case
def event_loop():
    """asyncio with timers, a server, a client within, and a subprocess; the loop runs in a thread."""
    loop = asyncio.new_event_loop()
    ticks = []

    async def tick():
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0.02)

    async def handle(reader, writer):
        while line := await reader.readline():
            writer.write(line.upper())
            await writer.drain()
        writer.close()

    async def start():
        await asyncio.start_unix_server(handle, path("socket"))
        return await asyncio.open_unix_connection(path("socket")), loop.create_task(tick())

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    (reader, writer), ticker = asyncio.run_coroutine_threadsafe(start(), loop).result(10)

    async def ask(line):
        writer.write(line)
        return await reader.readline()

    equal(asyncio.run_coroutine_threadsafe(ask(b"before\n"), loop).result(10), b"BEFORE\n", "an answer")
    yield
    equal(asyncio.run_coroutine_threadsafe(ask(b"after\n"), loop).result(10), b"AFTER\n", "an answer")
    count = len(ticks)
    time.sleep(0.5)
    check(len(ticks) > count + 5, "the timers of the loop stand still")
    check(all(later >= earlier for earlier, later in zip(ticks, ticks[1:])), "a clock stepped back")
    loop.call_soon_threadsafe(ticker.cancel)


@case
def semaphores():
    """Locks, semaphores, events and conditions between processes."""
    lock, semaphore = multiprocessing.Lock(), multiprocessing.Semaphore(3)
    event, value = multiprocessing.Event(), multiprocessing.Value("i", 0)

    def work():
        event.wait(60)
        for _ in range(100):
            with semaphore, lock:
                value.value += 1

    workers = [multiprocessing.Process(target=work) for _ in range(5)]
    for worker in workers:
        worker.start()
    lock.acquire()
    yield
    event.set()
    time.sleep(0.05)
    equal(value.value, 0, "the counter while the lock is held")
    lock.release()
    for worker in workers:
        worker.join(30)
    equal(value.value, 500, "the counter")


main()
