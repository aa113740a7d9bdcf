/* Signals: actions, masks, and what is pending, with everything that was sent along. */
#include "e2e.h"
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/wait.h>

struct seen {
	int number, code, value;
	pid_t pid;
};
static struct seen seen[256];
static volatile int seen_count;

static void note(int number, siginfo_t *info, void *context)
{
	(void)context;
	if (seen_count < 256)
		seen[seen_count++] = (struct seen){ number, info->si_code, info->si_value.sival_int, info->si_pid };
}

static void handle(int number, int flags)
{
	struct sigaction action = { .sa_sigaction = note, .sa_flags = SA_SIGINFO | flags };
	sigfillset(&action.sa_mask);
	CHECK(!sigaction(number, &action, NULL), "sigaction: %m");
}

static void block(int how, int number)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, number);
	CHECK(!pthread_sigmask(how, &set, NULL), "pthread_sigmask");
}

static int is_pending(int number)
{
	sigset_t set;
	sigpending(&set);
	return sigismember(&set, number);
}

struct kernel_action {
	void *handler;
	unsigned long flags;
	void *restorer;
	unsigned long mask;
};

/* All 64 actions, as the kernel keeps them, with flags and masks. */
static void actions(void)
{
	static struct kernel_action before[65], after[65];
	for (int n = 1; n <= 64; n++) {
		struct kernel_action action = { NULL, 0, NULL, 0 };
		if (n == SIGKILL || n == SIGSTOP)
			continue;
		switch (n % 4) {
		case 1:
			action = (struct kernel_action){ (void *)note, SA_SIGINFO | SA_RESTART | SA_ONSTACK | 0x04000000,
							 (void *)0x1234000, 1UL << (n % 60) };
			break;
		case 2:
			action = (struct kernel_action){ SIG_IGN, SA_NODEFER, NULL, ~0UL };
			break;
		case 3:
			action = (struct kernel_action){ (void *)0xdead000, SA_RESETHAND | SA_NOCLDSTOP | 0x04000000,
							 (void *)0xbeef, 0x5555 };
			break;
		}
		CHECK(!syscall(SYS_rt_sigaction, n, &action, NULL, 8), "rt_sigaction %d: %m", n);
	}
	for (int n = 1; n <= 64; n++)
		syscall(SYS_rt_sigaction, n, NULL, &before[n], 8);
	checkpoint();
	for (int n = 1; n <= 64; n++) {
		syscall(SYS_rt_sigaction, n, NULL, &after[n], 8);
		CHECK(after[n].handler == before[n].handler, "signal %d: handler %p", n, after[n].handler);
		CHECK(after[n].flags == before[n].flags, "signal %d: flags %lx", n, after[n].flags);
		CHECK(after[n].mask == before[n].mask, "signal %d: mask %lx", n, after[n].mask);
		CHECK(after[n].restorer == before[n].restorer, "signal %d: restorer %p", n, after[n].restorer);
	}
}

static void blocked(void)
{
	sigset_t set, found;
	sigfillset(&set);
	sigdelset(&set, SIGCHLD);
	sigdelset(&set, SIGRTMIN + 3);
	sigprocmask(SIG_SETMASK, &set, NULL);
	sigprocmask(SIG_SETMASK, NULL, &set);
	checkpoint();
	sigprocmask(SIG_SETMASK, NULL, &found);
	CHECK(!memcmp(&set, &found, 8), "another mask");
}

/* A handler that is running: its frame is on the stack, its mask in force; on its return the old one is back. */
static volatile int in_handler;

static void long_handler(int number)
{
	(void)number;
	in_handler = 1;
	checkpoint();
	sigset_t set;
	sigprocmask(SIG_SETMASK, NULL, &set);
	CHECK(sigismember(&set, SIGUSR1) && sigismember(&set, SIGUSR2), "the handler's mask is gone");
	in_handler = 2;
}

