/* Timers, clocks and sleeps: nothing fires early, late or twice, and no clock steps back. */
#include "e2e.h"
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/time.h>
#include <linux/futex.h>

static volatile int fired, last_value, last_overrun;

static void on_timer(int number, siginfo_t *info, void *context)
{
	(void)number;
	(void)context;
	last_value = info->si_value.sival_int;
	last_overrun = info->si_overrun;
	fired++;
}

static void handle(int number)
{
	struct sigaction action = { .sa_sigaction = on_timer, .sa_flags = SA_SIGINFO | SA_RESTART };
	sigaction(number, &action, NULL);
}

static double now(clockid_t clock)
{
	struct timespec t;
	clock_gettime(clock, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void interval_timer(int which, int number)
{
	struct itimerval set = { { 100, 500000 }, { 200, 0 } }, found;
	handle(number);
	CHECK(!setitimer(which, &set, NULL), "setitimer: %m");
	checkpoint();
	CHECK(!getitimer(which, &found), "getitimer: %m");
	CHECK(found.it_interval.tv_sec == 100 && labs(found.it_interval.tv_usec - 500000) < 20000, "interval %ld.%06ld",
	      found.it_interval.tv_sec, found.it_interval.tv_usec);
	CHECK(found.it_value.tv_sec >= 150 && found.it_value.tv_sec <= 200, "%ld s are left", found.it_value.tv_sec);
	CHECK(fired == 0, "it fired");
	/* And it still fires: shortened, at once. */
	struct itimerval soon = { { 0, 0 }, { 0, 1000 } };
	setitimer(which, &soon, NULL);
	for (volatile long i = 0; !fired && i < 4000000000L; i++)
		;
	CHECK(fired == 1, "it fired %d times", fired);
}

static void itimer_real(void)
{
	interval_timer(ITIMER_REAL, SIGALRM);
}

static void itimer_virtual(void)
{
	interval_timer(ITIMER_VIRTUAL, SIGVTALRM);
}

static void itimer_profile(void)
{
	interval_timer(ITIMER_PROF, SIGPROF);
}

/* A periodic one whose signal is pending: it starts anew when that is delivered. */
static void itimer_pending(void)
{
	struct itimerval set = { { 0, 20000 }, { 0, 20000 } }, found;
	sigset_t alarm, pending;
	handle(SIGALRM);
	sigemptyset(&alarm);
	sigaddset(&alarm, SIGALRM);
	sigprocmask(SIG_BLOCK, &alarm, NULL);
	setitimer(ITIMER_REAL, &set, NULL);
	pause_ms(60);
	checkpoint();
	CHECK(!sigpending(&pending) && sigismember(&pending, SIGALRM), "no signal is pending");
	CHECK(!getitimer(ITIMER_REAL, &found) && found.it_interval.tv_usec == 20000, "another interval");
	sigprocmask(SIG_UNBLOCK, &alarm, NULL);
	CHECK(fired == 1, "delivered %d times", fired);
	for (int i = 0; fired < 5 && i < 1000; i++)
		pause_ms(5);
	CHECK(fired >= 5, "the timer stands still");
}

/* A short one that is due while the program does not exist: it fires once it is back, once. */
static void alarm_in_time(void)
{
	handle(SIGALRM);
	double started = now(CLOCK_MONOTONIC);
	struct itimerval set = { { 0, 0 }, { 1, 0 } };
	setitimer(ITIMER_REAL, &set, NULL);
	checkpoint();
	for (int i = 0; !fired && i < 500; i++)
		pause_ms(5);
	CHECK(fired == 1, "it fired %d times", fired);
	CHECK(now(CLOCK_MONOTONIC) - started >= 0.99, "it fired after %f s of the clock", now(CLOCK_MONOTONIC) - started);
	pause_ms(100);
	CHECK(fired == 1, "it fired twice");
}

static timer_t make_timer(clockid_t clock, int number, int value)
{
	timer_t timer;
	struct sigevent event = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = number, .sigev_value.sival_int = value };
	CHECK(!timer_create(clock, &event, &timer), "timer_create: %m");
	return timer;
}

/* Several POSIX timers, with gaps in their numbers, on different clocks, armed and not. */
static void posix_timers(void)
{
	const clockid_t clocks[] = { CLOCK_MONOTONIC, CLOCK_REALTIME, CLOCK_BOOTTIME, CLOCK_PROCESS_CPUTIME_ID,
				     CLOCK_THREAD_CPUTIME_ID, CLOCK_MONOTONIC };
	timer_t timers[6], gap;
	struct itimerspec set = { { 300, 1000 }, { 500, 0 } }, found;
	handle(SIGRTMIN);
	for (int i = 0; i < 6; i++) {
		timers[i] = make_timer(clocks[i], SIGRTMIN, 100 + i);
		if (i == 2) {
			gap = make_timer(CLOCK_MONOTONIC, SIGRTMIN, 0);
			timer_delete(gap);
		}
		if (i < 5)
			CHECK(!timer_settime(timers[i], 0, &set, NULL), "timer_settime: %m");
	}
	checkpoint();
	for (int i = 0; i < 6; i++) {
		CHECK(!timer_gettime(timers[i], &found), "timer %d is gone: %m", i);
		if (i == 5) {
			CHECK(!found.it_value.tv_sec && !found.it_value.tv_nsec, "the timer that stood still is armed");
			continue;
		}
		CHECK(found.it_interval.tv_sec == 300, "timer %d: interval %ld", i, found.it_interval.tv_sec);
		CHECK(found.it_value.tv_sec > 400 && found.it_value.tv_sec <= 500, "timer %d: %ld s left", i,
		      found.it_value.tv_sec);
	}
	CHECK(fired == 0, "one fired");
	struct itimerspec soon = { { 0, 0 }, { 0, 1000000 } };
	for (int i = 0; i < 6; i++) {
		int before = fired;
		timer_settime(timers[i], 0, &soon, NULL);
		for (volatile long k = 0; fired == before && k < 4000000000L; k++)
			;
		CHECK(fired == before + 1 && last_value == 100 + i, "timer %d: fired %d, value %d", i, fired - before,
		      last_value);
	}
}

/* A periodic timer that nobody listened to: its overruns are counted on. */
static void overrun(void)
{
	sigset_t set;
	handle(SIGRTMIN + 1);
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 1);
	sigprocmask(SIG_BLOCK, &set, NULL);
	timer_t timer = make_timer(CLOCK_MONOTONIC, SIGRTMIN + 1, 7);
	struct itimerspec fast = { { 0, 1000000 }, { 0, 1000000 } };
	timer_settime(timer, 0, &fast, NULL);
	pause_ms(300);
	checkpoint();
	sigprocmask(SIG_UNBLOCK, &set, NULL);
	for (int i = 0; !fired && i < 200; i++)
		pause_ms(1);
	CHECK(fired >= 1 && last_value == 7, "it fired %d times with %d", fired, last_value);
	pause_ms(50);
	CHECK(fired >= 20, "it stopped being periodic: fired %d times", fired);
	timer_delete(timer);
}

