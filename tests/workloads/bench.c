/*
 * What the bench dumps: bench KIND COUNT. The first thread takes the time of day in a tight loop; at the first word to
 * go on it logs the longest gap between two looks as `gap NANOSECONDS`: that is how long it was stopped, seen from
 * inside. (The monotonic clock would not tell: it is put back to where it stood.) At the second word it checks whatever
 * KIND made.
 */
#include "e2e.h"
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>

static long count;
static unsigned long *memory;
static size_t words;

/* A value for every word, of which no two neighbours are alike. */
static unsigned long value(size_t i)
{
	return (i + 1) * 0x9e3779b97f4a7c15UL;
}

static void make_memory(size_t size)
{
	words = size / sizeof *memory;
	memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(memory != MAP_FAILED, "mmap: %m");
	for (size_t i = 0; i < words; i++)
		memory[i] = value(i);
}

static void make_memory_of(int advice)
{
	words = ((size_t)count << 20) / sizeof *memory;
	memory = mmap(NULL, words * sizeof *memory, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(memory != MAP_FAILED, "mmap: %m");
	/* A kernel without huge pages knows no advice about them. */
	madvise(memory, words * sizeof *memory, advice);
	for (size_t i = 0; i < words; i++)
		memory[i] = value(i);
}

static void make_small_pages(void)
{
	make_memory_of(MADV_NOHUGEPAGE);
}

static void make_huge_pages(void)
{
	make_memory_of(MADV_HUGEPAGE);
}

static void check_memory(void)
{
	for (size_t i = 0; i < words; i++)
		CHECK(memory[i] == value(i), "word %zu of the memory changed", i);
}

static void make_megabytes(void)
{
	make_memory((size_t)count << 20);
}

/* A thread beside writes pages at random, at a steady rate; what it added to all of them together is known. */
static volatile unsigned long added;
static volatile int rest;

static void *dirty(void *rate)
{
	size_t pages = words / 512;
	unsigned long seed = 1, done = 0;
	struct timespec begin, now;
	clock_gettime(CLOCK_MONOTONIC, &begin);
	while (!rest) {
		clock_gettime(CLOCK_MONOTONIC, &now);
		double seconds = (double)(now.tv_sec - begin.tv_sec) + (double)(now.tv_nsec - begin.tv_nsec) / 1e9;
		/* What a pause made it miss is not made up for. */
		if (done < (unsigned long)(seconds * (long)rate) && (unsigned long)(seconds * (long)rate) - done > 1000)
			done = (unsigned long)(seconds * (long)rate);
		for (; done < (unsigned long)(seconds * (long)rate); done++) {
			seed = seed * 6364136223846793005UL + 1442695040888963407UL;
			memory[(seed >> 20) % pages * 512]++;
			added++;
		}
		pause_ms(1);
	}
	return NULL;
}

static pthread_t dirtier;

static void make_dirtying(void)
{
	make_memory((size_t)count << 20);
	CHECK(!pthread_create(&dirtier, NULL, dirty, (void *)5000L), "pthread_create");
}

static void check_dirtying(void)
{
	unsigned long sum = 0;
	rest = 1;
	CHECK(!pthread_join(dirtier, NULL), "pthread_join");
	for (size_t i = 0; i < words; i++) {
		CHECK(i % 512 == 0 || memory[i] == value(i), "word %zu of the memory changed", i);
		sum += memory[i] - value(i);
	}
	CHECK(sum == added, "%lu was added to the memory, and it holds %lu", added, sum);
}

static void make_areas(void)
{
	make_memory((size_t)count * 4096);
	for (long i = 0; i < count; i += 2)
		CHECK(!mprotect((char *)memory + i * 4096, 4096, PROT_READ), "mprotect: %m");
}

static volatile int release;
static long arrived;

static void *sleeper(void *number)
{
	unsigned long mine = value((size_t)number);
	__atomic_add_fetch(&arrived, 1, __ATOMIC_SEQ_CST);
	while (!release)
		pause_ms(1000);
	return (void *)(mine == value((size_t)number) ? NULL : "changed");
}

static pthread_t *threads;

static void make_threads(void)
{
	pthread_attr_t attr;
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, 65536);
	threads = calloc(count, sizeof *threads);
	for (long i = 0; i < count - 1; i++)
		CHECK(!pthread_create(&threads[i], &attr, sleeper, (void *)i), "pthread_create");
	while (__atomic_load_n(&arrived, __ATOMIC_SEQ_CST) < count - 1)
		pause_ms(1);
}

static void check_threads(void)
{
	release = 1;
	for (long i = 0; i < count - 1; i++) {
		void *complaint;
		CHECK(!pthread_join(threads[i], &complaint), "pthread_join");
		CHECK(!complaint, "a thread's stack changed");
	}
}

static pid_t *children;

static void end_child(int number)
{
	(void)number;
	for (size_t i = 0; i < words; i++)
		if (memory[i] != value(i + getpid()))
			_exit(9);
	_exit(7);
}

