/*
 * A program that writes its memory in every way there is, at random, until it is told to end: writes CASE. Whoever tests
 * stops it, takes down every byte of it, and compares after a restore; the program checks only that it still can do what
 * it did. `everything` does all by turns, and from several threads.
 */
#include "e2e.h"
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <sys/wait.h>

#define PAGE 4096UL
#define PAGES 1024UL
#define HUGE (2UL << 20)

static __thread unsigned long seed;

static unsigned long any(unsigned long below)
{
	seed = seed * 6364136223846793005UL + 1442695040888963407UL;
	return (seed >> 33) % below;
}

static char *anonymous(size_t size, int flags)
{
	char *area = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_ANONYMOUS | flags, -1, 0);
	CHECK(area != MAP_FAILED, "mmap: %m");
	return area;
}

/* Without a place for what remains of the time: the kernel would write there when it is interrupted. */
static void nap(void)
{
	struct timespec time = { 0, 1000000 };
	nanosleep(&time, NULL);
}

static void scribble(char *at)
{
	*(unsigned long *)at = seed + 1;
	at[any(PAGE)] = (char)any(256);
}

static void fill(char *area, size_t size)
{
	for (size_t at = 0; at < size; at += PAGE)
		scribble(area + at);
}

static int scratch_file(const char *name, int flags)
{
	char path[512];
	int fd = open(in_dir(path, sizeof path, name), O_RDWR | O_CREAT | O_CLOEXEC | flags, 0600);
	CHECK(fd >= 0, "open %s: %m", name);
	return fd;
}

/* ---- one way each: set up once, then again and again ---- */

static char *plain;

static void stores_begin(void)
{
	fill(plain = anonymous(PAGES * PAGE, MAP_PRIVATE), PAGES * PAGE);
}

static void stores(void)
{
	for (int n = 0; n < 20; n++)
		scribble(plain + any(PAGES) * PAGE);
}

static char *buffer;
static int source;

static void reading_begin(void)
{
	fill(buffer = anonymous(PAGES * PAGE, MAP_PRIVATE), PAGES * PAGE);
	source = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
	CHECK(source >= 0, "/dev/urandom: %m");
}

static void reading(void)
{
	size_t len = 1 + any(3 * PAGE);
	CHECK(read(source, buffer + any(PAGES - 4) * PAGE + any(PAGE), len) > 0, "read: %m");
}

static char *direct;
static int direct_file;

static void o_direct_begin(void)
{
	fill(direct = anonymous(PAGES * PAGE, MAP_PRIVATE), PAGES * PAGE);
	int fd = scratch_file("direct", 0);
	for (int n = 0; n < 256; n++)
		CHECK(write(fd, plain ? plain + n * PAGE : direct + n * PAGE, PAGE) == (ssize_t)PAGE, "write: %m");
	CHECK(!fsync(fd), "fsync: %m");
	close(fd);
	direct_file = scratch_file("direct", O_DIRECT);
}

static void o_direct(void)
{
	size_t pages = 1 + any(8);
	ssize_t got = pread(direct_file, direct + any(PAGES - 8) * PAGE, pages * PAGE, any(248) * PAGE);
	CHECK(got == (ssize_t)(pages * PAGE), "pread with O_DIRECT: %zd, %m", got);
}

static char *victim;
static pid_t writer_pid;

static void victim_begin(void)
{
	if (!victim)
		fill(victim = anonymous(PAGES * PAGE, MAP_PRIVATE), PAGES * PAGE);
}

/* A child that writes to its parent's memory, as a debugger would. */
static pid_t child(void (*step)(pid_t parent))
{
	pid_t parent = getpid(), pid = fork();
	CHECK(pid >= 0, "fork: %m");
	if (pid)
		return pid;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (;;) {
		step(parent);
		nap();
	}
}

static void write_by_vm(pid_t parent)
{
	unsigned long words[64];
	for (int n = 0; n < 64; n++)
		words[n] = seed + any(1000);
	struct iovec from = { words, sizeof words }, to = { victim + any(PAGES) * PAGE, sizeof words };
	ssize_t written = process_vm_writev(parent, &from, 1, &to, 1, 0);
	/* The parent's memory goes a moment before the signal of its end comes. */
	if (written < 0 && errno == ESRCH)
		_exit(0);
	CHECK(written == sizeof words, "process_vm_writev: %m");
}

