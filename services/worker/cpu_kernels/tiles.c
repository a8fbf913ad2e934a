// Products of 8 bits by the processor's tiles (AMX): 16 rows by 16 outputs by 64 inputs an instruction.
//
// Half a panel is what a tile of weights is: 16 lines of 16 outputs' next four inputs, every second line. So the panels
// are those of the other kernels, and since the sums are whole numbers, so are the results' bits.
#include "int8.h"

#if defined(__AMX_INT8__)
#include <immintrin.h>

#define TILE_ROWS 16
#define TILE_INPUTS 64
#define ROWS_OF_A_PIECE (2 * TILE_ROWS)
#define LEAST_ROWS 8     // fewer wait for memory alone, which the other kernel reads a little faster
#define BYTES_AHEAD 4096 // of a panel, asked for before they are used

// The numbers of tiles: of rows, the first 16 and the others; of weights and sums, the panel's first half and second.
enum { SUMS, SUMS_HIGH, OTHER_SUMS, OTHER_SUMS_HIGH, ROWS, OTHER_ROWS, WEIGHTS, WEIGHTS_HIGH };

int tiles_take(const matrix *m, int64_t num_rows) { return num_rows >= LEAST_ROWS && m->num_inputs % TILE_INPUTS == 0; }

typedef struct {
    uint8_t palette, first_row, reserved[14];
    uint16_t line_bytes[16];
    uint8_t lines[16];
} tile_shapes;

// Shape the tiles for `count` rows, of which those behind the first 16 are in tiles of their own, if there are any.
static void shape_tiles(int count) {
    const uint8_t others = count > TILE_ROWS ? (uint8_t)(count - TILE_ROWS) : 0, rows = (uint8_t)(count - others);
    const uint16_t bytes = TILE_INPUTS, other_bytes = others ? bytes : 0;
    const tile_shapes shapes = {
        .palette = 1,
        .line_bytes = {bytes, bytes, other_bytes, other_bytes, bytes, other_bytes, bytes, bytes},
        .lines = {rows, rows, others, others, rows, others, TILE_ROWS, TILE_ROWS},
    };
    _tile_loadconfig(&shapes);
}

// The sums of a piece's rows in a panel.
static ALWAYS_INLINE void multiply(const uint8_t *rows, int64_t num_inputs, const int8_t *panel, ints (*sums)[2],
                                   int has_others) {
    const int64_t sum_bytes = sizeof sums[0];
    _tile_zero(SUMS);
    _tile_zero(SUMS_HIGH);
    if (has_others) {
        _tile_zero(OTHER_SUMS);
        _tile_zero(OTHER_SUMS_HIGH);
    }
    for (int64_t i = 0; i < num_inputs; i += TILE_INPUTS) {
        const int8_t *weights = panel + i * PANEL;
        UNROLL
        for (int line = 0; line < PANEL * TILE_INPUTS; line += 64)
            __builtin_prefetch(weights + BYTES_AHEAD + line);
        _tile_loadd(WEIGHTS, weights, PANEL * 4);
        _tile_loadd(WEIGHTS_HIGH, weights + LANES * 4, PANEL * 4);
        _tile_loadd(ROWS, rows + i, num_inputs);
        _tile_dpbusd(SUMS, ROWS, WEIGHTS);
        _tile_dpbusd(SUMS_HIGH, ROWS, WEIGHTS_HIGH);
        if (has_others) {
            _tile_loadd(OTHER_ROWS, rows + TILE_ROWS * num_inputs + i, num_inputs);
            _tile_dpbusd(OTHER_SUMS, OTHER_ROWS, WEIGHTS);
            _tile_dpbusd(OTHER_SUMS_HIGH, OTHER_ROWS, WEIGHTS_HIGH);
        }
    }
    _tile_stored(SUMS, sums, sum_bytes);
    _tile_stored(SUMS_HIGH, &sums[0][1], sum_bytes);
    if (has_others) {
        _tile_stored(OTHER_SUMS, sums + TILE_ROWS, sum_bytes);
        _tile_stored(OTHER_SUMS_HIGH, &sums[TILE_ROWS][1], sum_bytes);
    }
}

static void multiply_task(void *of, task t) {
    int8_product *p = of;
    const int64_t num_inputs = p->m->num_inputs;
    ints sums[ROWS_OF_A_PIECE][2];
    for (int64_t piece = t.piece; piece < t.end_piece; piece++) {
        const int64_t row = first_row(&t, piece);
        const int count = (int)(first_row(&t, piece + 1) - row);
        if (count != p->tile_rows) shape_tiles(count);
        p->tile_rows = count;
        for (int64_t n = t.panel; n < t.panel + t.num_panels; n++) {
            const uint8_t *rows = p->rows.values + row * num_inputs;
            const int8_t *panel = (const int8_t *)p->m->panels + n * PANEL * num_inputs;
            if (count > TILE_ROWS)
                multiply(rows, num_inputs, panel, sums, 1);
            else
                multiply(rows, num_inputs, panel, sums, 0);
            for (int r = 0; r < count; r++)
                finish_int8(p, sums[r], row + r, n);
        }
    }
}

void multiply_own_tiles(team all, int8_product *p, int64_t num_rows) {
    do_own_tasks(all, p->m->num_outputs, num_rows, ROWS_OF_A_PIECE, multiply_task, p);
    _tile_release(); // so that the system has less to keep when it gives the processor to another thread
}
#else
int tiles_take(const matrix *m, int64_t num_rows) {
    (void)m;
    (void)num_rows;
    return 0;
}

void multiply_own_tiles(team all, int8_product *p, int64_t num_rows) {
    (void)all;
    (void)p;
    (void)num_rows;
}
#endif
