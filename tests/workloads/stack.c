/* What grows: the stack, a mapping that grows downwards like one, and the heap. */
#include "e2e.h"
#include <sys/mman.h>

static unsigned deep(unsigned depth, unsigned sum)
{
	volatile unsigned frame[64];
	for (int i = 0; i < 64; i++)
		frame[i] = depth * 64 + i;
	if (depth == 0)
		checkpoint();
	else
		sum = deep(depth - 1, sum);
	for (int i = 0; i < 64; i++)
		CHECK(frame[i] == depth * 64 + i, "frame %u changed", depth);
	return sum + frame[63];
}

static void deep_stack(void)
{
	CHECK(deep(4000, 0) > 0, "sum");
}

/* After the restore the stack still grows, to a size that it did not have before. */
static void stack_grows(void)
{
	checkpoint();
	volatile char *large = __builtin_alloca(4 << 20);
	for (int i = (4 << 20) - 1; i >= 0; i -= 1024)
		large[i] = i >> 10;
	CHECK(large[0] == 0 || large[0] != 0, "unreachable");
}

static void grows_down(void)
{
	char *top = mmap(NULL, 1 << 24, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(top != MAP_FAILED, "mmap: %m");
	munmap(top, 1 << 24);
	top += 1 << 23;
	char *area = mmap(top - 4096, 4096, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED_NOREPLACE, -1, 0);
	CHECK(area == top - 4096, "mmap: %m");
	for (char *at = top - 1; at > top - 20 * 4096; at -= 4096)
		*at = 'a' + (top - at) / 4096;
	checkpoint();
	for (char *at = top - 1; at > top - 20 * 4096; at -= 4096)
		CHECK(*at == 'a' + (top - at) / 4096, "page %ld holds %d", (top - at) / 4096, *at);
	/* It still grows. */
	top[-40 * 4096] = 'z';
	CHECK(top[-40 * 4096] == 'z' && top[-39 * 4096] == 0, "grown pages");
}

/* The break is where it was, and goes on growing from there. */
static void program_break(void)
{
	const size_t size = 40 * 4096;
	unsigned char *start = sbrk(size);
	CHECK(start != (void *)-1, "sbrk: %m");
	for (size_t i = 0; i < size; i++)
		start[i] = i * 7 + i / 256;
	checkpoint();
	CHECK(sbrk(0) == start + size, "the break is at %p instead of %p", sbrk(0), start + size);
	for (size_t i = 0; i < size; i++)
		CHECK(start[i] == (unsigned char)(i * 7 + i / 256), "byte %zu changed", i);
	CHECK(sbrk(size) == start + size, "sbrk after the restore: %m");
	memset(start + size, 1, size);
	CHECK(sbrk(0) == start + 2 * size, "the break did not grow");
}

static const struct test_case cases[] = { CASE(program_break), CASE(deep_stack), CASE(stack_grows), CASE(grows_down) };
RUN_CASES(cases)
