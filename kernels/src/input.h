/* input.h: pixels or event counts to codes, by a table of 256 entries a channel.
 *
 * Definition: kernels/reference.py:input_table. This file agrees with it bit for bit
 * (tests/test_kernels_bit_exact.py); where the two differ, this file is wrong.
 */

static void NAME(input)(const frame *f, const mdsnn_op *op)
{
    view out = view_of(f, op->out);
    int steps = steps_of(f, op);
    ptrdiff_t plane = (ptrdiff_t)out.height * out.width, sample = plane * out.channels;
    ptrdiff_t first = (ptrdiff_t)first_of(f, out.height) * out.width, end = (ptrdiff_t)end_of(f, out.height) * out.width;
    for (int t = 0; t < steps; t++) {
        const uint8_t *pixels =
            f->call->pixels + f->call->pixel_step * (f->first_step + t) + sample * f->sample;
        for (int c = 0; c < out.channels; c++) {
            const int8_t *table = op->weight + (ptrdiff_t)c * 256;
            int8_t *to = (int8_t *)out.at + t * out.step + c;
            for (ptrdiff_t i = first; i < end; i++)
                to[i * out.pixel] = table[pixels[c * plane + i]];
        }
    }
}
