/* residual.h: the residual add, and the codes a shortcut's convolution reads.
 *
 *   add          out = a + b, exact        requantize   clip((x + 2**(shift-1)) >> shift, -top, top)
 *
 * Of codes, only those of every stride-th row and column are read; where AVX-512 is, the others are counted, not stored.
 * A value that is packed has no place for them. Beside the tiles codes are made with the stream (follow.h).
 *
 * Definition: kernels/reference.py:residual_add, requantize. This file agrees with it bit for bit
 * (tests/test_kernels_bit_exact.py); where the two differ, this file is wrong.
 */

static void STREAM_NAME(add)(const frame *f, const mdsnn_op *op)
{
    view a = view_of(f, op->source), b = view_of(f, op->other), out = view_of(f, op->out);
    int steps = steps_of(f, op), channels = out.channels;
    for (int y = first_of(f, out.height), end = end_of(f, out.height); y < end; y++)
        for (int x = 0; x < out.width; x++)
            for (int t = 0; t < steps; t++) {
                const STREAM *left = (const STREAM *)a.at + y * a.row + x * a.pixel + t * a.step;
                const STREAM *right = (const STREAM *)b.at + y * b.row + x * b.pixel + t * b.step;
                STREAM *to = (STREAM *)out.at + y * out.row + x * out.pixel + t * out.step;
                for (int c = 0; c < channels; c++)
                    to[c] = (STREAM)(left[c] + right[c]);
            }
}

#if defined(__AVX512BW__)
/* Codes that change from step to step; those that are not 0 are counted. */
static void STREAM_NAME(requantize_counted)(const frame *f, const mdsnn_op *op)
{
    view in = view_of(f, op->source), out = view_of(f, op->out);
#if defined(STREAM_IS_NARROW)
    /* (v * 2**(15 - shift) + 2**14) >> 15 is one instruction; beyond a shift of 15 all codes are 0 */
    const __m512i factor = _mm512_set1_epi16((short)(op->bits_shift > 15 ? 0 : 1 << (15 - op->bits_shift)));
    const __m512i top = _mm512_set1_epi16((short)op->top), bottom = _mm512_set1_epi16((short)-op->top);
#else
    const __m512i half = _mm512_set1_epi32(1 << (op->bits_shift - 1)), top = _mm512_set1_epi32(op->top);
    const __m512i bottom = _mm512_set1_epi32(-op->top);
    const __m128i shift = _mm_cvtsi32_si128(op->bits_shift);
#endif
    int64_t counts[MDSNN_STEPS] = {0};
    const int stride = op->stride, to_next = op->packed ? 1 : stride; /* pixels of the result from one to the next */
    for (int y = first_of(f, in.height), end = end_of(f, in.height); y < end; y++)
        for (int x = 0, next = y % stride ? in.width : 0; x < in.width; x++) {
            const int read = x == next;
            next += read ? stride : 0;
            for (int t = 0; t < f->steps; t++) {
                const STREAM *from = (const STREAM *)in.at + y * in.row + x * in.pixel + t * in.step;
                int8_t *to = (int8_t *)out.at + y / stride * to_next * out.row + x / stride * to_next * out.pixel +
                             t * out.step;
                int64_t there = 0;
#if defined(STREAM_IS_NARROW)
                for (int c = 0; c < out.channels; c += 32) {
                    __mmask32 here = out.channels - c < 32 ? (1u << (out.channels - c)) - 1 : UINT32_MAX;
                    __m512i v = _mm512_mulhrs_epi16(_mm512_maskz_loadu_epi16(here, from + c), factor);
                    there += _mm_popcnt_u32(_mm512_test_epi16_mask(v, v));
                    if (!read)
                        continue;
                    v = _mm512_min_epi16(_mm512_max_epi16(v, bottom), top);
                    _mm512_mask_cvtepi16_storeu_epi8(to + c, here, v);
                }
                counts[t] += there;
#else
                for (int c = 0; c < out.channels; c += 16) {
                    __mmask16 here = (__mmask16)(out.channels - c < 16 ? (1u << (out.channels - c)) - 1 : UINT16_MAX);
                    __m512i v = _mm512_add_epi32(_mm512_maskz_loadu_epi32(here, from + c), half);
                    v = _mm512_sra_epi32(v, shift);
                    there += _mm_popcnt_u32(_mm512_mask_test_epi32_mask(here, v, v));
                    if (!read)
                        continue;
                    v = _mm512_min_epi32(_mm512_max_epi32(v, bottom), top);
                    _mm512_mask_cvtepi32_storeu_epi8(to + c, here, v);
                }
                counts[t] += there;
#endif
            }
        }
    NAME(add_counts)(f, op->out, counts);
}
#endif

static void STREAM_NAME(requantize)(const frame *f, const mdsnn_op *op)
{
    view in = view_of(f, op->source), out = view_of(f, op->out);
    int steps = steps_of(f, op), channels = out.channels, shift = op->bits_shift;
    int32_t half = 1 << (shift - 1), top = op->top;
#if defined(__AVX512BW__)
    if (NAME(counts_itself)(f, op)) {
        STREAM_NAME(requantize_counted)(f, op);
        return;
    }
#endif
    for (int y = first_of(f, out.height), end = end_of(f, out.height); y < end; y++)
        for (int x = 0; x < out.width; x++)
            for (int t = 0; t < steps; t++) {
                const STREAM *from = (const STREAM *)in.at + y * in.row + x * in.pixel + t * in.step;
                int8_t *to = (int8_t *)out.at + y * out.row + x * out.pixel + t * out.step;
                int c = 0;
#if defined(STREAM_IS_NARROW) && defined(__AVX2__) && !defined(__AVX512BW__)
                for (; c + 32 <= channels; c += 32) { /* half of what the shift before the last leaves, rounded */
                    __m256i v[2];
                    for (int i = 0; i < 2; i++) {
                        v[i] = _mm256_loadu_si256((const __m256i *)(from + c + 16 * i));
                        v[i] = _mm256_sra_epi16(v[i], _mm_cvtsi32_si128(shift - 1));
                        v[i] = _mm256_srai_epi16(_mm256_adds_epi16(v[i], _mm256_set1_epi16(1)), 1);
                        v[i] = _mm256_max_epi16(v[i], _mm256_set1_epi16((short)-top));
                        v[i] = _mm256_min_epi16(v[i], _mm256_set1_epi16((short)top));
                    }
                    __m256i codes = _mm256_permute4x64_epi64(_mm256_packs_epi16(v[0], v[1]), 0xD8);
                    _mm256_storeu_si256((__m256i *)(to + c), codes);
                }
#endif
                for (; c < channels; c++) {
                    int32_t v = (from[c] + half) >> shift;
                    v = v < -top ? -top : v;
                    to[c] = (int8_t)(v > top ? top : v);
                }
            }
}
