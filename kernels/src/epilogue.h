/* epilogue.h: what follows a fused convolution, a few neurons and all their steps at a time: bn, residual add, LIF.
 *
 * Definitions: kernels/reference.py:bn_affine, bn_dense, residual_add, lif_step. This file agrees with them bit for bit
 * (tests/test_kernels_bit_exact.py); where they differ, this file is wrong. The plain twins are bn.h, residual.h and
 * lif.h. The stream is 16 bits here, but for the residual add where follow_wide.h comes in. Values are padded to 64
 * channels, so whole vectors may be read and written; the constants of channels that are not there are 0.
 */

#define LANES ((int)(VECTOR_BYTES / sizeof(int16_t)))

static inline NAME(v32) NAME(load_sums)(const void *sums, int wide, ptrdiff_t at)
{
    NAME(v32) v;
    if (wide) {
        memcpy(&v, (const int32_t *)sums + at, sizeof v);
    } else {
        int16_t half __attribute__((vector_size(VECTOR_BYTES / 2)));
        memcpy(&half, (const int16_t *)sums + at, sizeof half);
        v = __builtin_convertvector(half, NAME(v32));
    }
    return v;
}

/* bn of sums [pixel][t][64] by table, or with products of 64 bits, to y in the same order; `channels` of the 64. */
APART static void NAME(bn_slow)(const mdsnn_op *bn, const void *sums, int wide, ptrdiff_t rows, int first, int channels,
                          int16_t *y)
{
    for (ptrdiff_t row = 0; row < rows; row++)
        for (int c = 0; c < channels; c++) {
            int32_t acc = wide ? ((const int32_t *)sums)[row * BLOCK + c] : ((const int16_t *)sums)[row * BLOCK + c];
            if (bn->kind == MDSNN_BN_DENSE) {
                y[row * BLOCK + c] = (int16_t)bn->table[bn->start[first + c] + acc];
            } else {
                int64_t sum = ((int64_t)bn->multiplier[first + c] * acc + bn->offset[first + c]) >> bn->shift[first + c];
                int32_t limit = bn->saturation;
                y[row * BLOCK + c] = (int16_t)(sum < -limit ? -limit : sum > limit ? limit : sum);
            }
        }
}

/* Element (y, x, first step, c) of a value of `size` bytes an element; null where the value is absent. */
static inline uint8_t *NAME(element)(const view *v, ptrdiff_t size, int y, int x, int c)
{
    return v->at ? v->at + (y * v->row + x * v->pixel + c) * size : 0;
}

/* What the lanes of a few channels of one row share. */
typedef struct NAME(lanes) {
    const frame *f;
    const mdsnn_op *fire;
    const NAME(lif_constants_i16) *k;
    const void *sums; /* the row's first element of these lanes; [pixel][t][64] */
    const int16_t *y_row;
    const int16_t *add;
    int16_t *to;
    uint8_t *s;
    int8_t *q;
    ptrdiff_t add_pixel, add_step, to_pixel, to_step, s_pixel, s_step, plane, at;
    int steps, wide, lanes, channels, c, affine, short_product, trace, keep, clamped;
    NAME(wide_add) sum; /* for a stream of 32 bits */
    NAME(v32) a0, a1, b0, b1, g0, g1;
    NAME(v16) bottom, top;
} NAME(lanes);

/* All steps of `many` pixels from p on. Several at once, since the steps of one pixel wait for each other. The last
 * arguments are constants of the caller, so that each use is compiled for its own case; `common` says: an affine bn,
 * a LIF that is lif_common or none, no trace and nothing to keep. */
