// Attention over a paged KV cache, with the softmax computed as it goes (Milakov and Gimelshein, 2018; the tiles are
// FlashAttention's, Dao et al., 2022).
//
// A query sees LANES neighbouring keys at a time, from its sequence's first to its own. Whatever is computed beside it,
// prompt or single token, its additions are the same in the same order: so are its bits.
#include "exponential.h"
#include "heads.h"
#include "parallel.h"
#include "vectors.h"

#define MAX_TILE_QUERIES 32
#define MAX_HEAD_DIM 256
#define QUERIES_AT_ONCE 8 // whose scores with LANES keys are in registers together
#define VECTORS_AT_ONCE 4 // of a result, in registers for VALUE_QUERIES_AT_ONCE queries
#define VALUE_QUERIES_AT_ONCE (LANES == 16 ? 4 : 2)
#define HIDDEN -1e30f // below every score; finite, so that nothing is subtracted from infinity

typedef struct {
    const heads *heads;
    const batch *batch;
    const float *qkv, *cache;
    float *out;
    int64_t window;
    float scale;
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

static ALWAYS_INLINE void score(work *w, int first, int count, const float *keys, const float *next_keys,
                                int64_t head_dim, int64_t block_size, ints key_positions, ints is_key, int64_t window) {
    floats scores[QUERIES_AT_ONCE];
    UNROLL
    for (int q = 0; q < count; q++)
        scores[q] = 0;
    for (int64_t d = 0; d < head_dim; d++) {
        const floats k = load(keys + d * block_size);
        __builtin_prefetch(next_keys + d * block_size, 0, 2);
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
                                     const float *next_values, int64_t head_dim, int first_key, int end_key) {
    floats sums[VALUE_QUERIES_AT_ONCE][VECTORS_AT_ONCE];
    UNROLL
    for (int q = 0; q < count; q++)
        UNROLL
    for (int v = 0; v < vectors; v++)
        sums[q][v] = load(w->sums + (first + q) * w->stride + d + v * LANES) * w->rescale[first + q];
    for (int key = first_key; key < end_key; key++) {
        floats value[VECTORS_AT_ONCE];
        UNROLL
        for (int v = 0; v < vectors; v++) {
            value[v] = load(values + key * head_dim + d + v * LANES);
            __builtin_prefetch(next_values + key * head_dim + d + v * LANES, 0, 2);
        }
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
    case n: score(w, q, n, keys, next_keys, h->head_dim, h->block_size, key_positions, is_key, window); break

static void score_all(work *w, const float *keys, const float *next_keys, const heads *h, ints key_positions,
                      ints is_key, int64_t window) {
    for (int q = 0; q < w->count; q += QUERIES_AT_ONCE)
        switch (w->count - q) {
            SCORE(1);
            SCORE(2);
            SCORE(3);
            SCORE(4);
            SCORE(5);
            SCORE(6);
            SCORE(7);
            default:
                score(w, q, QUERIES_AT_ONCE, keys, next_keys, h->head_dim, h->block_size, key_positions, is_key,
                      window);
        }
}

#define ADD(n, vectors)                                                                                                \
    case n: add_values(w, q, n, d, vectors, values, next_values, h->head_dim, first_key, end_key); break

static void add_all_values(work *w, const float *values, const float *next_values, const heads *h, int first_key,
                           int end_key) {
    for (int q = 0; q < w->count; q += VALUE_QUERIES_AT_ONCE) {
        const int count = w->count - q < VALUE_QUERIES_AT_ONCE ? w->count - q : VALUE_QUERIES_AT_ONCE;
        int64_t d = 0;
        for (; d + VECTORS_AT_ONCE * LANES <= h->head_dim; d += VECTORS_AT_ONCE * LANES)
            switch (count) {
                ADD(1, VECTORS_AT_ONCE);
                ADD(2, VECTORS_AT_ONCE);
#if LANES == 16
                ADD(3, VECTORS_AT_ONCE);
                ADD(4, VECTORS_AT_ONCE);
#endif
            }
        for (; d < h->head_dim; d += LANES)
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
    const heads *h = a->heads;
    const int64_t shared_by = h->num_heads / h->num_kv_heads;
    w->stride = (h->head_dim + LANES - 1) / LANES * LANES;
    w->count = (int)(t->num_rows * shared_by);
    for (int i = 0; i < w->count; i++) {
        const int64_t row = i / shared_by, head = kv_head * shared_by + i % shared_by;
        const float *query = a->qkv + (t->first_row + row) * qkv_size(h) + head * h->head_dim;
        for (int64_t d = 0; d < h->head_dim; d++)
            w->queries[i * w->stride + d] = query[d] * a->scale;
        for (int64_t d = 0; d < w->stride; d++)
            w->sums[i * w->stride + d] = 0;
        w->weight_sums[i] = 0;
        w->largest[i] = HIDDEN;
        w->positions[i] = t->first_position + row;
    }
}

static void give_results(const work *w, const attention *a, const tile *t, int64_t kv_head) {
    const heads *h = a->heads;
    const int64_t shared_by = h->num_heads / h->num_kv_heads;
    for (int i = 0; i < w->count; i++) {
        const int64_t row = t->first_row + i / shared_by, head = kv_head * shared_by + i % shared_by;
        const float share = 1 / add_lanes(w->weight_sums[i]);
        for (int64_t d = 0; d < h->head_dim; d++)
            a->out[(row * h->num_heads + head) * h->head_dim + d] = w->sums[i * w->stride + d] * share;
    }
}

static ints lane_numbers(void) {
    ints lanes;
    for (int i = 0; i < LANES; i++)
        lanes[i] = i;
    return lanes;
}

// Where a head's keys and values of a block are.
typedef struct {
    const float *keys, *values;
} place;

static place place_of(const attention *a, int64_t block, int64_t kv_head) {
    return (place){a->cache + keys_at(a->heads, block, kv_head), a->cache + values_at(a->heads, block, kv_head)};
}

// The first position that a tile's first query sees.
static int64_t first_seen(const attention *a, const tile *t) {
    return t->first_position - a->window + 1 > 0 ? t->first_position - a->window + 1 : 0;
}

// A tile's queries that share a head of keys.
typedef struct {
    const tile *tile;
    int64_t kv_head;
} task;

static place first_place(const attention *a, task t) {
    const int64_t *table = a->batch->block_tables + t.tile->table_start;
    return place_of(a, table[first_seen(a, t.tile) / a->heads->block_size], t.kv_head);
}

// While a block is computed with, the one after it is asked for, line by line: the blocks of a sequence lie anywhere,
// so that the processor cannot guess the next one. `behind` is what is read after this task.
static void attend(work *w, const attention *a, task of, place behind) {
    const heads *h = a->heads;
    const tile *t = of.tile;
    const int64_t last = t->first_position + t->num_rows - 1, first = first_seen(a, t);
    const int64_t *table = a->batch->block_tables + t->table_start, last_block = last / h->block_size;
    const ints lanes = lane_numbers();
    take_queries(w, a, t, of.kv_head);
    for (int64_t block = first / h->block_size; block <= last_block; block++) {
        const place here = place_of(a, table[block], of.kv_head);
        const place next = block < last_block ? place_of(a, table[block + 1], of.kv_head) : behind;
        for (int64_t in_block = 0; in_block < h->block_size; in_block += LANES) {
            const int64_t position = block * h->block_size + in_block;
            if (position > last || position + LANES <= first) continue;
            const int64_t left = h->block_size - in_block;
            score_all(w, here.keys + in_block, next.keys + in_block, h, lanes + (int32_t)position,
                      lanes < (int32_t)left, a->window);
            const int64_t seen = last - position + 1 < left ? last - position + 1 : left;
            const int64_t unseen = first > position ? first - position : 0, from = in_block * h->head_dim;
            add_all_values(w, here.values + from, next.values + from, h, (int)unseen,
                           (int)(seen < LANES ? seen : LANES));
        }
    }
    give_results(w, a, t, of.kv_head);
}

// The task with this number. A prompt's later tiles see more keys: they come first.
static task task_of(const attention *a, int64_t number) {
    const batch *b = a->batch;
    return (task){b->tiles + b->num_tiles - 1 - number / a->heads->num_kv_heads, number % a->heads->num_kv_heads};
}

static int64_t take(int64_t *next_task) { return __atomic_fetch_add(next_task, 1, __ATOMIC_RELAXED); }

void attend_own(const heads *h, const batch *b, const float *qkv, const float *cache, int64_t window, float *out,
                int64_t *next_task) {
    const attention a = {h, b, qkv, cache, out, window, 1 / __builtin_sqrtf((float)h->head_dim)};
    const int64_t num_tasks = b->num_tiles * h->num_kv_heads;
    work w;
    for (int64_t number = take(next_task), next; number < num_tasks; number = next) {
        next = take(next_task);
        const task t = task_of(&a, number);
        attend(&w, &a, t, first_place(&a, next < num_tasks ? task_of(&a, next) : t));
    }
}

typedef struct {
    const heads *h;
    const batch *b;
    const float *qkv, *cache;
    int64_t window;
    float *out;
    int64_t next_task;
} arguments;

static void attend_in_team(void *data) {
    arguments *a = data;
    attend_own(a->h, a->b, a->qkv, a->cache, a->window, a->out, &a->next_task);
}

// By itself, for its tests.
void shoal_attention(const heads *h, const batch *b, const float *qkv, const float *cache, int64_t window, float *out,
                     int num_threads) {
    arguments a = {h, b, qkv, cache, window, out, 0};
    in_parallel(attend_in_team, &a, num_threads);
}

int64_t shoal_max_tile_queries(void) { return MAX_TILE_QUERIES; }
int64_t shoal_max_head_dim(void) { return MAX_HEAD_DIM; }
