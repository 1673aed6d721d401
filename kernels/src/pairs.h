/* pairs.h: convolution of 8-bit codes that are mostly not 0 (the stem, shortcuts); groups = 1, any window.
 *
 * Definition: kernels/reference.py:conv2d. This file agrees with it bit for bit (tests/test_kernels_bit_exact.py);
 * where the two differ, this file is wrong. The plain twin is conv.h.
 *
 * The inputs under the windows of one output row are laid side by side as 16-bit codes, 0 where there is padding, and
 * then each pair of inputs is multiplied by its pair of weights, whose sum fits 32 bits:
 *     weights [outs/64][pair][out 64][2] int16      pairs in the order (ky, kx, in), an odd number of inputs padded with 0
 *
 * Where weights are small (or inputs: counts), products of bytes fit 16 bits, `flush` times four of them even added up.
 * Then inputs are bytes from 0 on, a bias added, and the sums begin with what takes it out again.
 *     weights [outs/64]: [four][out 64][4] int8, then [out 64] int32, -bias times the sum of an output's weights
 */

#if VECTOR_BYTES == 64
#define TOGETHER 4 /* outputs that share a load of weights, as many as there are registers for */
#else
#define TOGETHER 2
#endif
#define GROUP (4 * VECTOR_BYTES / 4) /* channels in four vectors of sums */

static inline NAME(v32) NAME(multiply_pairs)(NAME(v16) a, NAME(v16) b)
{
#if defined(__AVX512BW__)
    return (NAME(v32))_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (NAME(v32))_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (NAME(v32))_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    NAME(v32) sum;
    for (int i = 0; i < VECTOR_BYTES / 4; i++)
        sum[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return sum;
#endif
}

/* The inputs of output row y: columns [x][t][depth]. */
APART static void NAME(pairs_columns)(const mdsnn_op *op, const view *in, int steps, int y, int width, int16_t *columns)
{
    for (int x = 0; x < width; x++)
        for (int t = 0; t < steps; t++, columns += op->depth) {
            int16_t *to = columns;
            for (int ky = 0; ky < op->kernel_height; ky++)
                for (int kx = 0; kx < op->kernel_width; kx++, to += in->channels) {
                    int64_t from_y = (int64_t)y * op->stride + ky - op->padding;
                    int64_t from_x = (int64_t)x * op->stride + kx - op->padding;
                    if (from_y < 0 || from_y >= in->height || from_x < 0 || from_x >= in->width) {
                        memset(to, 0, sizeof *to * (size_t)in->channels);
                        continue;
                    }
                    const int8_t *from =
                        (const int8_t *)in->at + from_y * in->row + from_x * in->pixel + t * in->step;
                    for (int c = 0; c < in->channels; c++)
                        to[c] = from[c];
                }
            if (to != columns + op->depth)
                *to = 0;
        }
}

/* sums [row][64] of `rows` outputs. GROUP channels of TOGETHER (or, at the end, one) outputs at a time. */
static inline __attribute__((always_inline)) void NAME(pairs_few)(const int16_t *columns, int few, int depth,
                                                                  const int16_t *weights, int32_t *sums)
{
    NAME(v32) sum[TOGETHER][4];
    for (int r = 0; r < few; r++)
        for (int v = 0; v < 4; v++)
            sum[r][v] = (NAME(v32)){0};
    for (int i = 0; i < depth; i += 2, weights += 2 * BLOCK) {
        NAME(v16) w[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++)
            memcpy(&w[v], weights + v * (VECTOR_BYTES / 2), sizeof w[v]);
#pragma GCC unroll 4
        for (int r = 0; r < few; r++) {
            int32_t pair;
            memcpy(&pair, columns + (ptrdiff_t)r * depth + i, sizeof pair);
            NAME(v32) both = (NAME(v32)){0} + pair;
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++)
                sum[r][v] += NAME(multiply_pairs)((NAME(v16))both, w[v]);
        }
    }
    for (int r = 0; r < few; r++)
        for (int v = 0; v < 4; v++)
            memcpy(sums + r * BLOCK + v * (VECTOR_BYTES / 4), &sum[r][v], sizeof sum[r][v]);
}

APART static void NAME(pairs_row)(const int16_t *columns, int rows, int depth, const int8_t *packed, int32_t *sums)
{
    const int16_t *weights = (const int16_t *)(const void *)packed;
    for (int c = 0; c < BLOCK; c += GROUP) {
        int r = 0;
        for (; r + TOGETHER <= rows; r += TOGETHER)
            NAME(pairs_few)(columns + (ptrdiff_t)r * depth, TOGETHER, depth, weights + 2 * c, sums + (ptrdiff_t)r * BLOCK + c);
        for (; r < rows; r++)
            NAME(pairs_few)(columns + (ptrdiff_t)r * depth, 1, depth, weights + 2 * c, sums + (ptrdiff_t)r * BLOCK + c);
    }
}