static void inside_a_handler(void)
{
	struct sigaction action = { .sa_handler = long_handler };
	sigaddset(&action.sa_mask, SIGUSR2);
	sigaction(SIGUSR1, &action, NULL);
	raise(SIGUSR1);
	CHECK(in_handler == 2, "the handler did not end");
	sigset_t set;
	sigprocmask(SIG_SETMASK, NULL, &set);
	CHECK(!sigismember(&set, SIGUSR1) && !sigismember(&set, SIGUSR2), "the handler's mask stayed");
}

/* Pending for the process, with sender and value. */
static void pending(void)
{
	handle(SIGUSR1, 0);
	handle(SIGTERM, 0);
	block(SIG_BLOCK, SIGUSR1);
	block(SIG_BLOCK, SIGTERM);
	pid_t child = fork();
	if (!child) {
		union sigval value = { .sival_int = 4711 };
		sigqueue(getppid(), SIGUSR1, value);
		kill(getppid(), SIGTERM);
		_exit(0);
	}
	waitpid(child, NULL, 0);
	CHECK(is_pending(SIGUSR1) && is_pending(SIGTERM), "nothing is pending before the dump");
	checkpoint();
	CHECK(is_pending(SIGUSR1) && is_pending(SIGTERM), "nothing is pending any more");
	CHECK(seen_count == 0, "delivered although blocked");
	block(SIG_UNBLOCK, SIGUSR1);
	CHECK(seen_count == 1 && seen[0].number == SIGUSR1, "SIGUSR1 was not delivered");
	CHECK(seen[0].code == SI_QUEUE && seen[0].value == 4711 && seen[0].pid == child, "siginfo: code %d value %d pid %d",
	      seen[0].code, seen[0].value, seen[0].pid);
	block(SIG_UNBLOCK, SIGTERM);
	CHECK(seen_count == 2 && seen[1].code == SI_USER && seen[1].pid == child, "siginfo of SIGTERM: code %d pid %d",
	      seen[1].code, seen[1].pid);
}

/* Real-time signals queue: all of them come, in order. */
static void queued_in_order(void)
{
	const int first = SIGRTMIN + 1, second = SIGRTMIN + 4;
	handle(first, 0);
	handle(second, 0);
	block(SIG_BLOCK, first);
	block(SIG_BLOCK, second);
	for (int i = 0; i < 100; i++)
		CHECK(!sigqueue(getpid(), i % 2 ? first : second, (union sigval){ .sival_int = i }), "sigqueue: %m");
	checkpoint();
	block(SIG_UNBLOCK, first);
	block(SIG_UNBLOCK, second);
	CHECK(seen_count == 100, "%d of 100 signals came", seen_count);
	for (int i = 0; i < 100; i++) {
		int number = i < 50 ? first : second, value = i < 50 ? 2 * i + 1 : 2 * (i - 50);
		CHECK(seen[i].number == number && seen[i].value == value, "at %d: signal %d with %d", i, seen[i].number,
		      seen[i].value);
	}
}

static atomic_int there, go_on;
static pid_t other_tid;

static void *has_pending(void *unused)
{
	(void)unused;
	other_tid = gettid();
	there = 1;
	while (!go_on)
		pause_ms(2);
	if (!is_pending(SIGUSR2))
		return "nothing is pending for the thread";
	int before = seen_count;
	block(SIG_UNBLOCK, SIGUSR2);
	if (seen_count != before + 1 || seen[before].code != SI_TKILL)
		return "it was not delivered to the thread";
	return NULL;
}

