/* events.h: convolution of spikes, driven by the spikes there are; any window, groups.
 *
 * Definition: kernels/reference.py:conv2d. This file agrees with it bit for bit (tests/test_kernels_bit_exact.py);
 * where the two differ, this file is wrong. The plain twin is conv.h.
 *
 * A slab is 64 inputs under at most three rows of the window. For a slab, an output row, a column of the input and a
 * step, the spikes of those rows make one list of bytes: 64*row + input. Each entry names a row of weights for each
 * window that the column lies under, and these rows lie together: one entry, three rows of 64 outputs for a 3x3 window,
 * so that a load of an entry, and a branch that the processor guesses wrong, serve three windows.
 *     weights [outs/64][ins/64][rows of the window/3][taps][row of 3][in 64][tap][out 64]
 * Of groups, a block of outputs has weights of the blocks of inputs that its groups lie in, from `own_first` on; 0 for
 * those of other groups.
 * With a stride s, taps kx, kx+s, ... share their columns; `taps` counts groups of at most three of these. After the
 * last input comes a row of zeros, with which lists are filled up to a multiple of four entries. A slab of weights
 * (36 KiB for a 3x3 window) is used for all outputs of a band of rows while it is in the L1 cache.
 *
 * Two ways to add 64 weights, half a vector's channels in its even bytes and half in its odd ones
 * (packing.py:pack_events):
 * - In 8 bits, moved to 16 bits every `flush` entries; packing.py finds from the weights how many fit.
 * - For larger weights, words a = 256*odd + (even + 128) are added in 16 bits, wherever they wrap, and so are the odd
 *   bytes alone, b. Then the odd ones sum to b, and the even ones to a - 256*b - 128*entries, modulo 2**16: exact, since
 *   192 weights of 8 bits fit 16.
 * Sums of 16 bits move to 32 every `widen` slabs, where the proof asks for it; plan.py finds how many from the weights.
 * Sums of a row have windows to spare at both ends, for columns that lie under windows that are not there.
 */

#define BLOCK 64
#define VECTORS (BLOCK / VECTOR_BYTES)
#define TAPS 3 /* windows at a time */
#define ROWS 3 /* of the window in a slab: entries fit a byte */
#define FILL 4
#define WIDE_TAPS (VECTOR_BYTES == 16 ? 1 : TAPS) /* at a time in 16 bits, as many as there are registers for */

typedef int8_t NAME(v8) __attribute__((vector_size(VECTOR_BYTES)));
typedef uint8_t NAME(u8) __attribute__((vector_size(VECTOR_BYTES)));
typedef int16_t NAME(v16) __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t NAME(u16) __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t NAME(v32) __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t NAME(u32) __attribute__((vector_size(VECTOR_BYTES)));

/* A layer's windows along a row. */
typedef struct NAME(events) {
    int steps, blocks, slabs, outs; /* steps; blocks of inputs; slabs; blocks of outputs */
    int groups, own;                /* slabs of a block of inputs; slabs that a block of outputs reads */
    int left, across;               /* windows to spare before the first; windows in all */
    int ring;                       /* rows of spikes kept */
    ptrdiff_t spots_row;            /* columns by steps by blocks */
    uint8_t *spots, *found;
} NAME(events);

static inline int NAME(slab_rows)(const mdsnn_op *op, int slab)
{
    int groups = (op->kernel_height + ROWS - 1) / ROWS, left = op->kernel_height - slab % groups * ROWS;
    return left < ROWS ? left : ROWS;
}

/* Bytes of a slab of so many rows, up to what nibbles are packed in. */
static inline ptrdiff_t NAME(slab_bytes)(const mdsnn_op *op, int rows)
{
    ptrdiff_t bytes = (ptrdiff_t)(rows * BLOCK + 1) * op->kernel_width * BLOCK;
    return (bytes + 2 * BLOCK - 1) / (2 * BLOCK) * (2 * BLOCK);
}

/* Where a slab lies among those of a block of outputs. */
static inline ptrdiff_t NAME(slab_at)(const mdsnn_op *op, int slab)
{
    int full = op->kernel_height / ROWS, groups = (op->kernel_height + ROWS - 1) / ROWS;
    ptrdiff_t all = full * NAME(slab_bytes)(op, ROWS) + (groups - full) * NAME(slab_bytes)(op, op->kernel_height % ROWS);
    return slab / groups * all + slab % groups * NAME(slab_bytes)(op, ROWS);
}

/* Weights of 4 bits, two a byte and 8 more than they are, to one a byte; of each 128 the first 64 are in the lower
 * halves. They come from a far cache, or from memory, in half the time. */
