/* Threads: their state, and what the kernel keeps for each of them. */
#include "e2e.h"
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>

#define MANY 64

static atomic_int arrived, released;
static __thread unsigned long local[32];

static void arrive_and_wait(void)
{
	arrived++;
	while (!released)
		pause_ms(5);
}

static void wait_for_arrivals(int count)
{
	for (int i = 0; arrived < count; i++) {
		CHECK(i < 20000, "%d of %d threads are there", arrived, count);
		pause_ms(1);
	}
}

static pthread_t start(void *(*run)(void *), void *arg)
{
	pthread_t thread;
	int error = pthread_create(&thread, NULL, run, arg);
	CHECK(!error, "pthread_create: %s", strerror(error));
	return thread;
}

/* A thread's result is its complaint. */
static void join(pthread_t thread)
{
	void *result;
	int error = pthread_join(thread, &result);
	CHECK(!error, "pthread_join: %s", strerror(error));
	CHECK(!result, "%s", (char *)result);
}

static void *with_local(void *number)
{
	unsigned long n = (unsigned long)number, on_stack[512];
	pid_t tid = gettid();
	for (int i = 0; i < 32; i++)
		local[i] = n * 1000 + i;
	for (int i = 0; i < 512; i++)
		on_stack[i] = n ^ i;
	arrive_and_wait();
	for (int i = 0; i < 32; i++)
		if (local[i] != n * 1000 + i)
			return "thread-local storage changed";
	for (int i = 0; i < 512; i++)
		if (on_stack[i] != (n ^ i))
			return "a thread's stack changed";
	return gettid() == tid ? NULL : "a thread has another tid";
}

/* 64 threads with thread-local storage and stacks of their own; joining them needs clear_child_tid. */
static void many(void)
{
	pthread_t threads[MANY];
	for (long i = 0; i < MANY; i++)
		threads[i] = start(with_local, (void *)i);
	wait_for_arrivals(MANY);
	checkpoint();
	released = 1;
	for (int i = 0; i < MANY; i++)
		join(threads[i]);
}

static void *with_name(void *number)
{
	char name[16], found[16];
	snprintf(name, sizeof name, "worker %ld (x", (long)number);
	prctl(PR_SET_NAME, name);
	arrive_and_wait();
	prctl(PR_GET_NAME, found);
	return strcmp(name, found) ? "a thread has another name" : NULL;
}

static void names(void)
{
	pthread_t threads[4];
	char found[16];
	for (long i = 0; i < 4; i++)
		threads[i] = start(with_name, (void *)i);
	wait_for_arrivals(4);
	prctl(PR_SET_NAME, "the leader :-)");
	checkpoint();
	released = 1;
	for (int i = 0; i < 4; i++)
		join(threads[i]);
	prctl(PR_GET_NAME, found);
	CHECK(!strcmp(found, "the leader :-)"), "the leader's name is %s", found);
}

static pthread_mutex_t robust_mutex;

static void *dies_with_lock(void *unused)
{
	(void)unused;
	pthread_mutex_lock(&robust_mutex);
	arrive_and_wait();
	return NULL;
}

/* A thread that ends with a robust mutex locked: the kernel walks its robust list, which it has to know again. */
static void robust_list(void)
{
	pthread_mutexattr_t attr;
	pthread_mutexattr_init(&attr);
	pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_init(&robust_mutex, &attr);
	pthread_t thread = start(dies_with_lock, NULL);
	wait_for_arrivals(1);
	checkpoint();
	released = 1;
	join(thread);
	int error = pthread_mutex_lock(&robust_mutex);
	CHECK(error == EOWNERDEAD, "locking gave %d instead of EOWNERDEAD", error);
}

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
static int shared_count;

static void *waits_on_condition(void *unused)
{
	(void)unused;
	pthread_mutex_lock(&mutex);
	arrived++;
	while (!released)
		pthread_cond_wait(&condition, &mutex);
	shared_count++;
	pthread_mutex_unlock(&mutex);
	return NULL;
}