/* Pending for one thread only. */
static void thread_directed(void)
{
	pthread_t thread;
	handle(SIGUSR2, 0);
	block(SIG_BLOCK, SIGUSR2);
	pthread_create(&thread, NULL, has_pending, NULL);
	while (!there)
		pause_ms(1);
	syscall(SYS_tgkill, getpid(), other_tid, SIGUSR2);
	CHECK(!is_pending(SIGUSR2), "pending for the leader before the dump");
	checkpoint();
	CHECK(!is_pending(SIGUSR2), "pending for the leader as well");
	go_on = 1;
	void *complaint;
	pthread_join(thread, &complaint);
	CHECK(!complaint, "%s", (char *)complaint);
}

/* What only the kernel sends: the siginfo of a child's death. */
static void pending_child_death(void)
{
	handle(SIGCHLD, 0);
	block(SIG_BLOCK, SIGCHLD);
	pid_t child = fork();
	if (!child)
		_exit(42);
	siginfo_t info;
	waitid(P_PID, child, &info, WEXITED | WNOWAIT);
	checkpoint();
	CHECK(is_pending(SIGCHLD), "SIGCHLD is no longer pending");
	block(SIG_UNBLOCK, SIGCHLD);
	CHECK(seen_count == 1 && seen[0].code == CLD_EXITED && seen[0].pid == child, "siginfo: code %d pid %d", seen[0].code,
	      seen[0].pid);
	int status;
	CHECK(waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 42, "the child's status is %x", status);
}

/* Handlers still work, and so do the flags that change how they are called. */
static void delivered_afterwards(void)
{
	handle(SIGUSR1, SA_RESTART);
	handle(SIGUSR2, SA_RESETHAND);
	checkpoint();
	raise(SIGUSR1);
	raise(SIGUSR1);
	raise(SIGUSR2);
	CHECK(seen_count == 3, "%d of 3 came", seen_count);
	struct sigaction action;
	sigaction(SIGUSR2, NULL, &action);
	CHECK(action.sa_handler == SIG_DFL, "SA_RESETHAND did not reset");
}

/* A thread waits in sigwaitinfo: it goes on waiting, without an EINTR, and gets what is sent later. */
static void *waits_for_signal(void *unused)
{
	(void)unused;
	sigset_t set;
	siginfo_t info;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 2);
	there = 1;
	int number = sigwaitinfo(&set, &info);
	if (number < 0)
		return strerror(errno);
	return number == SIGRTMIN + 2 && info.si_value.sival_int == 99 ? NULL : "another signal than the one sent";
}

static void waiting_for_a_signal(void)
{
	pthread_t thread;
	block(SIG_BLOCK, SIGRTMIN + 2);
	pthread_create(&thread, NULL, waits_for_signal, NULL);
	while (!there)
		pause_ms(1);
	pause_ms(20);
	checkpoint();
	sigqueue(getpid(), SIGRTMIN + 2, (union sigval){ .sival_int = 99 });
	void *complaint;
	pthread_join(thread, &complaint);
	CHECK(!complaint, "sigwaitinfo: %s", (char *)complaint);
}

/* A handler on SIGSEGV that repairs: the fault's address reaches it. */
static char *guarded;

static void repair(int number, siginfo_t *info, void *context)
{
	(void)number;
	(void)context;
	CHECK(info->si_addr == guarded + 123 && info->si_code == SEGV_ACCERR, "fault at %p, code %d", info->si_addr,
	      info->si_code);
	mprotect(guarded, 4096, PROT_READ | PROT_WRITE);
}

static void faults(void)
{
	struct sigaction action = { .sa_sigaction = repair, .sa_flags = SA_SIGINFO };
	sigaction(SIGSEGV, &action, NULL);
	guarded = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	checkpoint();
	guarded[123] = 5;
	CHECK(guarded[123] == 5, "the write is lost");
}

static const struct test_case cases[] = {
	CASE(actions),	       CASE(blocked),		   CASE(inside_a_handler),     CASE(pending),
	CASE(queued_in_order), CASE(thread_directed),	   CASE(pending_child_death),  CASE(delivered_afterwards),
	CASE(waiting_for_a_signal), CASE(faults),
};
RUN_CASES(cases)
