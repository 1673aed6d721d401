/* follow.h: bn, residual add and LIF behind the tiles of tiles.h, a step of a few pixels and 32 channels at a time.
 *
 * Definitions: kernels/reference.py:bn_affine, residual_add, lif_step. This file agrees with them bit for bit
 * (tests/test_kernels_bit_exact.py); where they differ, this file is wrong. The stream is 16 bits here, or follow_wide.h
 * adds; what has no case of its own goes to epilogue.h. The caller puts these steps between its products, so that the
 * matrix unit and the vector unit work side by side.
 */

#define TILE 16
#define PAIR 32

/* Of bn, in the order of the sums; of the LIF, on h + 2**15 without sign: a word is in bucket
 * min(word - base, last) >> bucket, never below the first. */
typedef struct NAME(constants) {
    __m512i multiplier_0, multiplier_1, offset_0, offset_1, shift_0, shift_1, bottom, top, unit;
    __m512i v_th, base, reset, last, bucket, threshold, decode, start, one;
    __m512i factor, lowest, highest; /* of codes: a factor in place of the shift, as in residual.h */
    const int32_t *table; /* mdsnn_op.code_decode, or null */
    int by_lines;         /* 1: h is biased by what lines want */
    NAME(lines) lines;
} NAME(constants);

/* What the 32 channels from `first` on need after their sums. */
typedef struct NAME(follow) {
    const frame *f;
    const mdsnn_op *op;
    const NAME(lif_constants_i16) *k;
    view other, out, spikes; /* each begins at channel `first`; out: the stream, or its codes */
    int steps, first;
    int plain;     /* 1: a case for epilogue.h */
    int clamped;   /* 1: the stream has 32 bits; pixels and steps of other and out are in words of 16 */
    NAME(wide_add) sum;
    int mixed;     /* 1: the second half of the sums is 16 times itself and the first half */
    int16_t *room; /* its rows after bn */
    int32_t *rows; /* its sums, in order, 64 to a step */
    int64_t *counts; /* spikes of each step of this part, or null */
    int room_for;    /* pixels that may still be added to: */
    __m256i fired[MDSNN_STEPS]; /* spikes of each step and channel, at most 255 */
    __m256i *coded;       /* the same of codes that are not 0 */
    int64_t *code_counts; /* and all of those, or null: there are no codes */
    int apart;            /* codes of every so many rows and columns are kept */
    NAME(constants) c;
} NAME(follow);

/* A pixel of a batch: its sums [t][half][16], and where its first step lies in the values. */
typedef struct NAME(slot) {
    const int32_t *sums;
    const int16_t *add;
    int16_t *to; /* or its codes; null: they are only counted */
    uint8_t *s;
} NAME(slot);

enum { NAME(slots) = 2 * TILE }; /* pixels of two groups */

/* A few groups of tiles. */
typedef struct NAME(batch) {
    NAME(follow) *e;
    int slots; /* its pixels; 0: nothing to do */
    NAME(slot) slot[NAME(slots)];
} NAME(batch);

/* Where bn and LIF of a batch are: all steps of four pixels come before the next four. */
typedef struct NAME(cursor) {
    const NAME(slot) *slot, *end;
    int t;
    __m512i decoded[4];
} NAME(cursor);

/* One step of `many` pixels for 32 channels. The last arguments are constants of the caller, so that each use is
 * compiled for its own case: bn affine, with products of 16 bits and no MDSNN_CLAMP_ENDS if `quick`; a stream of 32 bits
 * if `clamped`, which is stored if `stores` is 1, and whose codes are if that is 2; a hard reset after a LIF whose
 * thresholds lie in buckets, beyond which u never is, or, where `table` is 2, under lines, or, where it is 1, anywhere;
 * nothing kept. */