static inline __attribute__((always_inline)) void NAME(epilogue_pixels)(const NAME(lanes) *e, int p, int many,
                                                                        int common, int adds, int stores, int fires)
{
    const int half = LANES / 2;
    NAME(vec_i16) code[2] = {{0}}, decoded[2] = {{0}};
    if (fires)
        for (int j = 0; j < many; j++)
            decoded[j] = NAME(lif_decoded_i16)(e->f, e->fire, e->k, e->q + (ptrdiff_t)(p + j) * e->channels, e->lanes);
    for (int t = 0; t < e->steps; t++) {
        NAME(vec_i16) h[2] = {{0}};
#pragma GCC unroll 2
        for (int j = 0; j < many; j++) {
            ptrdiff_t i = ((ptrdiff_t)(p + j) * e->steps + t) * BLOCK;
            const int16_t *add = adds ? e->add + (p + j) * e->add_pixel + t * e->add_step : 0;
            int16_t *to = stores ? e->to + (p + j) * e->to_pixel + t * e->to_step : 0;
            const int clamped = (adds || stores) && e->clamped;
            NAME(v16) v;
            if (common || e->affine) {
                NAME(v32) low = NAME(load_sums)(e->sums, e->wide, i), high = NAME(load_sums)(e->sums, e->wide, i + half);
                if (e->short_product) { /* half the work of a product of 32 bits */
                    low = NAME(multiply_pairs)((NAME(v16))low, (NAME(v16))e->a0);
                    high = NAME(multiply_pairs)((NAME(v16))high, (NAME(v16))e->a1);
                } else {
                    low *= e->a0;
                    high *= e->a1;
                }
                low = (low + e->b0) >> e->g0;
                high = (high + e->b1) >> e->g1;
                if (clamped)
                    v = NAME(add_wide)(&e->sum, low, high, adds, add, stores, to);
                else
                    v = NAME(clamp16)(NAME(narrow)(low, high), e->bottom, e->top);
            } else {
                memcpy(&v, e->y_row + i, sizeof v);
                if (clamped)
                    v = NAME(add_wide)(&e->sum, NAME(widen_half)(v, 0), NAME(widen_half)(v, 1), adds, add, stores, to);
            }
            if (adds && !clamped) {
                NAME(v16) addend;
                memcpy(&addend, add, sizeof addend);
                v = (NAME(v16))((NAME(u16))v + (NAME(u16))addend);
            }
            if (stores && !clamped)
                memcpy(to, &v, sizeof v);
            if (fires)
                h[j] = (NAME(vec_i16))((NAME(u16))v + (NAME(u16))decoded[j]);
        }
        if (!fires)
            continue;
#if defined(__AVX2__) && !defined(__AVX512BW__)
        if (common) {
            if (many == 1)
                h[1] = h[0];
            __m256i spikes = NAME(lif_two)(e->fire, e->k, h, decoded);
            uint8_t *s = e->s + p * e->s_pixel + t * e->s_step;
            _mm_storeu_si128((__m128i *)s, _mm256_castsi256_si128(spikes));
            if (many == 2)
                _mm_storeu_si128((__m128i *)(s + e->s_pixel), _mm256_extracti128_si256(spikes, 1));
            continue;
        }
#endif
#pragma GCC unroll 2
        for (int j = 0; j < many; j++) {
            NAME(vec_i16) fired = NAME(lif_fire_i16)(e->fire, e->k, common, h[j], &code[j], &decoded[j]);
            NAME(bytes_i16) narrow = __builtin_convertvector(fired, NAME(bytes_i16));
            narrow = (NAME(bytes_i16))(narrow & 1);
            memcpy(e->s + (p + j) * e->s_pixel + t * e->s_step, &narrow, sizeof narrow);
            if (!common && e->trace) {
                NAME(bytes_i16) codes = __builtin_convertvector(code[j], NAME(bytes_i16));
                NAME(lif_trace_i16)(e->f, e->fire, e->plane, e->at + p + j, e->channels, e->c, e->lanes, t,
                                    (const int16_t *)&h[j], (const int8_t *)&narrow, (const int8_t *)&codes);
            }
        }
    }
    if (!common && fires && e->keep)
        for (int j = 0; j < many; j++) {
            NAME(bytes_i16) narrow = __builtin_convertvector(code[j], NAME(bytes_i16));
            memcpy(e->q + (ptrdiff_t)(p + j) * e->channels, &narrow, (size_t)e->lanes);
        }
}

static inline __attribute__((always_inline)) void NAME(epilogue_row)(const NAME(lanes) *e, int pixels, int common,
                                                                     int adds, int stores, int fires)
{
    int p = 0;
    for (; p + 2 <= pixels; p += 2)
        NAME(epilogue_pixels)(e, p, 2, common, adds, stores, fires);
    if (p < pixels)
        NAME(epilogue_pixels)(e, p, 1, common, adds, stores, fires);
}

static void NAME(epilogue_wide)(const frame *f, const mdsnn_op *op, const void *sums, int wide, int32_t *y_row, int y,
                                int x, int pixels, int first, int most);

/* At most `most` of 64 outputs from `first` on, of `pixels` pixels from (y, x) on. sums [pixel][t][64], int32 if wide;
 * y_row: room for them in int16, for a bn that is not an affine one of 32 bits; in int32, unless the op is narrow. */
