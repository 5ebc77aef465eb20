/* How load.c reads an answer, piece by piece: the header, the transfer coding, the events. */
#ifndef BENCH_ANSWER_H
#define BENCH_ANSWER_H

#include "common.h"

#define CARRY 4096            /* longest header, and longest event */

typedef enum { WAITING, CONNECTING, HEAD, LENGTH, SIZE, DATA, DATA_END, TRAILER, OVER } State;

typedef struct {
    int fd;
    State state;
    nanos start;              /* when it is to be opened, then when its request began */
    nanos last;               /* when its last chunk came */
    long expected, chunks;
    size_t left;              /* of the body, or of the chunk of the transfer coding */
    bool ok, sse, done, closing;
    size_t carry_length;
    char carry[CARRY];        /* what is not whole yet: a header, a line, or an event */
    size_t line_length;
    char line[64];            /* the size line of a chunk */
} Connection;

/* What whoever includes this does about it. */
static void refused(const Connection *c);               /* no 200; its header is in `carry` */
static void chunk_came(Connection *c, nanos now);
static void finish(Connection *c);                      /* the answer is whole */
static void give_up(Connection *c);                     /* it can't be understood */

static void see_event(Connection *c, const char *event, size_t length, nanos now) {
    if (memmem(event, length, "\"content\":\" token\"", 18)) chunk_came(c, now);
    else if (length >= 12 && memcmp(event, "data: [DONE]", 12) == 0) c->done = true;
    else if (memmem(event, length, "\"error\"", 7)) c->ok = false;
}

/* Events are cut at blank lines; what is not whole is carried over. */
static void see_body(Connection *c, const char *data, size_t length, nanos now) {
    if (!c->sse) return;
    if (c->carry_length) {
        /* The end of the carried event can lie between the two pieces: join them. */
        static char joined[CARRY + 65536];
        memcpy(joined, c->carry, c->carry_length);
        memcpy(joined + c->carry_length, data, length);
        data = joined;
        length += c->carry_length;
        c->carry_length = 0;
    }
    const char *end;
    while ((end = memmem(data, length, "\n\n", 2))) {
        see_event(c, data, (size_t)(end - data), now);
        length -= (size_t)(end + 2 - data);
        data = end + 2;
    }
    if (length > CARRY) length = 0;
    memcpy(c->carry, data, length);
    c->carry_length = length;
}

/* The header, which is in `carry` whole and ends with a zero. */
static void see_head(Connection *c) {
    const char *type = field(c->carry, "Content-Type");
    const char *length = field(c->carry, "Content-Length");
    const char *connection = field(c->carry, "Connection");
    c->ok = strncmp(c->carry, "HTTP/1.1 200", 12) == 0;
    c->sse = type && strncasecmp(type, "text/event-stream", 17) == 0;
    c->closing = connection && strncasecmp(connection, "close", 5) == 0;
    if (field(c->carry, "Transfer-Encoding")) c->state = SIZE;
    else {
        c->state = LENGTH;
        c->left = length ? strtoul(length, NULL, 10) : 0;
    }
    if (!c->ok) refused(c);
}

static size_t feed_head(Connection *c, const char *data, size_t length) {
    size_t old = c->carry_length, room = CARRY - 1 - old;
    size_t count = length < room ? length : room;
    memcpy(c->carry + old, data, count);
    c->carry[old + count] = 0;
    char *end = strstr(c->carry, "\r\n\r\n");
    if (!end) {
        c->carry_length += count;
        if (c->carry_length == CARRY - 1) give_up(c);
        return count;
    }
    end[2] = 0;
    size_t used = (size_t)(end + 4 - c->carry) - old;
    c->carry_length = 0;
    see_head(c);
    return used;
}

/* A line of the transfer coding; true once it is in `line` whole. */
static bool feed_line(Connection *c, const char *data, size_t length, size_t *used) {
    const char *end = memchr(data, '\n', length);
    *used = end ? (size_t)(end + 1 - data) : length;
    for (size_t i = 0; i < *used && c->line_length < sizeof c->line - 1; i++)
        c->line[c->line_length++] = data[i];
    if (!end) return false;
    c->line[c->line_length] = 0;
    c->line_length = 0;
    return true;
}

static size_t feed_some(Connection *c, const char *data, size_t length, nanos now) {
    size_t used = 0;
    switch (c->state) {
    case HEAD:
        return feed_head(c, data, length);
    case SIZE:
        if (feed_line(c, data, length, &used)) {
            c->left = strtoul(c->line, NULL, 16);
            c->state = c->left ? DATA : TRAILER;
        }
        return used;
    case DATA_END:
        if (feed_line(c, data, length, &used)) c->state = SIZE;
        return used;
    case TRAILER:
        if (feed_line(c, data, length, &used) && c->line[0] == '\r') finish(c);
        return used;
    default:
        used = length < c->left ? length : c->left;
        see_body(c, data, used, now);
        c->left -= used;
        if (!c->left && c->state == DATA) c->state = DATA_END;
        return used;
    }
}

static void feed(Connection *c, const char *data, size_t length, nanos now) {
    while (length && c->state != OVER) {
        size_t used = feed_some(c, data, length, now);
        data += used;
        length -= used;
        if (c->state == LENGTH && !c->left) finish(c);
    }
}

#endif