#if defined(__AVX2__)
/* The inputs of output row y, plus the bias: columns [x][t][depth]. */
APART static void NAME(bytes_columns)(const mdsnn_op *op, const view *in, int steps, int y, int width, uint8_t *columns)
{
    const uint8_t bias = (uint8_t)op->bias;
    for (int x = 0; x < width; x++)
        for (int t = 0; t < steps; t++, columns += op->depth) {
            uint8_t *to = columns;
            for (int ky = 0; ky < op->kernel_height; ky++)
                for (int kx = 0; kx < op->kernel_width; kx++, to += in->channels) {
                    int64_t from_y = (int64_t)y * op->stride + ky - op->padding;
                    int64_t from_x = (int64_t)x * op->stride + kx - op->padding;
                    if (from_y < 0 || from_y >= in->height || from_x < 0 || from_x >= in->width) {
                        memset(to, bias, (size_t)in->channels);
                        continue;
                    }
                    const uint8_t *from = in->at + from_y * in->row + from_x * in->pixel + t * in->step;
                    const int channels = in->channels;
                    for (int c = 0; c < channels; c++)
                        to[c] = (uint8_t)(from[c] + bias);
                }
            memset(to, 0, (size_t)(columns + op->depth - to));
        }
}

static inline NAME(v16) NAME(multiply_bytes)(NAME(v32) inputs, NAME(v32) weights)
{
#if defined(__AVX512BW__)
    return (NAME(v16))_mm512_maddubs_epi16((__m512i)inputs, (__m512i)weights);
#else
    return (NAME(v16))_mm256_maddubs_epi16((__m256i)inputs, (__m256i)weights);
#endif
}

/* As pairs_few, by products of bytes; start: what the sums begin with. */
static inline __attribute__((always_inline)) void NAME(bytes_few)(const uint8_t *columns, int few, int depth, int flush,
                                                                  const int8_t *weights, const int8_t *start,
                                                                  int32_t *sums)
{
    NAME(v32) sum[TOGETHER][4];
    for (int r = 0; r < few; r++)
        for (int v = 0; v < 4; v++)
            memcpy(&sum[r][v], start + v * VECTOR_BYTES, sizeof sum[r][v]);
    for (int from = 0; from < depth; from += 4 * flush) {
        int end = depth - from < 4 * flush ? depth : from + 4 * flush;
        NAME(v16) part[TOGETHER][4];
        for (int r = 0; r < few; r++)
            for (int v = 0; v < 4; v++)
                part[r][v] = (NAME(v16)){0};
        for (int i = from; i < end; i += 4, weights += 4 * BLOCK) {
            NAME(v32) w[4];
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++)
                memcpy(&w[v], weights + v * VECTOR_BYTES, sizeof w[v]);
#pragma GCC unroll 4
            for (int r = 0; r < few; r++) {
                int32_t four;
                memcpy(&four, columns + (ptrdiff_t)r * depth + i, sizeof four);
                NAME(v32) all = (NAME(v32)){0} + four;
#pragma GCC unroll 4
                for (int v = 0; v < 4; v++)
                    part[r][v] += NAME(multiply_bytes)(all, w[v]);
            }
        }
        for (int r = 0; r < few; r++)
            for (int v = 0; v < 4; v++)
                sum[r][v] += NAME(multiply_pairs)(part[r][v], (NAME(v16)){0} + 1);
    }
    for (int r = 0; r < few; r++)
        for (int v = 0; v < 4; v++)
            memcpy(sums + r * BLOCK + v * (VECTOR_BYTES / 4), &sum[r][v], sizeof sum[r][v]);
}

APART static void NAME(bytes_row)(const uint8_t *columns, int rows, int depth, int flush, const int8_t *weights,
                                  int32_t *sums)
{
    const int8_t *start = weights + (ptrdiff_t)depth * BLOCK;
    for (int c = 0; c < BLOCK; c += GROUP) {
        int r = 0;
        for (; r + TOGETHER <= rows; r += TOGETHER)
            NAME(bytes_few)(columns + (ptrdiff_t)r * depth, TOGETHER, depth, flush, weights + 4 * c, start + 4 * c,
                            sums + (ptrdiff_t)r * BLOCK + c);
        for (; r < rows; r++)
            NAME(bytes_few)(columns + (ptrdiff_t)r * depth, 1, depth, flush, weights + 4 * c, start + 4 * c,
                            sums + (ptrdiff_t)r * BLOCK + c);
    }
}
#endif

#undef TOGETHER
#undef GROUP
