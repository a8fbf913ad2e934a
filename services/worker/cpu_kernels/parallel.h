// The threads of OpenMP that torch works with: another pool beside it would fight with it for the cores.
#ifndef SHOAL_PARALLEL_H
#define SHOAL_PARALLEL_H

#include <stdint.h>

extern void GOMP_parallel(void (*body)(void *), void *data, unsigned num_threads, unsigned flags);
extern void GOMP_barrier(void);
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);
extern double omp_get_wtime(void);

typedef struct {
    int64_t first, end;
} range;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t greatest(int64_t a, int64_t b) { return a > b ? a : b; }

// Who shares a piece of work: `count` threads, of which this one is number `thread`.
typedef struct {
    int64_t thread, count;
} team;

// All threads of the parallel region that this is called in; outside of one, a thread is number 0 of 1.
static inline team all_threads(void) { return (team){omp_get_thread_num(), omp_get_num_threads()}; }

// A thread that does its work alone.
static inline team alone(void) { return (team){0, 1}; }

// The part of `count` pieces of work that is this thread's: neighbours.
static inline range own_share(team t, int64_t count) {
    return (range){count * t.thread / t.count, count * (t.thread + 1) / t.count};
}

// Wait for the others of a team.
static inline void meet_team(team t) {
    if (t.count > 1) GOMP_barrier();
}

static inline void in_parallel(void (*body)(void *), void *data, int num_threads) {
    if (num_threads == 1)
        body(data);
    else
        GOMP_parallel(body, data, (unsigned)num_threads, 0);
}

#endif
