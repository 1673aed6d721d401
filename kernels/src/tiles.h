/* tiles.h: convolution of spikes or 8-bit codes by AMX, beside what follows it (follow.h); groups = 1, any window.
 *
 * Definition: kernels/reference.py:conv2d. This file agrees with it bit for bit (tests/test_kernels_bit_exact.py); where
 * they differ, this file is wrong. The plain twin is conv.h.
 *
 * A tile is 16 rows of 64 bytes. Rows of the left operand are outputs of one row of the image, (x, t) with t innermost:
 * 4 pixels of 4 steps, say. For one tap and 64 inputs they lie side by side, once the input has been copied with its
 * padding, and with a column in each residue class of the stride beside its own kind:
 *     input [in/64][y + padding][class][column][t][in 64]
 * Where a window has 64 inputs or less (mdsnn_op.depth), the copy is of whole windows, and the products are those of a
 * 1x1 convolution of these, without padding:
 *     input [out y][out x][t][(ky, kx, in) 64], the last of the 64 undefined: their weights are 0
 * The right operand is 64 inputs of 16 outputs, four inputs side by side as the instruction wants them:
 *     weights [out/32][in/64][ky][kx][half 2][in/4 16][out 16][in 4]
 * The first half holds the outputs 0-3, 8-11, 16-19 and 24-27 of its 32, the second half the others: vpackssdw of a row of
 * each then gives 32 outputs in order.
 *
 * Weights of at most 4 bits lie two a byte, 16 times the second half's and the first half's:
 *     [out/32][in/64][ky][kx][in/4 16][64]
 * They are unpacked for 32 outputs at a time, while the products of the 32 before run.
 *
 * A group of tiles holds whole pixels: one tile, if the steps divide 16. Two groups are summed at a time, by 32 outputs:
 * each tile loaded is used twice. Where four groups hold all outputs and weights have 4 bits, the four are summed at
 * once, by 16 outputs twice, so that each weight is needed once: first by the first half, unpacked, then by the bytes as
 * they are, which sum to both.
 *
 * While the products of one pair (or four) of groups run, the sums of the one before go through bn, residual add and
 * LIF, a few pixels between two products: the matrix unit and the vector unit work side by side. Sums are stored beside
 * the first products of the next groups: stored behind the last ones, they would be waited for.
 *
 * Not all of it, where there is much of it for each product: a core that does both at full width lowers its clock, by a
 * tenth or a fifth, and keeps it low for longer than a network takes. So there are at most 7 steps of four pixels for 16
 * taps (MDSNN_BESIDE); the others follow when all products are issued, and, behind a window of few taps, done.
 *
 * Spikes that nothing but tiles of stride 1 read have their padding where they are (mdsnn_value.border), and are not
 * copied; nor are packed codes that want no padding.
 *
 * In parts (tiles_parts): rows of the output, or outputs by 32, whichever leaves less for two parts to read twice: input
 * or weights. The copy of the input is shared, and made before; each part unpacks what it needs.
 *
 * The intrinsics of gcc do not say that they touch memory, hence instructions written by hand.
 */

typedef struct NAME(tiles) {
    const uint8_t *input;
    ptrdiff_t chunk;   /* from 64 channels of the input to the next 64 */
    ptrdiff_t line;    /* from one step of a pixel to the next */
    ptrdiff_t row;     /* of a row of them */
    ptrdiff_t class;   /* of a residue class of a row */
    ptrdiff_t column;  /* of a pixel: its steps */
    int chunks, steps;
    int tall, pixels;  /* a group: so many tiles, so many pixels */
    int across;        /* groups of a row */
    int height;        /* of what the window runs over: */
    int kernel_height, kernel_width, stride, padding;
} NAME(tiles);

/* Tiles belong to a thread: whoever does a part configures them, and gives them back. */
static void NAME(tiles_begin)(void)
{
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; i++) {
        config.bytes[i] = BLOCK;
        config.rows[i] = TILE;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
}

static void NAME(tiles_end)(void) { __asm__ volatile("tilerelease" ::: "memory"); }

/* Residue classes of the stride, and columns in each. */
static inline int NAME(classes_of)(const mdsnn_op *op)
{
    return op->stride < op->kernel_width ? op->stride : op->kernel_width;
}

static inline int NAME(columns_of)(const mdsnn_op *op, const view *out)
{
    return out->width + (op->kernel_width - 1) / op->stride;
}

