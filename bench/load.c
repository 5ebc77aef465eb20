/* The clients: a closed loop of whole answers, or open streams, and what they measure.
 *
 *     load closed  PORT CONNECTIONS WARM_S WINDOW_S          KEY BACKEND_PID TARGET_PID...
 *     load streams PORT STREAMS     RAMP_S WINDOW_S  RATE    KEY BACKEND_PID TARGET_PID...
 *
 * closed: each connection sends its next request once it has the answer. streams: they begin at
 * random within the ramp, and go on until after the window. Only what falls into the window is
 * measured (but times to first token, which are those of the ramp); all that is begun is ended,
 * and counted as complete or lost. Writes one JSON object: times in microseconds, memory in KiB.
 */
#include "common.h"

#define SETTLE_S 0.5          /* between the ramp and the window, and a tenth of the ramp more */
#define PATIENCE_S 30.0       /* how long all may take to end, after they should have */
#define MAX_PIDS 64
#define CARRY 4096            /* longest header, and longest event */

/* -- histograms: 64 steps for each power of two, so within 1.6 % ------------------------------- */

#define STEPS 64
#define BUCKETS (STEPS * 40)
typedef struct {
    long count, at[BUCKETS];
    nanos largest;
} Histogram;

static size_t bucket(uint64_t ns) {
    if (ns < STEPS) return ns;
    int shift = 57 - __builtin_clzll(ns);   /* ns >> shift is in [64, 128) */
    size_t index = (size_t)(shift + 1) * STEPS + ((ns >> shift) - STEPS);
    return index < BUCKETS ? index : BUCKETS - 1;
}

static double bucket_us(size_t index) {
    if (index < STEPS) return (double)index / 1000;
    size_t shift = index / STEPS - 1;
    return ((double)((STEPS + index % STEPS) << shift) + (double)(1ULL << shift) / 2) / 1000;
}

static void record(Histogram *h, nanos ns) {
    h->at[bucket(ns > 0 ? (uint64_t)ns : 0)]++;
    h->count++;
    if (ns > h->largest) h->largest = ns;
}

static double quantile(const Histogram *h, double q) {
    long wanted = (long)(q * (double)h->count), seen = 0;
    for (size_t i = 0; i < BUCKETS; i++)
        if ((seen += h->at[i]) > wanted) return bucket_us(i);
    return (double)h->largest / 1000;
}

/* -- processes -------------------------------------------------------------------------------- */

typedef struct {
    nanos at, target_cpu, backend_cpu, own_cpu;
    long target_rss_kib;
} Usage;

static pid_t targets[MAX_PIDS], backend;
static int target_count;

/* utime + stime of all its threads, as /proc/PID/stat has them, but to the nanosecond. */
static nanos cpu_of(pid_t pid) {
    clockid_t clock;
    struct timespec used;
    if (!pid || clock_getcpuclockid(pid, &clock) || clock_gettime(clock, &used)) return 0;
    return used.tv_sec * SECOND + used.tv_nsec;
}

static long rss_of(pid_t pid) {
    char path[64];
    long size, resident = 0;
    snprintf(path, sizeof path, "/proc/%d/statm", pid);
    FILE *file = fopen(path, "r");
    if (!file) return 0;
    if (fscanf(file, "%ld %ld", &size, &resident) != 2) resident = 0;
    fclose(file);
    return resident * (sysconf(_SC_PAGESIZE) / 1024);
}

static Usage usage_now(void) {
    Usage usage = {.at = now_ns(), .backend_cpu = cpu_of(backend), .own_cpu = cpu_of(getpid())};
    for (int i = 0; i < target_count; i++) {
        usage.target_cpu += cpu_of(targets[i]);
        usage.target_rss_kib += rss_of(targets[i]);
    }
    return usage;
}

/* -- connections ------------------------------------------------------------------------------ */

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

static bool streaming;
static int poller, port, connection_count, active;
static double warm_s, window_s, rate;
static char *key;
static Connection *connections;
static Usage before, after;
static nanos began, window_start, window_end;
static bool in_window, window_over;
static Histogram latency, gaps, first;
static long completed, completed_all, lost, failed, wrong, chunks, reconnects;

static void finish(Connection *c);

static void hang_up(Connection *c) {
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
}

