/* lif.h: leaky integrate-and-fire on membrane codes, in integers.
 *
 *   h = x + decode[q + top];   s = h > v_th;   u = s ? (0 or h - v_soft) : h;   q = code(u)          (post_reset)
 *   h = x + decode[q + top];   q = code(h);    s = q > q_th;   q = 0 where s                         (pre_fire)
 *   code(u) = code_first + the number of thresholds that are <= u
 *
 * Definition: kernels/reference.py:lif_step. This file agrees with it bit for bit
 * (tests/test_kernels_bit_exact.py); where the two differ, this file is wrong.
 *
 * All steps of a few neurons come before the next neurons, so that their membranes stay in registers. With few
 * thresholds left (see plan.py) a comparison each is cheaper than a search, and decode[q] is a running sum of the
 * table's increments, or a byte shuffle where there is one (AVX2). Where AVX-512 can permute 32 words, one comparison is
 * enough: with the threshold of u's bucket. With many thresholds a line under u's cell has their steps, also by
 * permutations; without such lines each lane looks its code up in a dense table, or bisects where that table would be too
 * large. A LIF behind what is the same at every step (the stem of an image) has the spikes of all its steps at once: by
 * comparisons where they change at few places, else from a table.
 * Sums of vectors are unsigned: they wrap, and the result is proven to fit.
 */

#define LANES ((int)(VECTOR_BYTES / sizeof(STREAM)))

typedef STREAM STREAM_NAME(vec) __attribute__((vector_size(VECTOR_BYTES)));
typedef USTREAM STREAM_NAME(uvec) __attribute__((vector_size(VECTOR_BYTES)));
typedef int8_t STREAM_NAME(bytes) __attribute__((vector_size(VECTOR_BYTES / sizeof(STREAM))));

#if defined(STREAM_IS_NARROW) && defined(__AVX512BW__)
/* Lines of membranes (mdsnn.h). */
typedef struct NAME(lines) {
    __m512i slope[2], offset[2], each, shift, fraction, mask, rest, factor;
} NAME(lines);

/* What membranes decode to, both with the bias: x is above the base. */
static inline __attribute__((always_inline)) __m512i NAME(line_decoded)(const NAME(lines) *k, __m512i x)
{
    __m512i i = _mm512_mulhi_epu16(x, k->each); /* of 64: permutations take no notice of the bits above */
    __m512i slope = _mm512_permutex2var_epi16(k->slope[0], i, k->slope[1]);
    __m512i offset = _mm512_permutex2var_epi16(k->offset[0], i, k->offset[1]);
    __m512i y = _mm512_add_epi16(_mm512_mulhi_epu16(_mm512_sllv_epi16(x, k->shift), slope), offset);
    y = _mm512_ternarylogic_epi32(_mm512_srlv_epi16(y, k->fraction), k->mask, k->rest, 0xEA); /* y & mask | rest */
    return _mm512_mulhi_epu16(y, k->factor);
}
#endif

typedef struct STREAM_NAME(lif_constants) {
    STREAM_NAME(vec) below[MDSNN_MAX_COMPARED]; /* each threshold - 1: u >= threshold is u > below */
    STREAM_NAME(uvec) increment[MDSNN_MAX_COMPARED]; /* of decode, from one code to the next */
    STREAM_NAME(vec) v_th, v_soft, q_th, code_first, decode_first, decode_zero;
#if defined(STREAM_IS_NARROW) && defined(__AVX512BW__)
    __m512i bucket_threshold, bucket_code, bucket_decode, bucket_base;
    __m128i bucket_shift;
    __m512i line_base, line_bias;
    NAME(lines) lines;
#elif defined(STREAM_IS_NARROW) && defined(__AVX2__)
    __m256i decode_low, decode_high; /* bytes of what the first code left and its followers decode to */
    __m256i cell_below_low, cell_below_high, cell_decode_low, cell_decode_high; /* bytes; each threshold - 1 */
    __m256i cell_base, cell_span, cell_factor;
    __m256i table_base, table_last; /* of the table of codes */
#endif
} STREAM_NAME(lif_constants);

static inline STREAM_NAME(vec) STREAM_NAME(splat)(int32_t value)
{
    STREAM_NAME(vec) v = {0};
    return v + (STREAM)value;
}

