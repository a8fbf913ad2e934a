// The ranks of a worker: processes that each compute a part of the model, and meet in memory that all of them map.
#ifndef SHOAL_RANKS_H
#define SHOAL_RANKS_H

#include "parallel.h"

#define LINE_INT64S 8 // of a line of the processor's cache

// Two slots a rank, used in turn, in which it gives something to all: [world_size, 2, slot_floats]. With two, no rank
// waits until the others have read: it fills a slot again only after a meeting that they came to when they had.
// `arrivals`: how many meetings each rank has come to, a line each. `sum`, if not null, does instead what a meeting is
// for: it makes the first `count` values of a rank's slot the sums over all ranks, and returns whether it could.
typedef struct {
    int64_t rank, world_size, slot_floats;
    float *slots;
    int64_t *arrivals;
    int64_t (*sum)(float *slot, int64_t count);
    double patience_s; // the least that a rank waits for others
    int64_t num_meetings, is_broken;
    double since_s; // when this rank began what it does until the next meeting
} ranks;

// The slot that a rank gives at the next meeting, or gave at the last one.
static inline float *next_slot(const ranks *k, int64_t rank) {
    return k->slots + (rank * 2 + (k->num_meetings + 1) % 2) * k->slot_floats;
}
static inline const float *last_slot(const ranks *k, int64_t rank) {
    return k->slots + (rank * 2 + k->num_meetings % 2) * k->slot_floats;
}

// A rank begins to work: what it did before does not count as such.
void begin_work(ranks *k);

// Say that this rank's slot is filled, and wait until every rank's is. One thread's task; the others wait at a barrier
// before and behind it. If a rank does not come in time, all is broken from then on: nobody waits any more, and what is
// computed means nothing.
void meet(ranks *k, int64_t count);

// rows += what each rank gave at the last meeting, in the order of ranks: the same bits on all of them, and whatever
// rows are beside. Each thread does its own rows, [num_rows, size].
void add_given_own(team all, const ranks *k, float *rows, int64_t num_rows, int64_t size);

#endif
