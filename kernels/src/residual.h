/* residual.h: the residual add, and the codes a shortcut's convolution reads.
 *
 *   add          out = a + b, exact        requantize   clip((x + 2**(shift-1)) >> shift, -top, top)
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

static void STREAM_NAME(requantize)(const frame *f, const mdsnn_op *op)
{
    view in = view_of(f, op->source), out = view_of(f, op->out);
    int steps = steps_of(f, op), channels = out.channels, shift = op->bits_shift;
    int32_t half = 1 << (shift - 1), top = op->top;
    for (int y = first_of(f, out.height), end = end_of(f, out.height); y < end; y++)
        for (int x = 0; x < out.width; x++)
            for (int t = 0; t < steps; t++) {
                const STREAM *from = (const STREAM *)in.at + y * in.row + x * in.pixel + t * in.step;
                int8_t *to = (int8_t *)out.at + y * out.row + x * out.pixel + t * out.step;
                int c = 0;
#if defined(STREAM_IS_NARROW) && defined(__AVX512BW__)
                for (; c < channels; c += 32) { /* half of what the shift before the last leaves, rounded */
                    __mmask32 here = channels - c < 32 ? (1u << (channels - c)) - 1 : UINT32_MAX;
                    __m512i v = _mm512_sra_epi16(_mm512_maskz_loadu_epi16(here, from + c), _mm_cvtsi32_si128(shift - 1));
                    v = _mm512_srai_epi16(_mm512_adds_epi16(v, _mm512_set1_epi16(1)), 1);
                    v = _mm512_max_epi16(v, _mm512_set1_epi16((short)-top));
                    v = _mm512_min_epi16(v, _mm512_set1_epi16((short)top));
                    _mm512_mask_cvtepi16_storeu_epi8(to + c, here, v);
                }
#elif defined(STREAM_IS_NARROW) && defined(__AVX2__)
                for (; c + 32 <= channels; c += 32) { /* the same */
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