/* Code of one u by table or bisection. */
static inline int32_t STREAM_NAME(lif_code)(const mdsnn_op *op, int32_t u)
{
    if (op->search == MDSNN_TABLE) {
        int32_t i = u - op->code_base;
        i = i < 0 ? 0 : i;
        return op->code[i < op->code_count ? i : op->code_count - 1];
    }
    int32_t from = 0, to = op->thresholds; /* thresholds before `from` are <= u, those from `to` on are not */
    while (from < to) {
        int32_t middle = (from + to) / 2;
        if (op->threshold[middle] <= u)
            from = middle + 1;
        else
            to = middle;
    }
    return op->code_first + from;
}

/* Whether a LIF is one that lif_fire has a short way for: hard reset, post_reset, thresholds few, in buckets or cells,
 * under lines, or, where a vector can look up, in a table that words can count. */
static inline int STREAM_NAME(lif_common)(const mdsnn_op *op)
{
    if (op->pre_fire || op->soft)
        return 0;
#if defined(STREAM_IS_NARROW) && defined(__AVX512BW__)
    return op->buckets || op->lines || (op->search == MDSNN_TABLE && op->code_count <= INT16_MAX);
#elif defined(STREAM_IS_NARROW) && defined(__AVX2__)
    return op->cells || (op->search == MDSNN_TABLE && op->code_count <= INT16_MAX);
#else
    return op->search == MDSNN_COMPARE && op->thresholds < 16;
#endif
}

/* Codes of u, and what they decode to. `common` is a constant of the caller: 1 says lif_common, and that the codes
 * themselves are not read. */
static inline __attribute__((always_inline)) void STREAM_NAME(lif_search)(const mdsnn_op *op,
                                                                          const STREAM_NAME(lif_constants) *k,
                                                                          int common, STREAM_NAME(vec) u,
                                                                          STREAM_NAME(vec) *q,
                                                                          STREAM_NAME(vec) *decoded)
{
#if defined(STREAM_IS_NARROW) && defined(__AVX512BW__)
    if (op->buckets) {
        __m512i i = _mm512_sra_epi16(_mm512_sub_epi16((__m512i)u, k->bucket_base), k->bucket_shift);
        i = _mm512_min_epi16(_mm512_max_epi16(i, _mm512_setzero_si512()), _mm512_set1_epi16(MDSNN_BUCKETS - 1));
        __mmask32 reached = _mm512_cmpge_epi16_mask((__m512i)u, _mm512_permutexvar_epi16(i, k->bucket_threshold));
        i = _mm512_mask_add_epi16(i, reached, i, _mm512_set1_epi16(1));
        *q = (STREAM_NAME(vec))_mm512_permutexvar_epi16(i, k->bucket_code);
        *decoded = (STREAM_NAME(vec))_mm512_permutexvar_epi16(i, k->bucket_decode);
        return;
    }
    if (common && op->lines) {
        __m512i x = _mm512_add_epi16(_mm512_max_epi16((__m512i)u, k->line_base), k->line_bias);
        *decoded = (STREAM_NAME(vec))_mm512_sub_epi16(NAME(line_decoded)(&k->lines, x), k->line_bias);
        return;
    }
    if (common) {
        __m512i i = _mm512_subs_epi16((__m512i)u, _mm512_set1_epi16((short)op->code_base));
        i = _mm512_max_epi16(i, _mm512_setzero_si512());
        i = _mm512_min_epi16(i, _mm512_set1_epi16((short)(op->code_count - 1)));
        __m512i even = _mm512_and_si512(i, _mm512_set1_epi32(0xFFFF)), odd = _mm512_srli_epi32(i, 16);
        even = _mm512_srli_epi32(_mm512_i32gather_epi32(even, op->code_decode, 4), 16);
        odd = _mm512_i32gather_epi32(odd, op->code_decode, 4);
        *decoded = (STREAM_NAME(vec))_mm512_mask_blend_epi16(0xAAAAAAAA, even, odd);
        return;
    }
#endif
#if defined(STREAM_IS_NARROW) && defined(__AVX2__) && !defined(__AVX512BW__)
    if (op->search == MDSNN_COMPARE && op->thresholds < 16) {
        STREAM_NAME(vec) index = {0};
#pragma GCC unroll 4
        for (int j = 0; j < (op->thresholds + 3) / 4 * 4; j++) /* those beyond are out of reach */
            index -= (STREAM_NAME(vec))(u > k->below[j]);
        *q = k->code_first + index;
        __m256i low = _mm256_or_si256((__m256i)index, _mm256_set1_epi16((short)0x8000));
        __m256i high = _mm256_or_si256(_mm256_slli_epi16((__m256i)index, 8), _mm256_set1_epi16(0x0080));
        *decoded = (STREAM_NAME(vec))_mm256_or_si256(_mm256_shuffle_epi8(k->decode_low, low),
                                                     _mm256_shuffle_epi8(k->decode_high, high));
        return;
    }
#endif
    if (common || op->search == MDSNN_COMPARE) {
        STREAM_NAME(vec) code = k->code_first;
        STREAM_NAME(uvec) sum = (STREAM_NAME(uvec))k->decode_first;
        for (int j = 0; j < op->thresholds; j++) {
            STREAM_NAME(vec) reached = (STREAM_NAME(vec))(u > k->below[j]);
            code -= reached;
            sum += (STREAM_NAME(uvec))reached & k->increment[j];
        }
        *q = code;
        *decoded = (STREAM_NAME(vec))sum;
        return;
    }
#if defined(STREAM_IS_NARROW) && defined(__AVX512BW__)
    if (op->search == MDSNN_TABLE) {
        __m512i half[2];
        for (int i = 0; i < 2; i++) {
            __m512i at = _mm512_cvtepi16_epi32(i ? _mm512_extracti64x4_epi64((__m512i)u, 1)
                                                 : _mm512_castsi512_si256((__m512i)u));
            at = _mm512_sub_epi32(at, _mm512_set1_epi32(op->code_base));
            at = _mm512_min_epi32(_mm512_max_epi32(at, _mm512_setzero_si512()), _mm512_set1_epi32(op->code_count - 1));
            half[i] = _mm512_i32gather_epi32(at, op->code_decode, 4);
        }
        __m512i low = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(half[0]));
        *q = (STREAM_NAME(vec))_mm512_inserti64x4(low, _mm512_cvtepi32_epi16(half[1]), 1);
        low = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srai_epi32(half[0], 16)));
        *decoded = (STREAM_NAME(vec))_mm512_inserti64x4(
            low, _mm512_cvtepi32_epi16(_mm512_srai_epi32(half[1], 16)), 1);
        return;
    }
