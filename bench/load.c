/* The clients: closed loops or open streams of several kinds, and what they measure.
 *
 *     load MODE PORT CONNECTIONS A B C KEY BACKEND_PID TARGET_PID...
 *
 *     MODE     A         B         C
 *     closed   WARM_S    WINDOW_S  -          each connection sends its next request once it has the
 *                                             answer
 *     streams  RAMP_S    WINDOW_S  RATE       streams begin at random within the ramp, and go on
 *                                             until after the window, at RATE chunks a second
 *     count    COUNT     CHUNKS    -          a closed loop of COUNT requests in all; CHUNKS: streams
 *                                             of so many, 0: whole answers
 *     slow     RAMP_S    HOLD_S    CHUNKS     streams of so many chunks, of which nothing is read
 *                                             but a byte a second, until the hold is over
 *
 * Only what falls into the window is measured: WINDOW_S, HOLD_S, or all COUNT requests (but times to
 * first token are those of all streams); all that is begun is ended, and counted as complete or
 * lost. Writes one JSON object: times in microseconds, memory in KiB.
 */
#include "answer.h"
#include "common.h"
#include "measure.h"

#define SETTLE_S 0.5          /* between the ramp and the window, and a tenth of the ramp more */
#define PATIENCE_S 30.0       /* how long nothing may come of what should have ended by now */
#define SIP_BUFFER 4096       /* of a socket that is hardly read: the kernel shall not hide it */
#define SIP_SEGMENT 1460      /* and what it sends is kept for segments as they are on Ethernet */
#define TOGETHER (SECOND / 1000) /* between chunks that were held back and came together */
#define READ_BUFFER (1024 * 1024)

/* -- connections ------------------------------------------------------------------------------ */

static enum { CLOSED, STREAMS, COUNT, SLOW } mode;
static int poller, port, connection_count, active;
static double warm_s, window_s, rate;
static long wanted, sent, chunks_each;      /* requests in all, so far; chunks of each answer */
static char *key;
static Connection *connections;
static Usage before, after;
static nanos began, window_start, window_end, last_came;
static bool in_window, window_over, sipping;
static Histogram latency, gaps, first;
static long completed, completed_all, lost, failed, wrong, chunks, reconnects, together;

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
    if (c->expected)
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
    sent++;
    if (mode == CLOSED || mode == COUNT) c->start = now_ns();
    if (send(c->fd, request, (size_t)length, MSG_NOSIGNAL) != length) give_up(c);
}

static void buffer(Connection *c, int size) {
    setsockopt(c->fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
}

static void listen_to(Connection *c, uint32_t what) {
    struct epoll_event event = {.events = what, .data.ptr = c};
    epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &event);
}

static void dial(Connection *c) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) die("socket");
    no_delay(c->fd);
    if (mode == SLOW) {
        int segment = SIP_SEGMENT;
        setsockopt(c->fd, IPPROTO_TCP, TCP_MAXSEG, &segment, sizeof segment);
        buffer(c, SIP_BUFFER);
    }
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
    listen_to(c, mode == SLOW ? 0 : EPOLLIN);
    send_request(c);
}

/* -- answers ---------------------------------------------------------------------------------- */

static void refused(const Connection *c) {
    if (!failed++) fprintf(stderr, "load: first refusal: %.300s\n", c->carry);
}

static void chunk_came(Connection *c, nanos now) {
    if (!c->chunks++) record(&first, now - c->start);
    else if (in_window) {
        record(&gaps, now - c->last);
        together += now - c->last < TOGETHER;
    }
    if (in_window) chunks++;
    c->last = now;
}

/* The next request of a closed loop, if there is to be one. */
static void go_on(Connection *c) {
    if (window_over || (mode == COUNT && sent >= wanted)) retire(c);
    else if (c->closing) {
        reconnects++;
        hang_up(c);
        dial(c);
    } else send_request(c);
}

