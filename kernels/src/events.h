/* events.h: convolution of spikes, driven by the spikes there are; groups = 1, any window.
 *
 * Definition: kernels/reference.py:conv2d. This file agrees with it bit for bit (tests/test_kernels_bit_exact.py);
 * where the two differ, this file is wrong. The plain twin is conv.h.
 *
 * For a block of 64 inputs, an output row and a step, the spikes of all the rows its window reaches are merged into one
 * list, ordered by column, so that the window of one output is one run of that list: one branch the processor guesses
 * wrong, not one for each row. An entry is where in the block of weights its row lies, as if the window began at column
 * 0:
 *     weights [outs/64][ins/64][kx][ky][in 64][out 64]      entry = ((column*kh + ky)*64 + in)*64
 * A block of weights (36 KiB for a 3x3 window) is used for all outputs of a band of rows while it is in the L1 cache.
 * With weights of at most 5 bits, rows are added in 8 bits and moved to 16 bits every `flush` rows: flush*max|w| <= 127.
 * The even bytes of a vector are then the first half of its channels, the odd ones the second, and the weights are
 * packed in that order (native.py:_pack_events). The proof holds every partial sum inside 16 bits; where it does not,
 * rows are added in 16 bits and moved to 32 bits every `flush` rows.
 */

#define BLOCK 64
#define VECTORS (BLOCK / VECTOR_BYTES)

typedef int8_t NAME(v8) __attribute__((vector_size(VECTOR_BYTES)));
typedef int16_t NAME(v16) __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t NAME(u16) __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t NAME(v32) __attribute__((vector_size(VECTOR_BYTES)));
typedef int8_t NAME(half8) __attribute__((vector_size(VECTOR_BYTES / 2)));

/* Appends base + 64*i for each of the first `count` (at most 64) bytes that is not 0; may write 16 entries beyond. */
static inline uint32_t *NAME(append)(const uint8_t *spikes, int count, uint32_t base, const uint32_t *bits,
                                     uint32_t *to)
{
    uint64_t mask;
#if defined(__AVX512BW__)
    mask = _mm512_test_epi8_mask(_mm512_loadu_si512(spikes), _mm512_set1_epi8(-1));
#elif defined(__AVX2__)
    __m256i low = _mm256_loadu_si256((const __m256i *)spikes);
    __m256i high = _mm256_loadu_si256((const __m256i *)(spikes + 32));
    uint32_t first = (uint32_t)_mm256_movemask_epi8(_mm256_cmpgt_epi8(low, _mm256_setzero_si256()));
    uint32_t second = (uint32_t)_mm256_movemask_epi8(_mm256_cmpgt_epi8(high, _mm256_setzero_si256()));
    mask = first | (uint64_t)second << 32;
#else
    mask = 0;
    for (int word = 0; word < 8; word++) { /* a spike is 1: gather the lowest bits of 8 bytes into one */
        uint64_t eight;
        memcpy(&eight, spikes + 8 * word, sizeof eight);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        eight = __builtin_bswap64(eight);
#endif
        mask |= (((eight & 0x0101010101010101u) * 0x0102040810204080u) >> 56) << (8 * word);
    }
#endif
    if (count < BLOCK)
        mask &= ((uint64_t)1 << count) - 1;
    (void)bits;
#if defined(__AVX512BW__)
    __m512i entry = _mm512_add_epi32(
        _mm512_set1_epi32((int)base),
        _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 6));
    for (int part = 0; part < 4; part++) {
        __mmask16 here = (__mmask16)(mask >> (16 * part));
        _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(here, entry));
        to += __builtin_popcount(here);
        entry = _mm512_add_epi32(entry, _mm512_set1_epi32(16 * BLOCK));
    }
#elif defined(__AVX2__)
    for (int part = 0; part < 8; part++, mask >>= 8, base += 8 * BLOCK) {
        uint8_t here = (uint8_t)mask;
        __m256i places = _mm256_loadu_si256((const __m256i *)(bits + 8 * here));
        _mm256_storeu_si256((__m256i *)to, _mm256_add_epi32(places, _mm256_set1_epi32((int)base)));
        to += __builtin_popcount(here);
    }
#else
    while (mask != 0) {
        *to++ = base + BLOCK * (uint32_t)__builtin_ctzll(mask);
        mask &= mask - 1;
    }
#endif
    return to;
}

/* Lists of output row y for every block of inputs and step; `starts` takes, for each list, where each column begins. */
APART static uint32_t *NAME(list_row)(const frame *f, const mdsnn_op *op, const view *in, int steps, int y, const uint32_t *lists,
                                uint32_t *to, uint32_t *starts, ptrdiff_t starts_block)
{
    int blocks = (in->channels + BLOCK - 1) / BLOCK;
    for (int b = 0; b < blocks; b++)
        for (int t = 0; t < steps; t++) {
            uint32_t *start = starts + b * starts_block + (ptrdiff_t)t * (in->width + 1);
            int count = in->channels - b * BLOCK < BLOCK ? in->channels - b * BLOCK : BLOCK;
            for (int x = 0; x < in->width; x++) {
                start[x] = (uint32_t)(to - lists);
                for (int ky = 0; ky < op->kernel_height; ky++) {
                    int64_t from = (int64_t)y * op->stride + ky - op->padding;
                    if (from >= 0 && from < in->height)
                        to = NAME(append)(in->at + from * in->row + x * in->pixel + t * in->step + b * BLOCK, count,
                                          (uint32_t)((x * op->kernel_height + ky) * BLOCK * BLOCK), f->plan->bits, to);
                }
            }
            start[in->width] = (uint32_t)(to - lists);
        }
    return to;
}

