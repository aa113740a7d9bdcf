/*
 * Programs with TCP connections for the bench, and their peers, which are outside of the tree: connections CASE, with
 * E2E_CONNECTIONS and, for peers, E2E_PORT in the environment. A program writes its port into the file `port`.
 */
#include "e2e.h"
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <sys/resource.h>
#include <sys/socket.h>

static int *ends;

static long number(const char *name)
{
	const char *text = getenv(name);
	CHECK(text, "%s is not set", name);
	return atol(text);
}

static struct sockaddr_in address(long port)
{
	return (struct sockaddr_in){ .sin_family = AF_INET, .sin_port = htons(port), .sin_addr = { htonl(INADDR_LOOPBACK) } };
}

static void make_room(void)
{
	struct rlimit limit;
	CHECK(!getrlimit(RLIMIT_NOFILE, &limit), "getrlimit: %m");
	limit.rlim_cur = limit.rlim_max;
	CHECK(!setrlimit(RLIMIT_NOFILE, &limit), "setrlimit: %m");
	ends = calloc(number("E2E_CONNECTIONS"), sizeof *ends);
}

static int listener(void)
{
	char name[512], old[512];
	struct sockaddr_in own = address(0);
	socklen_t len = sizeof own;
	int sock = socket(AF_INET, SOCK_STREAM, 0);
	CHECK(!bind(sock, (void *)&own, sizeof own) && !listen(sock, 4096), "listening: %m");
	CHECK(!getsockname(sock, (void *)&own, &len), "getsockname: %m");
	FILE *file = fopen(in_dir(name, sizeof name, "port.new"), "w");
	CHECK(file && fprintf(file, "%d", ntohs(own.sin_port)) > 0 && !fclose(file), "writing the port");
	snprintf(old, sizeof old, "%s", name);
	CHECK(!rename(old, in_dir(name, sizeof name, "port")), "rename: %m");
	return sock;
}

static int call(void)
{
	struct sockaddr_in peer = address(number("E2E_PORT"));
	int on = 1, sock = socket(AF_INET, SOCK_STREAM, 0);
	CHECK(sock >= 0 && !connect(sock, (void *)&peer, sizeof peer), "connect: %m");
	CHECK(!setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on), "setsockopt: %m");
	return sock;
}

static void expect(int sock, const char *word)
{
	char got[8] = "";
	CHECK(read(sock, got, sizeof got) == 3 && !strcmp(got, word), "descriptor %d gave `%s` for `%s`", sock, got, word);
}

static void log_gap(long gap)
{
	char line[64];
	snprintf(line, sizeof line, "gap %ld\n", gap);
	say(line);
}

/* A server with many silent connections. */
static void many(void)
{
	long count = number("E2E_CONNECTIONS");
	make_room();
	int sock = listener();
	checkpoint();
	for (long i = 0; i < count; i++)
		CHECK((ends[i] = accept(sock, NULL, NULL)) >= 0, "accept: %m");
	say_ready();
	log_gap(watch_clock());
	say_ready();
	log_gap(watch_clock());
	for (long i = 0; i < count; i++)
		CHECK(write(ends[i], "one", 3) == 3, "write: %m");
	for (long i = 0; i < count; i++)
		expect(ends[i], "two");
}

static void many_peer(void)
{
	long count = number("E2E_CONNECTIONS");
	make_room();
	for (long i = 0; i < count; i++)
		ends[i] = call();
	checkpoint();
	for (long i = 0; i < count; i++) {
		expect(ends[i], "one");
		CHECK(write(ends[i], "two", 3) == 3, "write: %m");
	}
}

/* Gives back whatever it gets. */
static void echo(void)
{
	char data[4096];
	int sock = listener();
	checkpoint();
	int end = accept(sock, NULL, NULL);
	CHECK(end >= 0, "accept: %m");
	say_ready();
	for (ssize_t got; (got = read(end, data, sizeof data)) != 0;)
		CHECK(got > 0 && write(end, data, got) == got, "echo: %m");
}

