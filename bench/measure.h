/* What load.c measures with: histograms of times, and what processes use. */
#ifndef BENCH_MEASURE_H
#define BENCH_MEASURE_H

#include "common.h"

/* -- histograms: 64 steps for each power of two, so within 1.6 % ------------------------------- */

#define STEPS 64
#define BUCKETS (STEPS * 40)
typedef struct {
    long count, at[BUCKETS];
    nanos largest;
} Histogram;

static inline size_t bucket(uint64_t ns) {
    if (ns < STEPS) return ns;
    int shift = 57 - __builtin_clzll(ns);   /* ns >> shift is in [64, 128) */
    size_t index = (size_t)(shift + 1) * STEPS + ((ns >> shift) - STEPS);
    return index < BUCKETS ? index : BUCKETS - 1;
}

static inline double bucket_us(size_t index) {
    if (index < STEPS) return (double)index / 1000;
    size_t shift = index / STEPS - 1;
    return ((double)((STEPS + index % STEPS) << shift) + (double)(1ULL << shift) / 2) / 1000;
}

static inline void record(Histogram *h, nanos ns) {
    h->at[bucket(ns > 0 ? (uint64_t)ns : 0)]++;
    h->count++;
    if (ns > h->largest) h->largest = ns;
}

static inline double quantile(const Histogram *h, double q) {
    long wanted = (long)(q * (double)h->count), seen = 0;
    for (size_t i = 0; i < BUCKETS; i++)
        if ((seen += h->at[i]) > wanted) return bucket_us(i);
    return (double)h->largest / 1000;
}

/* -- processes -------------------------------------------------------------------------------- */

#define MAX_PIDS 64

typedef struct {
    nanos at, target_cpu, backend_cpu, own_cpu;
    nanos each_cpu[MAX_PIDS];
    long target_rss_kib;
} Usage;

static pid_t targets[MAX_PIDS], backend;
static int target_count;

/* utime + stime of all its threads, as /proc/PID/stat has them, but to the nanosecond. */
static inline nanos cpu_of(pid_t pid) {
    clockid_t clock;
    struct timespec used;
    if (!pid || clock_getcpuclockid(pid, &clock) || clock_gettime(clock, &used)) return 0;
    return used.tv_sec * SECOND + used.tv_nsec;
}

static inline long rss_of(pid_t pid) {
    char path[64];
    long size, resident = 0;
    snprintf(path, sizeof path, "/proc/%d/statm", pid);
    FILE *file = fopen(path, "r");
    if (!file) return 0;
    if (fscanf(file, "%ld %ld", &size, &resident) != 2) resident = 0;
    fclose(file);
    return resident * (sysconf(_SC_PAGESIZE) / 1024);
}

static inline Usage usage_now(void) {
    Usage usage = {.at = now_ns(), .backend_cpu = cpu_of(backend), .own_cpu = cpu_of(getpid())};
    for (int i = 0; i < target_count; i++) {
        usage.each_cpu[i] = cpu_of(targets[i]);
        usage.target_cpu += usage.each_cpu[i];
        usage.target_rss_kib += rss_of(targets[i]);
    }
    return usage;
}

#endif
