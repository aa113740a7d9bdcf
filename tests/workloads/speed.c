/*
 * How fast a program is: speed KIND. At each word to go on it works for two seconds and logs `rate NUMBER`, what it did in
 * a second.
 */
#include "e2e.h"
#include <sys/mman.h>

#define PAGE 4096UL
#define PAGES (256UL << 20 >> 12)

static char *area;
static unsigned long seed = 1;

/* A word of a page at random, as fast as it can. */
static void writes(void)
{
	for (int n = 0; n < 1000; n++) {
		seed = seed * 6364136223846793005UL + 1442695040888963407UL;
		(*(unsigned long *)(area + (seed >> 20) % PAGES * PAGE))++;
	}
}

/* The cheapest system call. */
static void calls(void)
{
	for (int n = 0; n < 1000; n++)
		syscall(SYS_getppid);
}

static double now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
	CHECK(argc == 2, "usage: speed KIND");
	void (*work)(void) = strcmp(argv[1], "calls") ? writes : calls;
	if (work == writes) {
		area = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		CHECK(area != MAP_FAILED, "mmap: %m");
		/* Small pages, as a heap has them after a while. */
		madvise(area, PAGES * PAGE, MADV_NOHUGEPAGE);
		memset(area, 1, PAGES * PAGE);
	}
	for (;;) {
		say_ready();
		while (!told_to_go())
			pause_ms(5);
		char name[512], line[64];
		if (access(in_dir(name, sizeof name, "end"), F_OK) == 0) {
			say("ok\n");
			return 0;
		}
		double begin = now(), end;
		unsigned long rounds = 0;
		do {
			work();
			rounds++;
			end = now();
		} while (end - begin < 2);
		snprintf(line, sizeof line, "rate %.0f\n", (double)rounds * 1000 / (end - begin));
		say(line);
	}
}