/* How the input lies: where it is, if it has its padding there, or in its copy at `copy`. */
static NAME(tiles) NAME(tiles_of)(const mdsnn_op *op, const view *in, const view *out, int steps, const uint8_t *copy)
{
    NAME(tiles) g;
    int common = steps & -steps; /* greatest common divisor of steps and a tile's rows */
    common = common < TILE ? common : TILE;
    g.steps = steps;
    g.tall = steps / common;
    g.pixels = TILE / common;
    g.across = (out->width + g.pixels - 1) / g.pixels;
    g.chunks = (in->channels + BLOCK - 1) / BLOCK;
    g.class = 0;
    g.height = in->height;
    g.kernel_height = op->kernel_height;
    g.kernel_width = op->kernel_width;
    g.stride = op->stride;
    g.padding = op->padding;
    if (op->work_input < 0) {
        g.input = in->at - in->border * (in->row + in->pixel);
        g.line = in->step;
        g.column = in->pixel;
        g.row = in->row;
        g.chunk = BLOCK;
        return g;
    }
    g.input = copy;
    g.line = BLOCK;
    g.column = (ptrdiff_t)steps * BLOCK;
    if (op->depth) { /* whole windows */
        g.height = out->height;
        g.kernel_height = g.kernel_width = g.stride = 1;
        g.padding = 0;
        g.row = out->width * g.column;
        g.chunk = 0; /* there is one */
        return g;
    }
    g.class = NAME(columns_of)(op, out) * g.column;
    g.row = NAME(classes_of)(op) * g.class;
    g.chunk = (in->height + 2 * op->padding) * g.row;
    return g;
}

/* Of the bits of a window, those that lie in an image of `size` rows if the first of its `many` is row `from`: a row has
 * `each` bits. The same for columns. Padding is less than a window, so there are some. */
static inline uint64_t NAME(inside)(int from, int size, int many, int each)
{
    const int first = from < 0 ? -from : 0, end = size - from < many ? size - from : many;
    return ~UINT64_C(0) >> (BLOCK - (end - first) * each) << first * each;
}

/* What a window is put together of, in a register: its rows where those of the input have no gaps, else its pixels. A
 * piece is read from so far before it as its place is from the window's start. */
typedef struct NAME(pieces) {
    int many;
    uint64_t mask[BLOCK];
    ptrdiff_t at[BLOCK]; /* from the window's first pixel */
} NAME(pieces);

/* `count` windows whose parts that meet the image are the same. */
static inline __attribute__((always_inline)) void NAME(windows)(uint8_t *to, const uint8_t *from, int count,
                                                                ptrdiff_t next, const NAME(pieces) *p, int many,
                                                                uint64_t inside)
{
    for (; count; count--, to += BLOCK, from += next) {
        __m512i window = _mm512_setzero_si512();
        for (int i = 0; i < many; i++)
            window = _mm512_mask_loadu_epi8(window, p->mask[i] & inside, from + p->at[i]);
        _mm512_storeu_si512(to, window);
    }
}

/* Copies the windows of this part's rows of the output. */
APART static void NAME(tiles_windows)(const frame *f, const mdsnn_op *op, const view *in, const view *out, uint8_t *to)
{
    const int steps = steps_of(f, op), each = in->channels, across = op->kernel_width * each;
    const int size = in->pixel == each ? across : each, inner = in->width - op->kernel_width + op->padding;
    const ptrdiff_t stride = op->stride * in->pixel;
    uint64_t down = 0; /* the first bit of each row of a window */
    NAME(pieces) p = {.many = op->kernel_height * across / size};
    for (int i = 0; i < p.many; i++) {
        const int ky = i * size / across, kx = i * size % across / each;
        p.mask[i] = ~UINT64_C(0) >> (BLOCK - size) << i * size;
        p.at[i] = ky * in->row + kx * in->pixel - i * size;
        down |= UINT64_C(1) << ky * across;
    }
    to += (ptrdiff_t)first_of(f, out->height) * out->width * steps * BLOCK;
    for (int y = first_of(f, out->height), end = end_of(f, out->height); y < end; y++) {
        const int from_y = y * op->stride - op->padding;
        const uint64_t rows = NAME(inside)(from_y, in->height, op->kernel_height, across);
        const uint8_t *from = in->at + from_y * in->row - op->padding * in->pixel;
        for (int x = 0, count; x < out->width; x += count, from += count * stride) {
            const int from_x = x * op->stride - op->padding;
            const uint64_t inside = rows & down * NAME(inside)(from_x, in->width, op->kernel_width, each);
            count = 1;
            if (steps == 1 && from_x >= 0 && from_x + op->kernel_width <= in->width) { /* all that are not at a side */
                count = inner / op->stride + 1 - x;
                count = count < out->width - x ? count : out->width - x;
            }
            if (steps == 1 && p.many == 3)
                NAME(windows)(to, from, count, stride, &p, 3, inside);
            else
                NAME(windows)(to, from, steps == 1 ? count : steps, steps == 1 ? stride : in->step, &p, p.many, inside);
            to += (ptrdiff_t)count * steps * BLOCK;
        }
    }
}

