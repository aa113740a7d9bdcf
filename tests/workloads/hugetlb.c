/*
 * Memory of huge pages that hugetlbfs gives: private, shared, memory files, System V segments, files. The pages are taken
 * from what the kernel may make on demand (nr_overcommit_hugepages).
 */
#include "e2e.h"
#include <linux/memfd.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/shm.h>
#include <sys/wait.h>

#define HUGE (2UL << 20)

/* A value for every word of a page, of which no two pages have the same. */
static unsigned long value(unsigned page, size_t i)
{
	return (i + 1) * 0x9e3779b97f4a7c15UL + page;
}

static void fill(char *at, unsigned page)
{
	unsigned long *words = (unsigned long *)at;
	for (size_t i = 0; i < HUGE / sizeof *words; i++)
		words[i] = value(page, i);
}

static void check(const char *at, unsigned page)
{
	const unsigned long *words = (const unsigned long *)at;
	for (size_t i = 0; i < HUGE / sizeof *words; i++)
		CHECK(words[i] == value(page, i), "word %zu of page %u is %#lx", i, page, words[i]);
}

static void check_zero(const char *at)
{
	for (size_t i = 0; i < HUGE; i++)
		CHECK(at[i] == 0, "byte %zu is %d", i, at[i]);
}

static char *map(size_t pages, int prot, int flags, int fd, off_t offset)
{
	char *at = mmap(NULL, pages * HUGE, prot, flags, fd, offset);
	CHECK(at != MAP_FAILED, "mmap: %m");
	return at;
}

/* What smaps says of the area that begins there: its page size in KiB, and whether its flags have this one. */
static long page_size(const char *at)
{
	char line[512];
	unsigned long start, end;
	long size = -1;
	int here = 0;
	FILE *smaps = fopen("/proc/self/smaps", "re");
	CHECK(smaps, "smaps: %m");
	while (fgets(line, sizeof line, smaps)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			here = start <= (unsigned long)at && (unsigned long)at < end;
		else if (here)
			sscanf(line, "KernelPageSize: %ld kB", &size);
	}
	fclose(smaps);
	return size;
}

