// Heads, a step's rows, and where keys and values lie.
#ifndef SHOAL_HEADS_H
#define SHOAL_HEADS_H

#include "parallel.h"

// A row of queries, keys and values: [num_heads + 2 * num_kv_heads, head_dim].
typedef struct {
    int64_t num_heads, num_kv_heads, head_dim, block_size;
} heads;

static inline int64_t qkv_size(const heads *h) { return (h->num_heads + 2 * h->num_kv_heads) * h->head_dim; }

// A layer's cache is [num_blocks, 2, num_kv_heads, block_size * head_dim]: a head's keys of a block lie dimension by
// dimension, [head_dim, block_size], so that one load gives a dimension of neighbouring tokens; its values token by
// token, [block_size, head_dim].
static inline int64_t keys_at(const heads *h, int64_t block, int64_t kv_head) {
    return (block * 2 * h->num_kv_heads + kv_head) * h->block_size * h->head_dim;
}

static inline int64_t values_at(const heads *h, int64_t block, int64_t kv_head) {
    return keys_at(h, block, kv_head + h->num_kv_heads);
}

// Neighbouring tokens of one sequence, whose blocks begin at `table_start` of all block tables.
typedef struct {
    int64_t first_row, num_rows, first_position, table_start;
} tile;

// A step's rows: positions, slots: [num_rows]; tiles: [num_tiles], which hold every row once. Of the rows, those whose
// hidden states are wanted, ascending, and as tiles of one row each, numbered by their places among them: [num_wanted].
typedef struct {
    int64_t num_rows, num_tiles, num_wanted;
    const int64_t *positions, *slots;
    const tile *tiles;
    const int64_t *block_tables, *wanted_rows;
    const tile *wanted_tiles;
} batch;

// Write each own row's keys and values to their slots; before, normalize its queries and keys if `norm` is given,
// [num_heads + num_kv_heads, head_dim], and turn them, in place. qkv: [num_rows, qkv_size]; turns: [num_positions,
// head_dim / 2, 2], cosines and sines; cache: a layer's.
void rotate_and_store_own(team all, const heads *h, const batch *b, float *qkv, const float *turns, const float *norm,
                          float epsilon, float *cache);

// out = softmax(Q K^T / sqrt(head_dim)) V, each row over its sequence's keys up to itself, or the `window` last of
// them. Each thread takes the next task when it is done with one, counted by `next_task` from 0. qkv: [num_rows,
// qkv_size], of which the queries are read; cache: a layer's; out: [num_rows, num_heads * head_dim].
void attend_own(const heads *h, const batch *b, const float *qkv, const float *cache, int64_t window, float *out,
                int64_t *next_task);

#endif