static inline __attribute__((always_inline)) void NAME(add_row)(const int8_t *from, NAME(v8) *sum)
{
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) {
        NAME(v8) row;
        memcpy(&row, from + v * VECTOR_BYTES, sizeof row);
        sum[v] += row;
    }
}

/* sums[64] += the rows at weights + entry. The loops over vectors unroll, so that sums stay in registers. */
static inline void NAME(add_rows_8)(const uint32_t *entry, const uint32_t *end, const int8_t *weights, int flush,
                                    int16_t *sums)
{
    NAME(u16) total[2 * VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < 2 * VECTORS; v++)
        memcpy(&total[v], sums + v * (VECTOR_BYTES / 2), sizeof total[v]);
    while (entry < end) {
        const uint32_t *stop = end - entry < flush ? end : entry + flush;
        NAME(v8) sum[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++)
            sum[v] = (NAME(v8)){0};
#pragma GCC unroll 4
        for (; entry < stop; entry++)
            NAME(add_row)(weights + *entry, sum);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) {
            NAME(v16) pairs = (NAME(v16))sum[v];
            total[2 * v] += (NAME(u16))((NAME(v16))((NAME(u16))pairs << 8) >> 8);
            total[2 * v + 1] += (NAME(u16))(pairs >> 8);
        }
    }
#pragma GCC unroll 8
    for (int v = 0; v < 2 * VECTORS; v++)
        memcpy(sums + v * (VECTOR_BYTES / 2), &total[v], sizeof total[v]);
}

static inline void NAME(add_rows_16)(const uint32_t *entry, const uint32_t *end, const int8_t *weights, int16_t *sums)
{
    NAME(v16) total[2 * VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < 2 * VECTORS; v++)
        memcpy(&total[v], sums + v * (VECTOR_BYTES / 2), sizeof total[v]);
#pragma GCC unroll 2
    for (; entry < end; entry++)
#pragma GCC unroll 8
        for (int v = 0; v < 2 * VECTORS; v++) {
            const int8_t *row = weights + *entry + v * (VECTOR_BYTES / 2);
#if defined(__AVX512BW__)
            total[v] += (NAME(v16))_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)row));
#elif defined(__AVX2__)
            total[v] += (NAME(v16))_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)row));
#else
            NAME(half8) half;
            memcpy(&half, row, sizeof half);
            total[v] += __builtin_convertvector(half, NAME(v16));
#endif
        }
#pragma GCC unroll 8
    for (int v = 0; v < 2 * VECTORS; v++)
        memcpy(sums + v * (VECTOR_BYTES / 2), &total[v], sizeof total[v]);
}

static inline void NAME(add_rows_32)(const uint32_t *entry, const uint32_t *end, const int8_t *weights, int flush,
                                     int32_t *sums)
{
    while (entry < end) {
        const uint32_t *stop = end - entry < flush ? end : entry + flush;
        int16_t few[BLOCK];
        memset(few, 0, sizeof few);
        NAME(add_rows_16)(entry, stop, weights, few);
        for (int c = 0; c < BLOCK; c++)
            sums[c] += few[c];
        entry = stop;
    }
}

/* Adds one block of inputs to the sums [x][t][64] of one output row, int32 for EVENTS_32, else int16. */
APART static void NAME(events_row)(const mdsnn_op *op, const view *in, int width, int steps, const uint32_t *lists,
                             const uint32_t *starts, const int8_t *weights, void *sums)
{
    ptrdiff_t column = (ptrdiff_t)op->kernel_height * BLOCK * BLOCK, at = 0;
    for (int x = 0; x < width; x++) {
        int64_t from = (int64_t)x * op->stride - op->padding, to = from + op->kernel_width;
        /* the window may begin before the weights: entries make up for it, so the sum is always inside */
        uintptr_t origin = (uintptr_t)weights - (uintptr_t)(from * column);
        from = from < 0 ? 0 : from;
        to = to > in->width ? in->width : to;
        for (int t = 0; t < steps; t++, at += BLOCK) {
            const uint32_t *start = starts + (ptrdiff_t)t * (in->width + 1);
            const uint32_t *entry = lists + start[from], *end = lists + start[to];
            if (op->method == MDSNN_EVENTS_8)
                NAME(add_rows_8)(entry, end, (const int8_t *)origin, op->flush, (int16_t *)sums + at);
            else if (op->method == MDSNN_EVENTS_16)
                NAME(add_rows_16)(entry, end, (const int8_t *)origin, (int16_t *)sums + at);
            else
                NAME(add_rows_32)(entry, end, (const int8_t *)origin, op->flush, (int32_t *)sums + at);
        }
    }
}
