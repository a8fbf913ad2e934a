// Attention over a paged KV cache, with the softmax computed as it goes (Milakov and Gimelshein, 2018; the tiles are
// FlashAttention's, Dao et al., 2022).
//
// A query sees PAIR vectors of neighbouring keys at a time, from its sequence's first to its own. Whatever is computed
// beside it, prompt or single token, its additions are the same in the same order: so are its bits.
#include "exponential.h"
#include "heads.h"
#include "vectors.h"

#define MAX_TILE_QUERIES 32
#define MAX_HEAD_DIM 256
#define PAIR 2 // vectors of keys, for each of which a score is in registers, of so many queries together
#define QUERIES_AT_ONCE (LANES == 16 ? 8 : 4)
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
    floats weight_sums[MAX_TILE_QUERIES], weights[MAX_TILE_QUERIES][PAIR];
    float largest[MAX_TILE_QUERIES], rescale[MAX_TILE_QUERIES];
    int64_t positions[MAX_TILE_QUERIES];
    int count;
    int64_t stride; // of queries and sums: head_dim, rounded up to whole vectors
} work;

// LANES neighbouring tokens of a block, the first at `position`. Of them, some query of the tile sees those from `from`
// to before `to`.
typedef struct {
    const float *keys, *values;
    int32_t position;
    int from, to;
} vector;

typedef struct {
    vector of[PAIR];
} pair;

static ints lane_numbers(void) {
    ints lanes;
    for (int i = 0; i < LANES; i++)
        lanes[i] = i;
    return lanes;
}

static ALWAYS_INLINE floats seen_scores(floats scores, const vector *v, int32_t position, int32_t window) {
    const ints lanes = lane_numbers(), key_positions = lanes + v->position;
    const ints is_seen = (lanes < v->to) & (key_positions <= position) & (key_positions > position - window);
    return is_seen ? scores : (floats)HIDDEN;
}

static ALWAYS_INLINE floats weights_of(floats seen, float largest) {
    return seen == HIDDEN ? (floats)0 : exponential(seen - largest);
}

static ALWAYS_INLINE void score(work *w, int first, int count, const pair *keys, const pair *next, int64_t head_dim,
                                int64_t block_size, int64_t window) {
    floats scores[QUERIES_AT_ONCE][PAIR];
    UNROLL
    for (int q = 0; q < count; q++)
        scores[q][0] = scores[q][1] = 0;
    for (int64_t d = 0; d < head_dim; d++) {
        const floats k0 = load(keys->of[0].keys + d * block_size), k1 = load(keys->of[1].keys + d * block_size);
        __builtin_prefetch(next->of[0].keys + d * block_size, 0, 2);
        __builtin_prefetch(next->of[1].keys + d * block_size, 0, 2);
        UNROLL
        for (int q = 0; q < count; q++) {
            floats x = w->queries[(first + q) * w->stride + d];
            LOADED_ONCE(x);
            scores[q][0] = multiply_add(x, k0, scores[q][0]);
            scores[q][1] = multiply_add(x, k1, scores[q][1]);
        }
    }
    UNROLL
    for (int q = 0; q < count; q++) {
        const int i = first + q;
        const int32_t position = (int32_t)w->positions[i];
        const floats seen0 = seen_scores(scores[q][0], keys->of, position, (int32_t)window);
        const floats seen1 = seen_scores(scores[q][1], keys->of + 1, position, (int32_t)window);
        const float before = w->largest[i], here = largest_lane(__builtin_elementwise_max(seen0, seen1));
        const float largest = here > before ? here : before;
        const floats weights0 = weights_of(seen0, largest), weights1 = weights_of(seen1, largest);
        w->rescale[i] = before == largest ? 1 : exponential((floats)(before - largest))[0];
        w->weight_sums[i] = multiply_add(w->weight_sums[i], (floats)w->rescale[i], weights0) + weights1;
        w->weights[i][0] = weights0;
        w->weights[i][1] = weights1;
        w->largest[i] = largest;
    }
}

