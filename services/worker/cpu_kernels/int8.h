// What products of 8 bits have in common, whatever instructions compute them.
#ifndef SHOAL_INT8_H
#define SHOAL_INT8_H

#include "matrix.h"
#include "panels.h"

// The largest rounded activation. They are stored unsigned, around ZERO, which is what the products' instructions take.
#define LARGEST 127
#define ZERO (LARGEST + 1)

typedef struct {
    const matrix *m;
    rounded_rows rows;
    float *out;
    int adds;
    int tile_rows; // that this thread's tiles are shaped for; 0: none
} int8_product;

static inline floats scaled(ints sums, const int32_t *weight_sums, const float *weight_scales, float row_scale) {
    const ints without_zero = sums - ZERO * *(const unaligned_ints *)weight_sums;
    return __builtin_convertvector(without_zero, floats) * (row_scale * load(weight_scales));
}

// Write the results of a row in a panel, of its sums, two vectors.
static inline void finish_int8(const int8_product *p, const ints *sums, int64_t row, int64_t panel) {
    const matrix *m = p->m;
    const int64_t output = panel * PANEL;
    const float row_scale = p->rows.scales[row];
    finish(scaled(sums[0], m->sums + output, m->scales + output, row_scale),
           scaled(sums[1], m->sums + output + LANES, m->scales + output + LANES, row_scale),
           m->bias ? m->bias + output : 0, p->out + row * m->num_outputs + output, m->num_outputs - output, p->adds);
}

// By the processor's tiles (AMX): whether this library has them and they take this product; then compute it.
int tiles_take(const matrix *m, int64_t num_rows);
void multiply_own_tiles(team all, int8_product *p, int64_t num_rows);

#endif
