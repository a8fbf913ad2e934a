// Where keys and values lie in a layer's cache, [num_blocks, 2, num_kv_heads, block_size * head_dim]: a head's keys of
// a block dimension by dimension, [head_dim, block_size], so that one load gives a dimension of neighbouring tokens;
// its values token by token, [block_size, head_dim].
#ifndef SHOAL_KV_BLOCK_H
#define SHOAL_KV_BLOCK_H

#include <stdint.h>

typedef struct {
    int64_t num_kv_heads, head_dim, block_size;
} kv_shape;

static inline int64_t keys_at(kv_shape s, int64_t block, int64_t kv_head) {
    return (block * 2 * s.num_kv_heads + kv_head) * s.block_size * s.head_dim;
}

static inline int64_t values_at(kv_shape s, int64_t block, int64_t kv_head) {
    return keys_at(s, block, kv_head + s.num_kv_heads);
}

#endif