/* What its last signal was told to have missed is still known, and the next one comes when it was to come. */
static void missed(void)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 1);
	sigprocmask(SIG_BLOCK, &set, NULL);
	timer_t timer = make_timer(CLOCK_REALTIME, SIGRTMIN + 1, 7);
	struct itimerspec set_to = { { 100, 0 }, { 100, 0 } }, found;
	struct timespec start;
	clock_gettime(CLOCK_REALTIME, &start);
	/* It has expired four times when it is set. */
	set_to.it_value.tv_sec = start.tv_sec - 350;
	CHECK(!timer_settime(timer, TIMER_ABSTIME, &set_to, NULL), "timer_settime: %m");
	siginfo_t info;
	CHECK(sigwaitinfo(&set, &info) == SIGRTMIN + 1, "sigwaitinfo: %m");
	CHECK(timer_getoverrun(timer) == 3, "it missed %d", timer_getoverrun(timer));
	checkpoint();
	CHECK(timer_getoverrun(timer) == 3, "it missed %d before, and 3 in truth", timer_getoverrun(timer));
	CHECK(!timer_gettime(timer, &found), "timer_gettime: %m");
	CHECK(found.it_interval.tv_sec == 100, "its interval is %ld s", found.it_interval.tv_sec);
	CHECK(found.it_value.tv_sec < 51 && found.it_value.tv_sec > 10, "%ld s are left", found.it_value.tv_sec);
	sigpending(&set);
	CHECK(!sigismember(&set, SIGRTMIN + 1), "its signal came again");
	timer_delete(timer);
}