static void other_process_begin(void)
{
	victim_begin();
	writer_pid = child(write_by_vm);
}

static void proc_mem_begin(void)
{
	victim_begin();
}

/* The program writes its own memory by /proc/self/mem: the kernel's way is the same as for another's. */
static void proc_mem(void)
{
	int fd = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
	CHECK(fd >= 0, "/proc/self/mem: %m");
	unsigned long word = seed + any(99);
	CHECK(pwrite(fd, &word, sizeof word, (off_t)(victim + any(PAGES) * PAGE)) == sizeof word, "pwrite: %m");
	close(fd);
}

static char *shared;

static void write_shared(pid_t parent)
{
	(void)parent;
	scribble(shared + any(PAGES) * PAGE);
}

static void shared_begin(void)
{
	fill(shared = anonymous(PAGES * PAGE, MAP_SHARED), PAGES * PAGE);
	child(write_shared);
}

static char *holes;

static void dontneed_begin(void)
{
	fill(holes = anonymous(PAGES * PAGE, MAP_PRIVATE), PAGES * PAGE);
}

static void dontneed(void)
{
	size_t at = any(PAGES - 16), len = 1 + any(16);
	CHECK(!madvise(holes + at * PAGE, len * PAGE, MADV_DONTNEED), "madvise: %m");
	at = any(PAGES);
	if (any(2))
		scribble(holes + at * PAGE);
	else
		CHECK(holes[at * PAGE] || 1, "%s", "");
}

static char *moving;
static size_t moving_pages;

static void remap_begin(void)
{
	moving_pages = 64;
	fill(moving = anonymous(moving_pages * PAGE, MAP_PRIVATE), moving_pages * PAGE);
}

static void remap(void)
{
	size_t to = 16 + any(200);
	char *where = moving;
	int flags = MREMAP_MAYMOVE;
	if (any(2)) {
		where = anonymous(to * PAGE, MAP_PRIVATE);
		flags |= MREMAP_FIXED;
	}
	moving = mremap(moving, moving_pages * PAGE, to * PAGE, flags, where);
	CHECK(moving != MAP_FAILED, "mremap: %m");
	moving_pages = to;
	scribble(moving + any(to) * PAGE);
}

#define SLOTS 16
static char *slots[SLOTS];

/* New areas at places where others were a moment ago. */
static void fresh(void)
{
	size_t n = any(SLOTS);
	if (slots[n]) {
		CHECK(!munmap(slots[n], 32 * PAGE), "munmap: %m");
		slots[n] = NULL;
	} else {
		slots[n] = anonymous(32 * PAGE, MAP_PRIVATE);
		for (size_t m = any(8); m < 32; m += 1 + any(5))
			scribble(slots[n] + m * PAGE);
	}
}

static char *protected;

static void protection_begin(void)
{
	fill(protected = anonymous(PAGES * PAGE, MAP_PRIVATE), PAGES * PAGE);
}

static void protection(void)
{
	char *at = protected + any(PAGES - 8) * PAGE;
	CHECK(!mprotect(at, 8 * PAGE, PROT_READ), "mprotect: %m");
	CHECK(!mprotect(at, 8 * PAGE, PROT_READ | PROT_WRITE), "mprotect: %m");
	scribble(at + any(8) * PAGE);
}

static char *huge;

static void huge_pages_begin(void)
{
	char *area = anonymous(9 * HUGE, MAP_PRIVATE);
	huge = (char *)(((unsigned long)area + HUGE - 1) & ~(HUGE - 1));
	madvise(huge, 8 * HUGE, MADV_HUGEPAGE);
	fill(huge, 8 * HUGE);
}

static void huge_pages(void)
{
	scribble(huge + any(8 * HUGE / PAGE) * PAGE);
	if (!any(50))
		CHECK(!madvise(huge + any(8) * HUGE, HUGE, MADV_DONTNEED), "madvise: %m");
}

static void program_break(void)
{
	static char *bottom;
	if (!bottom)
		bottom = sbrk(0);
	char *now = sbrk(0);
	if (now - bottom > (long)(256 * PAGE)) {
		CHECK(sbrk(-(long)(100 * PAGE)) != (void *)-1, "sbrk: %m");
	} else {
		char *more = sbrk(8 * PAGE);
		CHECK(more != (void *)-1, "sbrk: %m");
		for (int n = 0; n < 8; n++)
			more[n * PAGE] = (char)any(256);
	}
}

