// y = x W^T + b in float32.
//
// A panel holds the weights of its outputs for input 0, then for input 1, and so on. An output's lane adds its products
// in the order of the inputs, whatever the number of rows: a row's result has the same bits in any company.
#include "panels.h"

#define INPUTS_AT_ONCE 512 // a panel's part that stays in the cache of the second level while rows go by
#define LINES_AHEAD 16     // of a panel, asked for before they are used

typedef struct {
    const float *rows, *panels, *bias;
    float *out;
    int64_t num_rows, num_inputs, num_outputs;
    int adds;
} product;

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

static void multiply_task(const product *p, task t) {
    float sums[ROWS_OF_A_TASK * PANEL] __attribute__((aligned(64)));
    const float *rows = p->rows + t.first_row * p->num_inputs, *panel = p->panels + t.panel * PANEL * p->num_inputs;
    for (int64_t input = 0; input < p->num_inputs; input += INPUTS_AT_ONCE) {
        const int64_t part = p->num_inputs - input < INPUTS_AT_ONCE ? p->num_inputs - input : INPUTS_AT_ONCE;
        for (int64_t row = 0; row < t.num_rows;) {
            const int count = rows_together(t.num_rows - row, ROWS_AT_ONCE);
            multiply(rows + row * p->num_inputs + input, p->num_inputs, part, panel + input * PANEL, sums + row * PANEL,
                     count, input == 0);
            row += count;
        }
    }
    const int64_t output = t.panel * PANEL;
    for (int64_t row = 0; row < t.num_rows; row++)
        finish(load(sums + row * PANEL), load(sums + row * PANEL + LANES), p->bias ? p->bias + output : 0,
               p->out + (t.first_row + row) * p->num_outputs + output, p->num_outputs - output, p->adds);
}

static void multiply_share(void *data) {
    const product *p = data;
    const range own = own_share(num_panels(p->num_outputs) * row_tasks(p->num_rows));
    for (int64_t n = own.first; n < own.end; n++)
        multiply_task(p, nth_task(n, p->num_rows));
}

int64_t shoal_panel_outputs(void) { return PANEL; }

// out = rows W^T + bias, or that added to out. rows: [num_rows, num_inputs]; panels: [num_panels, num_inputs, PANEL];
// bias: null or [num_panels * PANEL]; out: [num_rows, num_outputs].
void shoal_linear_float32(const float *rows, const float *panels, const float *bias, float *out, int64_t num_rows,
                          int64_t num_inputs, int64_t num_outputs, int adds, int num_threads) {
    product p = {rows, panels, bias, out, num_rows, num_inputs, num_outputs, adds};
    in_parallel(multiply_share, &p, num_threads);
}