static void finish(Connection *c) {
    if (!c->ok || (c->expected && !c->done)) lost++;
    else if (c->chunks != c->expected) wrong++;
    else {
        completed_all++;
        if (in_window) {
            record(&latency, now_ns() - c->start);
            completed++;
        }
    }
    if (mode == CLOSED || mode == COUNT) go_on(c);
    else retire(c);
}

static void take(Connection *c, size_t most) {
    static char data[65536];
    ssize_t count = recv(c->fd, data, most < sizeof data ? most : sizeof data, 0);
    if (count > 0) feed(c, data, (size_t)count, last_came = now_ns());
    else if (count == 0 || errno != EAGAIN) give_up(c);
}

static void on_event(Connection *c, uint32_t flags) {
    if (c->state == CONNECTING) {
        int error = 0;
        socklen_t size = sizeof error;
        getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
        if (error) give_up(c);
        else if (flags & EPOLLOUT) connected(c);
        return;
    }
    take(c, SIZE_MAX);
}

/* -- the run ---------------------------------------------------------------------------------- */

static int by_start(const void *a, const void *b) {
    nanos x = ((const Connection *)a)->start, y = ((const Connection *)b)->start;
    return (x > y) - (x < y);
}

static void plan_one(Connection *c) {
    c->fd = -1;
    c->start = began;
    c->expected = chunks_each;
    if (mode == STREAMS || mode == SLOW) c->start += (nanos)(drand48() * warm_s * SECOND);
    if (mode != STREAMS) return;
    double lasts_s = (double)(window_end - c->start) / SECOND + drand48() * (0.5 + warm_s / 2);
    c->expected = (long)(lasts_s * rate) + 2;
}

static void plan(void) {
    connections = must_alloc((size_t)connection_count, sizeof *connections);
    active = connection_count;
    began = last_came = now_ns();
    double settle_s = mode == STREAMS || mode == SLOW ? SETTLE_S + warm_s / 10 : 0;
    window_start = began + (nanos)((warm_s + settle_s) * SECOND);
    window_end = mode == COUNT ? INT64_MAX : window_start + (nanos)(window_s * SECOND);
    sipping = mode == SLOW;
    srand48(1);                                 /* the same for every target */
    for (int i = 0; i < connection_count; i++) plan_one(&connections[i]);
    qsort(connections, (size_t)connection_count, sizeof *connections, by_start);
}

/* A byte of each; at the end of the hold they are read like others. */
static void sip(void) {
    sipping = !window_over;
    for (int i = 0; i < connection_count; i++) {
        Connection *c = &connections[i];
        if (c->state == OVER || c->state == CONNECTING || c->fd < 0) continue;
        if (sipping) take(c, 1);
        else {
            buffer(c, READ_BUFFER);
            listen_to(c, EPOLLIN);
        }
    }
}

static nanos tick(int *next, nanos now) {
    while (*next < connection_count && connections[*next].start <= now)
        dial(&connections[(*next)++]);
    if (!in_window && !window_over && now >= window_start) {
        in_window = true;
        before = usage_now();
    }
    if (in_window && (now >= window_end || (mode == COUNT && !active))) {
        after = usage_now();
        in_window = false;
        window_over = true;
    }
    static nanos next_sip;
    if (sipping && (now >= next_sip || window_over)) {
        sip();
        next_sip = now + SECOND;
    }
    nanos due = window_over ? now + SECOND / 10 : in_window ? window_end : window_start;
    if (*next < connection_count && connections[*next].start < due) due = connections[*next].start;
    if (sipping && next_sip < due) due = next_sip;
    return due;
}

/* Whether nothing has come for so long that nothing will, or streams go on long after their end. */
static bool stuck(nanos now) {
    if (mode != COUNT && !window_over) return false;
    nanos since = window_over && last_came < window_end ? window_end : last_came;
    if (now > since + (nanos)(PATIENCE_S * SECOND)) return true;
    double longest_s = PATIENCE_S + 0.5 + warm_s / 2;
    return mode == STREAMS && now > window_end + (nanos)(longest_s * SECOND);
}