#elif defined(STREAM_IS_NARROW) && defined(__AVX2__)
    if (op->search == MDSNN_TABLE) {
        __m256i half[2];
        for (int i = 0; i < 2; i++) {
            __m256i at = _mm256_cvtepi16_epi32(i ? _mm256_extracti128_si256((__m256i)u, 1)
                                                 : _mm256_castsi256_si128((__m256i)u));
            at = _mm256_sub_epi32(at, _mm256_set1_epi32(op->code_base));
            at = _mm256_min_epi32(_mm256_max_epi32(at, _mm256_setzero_si256()), _mm256_set1_epi32(op->code_count - 1));
            half[i] = _mm256_i32gather_epi32(op->code_decode, at, 4);
        }
        __m256i codes = _mm256_packs_epi32(_mm256_srai_epi32(_mm256_slli_epi32(half[0], 16), 16),
                                           _mm256_srai_epi32(_mm256_slli_epi32(half[1], 16), 16));
        __m256i decodes = _mm256_packs_epi32(_mm256_srai_epi32(half[0], 16), _mm256_srai_epi32(half[1], 16));
        *q = (STREAM_NAME(vec))_mm256_permute4x64_epi64(codes, 0xD8);
        *decoded = (STREAM_NAME(vec))_mm256_permute4x64_epi64(decodes, 0xD8);
        return;
    }
#endif
    STREAM lane[LANES], next[LANES];
    memcpy(lane, &u, sizeof lane);
    for (int i = 0; i < LANES; i++) {
        int32_t code = STREAM_NAME(lif_code)(op, lane[i]);
        lane[i] = (STREAM)code;
        next[i] = (STREAM)op->decode[code + op->top];
    }
    memcpy(q, lane, sizeof lane);
    memcpy(decoded, next, sizeof next);
}