/* Threads that wait in a futex go on waiting, and are woken. */
static void futex_waiters(void)
{
	pthread_t threads[8];
	for (int i = 0; i < 8; i++)
		threads[i] = start(waits_on_condition, NULL);
	wait_for_arrivals(8);
	checkpoint();
	pthread_mutex_lock(&mutex);
	released = 1;
	pthread_cond_broadcast(&condition);
	pthread_mutex_unlock(&mutex);
	for (int i = 0; i < 8; i++)
		join(threads[i]);
	CHECK(shared_count == 8, "%d of 8 came through", shared_count);
}

static void *waits_on_mutex(void *unused)
{
	(void)unused;
	arrived++;
	pthread_mutex_lock(&mutex);
	shared_count++;
	pthread_mutex_unlock(&mutex);
	return NULL;
}

/* A mutex that is held across the dump, with others waiting for it. */
static void mutex_held(void)
{
	pthread_t threads[4];
	pthread_mutex_lock(&mutex);
	for (int i = 0; i < 4; i++)
		threads[i] = start(waits_on_mutex, NULL);
	wait_for_arrivals(4);
	checkpoint();
	CHECK(shared_count == 0, "somebody got a mutex that is held");
	pthread_mutex_unlock(&mutex);
	for (int i = 0; i < 4; i++)
		join(threads[i]);
	CHECK(shared_count == 4, "%d of 4 got it", shared_count);
}

static char stacks[3][65536];
static volatile unsigned long handler_stack;

static void note_stack(int number)
{
	(void)number;
	char here;
	handler_stack = (unsigned long)&here;
}

static void set_stack(int number)
{
	stack_t stack = { .ss_sp = stacks[number], .ss_size = sizeof stacks[number] };
	CHECK(!sigaltstack(&stack, NULL), "sigaltstack: %m");
}

static char *check_stack(int number)
{
	stack_t stack;
	sigaltstack(NULL, &stack);
	if (stack.ss_sp != stacks[number] || stack.ss_size != sizeof stacks[number] || stack.ss_flags)
		return "the alternate stack is another";
	raise(SIGUSR1);
	return handler_stack - (unsigned long)stacks[number] < sizeof stacks[number]
		       ? NULL
		       : "the handler did not run on the alternate stack";
}

static void *with_stack(void *number)
{
	set_stack((long)number);
	arrive_and_wait();
	pthread_mutex_lock(&mutex);
	char *result = check_stack((long)number);
	pthread_mutex_unlock(&mutex);
	return result;
}

static void alternate_stacks(void)
{
	struct sigaction action = { .sa_handler = note_stack, .sa_flags = SA_ONSTACK };
	sigaction(SIGUSR1, &action, NULL);
	pthread_t one = start(with_stack, (void *)1), two = start(with_stack, (void *)2);
	set_stack(0);
	wait_for_arrivals(2);
	checkpoint();
	char *complaint = check_stack(0);
	CHECK(!complaint, "%s", complaint);
	released = 1;
	join(one);
	join(two);
}

static void *with_mask(void *number)
{
	sigset_t set, found;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + (long)number);
	pthread_sigmask(SIG_SETMASK, &set, NULL);
	arrive_and_wait();
	pthread_sigmask(SIG_SETMASK, NULL, &found);
	return memcmp(&set, &found, 8) ? "a thread has another signal mask" : NULL;
}

static void masks(void)
{
	pthread_t threads[6];
	for (long i = 0; i < 6; i++)
		threads[i] = start(with_mask, (void *)i);
	wait_for_arrivals(6);
	checkpoint();
	released = 1;
	for (int i = 0; i < 6; i++)
		join(threads[i]);
}

static void *with_schedule(void *number)
{
	long n = (long)number;
	cpu_set_t wanted, found;
	struct sched_param batch = { 0 };
	CPU_ZERO(&wanted);
	CPU_SET(0, &wanted);
	sched_setaffinity(0, sizeof wanted, &wanted);
	sched_setscheduler(0, n & 1 ? SCHED_BATCH : SCHED_IDLE, &batch);
	setpriority(PRIO_PROCESS, gettid(), 3 + n);
	arrive_and_wait();
	sched_getaffinity(0, sizeof found, &found);
	if (!CPU_EQUAL(&wanted, &found))
		return "a thread's affinity changed";
	if (sched_getscheduler(0) != (n & 1 ? SCHED_BATCH : SCHED_IDLE))
		return "a thread's scheduling policy changed";
	return getpriority(PRIO_PROCESS, gettid()) == 3 + n ? NULL : "a thread's nice value changed";
}

