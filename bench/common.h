/* What load.c and backend.c share: time, a small HTTP look-up, and giving up. */
#ifndef BENCH_COMMON_H
#define BENCH_COMMON_H

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000LL

typedef int64_t nanos;

static inline nanos now_ns(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * SECOND + at.tv_nsec;
}

static inline void die(const char *what) {
    perror(what);
    exit(1);
}

static inline void *must_alloc(size_t count, size_t size) {
    void *memory = calloc(count, size);
    if (!memory) die("calloc");
    return memory;
}

static inline void all_descriptors(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

static inline void no_delay(int fd) {
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

/* The value of a header field, or NULL; `head` ends with a zero byte and starts at the first line. */
static inline const char *field(const char *head, const char *name) {
    size_t length = strlen(name);
    for (const char *line = strstr(head, "\r\n"); line; line = strstr(line, "\r\n")) {
        line += 2;
        if (strncasecmp(line, name, length) == 0 && line[length] == ':') {
            line += length + 1;
            while (*line == ' ') line++;
            return line;
        }
    }
    return NULL;
}

/* epoll_pwait2 is not everywhere, and epoll_wait counts in milliseconds: so a wait is rounded up,
 * and what is due within one is waited for with nanosleep's precision. `due`: 0 for no deadline. */
static inline int wait_until(int poll, struct epoll_event *events, int room, nanos due) {
    if (!due) return epoll_wait(poll, events, room, -1);
    nanos left = due - now_ns();
    struct timespec timeout = {0, 0};
    if (left > 0) timeout = (struct timespec){left / SECOND, left % SECOND};
    int count = epoll_pwait2(poll, events, room, &timeout, NULL);
    if (count < 0 && errno == ENOSYS)
        count = epoll_wait(poll, events, room, left > 0 ? (int)((left + 999999) / 1000000) : 0);
    return count;
}

#endif