#if defined(STREAM_IS_NARROW) && defined(__AVX2__) && !defined(__AVX512BW__)
/* Two vectors of h, of a LIF that is lif_common: what their codes decode to, and the spikes as bytes of 0 and 1, the
 * first vector's in the lower half. Bytes of both lie in one vector, so that a table of 16 words is looked up in two
 * shuffles. */
static inline __attribute__((always_inline)) __m256i NAME(lif_two)(const mdsnn_op *op,
                                                                   const STREAM_NAME(lif_constants) *k,
                                                                   const STREAM_NAME(vec) h[2],
                                                                   STREAM_NAME(vec) decoded[2])
{
    __m256i fired[2], u[2], cell[2], below[2];
    for (int j = 0; j < 2; j++) {
        fired[j] = _mm256_cmpgt_epi16((__m256i)h[j], (__m256i)k->v_th);
        u[j] = _mm256_andnot_si256(fired[j], (__m256i)h[j]);
    }
    __m256i spikes = _mm256_and_si256(_mm256_packs_epi16(fired[0], fired[1]), _mm256_set1_epi8(1));
    spikes = _mm256_permute4x64_epi64(spikes, 0xD8);
    if (!op->cells) {
        for (int j = 0; j < 2; j++) {
            __m256i i = _mm256_max_epi16(_mm256_subs_epi16(u[j], k->table_base), _mm256_setzero_si256());
            i = _mm256_min_epi16(i, k->table_last);
            __m256i even = _mm256_and_si256(i, _mm256_set1_epi32(0xFFFF)), odd = _mm256_srli_epi32(i, 16);
            even = _mm256_srli_epi32(_mm256_i32gather_epi32(op->code_decode, even, 4), 16);
            odd = _mm256_i32gather_epi32(op->code_decode, odd, 4);
            decoded[j] = (STREAM_NAME(vec))_mm256_blend_epi16(even, odd, 0xAA);
        }
        return spikes;
    }
    for (int j = 0; j < 2; j++) {
        cell[j] = _mm256_max_epi16(_mm256_subs_epi16(u[j], k->cell_base), _mm256_setzero_si256());
        cell[j] = _mm256_mulhi_epi16(_mm256_min_epi16(cell[j], k->cell_span), k->cell_factor);
    }
    __m256i both = _mm256_packs_epi16(cell[0], cell[1]);
    __m256i low = _mm256_shuffle_epi8(k->cell_below_low, both), high = _mm256_shuffle_epi8(k->cell_below_high, both);
    below[0] = _mm256_cmpgt_epi16(u[0], _mm256_unpacklo_epi8(low, high));
    below[1] = _mm256_cmpgt_epi16(u[1], _mm256_unpackhi_epi8(low, high));
    both = _mm256_sub_epi8(both, _mm256_packs_epi16(below[0], below[1]));
    low = _mm256_shuffle_epi8(k->cell_decode_low, both);
    high = _mm256_shuffle_epi8(k->cell_decode_high, both);
    decoded[0] = (STREAM_NAME(vec))_mm256_unpacklo_epi8(low, high);
    decoded[1] = (STREAM_NAME(vec))_mm256_unpackhi_epi8(low, high);
    return spikes;
}
#endif

/* From h to the spikes (-1 or 0 a lane), the codes to keep, and what they decode to. */
static inline __attribute__((always_inline)) STREAM_NAME(vec)
    STREAM_NAME(lif_fire)(const mdsnn_op *op, const STREAM_NAME(lif_constants) *k, int common, STREAM_NAME(vec) h,
                          STREAM_NAME(vec) *code, STREAM_NAME(vec) *decoded)
{
    STREAM_NAME(vec) fired, u;
    if (!common && op->pre_fire) {
        STREAM_NAME(lif_search)(op, k, 0, h, code, decoded);
        fired = (STREAM_NAME(vec))(*code > k->q_th);
        *code &= ~fired;
        *decoded = (*decoded & ~fired) | (k->decode_zero & fired);
        return fired;
    }
    fired = (STREAM_NAME(vec))(h > k->v_th);
    if (!common && op->soft)
        u = (STREAM_NAME(vec))((STREAM_NAME(uvec))h - (STREAM_NAME(uvec))(fired & k->v_soft));
    else
        u = h & ~fired;
    STREAM_NAME(lif_search)(op, k, common, u, code, decoded);
    return fired;
}