APART static void NAME(unpack)(const int8_t *packed, ptrdiff_t bytes, int8_t *to)
{
    for (; bytes > 0; bytes -= 2 * BLOCK, to += 2 * BLOCK, packed += BLOCK)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) {
            NAME(u16) both, mask = (NAME(u16)){0} + 0x0F0F;
            memcpy(&both, packed + v * VECTOR_BYTES, sizeof both);
            NAME(u8) low = (NAME(u8))(both & mask) - 8, high = (NAME(u8))(both >> 4 & mask) - 8;
            memcpy(to + v * VECTOR_BYTES, &low, sizeof low);
            memcpy(to + BLOCK + v * VECTOR_BYTES, &high, sizeof high);
        }
}

/* Bits of the first `count` (at most 64) bytes that are not 0: spikes are 0 or 1. */
static inline uint64_t NAME(spike_mask)(const uint8_t *spikes, int count)
{
    uint64_t mask;
#if defined(__AVX512BW__)
    mask = _mm512_test_epi8_mask(_mm512_loadu_si512(spikes), _mm512_set1_epi8(-1));
#elif defined(__AVX2__)
    __m256i low = _mm256_loadu_si256((const __m256i *)spikes);
    __m256i high = _mm256_loadu_si256((const __m256i *)(spikes + 32));
    uint32_t first = (uint32_t)_mm256_movemask_epi8(_mm256_slli_epi16(low, 7));
    uint32_t second = (uint32_t)_mm256_movemask_epi8(_mm256_slli_epi16(high, 7));
    mask = first | (uint64_t)second << 32;
#else
    mask = 0;
    for (int word = 0; word < 8; word++) { /* gather the lowest bits of 8 bytes into one */
        uint64_t eight;
        memcpy(&eight, spikes + 8 * word, sizeof eight);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        eight = __builtin_bswap64(eight);
#endif
        mask |= (((eight & 0x0101010101010101u) * 0x0102040810204080u) >> 56) << (8 * word);
    }
#endif
    return count < BLOCK ? mask & (((uint64_t)1 << count) - 1) : mask;
}

/* Appends i for each bit i of the mask; may write up to 64 entries, whatever their number. */
static inline uint8_t *NAME(append)(uint64_t mask, const uint8_t *bits, uint8_t *to)
{
    uint64_t first = 0;
#pragma GCC unroll 8
    for (int part = 0; part < 8; part++, mask >>= 8, first += 0x0808080808080808u) {
        uint64_t places;
        memcpy(&places, bits + 8 * (mask & 255), sizeof places);
        places += first;
        memcpy(to, &places, sizeof places);
#if defined(__POPCNT__)
        to += __builtin_popcount((unsigned)mask & 255);
#else
        to += bits[8 * 256 + (mask & 255)];
#endif
    }
    return to;
}

/* The places of the spikes of rows `from` to `to` of the input, in order: 64 bytes of `spots` and one of `found` for
 * each column, step and block. Row y lies at y modulo `ring`. */
APART static void NAME(find_spikes)(const frame *f, const view *in, const NAME(events) *e, int from, int to)
{
    for (int y = from; y < to; y++) {
        ptrdiff_t at = (ptrdiff_t)(y % e->ring) * e->spots_row;
        const uint8_t *pixel = in->at + y * in->row;
        for (int x = 0; x < in->width; x++, pixel += in->pixel)
            for (int t = 0; t < e->steps; t++)
                for (int c = 0; c < in->channels; c += BLOCK, at++) {
                    uint64_t mask = NAME(spike_mask)(pixel + t * in->step + c, in->channels - c);
                    uint8_t *spots = e->spots + at * BLOCK;
                    e->found[at] = (uint8_t)(NAME(append)(mask, f->plan->bits, spots) - spots);
                }
    }
}

/* Lists of output row y, [slab][x][step]; `starts` takes where each begins and, for each slab, where the last ends. */
APART static uint8_t *NAME(list_row)(const mdsnn_op *op, const view *in, const NAME(events) *e, int y,
                                     const uint8_t *lists, uint8_t *to, uint32_t *starts, ptrdiff_t starts_slab)
{
    int groups = (op->kernel_height + ROWS - 1) / ROWS;
    for (int slab = 0; slab < e->slabs; slab++) {
        int rows = NAME(slab_rows)(op, slab), there = 0;
        uint32_t *start = starts + slab * starts_slab;
        ptrdiff_t from[ROWS];
        uint8_t base[ROWS];
        for (int row = 0; row < rows; row++) {
            int64_t from_y = (int64_t)y * op->stride + slab % groups * ROWS + row - op->padding;
            if (from_y < 0 || from_y >= in->height)
                continue; /* padding */
            from[there] = (ptrdiff_t)(from_y % e->ring) * e->spots_row + slab / groups;
            base[there++] = (uint8_t)(row * BLOCK);
        }
        for (ptrdiff_t at = 0; at < e->spots_row; at += e->blocks) {
            *start++ = (uint32_t)(to - lists);
            for (int row = 0; row < there; row++) {
                const uint8_t *spots = e->spots + (from[row] + at) * BLOCK;
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; v++) {
                    NAME(u8) some;
                    memcpy(&some, spots + v * VECTOR_BYTES, sizeof some);
                    some += base[row];
                    memcpy(to + v * VECTOR_BYTES, &some, sizeof some);
                }
                to += e->found[from[row] + at];
            }
            memset(to, rows * BLOCK, FILL);
            to += (lists - to) & (FILL - 1);
        }
        *start = (uint32_t)(to - lists);
    }
    return to;
}

