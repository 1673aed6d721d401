/* epilogue.h: what follows a fused convolution, a few neurons and all their steps at a time: bn, residual add, LIF.
 *
 * Definitions: kernels/reference.py:bn_affine, bn_dense, residual_add, lif_step. This file agrees with them bit for bit
 * (tests/test_kernels_bit_exact.py); where they differ, this file is wrong. The plain twins are bn.h, residual.h and
 * lif.h. The stream is 16 bits here. Values are padded to 64 channels, so whole vectors may be read and written; the
 * constants of channels that are not there are 0.
 */

#define LANES ((int)(VECTOR_BYTES / sizeof(int16_t)))

/* Narrows two vectors of 32 bits to one of 16 bits, saturating, in order. */
static inline NAME(v16) NAME(narrow)(NAME(v32) low, NAME(v32) high)
{
#if defined(__AVX512BW__)
    __m256i a = _mm512_cvtsepi32_epi16((__m512i)low), b = _mm512_cvtsepi32_epi16((__m512i)high);
    return (NAME(v16))_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
#elif defined(__AVX2__)
    return (NAME(v16))_mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)low, (__m256i)high), 0xD8);
#elif defined(__SSE2__)
    return (NAME(v16))_mm_packs_epi32((__m128i)low, (__m128i)high);
#else
    NAME(v16) out;
    for (int i = 0; i < LANES; i++) {
        int32_t v = i < LANES / 2 ? low[i] : high[i - LANES / 2];
        out[i] = (int16_t)(v < -32768 ? -32768 : v > 32767 ? 32767 : v);
    }
    return out;
#endif
}

static inline NAME(v16) NAME(clamp16)(NAME(v16) v, int limit)
{
#if defined(__AVX512BW__)
    __m512i top = _mm512_set1_epi16((short)limit), bottom = _mm512_set1_epi16((short)-limit);
    return (NAME(v16))_mm512_min_epi16(_mm512_max_epi16((__m512i)v, bottom), top);
#elif defined(__AVX2__)
    __m256i top = _mm256_set1_epi16((short)limit), bottom = _mm256_set1_epi16((short)-limit);
    return (NAME(v16))_mm256_min_epi16(_mm256_max_epi16((__m256i)v, bottom), top);
#elif defined(__SSE2__)
    __m128i top = _mm_set1_epi16((short)limit), bottom = _mm_set1_epi16((short)-limit);
    return (NAME(v16))_mm_min_epi16(_mm_max_epi16((__m128i)v, bottom), top);
#else
    for (int i = 0; i < LANES; i++)
        v[i] = (int16_t)(v[i] < -limit ? -limit : v[i] > limit ? limit : v[i]);
    return v;
#endif
}

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

/* One block of 64 outputs of `pixels` pixels from (y, x) on. sums [pixel][t][64], int32 if wide; y_row: room for them
 * in int16, for a bn that is not an affine one of 32 bits. */
APART static void NAME(epilogue)(const frame *f, const mdsnn_op *op, const NAME(lif_constants_i16) *k, const void *sums,
                           int wide, int16_t *y_row, int y, int x, int pixels, int block)
{
    const mdsnn_op *bn = op->bn, *fire = op->fire;
    int steps = steps_of(f, op), first = block * BLOCK;
    int channels = f->plan->values[fire ? fire->out : op->out].channels;
    int here = channels - first < BLOCK ? channels - first : BLOCK;
    int affine = bn->kind == MDSNN_BN_AFFINE && !bn->wide;
    if (!affine)
        NAME(bn_slow)(bn, sums, wide, (ptrdiff_t)pixels * steps, first, here, y_row);
    view other = {0}, out = {0}, spikes = {0};
    ptrdiff_t plane = 0, at = 0;
    int8_t *q = 0;
    if (op->other >= 0)
        other = view_of(f, op->other);
    if (op->out >= 0)
        out = view_of(f, op->out);
    if (fire) {
        spikes = view_of(f, fire->out);
        plane = (ptrdiff_t)spikes.height * spikes.width;
        at = (ptrdiff_t)y * spikes.width + x;
        q = (int8_t *)f->state + fire->state + at * channels + first;
    }
    for (int c = 0; c < here; c += LANES) {
        int lanes = here - c < LANES ? here - c : LANES, half = LANES / 2;
        NAME(v32) a[2], b[2], g[2];
        if (affine)
            for (int i = 0; i < 2; i++) {
                memcpy(&a[i], bn->multiplier + first + c + i * half, sizeof a[i]);
                memcpy(&b[i], bn->offset_32 + first + c + i * half, sizeof b[i]);
                memcpy(&g[i], bn->shift_32 + first + c + i * half, sizeof g[i]);
            }
        for (int p = 0; p < pixels; p++) {
            const int16_t *add = (const int16_t *)NAME(element)(&other, 2, y, x + p, first + c);
            int16_t *to = (int16_t *)NAME(element)(&out, 2, y, x + p, first + c);
            uint8_t *s = NAME(element)(&spikes, 1, y, x + p, first + c);
            NAME(vec_i16) code = {0}, decoded = {0};
            if (fire)
                decoded = NAME(lif_decoded_i16)(f, fire, k, q + (ptrdiff_t)p * channels + c, lanes);
            for (int t = 0; t < steps; t++) {
                ptrdiff_t i = ((ptrdiff_t)p * steps + t) * BLOCK + c;
                NAME(v16) v;
                if (affine) {
                    NAME(v32) low = (a[0] * NAME(load_sums)(sums, wide, i) + b[0]) >> g[0];
                    NAME(v32) high = (a[1] * NAME(load_sums)(sums, wide, i + half) + b[1]) >> g[1];
                    v = NAME(clamp16)(NAME(narrow)(low, high), bn->saturation);
                } else {
                    memcpy(&v, y_row + i, sizeof v);
                }
                if (op->other >= 0) {
                    NAME(v16) addend;
                    memcpy(&addend, add + t * other.step, sizeof addend);
                    v = (NAME(v16))((NAME(u16))v + (NAME(u16))addend);
                }
                if (op->out >= 0)
                    memcpy(to + t * out.step, &v, sizeof v);
                if (fire) {
                    NAME(vec_i16) h = (NAME(vec_i16))((NAME(u16))v + (NAME(u16))decoded);
                    NAME(vec_i16) fired = NAME(lif_fire_i16)(fire, k, h, &code, &decoded);
                    NAME(bytes_i16) narrow = __builtin_convertvector(fired, NAME(bytes_i16));
                    narrow = (NAME(bytes_i16))(narrow & 1);
                    memcpy(s + t * spikes.step, &narrow, sizeof narrow);
                    if (f->call->trace_h) {
                        NAME(bytes_i16) codes = __builtin_convertvector(code, NAME(bytes_i16));
                        NAME(lif_trace_i16)(f, fire, plane, at + p, channels, first + c, lanes, t,
                                            (const int16_t *)&h, (const int8_t *)&narrow, (const int8_t *)&codes);
                    }
                }
            }
            if (fire && f->keep) {
                NAME(bytes_i16) narrow = __builtin_convertvector(code, NAME(bytes_i16));
                memcpy(q + (ptrdiff_t)p * channels + c, &narrow, (size_t)lanes);
            }
        }
    }
}

#undef LANES
