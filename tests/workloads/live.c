/*
 * Programs that write all the time, for dumps during which they run on. Each page has a number, written round by round in
 * the order of the pages; before a page gets the next number it must have the one before. So a snapshot that mixes two
 * instants shows itself when the writer comes to the page that is ahead or behind.
 */
#include "e2e.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

#define PAGE 4096L
#define MIB (1L << 20)

static atomic_int stop;

struct range {
	const char *name;
	volatile uint64_t *at;
	long pages;
	uint64_t round;
	/* After so many pages it rests for a millisecond; 0 is never. */
	long rest_after;
};

static volatile uint64_t *word(struct range *range, long page, int place)
{
	static const int places[] = { 0, 255, 511 };
	return range->at + page * (PAGE / 8) + places[place];
}

static void one_round(struct range *range)
{
	uint64_t next = range->round + 1;
	for (long page = 0; page < range->pages; page++) {
		for (int i = 0; i < 3; i++) {
			uint64_t found = *word(range, page, i);
			CHECK(found == range->round, "%s: page %ld has number %ld in round %ld", range->name, page, (long)found,
			      (long)next);
			*word(range, page, i) = next;
		}
		if (range->rest_after && page % range->rest_after == 0)
			pause_ms(1);
	}
	range->round = next;
}

static void *writer(void *range)
{
	do
		one_round(range);
	while (!stop);
	return NULL;
}

static struct range map(const char *name, long bytes, int flags, int advice)
{
	char *at = mmap(NULL, bytes + 2 * MIB, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS, -1, 0);
	CHECK(at != MAP_FAILED, "mmap of %s: %m", name);
	char *aligned = (char *)(((uintptr_t)at + 2 * MIB - 1) & ~(2 * MIB - 1));
	CHECK(advice < 0 || !madvise(aligned, bytes, advice), "madvise of %s: %m", name);
	return (struct range){ name, (volatile uint64_t *)aligned, bytes / PAGE, 0, 0 };
}

static pthread_t start(void *(*run)(void *), void *arg)
{
	pthread_t thread;
	CHECK(!pthread_create(&thread, NULL, run, arg), "pthread_create");
	return thread;
}

/* Maps, grows, moves, shrinks and unmaps, and knows what must be there. */
static void *churn(void *unused)
{
	(void)unused;
	for (uint64_t turn = 1; !stop; turn++) {
		long pages = 16 + turn % 64;
		uint64_t *at = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		CHECK(at != MAP_FAILED, "mmap: %m");
		for (long i = 0; i < pages; i++)
			at[i * 512] = turn + i;
		uint64_t *moved = mremap(at, pages * PAGE, 2 * pages * PAGE, MREMAP_MAYMOVE);
		CHECK(moved != MAP_FAILED, "mremap: %m");
		CHECK(!madvise(moved + 512, PAGE, MADV_DONTNEED), "madvise: %m");
		for (long i = 0; i < pages; i++)
			CHECK(moved[i * 512] == (i == 1 ? 0 : turn + i), "a moved page changed");
		CHECK(mremap(moved, 2 * pages * PAGE, PAGE, 0) == moved && moved[0] == turn, "shrunk: %m");
		CHECK(!munmap(moved, PAGE), "munmap: %m");
	}
	return NULL;
}

static void run_writers(struct range *ranges, int count)
{
	pthread_t threads[16];
	for (int i = 0; i < count; i++)
		threads[i] = start(writer, &ranges[i]);
	checkpoint();
	stop = 1;
	for (int i = 0; i < count; i++) {
		pthread_join(threads[i], NULL);
		/* Once through all of it after the end. */
		one_round(&ranges[i]);
	}
}

/* Small pages, huge pages, the heap, and areas that a fork does not copy: one thread each. */
static void writers(void)
{
	struct range ranges[] = {
		map("small pages", 48 * MIB, MAP_PRIVATE, MADV_NOHUGEPAGE),
		map("huge pages", 48 * MIB, MAP_PRIVATE, MADV_HUGEPAGE),
		map("DONTFORK", 4 * MIB, MAP_PRIVATE, MADV_DONTFORK),
		map("WIPEONFORK", 4 * MIB, MAP_PRIVATE, MADV_WIPEONFORK),
		map("shared", 4 * MIB, MAP_SHARED, -1),
		{ "heap", NULL, 2 * MIB / PAGE, 0, 0 },
	};
	ranges[5].at = (volatile uint64_t *)(((uintptr_t)sbrk(2 * MIB + PAGE) + PAGE - 1) & ~(PAGE - 1));
	pthread_t other = start(churn, NULL);
	run_writers(ranges, 6);
	pthread_join(other, NULL);
}

