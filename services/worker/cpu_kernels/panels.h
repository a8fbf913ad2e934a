// How a product y = x W^T + b is cut into tasks.
//
// A weight is packed into panels of PANEL outputs, the last one filled up. Rows are cut into pieces, which are computed
// together, as few and as even as there can be. A task is some panels and some pieces. If there are many pieces, one's
// inputs stay in the cache of the first level while the task's panels go by, and the panels in that of the second while
// the pieces do. If there are few, a task is one panel for all rows: meanwhile the next one is fetched from memory.
#ifndef SHOAL_PANELS_H
#define SHOAL_PANELS_H

#include "parallel.h"
#include "vectors.h"

#define PANEL (2 * LANES)
#define PANELS_OF_A_TASK 4
#define PIECES_OF_A_TASK 8

typedef struct {
    int64_t panel, num_panels, end_of_own_panels, piece, end_piece, num_pieces, num_rows;
} task;

static inline int64_t num_panels(int64_t num_outputs) { return (num_outputs + PANEL - 1) / PANEL; }

static inline int64_t first_row(const task *t, int64_t piece) { return t->num_rows * piece / t->num_pieces; }

// Compute a thread's own tasks of a product. Shares are even to a part of one panel: some pieces of it.
static ALWAYS_INLINE void do_own_tasks(team all, int64_t num_outputs, int64_t num_rows, int rows_of_a_piece,
                                       void (*compute)(void *product, task), void *product) {
    const int64_t pieces = (num_rows + rows_of_a_piece - 1) / rows_of_a_piece;
    const int64_t parts = (pieces + PIECES_OF_A_TASK - 1) / PIECES_OF_A_TASK;
    const range own = own_share(all, num_panels(num_outputs) * parts);
    for (int64_t n = own.first; n < own.end;) {
        const int64_t part = n % parts, whole_panels = part ? 0 : (own.end - n) / parts;
        const int64_t end_part = whole_panels ? parts : least(parts, part + own.end - n);
        const int64_t panels = whole_panels && parts > 1 ? least(whole_panels, PANELS_OF_A_TASK) : 1;
        for (int64_t p = part; p < end_part; p++)
            compute(product, (task){n / parts, panels, own.end / parts, pieces * p / parts, pieces * (p + 1) / parts,
                                    pieces, num_rows});
        n += panels * (end_part - part);
    }
}

// Write a panel's results of one row, or add them to what is there. `bias` (or null) is filled up as the panel is.
static inline void finish(floats low, floats high, const float *bias, float *out, int64_t width, int adds) {
    if (bias) {
        low += load(bias);
        high += load(bias + LANES);
    }
    if (width >= PANEL) {
        store(out, adds ? load(out) + low : low);
        store(out + LANES, adds ? load(out + LANES) + high : high);
        return;
    }
    for (int64_t lane = 0; lane < width; lane++) {
        const float y = lane < LANES ? low[lane] : high[lane - LANES];
        out[lane] = adds ? out[lane] + y : y;
    }
}

#endif