/* SIGEV_NONE, and a timer that signals one thread. */
static void other_notifications(void)
{
	timer_t quiet, mine;
	struct sigevent none = { .sigev_notify = SIGEV_NONE };
	struct sigevent thread = { .sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN + 5 };
	thread._sigev_un._tid = gettid();
	handle(SIGRTMIN + 5);
	CHECK(!timer_create(CLOCK_MONOTONIC, &none, &quiet), "timer_create: %m");
	CHECK(!timer_create(CLOCK_MONOTONIC, &thread, &mine), "timer_create: %m");
	struct itimerspec long_time = { { 0, 0 }, { 1000, 0 } }, found;
	timer_settime(quiet, 0, &long_time, NULL);
	checkpoint();
	CHECK(!timer_gettime(quiet, &found) && found.it_value.tv_sec > 900, "the quiet timer: %ld", found.it_value.tv_sec);
	struct itimerspec soon = { { 0, 0 }, { 0, 1000000 } };
	timer_settime(mine, 0, &soon, NULL);
	for (int i = 0; !fired && i < 200; i++)
		pause_ms(1);
	CHECK(fired == 1, "the thread's timer fired %d times", fired);
}

/* Every clock: never less than before, and the ones that stand still with the program do not leap. */
static void clocks(void)
{
	const clockid_t all[] = { CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_MONOTONIC_COARSE };
	double before[4];
	for (int i = 0; i < 4; i++)
		before[i] = now(all[i]);
	checkpoint();
	for (int i = 0; i < 4; i++) {
		double after = now(all[i]);
		CHECK(after >= before[i], "clock %d stepped back by %f s", all[i], before[i] - after);
		CHECK(after < before[i] + 100, "clock %d leapt by %f s", all[i], after - before[i]);
	}
	/* The kernel's own idea of the clock agrees with the vdso's. */
	struct timespec kernel;
	syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &kernel);
	double vdso = now(CLOCK_MONOTONIC);
	CHECK(vdso - (kernel.tv_sec + kernel.tv_nsec / 1e9) < 1 && vdso >= kernel.tv_sec + kernel.tv_nsec / 1e9 - 0.001,
	      "vdso and kernel disagree on the time");
}

/* A thread that takes timestamps without a pause: none is less than the one before. */
static atomic_int stop;

static void *stamps(void *clock)
{
	struct timespec last = { 0, 0 }, t;
	while (!stop) {
		clock_gettime((clockid_t)(long)clock, &t);
		if (t.tv_sec < last.tv_sec || (t.tv_sec == last.tv_sec && t.tv_nsec < last.tv_nsec))
			return "a timestamp is less than the one before it";
		last = t;
	}
	return NULL;
}

static void timestamps(void)
{
	pthread_t one, two;
	void *complaint;
	pthread_create(&one, NULL, stamps, (void *)(long)CLOCK_MONOTONIC);
	pthread_create(&two, NULL, stamps, (void *)(long)CLOCK_BOOTTIME);
	pause_ms(20);
	checkpoint();
	pause_ms(50);
	stop = 1;
	pthread_join(one, &complaint);
	CHECK(!complaint, "CLOCK_MONOTONIC: %s", (char *)complaint);
	pthread_join(two, &complaint);
	CHECK(!complaint, "CLOCK_BOOTTIME: %s", (char *)complaint);
}

/*
 * Sleeps in progress, each in a thread of its own. Each must last as long as it was told, by the clock that it was
 * given, and must not end with an EINTR that no signal caused.
 */
struct sleeper {
	const char *name;
	int (*sleep)(void);
	int result, error;
	double took;
};

#define NAP 1.2

static int by_nanosleep(void)
{
	struct timespec t = { 1, 200000000 };
	return nanosleep(&t, NULL);
}

static int by_absolute(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	t.tv_sec += 1;
	t.tv_nsec += 200000000;
	if (t.tv_nsec >= 1000000000) {
		t.tv_nsec -= 1000000000;
		t.tv_sec++;
	}
	errno = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL);
	return errno ? -1 : 0;
}

static int by_poll(void)
{
	return poll(NULL, 0, 1200);
}

static int by_select(void)
{
	struct timeval t = { 1, 200000 };
	return select(0, NULL, NULL, NULL, &t);
}

static int by_futex(void)
{
	static int word;
	struct timespec t = { 1, 200000000 };
	long result = syscall(SYS_futex, &word, FUTEX_WAIT, 0, &t, NULL, 0);
	if (result == -1 && errno == ETIMEDOUT)
		return 0;
	return -1;
}

