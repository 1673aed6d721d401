/* fused.h: a convolution and what follows it, a band of output rows at a time. */

static void NAME(fused_events)(const frame *f, const mdsnn_op *op, const NAME(lif_constants_i16) *k)
{
    view in = view_of(f, op->source), to = view_of(f, op->fire ? op->fire->out : op->out);
    int steps = steps_of(f, op), ins = (in.channels + BLOCK - 1) / BLOCK, outs = (to.channels + BLOCK - 1) / BLOCK;
    uint32_t *lists = (uint32_t *)(f->call->scratch + op->work_lists);
    uint32_t *starts = (uint32_t *)(f->call->scratch + op->work_starts);
    int16_t *sums = (int16_t *)(f->call->scratch + op->work_sums);
    ptrdiff_t starts_row = (ptrdiff_t)steps * (in.width + 1), starts_block = starts_row * op->band;
    ptrdiff_t sums_row = (ptrdiff_t)to.width * steps * BLOCK;
    ptrdiff_t weights = (ptrdiff_t)op->kernel_height * op->kernel_width * BLOCK * BLOCK;
    int16_t *y_row = sums + sums_row * op->band;
    for (int y = 0; y < to.height; y += op->band) {
        int rows = to.height - y < op->band ? to.height - y : op->band;
        uint32_t *end = lists;
        for (int r = 0; r < rows; r++)
            end = NAME(list_row)(op, &in, steps, y + r, lists, end, starts + r * starts_row, starts_block);
        for (int o = 0; o < outs; o++) {
            memset(sums, 0, sizeof *sums * (size_t)(sums_row * rows));
            for (int i = 0; i < ins; i++)
                for (int r = 0; r < rows; r++)
                    NAME(events_row)(op, &in, to.width, steps, lists, starts + i * starts_block + r * starts_row,
                                     op->weight + ((ptrdiff_t)o * ins + i) * weights, sums + r * sums_row);
            for (int r = 0; r < rows; r++)
                NAME(epilogue)(f, op, k, sums + r * sums_row, 0, y_row, y + r, 0, to.width, o);
        }
    }
}

static void NAME(fused)(const frame *f, const mdsnn_op *op)
{
    NAME(lif_constants_i16) k;
    if (op->fire)
        NAME(lif_prepare_i16)(op->fire, &k);
    else
        memset(&k, 0, sizeof k);
    NAME(fused_events)(f, op, &k);
}
