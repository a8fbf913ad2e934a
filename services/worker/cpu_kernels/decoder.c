// All layers of a decoder, in one team of threads: they meet at a barrier after each part, which takes less than a
// microsecond where to begin a team anew takes up to fifty.
//
// Of many rows, each thread takes some through all that is done to rows, alone, and meets the others only around
// attention. It does so block by block: what it made of a block is still in its cache when it is read.
#include "heads.h"
#include "matrix.h"
#include "panels.h"
#include "ranks.h"
#include "rows.h"

typedef struct {
    const float *attention_norm, *qk_norm, *mlp_norm; // qk_norm may be null
    matrix qkv_proj, o_proj, gate_up_proj, down_proj;
    int64_t window;
} layer;

typedef struct {
    const layer *layers;
    int64_t num_layers, hidden_size, intermediate_size;
    heads heads;
    const float *turns;
    float epsilon;
} decoder;

// Where a forward pass works: hidden, normed: [num_rows, hidden_size]; attended: [num_rows, num_heads * head_dim];
// gated: [num_rows, intermediate_size]; next_tasks: zeros, [num_layers]; part_s, if not null: the seconds of each part
// are added there, in the order of `parts`.
typedef struct {
    float *hidden, *normed, *qkv, *attended, *gate_up, *gated;
    rounded_rows rounded; // room for a row of the most inputs
    int64_t *next_tasks;
    double *part_s;
} room;

#define ROWS_OF_A_BLOCK (PIECES_OF_A_TASK * ROWS_AT_ONCE) // a task's: a panel for all of it, the next one on its way
#define LEAST_OWN_ROWS 64 // of a thread: for fewer, weights would be fetched from memory once a thread for too little

enum parts { NORMS, PRODUCTS, ROTARY_AND_STORES, ATTENTION, ACTIVATION, RANKS };

typedef struct {
    const decoder *decoder;
    const batch *batch;
    float *const *caches;
    const room *room;
    ranks *ranks; // null: the model is whole here
} pass;

static void end_part(team all, const room *r, int part, double *since_s) {
    meet_team(all);
    if (!r->part_s || omp_get_thread_num() != 0) return;
    const double now_s = omp_get_wtime();
    r->part_s[part] += now_s - *since_s;
    *since_s = now_s;
}

static void round_if_needed(team all, const matrix *m, const float *rows, int64_t num_rows, const room *r) {
    if (m->scales) round_own(all, rows, num_rows, m->num_inputs, r->rounded);
}

static void move_row(float *rows, int64_t size, int64_t from, int64_t to) {
    for (int64_t i = 0; i < size && from != to; i++)
        rows[to * size + i] = rows[from * size + i];
}

// Behind the last layer's keys and values, only the wanted rows matter: they become the first ones, by one thread.
static batch keep_wanted(const pass *p) {
    const batch *b = p->batch;
    if (b->num_wanted == b->num_rows) return *b;
    if (omp_get_thread_num() == 0)
        for (int64_t i = 0; i < b->num_wanted; i++) {
            move_row(p->room->hidden, p->decoder->hidden_size, b->wanted_rows[i], i);
            move_row(p->room->qkv, qkv_size(&p->decoder->heads), b->wanted_rows[i], i);
        }
    GOMP_barrier();
    batch wanted = *b;
    wanted.num_rows = wanted.num_tiles = b->num_wanted;
    wanted.tiles = b->wanted_tiles;
    return wanted;
}

// hidden += rows W^T, of a matrix that leads back to the residual. What a rank has of it are columns: its product is a
// part of the sum that is added.
static void add_product(const pass *p, team all, const matrix *m, const float *rows, int64_t num_rows, const room *r,
                        double *since_s) {
    float *to = p->ranks ? next_slot(p->ranks, p->ranks->rank) : r->hidden;
    multiply_own(all, m, rows, r->rounded, num_rows, to, !p->ranks);
    end_part(all, r, PRODUCTS, since_s);
    if (!p->ranks) return;
    if (omp_get_thread_num() == 0) meet(p->ranks, num_rows * p->decoder->hidden_size);
    end_part(all, r, RANKS, since_s);
    add_given_own(all, p->ranks, r->hidden, num_rows, p->decoder->hidden_size);
}

// The embedding is dealt out too: a row is whole on one rank, and zeros on the others.
static void add_embeddings(const pass *p, double *since_s) {
    const int64_t size = p->decoder->hidden_size, num_rows = p->batch->num_rows;
    const team all = all_threads();
    const range own = own_share(all, num_rows);
    float *slot = next_slot(p->ranks, p->ranks->rank), *hidden = p->room->hidden;
    for (int64_t i = own.first * size; i < own.end * size; i++) {
        slot[i] = hidden[i];
        hidden[i] = 0;
    }
    meet_team(all);
    if (omp_get_thread_num() == 0) meet(p->ranks, num_rows * size);
    end_part(all, p->room, RANKS, since_s);
    add_given_own(all, p->ranks, hidden, num_rows, size);
}

// A layer's parts that each row goes through by itself, of all of a batch's rows or of some: what is before attention,
// or behind it. What follows on a row by the thread that made it needs no barrier between.
typedef void rows_part(const pass *p, int64_t index, team all, const room *r, const batch *b, double *since_s);