/* The same counter in memory of each kind, one after the other: no two may be more than a step apart. */
static void *count(void *places)
{
	volatile uint64_t *volatile *at = places;
	for (uint64_t n = at[0][0] + 1; !stop; n++)
		for (int i = 0; at[i]; i++) {
			CHECK(at[i][0] == n - 1, "place %d has %ld in step %ld", i, (long)at[i][0], (long)n);
			at[i][0] = n;
		}
	return NULL;
}

static volatile uint64_t *places[8];

static void one_instant(void)
{
	/* Pages between them, so that a snapshot takes its time. */
	struct range fill = map("fill", 64 * MIB, MAP_PRIVATE, MADV_NOHUGEPAGE);
	one_round(&fill);
	places[0] = map("first", MIB, MAP_PRIVATE, -1).at;
	places[1] = map("shared", MIB, MAP_SHARED, -1).at;
	places[2] = map("DONTFORK", 2 * MIB, MAP_PRIVATE, MADV_DONTFORK).at;
	places[3] = fill.at + 7 * 512 + 1;
	places[4] = map("WIPEONFORK", 2 * MIB, MAP_PRIVATE, MADV_WIPEONFORK).at;
	places[5] = fill.at + (fill.pages - 1) * 512 + 1;
	pthread_t thread = start(count, places);
	checkpoint();
	stop = 1;
	pthread_join(thread, NULL);
	one_round(&fill);
}

/* Parent and child count in turn, through shared memory, and note it in their own: one instant for the whole tree. */
static void turns(volatile uint64_t *turn, volatile uint64_t *own, uint64_t parity)
{
	for (int idle = 0; !turn[1]; idle++) {
		if (turn[0] % 2 != parity) {
			if (idle > 1000)
				sched_yield();
			continue;
		}
		/* Own memory says whose turn it is as well. */
		uint64_t now = turn[0];
		CHECK(*own == now || now < 2, "own memory is at turn %ld, the common one at %ld", (long)*own, (long)now);
		*own = now + 2;
		turn[0] = now + 1;
		idle = 0;
	}
}

static void tree(void)
{
	struct range common = map("before the fork", 16 * MIB, MAP_PRIVATE, MADV_NOHUGEPAGE);
	struct range turn = map("turn", MIB, MAP_SHARED, -1), own = map("own", MIB, MAP_PRIVATE, -1);
	one_round(&common);
	pid_t child = fork();
	CHECK(child >= 0, "fork: %m");
	if (child == 0) {
		struct range mine = map("the child's", 16 * MIB, MAP_PRIVATE, MADV_NOHUGEPAGE);
		pthread_t thread = start(writer, &mine);
		turns(turn.at, own.at, 1);
		stop = 1;
		pthread_join(thread, NULL);
		one_round(&common);
		_exit(0);
	}
	pthread_t thread = start(writer, &common);
	say_ready();
	/* The word to go on is looked for by a thread, so that the turns go on. */
	pid_t looker = fork();
	if (looker == 0) {
		while (!told_to_go())
			pause_ms(2);
		turn.at[1] = 1;
		_exit(0);
	}
	turns(turn.at, own.at, 0);
	stop = 1;
	pthread_join(thread, NULL);
	int status;
	CHECK(waitpid(child, &status, 0) == child && status == 0, "the child ended with %x", status);
	CHECK(waitpid(looker, &status, 0) == looker && status == 0, "the looker ended with %x", status);
}

static atomic_int signals;

static void on_signal(int signal)
{
	(void)signal;
	signals++;
}

