/*
 * Registers that are live across the dump. Two ways in: a thread that stays in user mode, so that it is stopped by the
 * dump between any two instructions; and one that sleeps in a system call, with everything that the call preserves.
 * Each is filled from a pattern, left alone in assembly until the word to go on, and stored bit by bit.
 */
#include "e2e.h"
#include <asm/prctl.h>
#include <cpuid.h>
#include <fenv.h>
#include <immintrin.h>
#include <pthread.h>
#include <stdint.h>

/* Set by the thread that watches for the word to go on, while the main thread spins in user mode. */
static volatile int go_on;

static void *watch(void *unused)
{
	(void)unused;
	checkpoint();
	go_on = 1;
	return NULL;
}

static void start_watch(pthread_t *thread)
{
	CHECK(!pthread_create(thread, NULL, watch, NULL), "pthread_create");
}

static void fill(uint8_t *bytes, size_t size, unsigned seed)
{
	for (size_t i = 0; i < size; i++) {
		seed = seed * 1103515245 + 12345;
		bytes[i] = seed >> 16;
	}
}

static void same(const void *found, const void *expected, size_t size, const char *what)
{
	const uint8_t *a = found, *b = expected;
	for (size_t i = 0; i < size; i++)
		CHECK(a[i] == b[i], "%s: byte %zu is %02x instead of %02x", what, i, a[i], b[i]);
}