/* Copies this part's rows of the input with its padding. */
APART static void NAME(tiles_copy)(const frame *f, const mdsnn_op *op, int what)
{
    view in = view_of(f, op->source), out = view_of(f, op->fire ? op->fire->out : op->out);
    uint8_t *to = f->call->scratch + op->work_input;
    const int steps = steps_of(f, op), stride = op->stride, rows = in.height + 2 * op->padding;
    const int classes = NAME(classes_of)(op), columns = NAME(columns_of)(op, &out);
    const NAME(tiles) g = NAME(tiles_of)(op, &in, &out, steps, to);
    (void)what;
    if (op->depth) {
        NAME(tiles_windows)(f, op, &in, &out, to);
        return;
    }
    for (int c = 0; c < in.channels; c += BLOCK, to += g.chunk) {
        size_t here = (size_t)(in.channels - c < BLOCK ? in.channels - c : BLOCK);
        for (int y = first_of(f, rows), end = end_of(f, rows); y < end; y++) {
            if (y % stride >= op->kernel_height)
                continue; /* between the windows */
            int from_y = y - op->padding, inside = from_y >= 0 && from_y < in.height;
            for (int class = 0; class < classes; class++)
                for (int column = 0; column < columns; column++) {
                    uint8_t *at = to + y * g.row + class * g.class + column * g.column;
                    int64_t from_x = (int64_t)column * stride + class - op->padding;
                    if (!inside || from_x < 0 || from_x >= in.width) {
                        memset(at, 0, (size_t)g.column);
                        continue;
                    }
                    const uint8_t *from = in.at + from_y * in.row + from_x * in.pixel + c;
                    if (here == BLOCK)
                        for (int t = 0; t < steps; t++)
                            memcpy(at + t * BLOCK, from + t * in.step, BLOCK);
                    else
                        for (int t = 0; t < steps; t++)
                            memcpy(at + t * BLOCK, from + t * in.step, here);
                }
        }
    }
}

/* ------------------------------------------------------------------------------------------------ products */

/* Weights of 32 outputs on their way to where the tiles read them. */
typedef struct NAME(stream) {
    const int8_t *from;
    int8_t *to; /* null: they are not packed, and come from the far cache to the second */
    int left; /* taps of 64 inputs; eighths of such where they are not packed */
} NAME(stream);

/* Fetches an eighth of the weights of one tap of 64 inputs: few at once, for tiles wait for the same buffers. */
static inline void NAME(fetch_eighth)(NAME(stream) *next)
{
    for (int line = 0; line < PAIR / 8; line++)
        _mm_prefetch((const char *)next->from + line * BLOCK, _MM_HINT_T1);
    next->from += PAIR / 8 * BLOCK;
    next->left--;
}

/* Unpacks the weights of one tap of 64 inputs: both halves, or only the first; or fetches, where nothing is packed. A
 * product of bit matrices takes a nibble with its sign, which is its top bit. */
static inline void NAME(unpack_tap)(NAME(stream) *next, int halves)
{
    if (!next->to) {
        NAME(fetch_eighth)(next);
        return;
    }
    const __m512i low = _mm512_set1_epi64(0x0102040808080808), high = _mm512_set1_epi64(0x1020408080808080);
    for (int line = 0; line < TILE; line++) {
        __m512i both = _mm512_loadu_si512(next->from + line * BLOCK);
        __m512i first = _mm512_gf2p8affine_epi64_epi8(both, low, 0);
        _mm512_storeu_si512(next->to + line * BLOCK, first);
        if (halves == 2) {
            both = _mm512_sub_epi8(both, first);
            _mm512_storeu_si512(next->to + (TILE + line) * BLOCK, _mm512_gf2p8affine_epi64_epi8(both, high, 0));
        }
    }
    next->from += TILE * BLOCK;
    next->to += halves * TILE * BLOCK;
    next->left--;
}

