/*
 * What the C workloads share; the protocol is that of lib.py. A case is a function that sets its state up, calls
 * checkpoint() (there the program is dumped and restored), and checks its state with CHECK.
 */
#ifndef E2E_H
#define E2E_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* A program that nobody tells to go on ends by itself: no test takes this long. */
#define PATIENCE 300

static int steps;

static const char *in_dir(char *buffer, size_t size, const char *name)
{
	snprintf(buffer, size, "%s/%s", getenv("E2E_DIR"), name);
	return buffer;
}

static void say(const char *line)
{
	char name[512];
	int fd = open(in_dir(name, sizeof name, "log"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
	if (fd < 0 || write(fd, line, strlen(line)) < 0)
		_exit(3);
	close(fd);
}

__attribute__((format(printf, 1, 2), noreturn)) static void fail(const char *format, ...)
{
	char line[600] = "FAIL: ";
	va_list args;
	va_start(args, format);
	vsnprintf(line + 6, sizeof line - 8, format, args);
	va_end(args);
	strcat(line, "\n");
	say(line);
	_exit(1);
}

#define CHECK(holds, ...)                                                                                              \
	do {                                                                                                           \
		if (!(holds))                                                                                          \
			fail(__VA_ARGS__);                                                                             \
	} while (0)

/* Sleeps in full, whatever interrupts it. */
static inline void pause_ms(long ms)
{
	struct timespec left = { ms / 1000, ms % 1000 * 1000000 };
	while (nanosleep(&left, &left) && errno == EINTR)
		;
}

static inline void say_ready(void)
{
	char line[32];
	snprintf(line, sizeof line, "ready %d\n", ++steps);
	say(line);
}

/* Whether the harness has given the word to go on from the last say_ready(). */
static inline int told_to_go(void)
{
	char name[512], word[32];
	snprintf(word, sizeof word, "go.%d", steps);
	return access(in_dir(name, sizeof name, word), F_OK) == 0;
}

static inline void checkpoint(void)
{
	say_ready();
	for (int i = 0; !told_to_go(); i++) {
		CHECK(i < PATIENCE * 200, "nobody gave the word to go on");
		pause_ms(5);
	}
}

static inline long time_of_day(void)
{
	struct timespec t;
	clock_gettime(CLOCK_REALTIME, &t);
	return t.tv_sec * 1000000000L + t.tv_nsec;
}

/* Gaps of more than a millisecond that watch_clock() has found: when each began, and how long it was. */
static struct {
	long from, length;
} gaps[4096];
static int gap_count;

/* The longest gap until the next word to go on. Nothing that could wait for a disk happens between two looks. */
static inline long watch_clock(void)
{
	long gap = 0, last = time_of_day();
	for (unsigned long i = 1;; i++) {
		struct timespec nap = { 0, 20000 };
		if (i % 512 == 0) {
			if (told_to_go())
				break;
			last = time_of_day();
		}
		nanosleep(&nap, NULL);
		long now = time_of_day();
		if (now - last > gap)
			gap = now - last;
		if (now - last > 1000000 && gap_count < (int)(sizeof gaps / sizeof *gaps)) {
			gaps[gap_count].from = last;
			gaps[gap_count++].length = now - last;
		}
		last = now;
	}
	return gap;
}

struct test_case {
	const char *name;
	void (*run)(void);
};

static inline int run_case(const struct test_case *cases, size_t count, int argc, char **argv)
{
	syscall(SYS_close_range, 3U, ~0U, 0U);
	for (size_t i = 0; argc > 1 && i < count; i++) {
		if (!strcmp(cases[i].name, argv[1])) {
			cases[i].run();
			say("ok\n");
			return 0;
		}
	}
	fail("no such case");
}

#define CASE(function) { #function, function }
#define RUN_CASES(cases)                                                                                               \
	int main(int argc, char **argv)                                                                                \
	{                                                                                                              \
		return run_case(cases, sizeof cases / sizeof *cases, argc, argv);                                      \
	}
#endif