APART static void NAME(epilogue)(const frame *f, const mdsnn_op *op, const NAME(lif_constants_i16) *k,
                                 const void *sums, int wide, int16_t *y_row, int y, int x, int pixels, int first,
                                 int most)
{
    if (op->width == MDSNN_WIDE || (op->width == MDSNN_CLAMPED && f->call->trace_h)) {
        NAME(epilogue_wide)(f, op, sums, wide, (int32_t *)(void *)y_row, y, x, pixels, first, most);
        return;
    }
    const mdsnn_op *bn = op->bn, *fire = op->fire;
    int steps = steps_of(f, op);
    int channels = f->plan->values[fire ? fire->out : op->out].channels;
    int here = channels - first < most ? channels - first : most;
    const int adds = op->other >= 0, stores = op->out >= 0, fires = fire != 0;
    view other = {0}, out = {0}, spikes = {0};
    NAME(lanes) e;
    memset(&e, 0, sizeof e);
    e.affine = bn->kind == MDSNN_BN_AFFINE && !bn->wide;
    if (!e.affine)
        NAME(bn_slow)(bn, sums, wide, (ptrdiff_t)pixels * steps, first, here, y_row);
    if (adds)
        other = view_of(f, op->other);
    if (stores)
        out = view_of(f, op->out);
    if (fires) {
        spikes = view_of(f, fire->out);
        e.plane = (ptrdiff_t)spikes.height * spikes.width;
        e.at = (ptrdiff_t)y * spikes.width + x;
    }
    e.f = f;
    e.fire = fire;
    e.k = k;
    e.add_pixel = NAME(in_words)(&other, other.pixel);
    e.add_step = NAME(in_words)(&other, other.step);
    e.to_pixel = NAME(in_words)(&out, out.pixel);
    e.to_step = NAME(in_words)(&out, out.step);
    e.clamped = op->width == MDSNN_CLAMPED;
    e.sum = NAME(wide_add_of)(op, &other, &out);
    e.s_pixel = spikes.pixel;
    e.s_step = spikes.step;
    e.steps = steps;
    e.wide = wide;
    e.channels = channels;
    e.short_product = bn->short_product;
    e.trace = f->call->trace_h != 0;
    e.keep = f->keep;
    e.top = (NAME(v16)){0} + NAME(saturation)(op);
    e.bottom = -e.top;
    const int common = e.affine && !e.trace && !e.keep && (!fires || NAME(lif_common_i16)(fire));
    for (int c = 0; c < here; c += LANES) {
        e.c = first + c;
        e.lanes = here - c < LANES ? here - c : LANES;
        e.sums = wide ? (const void *)((const int32_t *)sums + c) : (const void *)((const int16_t *)sums + c);
        e.y_row = y_row + c;
        e.add = (const int16_t *)NAME(element)(&other, 1 << other.type, y, x, e.c);
        e.to = (int16_t *)NAME(element)(&out, 1 << out.type, y, x, e.c);
        e.s = NAME(element)(&spikes, 1, y, x, e.c);
        e.q = fires ? (int8_t *)f->state + fire->state + e.at * channels + e.c : 0;
        if (e.affine) {
            memcpy(&e.a0, bn->multiplier + e.c, sizeof e.a0);
            memcpy(&e.a1, bn->multiplier + e.c + LANES / 2, sizeof e.a1);
            memcpy(&e.b0, bn->offset_32 + e.c, sizeof e.b0);
            memcpy(&e.b1, bn->offset_32 + e.c + LANES / 2, sizeof e.b1);
            memcpy(&e.g0, bn->shift_32 + e.c, sizeof e.g0);
            memcpy(&e.g1, bn->shift_32 + e.c + LANES / 2, sizeof e.g1);
            if (e.short_product) { /* as pairs of 16 bits: the multiplier and 0 */
                e.a0 &= 0xFFFF;
                e.a1 &= 0xFFFF;
            }
        }
        const NAME(lanes) fixed = e; /* a copy the stores below cannot change, so that it may stay in registers */
        if (common && fires && !adds && !stores)
            NAME(epilogue_row)(&fixed, pixels, 1, 0, 0, 1);
        else if (common && fires && adds && stores)
            NAME(epilogue_row)(&fixed, pixels, 1, 1, 1, 1);
        else if (common && fires && adds)
            NAME(epilogue_row)(&fixed, pixels, 1, 1, 0, 1);
        else if (common && !fires && !adds)
            NAME(epilogue_row)(&fixed, pixels, 1, 0, 1, 0);
        else
            NAME(epilogue_row)(&fixed, pixels, 0, adds, stores, fires);
    }
}

#undef LANES
