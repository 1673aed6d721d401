/* fused.h: a convolution and what follows it, a band of output rows at a time. */

static void NAME(fused_events)(const frame *f, const mdsnn_op *op, const NAME(lif_constants_i16) *k)
{
    view in = view_of(f, op->source), to = view_of(f, op->fire ? op->fire->out : op->out);
    NAME(events) e = NAME(events_prepare)(op, &in, to.channels, to.width, steps_of(f, op));
    uint8_t *lists = f->call->scratch + op->work_input, *sums = f->call->scratch + op->work_sums;
    uint32_t *starts = (uint32_t *)(f->call->scratch + op->work_starts);
    int wide = op->method == MDSNN_EVENTS_32;
    ptrdiff_t starts_slab = (ptrdiff_t)e.steps * in.width + 1, starts_row = starts_slab * e.slabs;
    ptrdiff_t window = (ptrdiff_t)e.steps * BLOCK * (wide ? 4 : 2), sums_row = e.across * window; /* bytes */
    ptrdiff_t weights = NAME(slab_weights)(op, e.slabs);
    int16_t *y_row = (int16_t *)(f->call->scratch + op->work_y);
    for (int y = 0; y < to.height; y += op->band) {
        int rows = to.height - y < op->band ? to.height - y : op->band;
        uint8_t *end = lists;
        for (int r = 0; r < rows; r++)
            end = NAME(list_row)(f, op, &in, &e, y + r, lists, end, starts + r * starts_row, starts_slab);
        for (int o = 0; o < e.outs; o++) {
            memset(sums, 0, (size_t)(sums_row * rows));
            for (int i = 0; i < e.slabs; i++)
                for (int r = 0; r < rows; r++)
                    NAME(events_row)(op, &in, &e, i, lists, starts + r * starts_row + i * starts_slab,
                                     op->weight + o * weights + NAME(slab_weights)(op, i), sums + r * sums_row);
            for (int r = 0; r < rows; r++)
                NAME(epilogue)(f, op, k, sums + r * sums_row + e.left * window, wide, y_row, y + r, 0, to.width, o);
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
    if (op->fire && f->plan->stream_type == MDSNN_I16)
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