static inline __attribute__((always_inline)) void NAME(follow_slots)(const NAME(constants) *c, NAME(follow) *e,
                                                                     NAME(cursor) *at, int many, int quick,
                                                                     int clamped, int adds, int stores, int fires,
                                                                     int table)
{
    const int free = quick && fires && !adds && !stores && !table; /* MDSNN_CLAMP_NONE */
    const ptrdiff_t t = at->t, add_at = t * e->other.step, to_at = t * e->out.step, s_at = t * e->spikes.step;
    __m256i fired = _mm256_setzero_si256(), coded = fired;
    __m512i code[4];
#pragma GCC unroll 4
    for (int j = 0; j < many; j++) {
        const NAME(slot) *slot = at->slot + j;
        __m512i low = _mm512_loadu_si512(slot->sums + t * PAIR);
        __m512i high = _mm512_loadu_si512(slot->sums + t * PAIR + TILE);
        if (e->mixed) /* 16 times the weights of these outputs and those of the others were one byte */
            high = _mm512_srai_epi32(_mm512_sub_epi32(high, low), 4);
        if (quick) { /* multipliers are pairs of 16 bits, the second one 0 */
            low = _mm512_dpwssd_epi32(c->offset_0, low, c->multiplier_0);
            high = _mm512_dpwssd_epi32(c->offset_1, high, c->multiplier_1);
        } else {
            low = _mm512_add_epi32(_mm512_mullo_epi32(low, c->multiplier_0), c->offset_0);
            high = _mm512_add_epi32(_mm512_mullo_epi32(high, c->multiplier_1), c->offset_1);
        }
        low = _mm512_srav_epi32(low, c->shift_0);
        high = _mm512_srav_epi32(high, c->shift_1);
        __m512i v;
        if ((adds || stores) && clamped) {
            v = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high);
            high = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high);
            v = (__m512i)NAME(add_wide)(&e->sum, (NAME(v32))v, (NAME(v32))high, adds, slot->add + add_at, stores,
                                        slot->to + to_at);
        } else {
            if (free)
                v = _mm512_packus_epi32(low, high);
            else if (quick)
                v = _mm512_mulhrs_epi16(_mm512_packs_epi32(low, high), c->unit);
            else
                v = _mm512_min_epi16(_mm512_max_epi16(_mm512_packs_epi32(low, high), c->bottom), c->top);
            if (adds)
                v = _mm512_add_epi16(v, _mm512_loadu_si512(slot->add + add_at));
            if (stores == 1)
                _mm512_storeu_si512(slot->to + to_at, v);
            if (stores == 2) {
                code[j] = _mm512_mulhrs_epi16(v, c->factor);
                coded = _mm256_mask_add_epi8(coded, _mm512_test_epi16_mask(code[j], code[j]), coded, _mm256_set1_epi8(1));
            }
        }
        if (fires) {
            __m512i h = free ? _mm512_adds_epu16(v, at->decoded[j]) : _mm512_add_epi16(v, at->decoded[j]);
            __mmask32 still = _mm512_cmple_epu16_mask(h, c->v_th);
            __m256i spikes = _mm256_mask_mov_epi8(_mm256_set1_epi8(1), still, _mm256_setzero_si256());
            _mm256_storeu_si256((__m256i *)(slot->s + s_at), spikes);
            fired = _mm256_add_epi8(fired, spikes);
            if (table == 2 || (table && c->by_lines)) {
                __m512i x = _mm512_mask_max_epu16(c->reset, still, h, c->base);
                at->decoded[j] = NAME(line_decoded)(&c->lines, x);
                continue;
            }
            __m512i u = _mm512_mask_subs_epu16(c->reset, still, h, c->base);
            if (table)
                u = _mm512_min_epu16(u, c->last);
            if (table && c->table) {
                const __m512i zero = _mm512_setzero_si512(); /* words apart and together again keep their order */
                low = _mm512_i32gather_epi32(_mm512_unpacklo_epi16(u, zero), c->table, 4);
                high = _mm512_i32gather_epi32(_mm512_unpackhi_epi16(u, zero), c->table, 4);
                u = _mm512_packs_epi32(_mm512_srai_epi32(low, 16), _mm512_srai_epi32(high, 16));
                at->decoded[j] = _mm512_xor_si512(u, _mm512_set1_epi16((short)0x8000));
            } else {
                __m512i i = _mm512_srlv_epi16(u, c->bucket);
                __mmask32 reached = _mm512_cmpge_epu16_mask(u, _mm512_permutexvar_epi16(i, c->threshold));
                i = _mm512_mask_add_epi16(i, reached, i, c->one);
                at->decoded[j] = _mm512_permutexvar_epi16(i, c->decode);
            }
        }
    }
    if (fires)
        e->fired[t] = _mm256_add_epi8(e->fired[t], fired);
    if (stores != 2)
        return;
    e->coded[t] = _mm256_add_epi8(e->coded[t], coded);
    uintptr_t any = 0; /* one branch for all of them: most often they are of one row */
