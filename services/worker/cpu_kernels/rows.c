#include "rows.h"
#include "exponential.h"
#include "vectors.h"

static float sum_of_squares(const float *x, int64_t size) {
    floats sums = 0;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        sums = multiply_add(load(x + i), load(x + i), sums);
    float sum = add_lanes(sums);
    for (; i < size; i++)
        sum += x[i] * x[i];
    return sum;
}

void normalize(const float *row, const float *weight, float *out, int64_t size, float epsilon) {
    const float scale = 1.0f / __builtin_sqrtf(sum_of_squares(row, size) / (float)size + epsilon);
    for (int64_t i = 0; i < size; i++)
        out[i] = row[i] * scale * weight[i];
}

void normalize_own(team all, const float *rows, const float *weight, float *out, int64_t num_rows, int64_t size,
                   float epsilon) {
    const range own = own_share(all, num_rows);
    for (int64_t row = own.first; row < own.end; row++)
        normalize(rows + row * size, weight, out + row * size, size, epsilon);
}

void gate_own(team all, const float *gate_up, float *out, int64_t num_rows, int64_t size) {
    const range own = own_share(all, num_rows);
    for (int64_t row = own.first; row < own.end; row++) {
        const float *gate = gate_up + row * 2 * size, *up = gate + size;
        float *to = out + row * size;
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) {
            const floats x = load(gate + i);
            store(to + i, x / (1 + exponential(-x)) * load(up + i));
        }
        for (; i < size; i++)
            to[i] = gate[i] / (1 + exponential((floats)-gate[i])[0]) * up[i];
    }
}

typedef struct {
    const float *rows, *weight;
    float *out;
    int64_t num_rows, size;
    float epsilon;
} arguments;

static void normalize_in_team(void *data) {
    const arguments *a = data;
    normalize_own(all_threads(), a->rows, a->weight, a->out, a->num_rows, a->size, a->epsilon);
}

static void gate_in_team(void *data) {
    const arguments *a = data;
    gate_own(all_threads(), a->rows, a->out, a->num_rows, a->size);
}

// The last normalization, of the rows that are wanted.
void shoal_rms_norm(const float *rows, const float *weight, float *out, int64_t num_rows, int64_t size, float epsilon,
                    int num_threads) {
    arguments a = {rows, weight, out, num_rows, size, epsilon};
    in_parallel(normalize_in_team, &a, num_rows < num_threads ? 1 : num_threads);
}

// By itself, for its tests.
void shoal_swiglu(const float *gate_up, float *out, int64_t num_rows, int64_t size, int num_threads) {
    arguments a = {gate_up, 0, out, num_rows, size, 0};
    in_parallel(gate_in_team, &a, num_threads);
}
