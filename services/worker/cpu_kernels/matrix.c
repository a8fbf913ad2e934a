#include "matrix.h"
#include "panels.h"
#include "parallel.h"

typedef struct {
    const matrix *m;
    const float *rows;
    rounded_rows rounded;
    int64_t num_rows;
    float *out;
} arguments;

static void multiply_in_team(void *data) {
    const arguments *a = data;
    const team all = all_threads();
    if (a->m->scales) {
        round_own(all, a->rows, a->num_rows, a->m->num_inputs, a->rounded);
        meet_team(all);
    }
    multiply_own(all, a->m, a->rows, a->rounded, a->num_rows, a->out, 0);
}

// out = rows W^T + bias. rows: [num_rows, num_inputs]; out: [num_rows, num_outputs]. If the matrix is of 8 bits,
// rounded, [num_rows, num_inputs], and row_scales, [num_rows], are room to work in.
void shoal_linear(const matrix *m, const float *rows, uint8_t *rounded, float *row_scales, int64_t num_rows, float *out,
                  int num_threads) {
    arguments a = {m, rows, {rounded, row_scales}, num_rows, out};
    in_parallel(multiply_in_team, &a, num_threads);
}

int64_t shoal_panel_outputs(void) { return PANEL; }