/* Sends and gets back, and knows the longest time that this took. */
static void echo_peer(void)
{
	int sock = call();
	long gap = 0;
	say_ready();
	for (unsigned long i = 1; i % 512 || !told_to_go(); i++) {
		unsigned long back = 0;
		struct timespec nap = { 0, 20000 };
		long begin = time_of_day();
		CHECK(write(sock, &i, sizeof i) == sizeof i && read(sock, &back, sizeof back) == sizeof back, "echo: %m");
		CHECK(back == i, "%lu came back for %lu", back, i);
		long took = time_of_day() - begin;
		gap = took > gap ? took : gap;
		nanosleep(&nap, NULL);
	}
	log_gap(gap);
}

/* One connection by the calls that nobody can do without who restores it. In repair mode no packet is sent for it. */
static int calls_of(in_port_t own, long number)
{
	struct sockaddr_in local = address(ntohs(own)), peer = address(1024 + number % 60000);
	struct tcp_repair_opt options[] = { { TCPOPT_MAXSEG, 65495 }, { TCPOPT_WINDOW, 10 << 16 | 10 }, { TCPOPT_SACK_PERMITTED, 0 }, { TCPOPT_TIMESTAMP, 0 } };
	struct tcp_repair_window window = { 0 };
	socklen_t len = sizeof window;
	int sock = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
	CHECK(sock >= 0 && !setsockopt(sock, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one), "socket: %m");
#define SET(name, value) do { int number = value; CHECK(!setsockopt(sock, IPPROTO_TCP, name, &number, sizeof number), #name ": %m"); } while (0)
	SET(TCP_REPAIR, 1);
	CHECK(!bind(sock, (void *)&local, sizeof local), "bind: %m");
	SET(TCP_REPAIR_QUEUE, TCP_RECV_QUEUE);
	SET(TCP_QUEUE_SEQ, 1000);
	SET(TCP_REPAIR_QUEUE, TCP_SEND_QUEUE);
	SET(TCP_QUEUE_SEQ, 2000);
	SET(TCP_MAXSEG, 32767);
	CHECK(!connect(sock, (void *)&peer, sizeof peer), "connect: %m");
	SET(TCP_MAXSEG, 0);
	CHECK(!setsockopt(sock, IPPROTO_TCP, TCP_REPAIR_OPTIONS, options, sizeof options), "TCP_REPAIR_OPTIONS: %m");
	SET(TCP_TIMESTAMP, 1 << 20);
	CHECK(!getsockopt(sock, IPPROTO_TCP, TCP_REPAIR_WINDOW, &window, &len), "TCP_REPAIR_WINDOW: %m");
	CHECK(!setsockopt(sock, IPPROTO_TCP, TCP_REPAIR_WINDOW, &window, len), "TCP_REPAIR_WINDOW: %m");
	return sock;
}

static struct { in_port_t own; long count; } wanted;

static void *half_of_them(void *first)
{
	for (long i = (long)first; i < wanted.count; i += 2)
		ends[i] = calls_of(wanted.own, i);
	return NULL;
}

/* How long those calls take from two threads, for so many connections: what no restore can be faster than. */
static void calls(void)
{
	struct sockaddr_in own = address(0);
	socklen_t len = sizeof own;
	pthread_t other;
	int any, one = 1;
	make_room();
	any = socket(AF_INET, SOCK_STREAM, 0);
	CHECK(!setsockopt(any, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) && !bind(any, (void *)&own, sizeof own), "bind: %m");
	CHECK(!getsockname(any, (void *)&own, &len), "getsockname: %m");
	say_ready();
	wanted.own = own.sin_port, wanted.count = number("E2E_CONNECTIONS");
	/* The table of descriptors has its size before there are threads. */
	dup2(any, wanted.count + 64);
	long begin = time_of_day();
	CHECK(!pthread_create(&other, NULL, half_of_them, (void *)1), "pthread_create");
	half_of_them(NULL);
	pthread_join(other, NULL);
	log_gap(time_of_day() - begin);
}

static const struct test_case cases[] = { CASE(many), CASE(many_peer), CASE(echo), CASE(echo_peer), CASE(calls) };

RUN_CASES(cases)
