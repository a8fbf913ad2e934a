// Attention over a paged KV cache, with the softmax computed as it goes (Milakov and Gimelshein, 2018; the tiles are
// FlashAttention's, Dao et al., 2022).
//
// A query sees LANES neighbouring keys at a time, from its sequence's first to its own. Whatever is computed beside it,
// prompt or single token, its additions are the same in the same order: so are its bits.
#include "exponential.h"
#include "kv_block.h"
#include "parallel.h"
#include "vectors.h"

#define MAX_TILE_QUERIES 32
#define MAX_HEAD_DIM 256
#define QUERIES_AT_ONCE 8 // whose scores with LANES keys are in registers together
#define VECTORS_AT_ONCE 4 // of a result, in registers for VALUE_QUERIES_AT_ONCE queries
#define VALUE_QUERIES_AT_ONCE (LANES == 16 ? 4 : 2)
#define HIDDEN -1e30f // below every score; finite, so that nothing is subtracted from infinity

// Neighbouring tokens of one sequence.
typedef struct {
    int64_t first_row, num_rows, first_position, table_start;
} tile;

typedef struct {
    const float *qkv, *cache;
    const tile *tiles;
    const int64_t *block_tables;
    float *out;
    kv_shape shape;
    int64_t num_tiles, num_heads, window;
    float scale;
    int64_t next_task;
} attention;

// The queries of a tile that share a head of keys, and what was summed up of each so far.
typedef struct {
    float queries[MAX_TILE_QUERIES * MAX_HEAD_DIM], sums[MAX_TILE_QUERIES * MAX_HEAD_DIM];
    floats weight_sums[MAX_TILE_QUERIES], weights[MAX_TILE_QUERIES];
    float largest[MAX_TILE_QUERIES], rescale[MAX_TILE_QUERIES];
    int64_t positions[MAX_TILE_QUERIES];
    int count;
    int64_t stride; // of queries and sums: head_dim, rounded up to whole vectors
} work;

static ALWAYS_INLINE void score(work *w, int first, int count, const float *keys, int64_t head_dim, int64_t block_size,
                                ints key_positions, ints is_key, int64_t window) {
    floats scores[QUERIES_AT_ONCE];
    UNROLL
    for (int q = 0; q < count; q++)
        scores[q] = 0;
    for (int64_t d = 0; d < head_dim; d++) {
        const floats k = load(keys + d * block_size);
        UNROLL
        for (int q = 0; q < count; q++)
            scores[q] = multiply_add((floats)w->queries[(first + q) * w->stride + d], k, scores[q]);
    }
    UNROLL
    for (int q = 0; q < count; q++) {
        const int i = first + q;
        const int32_t position = (int32_t)w->positions[i];
        const ints is_seen = is_key & (key_positions <= position) & (key_positions > position - (int32_t)window);
        const floats seen = is_seen ? scores[q] : (floats)HIDDEN;
        const float before = w->largest[i], here = largest_lane(seen), largest = here > before ? here : before;
        const floats weights = is_seen ? exponential(seen - largest) : (floats)0;
        w->rescale[i] = before == largest ? 1 : exponential((floats)(before - largest))[0];
        w->weight_sums[i] = multiply_add(w->weight_sums[i], (floats)w->rescale[i], weights);
        w->weights[i] = weights;
        w->largest[i] = largest;
    }
}

