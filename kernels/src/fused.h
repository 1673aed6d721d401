/* fused.h: a convolution and what follows it, a band of output rows at a time.
 *
 * An operation in parts: each takes some rows, or, where there are few, some blocks of outputs (tiles.h has a rule of its
 * own).
 */

/* Whether parts take rows. */
static inline int NAME(parts_are_rows)(const frame *f, int height) { return f->parts == 1 || height >= f->parts; }

static void NAME(fused_events)(const frame *f, const mdsnn_op *op, const NAME(lif_constants_i16) *k)
{
    view in = view_of(f, op->source), to = view_of(f, op->fire ? op->fire->out : op->out);
    NAME(events) e =
        NAME(events_prepare)(op, &in, to.channels, to.width, steps_of(f, op), f->work + op->work_spots);
    uint8_t *lists = f->work + op->work_input;
    int16_t *sums = (int16_t *)(f->work + op->work_sums);
    int8_t *slab = (int8_t *)(f->work + op->work_slab);
    uint32_t *starts = (uint32_t *)(f->work + op->work_starts);
    ptrdiff_t starts_slab = (ptrdiff_t)e.steps * in.width + 1, starts_row = starts_slab * e.slabs;
    ptrdiff_t window = (ptrdiff_t)e.steps * BLOCK, sums_row = e.across * window;
    int32_t *totals = (int32_t *)(sums + sums_row * op->band);
    ptrdiff_t weights = NAME(slab_at)(op, e.own);
    int16_t *y_row = (int16_t *)(f->work + op->work_y);
    share part = share_of(f, to.height, e.outs, NAME(parts_are_rows)(f, to.height));
    for (int y = part.y, found = 0; y < part.end_y; y += op->band) {
        int rows = part.end_y - y < op->band ? part.end_y - y : op->band;
        int first = y * op->stride - op->padding, last = first + (rows - 1) * op->stride + op->kernel_height;
        found = found < first ? first : found;
        last = last < in.height ? last : in.height;
        int64_t at = ticks_start(f);
        NAME(find_spikes)(f, &in, &e, found, last);
        found = found < last ? last : found;
        uint8_t *end = lists;
        for (int r = 0; r < rows; r++)
            end = NAME(list_row)(op, &in, &e, y + r, lists, end, starts + r * starts_row, starts_slab);
        at = ticks_count(f, op, MDSNN_GATHER, at);
        for (int o = part.out; o < part.end_out; o++) {
            const uint32_t *own = starts + NAME(own_first)(op, &in, o, to.channels) * e.groups * starts_slab;
            memset(sums, 0, sizeof *sums * (size_t)(sums_row * rows));
            for (int i = 0; i < e.own; i++) {
                const int8_t *packed = op->weight + (o * weights + NAME(slab_at)(op, i)) / (op->nibbles ? 2 : 1);
                int only = e.own == 1 && part.end_out - part.out == 1; /* then it is still there */
                if (op->nibbles && (y == part.y || !only))
                    NAME(unpack)(packed, NAME(slab_at)(op, i + 1) - NAME(slab_at)(op, i), slab);
                for (int r = 0; r < rows; r++)
                    NAME(events_row)(op, &in, &e, i, lists, own + r * starts_row + i * starts_slab,
                                     op->nibbles ? slab : packed, sums + r * sums_row);
                if (op->widen && ((i + 1) % op->widen == 0 || i + 1 == e.own))
                    NAME(widen)(sums, sums_row * rows, i < op->widen, totals);
            }
            at = ticks_count(f, op, MDSNN_SUMS, at);
            for (int r = 0; r < rows; r++) {
                ptrdiff_t row = r * sums_row + e.left * window;
                NAME(epilogue)(f, op, k, op->widen ? (const void *)(totals + row) : sums + row, op->widen != 0, y_row,
                               y + r, 0, to.width, o * BLOCK, BLOCK);
            }
            at = ticks_count(f, op, MDSNN_EPILOGUE, at);
        }
    }
}

