/* pool.h: max-pool and sum-pool, flatten, and the count of elements that are not 0.
 *
 * Definition: kernels/reference.py:max_pool, sum_pool; engine.py for flatten and the counts. This file agrees with
 * them bit for bit (tests/test_kernels_bit_exact.py); where they differ, this file is wrong.
 */

static void NAME(max_pool)(const frame *f, const mdsnn_op *op)
{
    view in = view_of(f, op->source), out = view_of(f, op->out);
    int steps = steps_of(f, op);
    for (int y = first_of(f, out.height), end = end_of(f, out.height); y < end; y++)
        for (int x = 0; x < out.width; x++)
            for (int t = 0; t < steps; t++) {
                uint8_t *to = out.at + y * out.row + x * out.pixel + t * out.step;
                memset(to, 0, (size_t)out.pitch);
                for (int ky = 0; ky < op->kernel_height; ky++) {
                    int64_t from_y = (int64_t)y * op->stride + ky - op->padding;
                    if (from_y < 0 || from_y >= in.height)
                        continue;
                    for (int kx = 0; kx < op->kernel_width; kx++) {
                        int64_t from_x = (int64_t)x * op->stride + kx - op->padding;
                        if (from_x < 0 || from_x >= in.width)
                            continue;
                        const uint8_t *from = in.at + from_y * in.row + from_x * in.pixel + t * in.step;
                        for (int c = 0; c < out.channels; c++)
                            to[c] |= from[c];
                    }
                }
            }
}

#define MDSNN_SUM_POOL(FROM, TO, FUNCTION)                                                                           \
    static void NAME(FUNCTION)(const frame *f, const mdsnn_op *op)                                                   \
    {                                                                                                                \
        view in = view_of(f, op->source), out = view_of(f, op->out);                                                 \
        int steps = steps_of(f, op);                                                                                 \
        for (int y = first_of(f, out.height), end = end_of(f, out.height); y < end; y++)                             \
            for (int x = 0; x < out.width; x++)                                                                      \
                for (int t = 0; t < steps; t++) {                                                                    \
                    TO *to = (TO *)out.at + y * out.row + x * out.pixel + t * out.step;                              \
                    memset(to, 0, sizeof *to * (size_t)out.channels);                                                \
                    for (int ky = 0; ky < op->kernel_height; ky++) {                                                 \
                        int64_t from_y = (int64_t)y * op->stride + ky - op->padding;                                 \
                        if (from_y < 0 || from_y >= in.height)                                                       \
                            continue;                                                                                \
                        for (int kx = 0; kx < op->kernel_width; kx++) {                                              \
                            int64_t from_x = (int64_t)x * op->stride + kx - op->padding;                             \
                            if (from_x < 0 || from_x >= in.width)                                                    \
                                continue;                                                                            \
                            const FROM *from =                                                                       \
                                (const FROM *)in.at + from_y * in.row + from_x * in.pixel + t * in.step;             \
                            for (int c = 0; c < out.channels; c++)                                                   \
                                to[c] = (TO)(to[c] + from[c]);                                                       \
                        }                                                                                            \
                    }                                                                                                \
                }                                                                                                    \
    }

MDSNN_SUM_POOL(int8_t, int8_t, sum_pool_8_8)
MDSNN_SUM_POOL(int8_t, int32_t, sum_pool_8_32)
MDSNN_SUM_POOL(int32_t, int32_t, sum_pool_32_32)

#undef MDSNN_SUM_POOL

static void NAME(sum_pool)(const frame *f, const mdsnn_op *op)
{
    int from = f->plan->values[op->source].type, to = f->plan->values[op->out].type;
    if (from == MDSNN_I32)
        NAME(sum_pool_32_32)(f, op);
    else if (to == MDSNN_I32)
        NAME(sum_pool_8_32)(f, op);
    else
        NAME(sum_pool_8_8)(f, op);
}

static size_t NAME(size_of)(int type) { return (size_t)1 << type; }

static void NAME(flatten)(const frame *f, const mdsnn_op *op)
{
    view in = view_of(f, op->source), out = view_of(f, op->out);
    int steps = steps_of(f, op);
    size_t size = NAME(size_of)(in.type);
    ptrdiff_t plane = (ptrdiff_t)in.height * in.width;
    for (int y = 0; y < in.height; y++)
        for (int x = 0; x < in.width; x++)
            for (int t = 0; t < steps; t++) {
                const uint8_t *from = in.at + (size_t)(y * in.row + x * in.pixel + t * in.step) * size;
                uint8_t *to = out.at + (size_t)(t * out.step + (ptrdiff_t)y * in.width + x) * size;
                for (int c = 0; c < in.channels; c++)
                    memcpy(to + (size_t)(c * plane) * size, from + (size_t)c * size, size);
            }
}

