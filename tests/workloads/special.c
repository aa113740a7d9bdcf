/* Programs that are special to whoever stops them: traced ones, and ones that may not make every system call. */
#include "e2e.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/wait.h>

static void filter(unsigned number, unsigned verdict)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, verdict),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { sizeof code / sizeof *code, code };
	CHECK(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs: %m");
	CHECK(!syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program), "seccomp: %m");
}

/* Two filters, one over the other: both are in force afterwards. */
static void seccomp_filters(void)
{
	filter(SYS_getpriority, SECCOMP_RET_ERRNO | 77);
	filter(SYS_getpgid, SECCOMP_RET_ERRNO | 78);
	checkpoint();
	CHECK(syscall(SYS_getpriority, 0, 0) == -1 && errno == 77, "the first filter is gone: %m");
	CHECK(syscall(SYS_getpgid, 0) == -1 && errno == 78, "the second filter is gone: %m");
	CHECK(syscall(SYS_getppid) > 0, "another call is refused");
}

/* A filter that forbids what an engine wants to have done inside: it must not be tripped over. */
static void seccomp_forbids(void)
{
	filter(SYS_memfd_create, SECCOMP_RET_KILL_PROCESS);
	filter(SYS_socketpair, SECCOMP_RET_KILL_PROCESS);
	filter(SYS_mmap, SECCOMP_RET_KILL_PROCESS);
	filter(SYS_prctl, SECCOMP_RET_KILL_PROCESS);
	checkpoint();
	pid_t child = fork();
	if (!child) {
		syscall(SYS_memfd_create, "x", 0);
		_exit(0);
	}
	int status;
	CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status), "the filter is gone: status %x", status);
}

/* The first process traces its child: the child cannot be stopped by anybody else. */
static void traces(void)
{
	pid_t child = fork();
	if (!child)
		for (;;)
			pause();
	CHECK(!ptrace(PTRACE_SEIZE, child, 0, 0), "ptrace: %m");
	checkpoint();
	CHECK(!kill(child, SIGKILL) && waitpid(child, NULL, 0) == child, "the child: %m");
}

/* In vfork(2) a parent cannot be stopped until its child lets it go, which this one does when it is told to. */
static void vforks(void)
{
	pid_t child = vfork();
	if (!child) {
		checkpoint();
		_exit(7);
	}
	int status;
	CHECK(waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 7, "the child: status %x", status);
}

static void *sleeps(void *flags)
{
	CHECK(!unshare((long)flags), "unshare: %m");
	say_ready();
	for (;;)
		pause();
}

/* A thread with something of its own that threads mostly share. */
static void apart(long flags)
{
	pthread_t thread;
	CHECK(!pthread_create(&thread, NULL, sleeps, (void *)flags), "pthread_create");
	while (!told_to_go())
		pause_ms(5);
}

static void thread_with_descriptors(void)
{
	apart(CLONE_FILES);
}

static void thread_with_network(void)
{
	apart(CLONE_NEWNET);
}

/* A process that has its parent's memory, descriptors, directories and signal actions. */
static void shares_with_child(void)
{
	static char stack[64 << 10] __attribute__((aligned(16)));
	int flags = CLONE_VM | CLONE_FILES | CLONE_FS | CLONE_SIGHAND | SIGCHLD;
	pid_t child = clone((int (*)(void *))(void *)pause, stack + sizeof stack, flags, NULL);
	CHECK(child > 0, "clone: %m");
	checkpoint();
	CHECK(!kill(child, SIGKILL) && waitpid(child, NULL, 0) == child, "the child: %m");
}

static const struct test_case cases[] = { CASE(seccomp_filters), CASE(seccomp_forbids), CASE(traces), CASE(vforks), CASE(thread_with_descriptors),
	CASE(thread_with_network), CASE(shares_with_child) };
RUN_CASES(cases)