static void NAME(fused_pairs)(const frame *f, const mdsnn_op *op, const NAME(lif_constants_i16) *k)
{
    view in = view_of(f, op->source), to = view_of(f, op->fire ? op->fire->out : op->out);
    int steps = steps_of(f, op), outs = (to.channels + BLOCK - 1) / BLOCK, rows = to.width * steps;
    void *columns = f->work + op->work_input;
    int32_t *sums = (int32_t *)(f->work + op->work_sums);
    int16_t *y_row = (int16_t *)(f->work + op->work_y);
    share part = share_of(f, to.height, outs, NAME(parts_are_rows)(f, to.height));
    for (int y = part.y; y < part.end_y; y++) {
        int64_t at = ticks_start(f);
#if defined(__AVX2__)
        if (op->method == MDSNN_BYTES)
            NAME(bytes_columns)(op, &in, steps, y, to.width, columns);
        else
#endif
            NAME(pairs_columns)(op, &in, steps, y, to.width, columns);
        at = ticks_count(f, op, MDSNN_GATHER, at);
        for (int o = part.out; o < part.end_out; o++) {
#if defined(__AVX2__)
            if (op->method == MDSNN_BYTES)
                NAME(bytes_row)(columns, rows, op->depth, op->flush,
                                op->weight + o * ((ptrdiff_t)op->depth + 4) * BLOCK, sums);
            else
#endif
                NAME(pairs_row)(columns, rows, op->depth, op->weight + (ptrdiff_t)o * op->depth * BLOCK * 2, sums);
            at = ticks_count(f, op, MDSNN_SUMS, at);
            NAME(epilogue)(f, op, k, sums, 1, y_row, y, 0, to.width, o * BLOCK, BLOCK);
            at = ticks_count(f, op, MDSNN_EPILOGUE, at);
        }
    }
}

static void NAME(fused_grouped)(const frame *f, const mdsnn_op *op, const NAME(lif_constants_i16) *k)
{
    view in = view_of(f, op->source), to = view_of(f, op->fire ? op->fire->out : op->out);
    int steps = steps_of(f, op), outs = (to.channels + BLOCK - 1) / BLOCK, ins = in.channels / op->groups;
    int8_t *spread = (int8_t *)(f->work + op->work_input);
    const int16_t *weights = (const int16_t *)(const void *)op->weight;
    ptrdiff_t block = (ptrdiff_t)op->kernel_height * op->kernel_width * ins * BLOCK;
    void *sums = f->work + op->work_sums;
    int16_t *y_row = (int16_t *)(f->work + op->work_y);
    share part = share_of(f, to.height, outs, NAME(parts_are_rows)(f, to.height));
    for (int o = part.out; o < part.end_out; o++)
        for (int y = part.y, done = 0; y < part.end_y; y++) {
            int first = y * op->stride - op->padding, last = first + op->kernel_height;
            int64_t at = ticks_start(f);
            for (done = done < first || y == part.y ? first : done; done < last; done++)
                NAME(grouped_spread)(op, &in, steps, done, o, to.channels, spread);
            at = ticks_count(f, op, MDSNN_GATHER, at);
            if (op->widen)
                NAME(grouped_row_32)(op, ins, steps, y, in.width, to.width, spread, weights + o * block, sums);
            else
                NAME(grouped_row_16)(op, ins, steps, y, in.width, to.width, spread, weights + o * block, sums);
            at = ticks_count(f, op, MDSNN_SUMS, at);
            NAME(epilogue)(f, op, k, sums, op->widen, y_row, y, 0, to.width, o * BLOCK, BLOCK);
            at = ticks_count(f, op, MDSNN_EPILOGUE, at);
        }
}

/* How many parts a fused operation is cut into. */
static int NAME(fused_parts)(const frame *f, const mdsnn_op *op)
{
    const mdsnn_value *to = &f->plan->values[op->fire ? op->fire->out : op->out];
    int size = f->call->team ? f->call->team->size : 1, outs = (to->channels + BLOCK - 1) / BLOCK;
#ifdef MDSNN_WITH_TILES
    if (op->method == MDSNN_TILES)
        return NAME(tiles_parts)(f, op);
#endif
    return to->height >= size || to->height >= outs ? (to->height < size ? to->height : size) : outs < size ? outs : size;
}

static void NAME(fused)(const frame *f, const mdsnn_op *op)
{
    NAME(lif_constants_i16) k;
    if (op->fire && op->width != MDSNN_WIDE)
        NAME(lif_prepare_i16)(op->fire, &k);
    else
        memset(&k, 0, sizeof k);
    if (op->method == MDSNN_PAIRS || op->method == MDSNN_BYTES)
        NAME(fused_pairs)(f, op, &k);
    else if (op->method == MDSNN_GROUPED)
        NAME(fused_grouped)(f, op, &k);
#ifdef MDSNN_WITH_TILES
    else if (op->method == MDSNN_TILES)
        NAME(fused_tiles)(f, op, &k);
#endif
    else
        NAME(fused_events)(f, op, &k);
}