static void STREAM_NAME(lif_trace)(const frame *f, const mdsnn_op *op, ptrdiff_t plane, ptrdiff_t at, int channels,
                                   int c, int lanes, int t, const STREAM *h, const int8_t *s, const int8_t *q)
{
    const mdsnn_call *call = f->call;
    ptrdiff_t i = (((ptrdiff_t)(f->first_step + t) * call->samples + f->sample) * channels + c) * plane + at;
    for (int lane = 0; lane < lanes; lane++, i += plane) {
        call->trace_h[op->lif][i] = h[lane];
        call->trace_s[op->lif][i] = (uint8_t)s[lane];
        call->trace_q[op->lif][i] = q[lane];
    }
}

/* decode[q] of the codes kept from the pass before. */
static inline STREAM_NAME(vec) STREAM_NAME(lif_decoded)(const frame *f, const mdsnn_op *op,
                                                        const STREAM_NAME(lif_constants) *k, const int8_t *q,
                                                        int lanes)
{
    STREAM_NAME(vec) decoded;
    STREAM lane[LANES];
    if (f->fresh)
        return k->decode_zero;
    for (int i = 0; i < LANES; i++)
        lane[i] = (STREAM)op->decode[(i < lanes ? q[i] : 0) + op->top];
    memcpy(&decoded, lane, sizeof decoded);
    return decoded;
}

/* All steps of the neurons c..c+lanes of one pixel. x, s and q are at neuron c: its first step, and its kept code. */
static inline void STREAM_NAME(lif_lanes)(const frame *f, const mdsnn_op *op, const STREAM_NAME(lif_constants) *k,
                                          const STREAM *x, ptrdiff_t x_step, uint8_t *s, ptrdiff_t s_step, int8_t *q,
                                          int c, int lanes, int channels, ptrdiff_t plane, ptrdiff_t at)
{
    STREAM_NAME(vec) code = {0}, decoded = STREAM_NAME(lif_decoded)(f, op, k, q, lanes);
    STREAM_NAME(bytes) narrow = {0};
    for (int t = 0; t < f->steps; t++) {
        STREAM_NAME(vec) h = {0}, fired;
        memcpy(&h, x + t * x_step, (size_t)lanes * sizeof(STREAM));
        h = (STREAM_NAME(vec))((STREAM_NAME(uvec))h + (STREAM_NAME(uvec))decoded);
        fired = STREAM_NAME(lif_fire)(op, k, 0, h, &code, &decoded);
        narrow = __builtin_convertvector(fired, STREAM_NAME(bytes));
        narrow = (STREAM_NAME(bytes))(narrow & 1);
        memcpy(s + t * s_step, &narrow, (size_t)lanes);
        if (f->call->trace_h) {
            STREAM_NAME(bytes) codes = __builtin_convertvector(code, STREAM_NAME(bytes));
            STREAM_NAME(lif_trace)(f, op, plane, at, channels, c, lanes, t, (const STREAM *)&h,
                                   (const int8_t *)&narrow, (const int8_t *)&codes);
        }
    }
    if (f->keep) {
        narrow = __builtin_convertvector(code, STREAM_NAME(bytes));
        memcpy(q, &narrow, (size_t)lanes);
    }
}