/* Has a vector loaded once, into a register: the compiler would read it again for each use. */
#if defined(__AVX512F__)
#define HOLD(vector) __asm__("" : "+v"(vector))
#elif defined(__SSE2__) && defined(__GNUC__)
#define HOLD(vector) __asm__("" : "+x"(vector))
#else
#define HOLD(vector)
#endif

static inline __attribute__((always_inline)) void NAME(add_row)(const int8_t *from, NAME(v8) *sum)
{
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) {
        NAME(v8) row;
        memcpy(&row, from + v * VECTOR_BYTES, sizeof row);
        sum[v] += row;
    }
}

/* sums += the channels of one vector, the even bytes' in `even`, the odd ones' in `odd`. */
static inline __attribute__((always_inline)) void NAME(add_words)(NAME(u16) even, NAME(u16) odd, int16_t *sums)
{
    NAME(u16) words[2] = {even, odd};
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        NAME(u16) total;
        memcpy(&total, sums + i * (VECTOR_BYTES / 2), sizeof total);
        total += words[i];
        memcpy(sums + i * (VECTOR_BYTES / 2), &total, sizeof total);
    }
}

/* Adds the rows listed from `entry` to `end` to the sums of `taps` windows, at sums, sums - next, ... */
static inline __attribute__((always_inline)) void NAME(add_rows_8)(const uint8_t *entry, const uint8_t *end,
                                                                   const int8_t *weights, int taps, int flush,
                                                                   int16_t *sums, ptrdiff_t next)
{
    do {
        const uint8_t *stop = end - entry < flush ? end : entry + flush;
        NAME(v8) sum[TAPS][VECTORS];
#pragma GCC unroll 3
        for (int k = 0; k < taps; k++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++)
                sum[k][v] = (NAME(v8)){0};
        for (; entry < stop; entry += FILL)
#pragma GCC unroll 4
            for (int i = 0; i < FILL; i++) {
                const int8_t *row = weights + entry[i] * (ptrdiff_t)(taps * BLOCK);
#pragma GCC unroll 3
                for (int k = 0; k < taps; k++)
                    NAME(add_row)(row + k * BLOCK, sum[k]);
            }
#pragma GCC unroll 3
        for (int k = 0; k < taps; k++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) {
                NAME(v16) pairs = (NAME(v16))sum[k][v];
                NAME(add_words)((NAME(u16))((NAME(v16))((NAME(u16))pairs << 8) >> 8), (NAME(u16))(pairs >> 8),
                                sums - k * next + v * VECTOR_BYTES);
            }
    } while (entry < end);
}

/* The same for weights of up to 8 bits, rows of them `pitch` bytes apart. */
static inline __attribute__((always_inline)) void NAME(add_rows_16)(const uint8_t *entry, const uint8_t *end,
                                                                    const int8_t *weights, ptrdiff_t pitch, int taps,
                                                                    int16_t *sums, ptrdiff_t next)
{
    NAME(u16) all[TAPS][VECTORS], odd[TAPS][VECTORS];
    const NAME(u16) bias = (NAME(u16)){0} + (uint16_t)(128 * (end - entry));
#pragma GCC unroll 3
    for (int k = 0; k < taps; k++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) {
            all[k][v] = -bias;
            odd[k][v] = (NAME(u16)){0};
        }
    for (; entry < end; entry++) {
        const int8_t *row = weights + *entry * pitch;
#pragma GCC unroll 3
        for (int k = 0; k < taps; k++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) {
                NAME(v16) words;
                memcpy(&words, row + k * BLOCK + v * VECTOR_BYTES, sizeof words);
                HOLD(words);
                all[k][v] += (NAME(u16))words;
                odd[k][v] += (NAME(u16))(words >> 8);
            }
    }
#pragma GCC unroll 3
    for (int k = 0; k < taps; k++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++)
            NAME(add_words)(all[k][v] - (odd[k][v] << 8), odd[k][v], sums - k * next + v * VECTOR_BYTES);
}