static ALWAYS_INLINE void add_values(work *w, int first, int count, int64_t d, int vectors, const float *values,
                                     int64_t head_dim, int first_key, int end_key) {
    floats sums[VALUE_QUERIES_AT_ONCE][VECTORS_AT_ONCE];
    UNROLL
    for (int q = 0; q < count; q++)
        UNROLL
    for (int v = 0; v < vectors; v++)
        sums[q][v] = load(w->sums + (first + q) * w->stride + d + v * LANES) * w->rescale[first + q];
    for (int key = first_key; key < end_key; key++) {
        floats value[VECTORS_AT_ONCE];
        UNROLL
        for (int v = 0; v < vectors; v++)
            value[v] = load(values + key * head_dim + d + v * LANES);
        UNROLL
        for (int q = 0; q < count; q++) {
            const floats weight = ((const float *)&w->weights[first + q])[key];
            UNROLL
            for (int v = 0; v < vectors; v++)
                sums[q][v] = multiply_add(weight, value[v], sums[q][v]);
        }
    }
    UNROLL
    for (int q = 0; q < count; q++)
        UNROLL
    for (int v = 0; v < vectors; v++)
        store(w->sums + (first + q) * w->stride + d + v * LANES, sums[q][v]);
}

#define SCORE(n)                                                                                                       \
    case n: score(w, q, n, keys, s.head_dim, s.block_size, key_positions, is_key, window); break

static void score_all(work *w, const float *keys, kv_shape s, ints key_positions, ints is_key, int64_t window) {
    for (int q = 0; q < w->count; q += QUERIES_AT_ONCE)
        switch (w->count - q) {
            SCORE(1);
            SCORE(2);
            SCORE(3);
            SCORE(4);
            SCORE(5);
            SCORE(6);
            SCORE(7);
            default: score(w, q, QUERIES_AT_ONCE, keys, s.head_dim, s.block_size, key_positions, is_key, window);
        }
}

#define ADD(n, vectors)                                                                                                \
    case n: add_values(w, q, n, d, vectors, values, s.head_dim, first_key, end_key); break

static void add_all_values(work *w, const float *values, kv_shape s, int first_key, int end_key) {
    for (int q = 0; q < w->count; q += VALUE_QUERIES_AT_ONCE) {
        const int count = w->count - q < VALUE_QUERIES_AT_ONCE ? w->count - q : VALUE_QUERIES_AT_ONCE;
        int64_t d = 0;
        for (; d + VECTORS_AT_ONCE * LANES <= s.head_dim; d += VECTORS_AT_ONCE * LANES)
            switch (count) {
                ADD(1, VECTORS_AT_ONCE);
                ADD(2, VECTORS_AT_ONCE);
#if LANES == 16
                ADD(3, VECTORS_AT_ONCE);
                ADD(4, VECTORS_AT_ONCE);
#endif
            }
        for (; d < s.head_dim; d += LANES)
            switch (count) {
                ADD(1, 1);
                ADD(2, 1);
#if LANES == 16
                ADD(3, 1);
                ADD(4, 1);
#endif
            }
    }
}

static void take_queries(work *w, const attention *a, const tile *t, int64_t kv_head) {
    const kv_shape s = a->shape;
    const int64_t shared_by = a->num_heads / s.num_kv_heads,
                  row_size = (a->num_heads + 2 * s.num_kv_heads) * s.head_dim;
    w->stride = (s.head_dim + LANES - 1) / LANES * LANES;
    w->count = (int)(t->num_rows * shared_by);
    for (int i = 0; i < w->count; i++) {
        const int64_t row = i / shared_by, head = kv_head * shared_by + i % shared_by;
        const float *query = a->qkv + (t->first_row + row) * row_size + head * s.head_dim;
        for (int64_t d = 0; d < s.head_dim; d++)
            w->queries[i * w->stride + d] = query[d] * a->scale;
        for (int64_t d = 0; d < w->stride; d++)
            w->sums[i * w->stride + d] = 0;
        w->weight_sums[i] = 0;
        w->largest[i] = HIDDEN;
        w->positions[i] = t->first_position + row;
    }
}

static void give_results(const work *w, const attention *a, const tile *t, int64_t kv_head) {
    const int64_t shared_by = a->num_heads / a->shape.num_kv_heads, head_dim = a->shape.head_dim;
    for (int i = 0; i < w->count; i++) {
        const int64_t row = t->first_row + i / shared_by, head = kv_head * shared_by + i % shared_by;
        const float share = 1 / add_lanes(w->weight_sums[i]);
        for (int64_t d = 0; d < head_dim; d++)
            a->out[(row * a->num_heads + head) * head_dim + d] = w->sums[i * w->stride + d] * share;
    }
}

