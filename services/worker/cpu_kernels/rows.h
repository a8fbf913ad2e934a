// What happens to each row by itself. Each function does a thread's own rows.
#ifndef SHOAL_ROWS_H
#define SHOAL_ROWS_H

#include "parallel.h"

// out = rows / sqrt(mean(rows^2) + epsilon) * weight. rows, out: [num_rows, size]; weight: [size].
void normalize_own(team all, const float *rows, const float *weight, float *out, int64_t num_rows, int64_t size,
                   float epsilon);

// One row.
void normalize(const float *row, const float *weight, float *out, int64_t size, float epsilon);

// out = silu(gate) * up. gate_up: [num_rows, 2 * size], the gate first; out: [num_rows, size].
void gate_own(team all, const float *gate_up, float *out, int64_t num_rows, int64_t size);

#endif
