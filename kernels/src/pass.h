/* pass.h: one pass over a plan's operations, in order: some steps of one sample. */

static void NAME(count_out)(const frame *f, const mdsnn_op *op)
{
    const mdsnn_value *v = &f->plan->values[op->out];
    if (v->counter < 0)
        return;
    int64_t *counts = f->call->counts + (ptrdiff_t)v->counter * f->call->steps + f->first_step;
    if (!v->fixed) {
        NAME(count)(f, op->out, counts);
        return;
    }
    int64_t *kept = (int64_t *)(f->state + f->plan->counted) + v->counter;
    if (f->fresh) {
        *kept = 0;
        NAME(count)(f, op->out, kept);
    }
    for (int t = 0; t < f->steps; t++)
        counts[t] += *kept;
}

static void NAME(run_op)(const frame *f, const mdsnn_op *op)
{
    int narrow = f->plan->stream_type == MDSNN_I16;
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

void NAME(mdsnn_pass)(const frame *f);

void NAME(mdsnn_pass)(const frame *f)
{
#ifdef MDSNN_WITH_TILES
    NAME(tiles_begin)();
#endif
    for (int i = 0; i < f->plan->op_count; i++) {
        const mdsnn_op *op = &f->plan->ops[i];
        if (f->fresh || !op->fixed)
            NAME(run_op)(f, op);
        if (op->kind == MDSNN_FUSED ? op->fire != 0 : op->out >= 0)
            NAME(count_out)(f, op->kind == MDSNN_FUSED ? op->fire : op);
    }
#ifdef MDSNN_WITH_TILES
    NAME(tiles_end)();
#endif
}
