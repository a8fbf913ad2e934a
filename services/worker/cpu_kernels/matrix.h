// y = x W^T + b, with weights in float32, or of 8 bits with rows of x rounded to 8 bits as they come.
#ifndef SHOAL_MATRIX_H
#define SHOAL_MATRIX_H

#include "parallel.h"

// A weight in panels. Of 8 bits if it has scales: one an output, with the sum of the output's weights. `bias` may be
// null. What there is for each output is filled up to whole panels.
typedef struct {
    const void *panels;
    const float *scales;
    const int32_t *sums;
    const float *bias;
    int64_t num_inputs, num_outputs;
} matrix;

// Rows rounded to 8 bits, each with its scale.
typedef struct {
    uint8_t *values;
    float *scales;
} rounded_rows;

// Round a thread's own rows, [num_rows, num_inputs].
void round_own(team all, const float *rows, int64_t num_rows, int64_t num_inputs, rounded_rows to);

// Compute a thread's own share of rows W^T + bias, or add it to what is there. out: [num_rows, num_outputs].
void multiply_own_float32(team all, const matrix *m, const float *rows, int64_t num_rows, float *out, int adds);
void multiply_own_int8(team all, const matrix *m, rounded_rows rows, int64_t num_rows, float *out, int adds);

static inline void multiply_own(team all, const matrix *m, const float *rows, rounded_rows rounded, int64_t num_rows,
                                float *out, int adds) {
    if (m->scales)
        multiply_own_int8(all, m, rounded, num_rows, out, adds);
    else
        multiply_own_float32(all, m, rows, num_rows, out, adds);
}

#endif
