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
                for (int c = 0; c < channels; c++) {
                    int32_t v = (from[c] + half) >> shift;
                    v = v < -top ? -top : v;
                    to[c] = (int8_t)(v > top ? top : v);
                }
            }
}
