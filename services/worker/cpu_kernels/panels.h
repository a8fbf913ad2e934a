// How a product y = x W^T + b is cut into tasks.
//
// A weight is packed into panels of PANEL outputs, the last one filled up. A task is a panel and some rows;
// neighbouring tasks share a panel, which stays in the cache while rows go by.
#ifndef SHOAL_PANELS_H
#define SHOAL_PANELS_H

#include "parallel.h"
#include "vectors.h"

#define PANEL (2 * LANES)
#define ROWS_OF_A_TASK 96

typedef struct {
    int64_t panel, first_row, num_rows;
} task;

static inline int64_t num_panels(int64_t num_outputs) { return (num_outputs + PANEL - 1) / PANEL; }

static inline int64_t row_tasks(int64_t num_rows) { return (num_rows + ROWS_OF_A_TASK - 1) / ROWS_OF_A_TASK; }

static inline task nth_task(int64_t n, int64_t num_rows) {
    const int64_t parts = row_tasks(num_rows), part = n % parts;
    const int64_t first = num_rows * part / parts;
    return (task){n / parts, first, num_rows * (part + 1) / parts - first};
}

// The next rows to compute together, so that `left` rows are cut into as few and as even pieces as there can be.
static inline int rows_together(int64_t left, int most) {
    const int64_t pieces = (left + most - 1) / most;
    return (int)((left + pieces - 1) / pieces);
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