/* What is closed must be closed for good, at once; and there is no child that it did not make. */
static void probes(int adopts)
{
	struct range fill = map("fill", 96 * MIB, MAP_PRIVATE, MADV_NOHUGEPAGE);
	char name[512];
	one_round(&fill);
	signal(SIGCHLD, on_signal);
	CHECK(!adopts || !prctl(PR_SET_CHILD_SUBREAPER, 1), "prctl: %m");
	int port = 0;
	in_dir(name, sizeof name, "locked");
	say_ready();
	for (long probe = 0; !told_to_go(); probe++) {
		int ends[2], status;
		struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port),
					       .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
		socklen_t length = sizeof address;
		CHECK(!pipe2(ends, O_NONBLOCK), "pipe2: %m");
		int file = open(name, O_RDWR | O_CREAT, 0600), server = socket(AF_INET, SOCK_STREAM, 0);
		CHECK(file >= 0 && !flock(file, LOCK_EX | LOCK_NB), "probe %ld: flock: %m", probe);
		CHECK(!bind(server, (struct sockaddr *)&address, length), "probe %ld: bind to port %d: %m", probe, port);
		CHECK(!listen(server, 1) && !getsockname(server, (struct sockaddr *)&address, &length), "listen: %m");
		port = ntohs(address.sin_port);
		pause_ms(2);
		CHECK(!close(ends[1]) && !close(file) && !close(server), "close: %m");
		char byte;
		ssize_t got = read(ends[0], &byte, 1);
		CHECK(got == 0, "probe %ld: a pipe without writers gives %zd: %m", probe, got);
		close(ends[0]);
		pid_t child = waitpid(-1, &status, WNOHANG | __WALL);
		if (adopts)
			/* It has one of its own. */
			CHECK(child == 0 || (child == -1 && errno == ECHILD), "probe %ld: it reaped %d", probe, child);
		else
			CHECK(child == -1 && errno == ECHILD, "probe %ld: there is a child: %d, %m", probe, child);
		CHECK(signals == 0, "probe %ld: %d signals", probe, signals);
	}
	int still = 0;
	CHECK(!prctl(PR_GET_CHILD_SUBREAPER, &still) && still == adopts, "it adopts orphans: %d", still);
	one_round(&fill);
}

static void unnoticed(void)
{
	probes(0);
}

/* One that adopts orphans, with a family that it must not get back in parts. */
static void subreaper(void)
{
	CHECK(!prctl(PR_SET_CHILD_SUBREAPER, 1), "prctl: %m");
	pid_t child = fork();
	if (child == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		struct range mine = map("the child's", 16 * MIB, MAP_PRIVATE, MADV_NOHUGEPAGE);
		if (fork() == 0) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			writer(&mine);
		}
		writer(&mine);
		_exit(0);
	}
	probes(1);
	kill(child, SIGKILL);
}

/* Much memory, in which nothing happens. */
static void large(void)
{
	struct range fill = map("fill", 384 * MIB, MAP_PRIVATE, MADV_NOHUGEPAGE);
	one_round(&fill);
	checkpoint();
	one_round(&fill);
}

/* Much memory, and all of it is written to all the time. */
static void large_written(void)
{
	struct range fill = map("fill", 384 * MIB, MAP_PRIVATE, MADV_NOHUGEPAGE);
	one_round(&fill);
	say_ready();
	while (!told_to_go())
		one_round(&fill);
}

/* Writes some ten thousand pages a second: no more than can be copied meanwhile. */
static void steady(void)
{
	struct range range = map("steady", 64 * MIB, MAP_PRIVATE, MADV_NOHUGEPAGE);
	one_round(&range);
	range.rest_after = 16;
	run_writers(&range, 1);
}

/* Much memory, and a userfaultfd of its own. */
static void own_userfaultfd(void)
{
	struct range fill = map("fill", 384 * MIB, MAP_PRIVATE, MADV_NOHUGEPAGE);
	CHECK(syscall(SYS_userfaultfd, O_CLOEXEC) >= 0, "userfaultfd: %m");
	one_round(&fill);
	checkpoint();
	one_round(&fill);
}

/* It would be killed for making a process. */
static void without_clone(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_clone3, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { sizeof code / sizeof *code, code };
	CHECK(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) && !prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), "prctl: %m");
	checkpoint();
}

static const struct test_case cases[] = { CASE(writers), CASE(one_instant), CASE(tree),	    CASE(unnoticed),
					  CASE(subreaper), CASE(large),
					  CASE(large_written), CASE(steady),	    CASE(without_clone),
					  CASE(own_userfaultfd) };
RUN_CASES(cases)