static void STREAM_NAME(lif_prepare)(const mdsnn_op *op, STREAM_NAME(lif_constants) *k)
{
    k->v_th = STREAM_NAME(splat)(op->v_th);
    k->v_soft = STREAM_NAME(splat)(op->v_soft);
    k->q_th = STREAM_NAME(splat)(op->q_th);
    k->code_first = STREAM_NAME(splat)(op->code_first);
    k->decode_first = STREAM_NAME(splat)(op->decode[op->code_first + op->top]);
    k->decode_zero = STREAM_NAME(splat)(op->decode[op->top]);
    if (op->search == MDSNN_COMPARE)
        for (int j = 0; j < op->thresholds; j++) {
            const int32_t *decode = op->decode + op->top + op->code_first + j;
            k->below[j] = STREAM_NAME(splat)(op->threshold[j] - 1);
            k->increment[j] = (STREAM_NAME(uvec))STREAM_NAME(splat)((int32_t)((uint32_t)decode[1] - (uint32_t)decode[0]));
        }
#if defined(STREAM_IS_NARROW) && defined(__AVX512BW__)
    if (op->buckets) {
        k->bucket_threshold = _mm512_loadu_si512(op->bucket_threshold);
        k->bucket_code = _mm512_loadu_si512(op->bucket_code);
        k->bucket_decode = _mm512_loadu_si512(op->bucket_decode);
        k->bucket_base = _mm512_set1_epi16((short)op->bucket_base);
        k->bucket_shift = _mm_cvtsi32_si128(op->bucket_shift);
    }
    if (op->lines) {
        for (int i = 0; i < 2; i++) {
            k->lines.slope[i] = _mm512_loadu_si512(op->line_slope + i * MDSNN_LINES / 2);
            k->lines.offset[i] = _mm512_loadu_si512(op->line_offset + i * MDSNN_LINES / 2);
        }
        const int32_t from[] = {op->line_base, op->line_bias, op->line_each, op->line_shift, op->line_fraction,
                                op->line_mask, op->line_rest, op->line_factor};
        __m512i *const to[] = {&k->line_base, &k->line_bias, &k->lines.each, &k->lines.shift, &k->lines.fraction,
                               &k->lines.mask, &k->lines.rest, &k->lines.factor};
        for (int i = 0; i < 8; i++)
            *to[i] = _mm512_set1_epi16((short)from[i]);
    }
#elif defined(STREAM_IS_NARROW) && defined(__AVX2__)
    if (op->search == MDSNN_COMPARE && op->thresholds < 16) {
        for (int j = op->thresholds; j < 16; j++)
            k->below[j] = STREAM_NAME(splat)(INT16_MAX);
        uint8_t low[32] = {0}, high[32] = {0};
        for (int j = 0; j <= op->thresholds; j++) {
            uint16_t decoded = (uint16_t)op->decode[op->top + op->code_first + j];
            low[j] = low[j + 16] = (uint8_t)decoded;
            high[j] = high[j + 16] = (uint8_t)(decoded >> 8);
        }
        memcpy(&k->decode_low, low, sizeof low);
        memcpy(&k->decode_high, high, sizeof high);
    }
    if (op->search == MDSNN_TABLE) {
        k->table_base = _mm256_set1_epi16((short)op->code_base);
        k->table_last = _mm256_set1_epi16((short)(op->code_count - 1));
    }
    if (op->cells) {
        k->cell_base = _mm256_set1_epi16((short)op->cell_base);
        k->cell_span = _mm256_set1_epi16((short)op->cell_span);
        k->cell_factor = _mm256_set1_epi16((short)op->cell_factor);
        uint8_t bytes[4][32];
        for (int j = 0; j < 32; j++) {
            uint16_t below = (uint16_t)(op->cell_threshold[j % 16] - 1), decoded = (uint16_t)op->cell_decode[j % 16];
            bytes[0][j] = (uint8_t)below;
            bytes[1][j] = (uint8_t)(below >> 8);
            bytes[2][j] = (uint8_t)decoded;
            bytes[3][j] = (uint8_t)(decoded >> 8);
        }
        memcpy(&k->cell_below_low, bytes[0], sizeof bytes[0]);
        memcpy(&k->cell_below_high, bytes[1], sizeof bytes[1]);
        memcpy(&k->cell_decode_low, bytes[2], sizeof bytes[2]);
        memcpy(&k->cell_decode_high, bytes[3], sizeof bytes[3]);
    }
#endif
}

#if defined(STREAM_IS_NARROW) && defined(__AVX2__) && !defined(__AVX512BW__)
/* All steps of the neurons c..c+LANES of two pixels, of a LIF that is lif_common, without trace or codes to keep. */
static inline void NAME(lif_lanes_two)(const frame *f, const mdsnn_op *op, const STREAM_NAME(lif_constants) *k,
                                       const STREAM *x, ptrdiff_t x_pixel, ptrdiff_t x_step, uint8_t *s, ptrdiff_t s_pixel,
                                       ptrdiff_t s_step)
{
    STREAM_NAME(vec) decoded[2] = {k->decode_zero, k->decode_zero}, h[2];
    for (int t = 0; t < f->steps; t++, x += x_step, s += s_step) {
        for (int j = 0; j < 2; j++) {
            memcpy(&h[j], x + j * x_pixel, sizeof h[j]);
            h[j] = (STREAM_NAME(vec))((STREAM_NAME(uvec))h[j] + (STREAM_NAME(uvec))decoded[j]);
        }
        __m256i spikes = NAME(lif_two)(op, k, h, decoded);
        _mm_storeu_si128((__m128i *)s, _mm256_castsi256_si128(spikes));
        _mm_storeu_si128((__m128i *)(s + s_pixel), _mm256_extracti128_si256(spikes, 1));
    }
}
#endif