static void retire(Connection *c) {
    if (c->state == OVER) return;
    hang_up(c);
    c->state = OVER;
    active--;
}

static void give_up(Connection *c) {
    if (c->state == OVER) return;
    lost++;
    retire(c);
}

static void reset(Connection *c) {
    c->state = HEAD;
    c->carry_length = c->line_length = 0;
    c->chunks = 0;
    c->last = 0;
    c->ok = c->sse = c->done = c->closing = false;
}

static void send_request(Connection *c) {
    char body[1024], request[2048], stream[128] = "";
    if (streaming)
        snprintf(stream, sizeof stream, ",\"stream\":true,\"max_completion_tokens\":%ld", c->expected);
    snprintf(body, sizeof body,
        "{\"model\":\"bench\",\"messages\":[{\"role\":\"system\",\"content\":\"You are a helpful"
        " assistant.\"},{\"role\":\"user\",\"content\":\"How many tokens does it take to say what"
        " a token is, and who pays for them in the end?\"}],\"temperature\":0.7%s}", stream);
    int length = snprintf(request, sizeof request,
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUser-Agent: bench\r\n"
        "Accept: application/json\r\nAuthorization: Bearer %s\r\n"
        "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
        port, key, strlen(body), body);
    reset(c);
    if (!streaming) c->start = now_ns();
    if (send(c->fd, request, (size_t)length, MSG_NOSIGNAL) != length) give_up(c);
}

static void dial(Connection *c) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) die("socket");
    no_delay(c->fd);
    c->state = CONNECTING;
    c->start = now_ns();
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS) {
        give_up(c);
        return;
    }
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT, .data.ptr = c};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event) < 0) die("epoll_ctl");
}

static void connected(Connection *c) {
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &event);
    send_request(c);
}

/* -- answers ---------------------------------------------------------------------------------- */

static void chunk_came(Connection *c, nanos now) {
    if (!c->chunks++) record(&first, now - c->start);
    else if (in_window) record(&gaps, now - c->last);
    if (in_window) chunks++;
    c->last = now;
}

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
    if (!c->ok && !failed++) fprintf(stderr, "load: first refusal: %.300s\n", c->carry);
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

static void finish_whole(Connection *c) {
    if (c->ok) completed_all++;
    else lost++;
    if (in_window && c->ok) {
        record(&latency, now_ns() - c->start);
        completed++;
    }
    if (window_over) retire(c);
    else if (c->closing) {
        reconnects++;
        hang_up(c);
        dial(c);
    } else send_request(c);
}

static void finish(Connection *c) {
    if (!streaming) {
        finish_whole(c);
        return;
    }
    if (!c->ok || !c->done) lost++;
    else if (c->chunks != c->expected) wrong++;
    else completed_all++;
    retire(c);
}

static void on_event(Connection *c, uint32_t flags) {
    static char data[65536];
    if (c->state == CONNECTING) {
        int error = 0;
        socklen_t size = sizeof error;
        getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
        if (error) give_up(c);
        else if (flags & EPOLLOUT) connected(c);
        return;
    }
    ssize_t count = recv(c->fd, data, sizeof data, 0);
    if (count > 0) feed(c, data, (size_t)count, now_ns());
    else if (count == 0 || errno != EAGAIN) give_up(c);
}

/* -- the run ---------------------------------------------------------------------------------- */

static int by_start(const void *a, const void *b) {
    nanos x = ((const Connection *)a)->start, y = ((const Connection *)b)->start;
    return (x > y) - (x < y);
}

static void plan(void) {
    connections = must_alloc((size_t)connection_count, sizeof *connections);
    active = connection_count;
    began = now_ns();
    double settle_s = streaming ? SETTLE_S + warm_s / 10 : 0;
    window_start = began + (nanos)((warm_s + settle_s) * SECOND);
    window_end = window_start + (nanos)(window_s * SECOND);
    srand48(1);                                 /* the same for every target */
    for (int i = 0; i < connection_count; i++) {
        Connection *c = &connections[i];
        c->fd = -1;
        c->start = began;
        if (!streaming) continue;
        c->start += (nanos)(drand48() * warm_s * SECOND);
        double lasts_s = (double)(window_end - c->start) / SECOND + drand48() * (0.5 + warm_s / 2);
        c->expected = (long)(lasts_s * rate) + 2;
    }
    qsort(connections, (size_t)connection_count, sizeof *connections, by_start);
}

