// y = x W^T + b in float32.
//
// A panel holds the weights of its outputs for input 0, then for input 1, and so on. An output's lane adds its products
// in the order of the inputs, whatever the number of rows: a row's result has the same bits in any company.
#include "matrix.h"
#include "panels.h"

#define INPUTS_AT_ONCE 512 // a panel's part that stays in the cache of the second level while rows go by
#define LINES_AHEAD 16     // of a panel, asked for before they are used

// Add the products of `part` inputs to the sums of `count` rows, [count, PANEL].
static ALWAYS_INLINE void multiply_rows(const float *rows, int64_t num_inputs, int64_t part, const float *panel,
                                        float *sums, int count, int is_first) {
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
        UNROLL
        for (int r = 0; r < count; r++) {
            const floats x = rows[r * num_inputs + i];
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
    case n: multiply_rows(rows, num_inputs, part, panel, sums, n, is_first); break

static void multiply(const float *rows, int64_t num_inputs, int64_t part, const float *panel, float *sums, int count,
                     int is_first) {
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

static void multiply_task(const matrix *m, const float *all_rows, float *out, int adds, task t) {
    float sums[ROWS_OF_A_TASK * PANEL] __attribute__((aligned(64)));
    const int64_t num_inputs = m->num_inputs, output = t.panel * PANEL;
    const float *rows = all_rows + t.first_row * num_inputs, *panel = (const float *)m->panels + output * num_inputs;
    for (int64_t input = 0; input < num_inputs; input += INPUTS_AT_ONCE) {
        const int64_t part = num_inputs - input < INPUTS_AT_ONCE ? num_inputs - input : INPUTS_AT_ONCE;
        for (int64_t row = 0; row < t.num_rows;) {
            const int count = rows_together(t.num_rows - row, ROWS_AT_ONCE);
            multiply(rows + row * num_inputs + input, num_inputs, part, panel + input * PANEL, sums + row * PANEL,
                     count, input == 0);
            row += count;
        }
    }
    for (int64_t row = 0; row < t.num_rows; row++)
        finish(load(sums + row * PANEL), load(sums + row * PANEL + LANES), m->bias ? m->bias + output : 0,
               out + (t.first_row + row) * m->num_outputs + output, m->num_outputs - output, adds);
}

void multiply_own_float32(const matrix *m, const float *rows, int64_t num_rows, float *out, int adds) {
    const range own = own_share(num_panels(m->num_outputs) * row_tasks(num_rows));
    for (int64_t n = own.first; n < own.end; n++)
        multiply_task(m, rows, out, adds, nth_task(n, num_rows));
}
