/* readout.h: the classifier. logits = weight @ (sum over t of x) + bias.
 *
 * Definition: kernels/reference.py:readout. This file agrees with it bit for bit
 * (tests/test_kernels_bit_exact.py); where the two differ, this file is wrong.
 *
 * The sums are kept in the state, so that a stream's logits are those of the steps so far. The proof holds every sum,
 * and every partial sum of a logit in any order, below 2**31.
 */

static void NAME(readout)(const frame *f, const mdsnn_op *op)
{
    view in = view_of(f, op->source);
    int32_t *total = (int32_t *)(f->state + op->state);
    int32_t *logits = f->call->logits + (ptrdiff_t)f->sample * f->plan->classes;
    if (f->fresh)
        memset(total, 0, sizeof *total * (size_t)in.channels);
    for (int t = 0; t < f->steps; t++)
        if (in.type == MDSNN_I8) {
            const int8_t *x = (const int8_t *)in.at + t * in.step;
            for (int i = 0; i < in.channels; i++)
                total[i] += x[i];
        } else {
            const int32_t *x = (const int32_t *)in.at + t * in.step;
            for (int i = 0; i < in.channels; i++)
                total[i] += x[i];
        }
    for (int k = 0; k < f->plan->classes; k++) {
        const int8_t *row = op->weight + (ptrdiff_t)k * in.channels;
        int32_t sum = 0;
        for (int i = 0; i < in.channels; i++)
            sum += row[i] * total[i];
        logits[k] = sum + op->table[k];
    }
}
