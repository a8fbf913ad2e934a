// Rotary position embedding of queries and keys, and the cache's writes.
#include "heads.h"
#include "rows.h"

// A pair (x, y) of neighbouring dimensions becomes (x cos - y sin, y cos + x sin).
static void rotate(float *head, const float *turns, int64_t head_dim) {
    for (int64_t i = 0; i < head_dim; i += 2) {
        const float x = head[i], y = head[i + 1], cosine = turns[i], sine = turns[i + 1];
        head[i] = x * cosine - y * sine;
        head[i + 1] = y * cosine + x * sine;
    }
}

static void store_row(const heads *h, const float *keys, const float *values, int64_t slot, float *cache) {
    const int64_t block = slot / h->block_size, place = slot % h->block_size;
    for (int64_t head = 0; head < h->num_kv_heads; head++) {
        float *to_keys = cache + keys_at(h, block, head) + place;
        float *to_values = cache + values_at(h, block, head) + place * h->head_dim;
        for (int64_t i = 0; i < h->head_dim; i++) {
            to_keys[i * h->block_size] = keys[head * h->head_dim + i];
            to_values[i] = values[head * h->head_dim + i];
        }
    }
}

// Ask for the lines that a row's keys and values are going to: those of a key are one for each dimension.
static void prefetch_slot(const heads *h, int64_t slot, float *cache) {
    const int64_t block = slot / h->block_size, place = slot % h->block_size;
    for (int64_t head = 0; head < h->num_kv_heads; head++)
        for (int64_t i = 0; i < h->head_dim; i++) {
            __builtin_prefetch(cache + keys_at(h, block, head) + place + i * h->block_size, 1);
            if (i % 16 == 0) __builtin_prefetch(cache + values_at(h, block, head) + place * h->head_dim + i, 1);
        }
}

void rotate_and_store_own(team all, const heads *h, const batch *b, float *qkv, const float *turns, const float *norm,
                          float epsilon, float *cache) {
    const int64_t num_turned = h->num_heads + h->num_kv_heads;
    const range own = own_share(all, b->num_rows);
    for (int64_t row = own.first; row < own.end; row++) {
        float *of_row = qkv + row * qkv_size(h);
        prefetch_slot(h, b->slots[row], cache);
        for (int64_t head = 0; head < num_turned; head++) {
            float *x = of_row + head * h->head_dim;
            if (norm) normalize(x, norm + head * h->head_dim, x, h->head_dim, epsilon);
            rotate(x, turns + b->positions[row] * h->head_dim, h->head_dim);
        }
        store_row(h, of_row + h->num_heads * h->head_dim, of_row + num_turned * h->head_dim, b->slots[row], cache);
    }
}

typedef struct {
    const heads *h;
    const batch *b;
    float *qkv;
    const float *turns, *norm;
    float epsilon;
    float *cache;
} arguments;

static void rotate_and_store_in_team(void *data) {
    const arguments *a = data;
    rotate_and_store_own(all_threads(), a->h, a->b, a->qkv, a->turns, a->norm, a->epsilon, a->cache);
}

// By itself, for its tests.
void shoal_rotate_and_store(const heads *h, const batch *b, float *qkv, const float *turns, const float *norm,
                            float epsilon, float *cache, int num_threads) {
    arguments a = {h, b, qkv, turns, norm, epsilon, cache};
    in_parallel(rotate_and_store_in_team, &a, num_threads);
}