/* Scheduling belongs to the thread, not to the process. */
static void schedules(void)
{
	pthread_t threads[4];
	for (long i = 0; i < 4; i++)
		threads[i] = start(with_schedule, (void *)i);
	wait_for_arrivals(4);
	checkpoint();
	released = 1;
	for (int i = 0; i < 4; i++)
		join(threads[i]);
}

/* Threads that come and go all the time: whichever are there in the dump go on, and none is lost. */
static atomic_long begun, done;

static void *brief(void *unused)
{
	(void)unused;
	begun++;
	for (volatile int i = 0; i < 20000; i++)
		;
	done++;
	return NULL;
}

static void *spawner(void *unused)
{
	(void)unused;
	arrived++;
	while (!released)
		join(start(brief, NULL));
	return NULL;
}

static void coming_and_going(void)
{
	pthread_t threads[4];
	for (int i = 0; i < 4; i++)
		threads[i] = start(spawner, NULL);
	wait_for_arrivals(4);
	checkpoint();
	released = 1;
	for (int i = 0; i < 4; i++)
		join(threads[i]);
	CHECK(begun == done && done > 0, "%ld threads began, %ld ended", (long)begun, (long)done);
}

static void *spins(void *counter)
{
	arrived++;
	while (!released)
		++*(volatile unsigned long *)counter;
	return NULL;
}

/* Threads that never enter the kernel. */
static void busy(void)
{
	static unsigned long counters[3][64], before[3];
	pthread_t threads[3];
	for (int i = 0; i < 3; i++)
		threads[i] = start(spins, &counters[i][0]);
	wait_for_arrivals(3);
	checkpoint();
	for (int i = 0; i < 3; i++)
		before[i] = *(volatile unsigned long *)&counters[i][0];
	pause_ms(200);
	for (int i = 0; i < 3; i++)
		CHECK(*(volatile unsigned long *)&counters[i][0] > before[i], "thread %d stands still", i);
	released = 1;
	for (int i = 0; i < 3; i++)
		join(threads[i]);
}

static void *outlives_leader(void *unused)
{
	(void)unused;
	while (access("leader-is-dead", F_OK)) {
		char stat[512] = "";
		int fd = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
		if (read(fd, stat, sizeof stat - 1) > 0 && strstr(stat, ") Z "))
			close(open("leader-is-dead", O_CREAT | O_WRONLY, 0600));
		close(fd);
		pause_ms(2);
	}
	checkpoint();
	say("ok\n");
	_exit(0);
}

/* The first thread has ended; the others are the process. */
static void dead_leader(void)
{
	CHECK(!chdir(getenv("E2E_DIR")), "chdir: %m");
	start(outlives_leader, NULL);
	syscall(SYS_exit, 0);
}

static pid_t child_of_thread;

static void *has_child(void *unused)
{
	(void)unused;
	child_of_thread = fork();
	if (!child_of_thread) {
		prctl(PR_SET_NAME, "grandchild");
		while (access("end-child", F_OK))
			pause_ms(5);
		_exit(7);
	}
	arrive_and_wait();
	int status;
	return waitpid(child_of_thread, &status, 0) == child_of_thread && WEXITSTATUS(status) == 7
		       ? NULL
		       : "the child's exit status is lost";
}

/* A child that a thread other than the leader made; every thread may wait for it. */
static void child_of_a_thread(void)
{
	CHECK(!chdir(getenv("E2E_DIR")), "chdir: %m");
	pthread_t thread = start(has_child, NULL);
	wait_for_arrivals(1);
	checkpoint();
	CHECK(waitpid(child_of_thread, NULL, WNOHANG) == 0, "the child cannot be waited for: %m");
	close(open("end-child", O_CREAT | O_WRONLY, 0600));
	released = 1;
	join(thread);
}

static const struct test_case cases[] = {
	CASE(many),	   CASE(names),	    CASE(robust_list), CASE(futex_waiters),	CASE(mutex_held),
	CASE(alternate_stacks), CASE(masks), CASE(schedules),	CASE(coming_and_going), CASE(busy),
	CASE(dead_leader), CASE(child_of_a_thread),
};
RUN_CASES(cases)