/* The neurons of `pixels` pixels of one row. */
static void STREAM_NAME(lif_row)(const frame *f, const mdsnn_op *op, const STREAM_NAME(lif_constants) *k,
                                 const STREAM *x, ptrdiff_t x_pixel, ptrdiff_t x_step, uint8_t *s, ptrdiff_t s_pixel,
                                 ptrdiff_t s_step, int8_t *q, int pixels, int channels, ptrdiff_t plane, ptrdiff_t at)
{
    int p = 0;
#if defined(STREAM_IS_NARROW) && defined(__AVX2__) && !defined(__AVX512BW__)
    if (STREAM_NAME(lif_common)(op) && f->fresh && !f->keep && !f->call->trace_h && channels % LANES == 0)
        for (; p + 2 <= pixels; p += 2, x += 2 * x_pixel, s += 2 * s_pixel, q += 2 * channels, at += 2)
            for (int c = 0; c < channels; c += LANES)
                NAME(lif_lanes_two)(f, op, k, x + c, x_pixel, x_step, s + c, s_pixel, s_step);
#endif
    for (; p < pixels; p++, x += x_pixel, s += s_pixel, q += channels, at++) {
        int c = 0;
        for (; c + LANES <= channels; c += LANES)
            STREAM_NAME(lif_lanes)(f, op, k, x + c, x_step, s + c, s_step, q + c, c, LANES, channels, plane, at);
        if (c < channels)
            STREAM_NAME(lif_lanes)(f, op, k, x + c, x_step, s + c, s_step, q + c, c, channels - c, channels, plane,
                                   at);
    }
}

