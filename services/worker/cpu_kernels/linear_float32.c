// y = x W^T + b in float32.
//
// A panel holds the weights of its outputs for input 0, then for input 1, and so on. An output's lane adds its products
// in the order of the inputs, whatever the number of rows: a row's result has the same bits in any company.
#include "matrix.h"
#include "panels.h"

#define ROWS_OF_A_TASK (PIECES_OF_A_TASK * ROWS_AT_ONCE)
#define INPUTS_AT_ONCE 256 // of a piece's rows, to stay in the cache of the first level
#define LINES_AHEAD 16     // of a panel, asked for before they are used

// What is fetched from memory while a product is computed: from here, `step` bytes on with each input; if
// that is 0, nothing.
typedef struct {
    const char *from;
    int64_t step;
} fetch;

// Add the products of `part` inputs to the sums of `count` rows, [count, PANEL].
static ALWAYS_INLINE void multiply_rows(const float *rows, int64_t num_inputs, int64_t part, const float *panel,
                                        float *sums, int count, int is_first, fetch next, int fetches) {
    floats low[ROWS_AT_ONCE], high[ROWS_AT_ONCE];
    UNROLL
    for (int r = 0; r < count; r++) {
        low[r] = is_first ? (floats)0 : load(sums + r * PANEL);
        high[r] = is_first ? (floats)0 : load(sums + r * PANEL + LANES);
    }
    for (int64_t i = 0; i < part; i++) {
        const float *weights = panel + i * PANEL;
        const floats to_low = load(weights), to_high = load(weights + LANES);
        __builtin_prefetch(weights + LINES_AHEAD * PANEL);
        __builtin_prefetch(weights + LINES_AHEAD * PANEL + LANES);
        if (fetches) __builtin_prefetch(next.from + i * next.step, 0, 2);
        UNROLL
        for (int r = 0; r < count; r++) {
            floats x = rows[r * num_inputs + i];
            if (count > 1) LOADED_ONCE(x);
            low[r] = multiply_add(x, to_low, low[r]);
            high[r] = multiply_add(x, to_high, high[r]);
        }
    }
    UNROLL
    for (int r = 0; r < count; r++) {
        store(sums + r * PANEL, low[r]);
        store(sums + r * PANEL + LANES, high[r]);
    }
}

#define CASE(n)                                                                                                        \
    case n: multiply_rows(rows, num_inputs, part, panel, sums, n, is_first, next, fetches); break

static ALWAYS_INLINE void multiply_and_fetch(const float *rows, int64_t num_inputs, int64_t part, const float *panel,
                                             float *sums, int count, int is_first, fetch next, int fetches) {
    switch (count) {
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
        CASE(5);
        CASE(6);
#if ROWS_AT_ONCE == 12
        CASE(7);
        CASE(8);
        CASE(9);
        CASE(10);
        CASE(11);
        CASE(12);
#endif
    }
}

static void multiply(const float *rows, int64_t num_inputs, int64_t part, const float *panel, float *sums, int count,
                     int is_first, fetch next) {
    if (next.step)
        multiply_and_fetch(rows, num_inputs, part, panel, sums, count, is_first, next, 1);
    else
        multiply_and_fetch(rows, num_inputs, part, panel, sums, count, is_first, next, 0);
}

typedef struct {
    const matrix *m;
    const float *rows;
    float *out;
    int adds;
} product;

// A piece's share of what is fetched while a part of a panel is multiplied with all of them: the same part of the next
// panel, if it is this thread's. One piece alone waits for its own panel; many have their panels in the cache.
static fetch share_of_next(const task *t, int64_t num_inputs, int64_t part, int64_t piece, const float *panel) {
    const int64_t pieces = t->num_pieces;
    if (pieces == 1 || pieces > PIECES_OF_A_TASK || t->panel + 1 >= t->end_of_own_panels) return (fetch){0, 0};
    const int64_t step = PANEL * (int64_t)sizeof(float) / pieces;
    return (fetch){(const char *)(panel + num_inputs * PANEL) + piece * part * step, step};
}

static void multiply_task(void *of, task t) {
    const product *p = of;
    const matrix *m = p->m;
    float sums[PANELS_OF_A_TASK][ROWS_OF_A_TASK][PANEL] __attribute__((aligned(64)));
    const int64_t num_inputs = m->num_inputs, first = first_row(&t, t.piece), end = first_row(&t, t.end_piece);
    const float *panels = (const float *)m->panels + t.panel * PANEL * num_inputs;
    for (int64_t input = 0; input < num_inputs; input += INPUTS_AT_ONCE) {
        const int64_t part = least(num_inputs - input, INPUTS_AT_ONCE);
        for (int64_t piece = t.piece; piece < t.end_piece; piece++) {
            const int64_t row = first_row(&t, piece);
            for (int64_t n = 0; n < t.num_panels; n++) {
                const float *panel = panels + (n * num_inputs + input) * PANEL;
                multiply(p->rows + row * num_inputs + input, num_inputs, part, panel, sums[n][row - first],
                         (int)(first_row(&t, piece + 1) - row), input == 0,
                         share_of_next(&t, num_inputs, part, piece, panel));
            }
        }
    }
    for (int64_t row = first; row < end; row++)
        for (int64_t n = 0; n < t.num_panels; n++) {
            const float *sum = sums[n][row - first];
            const int64_t output = (t.panel + n) * PANEL;
            finish(load(sum), load(sum + LANES), m->bias ? m->bias + output : 0, p->out + row * m->num_outputs + output,
                   m->num_outputs - output, p->adds);
        }
}

void multiply_own_float32(team all, const matrix *m, const float *rows, int64_t num_rows, float *out, int adds) {
    product p = {m, rows, out, adds};
    do_own_tasks(all, m->num_outputs, num_rows, ROWS_AT_ONCE, multiply_task, &p);
}