#pragma GCC unroll 4
    for (int j = 0; j < many; j++)
        any |= (uintptr_t)at->slot[j].to;
    if (!any)
        return;
#pragma GCC unroll 4
    for (int j = 0; j < many; j++)
        if (at->slot[j].to) {
            __m512i kept = _mm512_min_epi16(_mm512_max_epi16(code[j], c->lowest), c->highest);
            _mm256_storeu_si256((__m256i *)((int8_t *)at->slot[j].to + to_at), _mm512_cvtepi16_epi8(kept));
        }
}

/* One step of the next four pixels; or of the next one. */
static inline __attribute__((always_inline)) void NAME(follow_next)(const NAME(constants) *c, NAME(follow) *e,
                                                                    NAME(cursor) *at, int quick, int clamped, int adds,
                                                                    int stores, int fires, int table)
{
    int many = at->end - at->slot >= 4 ? 4 : at->end - at->slot >= 2 ? 2 : 1;
    if (many == 4)
        NAME(follow_slots)(c, e, at, 4, quick, clamped, adds, stores, fires, table);
    else if (many == 2)
        NAME(follow_slots)(c, e, at, 2, quick, clamped, adds, stores, fires, table);
    else
        NAME(follow_slots)(c, e, at, 1, quick, clamped, adds, stores, fires, table);
    if (++at->t == e->steps) {
        at->t = 0;
        at->slot += many;
        at->decoded[0] = at->decoded[1] = at->decoded[2] = at->decoded[3] = c->start;
    }
}

/* Its constants, one by one: gcc copies the whole by a loop that everything waits for. */
static inline __attribute__((always_inline)) NAME(constants) NAME(constants_of)(const NAME(follow) *e)
{
    const NAME(constants) *k = &e->c;
    const NAME(lines) *l = &k->lines;
    return (NAME(constants)){k->multiplier_0, k->multiplier_1, k->offset_0, k->offset_1, k->shift_0, k->shift_1,
                             k->bottom, k->top, k->unit, k->v_th, k->base, k->reset, k->last, k->bucket, k->threshold,
                             k->decode, k->start, k->one, k->factor, k->lowest, k->highest, k->table, k->by_lines,
                             {{l->slope[0], l->slope[1]}, {l->offset[0], l->offset[1]}, l->each, l->shift, l->fraction,
                              l->mask, l->rest, l->factor}};
}

/* Moves what was counted of each step to `counts`. */
static inline void NAME(move_counts)(const NAME(follow) *e, __m256i *counted, int64_t *counts)
{
    int channels = e->spikes.channels - e->first;
    __mmask32 there = channels < PAIR ? (1u << channels) - 1 : UINT32_MAX; /* the others may fire, too */
    for (int t = 0; t < e->steps; t++) {
        __m256i sums = _mm256_sad_epu8(_mm256_maskz_mov_epi8(there, counted[t]), _mm256_setzero_si256());
        __m128i two = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        counts[t] += _mm_cvtsi128_si64(two) + _mm_extract_epi64(two, 1);
        counted[t] = _mm256_setzero_si256();
    }
}

