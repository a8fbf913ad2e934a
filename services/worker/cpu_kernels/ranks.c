#include "ranks.h"
#include "vectors.h"

#define LOOKS_BEFORE_YIELDING 2000 // some tens of microseconds: ranks on cores of their own come within them
#define YIELDS_BETWEEN_CLOCKS 16
#define PATIENCE_IN_OWN_WORK 4 // ranks' parts differ by a factor of 2 at most

extern int sched_yield(void);

void begin_work(ranks *k) { k->since_s = omp_get_wtime(); }

static int has_come(const ranks *k, int64_t rank) {
    return __atomic_load_n(k->arrivals + rank * LINE_INT64S, __ATOMIC_ACQUIRE) >= k->num_meetings;
}

static void wait_for(ranks *k, int64_t rank, double until_s) {
    for (int look = 0; look < LOOKS_BEFORE_YIELDING; look++)
        if (has_come(k, rank)) return;
    for (int64_t yield = 1; !has_come(k, rank); yield++) {
        sched_yield();
        if (yield % YIELDS_BETWEEN_CLOCKS == 0 && omp_get_wtime() > until_s) {
            k->is_broken = 1;
            return;
        }
    }
}

void meet(ranks *k, int64_t count) {
    if (k->is_broken) return;
    if (k->sum) {
        k->is_broken = !k->sum(next_slot(k, k->rank), count);
        k->num_meetings++;
        return;
    }
    const double now_s = omp_get_wtime(), own_s = PATIENCE_IN_OWN_WORK * (now_s - k->since_s);
    k->num_meetings++;
    __atomic_store_n(k->arrivals + k->rank * LINE_INT64S, k->num_meetings, __ATOMIC_RELEASE);
    for (int64_t rank = 0; rank < k->world_size && !k->is_broken; rank++)
        wait_for(k, rank, now_s + (own_s > k->patience_s ? own_s : k->patience_s));
    k->since_s = omp_get_wtime();
}

void add_given_own(team all, const ranks *k, float *rows, int64_t num_rows, int64_t size) {
    const range own = own_share(all, num_rows);
    const int64_t first = k->sum ? k->rank : 0, end = k->sum ? k->rank + 1 : k->world_size;
    for (int64_t rank = first; rank < end; rank++) {
        const float *given = last_slot(k, rank);
        for (int64_t i = own.first * size; i < own.end * size; i++)
            rows[i] += given[i];
    }
}

// For what ranks give each other beside products.
void shoal_meet(ranks *k) { meet(k, 0); }