/* Two groups of outputs by 32 channels, or four, and what goes on between their products. */
typedef struct NAME(job) {
    const NAME(tiles) *g;
    int many; /* groups: 2 or 4 */
    const uint8_t *from[4];
    const int8_t *half[2];    /* weights of the first tap for 16 outputs, and for the others */
    ptrdiff_t tap;            /* from one tap's to the next */
    const ptrdiff_t *taps;    /* where the inputs of a tap lie, from those of the first one */
    int first, end;           /* taps of the window that meet the image */
    const uint8_t *needs;     /* of each tap of a window, if there are four groups: those whose windows meet the image there */
    int32_t *sums[4];         /* of the groups */
    int32_t *held[4];         /* where what the tiles hold goes: sums of the groups before */
    NAME(batch) *before;
    NAME(stream) *next;
    int unpacks; /* taps of `next` that are due */
} NAME(job);

#define LOAD(tile, at, line)                                                                                           \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(at), "r"((ptrdiff_t)(line)) : "memory")
#define STORE(tile, at)                                                                                                \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(at), "r"(PAIR * sizeof(int32_t)) : "memory")
/* What a tile holds goes to memory just before its first product: so the stores wait beside products, not after them. */
#define CHANGE(tile)                                                                                                   \
    if (change) {                                                                                                      \
        STORE(tile, job->held[tile]);                                                                                  \
        _tile_zero(tile);                                                                                              \
    }

/* The products of one tap; if there are four groups, of one half of the outputs, for those that `needs` has a bit for;
 * `change`: the first of their tiles. */
static inline __attribute__((always_inline)) void NAME(product)(const NAME(job) *job, int tap, int needs, int four,
                                                                int half, int change)
{
    const ptrdiff_t line = job->g->line, at = job->taps[tap], weights = tap * job->tap;
    if (four) {
        LOAD(4, job->half[half] + weights, BLOCK);
        CHANGE(0)
        if (needs & 1) {
            LOAD(5, job->from[0] + at, line);
            _tile_dpbssd(0, 5, 4);
        }
        CHANGE(1)
        if (needs & 2) {
            LOAD(6, job->from[1] + at, line);
            _tile_dpbssd(1, 6, 4);
        }
        CHANGE(2)
        if (needs & 4) {
            LOAD(7, job->from[2] + at, line);
            _tile_dpbssd(2, 7, 4);
        }
        CHANGE(3)
        if (needs & 8) {
            LOAD(5, job->from[3] + at, line);
            _tile_dpbssd(3, 5, 4);
        }
    } else {
        LOAD(4, job->half[0] + weights, BLOCK);
        LOAD(5, job->half[1] + weights, BLOCK);
        LOAD(6, job->from[0] + at, line);
        LOAD(7, job->from[1] + at, line);
        CHANGE(0)
        _tile_dpbssd(0, 6, 4);
        CHANGE(1)
        _tile_dpbssd(1, 6, 5);
        CHANGE(2)
        _tile_dpbssd(2, 7, 4);
        CHANGE(3)
        _tile_dpbssd(3, 7, 5);
    }
}

/* Tiles hold the sums of another part of the groups now. */
static inline __attribute__((always_inline)) void NAME(hold)(NAME(job) *job, int four, int tile)
{
    for (int j = 0; j < 4; j++)
        job->held[j] = four ? job->sums[j] + tile * TILE : job->sums[j / 2] + tile * TILE * PAIR + j % 2 * TILE;
}

/* Stores what the tiles hold. */
static inline void NAME(let_go)(const NAME(job) *job)
{
    STORE(0, job->held[0]);
    STORE(1, job->held[1]);
    STORE(2, job->held[2]);
    STORE(3, job->held[3]);
}

#define MDSNN_BESIDE 7 /* steps of four pixels for 16 taps */
#define MDSNN_FEW 4 /* most taps whose products end before what follows those of the batch before */