static void make_processes(void)
{
	children = calloc(count, sizeof *children);
	signal(SIGTERM, end_child);
	for (long i = 0; i < count - 1; i++) {
		children[i] = fork();
		CHECK(children[i] >= 0, "fork: %m");
		if (!children[i]) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			make_memory(16 * 4096);
			for (size_t k = 0; k < words; k++)
				memory[k] = value(k + getpid());
			for (;;)
				pause();
		}
	}
	/* All of them have come to rest. */
	for (long i = 0; i < count - 1; i++) {
		char name[64], state[64] = "";
		snprintf(name, sizeof name, "/proc/%d/syscall", children[i]);
		while (strncmp(state, "34 ", 3)) {
			int fd = open(name, O_RDONLY | O_CLOEXEC);
			CHECK(fd >= 0 && read(fd, state, sizeof state - 1) > 0, "reading %s: %m", name);
			close(fd);
			sched_yield();
		}
	}
}

static void check_processes(void)
{
	for (long i = 0; i < count - 1; i++) {
		int status;
		kill(children[i], SIGTERM);
		CHECK(waitpid(children[i], &status, 0) == children[i], "waitpid: %m");
		CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7, "a child ended with %x", status);
	}
}

static int *fds;

/* A mix: of ten descriptors four are of files, two a pipe, two a socket pair, one an eventfd, one an epoll. */
static void make_descriptors(void)
{
	char name[512];
	struct rlimit limit;
	CHECK(!getrlimit(RLIMIT_NOFILE, &limit), "getrlimit: %m");
	limit.rlim_cur = limit.rlim_max;
	CHECK(!setrlimit(RLIMIT_NOFILE, &limit), "setrlimit: %m");
	fds = calloc(count, sizeof *fds);
	for (long i = 0; i + 10 <= count; i += 10) {
		for (int k = 0; k < 4; k++) {
			char leaf[32];
			snprintf(leaf, sizeof leaf, "file-%ld", (i / 10 * 4 + k) % 100);
			fds[i + k] = open(in_dir(name, sizeof name, leaf), O_RDWR | O_CREAT, 0600);
			CHECK(fds[i + k] >= 0, "open: %m");
			if (lseek(fds[i + k], i, SEEK_SET) < 0)
				fail("lseek: %m");
		}
		CHECK(!pipe(fds + i + 4), "pipe: %m");
		CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, fds + i + 6), "socketpair: %m");
		fds[i + 8] = eventfd(i, 0);
		fds[i + 9] = epoll_create1(0);
		struct epoll_event event = { .events = EPOLLIN, .data.u64 = i };
		CHECK(!epoll_ctl(fds[i + 9], EPOLL_CTL_ADD, fds[i + 4], &event), "epoll_ctl: %m");
		CHECK(write(fds[i + 5], &i, sizeof i) == sizeof i && write(fds[i + 7], &i, sizeof i) == sizeof i, "write: %m");
	}
}

static void check_descriptors(void)
{
	for (long i = 0; i + 10 <= count; i += 10) {
		unsigned long found = 0;
		struct epoll_event event;
		for (int k = 0; k < 4; k++)
			CHECK(lseek(fds[i + k], 0, SEEK_CUR) == i, "position of descriptor %d", fds[i + k]);
		CHECK(epoll_wait(fds[i + 9], &event, 1, 0) == 1 && event.data.u64 == (unsigned long)i, "epoll %d", fds[i + 9]);
		CHECK(read(fds[i + 4], &found, 8) == 8 && found == (unsigned long)i, "pipe %d holds %lu", fds[i + 4], found);
		CHECK(read(fds[i + 6], &found, 8) == 8 && found == (unsigned long)i, "socket %d holds %lu", fds[i + 6], found);
		CHECK(!i || (read(fds[i + 8], &found, 8) == 8 && found == (unsigned long)i), "eventfd %d", fds[i + 8]);
	}
}

static void nothing(void)
{
}

static const struct {
	const char *name;
	void (*make)(void);
	void (*check)(void);
} kinds[] = {
	{ "small", nothing, nothing },		      { "memory", make_megabytes, check_memory },
	{ "small_pages", make_small_pages, check_memory }, { "huge_pages", make_huge_pages, check_memory },
	{ "dirtying", make_dirtying, check_dirtying },
	{ "areas", make_areas, check_memory },	      { "threads", make_threads, check_threads },
	{ "processes", make_processes, check_processes }, { "descriptors", make_descriptors, check_descriptors },
};

/* The longest gap until the next word to go on. */
static void say_gap(void)
{
	char line[64];
	snprintf(line, sizeof line, "gap %ld\n", watch_clock());
	say(line);
	for (int i = 0; i < gap_count; i++) {
		snprintf(line, sizeof line, "stood %ld %ld\n", gaps[i].from, gaps[i].length);
		say(line);
	}
}

int main(int argc, char **argv)
{
	size_t kind = 0;
	syscall(SYS_close_range, 3U, ~0U, 0U);
	CHECK(argc == 3, "usage: bench KIND COUNT");
	while (kind < sizeof kinds / sizeof *kinds && strcmp(kinds[kind].name, argv[1]))
		kind++;
	CHECK(kind < sizeof kinds / sizeof *kinds, "no such kind");
	count = atol(argv[2]);
	kinds[kind].make();
	say_ready();
	say_gap();
	say_ready();
	say_gap();
	kinds[kind].check();
	say("ok\n");
	return 0;
}
