// What happens to each row by itself: normalization, rotary embedding, the cache's writes, SwiGLU.
#include "exponential.h"
#include "kv_block.h"
#include "parallel.h"
#include "vectors.h"

#define ROWS_WORTH_THREADS 4

static int threads_for(int64_t num_rows, int num_threads) { return num_rows < ROWS_WORTH_THREADS ? 1 : num_threads; }

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

static void normalize(const float *x, const float *weight, float *out, int64_t size, float epsilon) {
    const float scale = 1.0f / __builtin_sqrtf(sum_of_squares(x, size) / (float)size + epsilon);
    for (int64_t i = 0; i < size; i++)
        out[i] = x[i] * scale * weight[i];
}

typedef struct {
    const float *rows, *weight;
    float *out;
    int64_t num_rows, size;
    float epsilon;
} normalization;

static void normalize_share(void *data) {
    const normalization *n = data;
    const range own = own_share(n->num_rows);
    for (int64_t row = own.first; row < own.end; row++)
        normalize(n->rows + row * n->size, n->weight, n->out + row * n->size, n->size, n->epsilon);
}

// out = rows / sqrt(mean(rows^2) + epsilon) * weight. rows, out: [num_rows, size]; weight: [size].
void shoal_rms_norm(const float *rows, const float *weight, float *out, int64_t num_rows, int64_t size, float epsilon,
                    int num_threads) {
    normalization n = {rows, weight, out, num_rows, size, epsilon};
    in_parallel(normalize_share, &n, threads_for(num_rows, num_threads));
}

typedef struct {
    const float *gate_up;
    float *out;
    int64_t num_rows, size;
} gating;

static void gate_share(void *data) {
    const gating *g = data;
    const range own = own_share(g->num_rows);
    for (int64_t row = own.first; row < own.end; row++) {
        const float *gate = g->gate_up + row * 2 * g->size, *up = gate + g->size;
        float *out = g->out + row * g->size;
        int64_t i = 0;
        for (; i + LANES <= g->size; i += LANES) {
            const floats x = load(gate + i);
            store(out + i, x / (1 + exponential(-x)) * load(up + i));
        }
        for (; i < g->size; i++)
            out[i] = gate[i] / (1 + exponential((floats)-gate[i])[0]) * up[i];
    }
}

// out = silu(gate) * up. gate_up: [num_rows, 2 * size], the gate first; out: [num_rows, size].
void shoal_swiglu(const float *gate_up, float *out, int64_t num_rows, int64_t size, int num_threads) {
    gating g = {gate_up, out, num_rows, size};
    in_parallel(gate_share, &g, threads_for(num_rows, num_threads));
}

typedef struct {
    float *qkv;
    const float *turns, *norm;
    const int64_t *positions, *slots;
    float *cache;
    kv_shape shape;
    int64_t num_rows, num_heads;
    float epsilon;
} writing;

static void rotate(float *head, const float *turns, int64_t head_dim) {
    for (int64_t i = 0; i < head_dim; i += 2) {
        const float x = head[i], y = head[i + 1], cosine = turns[i], sine = turns[i + 1];
        head[i] = x * cosine - y * sine;
        head[i + 1] = y * cosine + x * sine;
    }
}

static void write_share(void *data) {
    const writing *w = data;
    const kv_shape s = w->shape;
    const int64_t num_turned = w->num_heads + s.num_kv_heads;
    const range own = own_share(w->num_rows);
    for (int64_t row = own.first; row < own.end; row++) {
        float *heads = w->qkv + row * (num_turned + s.num_kv_heads) * s.head_dim;
        for (int64_t head = 0; head < num_turned; head++) {
            float *x = heads + head * s.head_dim;
            if (w->norm) normalize(x, w->norm + head * s.head_dim, x, s.head_dim, w->epsilon);
            rotate(x, w->turns + w->positions[row] * s.head_dim, s.head_dim);
        }
        const int64_t block = w->slots[row] / s.block_size, place = w->slots[row] % s.block_size;
        for (int64_t head = 0; head < s.num_kv_heads; head++) {
            const float *key = heads + (w->num_heads + head) * s.head_dim, *value = key + s.num_kv_heads * s.head_dim;
            float *keys = w->cache + keys_at(s, block, head), *values = w->cache + values_at(s, block, head);
            for (int64_t i = 0; i < s.head_dim; i++) {
                keys[i * s.block_size + place] = key[i];
                values[place * s.head_dim + i] = value[i];
            }
        }
    }
}

// Normalize (if norm is given, [num_heads + num_kv_heads, head_dim]) and turn queries and keys in place; store keys and
// values in a layer's cache. qkv: [num_rows, num_heads + 2 * num_kv_heads, head_dim]; positions, slots: [num_rows];
// turns: [num_positions, head_dim / 2, 2], cosines and sines.
void shoal_rotate_and_store(float *qkv, const float *turns, const float *norm, const int64_t *positions,
                            const int64_t *slots, float *cache, int64_t num_rows, int64_t num_heads,
                            int64_t num_kv_heads, int64_t head_dim, int64_t block_size, float epsilon,
                            int num_threads) {
    writing w = {qkv,      turns,     norm,   positions, slots, cache, {num_kv_heads, head_dim, block_size},
                 num_rows, num_heads, epsilon};
    in_parallel(write_share, &w, threads_for(num_rows, num_threads));
}
