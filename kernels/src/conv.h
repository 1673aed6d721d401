/* conv.h: convolution of codes, spikes or counts, zero padding, groups; a linear layer is a 1x1 one.
 *
 * Definition: kernels/reference.py:conv2d, linear. This file agrees with it bit for bit
 * (tests/test_kernels_bit_exact.py); where the two differ, this file is wrong.
 *
 * Plain form, for anything the proof accepts. Driven by what is there: each input that is not 0 adds its row of
 * weights, once per tap, to the accumulators of an output pixel. Partial sums in any order are proven to fit int32.
 */

#define MDSNN_CONV_FROM(TYPE, FUNCTION)                                                                              \
    static void NAME(FUNCTION)(const frame *f, const mdsnn_op *op)                                                   \
    {                                                                                                                \
        view in = view_of(f, op->source), out = view_of(f, op->out);                                                 \
        int steps = steps_of(f, op), groups = op->groups;                                                            \
        int ins = in.channels / groups, outs = out.channels / groups;                                                \
        ptrdiff_t tap_size = (ptrdiff_t)ins * outs;                                                                  \
        for (int y = first_of(f, out.height), end = end_of(f, out.height); y < end; y++)                             \
            for (int x = 0; x < out.width; x++) {                                                                    \
                int32_t *acc = (int32_t *)out.at + y * out.row + x * out.pixel;                                      \
                for (int t = 0; t < steps; t++)                                                                      \
                    memset(acc + t * out.step, 0, sizeof *acc * (size_t)out.channels);                               \
                for (int ky = 0; ky < op->kernel_height; ky++) {                                                     \
                    int64_t from_y = (int64_t)y * op->stride + ky - op->padding;                                     \
                    if (from_y < 0 || from_y >= in.height)                                                           \
                        continue;                                                                                    \
                    for (int kx = 0; kx < op->kernel_width; kx++) {                                                  \
                        int64_t from_x = (int64_t)x * op->stride + kx - op->padding;                                 \
                        if (from_x < 0 || from_x >= in.width)                                                        \
                            continue;                                                                                \
                        const TYPE *pixel = (const TYPE *)in.at + from_y * in.row + from_x * in.pixel;               \
                        ptrdiff_t tap = (ptrdiff_t)ky * op->kernel_width + kx;                                       \
                        ptrdiff_t taps = (ptrdiff_t)op->kernel_height * op->kernel_width;                            \
                        for (int t = 0; t < steps; t++)                                                              \
                            for (int g = 0; g < groups; g++)                                                         \
                                NAME(FUNCTION##_rows)(pixel + t * in.step + (ptrdiff_t)g * ins, ins,                 \
                                                      op->weight + (g * taps + tap) * tap_size, outs,                \
                                                      acc + t * out.step + (ptrdiff_t)g * outs);                     \
                    }                                                                                                \
                }                                                                                                    \
            }                                                                                                        \
    }

static void NAME(conv_i8_rows)(const int8_t *x, int ins, const int8_t *weight, int outs, int32_t *acc)
{
    for (int i = 0; i < ins; i++) {
        int32_t value = x[i];
        const int8_t *row = weight + (ptrdiff_t)i * outs;
        if (value == 1)
            for (int o = 0; o < outs; o++)
                acc[o] += row[o];
        else if (value != 0)
            for (int o = 0; o < outs; o++)
                acc[o] += value * row[o];
    }
}

static void NAME(conv_i32_rows)(const int32_t *x, int ins, const int8_t *weight, int outs, int32_t *acc)
{
    for (int i = 0; i < ins; i++) {
        const int8_t *row = weight + (ptrdiff_t)i * outs;
        if (x[i] != 0)
            for (int o = 0; o < outs; o++)
                acc[o] += x[i] * row[o];
    }
}

MDSNN_CONV_FROM(int8_t, conv_i8)
MDSNN_CONV_FROM(int32_t, conv_i32)

#undef MDSNN_CONV_FROM

static void NAME(conv)(const frame *f, const mdsnn_op *op)
{
    if (f->plan->values[op->source].type == MDSNN_I8)
        NAME(conv_i8)(f, op);
    else
        NAME(conv_i32)(f, op);
}
