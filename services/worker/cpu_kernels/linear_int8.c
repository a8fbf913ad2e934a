// y = x W^T + b with weights of 8 bits, and each row of x rounded to 8 bits as it comes.
//
// A panel holds, for four inputs at a time, the weights of its outputs, four bytes each. The products are whole
// numbers: the order in which they are added does not matter.
#include "matrix.h"
#include "panels.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INPUTS_AT_ONCE 2048
#define LINES_AHEAD 16

// The largest rounded activation. They are stored unsigned, around ZERO, which is what VNNI's products take.
#define LARGEST 127
#define ZERO (LARGEST + 1)

// Add the products of four inputs, bytes of one integer, and of each lane's weights to that lane.
#if defined(__AVX512VNNI__)
#define INT8_ROWS_AT_ONCE 12

static inline ints add_products(ints sums, int32_t four_inputs, ints weights) {
    return (ints)_mm512_dpbusd_epi32((__m512i)sums, _mm512_set1_epi32(four_inputs), (__m512i)weights);
}
#elif defined(__AVX2__)
#define INT8_ROWS_AT_ONCE 4

// Bytes 0 and 2, then 1 and 3, each in 16 bits: the products of whole bytes, added in 16 bits, would not fit.
static inline ints add_products(ints sums, int32_t four_inputs, ints weights) {
    const __m256i x = _mm256_set1_epi32(four_inputs), w = (__m256i)weights;
    const __m256i even_x = _mm256_and_si256(x, _mm256_set1_epi16(255)), odd_x = _mm256_srli_epi16(x, 8);
    const __m256i even_w = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), odd_w = _mm256_srai_epi16(w, 8);
    return sums + (ints)_mm256_madd_epi16(even_x, even_w) + (ints)_mm256_madd_epi16(odd_x, odd_w);
}
#else
#define INT8_ROWS_AT_ONCE 4

static inline ints add_products(ints sums, int32_t four_inputs, ints weights) {
    for (int i = 0; i < 4; i++)
        sums += (four_inputs >> (8 * i) & 255) * (weights << (24 - 8 * i) >> 24);
    return sums;
}
#endif

void round_own(const float *rows, int64_t num_rows, int64_t num_inputs, rounded_rows to) {
    const range own = own_share(num_rows);
    for (int64_t row = own.first; row < own.end; row++) {
        const float *x = rows + row * num_inputs;
        uint8_t *rounded = to.values + row * num_inputs;
        float largest = 1e-30f; // a row of zeros stays one
        for (int64_t i = 0; i < num_inputs; i++) {
            const float size = __builtin_fabsf(x[i]);
            largest = size > largest ? size : largest;
        }
        const float steps = LARGEST / largest;
        // Cut off after a half is added: the nearest whole number.
        for (int64_t i = 0; i < num_inputs; i++)
            rounded[i] = (uint8_t)(int32_t)(x[i] * steps + (ZERO + 0.5f));
        to.scales[row] = largest / LARGEST;
    }
}

// Add the products of `part` inputs to the sums of `count` rows, two vectors each.
static ALWAYS_INLINE void multiply_rows(const uint8_t *rows, int64_t num_inputs, int64_t part, const int8_t *panel,
                                        ints *sums, int count, int is_first) {
    ints low[INT8_ROWS_AT_ONCE], high[INT8_ROWS_AT_ONCE];
    UNROLL
    for (int r = 0; r < count; r++) {
        low[r] = is_first ? (ints)0 : sums[2 * r];
        high[r] = is_first ? (ints)0 : sums[2 * r + 1];
    }
    for (int64_t i = 0; i < part; i += 4) {
        const ints *weights = (const ints *)(panel + i * PANEL);
        __builtin_prefetch(weights + LINES_AHEAD * 2);
        __builtin_prefetch(weights + LINES_AHEAD * 2 + 1);
        UNROLL
        for (int r = 0; r < count; r++) {
            int32_t x;
            __builtin_memcpy(&x, rows + r * num_inputs + i, 4);
            low[r] = add_products(low[r], x, weights[0]);
            high[r] = add_products(high[r], x, weights[1]);
        }
    }
    UNROLL
    for (int r = 0; r < count; r++) {
        sums[2 * r] = low[r];
        sums[2 * r + 1] = high[r];
    }
}

#define CASE(n)                                                                                                        \
    case n: multiply_rows(rows, num_inputs, part, panel, sums, n, is_first); break

static void multiply(const uint8_t *rows, int64_t num_inputs, int64_t part, const int8_t *panel, ints *sums, int count,
                     int is_first) {
    switch (count) {
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
#if INT8_ROWS_AT_ONCE == 12
        CASE(5);
        CASE(6);
        CASE(7);
        CASE(8);
        CASE(9);
        CASE(10);
        CASE(11);
        CASE(12);
#endif
    }
}

static inline floats scaled(ints sums, const int32_t *weight_sums, const float *weight_scales, float row_scale) {
    const ints without_zero = sums - ZERO * *(const unaligned_ints *)weight_sums;
    return __builtin_convertvector(without_zero, floats) * (row_scale * load(weight_scales));
}

static void multiply_task(const matrix *m, rounded_rows all_rows, float *out, int adds, task t) {
    ints sums[2 * ROWS_OF_A_TASK];
    const int64_t num_inputs = m->num_inputs, output = t.panel * PANEL;
    const uint8_t *rows = all_rows.values + t.first_row * num_inputs;
    const int8_t *panel = (const int8_t *)m->panels + output * num_inputs;
    for (int64_t input = 0; input < num_inputs; input += INPUTS_AT_ONCE) {
        const int64_t part = num_inputs - input < INPUTS_AT_ONCE ? num_inputs - input : INPUTS_AT_ONCE;
        for (int64_t row = 0; row < t.num_rows;) {
            const int count = rows_together(t.num_rows - row, INT8_ROWS_AT_ONCE);
            multiply(rows + row * num_inputs + input, num_inputs, part, panel + input * PANEL, sums + 2 * row, count,
                     input == 0);
            row += count;
        }
    }
    for (int64_t row = 0; row < t.num_rows; row++) {
        const float row_scale = all_rows.scales[t.first_row + row];
        finish(scaled(sums[2 * row], m->sums + output, m->scales + output, row_scale),
               scaled(sums[2 * row + 1], m->sums + output + LANES, m->scales + output + LANES, row_scale),
               m->bias ? m->bias + output : 0, out + (t.first_row + row) * m->num_outputs + output,
               m->num_outputs - output, adds);
    }
}

void multiply_own_int8(const matrix *m, rounded_rows rows, int64_t num_rows, float *out, int adds) {
    const range own = own_share(num_panels(m->num_outputs) * row_tasks(num_rows));
    for (int64_t n = own.first; n < own.end; n++)
        multiply_task(m, rows, out, adds, nth_task(n, num_rows));
}
