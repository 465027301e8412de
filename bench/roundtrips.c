/*
 * A QMP client that does nothing but ask: the same for every machine monitor, and cheap enough not to be the limit.
 *
 * Usage: roundtrips SOCKET SECONDS. Negotiates, then sends query-status and waits for its answer, again and again.
 * Prints one line of JSON: the number of answers, the seconds that they took, and the median time of one in us.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define LIMIT 1000000

static char data[65536];
static size_t held;
static float times[LIMIT];

static void fail(const char *what)
{
    fprintf(stderr, "roundtrips: %s: %s\n", what, errno ? strerror(errno) : "the machine closed its monitor");
    exit(1);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

/* Reads lines until one is neither an event nor the greeting, and drops it. */
static void await_line(int fd, const char *wanted)
{
    for (;;) {
        char *end = memchr(data, '\n', held);
        if (end) {
            size_t size = end + 1 - data;
            int found = memmem(data, size, wanted, strlen(wanted)) != 0;
            if (memmem(data, size, "\"error\"", 7)) {
                fprintf(stderr, "roundtrips: %.*s", (int)size, data);
                exit(1);
            }
            held -= size;
            memmove(data, end + 1, held);
            if (found)
                return;
            continue;
        }
        errno = 0;
        ssize_t count = read(fd, data + held, sizeof data - held);
        if (count <= 0)
            fail("read");
        held += count;
    }
}

static void ask(int fd, const char *command)
{
    char text[100];
    int size = snprintf(text, sizeof text, "{\"execute\": \"%s\"}\n", command);
    if (write(fd, text, size) != size)
        fail("write");
    await_line(fd, "\"return\"");
}

static int by_size(const void *a, const void *b) { return (*(float *)a > *(float *)b) - (*(float *)a < *(float *)b); }

int main(int argc, char **argv)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), count = 0;
    double began, last, seconds;

    if (argc != 3 || strlen(argv[1]) >= sizeof address.sun_path || (seconds = atof(argv[2])) <= 0) {
        fprintf(stderr, "usage: roundtrips SOCKET SECONDS\n");
        return 1;
    }
    strcpy(address.sun_path, argv[1]);
    if (connect(fd, (struct sockaddr *)&address, sizeof address))
        fail(argv[1]);
    await_line(fd, "\"QMP\"");
    ask(fd, "qmp_capabilities");
    for (int n = 0; n < 200; n++)
        ask(fd, "query-status");
    last = began = now();
    while (last < began + seconds && count < LIMIT) {
        double before = last;
        ask(fd, "query-status");
        last = now();
        times[count++] = (last - before) * 1e6;
    }
    qsort(times, count, sizeof *times, by_size);
    printf("{\"answers\": %d, \"seconds\": %.6f, \"median_us\": %.2f}\n", count, last - began, times[count / 2]);
    return 0;
}