static char *of_file;

static void file_private_begin(void)
{
	int fd = scratch_file("private", 0);
	for (size_t n = 0; n < PAGES; n++) {
		unsigned long page[PAGE / 8] = { n, n * n };
		CHECK(write(fd, page, PAGE) == (ssize_t)PAGE, "write: %m");
	}
	of_file = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	CHECK(of_file != MAP_FAILED, "mmap: %m");
	close(fd);
}

static void file_private(void)
{
	size_t at = any(PAGES);
	switch (any(4)) {
	case 0:
		/* Back to what the file has. */
		CHECK(!madvise(of_file + at * PAGE, PAGE, MADV_DONTNEED), "madvise: %m");
		break;
	case 1:
		CHECK(of_file[at * PAGE] || 1, "%s", "");
		break;
	default:
		scribble(of_file + at * PAGE);
	}
}

static int memory_file;
static char *of_memory_file;

static void memfd_begin(void)
{
	memory_file = memfd_create("writes", MFD_CLOEXEC);
	CHECK(memory_file >= 0 && !ftruncate(memory_file, PAGES * PAGE), "memfd: %m");
	of_memory_file = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memory_file, 0);
	CHECK(of_memory_file != MAP_FAILED, "mmap: %m");
	fill(of_memory_file, PAGES * PAGE);
}

static void memfd(void)
{
	off_t at = any(PAGES) * PAGE;
	switch (any(3)) {
	case 0:
		CHECK(!fallocate(memory_file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, PAGE), "fallocate: %m");
		break;
	case 1:
		CHECK(pwrite(memory_file, &seed, sizeof seed, at) == sizeof seed, "pwrite: %m");
		break;
	default:
		scribble(of_memory_file + at);
	}
}

static char *alike;

static void merging_begin(void)
{
	alike = anonymous(256 * PAGE, MAP_PRIVATE);
	/* Without CONFIG_KSM it is just memory. */
	madvise(alike, 256 * PAGE, MADV_MERGEABLE);
	memset(alike, 7, 256 * PAGE);
}

static void merging(void)
{
	char *at = alike + any(256) * PAGE;
	if (any(2))
		memset(at, 7, PAGE);
	else
		scribble(at);
}

static char *inherited;

static void forks_begin(void)
{
	fill(inherited = anonymous(PAGES * PAGE, MAP_PRIVATE), PAGES * PAGE);
}

/* Copy on write from both sides; the child is there for a while, and for some looks. */
static void forks(void)
{
	static pid_t now;
	static int age;
	if (now && ++age > 60) {
		CHECK(!kill(now, SIGKILL) && waitpid(now, NULL, 0) == now, "waitpid: %m");
		now = age = 0;
	}
	if (!now) {
		CHECK((now = fork()) >= 0, "fork: %m");
		if (!now) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			for (;;) {
				scribble(inherited + any(PAGES) * PAGE);
				nap();
			}
		}
	}
	scribble(inherited + any(PAGES) * PAGE);
}

static char *own;

static void write_own(pid_t parent)
{
	(void)parent;
	scribble(own + any(PAGES) * PAGE);
}

/* A child for good, and each writes its own. */
static void family_begin(void)
{
	fill(own = anonymous(PAGES * PAGE, MAP_PRIVATE), PAGES * PAGE);
	child(write_own);
}

static void family(void)
{
	write_own(0);
}

static char *guarded;

static void pageout_begin(void)
{
	fill(guarded = anonymous(PAGES * PAGE, MAP_PRIVATE), PAGES * PAGE);
}

/* Out to swap, where there is some, and moved within memory, where the kernel does so. */
static void pageout(void)
{
	char *at = guarded + any(PAGES - 8) * PAGE;
	madvise(at, 8 * PAGE, 21 /* MADV_PAGEOUT */);
	scribble(at + any(8) * PAGE);
	if (!any(20)) {
		void *pages[8];
		int nodes[8] = { 0 }, status[8];
		for (int n = 0; n < 8; n++)
			pages[n] = at + n * PAGE;
		syscall(SYS_move_pages, 0, 8, pages, nodes, status, 2);
	}
}