/* All products of the groups, and what follows those of the batch before. */
static inline __attribute__((always_inline)) void NAME(tiles_run)(NAME(job) *job, int follows, int quick,
                                                                  int clamped, int adds, int stores, int fires,
                                                                  int table)
{
    NAME(follow) *e = job->before->e;
    const NAME(constants) c = NAME(constants_of)(e);
    const NAME(slot) *slot = job->before->slot;
    NAME(cursor) at = {slot, slot + job->before->slots, 0, {c.start, c.start, c.start, c.start}};
    const int four = job->many == 4, inside = job->end - job->first;
    const int window = job->g->kernel_height * job->g->kernel_width;
    const int many = inside * job->g->chunks * (four ? 2 : job->g->tall);
    const int steps = (job->before->slots + 3) / 4 * e->steps, most = many * MDSNN_BESIDE / 16;
    const int parts = steps < most ? steps : most, waits = follows && many <= MDSNN_FEW;
    if (fires) {
        if (e->room_for < job->before->slots)
            NAME(count_fired)(e);
        e->room_for -= job->before->slots;
    }
    int parts_due = 0, unpacks_due = 0, tap = job->first, end = job->end, tile = 0;
    if (!many)
        NAME(let_go)(job);
    for (int left = many;;) {
        if (left) {
            const int needs = four ? job->needs[tap - (end - job->end)] : 0;
            if (tap == job->first) {
                NAME(product)(job, tap, needs, four, tile, 1);
                NAME(hold)(job, four, tile++);
            } else
                NAME(product)(job, tap, needs, four, tile - 1, 0);
            if (++tap == end) { /* of the window; on to the next 64 inputs */
                tap += window - inside;
                end += window;
            }
            if (tap >= window * job->g->chunks) {
                tap = job->first;
                end = job->end;
                for (int j = 0; j < 2; j++)
                    job->from[j] += four ? 0 : TILE * job->g->line;
            }
            if (!--left && waits)
                _mm_lfence();
            unpacks_due += job->unpacks;
            while (unpacks_due >= many && job->next->left) {
                unpacks_due -= many;
                if (four)
                    NAME(unpack_tap)(job->next, 1);
                else
                    NAME(unpack_tap)(job->next, 2);
            }
            parts_due += parts;
            if (parts_due < many)
                continue;
            parts_due -= many;
        } else if (!follows || at.slot == at.end)
            break;
        if (follows && at.slot < at.end)
            NAME(follow_next)(&c, e, &at, quick, clamped, adds, stores, fires, table);
    }
}

#define MDSNN_PAIR(FUNCTION, FOLLOWS, QUICK, CLAMPED, ADDS, STORES, FIRES, TABLE)                                      \
    APART static void NAME(FUNCTION)(NAME(job) *job)                                                                   \
    {                                                                                                                  \
        NAME(tiles_run)(job, FOLLOWS, QUICK, CLAMPED, ADDS, STORES, FIRES, TABLE);                                     \
    }