static void run(void) {
    static struct epoll_event events[1024];
    int next = 0;
    while (active || !window_over) {
        nanos now = now_ns();
        nanos due = tick(&next, now);
        if (stuck(now) || (window_over && !active)) break;
        if (due > now + SECOND) due = now + SECOND;
        int count = wait_until(poller, events, 1024, due);
        for (int i = 0; i < count; i++) {
            Connection *c = events[i].data.ptr;
            if (c->state != OVER && c->fd >= 0) on_event(c, events[i].events);
        }
    }
    if (!window_over) after = usage_now();      /* stuck in the middle of a count */
    for (int i = 0; i < connection_count; i++) give_up(&connections[i]);
}

static void report(void) {
    double seconds = (double)(after.at - before.at) / SECOND;
    bool streaming = mode == STREAMS || mode == SLOW;
    long done = streaming ? chunks : completed;
    nanos busiest = 0;
    for (int i = 0; i < target_count; i++) {
        nanos used = after.each_cpu[i] - before.each_cpu[i];
        if (used > busiest) busiest = used;
    }
    double share = 100 / (seconds * SECOND);
    printf("{\"seconds\":%.4f,\"count\":%ld,\"per_s\":%.1f,\"cpu_us\":%.3f,\"rss_kib\":%ld",
           seconds, done, (double)done / seconds,
           done ? (double)(after.target_cpu - before.target_cpu) / 1000 / (double)done : 0,
           after.target_rss_kib);
    printf(",\"target_cpu_pct\":%.1f,\"busiest_cpu_pct\":%.1f,\"backend_cpu_pct\":%.1f,"
           "\"load_cpu_pct\":%.1f",
           (double)(after.target_cpu - before.target_cpu) * share, (double)busiest * share,
           (double)(after.backend_cpu - before.backend_cpu) * share,
           (double)(after.own_cpu - before.own_cpu) * share);
    printf(",\"complete\":%ld,\"lost\":%ld,\"refused\":%ld,\"wrong\":%ld,\"reconnects\":%ld",
           completed_all, lost, failed, wrong, reconnects);
    if (first.count)
        printf(",\"ttft_p50\":%.1f,\"ttft_p99\":%.1f,\"gap_p50\":%.1f,\"gap_p99\":%.1f,"
               "\"gap_max\":%.1f,\"together_pct\":%.2f", quantile(&first, .5), quantile(&first, .99),
               quantile(&gaps, .5), quantile(&gaps, .99), (double)gaps.largest / 1000,
               gaps.count ? 100 * (double)together / (double)gaps.count : 0);
    if (!streaming)
        printf(",\"p50\":%.1f,\"p99\":%.1f,\"max\":%.1f", quantile(&latency, .5),
               quantile(&latency, .99), (double)latency.largest / 1000);
    printf("}\n");
}

static int usage(void) {
    fprintf(stderr, "usage: load closed|streams|count|slow PORT CONNECTIONS A B C KEY BACKEND_PID"
                    " TARGET_PID...\n");
    return 2;
}

int main(int argc, char **argv) {
    static const char *const modes[] = {"closed", "streams", "count", "slow"};
    if (argc < 9) return usage();
    while (strcmp(argv[1], modes[mode]) != 0)
        if (++mode > SLOW) return usage();
    port = atoi(argv[2]);
    connection_count = atoi(argv[3]);
    if (mode == COUNT) {
        wanted = atol(argv[4]);
        chunks_each = atol(argv[5]);
        if (connection_count > wanted) connection_count = (int)wanted;
    } else {
        warm_s = atof(argv[4]);
        window_s = atof(argv[5]);
    }
    if (mode == STREAMS) rate = atof(argv[6]);
    if (mode == SLOW) chunks_each = atol(argv[6]);
    key = argv[7];
    backend = (pid_t)atoi(argv[8]);
    for (int i = 9; i < argc && target_count < MAX_PIDS; i++)
        targets[target_count++] = (pid_t)atoi(argv[i]);
    signal(SIGPIPE, SIG_IGN);
    all_descriptors();
    poller = epoll_create1(EPOLL_CLOEXEC);
    plan();
    run();
    report();
    return 0;
}
