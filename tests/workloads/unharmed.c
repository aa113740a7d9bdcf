/*
 * A program that would notice anything that is done to it: every thread checks the same thing over and over, until the
 * word to go on. What a dump that was killed must not have changed: registers, flags, vector registers, the length of
 * sleeps, interrupted calls, descriptors, mappings, signal masks.
 */
#include "e2e.h"
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/mman.h>

static atomic_int stop;
static atomic_long turns[6];

/* Fills registers, spins for a while in user mode, and compares. */
static void *registers(void *unused)
{
	(void)unused;
	uint64_t seed = 0x0123456789abcdef;
	while (!stop) {
		uint64_t out[10], in[10], flags;
		for (int i = 0; i < 10; i++)
			in[i] = seed = seed * 6364136223846793005UL + 1442695040888963407UL;
		asm volatile("mov (%[in]), %%r8\n mov 8(%[in]), %%r9\n mov 16(%[in]), %%r10\n mov 24(%[in]), %%r11\n"
			     "mov 32(%[in]), %%r12\n mov 40(%[in]), %%r13\n mov 48(%[in]), %%r14\n mov 56(%[in]), %%r15\n"
			     "movdqu 64(%[in]), %%xmm7\n"
			     "mov $20000, %%ecx\n"
			     "std\n"
			     "1: dec %%ecx\n"
			     "jnz 1b\n"
			     "stc\n"
			     "pushfq\n"
			     "pop %[flags]\n"
			     "cld\n"
			     "mov %%r8, (%[out])\n mov %%r9, 8(%[out])\n mov %%r10, 16(%[out])\n mov %%r11, 24(%[out])\n"
			     "mov %%r12, 32(%[out])\n mov %%r13, 40(%[out])\n mov %%r14, 48(%[out])\n mov %%r15, 56(%[out])\n"
			     "movdqu %%xmm7, 64(%[out])\n"
			     : [flags] "=&a"(flags)
			     : [in] "S"(in), [out] "D"(out)
			     : "rcx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm7", "memory", "cc");
		CHECK(!memcmp(in, out, sizeof in), "registers changed");
		CHECK((flags & 0x401) == 0x401, "flags are %lx", (long)flags);
		turns[0]++;
	}
	return NULL;
}

static long milliseconds(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void *sleeps(void *unused)
{
	(void)unused;
	while (!stop) {
		long start = milliseconds();
		struct timespec nap = { 0, 30000000 };
		CHECK(!nanosleep(&nap, NULL), "nanosleep: %m");
		CHECK(milliseconds() - start >= 29, "nanosleep of 30 ms took %ld", milliseconds() - start);
		turns[1]++;
	}
	return NULL;
}

static void *polls(void *unused)
{
	(void)unused;
	while (!stop) {
		long start = milliseconds();
		CHECK(poll(NULL, 0, 20) == 0, "poll: %m");
		CHECK(milliseconds() - start >= 19, "poll of 20 ms took %ld", milliseconds() - start);
		turns[2]++;
	}
	return NULL;
}

static void *futexes(void *unused)
{
	(void)unused;
	static int word;
	while (!stop) {
		long start = milliseconds();
		struct timespec nap = { 0, 25000000 };
		/* By hand, to see what the registers of the call are after it. */
		register long limit asm("r10") = (long)&nap;
		register long second asm("r8") = 0;
		register long third asm("r9") = 0;
		long result = SYS_futex, address = (long)&word, operation = FUTEX_WAIT_PRIVATE, expected = 0;
		asm volatile("syscall"
			     : "+a"(result), "+D"(address), "+S"(operation), "+d"(expected), "+r"(limit), "+r"(second), "+r"(third)
			     :
			     : "rcx", "r11", "memory");
		long r10 = limit, r8 = second, r9 = third;
		CHECK(result == -ETIMEDOUT, "futex: %ld after %ld ms; %#lx of %p, %ld, %ld, %#lx of %p, %ld, %ld", result, milliseconds() - start,
		      address, (void *)&word, operation, expected, r10, (void *)&nap, r8, r9);
		CHECK(milliseconds() - start >= 24, "futex of 25 ms took %ld", milliseconds() - start);
		turns[3]++;
	}
	return NULL;
}

/* A pipe's reader that blocks most of the time, and a writer of a running number. */
static int ends[2];

static void *reads(void *unused)
{
	(void)unused;
	for (long expected = 0; !stop; expected++) {
		long found;
		CHECK(read(ends[0], &found, sizeof found) == sizeof found, "read: %m");
		CHECK(found == expected, "%ld came out of the pipe instead of %ld", found, expected);
		turns[4]++;
	}
	return NULL;
}

static void *calls(void *unused)
{
	(void)unused;
	sigset_t set, found;
	pid_t tid = gettid(), pid = getpid();
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 7);
	pthread_sigmask(SIG_SETMASK, &set, NULL);
	while (!stop) {
		CHECK(syscall(SYS_gettid) == tid && syscall(SYS_getpid) == pid, "another pid");
		CHECK(lseek(-1, 0, SEEK_CUR) == -1 && errno == EBADF, "lseek of nothing: %m");
		syscall(SYS_rt_sigprocmask, SIG_SETMASK, NULL, &found, 8);
		CHECK(!memcmp(&set, &found, 8), "another signal mask");
		turns[5]++;
	}
	return NULL;
}

/* Descriptors and mappings, as text. */
static void look(char *text, size_t size)
{
	int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
	size_t used = 0;
	ssize_t got;
	while ((got = read(fd, text + used, size - 1 - used)) > 0)
		used += got;
	close(fd);
	for (int i = 0; i < 64; i++)
		used += snprintf(text + used, size - used, "%d", fcntl(i, F_GETFD) >= 0);
}

static void everything(void)
{
	static char before[65536], after[65536];
	void *(*const runs[])(void *) = { registers, sleeps, polls, futexes, reads, calls };
	pthread_t threads[6];
	CHECK(!pipe(ends), "pipe: %m");
	for (int i = 0; i < 6; i++)
		CHECK(!pthread_create(&threads[i], NULL, runs[i], NULL), "pthread_create");
	pause_ms(50);
	look(before, sizeof before);
	say_ready();
	for (long number = 0; !stop; number++) {
		CHECK(write(ends[1], &number, sizeof number) == sizeof number, "write: %m");
		pause_ms(3);
		if (told_to_go()) {
			stop = 1;
			number++;
			CHECK(write(ends[1], &number, sizeof number) == sizeof number, "write: %m");
		}
	}
	/* Before the threads are joined: glibc unmaps the stacks of some that have ended. */
	look(after, sizeof after);
	for (int i = 0; i < 6; i++)
		pthread_join(threads[i], NULL);
	for (int i = 0; i < 6; i++)
		CHECK(turns[i] > 0, "thread %d did nothing", i);
	CHECK(!strcmp(before, after), "descriptors or mappings changed:\n%s\n%s", before, after);
}

static const struct test_case cases[] = { CASE(everything) };
RUN_CASES(cases)
