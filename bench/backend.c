/* A stand-in for an LLM server (OpenAI chat completions) that costs next to nothing.
 *
 *     backend PORT
 *
 * POST anything       a JSON answer with usage; with "stream":true an event stream of
 *                     `max_completion_tokens` chunks, the first at once, and the usage chunk if
 *                     the body asks for it
 * GET /set?rate=R     from now on streams send R chunks a second, 0: as many as are taken (answers
 *                     200); with &buffer=B the kernel keeps no more than about B bytes of them
 * GET /stats          what was answered so far: its own count of requests and tokens, as JSON
 * GET anything else   200, so that health checks are content
 *
 * Everything is rendered before it is needed, one thread serves all with epoll, and the chunks that
 * are due next stand in a heap. A stream whose last chunk was not taken yet leaves the heap until
 * it is: it is held up.
 */
#include "common.h"

#define MAX_REQUEST (256 * 1024)
#define MODEL "bench"

typedef struct Connection {
    int fd;
    size_t slot;              /* place in the heap, 0: none */
    nanos due;                /* when the next chunk is sent */
    nanos interval;
    int left;                 /* chunks to be sent yet */
    int sent;                 /* chunks sent */
    int prompt;
    bool usage, writing, closed, held;
    char *in;
    size_t in_length, in_room;
    char *out;
    size_t out_length, out_room;
    struct Connection *next_dead;
} Connection;

static int poller;
static double rate = 20;
static int buffer;           /* of the kernel for a stream; 0: as it comes */
static Connection **heap;
static size_t heap_length, heap_room = 1024;
static Connection *dead;      /* freed after the round, as events may still name them */
static struct {
    long requests, streams, chunks, prompt, completion, broken, held;
} stats;

/* -- the heap of streams, by `due` ------------------------------------------------------------ */

static void place(size_t slot, Connection *c) {
    heap[slot] = c;
    c->slot = slot;
}

static void sift(size_t slot) {
    Connection *c = heap[slot];
    while (slot > 1 && heap[slot / 2]->due > c->due) {
        place(slot, heap[slot / 2]);
        slot /= 2;
    }
    for (;;) {
        size_t child = 2 * slot;
        if (child > heap_length) break;
        if (child < heap_length && heap[child + 1]->due < heap[child]->due) child++;
        if (heap[child]->due >= c->due) break;
        place(slot, heap[child]);
        slot = child;
    }
    place(slot, c);
}

static void heap_add(Connection *c) {
    if (heap_length + 2 > heap_room) {
        heap_room *= 2;
        heap = realloc(heap, heap_room * sizeof *heap);
        if (!heap) die("realloc");
    }
    place(++heap_length, c);
    sift(heap_length);
}

static void heap_remove(Connection *c) {
    size_t slot = c->slot;
    if (!slot) return;
    c->slot = 0;
    Connection *last = heap[heap_length--];
    if (last != c) {
        place(slot, last);
        sift(slot);
    }
}

/* -- output ----------------------------------------------------------------------------------- */

static void lose(Connection *c) {
    if (c->closed) return;
    if (c->slot || c->held) stats.broken++;
    if (c->held) stats.held--;
    heap_remove(c);
    c->closed = true;
    close(c->fd);
    c->next_dead = dead;
    dead = c;
}