static void private_pages(void)
{
	char *at = map(4, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
	fill(at, 1);
	fill(at + 2 * HUGE, 2);
	/* A part that can only be read, with a page of its own. */
	CHECK(mprotect(at + 2 * HUGE, HUGE, PROT_READ) == 0, "mprotect: %m");
	checkpoint();
	check(at, 1);
	check(at + 2 * HUGE, 2);
	CHECK(page_size(at) == 2048 && page_size(at + 2 * HUGE) == 2048, "pages of %ld KiB", page_size(at));
	check_zero(at + HUGE);
	fill(at + 3 * HUGE, 3);
	check(at + 3 * HUGE, 3);
	CHECK(mprotect(at, 4 * HUGE, PROT_READ | PROT_WRITE) == 0, "mprotect: %m");
	fill(at + 2 * HUGE, 4);
	CHECK(munmap(at + HUGE, HUGE) == 0, "munmap: %m");
}

/* Child and parent have a page in common, and each one of its own. */
static void copy_on_write(void)
{
	char *at = map(2, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
	fill(at, 1);
	fill(at + HUGE, 2);
	pid_t child = fork();
	CHECK(child >= 0, "fork: %m");
	if (child == 0) {
		fill(at + HUGE, 3);
		steps = 1;
		while (!told_to_go())
			pause_ms(5);
		check(at, 1);
		check(at + HUGE, 3);
		fill(at, 4);
		check(at, 4);
		_exit(0);
	}
	pause_ms(200);
	checkpoint();
	int status;
	CHECK(waitpid(child, &status, 0) == child && status == 0, "the child: %x", status);
	check(at, 1);
	check(at + HUGE, 2);
}

/* Memory in common with a child, whoever it is of. */
static void in_common(char *at)
{
	volatile unsigned long *word = (volatile unsigned long *)(at + 2 * HUGE);
	fill(at, 1);
	*word = 5;
	pid_t child = fork();
	CHECK(child >= 0, "fork: %m");
	if (child == 0) {
		steps = 1;
		while (!told_to_go())
			pause_ms(5);
		check(at, 1);
		*word += 1;
		_exit(0);
	}
	checkpoint();
	int status;
	CHECK(waitpid(child, &status, 0) == child && status == 0, "the child: %x", status);
	CHECK(*word == 6, "the child's word is %lu", *word);
	check(at, 1);
	check_zero(at + HUGE);
	CHECK(page_size(at) == 2048, "pages of %ld KiB", page_size(at));
}

static void shared_pages(void)
{
	in_common(map(3, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0));
}

static void segment(void)
{
	int id = shmget(IPC_PRIVATE, 3 * HUGE, IPC_CREAT | SHM_HUGETLB | 0600);
	CHECK(id >= 0, "shmget: %m");
	char *at = shmat(id, NULL, 0);
	CHECK(at != (void *)-1, "shmat: %m");
	in_common(at);
	struct shmid_ds about;
	CHECK(shmctl(id, IPC_STAT, &about) == 0, "the segment: %m");
	CHECK(about.shm_segsz == 3 * HUGE && about.shm_nattch == 1, "%zu bytes, %lu times", about.shm_segsz,
	      about.shm_nattch);
	CHECK(shmctl(id, IPC_RMID, NULL) == 0, "removing it: %m");
}

/* A memory file that is mapped, shared and private, and open. */
static void memory_file(void)
{
	int fd = memfd_create("large", MFD_HUGETLB | MFD_HUGE_2MB | MFD_ALLOW_SEALING);
	CHECK(fd >= 0, "memfd_create: %m");
	CHECK(ftruncate(fd, 4 * HUGE) == 0, "ftruncate: %m");
	char *shared = map(4, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	fill(shared, 1);
	fill(shared + 3 * HUGE, 2);
	char *private = map(2, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 2 * HUGE);
	fill(private, 3);
	CHECK(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK) == 0, "sealing: %m");
	CHECK(lseek(fd, 77, SEEK_SET) == 77, "lseek: %m");
	checkpoint();
	check(shared, 1);
	check_zero(shared + HUGE);
	check_zero(shared + 2 * HUGE);
	check(shared + 3 * HUGE, 2);
	check(private, 3);
	check(private + HUGE, 2);
	CHECK(lseek(fd, 0, SEEK_CUR) == 77, "its position");
	CHECK(fcntl(fd, F_GET_SEALS) == F_SEAL_SHRINK, "its seals");
	CHECK(ftruncate(fd, HUGE) < 0 && errno == EPERM, "it shrank");
	CHECK(page_size(shared) == 2048 && page_size(private) == 2048, "pages of %ld KiB", page_size(shared));
	/* It still is the file that is mapped. */
	char *again = map(1, PROT_READ, MAP_SHARED, fd, HUGE);
	fill(shared + HUGE, 4);
	check(again, 4);
}

/* A file of a mounted hugetlbfs, which stays there. */
static void file_of_a_mount(void)
{
	char dir[512], name[600];
	in_dir(dir, sizeof dir, "huge");
	CHECK(mkdir(dir, 0700) == 0, "mkdir: %m");
	CHECK(mount("none", dir, "hugetlbfs", 0, NULL) == 0, "mount: %m");
	snprintf(name, sizeof name, "%s/file", dir);
	int fd = open(name, O_RDWR | O_CREAT, 0600);
	CHECK(fd >= 0 && ftruncate(fd, 2 * HUGE) == 0, "the file: %m");
	char *shared = map(2, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	fill(shared, 1);
	fill(shared + HUGE, 2);
	char *private = map(2, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	fill(private, 3);
	checkpoint();
	check(shared, 1);
	check(shared + HUGE, 2);
	check(private, 3);
	check(private + HUGE, 2);
	CHECK(page_size(shared) == 2048 && page_size(private) == 2048, "pages of %ld KiB", page_size(shared));
	close(fd);
	munmap(shared, 2 * HUGE);
	munmap(private, 2 * HUGE);
	CHECK(umount(dir) == 0, "umount: %m");
}

static const struct test_case cases[] = { CASE(private_pages), CASE(copy_on_write), CASE(shared_pages), CASE(segment),
					  CASE(memory_file), CASE(file_of_a_mount) };
RUN_CASES(cases)
