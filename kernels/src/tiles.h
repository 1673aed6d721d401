/* tiles.h: convolution of spikes or 8-bit codes by AMX; groups = 1, any window.
 *
 * Definition: kernels/reference.py:conv2d. This file agrees with it bit for bit (tests/test_kernels_bit_exact.py);
 * where the two differ, this file is wrong. The plain twin is conv.h.
 *
 * A tile is 16 rows of 64 bytes. Rows of the left operand are outputs of one row of the image, (x, t) with t innermost:
 * 4 pixels of 4 steps, say. For one tap and 64 inputs they lie a fixed distance apart, once the input has been copied
 * with its padding, and with a column in each residue class of the stride beside its own kind:
 *     input [y + padding][class][column][t][in, up to 64s]
 * The right operand is 64 inputs of 16 outputs, four inputs side by side as the instruction wants them:
 *     weights [outs/64][4 tiles of 16 outs][ky][kx][ins/64][16][out 16][in 4]
 * Four tiles of outputs are summed at a time, so that a tile of weights, which may come from a far cache, is loaded once
 * for all of them.
 *
 * The intrinsics of gcc do not say that they touch memory, hence the fences around them, and the configuration is
 * loaded by hand.
 */

#define TILE 16
#define AHEAD 4 /* tiles of weights to fetch ahead */
#define FENCE() __asm__ volatile("" ::: "memory")

typedef struct NAME(tiles) {
    const uint8_t *input;
    ptrdiff_t row;      /* bytes of a row of the copied input */
    ptrdiff_t class;    /* bytes of a residue class in it */
    ptrdiff_t pitch;    /* bytes of a column at one step */
    ptrdiff_t weights;  /* bytes of a block of 64 outputs */
    ptrdiff_t sums_row; /* elements: a row's outputs, up to whole tiles, by 64 */
    int ins, steps, across; /* blocks of 64 inputs; steps; tiles a row */
} NAME(tiles);

static void NAME(tiles_begin)(void)
{
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; i++) {
        config.bytes[i] = BLOCK;
        config.rows[i] = TILE;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
}

static void NAME(tiles_end)(void) { __asm__ volatile("tilerelease" ::: "memory"); }

/* Copies the input to `to` and says how it lies there. */
APART static NAME(tiles) NAME(tiles_prepare)(const mdsnn_op *op, const view *in, int out_width, int steps, uint8_t *to)
{
    NAME(tiles) g;
    int stride = op->stride, classes = stride < op->kernel_width ? stride : op->kernel_width;
    int columns = out_width + (op->kernel_width - 1) / stride, rows = in->height + 2 * op->padding;
    g.ins = (in->channels + BLOCK - 1) / BLOCK;
    g.steps = steps;
    g.across = (out_width * steps + TILE - 1) / TILE;
    g.pitch = (ptrdiff_t)g.ins * BLOCK;
    g.class = columns * steps * g.pitch;
    g.row = classes * g.class;
    g.weights = (ptrdiff_t)op->kernel_height * op->kernel_width * g.ins * BLOCK * BLOCK;
    g.sums_row = (ptrdiff_t)g.across * TILE * BLOCK;
    g.input = to;
    for (int y = 0; y < rows; y++) {
        if (y % stride >= op->kernel_height)
            continue; /* between the windows */
        int from_y = y - op->padding, inside = from_y >= 0 && from_y < in->height;
        if (stride == 1 && in->pitch == g.pitch && inside && columns == in->width + 2 * op->padding) {
            size_t side = (size_t)(op->padding * steps * g.pitch), middle = (size_t)(in->width * steps * g.pitch);
            uint8_t *at = to + y * g.row;
            memset(at, 0, side);
            memcpy(at + side, in->at + from_y * in->row, middle);
            memset(at + side + middle, 0, side);
            continue;
        }
        for (int class = 0; class < classes; class++)
            for (int column = 0; column < columns; column++) {
                uint8_t *at = to + y * g.row + class * g.class + column * steps * g.pitch;
                int64_t from_x = (int64_t)column * stride + class - op->padding;
                if (!inside || from_x < 0 || from_x >= in->width) {
                    memset(at, 0, (size_t)(steps * g.pitch));
                    continue;
                }
                const uint8_t *from = in->at + from_y * in->row + from_x * in->pixel;
                if (in->pitch == g.pitch)
                    memcpy(at, from, (size_t)(steps * g.pitch));
                else
                    for (int t = 0; t < steps; t++)
                        memcpy(at + t * g.pitch, from + t * in->step, (size_t)in->channels);
            }
    }
    return g;
}

/* Four tiles of outputs, whose inputs begin at `from`, by one of channels. */
static inline void NAME(tiles_four)(const mdsnn_op *op, const NAME(tiles) *g, const uint8_t *const from[4],
                                    const int8_t *weights)
{
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int ky = 0; ky < op->kernel_height; ky++) {
        int class = 0, column = 0;
        for (int kx = 0; kx < op->kernel_width; kx++) {
            ptrdiff_t tap = ky * g->row + class * g->class + column * g->steps * g->pitch;
            for (ptrdiff_t i = tap; i < tap + g->pitch; i += BLOCK, weights += TILE * BLOCK) {
                for (int line = 0; line < TILE; line++) /* a large layer's weights come from L3; beyond them: no harm */
                    _mm_prefetch((const char *)weights + (AHEAD * TILE + line) * BLOCK, _MM_HINT_T0);
                _tile_loadd(4, weights, BLOCK);
                _tile_loadd(5, from[0] + i, g->pitch);
                _tile_dpbssd(0, 5, 4);
                _tile_loadd(6, from[1] + i, g->pitch);
                _tile_dpbssd(1, 6, 4);
                _tile_loadd(7, from[2] + i, g->pitch);
                _tile_dpbssd(2, 7, 4);
                _tile_loadd(5, from[3] + i, g->pitch);
                _tile_dpbssd(3, 5, 4);
            }
            if (++class == op->stride) {
                class = 0;
                column++;
            }
        }
    }
}

/* sums [row][x, t up to whole tiles][64] of `rows` output rows from y on, for one block of outputs. */
APART static void NAME(tiles_band)(const mdsnn_op *op, const NAME(tiles) *g, int y, int rows, const int8_t *weights,
                             int32_t *sums)
{
    int count = rows * g->across;
    FENCE();
    for (int n = 0; n < 4; n++, weights += g->weights / 4)
        for (int i = 0; i < count; i += 4) {
            const uint8_t *from[4];
            int32_t *to[4];
            for (int j = 0; j < 4; j++) { /* beyond the end: the last one again */
                int at = i + j < count ? i + j : count - 1;
                from[j] = g->input + (ptrdiff_t)(y + at / g->across) * op->stride * g->row +
                          (ptrdiff_t)(at % g->across) * TILE * g->pitch;
                to[j] = sums + (ptrdiff_t)at * TILE * BLOCK + n * TILE;
            }
            NAME(tiles_four)(op, g, from, weights);
            _tile_stored(0, to[0], BLOCK * sizeof *sums);
            _tile_stored(1, to[1], BLOCK * sizeof *sums);
            _tile_stored(2, to[2], BLOCK * sizeof *sums);
            _tile_stored(3, to[3], BLOCK * sizeof *sums);
        }
    FENCE();
}

#undef FENCE
#undef TILE
#undef AHEAD
