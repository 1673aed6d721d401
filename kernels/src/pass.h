/* pass.h: one pass over a plan's operations, in order: some steps of one sample. */

/* Parts to cut an operation, or the count of a value, into. */
static int NAME(parts_of)(const frame *f, int rows)
{
    const mdsnn_team *team = f->call->team;
    return !team || rows < 2 ? 1 : team->size < rows ? team->size : rows;
}

/* Counts this part's rows of an operation's result; of a fixed one, into the state. */
static void NAME(count_part)(const frame *f, const mdsnn_op *op, int what)
{
    const mdsnn_value *v = &f->plan->values[op->out];
    (void)what;
    if (v->fixed)
        NAME(count)(f, op->out, (int64_t *)(f->state + f->plan->counted) + v->counter);
    else
        NAME(count)(f, op->out, f->call->counts + (ptrdiff_t)v->counter * f->call->steps + f->first_step);
}

static void NAME(count_out)(const frame *f, const mdsnn_op *op)
{
    const mdsnn_value *v = &f->plan->values[op->out];
    if (v->counter < 0)
        return;
    int64_t *kept = (int64_t *)(f->state + f->plan->counted) + v->counter;
    if (v->fixed && f->fresh)
        *kept = 0;
    if (!v->fixed || f->fresh)
        mdsnn_share(f, op, 0, NAME(parts_of)(f, v->height), NAME(count_part));
    if (v->fixed)
        for (int t = 0; t < f->steps; t++)
            f->call->counts[(ptrdiff_t)v->counter * f->call->steps + f->first_step + t] += *kept;
}

static void NAME(run_part)(const frame *f, const mdsnn_op *op, int what)
{
    (void)what;
    const mdsnn_value *values = f->plan->values;
    int narrow = op->out >= 0 && values[op->out].type == MDSNN_I16; /* the stream it makes, or reads */
    if (op->kind == MDSNN_REQUANTIZE || op->kind == MDSNN_LIF)
        narrow = values[op->source].type == MDSNN_I16;
    switch (op->kind) {
    case MDSNN_INPUT:
        NAME(input)(f, op);
        break;
    case MDSNN_CONV:
        NAME(conv)(f, op);
        break;
    case MDSNN_BN_AFFINE:
        (narrow ? NAME(bn_affine_i16) : NAME(bn_affine_i32))(f, op);
        break;
    case MDSNN_BN_DENSE:
        (narrow ? NAME(bn_dense_i16) : NAME(bn_dense_i32))(f, op);
        break;
    case MDSNN_ADD:
        (narrow ? NAME(add_i16) : NAME(add_i32))(f, op);
        break;
    case MDSNN_REQUANTIZE:
        (narrow ? NAME(requantize_i16) : NAME(requantize_i32))(f, op);
        break;
    case MDSNN_LIF:
        (narrow ? NAME(lif_i16) : NAME(lif_i32))(f, op);
        break;
    case MDSNN_MAX_POOL:
        NAME(max_pool)(f, op);
        break;
    case MDSNN_SUM_POOL:
        NAME(sum_pool)(f, op);
        break;
    case MDSNN_FLATTEN:
        NAME(flatten)(f, op);
        break;
    case MDSNN_FUSED:
        NAME(fused)(f, op);
        break;
    default:
        NAME(readout)(f, op);
    }
}

/* Sets the pixels around a value to 0. */
static void NAME(clear_border)(const frame *f, int index)
{
    view v = view_of(f, index);
    ptrdiff_t side = v.border * v.pixel, above = v.border * v.row;
    if (!v.border) /* of values of 8 bits only */
        return;
    memset(v.at - above - side, 0, (size_t)(above + side));
    for (int y = 1; y < v.height; y++)
        memset(v.at + y * v.row - 2 * side, 0, (size_t)(2 * side));
    memset(v.at + v.height * v.row - 2 * side, 0, (size_t)(above + side));
}

static void NAME(run_op)(const frame *f, const mdsnn_op *op)
{
    const mdsnn_value *values = f->plan->values;
    int parts = 1, spikes = op->kind == MDSNN_FUSED ? op->fire ? op->fire->out : -1 : op->out;
    if (spikes >= 0)
        NAME(clear_border)(f, spikes);
    if (op->kind == MDSNN_FUSED) {
        parts = NAME(fused_parts)(f, op);
#ifdef MDSNN_WITH_TILES
        const mdsnn_value *in = &values[op->source];
        if (op->method == MDSNN_TILES && op->work_input >= 0) { /* all parts read the copy: it is there first */
            int64_t at = ticks_start(f);
            mdsnn_share(f, op, 0, parts < 2 ? 1 : NAME(parts_of)(f, in->height + 2 * op->padding), NAME(tiles_copy));
            ticks_count(f, op, MDSNN_GATHER, at);
        }
#endif
    } else if (op->kind != MDSNN_FLATTEN && op->kind != MDSNN_READOUT)
        parts = NAME(parts_of)(f, values[op->out].height);
    mdsnn_share(f, op, 0, parts, NAME(run_part));
#ifdef MDSNN_WITH_TILES
    if (op->kind == MDSNN_FUSED && op->codes && NAME(follows_plain)(f, op)) /* the stream is there, its codes are not */
        mdsnn_share(f, op->codes, 0, NAME(parts_of)(f, values[op->out].height), NAME(run_part));
#endif
}

void NAME(mdsnn_pass)(const frame *f);

void NAME(mdsnn_pass)(const frame *f)
{
    for (int i = 0; i < f->plan->op_count; i++) {
        const mdsnn_op *op = &f->plan->ops[i];
        int64_t at = ticks_start(f);
        if (f->fresh || !op->fixed)
            NAME(run_op)(f, op);
        if ((op->kind == MDSNN_FUSED ? op->fire != 0 : op->out >= 0) && !NAME(counts_itself)(f, op))
            NAME(count_out)(f, op->kind == MDSNN_FUSED ? op->fire : op);
        ticks_count(f, op, MDSNN_WHOLE, at);
    }
}