static ints lane_numbers(void) {
    ints lanes;
    for (int i = 0; i < LANES; i++)
        lanes[i] = i;
    return lanes;
}

// Ask for a head's keys and values of a block: they are computed with when those of the block before it are done. The
// blocks of a sequence lie anywhere, so that the processor cannot guess the next one.
static void prefetch(const attention *a, int64_t block, int64_t kv_head) {
    const float *keys = a->cache + keys_at(a->shape, block, kv_head);
    const float *values = a->cache + values_at(a->shape, block, kv_head);
    for (int64_t i = 0; i < a->shape.block_size * a->shape.head_dim; i += 16) {
        __builtin_prefetch(keys + i, 0, 2);
        __builtin_prefetch(values + i, 0, 2);
    }
}

static void attend(work *w, const attention *a, const tile *t, int64_t kv_head) {
    const kv_shape s = a->shape;
    const int64_t last = t->first_position + t->num_rows - 1;
    const int64_t first = t->first_position - a->window + 1 > 0 ? t->first_position - a->window + 1 : 0;
    const int64_t *table = a->block_tables + t->table_start, last_block = last / s.block_size;
    const ints lanes = lane_numbers();
    prefetch(a, table[first / s.block_size], kv_head);
    take_queries(w, a, t, kv_head);
    for (int64_t block = first / s.block_size; block <= last_block; block++) {
        if (block < last_block) prefetch(a, table[block + 1], kv_head);
        const int64_t held_in = table[block];
        const float *keys = a->cache + keys_at(s, held_in, kv_head),
                    *values = a->cache + values_at(s, held_in, kv_head);
        for (int64_t place = 0; place < s.block_size; place += LANES) {
            const int64_t position = block * s.block_size + place;
            if (position > last || position + LANES <= first) continue;
            const int64_t left = s.block_size - place;
            score_all(w, keys + place, s, lanes + (int32_t)position, lanes < (int32_t)left, a->window);
            const int64_t seen = last - position + 1 < left ? last - position + 1 : left;
            const int64_t unseen = first > position ? first - position : 0;
            add_all_values(w, values + place * s.head_dim, s, (int)unseen, (int)(seen < LANES ? seen : LANES));
        }
    }
    give_results(w, a, t, kv_head);
}

static void attend_share(void *data) {
    attention *a = data;
    work w;
    const int64_t num_tasks = a->num_tiles * a->shape.num_kv_heads;
    // Each thread takes the next task when it is done with one: a prompt's later tiles see more keys. They come first.
    for (;;) {
        const int64_t task = __atomic_fetch_add(&a->next_task, 1, __ATOMIC_RELAXED);
        if (task >= num_tasks) return;
        attend(&w, a, a->tiles + a->num_tiles - 1 - task / a->shape.num_kv_heads, task % a->shape.num_kv_heads);
    }
}

int64_t shoal_max_tile_queries(void) { return MAX_TILE_QUERIES; }
int64_t shoal_max_head_dim(void) { return MAX_HEAD_DIM; }

// out = softmax(Q K^T * scale) V, each row over its sequence's keys up to itself, or the `window` last of them.
// qkv: [num_rows, num_heads + 2 * num_kv_heads, head_dim], of which the queries are read; cache: a layer's; out:
// [num_rows, num_heads, head_dim]; tiles: [num_tiles, 4].
void shoal_attention(const float *qkv, const float *cache, const int64_t *tiles, const int64_t *block_tables,
                     float *out, int64_t num_tiles, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                     int64_t block_size, int64_t window, float scale, int num_threads) {
    attention a = {qkv,          cache,     (const tile *)tiles,
                   block_tables, out,       {num_kv_heads, head_dim, block_size},
                   num_tiles,    num_heads, window,
                   scale,        0};
    in_parallel(attend_share, &a, num_threads);
}