/* All general registers but rsp and the pointer to the flag hold a pattern while the thread spins. */
static void general(void)
{
	pthread_t thread;
	static uint64_t in[14], out[14], flags;
	fill((uint8_t *)in, sizeof in, 1);
	start_watch(&thread);
	asm volatile("push %%rbp\n"
		     "push %%rbx\n"
		     "lea %[in], %%rax\n"
		     "mov 8(%%rax), %%rbx\n mov 16(%%rax), %%rcx\n mov 24(%%rax), %%rdx\n mov 32(%%rax), %%rsi\n"
		     "mov 40(%%rax), %%rdi\n mov 48(%%rax), %%rbp\n mov 56(%%rax), %%r8\n mov 64(%%rax), %%r9\n"
		     "mov 72(%%rax), %%r10\n mov 80(%%rax), %%r11\n mov 88(%%rax), %%r12\n mov 96(%%rax), %%r13\n"
		     "mov 104(%%rax), %%r14\n"
		     "mov (%%rax), %%rax\n"
		     "std\n"
		     "1: cmpl $0, %[go]\n"
		     "je 1b\n"
		     "mov %%rax, %[out]\n"
		     "lea %[out], %%rax\n"
		     "mov %%rbx, 8(%%rax)\n mov %%rcx, 16(%%rax)\n mov %%rdx, 24(%%rax)\n mov %%rsi, 32(%%rax)\n"
		     "mov %%rdi, 40(%%rax)\n mov %%rbp, 48(%%rax)\n mov %%r8, 56(%%rax)\n mov %%r9, 64(%%rax)\n"
		     "mov %%r10, 72(%%rax)\n mov %%r11, 80(%%rax)\n mov %%r12, 88(%%rax)\n mov %%r13, 96(%%rax)\n"
		     "mov %%r14, 104(%%rax)\n"
		     "pushfq\n"
		     "pop %%rcx\n"
		     "mov %%rcx, %[flags]\n"
		     "cld\n"
		     "pop %%rbx\n"
		     "pop %%rbp\n"
		     : [out] "=m"(out), [flags] "=m"(flags)
		     : [in] "m"(in), [go] "m"(go_on)
		     : "rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "memory", "cc");
	same(out, in, sizeof in, "general registers");
	CHECK(flags & 1 << 10, "the direction flag is gone: flags are %lx", flags);
	pthread_join(thread, NULL);
}

/* What xsave shows of the vector state, taken in one instruction right after the spin. */
#define VECTORS(name, target_features, LOAD, STORE, COUNT, SIZE)                                                       \
	__attribute__((target(target_features))) static void name(void)                                                \
	{                                                                                                              \
		static uint8_t in[COUNT * SIZE] __attribute__((aligned(64)));                                          \
		static uint8_t out[COUNT * SIZE] __attribute__((aligned(64)));                                         \
		pthread_t thread;                                                                                      \
		fill(in, sizeof in, COUNT + SIZE);                                                                     \
		start_watch(&thread);                                                                                  \
		asm volatile(LOAD "1: cmpl $0, %[go]\n je 1b\n" STORE                                                  \
			     :                                                                                         \
			     : [in] "r"(in), [out] "r"(out), [go] "m"(go_on)                                           \
			     : VECTOR_CLOBBERS, "memory", "cc");                                                       \
		same(out, in, sizeof in, #name);                                                                       \
		pthread_join(thread, NULL);                                                                            \
	}

#define VECTOR_CLOBBERS                                                                                                \
	"xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",     \
		"xmm13", "xmm14", "xmm15"
#define MOVE16(load, R, step)                                                                                          \
	load(0, R, step) load(1, R, step) load(2, R, step) load(3, R, step) load(4, R, step) load(5, R, step)          \
		load(6, R, step) load(7, R, step) load(8, R, step) load(9, R, step) load(10, R, step)                  \
			load(11, R, step) load(12, R, step) load(13, R, step) load(14, R, step) load(15, R, step)
#define MOVE32(load, R, step)                                                                                          \
	MOVE16(load, R, step)                                                                                          \
	load(16, R, step) load(17, R, step) load(18, R, step) load(19, R, step) load(20, R, step) load(21, R, step)    \
		load(22, R, step) load(23, R, step) load(24, R, step) load(25, R, step) load(26, R, step)              \
			load(27, R, step) load(28, R, step) load(29, R, step) load(30, R, step) load(31, R, step)
#define LOAD_VEX(n, R, step) "vmovdqu " #n "*" #step "(%[in]), %%" R #n "\n"
#define STORE_VEX(n, R, step) "vmovdqu %%" R #n ", " #n "*" #step "(%[out])\n"
#define LOAD_EVEX(n, R, step) "vmovdqu64 " #n "*" #step "(%[in]), %%" R #n "\n"
#define STORE_EVEX(n, R, step) "vmovdqu64 %%" R #n ", " #n "*" #step "(%[out])\n"
#define LOAD_SSE(n, R, step) "movdqu " #n "*" #step "(%[in]), %%" R #n "\n"
#define STORE_SSE(n, R, step) "movdqu %%" R #n ", " #n "*" #step "(%[out])\n"

VECTORS(sse, "sse2", MOVE16(LOAD_SSE, "xmm", 16), MOVE16(STORE_SSE, "xmm", 16), 16, 16)
VECTORS(avx2_state, "avx2", MOVE16(LOAD_VEX, "ymm", 32), MOVE16(STORE_VEX, "ymm", 32), 16, 32)
VECTORS(avx512_state, "avx512f", MOVE32(LOAD_EVEX, "zmm", 64), MOVE32(STORE_EVEX, "zmm", 64), 32, 64)

/* On a processor without it the best that there is stands in. */
static void avx2(void)
{
	__builtin_cpu_supports("avx2") ? avx2_state() : sse();
}

static void avx512(void)
{
	__builtin_cpu_supports("avx512f") ? avx512_state() : avx2();
}

/* The eight mask registers of AVX-512. */
__attribute__((target("avx512f,avx512bw"))) static void mask_state(void)
{
	static uint64_t in[8], out[8];
	pthread_t thread;
	fill((uint8_t *)in, sizeof in, 5);
	start_watch(&thread);
	asm volatile("kmovq (%[in]), %%k0\n kmovq 8(%[in]), %%k1\n kmovq 16(%[in]), %%k2\n kmovq 24(%[in]), %%k3\n"
		     "kmovq 32(%[in]), %%k4\n kmovq 40(%[in]), %%k5\n kmovq 48(%[in]), %%k6\n kmovq 56(%[in]), %%k7\n"
		     "1: cmpl $0, %[go]\n je 1b\n"
		     "kmovq %%k0, (%[out])\n kmovq %%k1, 8(%[out])\n kmovq %%k2, 16(%[out])\n kmovq %%k3, 24(%[out])\n"
		     "kmovq %%k4, 32(%[out])\n kmovq %%k5, 40(%[out])\n kmovq %%k6, 48(%[out])\n kmovq %%k7, 56(%[out])\n"
		     :
		     : [in] "r"(in), [out] "r"(out), [go] "m"(go_on)
		     : "memory", "cc");
	same(out, in, sizeof in, "mask registers");
	pthread_join(thread, NULL);
}

static void masks(void)
{
	__builtin_cpu_supports("avx512bw") ? mask_state() : avx2();
}

/* The x87 stack, its control word, and the SSE control register with its rounding mode and masks. */
static void x87(void)
{
	static long double in[5] = { 3.14159265358979323846L, -2.5e4000L, 1.0L / 3, 0.0L, 7e-4000L }, out[5];
	static uint16_t control = 0x0b7f, control_after;
	static uint32_t mxcsr = 0x7f80 & ~0x2000u, mxcsr_after;
	pthread_t thread;
	start_watch(&thread);
	asm volatile("fninit\n fldcw %[control]\n ldmxcsr %[mxcsr]\n"
		     "fldt 64(%[in])\n fldt 48(%[in])\n fldt 32(%[in])\n fldt 16(%[in])\n fldt (%[in])\n"
		     "1: cmpl $0, %[go]\n je 1b\n"
		     "fnstcw %[control_after]\n stmxcsr %[mxcsr_after]\n"
		     "fstpt (%[out])\n fstpt 16(%[out])\n fstpt 32(%[out])\n fstpt 48(%[out])\n fstpt 64(%[out])\n fninit\n"
		     : [control_after] "=m"(control_after), [mxcsr_after] "=m"(mxcsr_after)
		     : [in] "r"(in), [out] "r"(out), [go] "m"(go_on), [control] "m"(control), [mxcsr] "m"(mxcsr)
		     : "st", "st(1)", "st(2)", "st(3)", "st(4)", "st(5)", "st(6)", "st(7)", "memory", "cc");
	for (int i = 0; i < 5; i++)
		same(&out[i], &in[i], 10, "x87 register");
	CHECK(control_after == control, "x87 control word %x instead of %x", control_after, control);
	CHECK((mxcsr_after & 0xffc0) == (mxcsr & 0xffc0), "mxcsr %x instead of %x", mxcsr_after, mxcsr);
	pthread_join(thread, NULL);
}

/* The same state of a thread that is in a system call when it is stopped: rounding modes and callee-saved registers. */
static void in_a_system_call(void)
{
	uint64_t before[4] = { 0x1122334455667788, 0x99aabbccddeeff00, 0x0f1e2d3c4b5a6978, 0x8796a5b4c3d2e1f0 }, after[4];
	double third = 1.0 / 3;
	CHECK(!fesetround(FE_UPWARD), "fesetround");
	say_ready();
	for (int i = 0; !told_to_go(); i++) {
		struct timespec nap = { 0, 20000000 };
		long result;
		CHECK(i < PATIENCE * 50, "nobody gave the word to go on");
		asm volatile("mov (%[in]), %%r12\n mov 8(%[in]), %%r13\n mov 16(%[in]), %%r14\n mov 24(%[in]), %%r15\n"
			     "movq %%r12, %%xmm8\n"
			     "syscall\n"
			     "mov %%r12, (%[out])\n mov %%r13, 8(%[out])\n mov %%r14, 16(%[out])\n"
			     "movq %%xmm8, 24(%[out])\n"
			     : "=a"(result)
			     : [in] "b"(before), [out] "d"(after), "a"(SYS_nanosleep), "D"(&nap), "S"(NULL)
			     : "rcx", "r11", "r12", "r13", "r14", "r15", "xmm8", "memory");
		CHECK(result == 0 || result == -EINTR, "nanosleep: %ld", result);
		CHECK(!memcmp(after, before, 24) && after[3] == before[0], "registers changed in a system call");
	}
	CHECK(fegetround() == FE_UPWARD, "rounding mode %x", fegetround());
	CHECK(third == 1.0 / 3, "a double changed");
}

/* The bases of fs (thread-local storage lives there) and gs. */
static void segment_bases(void)
{
	static uint64_t cell = 0x5ca1ab1e;
	unsigned long fs, gs, fs_after, gs_after;
	uint64_t seen;
	syscall(SYS_arch_prctl, ARCH_SET_GS, &cell);
	syscall(SYS_arch_prctl, ARCH_GET_FS, &fs);
	syscall(SYS_arch_prctl, ARCH_GET_GS, &gs);
	checkpoint();
	syscall(SYS_arch_prctl, ARCH_GET_FS, &fs_after);
	syscall(SYS_arch_prctl, ARCH_GET_GS, &gs_after);
	CHECK(fs == fs_after, "fs base %lx instead of %lx", fs_after, fs);
	CHECK(gs == gs_after, "gs base %lx instead of %lx", gs_after, gs);
	asm volatile("mov %%gs:0, %0" : "=r"(seen));
	CHECK(seen == cell, "gs:0 is %lx", seen);
}

/* glibc registers an rseq area for every thread; the kernel keeps the processor number in it current. */
static void rseq(void)
{
	extern const ptrdiff_t __rseq_offset __attribute__((weak));
	extern const unsigned int __rseq_size __attribute__((weak));
	CHECK(&__rseq_size && __rseq_size, "this libc registers no rseq area");
	volatile uint32_t *area = (uint32_t *)((char *)__builtin_thread_pointer() + __rseq_offset);
	checkpoint();
	CHECK(area[1] < 4096, "rseq: processor %d", (int)area[1]);
	/* A number that only the kernel can put right. */
	area[1] = 4095;
	for (int i = 0; area[1] == 4095 && i < 1000; i++)
		pause_ms(1);
	CHECK(area[1] != 4095, "the kernel no longer updates the rseq area");
}

static const struct test_case cases[] = {
	CASE(general), CASE(sse), CASE(avx2), CASE(avx512), CASE(masks), CASE(x87), CASE(in_a_system_call),
	CASE(segment_bases), CASE(rseq),
};
RUN_CASES(cases)
