/* wide.h: what follows a fused convolution where more than the stream needs 32 bits, or h of a long stream is traced.
 *
 * Definitions: kernels/reference.py:bn_affine, bn_dense, residual_add, lif_step. This file agrees with them bit for bit
 * (tests/test_kernels_bit_exact.py); where they differ, this file is wrong. The plain twins are bn.h, residual.h and
 * lif.h; epilogue.h is the same for 16 bits, where one pass keeps all in registers. Here a row goes through three
 * loops, and stays in the L1 cache. Values and constants are padded to 64 channels as there.
 */

/* bn of sums [row][64] to y in the same order; channels first.. of the network's, `channels` of the 64. */
APART static void NAME(wide_bn)(const mdsnn_op *bn, const void *sums, int wide, ptrdiff_t rows, int first,
                                int channels, int32_t *y)
{
    const int lanes = VECTOR_BYTES / 4;
    if (bn->kind == MDSNN_BN_AFFINE && !bn->wide) {
        NAME(v32) top = (NAME(v32)){0} + bn->saturation;
        for (int c = 0; c < channels; c += lanes) {
            NAME(v32) a, b, g;
            memcpy(&a, bn->multiplier + first + c, sizeof a);
            memcpy(&b, bn->offset_32 + first + c, sizeof b);
            memcpy(&g, bn->shift_32 + first + c, sizeof g);
            for (ptrdiff_t row = 0; row < rows; row++) {
                NAME(v32) v = NAME(clamp32)((NAME(load_sums)(sums, wide, row * BLOCK + c) * a + b) >> g, top);
                memcpy(y + row * BLOCK + c, &v, sizeof v);
            }
        }
        return;
    }
    for (ptrdiff_t row = 0; row < rows; row++)
        for (int c = 0; c < channels; c++) {
            int32_t acc = wide ? ((const int32_t *)sums)[row * BLOCK + c] : ((const int16_t *)sums)[row * BLOCK + c];
            int32_t limit = bn->saturation;
            if (bn->kind == MDSNN_BN_DENSE) {
                y[row * BLOCK + c] = bn->table[bn->start[first + c] + acc];
            } else {
                int64_t sum = ((int64_t)bn->multiplier[first + c] * acc + bn->offset[first + c]) >> bn->shift[first + c];
                y[row * BLOCK + c] = sum < -limit ? -limit : sum > limit ? limit : (int32_t)sum;
            }
        }
}

/* At most `most` of 64 outputs from `first` on, of `pixels` pixels from (y, x) on. sums [pixel][t][64], int32 if wide; y_row: room for as many
 * int32. The block's last vector may hold channels that are not there: what is computed of them is never read. */
APART static void NAME(epilogue_wide)(const frame *f, const mdsnn_op *op, const void *sums, int wide, int32_t *y_row,
                                      int y, int x, int pixels, int first, int most)
{
    const mdsnn_op *fire = op->fire;
    const int lanes = VECTOR_BYTES / 4;
    int steps = steps_of(f, op);
    int channels = f->plan->values[fire ? fire->out : op->out].channels;
    int here = channels - first < most ? channels - first : most;
    NAME(wide_bn)(op->bn, sums, wide, (ptrdiff_t)pixels * steps, first, here, y_row);
    if (op->other >= 0) {
        view other = view_of(f, op->other);
        const uint8_t *add = NAME(element)(&other, 1 << other.type, y, x, first);
        for (int p = 0; p < pixels; p++)
            for (int t = 0; t < steps; t++) {
                const uint8_t *from = add + (p * other.pixel + t * other.step) * (1 << other.type);
                int32_t *to = y_row + ((ptrdiff_t)p * steps + t) * BLOCK;
                if (other.type == MDSNN_I32)
                    for (int c = 0; c < here; c++)
                        to[c] += ((const int32_t *)(const void *)from)[c];
                else
                    for (int c = 0; c < here; c++)
                        to[c] += ((const int16_t *)(const void *)from)[c];
            }
    }
    if (op->out >= 0) {
        view out = view_of(f, op->out);
        uint8_t *at = NAME(element)(&out, 1 << out.type, y, x, first);
        for (int p = 0; p < pixels; p++)
            for (int t = 0; t < steps; t++) {
                const int32_t *from = y_row + ((ptrdiff_t)p * steps + t) * BLOCK;
                uint8_t *to = at + (p * out.pixel + t * out.step) * (1 << out.type);
                if (out.type == MDSNN_I32)
                    memcpy(to, from, sizeof *from * (size_t)here);
                else
                    for (int c = 0; c < here; c++)
                        ((int16_t *)(void *)to)[c] = (int16_t)from[c];
            }
    }
    if (!fire)
        return;
    view spikes = view_of(f, fire->out);
    NAME(lif_constants_i32) k;
    NAME(lif_prepare_i32)(fire, &k);
    ptrdiff_t plane = (ptrdiff_t)spikes.height * spikes.width, at = (ptrdiff_t)y * spikes.width + x;
    for (int p = 0; p < pixels; p++, at++) {
        const int32_t *h = y_row + (ptrdiff_t)p * steps * BLOCK;
        uint8_t *s = spikes.at + y * spikes.row + (x + p) * spikes.pixel + first;
        int8_t *q = (int8_t *)f->state + fire->state + at * channels + first;
        int c = 0;
        for (; c + lanes <= here; c += lanes)
            NAME(lif_lanes_i32)(f, fire, &k, h + c, BLOCK, s + c, spikes.step, q + c, first + c, lanes, channels,
                                plane, at);
        if (c < here)
            NAME(lif_lanes_i32)(f, fire, &k, h + c, BLOCK, s + c, spikes.step, q + c, first + c, here - c, channels,
                                plane, at);
    }
}