static ALWAYS_INLINE void add_values(work *w, int first, int count, int64_t d, int vectors, const pair *values,
                                     const pair *next, int64_t head_dim) {
    floats sums[VALUE_QUERIES_AT_ONCE][VECTORS_AT_ONCE];
    UNROLL
    for (int q = 0; q < count; q++)
        UNROLL
    for (int v = 0; v < vectors; v++)
        sums[q][v] = load(w->sums + (first + q) * w->stride + d + v * LANES) * w->rescale[first + q];
    for (int n = 0; n < PAIR; n++)
        for (int key = values->of[n].from; key < values->of[n].to; key++) {
            floats value[VECTORS_AT_ONCE];
            UNROLL
            for (int v = 0; v < vectors; v++) {
                value[v] = load(values->of[n].values + key * head_dim + d + v * LANES);
                __builtin_prefetch(next->of[n].values + key * head_dim + d + v * LANES, 0, 2);
            }
            UNROLL
            for (int q = 0; q < count; q++) {
                const floats weight = ((const float *)&w->weights[first + q][n])[key];
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
    case n: score(w, q, n, keys, next, h->head_dim, h->block_size, window); break

static void score_all(work *w, const pair *keys, const pair *next, const heads *h, int64_t window) {
    for (int q = 0; q < w->count; q += QUERIES_AT_ONCE)
        switch (w->count - q) {
            SCORE(1);
            SCORE(2);
            SCORE(3);
#if LANES == 16
            SCORE(4);
            SCORE(5);
            SCORE(6);
            SCORE(7);
#endif
            default: score(w, q, QUERIES_AT_ONCE, keys, next, h->head_dim, h->block_size, window);
        }
}

#define ADD(n, vectors)                                                                                                \
    case n: add_values(w, q, n, d, vectors, values, next, h->head_dim); break

static void add_all_values(work *w, const pair *values, const pair *next, const heads *h) {
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

// A tile's queries that share a head of keys.
typedef struct {
    const tile *tile;
    int64_t kv_head;
} task;

// The positions that some query of a task sees.
static range seen_by(const attention *a, task t) {
    const int64_t first = t.tile->first_position;
    return (range){greatest(first - a->window + 1, 0), first + t.tile->num_rows};
}

// Vectors are numbered from a sequence's first key; a block begins with one.
static int64_t vectors_of_block(const heads *h) { return (h->block_size + LANES - 1) / LANES; }

static int64_t number_of(const heads *h, int64_t position) {
    return position / h->block_size * vectors_of_block(h) + position % h->block_size / LANES;
}

static vector vector_at(const attention *a, task t, range seen, int64_t number) {
    const heads *h = a->heads;
    const int64_t block = number / vectors_of_block(h), in_block = number % vectors_of_block(h) * LANES;
    const int64_t position = block * h->block_size + in_block;
    const int64_t id = a->batch->block_tables[t.tile->table_start + block];
    return (vector){
        a->cache + keys_at(h, id, t.kv_head) + in_block,
        a->cache + values_at(h, id, t.kv_head) + in_block * h->head_dim,
        (int32_t)position,
        (int)greatest(seen.first - position, 0),
        (int)least(least(h->block_size - in_block, LANES), seen.end - position),
    };
}

// The pair that begins with an even number. A vector of it that nobody sees is none, at the other one's place.
static pair pair_at(const attention *a, task t, range seen, int64_t number) {
    const int64_t first = number_of(a->heads, seen.first), last = number_of(a->heads, seen.end - 1);
    pair p;
    for (int n = 0; n < PAIR; n++) {
        const int64_t wanted = number + n, there = least(greatest(wanted, first), last);
        p.of[n] = vector_at(a, t, seen, there);
        if (there != wanted) p.of[n].to = p.of[n].from = 0;
    }
    return p;
}

static int64_t first_pair(const attention *a, range seen) { return number_of(a->heads, seen.first) / PAIR * PAIR; }

// While a pair is computed with, the one after it is asked for, line by line: the blocks of a sequence lie anywhere, so
// that the processor cannot guess the next one. `behind` is the task after this one.
static void attend(work *w, const attention *a, task t, task behind) {
    const heads *h = a->heads;
    const range seen = seen_by(a, t), seen_behind = seen_by(a, behind);
    const int64_t last = number_of(h, seen.end - 1);
    take_queries(w, a, t.tile, t.kv_head);
    pair here = pair_at(a, t, seen, first_pair(a, seen)), next;
    for (int64_t number = first_pair(a, seen); number <= last; number += PAIR, here = next) {
        next = number + PAIR <= last ? pair_at(a, t, seen, number + PAIR)
                                     : pair_at(a, behind, seen_behind, first_pair(a, seen_behind));
        score_all(w, &here, &next, h, a->window);
        add_all_values(w, &here, &next, h);
    }
    give_results(w, a, t.tile, t.kv_head);
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
        attend(&w, &a, t, next < num_tasks ? task_of(&a, next) : t);
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
