/* grouped.h: convolution of 8-bit codes or small counts by groups, any window; spikes have events.h.
 *
 * Definition: kernels/reference.py:conv2d. This file agrees with it bit for bit (tests/test_kernels_bit_exact.py);
 * where the two differ, this file is wrong. The plain twin is conv.h.
 *
 * For a block of 64 outputs, a row of inputs is spread: [x][t][in of a group][out 64], the input that each output reads,
 * 0 where there is padding. Then every product is one of two vectors. Spread rows of a window are kept, row y at y
 * modulo their number.
 *     weights [outs/64][ky][kx][in of a group][out 64] int16
 */

/* Where row y of the input, which may be padding, is kept. */
static inline ptrdiff_t NAME(spread_at)(const mdsnn_op *op, int ins, int steps, int width, int y)
{
    int place = (y + op->padding) % op->kernel_height;
    return (ptrdiff_t)place * (width + 2 * op->padding) * steps * ins * BLOCK;
}

/* Spreads row y of the input for block o of `outs` outputs. */
APART static void NAME(grouped_spread)(const mdsnn_op *op, const view *in, int steps, int y, int o, int outs,
                                       int8_t *spread)
{
    const int ins = in->channels / op->groups, each = outs / op->groups;
    const int here = outs - o * BLOCK < BLOCK ? outs - o * BLOCK : BLOCK;
    const size_t pixel = (size_t)steps * (size_t)ins * BLOCK;
    int8_t *to = spread + NAME(spread_at)(op, ins, steps, in->width, y);
    memset(to, 0, pixel * (size_t)(in->width + 2 * op->padding));
    if (y < 0 || y >= in->height)
        return;
    to += pixel * (size_t)op->padding;
    for (int x = 0; x < in->width; x++)
        for (int t = 0; t < steps; t++)
            for (int i = 0; i < ins; i++, to += BLOCK) {
                const int8_t *from = (const int8_t *)in->at + y * in->row + x * in->pixel + t * in->step + i;
                if (ins == 1 && each == 1) {
                    memcpy(to, from + o * BLOCK, (size_t)here);
                    continue;
                }
                int group = o * BLOCK / each;
                for (int c = 0, end = (group + 1) * each - o * BLOCK; c < here; group++, end += each)
                    for (int8_t code = from[group * ins]; c < (end < here ? end : here); c++)
                        to[c] = code;
            }
}

/* sums [x][t][64] of output row y, of 16 or 32 bits. */
#define MDSNN_GROUPED_ROW(FUNCTION, SUM, LANES, MANY)                                                                  \
    APART static void NAME(FUNCTION)(const mdsnn_op *op, int ins, int steps, int y, int width, int across,            \
                                    const int8_t *spread, const int16_t *weights, void *sums)                        \
    {                                                                                                                \
        typedef SUM lanes __attribute__((vector_size(VECTOR_BYTES)));                                                \
        typedef int8_t bytes __attribute__((vector_size(LANES)));                                                    \
        typedef int16_t words __attribute__((vector_size(2 * LANES)));                                               \
        const ptrdiff_t step = (ptrdiff_t)ins * BLOCK;                                                               \
        SUM *to = sums;                                                                                              \
        for (int x = 0; x < across; x++)                                                                             \
            for (int t = 0; t < steps; t++, to += BLOCK)                                                             \
                for (int c = 0; c < BLOCK; c += MANY * LANES) {                                                       \
                    const int16_t *weight = weights + c;                                                             \
                    lanes sum[MANY] = {{0}};                                                                            \
                    for (int ky = 0; ky < op->kernel_height; ky++) {                                                 \
                        const int8_t *row =                                                                          \
                            spread + NAME(spread_at)(op, ins, steps, width, y * op->stride - op->padding + ky) + c;  \
                        for (int kx = 0; kx < op->kernel_width; kx++) {                                              \
                            const int8_t *from = row + ((ptrdiff_t)(x * op->stride + kx) * steps + t) * step;        \
                            for (int i = 0; i < ins; i++, from += BLOCK, weight += BLOCK)                            \
                                for (int v = 0; v < MANY; v++) {                                                        \
                                    bytes code;                                                                      \
                                    words factor;                                                                    \
                                    memcpy(&code, from + v * LANES, sizeof code);                                 \
                                    memcpy(&factor, weight + v * LANES, sizeof factor);                           \
                                    sum[v] += __builtin_convertvector(code, lanes) *                                 \
                                              __builtin_convertvector(factor, lanes);                                \
                                }                                                                                    \
                        }                                                                                            \
                    }                                                                                                \
                    memcpy(to + c, sum, sizeof sum);                                                                 \
                }                                                                                                    \
    }

MDSNN_GROUPED_ROW(grouped_row_16, int16_t, (VECTOR_BYTES / 2), (VECTOR_BYTES == 64 ? 2 : 4))
MDSNN_GROUPED_ROW(grouped_row_32, int32_t, (VECTOR_BYTES / 4), 4)

#undef MDSNN_GROUPED_ROW