/* Adds the spikes of all pixels so far, and their codes, to the counts. */
static void NAME(count_fired)(NAME(follow) *e)
{
    e->room_for = UINT8_MAX;
    if (e->counts)
        NAME(move_counts)(e, e->fired, e->counts);
    if (e->code_counts)
        NAME(move_counts)(e, e->coded, e->code_counts);
}

/* Adds the `pixels` pixels of a group from (y, x) on. */
static void NAME(batch_add)(NAME(batch) *batch, const int32_t *sums, int y, int x, int pixels)
{
    const NAME(follow) *e = batch->e;
    NAME(slot) slot = {sums, (const int16_t *)e->other.at + y * e->other.row + x * e->other.pixel,
                       (int16_t *)e->out.at + y * e->out.row + x * e->out.pixel,
                       e->spikes.at + y * e->spikes.row + x * e->spikes.pixel};
    if (e->code_counts) {
        const int apart = e->apart;
        int left = y % apart ? INT32_MAX : (apart - 1) - (x + apart - 1) % apart; /* pixels before one that is read */
        uint8_t *codes = e->out.at + y / apart * e->out.row + (x + apart - 1) / apart * e->out.pixel;
        for (int j = 0; j < pixels; j++, left--) {
            slot.to = left ? 0 : (int16_t *)(void *)codes;
            codes += left ? 0 : e->out.pixel;
            left += left ? 0 : apart;
            batch->slot[batch->slots++] = slot;
            slot.sums += (ptrdiff_t)e->steps * PAIR;
            slot.add += e->other.pixel;
            slot.s += e->spikes.pixel;
        }
        return;
    }
    for (int j = 0; j < pixels; j++) {
        batch->slot[batch->slots++] = slot;
        slot.sums += (ptrdiff_t)e->steps * PAIR;
        slot.add += e->other.pixel;
        slot.to += e->out.pixel;
        slot.s += e->spikes.pixel;
    }
}

/* The pixels of another batch of the same channels, a row further down; their sums lie `ahead` of its. */
static inline void NAME(batch_below)(NAME(batch) *batch, const NAME(batch) *above, ptrdiff_t ahead)
{
    _Static_assert(sizeof(NAME(slot)) == sizeof(__m256i), "four pointers");
    const NAME(follow) *e = batch->e;
    const __m256i on = _mm256_setr_epi64x(ahead * (ptrdiff_t)sizeof(int32_t), e->other.row * (ptrdiff_t)sizeof(int16_t),
                                          e->out.row * (ptrdiff_t)sizeof(int16_t), e->spikes.row);
    batch->slots = above->slots;
    for (int i = 0; i < above->slots; i++) {
        const __m256i slot = _mm256_loadu_si256((const __m256i *)&above->slot[i]);
        _mm256_storeu_si256((__m256i *)&batch->slot[i], _mm256_add_epi64(slot, on));
    }
}

/* Any other case, by epilogue.h: the `pixels` pixels of a group from (y, x) on. */
APART static void NAME(follow_plain)(const NAME(follow) *e, const int32_t *sums, int y, int x, int pixels)
{
    for (ptrdiff_t row = 0; row < (ptrdiff_t)pixels * e->steps; row++)
        for (int c = 0; c < PAIR; c += 4)
            memcpy(e->rows + row * BLOCK + c, sums + row * PAIR + (c & 4 ? TILE : 0) + c / 8 * 4, 4 * sizeof *sums);
    NAME(epilogue)(e->f, e->op, e->k, e->rows, 1, e->room, y, x, pixels, e->first, PAIR);
}

/* Distances in words of 16 bits. */
static void NAME(stretch)(view *v)
{
    v->row = NAME(in_words)(v, v->row);
    v->pixel = NAME(in_words)(v, v->pixel);
    v->step = NAME(in_words)(v, v->step);
}