#define MDSNN_PAIRS(KIND, QUICK, CLAMPED)                                                                              \
    MDSNN_PAIR(KIND##_store, 1, QUICK, CLAMPED, 0, 1, 0, 0)                                                            \
    MDSNN_PAIR(KIND##_add_store, 1, QUICK, CLAMPED, 1, 1, 0, 0)                                                        \
    MDSNN_PAIR(KIND##_fire, 1, QUICK, CLAMPED, 0, 0, 1, 0)                                                             \
    MDSNN_PAIR(KIND##_store_fire, 1, QUICK, CLAMPED, 0, 1, 1, 0)                                                       \
    MDSNN_PAIR(KIND##_add_fire, 1, QUICK, CLAMPED, 1, 0, 1, 0)                                                         \
    MDSNN_PAIR(KIND##_add_store_fire, 1, QUICK, CLAMPED, 1, 1, 1, 0)                                                   \
    MDSNN_PAIR(KIND##_lines, 1, QUICK, CLAMPED, 0, 0, 1, 2)                                                            \
    MDSNN_PAIR(KIND##_store_lines, 1, QUICK, CLAMPED, 0, 1, 1, 2)                                                      \
    MDSNN_PAIR(KIND##_add_lines, 1, QUICK, CLAMPED, 1, 0, 1, 2)                                                        \
    MDSNN_PAIR(KIND##_add_store_lines, 1, QUICK, CLAMPED, 1, 1, 1, 2)                                                  \
    MDSNN_PAIR(KIND##_table, 1, QUICK, CLAMPED, 0, 0, 1, 1)                                                            \
    MDSNN_PAIR(KIND##_store_table, 1, QUICK, CLAMPED, 0, 1, 1, 1)                                                      \
    MDSNN_PAIR(KIND##_add_table, 1, QUICK, CLAMPED, 1, 0, 1, 1)                                                        \
    MDSNN_PAIR(KIND##_add_store_table, 1, QUICK, CLAMPED, 1, 1, 1, 1)
#define MDSNN_PAIRS_WITH_CODES(KIND, QUICK)                                                                            \
    MDSNN_PAIRS(KIND, QUICK, 0)                                                                                        \
    MDSNN_PAIR(KIND##_add_codes_fire, 1, QUICK, 0, 1, 2, 1, 0)                                                         \
    MDSNN_PAIR(KIND##_add_codes_lines, 1, QUICK, 0, 1, 2, 1, 2)                                                        \
    MDSNN_PAIR(KIND##_add_codes_table, 1, QUICK, 0, 1, 2, 1, 1)

/* [adds][stores][no fire, by buckets that end it, by lines, by any] */
#define MDSNN_KINDS(KIND)                                                                                            \
    {                                                                                                                \
        {{0, NAME(KIND##_fire), NAME(KIND##_lines), NAME(KIND##_table)},                                             \
         {NAME(KIND##_store), NAME(KIND##_store_fire), NAME(KIND##_store_lines), NAME(KIND##_store_table)}},         \
        {{0, NAME(KIND##_add_fire), NAME(KIND##_add_lines), NAME(KIND##_add_table)},                                 \
         {NAME(KIND##_add_store), NAME(KIND##_add_store_fire), NAME(KIND##_add_store_lines),                         \
          NAME(KIND##_add_store_table)}},                                                                            \
    }

MDSNN_PAIR(pair_alone, 0, 0, 0, 0, 0, 0, 0)
MDSNN_PAIRS_WITH_CODES(pair_wide, 0)
MDSNN_PAIRS_WITH_CODES(pair_quick, 1)
MDSNN_PAIRS(pair_clamped, 0, 1)

#undef MDSNN_PAIRS_WITH_CODES
#undef MDSNN_PAIRS
#undef MDSNN_PAIR

/* The next operation by tiles, or null. */
static const mdsnn_op *NAME(tiles_after)(const mdsnn_plan *plan, const mdsnn_op *op)
{
    const mdsnn_op *end = plan->ops + plan->op_count;
    while (++op < end)
        if (op->kind == MDSNN_FUSED && op->method == MDSNN_TILES)
            return op;
    return 0;
}

/* Whether parts take rows, and not outputs. Parts by rows read all weights, those by outputs the whole input. */
static int NAME(tiles_by_rows)(const frame *f, const mdsnn_op *op)
{
    const mdsnn_value *in = &f->plan->values[op->source], *to = &f->plan->values[op->fire ? op->fire->out : op->out];
    int size = f->call->team ? f->call->team->size : 1, outs = (to->channels + PAIR - 1) / PAIR;
    if (size < 2 || NAME(follows_plain)(f, op)) /* which counts its rows */
        return 1;
    if (to->height < size || outs < size)
        return to->height >= outs;
    int64_t weights = (int64_t)to->channels * op->kernel_height * op->kernel_width / (op->nibbles ? 2 : 1);
    int64_t pixels = op->depth ? (int64_t)to->height * to->width * op->kernel_height * op->kernel_width
                               : (int64_t)in->height * in->width;
    return pixels * steps_of(f, op) >= weights; /* both for each input channel */
}

static int NAME(tiles_parts)(const frame *f, const mdsnn_op *op)
{
    const mdsnn_value *to = &f->plan->values[op->fire ? op->fire->out : op->out];
    int size = f->call->team ? f->call->team->size : 1, outs = (to->channels + PAIR - 1) / PAIR;
    int most = NAME(tiles_by_rows)(f, op) ? to->height : outs;
    return most < size ? most : size;
}

static void NAME(fused_tiles)(const frame *f, const mdsnn_op *op, const NAME(lif_constants_i16) *k)
{
    static void (*const kinds[3][2][2][4])(NAME(job) *) = {MDSNN_KINDS(pair_wide), MDSNN_KINDS(pair_quick),
                                                             MDSNN_KINDS(pair_clamped)};
    static void (*const with_codes[2][3])(NAME(job) *) = {
        {NAME(pair_wide_add_codes_fire), NAME(pair_wide_add_codes_lines), NAME(pair_wide_add_codes_table)},
        {NAME(pair_quick_add_codes_fire), NAME(pair_quick_add_codes_lines), NAME(pair_quick_add_codes_table)}};
    view in = view_of(f, op->source), to = view_of(f, op->fire ? op->fire->out : op->out);
    int64_t began = ticks_start(f);
    const int outs = (to.channels + PAIR - 1) / PAIR, by_rows = NAME(tiles_by_rows)(f, op);
    const share part = share_of(f, to.height, outs, by_rows);
    const int height = part.end_y - part.y, channel = part.out * PAIR, end_channel = part.end_out * PAIR;
    const NAME(tiles) g = NAME(tiles_of)(op, &in, &to, steps_of(f, op), f->call->scratch + op->work_input);
    NAME(tiles_begin)();
    int32_t *sums = (int32_t *)(f->work + op->work_sums); /* of the pair at hand, and of the one before */
    ptrdiff_t group = (ptrdiff_t)g.tall * TILE * PAIR, *offsets = (ptrdiff_t *)(f->work + op->work_starts);
    const int row = g.kernel_width, window = g.kernel_height * row;
    for (int tap = 0; tap < g.chunks * window; tap++) {
        int i = tap / window, ky = tap % window / row, kx = tap % row;
        offsets[tap] = i * g.chunk + ky * g.row + kx % g.stride * g.class + kx / g.stride * g.column;
    }
    NAME(follow) follow[2]; /* of the 32 channels at hand, and of those before */
    int64_t fired[MDSNN_STEPS] = {0}, coded[MDSNN_STEPS] = {0};
    __m256i codes[2][MDSNN_STEPS];
    NAME(follow_begin)(&follow[0], f, op, k, fired);
    if (op->codes) {
        NAME(codes_begin)(&follow[0], coded, codes[0]);
        memset(codes, 0, sizeof codes);
    }
    follow[0].room = (int16_t *)(f->work + op->work_y);
    follow[0].rows = sums + 8 * group;
    follow[1] = follow[0];
    follow[1].coded = codes[1];
    NAME(batch) batches[2];
    batches[0].slots = batches[1].slots = 0;
    batches[1].e = &follow[1];
    const int fires = !op->fire ? 0 : op->fire->buckets == 2 ? 1 : op->fire->lines && !op->fire->buckets ? 2 : 3;
    void (*pair)(NAME(job) *) = follow[0].plain ? NAME(pair_alone)
        : op->codes ? with_codes[op->clamp != MDSNN_CLAMP_ENDS][fires - 1]
        : kinds[follow[0].clamped ? 2 : op->clamp != MDSNN_CLAMP_ENDS][op->other >= 0][op->out >= 0][fires];
    /* down a strip two groups wide, so that the rows of a window are still near; a last odd group with the one below */
    int side_by_side = g.across / 2 * height, pairs = side_by_side + (g.across % 2 * height + 1) / 2;
    int taps = g.chunks * window, turn = 0;
    int8_t *unpacked = (int8_t *)f->work + op->work_slab; /* two blocks, one in use, one on its way */
    ptrdiff_t block = (ptrdiff_t)taps * (op->nibbles ? 1 : 2) * TILE * BLOCK; /* weights of 32 outputs */
    NAME(stream) next = {.from = op->weight + part.out * block, .to = unpacked, .left = op->nibbles ? taps : 0};
    int groups = g.across * height, four = op->nibbles && !follow[0].plain && groups > 2 && groups <= 4 &&
                                              g.tall == 1 && 4 * g.pixels <= NAME(slots);
    int rounds = four ? 1 : pairs, halves = four ? 1 : 2;
    follow[0].mixed = follow[1].mixed = four;
    while (next.left)
        NAME(unpack_tap)(&next, halves);
    uint8_t *needs = (uint8_t *)(offsets + taps);
    for (int tap = 0; tap < window; tap++) {
        unsigned rows_there = 0; /* where there are four groups, all rows are summed at once */
        for (int j = 0; j < 4; j++) {
            int y = (part.y + j % height) * g.stride + tap / row - g.padding;
            rows_there |= (unsigned)(j < groups && y >= 0 && y < g.height) << j;
        }
        needs[tap] = (uint8_t)rows_there;
    }
    NAME(job) job = {.g = &g, .taps = offsets, .needs = needs, .next = &next, .many = four ? 4 : 2};
    for (int j = 0; j < 4; j++)
        job.held[j] = sums; /* nothing yet */
    for (int c = channel, n = 0; c < end_channel; c += PAIR, n = !n) {
        if (c > channel) {
            NAME(count_fired)(&follow[n]);
            follow[n] = follow[!n];
            follow[n].coded = codes[n];
            memset(follow[n].fired, 0, sizeof follow[n].fired);
        }
        NAME(follow_channels)(&follow[n], c);
        job.tap = halves * TILE * BLOCK;
        job.half[0] = op->nibbles ? unpacked + n * taps * job.tap : op->weight + c / PAIR * block;
        job.half[1] = four ? op->weight + c / PAIR * block : job.half[0] + TILE * BLOCK;
        if (op->nibbles) {
            next.to = unpacked + !n * taps * job.tap;
            next.left = c + PAIR < end_channel ? taps : 0;
        } else { /* or as much of the operation behind */
            const mdsnn_op *then = c + PAIR < end_channel ? op : NAME(tiles_after)(f->plan, op);
            next.from = !then ? 0 : then == op ? job.half[0] + block : then->weight;
            next.to = 0;
            next.left = then ? 8 * taps : 0;
        }
        int ys[4] = {0}, xs[4] = {0}, pixels[4] = {0}, down = 0; /* of each group; rows of a strip that are done */
        const uint8_t *from[4] = {0}; /* where its windows begin; a job's moves on */
        for (int i = 0; i < rounds; i++, turn = !turn) {
            NAME(batch) *now = &batches[turn];
            now->e = &follow[n];
            now->slots = 0;
            int first = g.kernel_height, end = 0;
            down = down == height ? 0 : down;
            const int below = down++ && i < side_by_side && !four; /* 1: the pair before is in the row above */
            for (int j = 0; j < job.many; j++) {
                job.sums[j] = sums + (4 * turn + j) * group;
                if (below) {
                    ys[j]++;
                    from[j] += g.stride * g.row;
                } else {
                    int beside = i < side_by_side, k_th = four ? j : beside ? i : 2 * (i - side_by_side) + j;
                    int there = four ? j < groups : beside || k_th < height; /* else the last one again, for nothing */
                    int x = g.across - 1;
                    if (four && there)
                        x = k_th / height;
                    else if (beside)
                        x = k_th / height * 2 + j;
                    xs[j] = x * g.pixels;
                    ys[j] = part.y + (there ? k_th % height : height - 1);
                    pixels[j] = !there ? 0 : to.width - xs[j] < g.pixels ? to.width - xs[j] : g.pixels;
                    from[j] = g.input + (ptrdiff_t)ys[j] * g.stride * g.row + xs[j] * g.column;
                }
                job.from[j] = from[j];
                int from_top = g.padding - ys[j] * g.stride, to_end = g.height + from_top;
                first = from_top < first ? from_top : first;
                end = to_end > end ? to_end : end;
            }
            job.first = first < 0 ? 0 : first * row;
            job.end = end > g.kernel_height ? window : end * row;
            if (job.end <= job.first) { /* nothing but padding: zeros are copied there */
                job.first = 0;
                job.end = row;
            }
            job.before = &batches[!turn];
            job.unpacks = (next.left + rounds - i - 1) / (rounds - i);
            pair(&job);
            if (follow[0].plain)
                NAME(let_go)(&job);
            else if (below && !op->codes) {
                NAME(batch_below)(now, job.before, (turn ? 4 : -4) * group);
                continue;
            }
            for (int j = 0; j < job.many; j++)
                if (follow[0].plain)
                    NAME(follow_plain)(&follow[n], job.sums[j], ys[j], xs[j], pixels[j]);
                else
                    NAME(batch_add)(now, job.sums[j], ys[j], xs[j], pixels[j]);
        }
        while (next.left)
            NAME(unpack_tap)(&next, halves);
    }
    job.first = job.end = 0; /* no products: what is left */
    job.before = &batches[!turn];
    pair(&job);
    NAME(tiles_end)();
    NAME(count_fired)(&follow[0]);
    NAME(count_fired)(&follow[1]);
    if (follow[0].counts) {
        if (follow[0].plain) /* which has not counted */
            NAME(count)(f, op->fire->out, fired);
        NAME(add_counts)(f, op->fire->out, fired);
    }
    if (op->codes && !follow[0].plain)
        NAME(add_counts)(f, op->codes->out, coded);
    ticks_count(f, op, MDSNN_SUMS, began); /* and the epilogue: they run side by side */
}

#undef MDSNN_KINDS
#undef MDSNN_FEW
#undef MDSNN_BESIDE
#undef CHANGE
#undef STORE
#undef LOAD
#undef TILE
#undef PAIR