static void before_attention(const pass *p, int64_t index, team all, const room *r, const batch *b, double *since_s) {
    const decoder *d = p->decoder;
    const layer *l = d->layers + index;
    normalize_own(all, r->hidden, l->attention_norm, r->normed, b->num_rows, d->hidden_size, d->epsilon);
    round_if_needed(all, &l->qkv_proj, r->normed, b->num_rows, r);
    end_part(all, r, NORMS, since_s);
    multiply_own(all, &l->qkv_proj, r->normed, r->rounded, b->num_rows, r->qkv, 0);
    end_part(all, r, PRODUCTS, since_s);
    rotate_and_store_own(all, &d->heads, b, r->qkv, d->turns, l->qk_norm, d->epsilon, p->caches[index]);
    end_part(all, r, ROTARY_AND_STORES, since_s);
}

static void behind_attention(const pass *p, int64_t index, team all, const room *r, const batch *b, double *since_s) {
    const decoder *d = p->decoder;
    const layer *l = d->layers + index;
    const int64_t num_rows = b->num_rows;
    if (l->o_proj.scales) {
        round_if_needed(all, &l->o_proj, r->attended, num_rows, r);
        meet_team(all);
    }
    add_product(p, all, &l->o_proj, r->attended, num_rows, r, since_s);

    normalize_own(all, r->hidden, l->mlp_norm, r->normed, num_rows, d->hidden_size, d->epsilon);
    round_if_needed(all, &l->gate_up_proj, r->normed, num_rows, r);
    end_part(all, r, NORMS, since_s);
    multiply_own(all, &l->gate_up_proj, r->normed, r->rounded, num_rows, r->gate_up, 0);
    end_part(all, r, PRODUCTS, since_s);
    gate_own(all, r->gate_up, r->gated, num_rows, d->intermediate_size);
    round_if_needed(all, &l->down_proj, r->gated, num_rows, r);
    end_part(all, r, ACTIVATION, since_s);
    add_product(p, all, &l->down_proj, r->gated, num_rows, r, since_s);
}

// Whether each thread takes rows of its own through these parts.
static int are_own_rows(const pass *p, int64_t num_rows) {
    return !p->ranks && num_rows >= LEAST_OWN_ROWS * all_threads().count;
}

// The rows from `first` on of what there is for every row. What only lives while a block is computed is, for all of a
// thread's blocks, where its `own` rows begin.
static room room_of(const decoder *d, const room *whole, int64_t own, int64_t first) {
    const int64_t attended = d->heads.num_heads * d->heads.head_dim;
    const int64_t most_inputs = greatest(greatest(d->hidden_size, attended), d->intermediate_size);
    room r = *whole;
    r.hidden += first * d->hidden_size;
    r.qkv += first * qkv_size(&d->heads);
    r.attended += first * attended;
    r.normed += own * d->hidden_size;
    r.gate_up += own * 2 * d->intermediate_size;
    r.gated += own * d->intermediate_size;
    r.rounded.values += own * most_inputs;
    r.rounded.scales += own;
    return r;
}

static void compute_rows(rows_part part, const pass *p, int64_t index, const batch *b, double *since_s) {
    if (!are_own_rows(p, b->num_rows)) {
        part(p, index, all_threads(), p->room, b, since_s);
        return;
    }
    const range own = own_share(all_threads(), b->num_rows);
    const int64_t count = own.end - own.first, blocks = (count + ROWS_OF_A_BLOCK - 1) / ROWS_OF_A_BLOCK;
    for (int64_t n = 0; n < blocks; n++) {
        const int64_t first = own.first + count * n / blocks;
        const room r = room_of(p->decoder, p->room, own.first, first);
        batch rows = *b;
        rows.num_rows = own.first + count * (n + 1) / blocks - first;
        rows.positions += first;
        rows.slots += first;
        part(p, index, alone(), &r, &rows, since_s);
    }
}

static void forward_layer(const pass *p, int64_t index, double *since_s) {
    const decoder *d = p->decoder;
    const room *r = p->room;
    compute_rows(before_attention, p, index, p->batch, since_s);
    if (are_own_rows(p, p->batch->num_rows)) meet_team(all_threads());

    const batch b = index == d->num_layers - 1 ? keep_wanted(p) : *p->batch;
    attend_own(&d->heads, &b, r->qkv, p->caches[index], d->layers[index].window, r->attended, r->next_tasks + index);
    end_part(all_threads(), r, ATTENTION, since_s);
    compute_rows(behind_attention, p, index, &b, since_s);
}

static void forward_in_team(void *data) {
    const pass *p = data;
    double since_s = omp_get_wtime();
    if (p->ranks) add_embeddings(p, &since_s);
    for (int64_t index = 0; index < p->decoder->num_layers; index++)
        forward_layer(p, index, &since_s);
}

// Compute a batch through all layers, writing keys and values to the layers' caches. The wanted rows' hidden states are
// the first of `hidden` then. With `ranks`, not null, this is a rank's part, and the hidden states are those of all.
void shoal_forward(const decoder *d, const batch *b, float *const *caches, const room *r, ranks *k, int num_threads) {
    pass p = {d, b, caches, r, k};
    if (k) begin_work(k);
    in_parallel(forward_in_team, &p, num_threads);
}