static nanos tick(int *next, nanos now) {
    while (*next < connection_count && connections[*next].start <= now)
        dial(&connections[(*next)++]);
    if (!in_window && !window_over && now >= window_start) {
        in_window = true;
        before = usage_now();
    }
    if (in_window && now >= window_end) {
        after = usage_now();
        in_window = false;
        window_over = true;
    }
    nanos due = window_over ? now + SECOND / 10 : in_window ? window_end : window_start;
    if (*next < connection_count && connections[*next].start < due) due = connections[*next].start;
    return due;
}

static void run(void) {
    static struct epoll_event events[1024];
    double after_s = PATIENCE_S + (streaming ? 0.5 + warm_s / 2 : 0);
    nanos deadline = window_end + (nanos)(after_s * SECOND);
    int next = 0;
    while (active || !window_over) {
        nanos now = now_ns();
        nanos due = tick(&next, now);
        if (now > deadline) break;
        int count = wait_until(poller, events, 1024, due);
        for (int i = 0; i < count; i++) {
            Connection *c = events[i].data.ptr;
            if (c->state != OVER && c->fd >= 0) on_event(c, events[i].events);
        }
    }
    for (int i = 0; i < connection_count; i++) give_up(&connections[i]);
}

static void report(void) {
    double seconds = (double)(after.at - before.at) / SECOND;
    long done = streaming ? chunks : completed;
    double share = 100 / (seconds * SECOND);
    printf("{\"seconds\":%.4f,\"count\":%ld,\"per_s\":%.1f,\"cpu_us\":%.3f,\"rss_kib\":%ld",
           seconds, done, (double)done / seconds,
           done ? (double)(after.target_cpu - before.target_cpu) / 1000 / (double)done : 0,
           after.target_rss_kib);
    printf(",\"target_cpu_pct\":%.1f,\"backend_cpu_pct\":%.1f,\"load_cpu_pct\":%.1f",
           (double)(after.target_cpu - before.target_cpu) * share,
           (double)(after.backend_cpu - before.backend_cpu) * share,
           (double)(after.own_cpu - before.own_cpu) * share);
    printf(",\"complete\":%ld,\"lost\":%ld,\"refused\":%ld,\"wrong\":%ld,\"reconnects\":%ld",
           completed_all, lost, failed, wrong, reconnects);
    if (streaming)
        printf(",\"ttft_p50\":%.1f,\"ttft_p99\":%.1f,\"gap_p50\":%.1f,\"gap_p99\":%.1f,"
               "\"gap_max\":%.1f}\n", quantile(&first, .5), quantile(&first, .99),
               quantile(&gaps, .5), quantile(&gaps, .99), (double)gaps.largest / 1000);
    else
        printf(",\"p50\":%.1f,\"p99\":%.1f,\"max\":%.1f}\n", quantile(&latency, .5),
               quantile(&latency, .99), (double)latency.largest / 1000);
}

int main(int argc, char **argv) {
    streaming = argc > 1 && strcmp(argv[1], "streams") == 0;
    int at = streaming ? 7 : 6;
    if (argc < at + 2) {
        fprintf(stderr, "usage: load closed PORT CONNECTIONS WARM_S WINDOW_S KEY BACKEND_PID"
                        " TARGET_PID...\n       load streams PORT STREAMS RAMP_S WINDOW_S RATE KEY"
                        " BACKEND_PID TARGET_PID...\n");
        return 2;
    }
    port = atoi(argv[2]);
    connection_count = atoi(argv[3]);
    warm_s = atof(argv[4]);
    window_s = atof(argv[5]);
    rate = streaming ? atof(argv[6]) : 1;
    key = argv[at];
    backend = (pid_t)atoi(argv[at + 1]);
    for (int i = at + 2; i < argc && target_count < MAX_PIDS; i++)
        targets[target_count++] = (pid_t)atoi(argv[i]);
    signal(SIGPIPE, SIG_IGN);
    all_descriptors();
    poller = epoll_create1(EPOLL_CLOEXEC);
    plan();
    run();
    report();
    return 0;
}