/* The columns under one group of taps: from column `x` on, every stride-th, whose first window is at sums. */
static inline __attribute__((always_inline)) void NAME(events_taps)(const mdsnn_op *op, int method, int taps,
                                                                    const view *in, int x, int steps,
                                                                    const uint8_t *lists, const uint32_t *starts,
                                                                    const int8_t *weights, int16_t *sums)
{
    const ptrdiff_t next = (ptrdiff_t)steps * BLOCK;
    const int flush = op->flush, stride = op->stride, width = in->width;
    for (; x < width; x += stride)
        for (int t = 0; t < steps; t++, sums += BLOCK) {
            const uint32_t *start = starts + (ptrdiff_t)x * steps + t;
            const uint8_t *entry = lists + start[0], *end = lists + start[1];
            if (entry == end)
                continue;
            if (method == MDSNN_EVENTS_8)
                NAME(add_rows_8)(entry, end, weights, taps, flush, sums, next);
            else
                for (int k = 0; k < taps; k += WIDE_TAPS)
                    NAME(add_rows_16)(entry, end, weights + k * BLOCK, taps * BLOCK,
                                      taps - k < WIDE_TAPS ? taps - k : WIDE_TAPS, sums - k * next, next);
        }
}

/* Adds one slab of inputs to the sums [window][t][64] of one output row. */
APART static void NAME(events_row)(const mdsnn_op *op, const view *in, const NAME(events) *e, int slab,
                                   const uint8_t *lists, const uint32_t *starts, const int8_t *weights, int16_t *sums)
{
    const int stride = op->stride, classes = stride < op->kernel_width ? stride : op->kernel_width;
    const ptrdiff_t window = (ptrdiff_t)e->steps * BLOCK;
    const ptrdiff_t tap = (ptrdiff_t)(NAME(slab_rows)(op, slab) * BLOCK + 1) * BLOCK;
    for (int class = 0; class < classes; class++) {
        int taps = (op->kernel_width - class + stride - 1) / stride, x = class - op->padding;
        x = x < 0 ? (stride - -x % stride) % stride : x; /* the first column of this class */
        for (int first = 0; first < taps; first += TAPS) {
            int together = taps - first < TAPS ? taps - first : TAPS;
            int16_t *at = sums + (e->left + (x + op->padding - class) / stride - first) * window;
#define MDSNN_EVENTS_TAPS(METHOD)                                                                                    \
    if (together == 3)                                                                                               \
        NAME(events_taps)(op, METHOD, 3, in, x, e->steps, lists, starts, weights, at);                               \
    else if (together == 2)                                                                                          \
        NAME(events_taps)(op, METHOD, 2, in, x, e->steps, lists, starts, weights, at);                               \
    else                                                                                                             \
        NAME(events_taps)(op, METHOD, 1, in, x, e->steps, lists, starts, weights, at)
            if (op->method == MDSNN_EVENTS_8) {
                MDSNN_EVENTS_TAPS(MDSNN_EVENTS_8);
            } else {
                MDSNN_EVENTS_TAPS(MDSNN_EVENTS_16);
            }
#undef MDSNN_EVENTS_TAPS
            weights += tap * together;
        }
    }
}

/* Moves `count` sums, a multiple of 64, to 32 bits: the first time, or added to what is there. Leaves 0. */
APART static void NAME(widen)(int16_t *sums, ptrdiff_t count, int first, int32_t *totals)
{
    for (ptrdiff_t i = 0; i < count; i++) {
        totals[i] = (first ? 0 : totals[i]) + sums[i];
        sums[i] = 0;
    }
}

/* The first block of inputs that block o of `outs` outputs reads. */
static inline int NAME(own_first)(const mdsnn_op *op, const view *in, int o, int outs)
{
    int first = o * BLOCK / (outs / op->groups) * (in->channels / op->groups) / BLOCK;
    int last = (in->channels + BLOCK - 1) / BLOCK - op->span;
    return first < last ? first : last;
}

static NAME(events) NAME(events_prepare)(const mdsnn_op *op, const view *in, int outs, int width, int steps,
                                        uint8_t *spots)
{
    NAME(events) e;
    int last = (in->width - 1 + op->padding) / op->stride; /* the last window that a column lies under */
    e.steps = steps;
    e.blocks = (in->channels + BLOCK - 1) / BLOCK;
    e.groups = (op->kernel_height + ROWS - 1) / ROWS;
    e.slabs = e.blocks * e.groups;
    e.own = op->span * e.groups;
    e.outs = (outs + BLOCK - 1) / BLOCK;
    e.left = (op->kernel_width - 1) / op->stride;
    e.across = e.left + (last < width ? width : last + 1);
    e.ring = (op->band - 1) * op->stride + op->kernel_height;
    e.spots_row = (ptrdiff_t)in->width * steps * e.blocks;
    e.spots = spots;
    e.found = spots + e.ring * e.spots_row * BLOCK;
    return e;
}

#undef TAPS
#undef ROWS
#undef FILL
#undef WIDE_TAPS
#undef HOLD
