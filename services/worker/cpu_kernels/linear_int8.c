// y = x W^T + b with weights of 8 bits, and each row of x rounded to 8 bits as it comes.
//
// A panel holds, for four inputs at a time, the weights of its outputs, four bytes each. The products are whole
// numbers: the order in which they are added does not matter.
#include "exponential.h"
#include "int8.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define ROWS_OF_A_TASK (PIECES_OF_A_TASK * INT8_ROWS_AT_ONCE)
#define INPUTS_AT_ONCE 1024
#define LINES_AHEAD 16

// Add the products of four inputs, bytes of each lane of x, and of each lane's weights to that lane.
#if defined(__AVX512VNNI__)
#define INT8_ROWS_AT_ONCE 12

static inline ints add_products(ints sums, ints x, ints weights) {
    return (ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)x, (__m512i)weights);
}
#elif defined(__AVX2__)
#define INT8_ROWS_AT_ONCE 4

// Bytes 0 and 2, then 1 and 3, each in 16 bits: the products of whole bytes, added in 16 bits, would not fit.
static inline ints add_products(ints sums, ints x, ints weights) {
    const __m256i w = (__m256i)weights;
    const __m256i even_x = _mm256_and_si256((__m256i)x, _mm256_set1_epi16(255));
    const __m256i odd_x = _mm256_srli_epi16((__m256i)x, 8);
    const __m256i even_w = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), odd_w = _mm256_srai_epi16(w, 8);
    return sums + (ints)_mm256_madd_epi16(even_x, even_w) + (ints)_mm256_madd_epi16(odd_x, odd_w);
}
#else
#define INT8_ROWS_AT_ONCE 4

static inline ints add_products(ints sums, ints x, ints weights) {
    for (int i = 0; i < 4; i++)
        sums += (x >> (8 * i) & 255) * (weights << (24 - 8 * i) >> 24);
    return sums;
}
#endif

typedef uint8_t bytes __attribute__((ext_vector_type(LANES), aligned(1)));

static float largest_size(const float *x, int64_t count) {
    floats sizes = 1e-30f; // a row of zeros stays one
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        sizes = __builtin_elementwise_max(sizes, __builtin_elementwise_abs(load(x + i)));
    for (; i < count; i++)
        sizes = __builtin_elementwise_max(sizes, (floats)__builtin_fabsf(x[i]));
    return largest_lane(sizes);
}

// Cut off after a half is added: the nearest whole number.
static inline ints nearest(floats x, float steps) {
    return __builtin_convertvector(multiply_add(x, (floats)steps, (floats)(ZERO + 0.5f)), ints);
}

void round_own(team all, const float *rows, int64_t num_rows, int64_t num_inputs, rounded_rows to) {
    const range own = own_share(all, num_rows);
    for (int64_t row = own.first; row < own.end; row++) {
        const float *x = rows + row * num_inputs;
        const float largest = largest_size(x, num_inputs), steps = LARGEST / largest;
        uint8_t *rounded = to.values + row * num_inputs;
        int64_t i = 0;
        for (; i + LANES <= num_inputs; i += LANES)
            *(bytes *)(rounded + i) = __builtin_convertvector(nearest(load(x + i), steps), bytes);
        for (; i < num_inputs; i++)
            rounded[i] = (uint8_t)nearest(x[i], steps)[0];
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
            int32_t four_inputs;
            __builtin_memcpy(&four_inputs, rows + r * num_inputs + i, 4);
            ints x = four_inputs;
            if (count > 1) LOADED_ONCE(x);
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

static void multiply_task(void *of, task t) {
    const int8_product *p = of;
    const matrix *m = p->m;
    ints sums[PANELS_OF_A_TASK][ROWS_OF_A_TASK][2];
    const int64_t num_inputs = m->num_inputs, first = first_row(&t, t.piece), end = first_row(&t, t.end_piece);
    const int8_t *panels = (const int8_t *)m->panels + t.panel * PANEL * num_inputs;
    for (int64_t input = 0; input < num_inputs; input += INPUTS_AT_ONCE) {
        const int64_t part = least(num_inputs - input, INPUTS_AT_ONCE);
        for (int64_t piece = t.piece; piece < t.end_piece; piece++) {
            const int64_t row = first_row(&t, piece);
            for (int64_t n = 0; n < t.num_panels; n++)
                multiply(p->rows.values + row * num_inputs + input, num_inputs, part,
                         panels + (n * num_inputs + input) * PANEL, sums[n][row - first],
                         (int)(first_row(&t, piece + 1) - row), input == 0);
        }
    }
    for (int64_t row = first; row < end; row++)
        for (int64_t n = 0; n < t.num_panels; n++)
            finish_int8(p, sums[n][row - first], row, t.panel + n);
}

void multiply_own_int8(team all, const matrix *m, rounded_rows rows, int64_t num_rows, float *out, int adds) {
    int8_product p = {m, rows, out, adds, 0};
    if (tiles_take(m, num_rows)) {
        multiply_own_tiles(all, &p, num_rows);
        return;
    }
    do_own_tasks(all, m->num_outputs, num_rows, INT8_ROWS_AT_ONCE, multiply_task, &p);
}