/* Whether it is a case for epilogue.h. */
static int NAME(follows_plain)(const frame *f, const mdsnn_op *op)
{
    const mdsnn_op *bn = op->bn, *fire = op->fire;
    return op->width == MDSNN_WIDE || bn->kind != MDSNN_BN_AFFINE || bn->wide ||
           (fire && (!f->fresh || f->keep || f->call->trace_h || fire->pre_fire || fire->soft ||
                     !(fire->buckets || fire->lines || fire->search == MDSNN_TABLE)));
}

/* `counts`: where spikes are added up, zeros yet. */
static void NAME(follow_begin)(NAME(follow) *e, const frame *f, const mdsnn_op *op, const NAME(lif_constants_i16) *k,
                               int64_t *counts)
{
    const mdsnn_op *fire = op->fire;
    memset(e, 0, sizeof *e);
    e->f = f;
    e->op = op;
    e->k = k;
    e->steps = steps_of(f, op);
    if (op->other >= 0)
        e->other = view_of(f, op->other);
    if (op->out >= 0)
        e->out = view_of(f, op->out);
    if (fire)
        e->spikes = view_of(f, fire->out);
    e->c.top = _mm512_set1_epi16(NAME(saturation)(op));
    e->c.bottom = _mm512_sub_epi16(_mm512_setzero_si512(), e->c.top);
    const __m512i sign = _mm512_set1_epi16((short)0x8000);
    e->c.v_th = _mm512_xor_si512((__m512i)k->v_th, sign);
    e->c.start = _mm512_xor_si512((__m512i)k->decode_zero, sign);
    e->c.one = _mm512_set1_epi16(1);
    e->c.unit = _mm512_set1_epi16((short)(1 << (15 - op->clamp_bits)));
    if (op->clamp == MDSNN_CLAMP_NONE) {
        __m512i bias = _mm512_set1_epi16((short)(op->clamp_bias + op->decode_bias));
        e->c.v_th = _mm512_add_epi16((__m512i)k->v_th, bias);
        e->c.start = _mm512_add_epi16((__m512i)k->decode_zero, _mm512_set1_epi16((short)op->decode_bias));
        e->c.base = _mm512_add_epi16(k->bucket_base, bias);
        e->c.reset = _mm512_subs_epu16(bias, e->c.base);
        e->c.bucket = _mm512_set1_epi16((short)fire->bucket_shift);
        e->c.threshold = _mm512_sub_epi16(k->bucket_threshold, k->bucket_base);
        e->c.decode = _mm512_add_epi16(k->bucket_decode, _mm512_set1_epi16((short)op->decode_bias));
    } else if (fire && fire->buckets) {
        int32_t last = (MDSNN_BUCKETS << fire->bucket_shift) - 1;
        e->c.base = _mm512_xor_si512(k->bucket_base, sign);
        e->c.reset = _mm512_subs_epu16(sign, e->c.base);
        e->c.last = _mm512_set1_epi16((short)(last < UINT16_MAX ? last : UINT16_MAX));
        e->c.bucket = _mm512_set1_epi16((short)fire->bucket_shift);
        e->c.threshold = _mm512_sub_epi16(k->bucket_threshold, k->bucket_base);
        e->c.decode = _mm512_xor_si512(k->bucket_decode, sign);
    } else if (fire && fire->lines) {
        __m512i bias = _mm512_set1_epi16((short)fire->line_bias);
        int32_t v_th = fire->v_th + fire->line_bias;
        e->c.v_th = _mm512_set1_epi16((short)(v_th < UINT16_MAX ? v_th : UINT16_MAX));
        e->c.start = _mm512_add_epi16((__m512i)k->decode_zero, bias);
        e->c.base = _mm512_add_epi16(_mm512_set1_epi16((short)fire->line_base), bias);
        e->c.reset = _mm512_max_epu16(bias, e->c.base);
        e->c.lines = k->lines;
        e->c.by_lines = 1;
    } else if (fire && fire->search == MDSNN_TABLE) {
        e->c.base = _mm512_xor_si512(_mm512_set1_epi16((short)fire->code_base), sign);
        e->c.reset = _mm512_subs_epu16(sign, e->c.base);
        e->c.last = _mm512_set1_epi16((short)(fire->code_count - 1));
        e->c.reset = _mm512_min_epu16(e->c.reset, e->c.last);
        e->c.table = fire->code_decode;
    }
    e->counts = fire && f->plan->values[fire->out].counter >= 0 ? counts : 0;
    e->room_for = UINT8_MAX;
    e->clamped = op->width == MDSNN_CLAMPED;
    e->sum = NAME(wide_add_of)(op, &e->other, &e->out);
    NAME(stretch)(&e->other);
    NAME(stretch)(&e->out);
    e->plain = NAME(follows_plain)(f, op);
}

