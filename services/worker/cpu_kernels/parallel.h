// The threads of OpenMP that torch works with: another pool beside it would fight with it for the cores.
#ifndef SHOAL_PARALLEL_H
#define SHOAL_PARALLEL_H

#include <stdint.h>

extern void GOMP_parallel(void (*body)(void *), void *data, unsigned num_threads, unsigned flags);
extern void GOMP_barrier(void); // nothing, outside of a team
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);
extern double omp_get_wtime(void);

typedef struct {
    int64_t first, end;
} range;

// The part of `count` pieces of work that is this thread's: neighbours.
static inline range own_share(int64_t count) {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    return (range){count * thread / threads, count * (thread + 1) / threads};
}

static inline void in_parallel(void (*body)(void *), void *data, int num_threads) {
    if (num_threads == 1)
        body(data); // outside of a team, a thread is number 0 of 1
    else
        GOMP_parallel(body, data, (unsigned)num_threads, 0);
}

#endif
