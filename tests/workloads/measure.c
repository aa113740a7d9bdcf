/*
 * measure FILE PROGRAM ARGS…: runs a program and writes into FILE how long it took (ns) and its peak resident memory
 * (KiB). Small itself, because a program inherits the peak of what it was started by.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	struct timespec start, end;
	struct rusage usage;
	int status;

	if (argc < 3)
		return 125;
	clock_gettime(CLOCK_MONOTONIC, &start);
	pid_t pid = vfork();
	if (pid == 0) {
		execv(argv[2], argv + 2);
		_exit(126);
	}
	if (wait4(pid, &status, 0, &usage) != pid)
		return 125;
	clock_gettime(CLOCK_MONOTONIC, &end);
	FILE *file = fopen(argv[1], "w");
	if (!file)
		return 125;
	fprintf(file, "%ld %ld\n", (end.tv_sec - start.tv_sec) * 1000000000L + end.tv_nsec - start.tv_nsec, usage.ru_maxrss);
	fclose(file);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