#if defined(STREAM_IS_NARROW) && defined(__AVX512BW__)
/* The spikes of all steps of 64 neurons, a byte each. */
static inline __m512i NAME(patterns)(const mdsnn_op *op, const int16_t *x)
{
    if (op->pattern_changes) {
        const __m512i low = _mm512_loadu_si512(x), high = _mm512_loadu_si512(x + 32);
        __m512i pattern = _mm512_set1_epi8((char)op->pattern[0]);
        for (int i = 0; i < op->pattern_changes; i++) {
            const __m512i change = _mm512_set1_epi16(op->pattern_change[i]);
            const __mmask64 behind = _mm512_kunpackd(_mm512_cmpge_epi16_mask(high, change),
                                                     _mm512_cmpge_epi16_mask(low, change));
            const __m512i flip = _mm512_maskz_set1_epi8(behind, (char)op->pattern_flip[i]);
            pattern = _mm512_xor_si512(pattern, flip);
        }
        return pattern;
    }
    __m128i quarter[4];
    for (int i = 0; i < 4; i++) {
        __m512i at = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)(x + 16 * i)));
        at = _mm512_sub_epi32(at, _mm512_set1_epi32(op->pattern_first));
        quarter[i] = _mm512_cvtepi32_epi8(_mm512_i32gather_epi32(at, op->pattern, 1));
    }
    __m512i pattern = _mm512_inserti32x4(_mm512_castsi128_si512(quarter[0]), quarter[1], 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(pattern, quarter[2], 2), quarter[3], 3);
}
#elif defined(STREAM_IS_NARROW) && defined(__AVX2__)
/* The spikes of all steps of 32 neurons, a byte each. */
static inline __m256i NAME(patterns)(const mdsnn_op *op, const int16_t *x)
{
    if (op->pattern_changes) {
        const __m256i low = _mm256_loadu_si256((const __m256i *)x), high = _mm256_loadu_si256((const __m256i *)(x + 16));
        __m256i pattern = _mm256_set1_epi8((char)op->pattern[0]);
        for (int i = 0; i < op->pattern_changes; i++) {
            const __m256i change = _mm256_set1_epi16(op->pattern_change[i]);
            const __m256i before = _mm256_packs_epi16(_mm256_cmpgt_epi16(change, low), _mm256_cmpgt_epi16(change, high));
            const __m256i flip = _mm256_andnot_si256(before, _mm256_set1_epi8((char)op->pattern_flip[i]));
            pattern = _mm256_xor_si256(pattern, flip);
        }
        return _mm256_permute4x64_epi64(pattern, 0xD8);
    }
    __m256i eight[4];
    for (int i = 0; i < 4; i++) {
        __m256i at = _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)(x + 8 * i)));
        at = _mm256_sub_epi32(at, _mm256_set1_epi32(op->pattern_first));
        at = _mm256_i32gather_epi32((const int *)(const void *)op->pattern, at, 1);
        eight[i] = _mm256_and_si256(at, _mm256_set1_epi32(0xFF));
    }
    __m256i pattern = _mm256_packus_epi16(_mm256_packus_epi32(eight[0], eight[1]),
                                          _mm256_packus_epi32(eight[2], eight[3]));
    return _mm256_permutevar8x32_epi32(pattern, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
#endif

/* A LIF whose input is the same at every step, from a fresh start: its spikes are a function of that input. */
static void STREAM_NAME(lif_fixed)(const frame *f, const mdsnn_op *op, const view *in, const view *out)
{
    int64_t counts[MDSNN_STEPS] = {0};
    for (int y = first_of(f, out->height), end = end_of(f, out->height); y < end; y++)
        for (int x = 0; x < out->width; x++) {
            const STREAM *from = (const STREAM *)in->at + y * in->row + x * in->pixel;
            uint8_t *to = out->at + y * out->row + x * out->pixel;
            int c = 0;
#if defined(STREAM_IS_NARROW) && defined(__AVX512BW__)
            for (; c + 64 <= out->channels; c += 64) {
                __m512i pattern = NAME(patterns)(op, from + c);
                for (int t = 0; t < f->steps; t++) {
                    __mmask64 fired = _mm512_test_epi8_mask(pattern, _mm512_set1_epi8((char)(1 << t)));
                    _mm512_storeu_si512(to + t * out->step + c, _mm512_maskz_set1_epi8(fired, 1));
                    counts[t] += _mm_popcnt_u64(fired);
                }
            }
#elif defined(STREAM_IS_NARROW) && defined(__AVX2__)
            for (; c + 32 <= out->channels; c += 32) {
                __m256i pattern = NAME(patterns)(op, from + c);
                for (int t = 0; t < f->steps; t++) {
                    __m256i bit = _mm256_srl_epi16(pattern, _mm_cvtsi32_si128(t));
                    _mm256_storeu_si256((__m256i *)(to + t * out->step + c),
                                        _mm256_and_si256(bit, _mm256_set1_epi8(1)));
                }
            }
#endif
            for (; c < out->channels; c += 16) { /* spikes have room for 64 */
                uint8_t pattern[16] = {0};
                for (int i = 0; i < 16 && c + i < out->channels; i++)
                    pattern[i] = op->pattern[from[c + i] - op->pattern_first];
                for (int t = 0; t < f->steps; t++)
                    for (int i = 0; i < 16; i++) {
                        to[t * out->step + c + i] = (uint8_t)(pattern[i] >> t & 1);
                        counts[t] += pattern[i] >> t & 1;
                    }
            }
        }
    if (NAME(counts_itself)(f, op))
        NAME(add_counts)(f, op->out, counts);
}

static void STREAM_NAME(lif)(const frame *f, const mdsnn_op *op)
{
    view in = view_of(f, op->source), out = view_of(f, op->out);
    if (op->pattern && f->fresh && !f->keep && !f->call->trace_h) {
        STREAM_NAME(lif_fixed)(f, op, &in, &out);
        return;
    }
    STREAM_NAME(lif_constants) k;
    STREAM_NAME(lif_prepare)(op, &k);
    ptrdiff_t plane = (ptrdiff_t)out.height * out.width;
    for (int y = first_of(f, out.height), end = end_of(f, out.height); y < end; y++) {
        ptrdiff_t at = (ptrdiff_t)y * out.width;
        STREAM_NAME(lif_row)(f, op, &k, (const STREAM *)in.at + y * in.row, in.pixel, in.step,
                             out.at + y * out.row, out.pixel, out.step,
                             (int8_t *)f->state + op->state + at * out.channels, out.width, out.channels, plane, at);
    }
}

#undef LANES