static void want(Connection *c, bool writing) {
    if (c->writing == writing) return;
    c->writing = writing;
    struct epoll_event event = {.events = EPOLLIN | (writing ? EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &event);
}

static void keep(Connection *c, const char *data, size_t length) {
    if (c->out_length + length > c->out_room) {
        c->out_room = 2 * (c->out_length + length);
        c->out = realloc(c->out, c->out_room);
        if (!c->out) die("realloc");
    }
    memcpy(c->out + c->out_length, data, length);
    c->out_length += length;
    want(c, true);
}

static void put(Connection *c, const char *data, size_t length) {
    if (c->closed) return;
    if (!c->out_length) {
        ssize_t written = send(c->fd, data, length, MSG_NOSIGNAL);
        if (written < 0 && errno != EAGAIN) {
            lose(c);
            return;
        }
        if (written > 0) {
            data += written;
            length -= (size_t)written;
        }
    }
    if (length) keep(c, data, length);
}

static void flush(Connection *c) {
    ssize_t written = send(c->fd, c->out, c->out_length, MSG_NOSIGNAL);
    if (written < 0) {
        if (errno != EAGAIN) lose(c);
        return;
    }
    c->out_length -= (size_t)written;
    memmove(c->out, c->out + written, c->out_length);
    if (c->out_length) return;
    want(c, false);
    if (c->held) {
        c->held = false;
        stats.held--;
        c->due = now_ns();
        heap_add(c);
    }
}

/* -- answers ---------------------------------------------------------------------------------- */

#define EVENT_HEAD "data: {\"id\":\"chatcmpl-4f1f8a5ac0c74a5f9c4d0a6e\"," \
    "\"object\":\"chat.completion.chunk\",\"created\":1750000000,\"model\":\"" MODEL "\",\"choices\":["
#define CONTENT EVENT_HEAD "{\"index\":0,\"delta\":{\"content\":\" token\"}," \
    "\"logprobs\":null,\"finish_reason\":null}]}\n\n"
#define FINISHED EVENT_HEAD "{\"index\":0,\"delta\":{\"content\":\"\"}," \
    "\"logprobs\":null,\"finish_reason\":\"stop\"}]}\n\n"

#define AT_ONCE 16            /* chunks in one piece, for a stream that takes what it can */

static char chunk[512], chunks[AT_ONCE * 512], stream_head[1024];
static size_t chunk_length, stream_head_length;

static void render(void) {
    chunk_length = (size_t)sprintf(chunk, "%zx\r\n%s\r\n", strlen(CONTENT), CONTENT);
    for (size_t i = 0; i < AT_ONCE; i++) memcpy(chunks + i * chunk_length, chunk, chunk_length);
    stream_head_length = (size_t)sprintf(
        stream_head,
        "HTTP/1.1 200 OK\r\nServer: bench\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
        "Transfer-Encoding: chunked\r\n\r\n%s", chunk);
}

static void send_json(Connection *c, const char *body) {
    char answer[4096];
    int length = snprintf(answer, sizeof answer,
        "HTTP/1.1 200 OK\r\nServer: bench\r\nContent-Type: application/json\r\n"
        "Content-Length: %zu\r\n\r\n%s", strlen(body), body);
    put(c, answer, (size_t)length);
}

static void complete(int prompt, int completion) {
    stats.prompt += prompt;
    stats.completion += completion;
}

static void answer_whole(Connection *c, int prompt) {
    int completion = 32 + (int)(stats.requests % 5);
    char body[1024];
    snprintf(body, sizeof body,
        "{\"id\":\"chatcmpl-4f1f8a5ac0c74a5f9c4d0a6e\",\"object\":\"chat.completion\","
        "\"created\":1750000000,\"model\":\"" MODEL "\",\"choices\":[{\"index\":0,\"message\":"
        "{\"role\":\"assistant\",\"content\":\"A token is a piece of a word, as a model reads and"
        " writes it; an answer of this length has about as many of them as are counted below.\","
        "\"refusal\":null,\"tool_calls\":[]},\"logprobs\":null,\"finish_reason\":\"stop\"}],"
        "\"usage\":{\"prompt_tokens\":%d,\"total_tokens\":%d,\"completion_tokens\":%d}}",
        prompt, prompt + completion, completion);
    complete(prompt, completion);
    send_json(c, body);
}

static void end_stream(Connection *c) {
    char usage[256] = "", body[2048], last[2200];
    if (c->usage)
        snprintf(usage, sizeof usage,
            "data: {\"id\":\"chatcmpl-4f1f8a5ac0c74a5f9c4d0a6e\",\"object\":\"chat.completion.chunk\","
            "\"created\":1750000000,\"model\":\"" MODEL "\",\"choices\":[],\"usage\":"
            "{\"prompt_tokens\":%d,\"total_tokens\":%d,\"completion_tokens\":%d}}\n\n",
            c->prompt, c->prompt + c->sent, c->sent);
    int length = snprintf(body, sizeof body, FINISHED "%sdata: [DONE]\n\n", usage);
    length = snprintf(last, sizeof last, "%x\r\n%s\r\n0\r\n\r\n", (unsigned)length, body);
    heap_remove(c);
    complete(c->prompt, c->sent);
    put(c, last, (size_t)length);
}

static void send_due(Connection *c) {
    if (c->out_length) {
        heap_remove(c);
        c->held = true;
        stats.held++;
        return;
    }
    if (!c->left) {
        end_stream(c);
        return;
    }
    int count = c->interval ? 1 : c->left < AT_ONCE ? c->left : AT_ONCE;
    put(c, chunks, (size_t)count * chunk_length);
    if (c->closed) return;
    stats.chunks += count;
    c->left -= count;
    c->sent += count;
    if (c->interval) c->due += c->interval;
    else c->due = now_ns() + 1;     /* each in turn */
    sift(c->slot);
}

static void start_stream(Connection *c, int prompt, int tokens, bool usage) {
    stats.streams++;
    stats.chunks++;
    c->prompt = prompt;
    c->usage = usage;
    c->left = tokens - 1;
    c->sent = 1;
    c->interval = rate > 0 ? (nanos)(SECOND / rate) : 0;
    c->due = now_ns() + c->interval;
    if (buffer) setsockopt(c->fd, SOL_SOCKET, SO_SNDBUF, &buffer, sizeof buffer);
    heap_add(c);
    put(c, stream_head, stream_head_length);
}

/* -- requests --------------------------------------------------------------------------------- */

static const char *value_of(const char *body, const char *key) {
    const char *at = strstr(body, key);
    if (!at) return "";
    at += strlen(key);
    while (*at == ' ' || *at == ':') at++;
    return at;
}

static bool is_true(const char *body, const char *key) {
    return strncmp(value_of(body, key), "true", 4) == 0;
}

static void get(Connection *c, const char *head) {
    char body[512];
    if (strncmp(head, "GET /stats ", 11) == 0) {
        snprintf(body, sizeof body,
            "{\"requests\":%ld,\"streams\":%ld,\"chunks\":%ld,\"prompt\":%ld,\"completion\":%ld,"
            "\"broken\":%ld,\"held\":%ld}",
            stats.requests, stats.streams, stats.chunks, stats.prompt, stats.completion,
            stats.broken, stats.held);
        send_json(c, body);
        return;
    }
    sscanf(head, "GET /set?rate=%lf&buffer=%d", &rate, &buffer);
    send_json(c, "{\"object\":\"list\",\"model_path\":\"" MODEL "\",\"is_generation\":true,"
                 "\"data\":[{\"id\":\"" MODEL "\",\"object\":\"model\",\"owned_by\":\"bench\"}]}");
}

static void post(Connection *c, const char *body) {
    stats.requests++;
    int prompt = 10 + (int)(stats.requests % 7);
    if (!is_true(body, "\"stream\"")) {
        answer_whole(c, prompt);
        return;
    }
    int tokens = atoi(value_of(body, "\"max_completion_tokens\""));
    start_stream(c, prompt, tokens > 0 ? tokens : 1, is_true(body, "\"include_usage\""));
}

/* Serves one request if it is there whole; false if it is not. `c->in` has room for a zero. */
static bool serve_one(Connection *c) {
    c->in[c->in_length] = 0;
    char *end = strstr(c->in, "\r\n\r\n");
    if (!end || c->slot || c->held || c->closed) return false;
    char *body = end + 4;
    end[2] = 0;
    const char *length = field(c->in, "Content-Length");
    bool chunked = field(c->in, "Transfer-Encoding") != NULL;
    size_t body_length = length ? strtoul(length, NULL, 10) : 0;
    end[2] = '\r';
    if (chunked) {  /* no proxy that is measured does this with a small JSON body */
        fprintf(stderr, "backend: a chunked request\n");
        lose(c);
        return false;
    }
    size_t whole = (size_t)(body - c->in) + body_length;
    if (c->in_length < whole) return false;
    char after = c->in[whole];
    c->in[whole] = 0;
    if (strncmp(c->in, "POST ", 5) == 0) post(c, body);
    else get(c, c->in);
    c->in[whole] = after;
    c->in_length -= whole;
    memmove(c->in, c->in + whole, c->in_length);
    return true;
}

static void take(Connection *c) {
    for (;;) {
        if (c->in_length + 2 > c->in_room) {
            c->in_room = c->in_room ? 2 * c->in_room : 2048;
            c->in = realloc(c->in, c->in_room);
            if (!c->in || c->in_room > MAX_REQUEST) die("backend: request");
        }
        size_t room = c->in_room - c->in_length - 1;
        ssize_t count = recv(c->fd, c->in + c->in_length, room, 0);
        if (count == 0 || (count < 0 && errno != EAGAIN)) {
            lose(c);
            return;
        }
        if (count < 0) return;
        c->in_length += (size_t)count;
        while (serve_one(c)) {}
        if (c->closed || (size_t)count < room) return;
    }
}

static void accept_all(int listener) {
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) return;
        no_delay(fd);
        Connection *c = must_alloc(1, sizeof *c);
        c->fd = fd;
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
        if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event) < 0) die("epoll_ctl");
    }
}

static void bury(void) {
    while (dead) {
        Connection *c = dead;
        dead = c->next_dead;
        free(c->in);
        free(c->out);
        free(c);
    }
}

static int listen_on(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1;
    if (fd < 0) die("socket");
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0) die("bind");
    if (listen(fd, 8192) < 0) die("listen");
    return fd;
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: backend PORT\n");
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    all_descriptors();
    render();
    heap = must_alloc(heap_room, sizeof *heap);
    poller = epoll_create1(EPOLL_CLOEXEC);
    int listener = listen_on(atoi(argv[1]));
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event) < 0) die("epoll_ctl");
    static struct epoll_event events[1024];
    for (;;) {
        int count = wait_until(poller, events, 1024, heap_length ? heap[1]->due : 0);
        for (int i = 0; i < count; i++) {
            Connection *c = events[i].data.ptr;
            if (!c) {
                accept_all(listener);
                continue;
            }
            if (c->closed) continue;
            if (events[i].events & EPOLLOUT) flush(c);
            if (!c->closed && events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) take(c);
        }
        nanos now = now_ns();
        while (heap_length && heap[1]->due <= now) send_due(heap[1]);
        bury();
    }
}
