/* follow_wide.h: residual add of a stream of 32 bits, behind bn and before a LIF that knows 16 of them.
 *
 *   x = clamp(y, -C, C) + other, 32 bits, stored;   what the LIF gets is clamp(x, -x_limit, x_limit), 16 bits
 *
 * The plan has an x_limit only where no spike and no code depends on what lies beyond (tables.py:limit_of). So the LIF
 * is the same as for a stream of 16 bits, in epilogue.h and in follow.h, which call this.
 *
 * Definition: kernels/reference.py:bn_affine, residual_add, lif_step. This file agrees with them bit for bit
 * (tests/test_kernels_bit_exact.py); where they differ, this file is wrong.
 */

/* Narrows two vectors of 32 bits to one of 16 bits, saturating, in order. */
static inline NAME(v16) NAME(narrow)(NAME(v32) low, NAME(v32) high)
{
#if defined(__AVX512BW__)
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    return (NAME(v16))_mm512_permutexvar_epi64(order, _mm512_packs_epi32((__m512i)low, (__m512i)high));
#elif defined(__AVX2__)
    return (NAME(v16))_mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)low, (__m256i)high), 0xD8);
#elif defined(__SSE2__)
    return (NAME(v16))_mm_packs_epi32((__m128i)low, (__m128i)high);
#else
    NAME(v16) out;
    const int half = VECTOR_BYTES / 4;
    for (int i = 0; i < 2 * half; i++) {
        int32_t v = i < half ? low[i] : high[i - half];
        out[i] = (int16_t)(v < -32768 ? -32768 : v > 32767 ? 32767 : v);
    }
    return out;
#endif
}

/* The first half of a vector of 16 bits as 32, or the second. */
static inline NAME(v32) NAME(widen_half)(NAME(v16) v, int second)
{
#if defined(__AVX512BW__)
    return (NAME(v32))_mm512_cvtepi16_epi32(second ? _mm512_extracti64x4_epi64((__m512i)v, 1)
                                                   : _mm512_castsi512_si256((__m512i)v));
#elif defined(__AVX2__)
    return (NAME(v32))_mm256_cvtepi16_epi32(second ? _mm256_extracti128_si256((__m256i)v, 1)
                                                   : _mm256_castsi256_si128((__m256i)v));
#else
    int16_t half __attribute__((vector_size(VECTOR_BYTES / 2)));
    memcpy(&half, (const char *)&v + (second ? sizeof half : 0), sizeof half);
    return __builtin_convertvector(half, NAME(v32));
#endif
}

/* v inside bottom..top. */
static inline NAME(v16) NAME(clamp16)(NAME(v16) v, NAME(v16) bottom, NAME(v16) top)
{
#if defined(__AVX512BW__)
    return (NAME(v16))_mm512_min_epi16(_mm512_max_epi16((__m512i)v, (__m512i)bottom), (__m512i)top);
#elif defined(__AVX2__)
    return (NAME(v16))_mm256_min_epi16(_mm256_max_epi16((__m256i)v, (__m256i)bottom), (__m256i)top);
#elif defined(__SSE2__)
    return (NAME(v16))_mm_min_epi16(_mm_max_epi16((__m128i)v, (__m128i)bottom), (__m128i)top);
#else
    for (int i = 0; i < VECTOR_BYTES / 2; i++)
        v[i] = v[i] < bottom[i] ? bottom[i] : v[i] > top[i] ? top[i] : v[i];
    return v;
#endif
}

/* v inside -limit..limit. */
static inline NAME(v32) NAME(clamp32)(NAME(v32) v, NAME(v32) limit)
{
#if defined(__AVX512BW__)
    return (NAME(v32))_mm512_min_epi32(_mm512_max_epi32((__m512i)v, (__m512i)-limit), (__m512i)limit);
#elif defined(__AVX2__)
    return (NAME(v32))_mm256_min_epi32(_mm256_max_epi32((__m256i)v, (__m256i)-limit), (__m256i)limit);
#else
    NAME(v32) over = v > limit, under = v < -limit;
    return (v & ~over & ~under) | (limit & over) | (-limit & under);
#endif
}

/* Distance in words of 16 bits, of one in elements of a stream. */
static inline ptrdiff_t NAME(in_words)(const view *v, ptrdiff_t elements)
{
    return v->type == MDSNN_I32 ? 2 * elements : elements;
}

/* What a stream of 32 bits needs beside bn and LIF. */
typedef struct NAME(wide_add) {
    int add_wide, to_wide; /* 1: what is added, or stored, has 32 bits, else 16 */
    NAME(v32) saturation;
    NAME(v16) bottom, top; /* of what the LIF gets */
} NAME(wide_add);

static inline NAME(wide_add) NAME(wide_add_of)(const mdsnn_op *op, const view *other, const view *out)
{
    NAME(wide_add) w = {other->type == MDSNN_I32, out->type == MDSNN_I32, {0}, {0}, {0}};
    w.saturation += op->bn->saturation;
    w.top += (int16_t)(op->fire ? op->fire->x_limit : 0);
    w.bottom = -w.top;
    return w;
}

/* What bn has to saturate at, in vectors of 16 bits: not where add_wide does it. */
static inline int16_t NAME(saturation)(const mdsnn_op *op)
{
    int alone = op->width == MDSNN_CLAMPED && op->fire && op->other < 0 && op->out < 0; /* the LIF alone reads it */
    int32_t limit = alone ? op->fire->x_limit : INT16_MAX;
    return (int16_t)(op->bn->saturation < limit ? op->bn->saturation : limit);
}

/* What bn gives before it saturates, 32 bits in order, + `add`, stored at `to`; returns what the LIF gets. `adds` and
 * `stores` are constants of the caller. */
static inline __attribute__((always_inline)) NAME(v16) NAME(add_wide)(const NAME(wide_add) *w, NAME(v32) low,
                                                                      NAME(v32) high, int adds, const int16_t *add,
                                                                      int stores, int16_t *to)
{
    const ptrdiff_t half = VECTOR_BYTES / 4;
    NAME(v32) more[2];
    NAME(v16) v;
    low = NAME(clamp32)(low, w->saturation);
    high = NAME(clamp32)(high, w->saturation);
    if (adds) {
        if (w->add_wide) {
            memcpy(more, add, sizeof more);
        } else {
            memcpy(&v, add, sizeof v);
            more[0] = NAME(widen_half)(v, 0);
            more[1] = NAME(widen_half)(v, 1);
        }
        low += more[0];
        high += more[1];
    }
    v = NAME(narrow)(low, high);
    if (stores && w->to_wide) {
        memcpy(to, &low, sizeof low);
        memcpy(to + 2 * half, &high, sizeof high);
    } else if (stores) {
        memcpy(to, &v, sizeof v); /* it fits */
    }
    return NAME(clamp16)(v, w->bottom, w->top);
}