/* The stream's codes in its place: `counts`, zeros yet, are of those that are not 0, and `coded` is room for them. */
static void NAME(codes_begin)(NAME(follow) *e, int64_t *counts, __m256i *coded)
{
    const mdsnn_op *codes = e->op->codes;
    if (e->plain) /* residual.h makes them of the stream */
        return;
    e->out = view_of(e->f, codes->out);
    e->apart = codes->stride;
    e->code_counts = counts;
    e->coded = coded;
    e->c.factor = _mm512_set1_epi16((short)(codes->bits_shift > 15 ? 0 : 1 << (15 - codes->bits_shift)));
    e->c.highest = _mm512_set1_epi16((short)codes->top);
    e->c.lowest = _mm512_sub_epi16(_mm512_setzero_si512(), e->c.highest);
}

/* Go to the channels from `first` on. */
static void NAME(follow_channels)(NAME(follow) *e, int first)
{
    const mdsnn_op *bn = e->op->bn;
    ptrdiff_t ahead = first - e->first;
    e->first = first;
    e->other.at += e->other.at ? ahead * (1 << e->other.type) : 0;
    e->out.at += e->out.at ? ahead * (1 << e->out.type) : 0;
    e->spikes.at += e->spikes.at ? ahead : 0;
    if (e->plain)
        return;
    const __m512i half = _mm512_set_epi32(27, 26, 25, 24, 19, 18, 17, 16, 11, 10, 9, 8, 3, 2, 1, 0);
    const __m512i order[2] = {half, _mm512_add_epi32(half, _mm512_set1_epi32(4))};
    const int32_t *from[3] = {bn->multiplier + first, bn->offset_32 + first, bn->shift_32 + first};
    __m512i *to[3][2] = {{&e->c.multiplier_0, &e->c.multiplier_1},
                         {&e->c.offset_0, &e->c.offset_1},
                         {&e->c.shift_0, &e->c.shift_1}};
    for (int i = 0; i < 3; i++)
        for (int half = 0; half < 2; half++)
            *to[i][half] = _mm512_permutex2var_epi32(_mm512_loadu_si512(from[i]), order[half],
                                                     _mm512_loadu_si512(from[i] + TILE));
    if (e->clamped || !e->op->clamp)
        return;
    const __m512i shifts[2] = {e->c.shift_0, e->c.shift_1};
    for (int half = 0; half < 2; half++) {
        *to[0][half] = _mm512_and_si512(*to[0][half], _mm512_set1_epi32(0xFFFF));
        if (e->op->clamp == MDSNN_CLAMP_NONE) {
            __m512i bias = _mm512_sllv_epi32(_mm512_set1_epi32(e->op->clamp_bias), shifts[half]);
            *to[1][half] = _mm512_add_epi32(*to[1][half], bias);
        } else { /* less a half of 2**shift, and clamp_bits are kept */
            __m512i one = _mm512_set1_epi32(1), below = _mm512_sub_epi32(shifts[half], one);
            *to[1][half] = _mm512_sub_epi32(*to[1][half], _mm512_sllv_epi32(one, below));
            *to[2][half] = _mm512_sub_epi32(shifts[half], _mm512_set1_epi32(e->op->clamp_bits));
        }
    }
}
