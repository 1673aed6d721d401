/* bn.h: batch normalization as a table from accumulators to the residual stream, affine or dense.
 *
 *   affine   y = clamp((multiplier*acc + offset) >> shift, -C, C)      dense   y = table[start + acc]
 *
 * Definition: kernels/reference.py:bn_affine, bn_dense. This file agrees with it bit for bit
 * (tests/test_kernels_bit_exact.py); where the two differ, this file is wrong.
 * STREAM is the type of the stream: int16_t, or int32_t where the proof needs it.
 */

static inline int32_t STREAM_NAME(clamp)(int64_t y, int32_t limit)
{
    return y < -limit ? -limit : y > limit ? limit : (int32_t)y;
}

static void STREAM_NAME(bn_affine)(const frame *f, const mdsnn_op *op)
{
    view in = view_of(f, op->source), out = view_of(f, op->out);
    int steps = steps_of(f, op), channels = out.channels;
    int32_t limit = op->saturation;
    for (int y = first_of(f, out.height), end = end_of(f, out.height); y < end; y++)
        for (int x = 0; x < out.width; x++)
            for (int t = 0; t < steps; t++) {
                const int32_t *acc = (const int32_t *)in.at + y * in.row + x * in.pixel + t * in.step;
                STREAM *to = (STREAM *)out.at + y * out.row + x * out.pixel + t * out.step;
                if (op->wide)
                    for (int c = 0; c < channels; c++) {
                        int64_t sum = (int64_t)op->multiplier[c] * acc[c] + op->offset[c];
                        to[c] = (STREAM)STREAM_NAME(clamp)(sum >> op->shift[c], limit);
                    }
                else
                    for (int c = 0; c < channels; c++) {
                        int32_t sum = op->multiplier[c] * acc[c] + (int32_t)op->offset[c];
                        int32_t v = sum >> op->shift[c];
                        v = v < -limit ? -limit : v;
                        to[c] = (STREAM)(v > limit ? limit : v);
                    }
            }
}

static void STREAM_NAME(bn_dense)(const frame *f, const mdsnn_op *op)
{
    view in = view_of(f, op->source), out = view_of(f, op->out);
    int steps = steps_of(f, op), channels = out.channels;
    for (int y = first_of(f, out.height), end = end_of(f, out.height); y < end; y++)
        for (int x = 0; x < out.width; x++)
            for (int t = 0; t < steps; t++) {
                const int32_t *acc = (const int32_t *)in.at + y * in.row + x * in.pixel + t * in.step;
                STREAM *to = (STREAM *)out.at + y * out.row + x * out.pixel + t * out.step;
                for (int c = 0; c < channels; c++)
                    to[c] = (STREAM)op->table[op->start[c] + acc[c]];
            }
}