typedef uint8_t NAME(u8) __attribute__((vector_size(VECTOR_BYTES)));

static inline int64_t NAME(sum_bytes)(NAME(u8) bytes)
{
#if defined(__AVX512BW__)
    return _mm512_reduce_add_epi64(_mm512_sad_epu8((__m512i)bytes, _mm512_setzero_si512()));
#else
    int64_t sum = 0;
    for (int i = 0; i < VECTOR_BYTES; i++)
        sum += bytes[i];
    return sum;
#endif
}

/* The first `count` bytes at `from`, zeros behind them; where that takes no masks, all that a vector holds. */
static inline NAME(u8) NAME(first_bytes)(const uint8_t *from, int count)
{
#if defined(__AVX512BW__)
    return (NAME(u8))_mm512_maskz_loadu_epi8(count < 64 ? (1ull << count) - 1 : UINT64_MAX, from);
#else
    NAME(u8) row;
    (void)count;
    memcpy(&row, from, sizeof row);
    return row;
#endif
}

/* Bytes that are not 0 among `count` at `from`, and as many at each further pixel; `pitch` of each may be read. */
static int64_t NAME(count_bytes)(const uint8_t *from, ptrdiff_t pixel, ptrdiff_t pixels, int count, int pitch)
{
    int64_t there = 0;
    int c = 0;
#if defined(__AVX512BW__)
    pitch = count + VECTOR_BYTES;
#endif
    for (; c < count && c + VECTOR_BYTES <= pitch; c += VECTOR_BYTES) {
        NAME(u8) counted = ~(NAME(u8)){0};
        for (int i = count - c; i < VECTOR_BYTES; i++)
            counted[i] = 0;
        for (ptrdiff_t first = 0; first < pixels; first += 255) { /* a byte counts to 255 */
            ptrdiff_t end = first + 255 < pixels ? first + 255 : pixels;
            NAME(u8) sum = {0};
            for (ptrdiff_t p = first; p < end; p++)
                sum -= (NAME(u8))(NAME(first_bytes)(from + p * pixel + c, count - c) != 0);
            there += NAME(sum_bytes)(sum & counted);
        }
    }
    for (; c < count; c++)
        for (ptrdiff_t p = 0; p < pixels; p++)
            there += from[p * pixel + c] != 0;
    return there;
}

/* Whether a kernel counts its result while it has it at hand: spikes of tiles, a few with AVX-512 (lif.h, residual.h). */
static int NAME(counts_itself)(const frame *f, const mdsnn_op *op)
{
#if defined(__AVX512BW__)
    int narrow = op->source >= 0 && f->plan->values[op->source].type == MDSNN_I16;
    if (op->kind == MDSNN_REQUANTIZE)
        return !op->fixed;
    if (op->kind == MDSNN_LIF && narrow)
        return op->pattern && f->fresh && !f->keep && !f->call->trace_h;
#endif
    (void)f;
    return op->kind == MDSNN_FUSED && op->method == MDSNN_TILES;
}

/* Adds the counts of each step of a value that changes from step to step. Parts may do so at once. */
static inline void NAME(add_counts)(const frame *f, int index, const int64_t *counts)
{
    int counter = f->plan->values[index].counter;
    for (int t = 0; counter >= 0 && t < f->steps; t++)
        __atomic_fetch_add(&f->call->counts[(ptrdiff_t)counter * f->call->steps + f->first_step + t], counts[t],
                           __ATOMIC_RELAXED);
}

/* Adds the count of each step, of this part's rows, to `counts`; a fixed value has one. Parts may count at once. */
static void NAME(count)(const frame *f, int index, int64_t *counts)
{
    view v = view_of(f, index);
    int steps = v.step ? f->steps : 1;
    int first = first_of(f, v.height), end = end_of(f, v.height), rows = v.border ? 1 : end - first; /* in one piece */
    for (int t = 0; t < steps; t++) {
        int64_t there = 0;
        for (ptrdiff_t y = first; y < end; y += rows)
            if (v.type == MDSNN_I8)
                there += NAME(count_bytes)(v.at + y * v.row + t * v.step, v.pixel, (ptrdiff_t)rows * v.width, v.channels,
                                            v.pitch);
            else
                for (ptrdiff_t p = y * v.width; p < (y + rows) * v.width; p++)
                    for (int c = 0; c < v.channels; c++)
                        there += ((const int32_t *)v.at)[p * v.pixel + t * v.step + c] != 0;
        __atomic_fetch_add(&counts[t], there, __ATOMIC_RELAXED);
    }
}