/* The same by a call whose number no instruction loads as a constant. */
static int by_hidden_number(void)
{
	static int word;
	static volatile long half = SYS_futex / 2;
	struct timespec t = { 1, 200000000 };
	long result = 2 * half;
	register long limit asm("r10") = (long)&t;
	asm volatile("syscall" : "+a"(result) : "D"(&word), "S"(FUTEX_WAIT_PRIVATE), "d"(0), "r"(limit) : "rcx", "r11", "memory");
	errno = -result;
	return result == -ETIMEDOUT ? 0 : -1;
}

static int by_epoll(void)
{
	struct epoll_event event;
	int fd = epoll_create1(0), result = epoll_wait(fd, &event, 1, 1200);
	close(fd);
	return result;
}

static void *sleeps(void *arg)
{
	struct sleeper *sleeper = arg;
	double started = now(CLOCK_MONOTONIC);
	sleeper->result = sleeper->sleep();
	sleeper->error = errno;
	sleeper->took = now(CLOCK_MONOTONIC) - started;
	return NULL;
}

static void sleep_across(const char *name, int (*how)(void))
{
	struct sleeper sleeper = { .name = name, .sleep = how };
	pthread_t thread;
	pthread_create(&thread, NULL, sleeps, &sleeper);
	pause_ms(100);
	checkpoint();
	pthread_join(thread, NULL);
	CHECK(sleeper.result == 0, "%s ended with %s", name, strerror(sleeper.error));
	CHECK(sleeper.took >= NAP - 0.005, "%s was cut short: %f s", name, sleeper.took);
	CHECK(sleeper.took < NAP + 3, "%s lasted too long: %f s", name, sleeper.took);
}

static void in_nanosleep(void)
{
	sleep_across("nanosleep", by_nanosleep);
}

static void in_clock_nanosleep(void)
{
	sleep_across("clock_nanosleep", by_absolute);
}

static void in_poll(void)
{
	sleep_across("poll", by_poll);
}

static void in_select(void)
{
	sleep_across("select", by_select);
}

static void in_futex(void)
{
	sleep_across("futex", by_futex);
}

static void in_hidden_futex(void)
{
	sleep_across("futex by hand", by_hidden_number);
}

/* The kernel gives epoll_wait an EINTR whenever it is stopped (signal(7)): only the time is checked. */
static void in_epoll(void)
{
	struct sleeper sleeper = { .name = "epoll_wait", .sleep = by_epoll };
	pthread_t thread;
	pthread_create(&thread, NULL, sleeps, &sleeper);
	pause_ms(100);
	checkpoint();
	pthread_join(thread, NULL);
	CHECK(sleeper.result == 0 || sleeper.error == EINTR, "epoll_wait: %s", strerror(sleeper.error));
	CHECK(sleeper.result != 0 || sleeper.took >= NAP - 0.005, "epoll_wait was cut short: %f s", sleeper.took);
}

/* Waits without an end: read of a pipe, waitpid, accept-like waits are made again. */
static int pipe_ends[2];

static void *reads(void *unused)
{
	char byte = 0;
	(void)unused;
	ssize_t got = read(pipe_ends[0], &byte, 1);
	if (got < 0)
		return strerror(errno);
	return byte == '!' ? NULL : "another byte than the one written";
}

static void in_read(void)
{
	pthread_t thread;
	void *complaint;
	CHECK(!pipe(pipe_ends), "pipe: %m");
	pthread_create(&thread, NULL, reads, NULL);
	pause_ms(50);
	checkpoint();
	CHECK(write(pipe_ends[1], "!", 1) == 1, "write: %m");
	pthread_join(thread, &complaint);
	CHECK(!complaint, "read: %s", (char *)complaint);
}

static const struct test_case cases[] = {
	CASE(itimer_real),  CASE(itimer_virtual),      CASE(itimer_profile), CASE(itimer_pending), CASE(alarm_in_time), CASE(posix_timers),
	CASE(overrun), CASE(missed),	    CASE(other_notifications), CASE(clocks),	     CASE(timestamps),	  CASE(in_nanosleep),
	CASE(in_clock_nanosleep), CASE(in_poll),	       CASE(in_select),	     CASE(in_futex),	  CASE(in_epoll),
	CASE(in_read),	    CASE(in_hidden_futex),
};
RUN_CASES(cases)
