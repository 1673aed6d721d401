/* fused.h: a convolution and what follows it, a band of output rows at a time. */

static void NAME(fused_events)(const frame *f, const mdsnn_op *op, const NAME(lif_constants_i16) *k)
{
    view in = view_of(f, op->source), to = view_of(f, op->fire ? op->fire->out : op->out);
    int steps = steps_of(f, op), ins = (in.channels + BLOCK - 1) / BLOCK, outs = (to.channels + BLOCK - 1) / BLOCK;
    uint32_t *lists = (uint32_t *)(f->call->scratch + op->work_input);
    uint32_t *starts = (uint32_t *)(f->call->scratch + op->work_starts);
    uint8_t *sums = f->call->scratch + op->work_sums;
    int wide = op->method == MDSNN_EVENTS_32;
    ptrdiff_t starts_row = (ptrdiff_t)steps * (in.width + 1), starts_block = starts_row * op->band;
    ptrdiff_t sums_row = (ptrdiff_t)to.width * steps * BLOCK * (wide ? 4 : 2); /* bytes */
    ptrdiff_t weights = (ptrdiff_t)op->kernel_height * op->kernel_width * BLOCK * BLOCK;
    int16_t *y_row = (int16_t *)(f->call->scratch + op->work_y);
    for (int y = 0; y < to.height; y += op->band) {
        int rows = to.height - y < op->band ? to.height - y : op->band;
        uint32_t *end = lists;
        for (int r = 0; r < rows; r++)
            end = NAME(list_row)(f, op, &in, steps, y + r, lists, end, starts + r * starts_row, starts_block);
        for (int o = 0; o < outs; o++) {
            memset(sums, 0, (size_t)(sums_row * rows));
            for (int i = 0; i < ins; i++)
                for (int r = 0; r < rows; r++)
                    NAME(events_row)(op, &in, to.width, steps, lists, starts + i * starts_block + r * starts_row,
                                     op->weight + ((ptrdiff_t)o * ins + i) * weights, sums + r * sums_row);
            for (int r = 0; r < rows; r++)
                NAME(epilogue)(f, op, k, sums + r * sums_row, wide, y_row, y + r, 0, to.width, o);
        }
    }
}

static void NAME(fused_pairs)(const frame *f, const mdsnn_op *op, const NAME(lif_constants_i16) *k)
{
    view in = view_of(f, op->source), to = view_of(f, op->fire ? op->fire->out : op->out);
    int steps = steps_of(f, op), outs = (to.channels + BLOCK - 1) / BLOCK, rows = to.width * steps;
    int16_t *columns = (int16_t *)(f->call->scratch + op->work_input);
    int32_t *sums = (int32_t *)(f->call->scratch + op->work_sums);
    int16_t *y_row = (int16_t *)(f->call->scratch + op->work_y);
    for (int y = 0; y < to.height; y++) {
        NAME(pairs_columns)(op, &in, steps, y, to.width, columns);
        for (int o = 0; o < outs; o++) {
            NAME(pairs_row)(columns, rows, op->depth, op->weight + (ptrdiff_t)o * op->depth * BLOCK * 2, sums);
            NAME(epilogue)(f, op, k, sums, 1, y_row, y, 0, to.width, o);
        }
    }
}

#ifdef MDSNN_WITH_TILES
static void NAME(fused_tiles)(const frame *f, const mdsnn_op *op, const NAME(lif_constants_i16) *k)
{
    view in = view_of(f, op->source), to = view_of(f, op->fire ? op->fire->out : op->out);
    int steps = steps_of(f, op), outs = (to.channels + BLOCK - 1) / BLOCK;
    int32_t *sums = (int32_t *)(f->call->scratch + op->work_sums);
    int16_t *y_row = (int16_t *)(f->call->scratch + op->work_y);
    NAME(tiles) g = NAME(tiles_prepare)(op, &in, to.width, steps, f->call->scratch + op->work_input);
    for (int y = 0; y < to.height; y += op->band) {
        int rows = to.height - y < op->band ? to.height - y : op->band;
        for (int o = 0; o < outs; o++) {
            NAME(tiles_band)(op, &g, y, rows, op->weight + o * g.weights, sums);
            for (int r = 0; r < rows; r++)
                NAME(epilogue)(f, op, k, sums + r * g.sums_row, 1, y_row, y + r, 0, to.width, o);
        }
    }
}
#endif

static void NAME(fused)(const frame *f, const mdsnn_op *op)
{
    NAME(lif_constants_i16) k;
    if (op->fire)
        NAME(lif_prepare_i16)(op->fire, &k);
    else
        memset(&k, 0, sizeof k);
    if (op->method == MDSNN_PAIRS)
        NAME(fused_pairs)(f, op, &k);
#ifdef MDSNN_WITH_TILES
    else if (op->method == MDSNN_TILES)
        NAME(fused_tiles)(f, op, &k);
#endif
    else
        NAME(fused_events)(f, op, &k);
}