static char *spliced;
static int pipe_ends[2];

static void vmspliced_begin(void)
{
	fill(spliced = anonymous(PAGES * PAGE, MAP_PRIVATE), PAGES * PAGE);
	CHECK(!pipe2(pipe_ends, O_CLOEXEC | O_NONBLOCK), "pipe: %m");
}

/* Pages that a pipe holds, and that are read back into others. */
static void vmspliced(void)
{
	struct iovec iov = { spliced + any(PAGES - 4) * PAGE, 2 * PAGE };
	CHECK(vmsplice(pipe_ends[1], &iov, 1, 0) == 2 * (ssize_t)PAGE, "vmsplice: %m");
	CHECK(read(pipe_ends[0], spliced + any(PAGES - 4) * PAGE, 2 * PAGE) == 2 * (ssize_t)PAGE, "read: %m");
	scribble(iov.iov_base);
}

/* Huge pages of hugetlbfs: of these there are only so many. */
static char *reserved;

static void hugetlb_begin(void)
{
	reserved = anonymous(6 * HUGE, MAP_PRIVATE | MAP_HUGETLB);
	fill(reserved, 5 * HUGE);
	fill(plain = anonymous(PAGES * PAGE, MAP_PRIVATE), PAGES * PAGE);
}

static void hugetlb(void)
{
	if (any(10) == 0)
		scribble(reserved + any(6 * HUGE / PAGE) * PAGE);
	if (any(50) == 0)
		CHECK(!madvise(reserved + any(6) * HUGE, HUGE, MADV_DONTNEED), "madvise: %m");
	scribble(plain + any(PAGES) * PAGE);
}

static void nothing(void)
{
}

static const struct way {
	const char *name;
	void (*begin)(void);
	void (*step)(void);
} ways[] = {
	{ "stores", stores_begin, stores },
	{ "reading", reading_begin, reading },
	{ "o_direct", o_direct_begin, o_direct },
	{ "other_process", other_process_begin, nothing },
	{ "proc_mem", proc_mem_begin, proc_mem },
	{ "shared", shared_begin, nothing },
	{ "dontneed", dontneed_begin, dontneed },
	{ "remap", remap_begin, remap },
	{ "fresh", nothing, fresh },
	{ "protection", protection_begin, protection },
	{ "huge_pages", huge_pages_begin, huge_pages },
	{ "program_break", nothing, program_break },
	{ "file_private", file_private_begin, file_private },
	{ "memory_file", memfd_begin, memfd },
	{ "merging", merging_begin, merging },
	{ "forks", forks_begin, forks },
	{ "family", family_begin, family },
	{ "pageout", pageout_begin, pageout },
	{ "vmspliced", vmspliced_begin, vmspliced },
	/* What must be allowed first is the last, and not part of everything. */
	{ "hugetlb", hugetlb_begin, hugetlb },
};

#define WAYS (sizeof ways / sizeof *ways)

static int is_asked_for(size_t way, const char *word)
{
	return !strcmp(word, "everything") ? way + 1 < WAYS : !strcmp(word, ways[way].name);
}

static void *scribbler(void *number)
{
	seed = (unsigned long)number;
	for (;;) {
		stores();
		nap();
	}
	return NULL;
}

int main(int argc, char **argv)
{
	CHECK(argc == 2, "usage: writes CASE");
	int everything = !strcmp(argv[1], "everything"), known = everything;
	struct timespec now;
	clock_gettime(CLOCK_REALTIME, &now);
	seed = now.tv_nsec;
	for (size_t n = 0; n < WAYS; n++)
		if (is_asked_for(n, argv[1])) {
			ways[n].begin();
			known = 1;
		}
	CHECK(known, "no such case");
	if (everything)
		for (long n = 1; n <= 3; n++) {
			pthread_t thread;
			CHECK(!pthread_create(&thread, NULL, scribbler, (void *)n), "pthread_create");
		}
	say_ready();
	while (!told_to_go()) {
		for (size_t n = 0; n < WAYS; n++)
			if (is_asked_for(n, argv[1]))
				ways[n].step();
		nap();
	}
	say("ok\n");
	/* Children die with the program. */
	_exit(0);
}
