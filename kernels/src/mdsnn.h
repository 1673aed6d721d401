/* mdsnn.h: the contract between Python and C. cffi reads these declarations, so each stands once.
 *
 * A plan is a network made ready to run: which operation comes when, where each value lies, weights in the order the
 * kernels want. kernels/plan.py builds plans from proven IntegerNetworks only (kernels/network.py), so the C code
 * checks no shape, index or range again: the proof says that no sum, product or table index leaves its type.
 *
 * A value lies as [y][x][t][c]: a pixel holds its steps, a step its channels. `t` is the step inside one call; a value
 * that is the same at every step is kept once. Nothing here allocates; everything a call writes is in mdsnn_call.
 */
#ifndef MDSNN_H
#define MDSNN_H

#include <stdint.h>

/* Raised whenever a declaration below changes its meaning; native.py refuses an extension of another number. */
enum mdsnn_version { MDSNN_CONTRACT = 23 };

enum mdsnn_type { MDSNN_I8, MDSNN_I16, MDSNN_I32 };

enum mdsnn_place { MDSNN_SCRATCH, MDSNN_STATE };

enum mdsnn_kind {
    MDSNN_INPUT,     /* pixels to codes */
    MDSNN_CONV,      /* any convolution or linear layer, to accumulators */
    MDSNN_BN_AFFINE, /* accumulators to the stream */
    MDSNN_BN_DENSE,
    MDSNN_ADD,
    MDSNN_REQUANTIZE,
    MDSNN_LIF,
    MDSNN_MAX_POOL,
    MDSNN_SUM_POOL,
    MDSNN_FLATTEN,
    MDSNN_READOUT,
    MDSNN_FUSED      /* a convolution, its bn, and where they follow a residual add and a LIF */
};

/* How a fused convolution is computed. */
enum mdsnn_method {
    MDSNN_EVENTS_8,  /* spikes: rows of weights added in 8 bits, moved to 16 bits every `flush` rows */
    MDSNN_EVENTS_16, /* spikes: rows of weights added in 16 bits */
    MDSNN_PAIRS,     /* codes of 8 bits: products of pairs of inputs, 32 bits */
    MDSNN_BYTES,     /* codes of 8 bits or counts, weights small beside them: products of bytes, 16 bits, then 32 */
    MDSNN_GROUPED,   /* groups of codes of 8 bits: products of 16 or 32 bits, all groups of 64 outputs at once */
    MDSNN_TILES      /* spikes or codes of 8 bits: AMX */
};

/* How many bits a fused operation's stream takes. */
enum mdsnn_width {
    MDSNN_NARROW,  /* 16 */
    MDSNN_CLAMPED, /* 32, of which the LIF has to know 16: up to its x_limit */
    MDSNN_WIDE     /* 32 */
};

/* How a fused operation keeps bn between -saturation and saturation, where bn has short products. */
enum mdsnn_clamp {
    MDSNN_CLAMP_ENDS,     /* by a maximum and a minimum */
    MDSNN_CLAMP_ROUNDING, /* by packing 2**clamp_bits times it, less a half, to 16 bits: saturation * 2**clamp_bits is
                           * 2**15. Rounding takes the bits away again */
    MDSNN_CLAMP_NONE      /* not at all: only its LIF reads it, which takes anything beyond saturation for that. Packed
                           * without sign, with clamp_bias; decoded codes have decode_bias, and sums of both do not wrap */
};

enum mdsnn_search { MDSNN_COMPARE, MDSNN_TABLE, MDSNN_BISECT };

/* Buckets of membranes: u is in number clamp((u - base) >> shift, 0, 30), and no bucket holds two thresholds. Cells:
 * the same for number (clamp(u - base, 0, span) * factor) >> 16 of 15, where there are few thresholds. Lines, where
 * there are many: with x = max(u, base) + bias, a word without sign, u lies under line number (x * each >> 16) % 64, and
 * decodes to (((y >> fraction & mask) | rest) * factor >> 16) - bias, where y is the word
 * ((x << shift) % 2**16 * slope >> 16) + offset. Changes: of the spikes of all steps, where x is the same at each. */
enum mdsnn_limits { MDSNN_BUCKETS = 31, MDSNN_CELLS = 15, MDSNN_LINES = 64, MDSNN_CHANGES = 8 };

/* Where an operation's time goes: its input as the method wants it (lists of spikes, a copy for the tiles, columns for
 * pairs); sums of products; bn, add and LIF. The whole of an operation holds more than these. */
enum mdsnn_stage { MDSNN_GATHER, MDSNN_SUMS, MDSNN_EPILOGUE, MDSNN_WHOLE, MDSNN_STAGES };

/* Work for one unit of the processor, to find what it can do at most. A unit of work is: */
enum mdsnn_strain {
    MDSNN_BYTE_ADDS,     /* a byte added */
    MDSNN_PAIR_PRODUCTS, /* a product of 16 bits, added to its neighbour's */
    MDSNN_TILE_PRODUCTS, /* a product of 8 bits; 0 units where there are no tiles */
    MDSNN_READS          /* a byte of memory read */
};

enum mdsnn_isa { MDSNN_BASE, MDSNN_AVX2, MDSNN_AVX512, MDSNN_AMX };

/* Where a value lies: `offset` bytes into the scratch or the state. */
typedef struct mdsnn_value {
    int64_t offset;
    int32_t place;         /* enum mdsnn_place */
    int32_t type;          /* enum mdsnn_type */
    int32_t height, width; /* pixels */
    int32_t channels;
    int32_t pitch;         /* elements from one step of a pixel to the next, at least channels */
    int32_t fixed;         /* 1: the same at every step, kept once */
    int32_t counter;       /* row of mdsnn_call.counts that takes the number of its elements that are not 0, or -1 */
    int32_t border;        /* so many pixels of 0 lie around it, and some that may be read behind it: only tiles of stride 1
                            * with that padding read it */
} mdsnn_value;

/* One operation. Fields a kind does not name are 0; values are indices into mdsnn_plan.values, -1 where absent. */
typedef struct mdsnn_op {
    int32_t kind;          /* enum mdsnn_kind */
    int32_t source, other, out;
    int32_t fixed;         /* 1: everything it reads is fixed, so it runs once a sample */
    /* conv and pools: the window;  requantize: codes of every stride-th row and column are read */
    int32_t kernel_height, kernel_width, stride, padding, groups;
    const int8_t *weight;  /* conv [group][ky][kx][in][out]; readout [class][in]; input table [channel][256] */
    /* bn: affine y = clamp((multiplier*acc + offset) >> shift), dense y = table[start[c] + acc]; one entry a channel */
    const int32_t *multiplier;
    const int64_t *offset;
    const uint8_t *shift;
    const int32_t *offset_32, *shift_32; /* the same, padded to 64 channels with 0, as is multiplier */
    const int32_t *table;  /* dense: the rows;  readout: the bias */
    const int64_t *start;
    int32_t wide;          /* 1: multiplier*acc + offset needs 64 bits */
    int32_t saturation;
    int32_t short_product; /* 1: every multiplier and accumulator fits 16 bits, and the sum 32 */
    /* requantize: clip((x + 2**(bits_shift - 1)) >> bits_shift, -top, top) */
    int32_t bits_shift, top;
    int32_t packed;        /* 1: codes of the other rows and columns are not there at all */
    /* lif; the thresholds that no reachable u lies on either side of are left out */
    int32_t lif;           /* number of the LIF: which trace arrays are its own */
    int32_t search;        /* enum mdsnn_search */
    int32_t thresholds;    /* how many are left */
    int32_t code_first;    /* code below the first one left */
    const int32_t *threshold;
    const int32_t *decode; /* entry q + top */
    const int8_t *code;    /* search by table: code of u = code_base + index, index clamped to 0..code_count - 1 */
    const int32_t *code_decode; /* the same places: decode[q] in the upper half, q in the lower; 16-bit stream */
    int32_t code_base, code_count;
    int32_t buckets;       /* 1: the thresholds lie in buckets; 2: so does every u that does not fire */
    int32_t bucket_base, bucket_shift;
    const int16_t *bucket_threshold; /* [32], out of reach where a bucket has none */
    const int16_t *bucket_code;      /* [32] code of u below the threshold of its bucket; one further, not below */
    const int16_t *bucket_decode;    /* [32] what that code decodes to */
    int32_t cells;         /* 1: the thresholds lie in cells */
    int32_t cell_base, cell_span, cell_factor;
    const int16_t *cell_threshold; /* [16], out of reach where a cell has none */
    const int16_t *cell_decode;    /* [16] what u decodes to below the threshold of its cell; one further, not below */
    int32_t lines;         /* 1: thresholds and decoded codes are those of lines; 16-bit stream, hard reset, post_reset */
    int32_t line_base, line_bias, line_each, line_shift, line_fraction, line_mask, line_rest, line_factor;
    const uint16_t *line_slope, *line_offset; /* [64] */
    const uint8_t *pattern; /* entry x - pattern_first: bit t says whether x, from a fresh start and the same at every
                             * step, fires at step t; 3 more entries. Null where x is not fixed, or steps above 8 */
    int32_t pattern_first;
    int32_t pattern_changes; /* places in the table where an entry is not the one before; 0 if they are too many */
    int16_t pattern_change[MDSNN_CHANGES]; /* the x at each */
    uint8_t pattern_flip[MDSNN_CHANGES];   /* the bits that change there */
    int32_t x_limit; /* spikes and codes are the same for a stream clamped to -x_limit..x_limit, and h has 16 bits then;
                      * 0: there is no such limit */
    int32_t v_th, v_soft, q_th;
    int32_t pre_fire, soft;
    /* fused: `other` is the value to add, `out` the stream to store; the parts are operations of their own kind */
    const struct mdsnn_op *bn;
    const struct mdsnn_op *fire; /* the LIF, or null */
    const struct mdsnn_op *codes; /* the requantize that is packed and alone reads `out`, which is 16 bits then, or null */
    int32_t width;         /* enum mdsnn_width; where that is 0, `other` and `out` have 16 bits */
    int32_t clamp;         /* enum mdsnn_clamp */
    int32_t clamp_bits, clamp_bias, decode_bias;
    int32_t method;        /* enum mdsnn_method */
    int32_t flush;         /* events_8: rows that 8 bits can add, a multiple of 4;  bytes: fours that 16 bits can add */
    int32_t widen;         /* events: slabs whose sums fit 16 bits together, then they move to 32; 0: all fit.
                            * grouped: 0: all fit */
    int32_t span;          /* events: blocks of inputs that a block of outputs reads */
    int32_t nibbles;       /* events, tiles: 1: two weights a byte, which are unpacked slab by slab */
    int32_t band;          /* output rows worked on at a time */
    int32_t depth;         /* pairs, bytes: inputs under a window, even, or a multiple of 4;  tiles: the same, at most 64,
                            * if all of them lie side by side; else 0 */
    int32_t bias;          /* bytes: what is added to the inputs, so that none is negative */
    int64_t work_input;    /* bytes into a part's work: the lists of spikes, or the columns; tiles: into scratch, or -1:
                            * they read their input where it is */
    int64_t work_slab;     /* events: a slab of weights, unpacked;  tiles: two blocks of them */
    int64_t work_spots;    /* where the spikes of a few rows of the input are */
    int64_t work_starts;   /* where each column of a list begins */
    int64_t work_sums, work_y;
    int64_t state;         /* lif: bytes into the state, q [y][x][channels] int8;  readout: the sums, int32 */
} mdsnn_op;

typedef struct mdsnn_plan {
    const mdsnn_op *ops;
    const mdsnn_value *values;
    int32_t op_count, value_count;
    int32_t channels, height, width; /* of the pixels */
    int32_t classes;
    int32_t chunk;         /* most steps a pass over the operations takes; scratch is sized for it */
    int32_t counters;
    const uint8_t *bits;   /* [256][8]: the place of each bit that is set in a byte, lowest first; [256]: their number */
    int64_t counted;       /* bytes into the state: counts of the fixed values, int64 [counters] */
    int64_t state_bytes, scratch_bytes;
    int64_t work_bytes;    /* what one part of an operation needs to itself */
} mdsnn_plan;

/* Threads that share the work of a call: the one that runs it and any that mdsnn_help finds in time. All zero, but for
 * `size`, before the call; a team serves one call. */
typedef struct mdsnn_team {
    int32_t size;    /* most parts an operation is cut into; the call's `work` holds as many */
    int32_t done;    /* parts of the operation that are finished */
    uint64_t ticket; /* number of the operation, how many parts it has, and the next one to take: 32, 16, 16 bits */
    const void *job;
} mdsnn_team;

/* One call: `steps` timesteps of `samples` samples. */
typedef struct mdsnn_call {
    const uint8_t *pixels; /* [samples][c][y][x], for each step if pixel_step is not 0 */
    int64_t pixel_step;    /* bytes from one step's pixels to the next; 0: the same image at every step */
    int32_t samples, steps;
    int32_t fresh;         /* 1: q = 0 and sums = 0 before the first step */
    int64_t state_pitch;   /* bytes from one sample's state to the next; 0: one state serves all, each fresh */
    uint8_t *state;        /* 64-byte aligned, as is scratch */
    uint8_t *scratch;
    uint8_t *work;         /* work_bytes for each part, 64-byte aligned */
    mdsnn_team *team;      /* null: nobody helps */
    int32_t *logits;       /* [samples][classes] */
    int64_t *counts;       /* [counters][steps], added to */
    int32_t *const *trace_h; /* a pointer for each LIF, [steps][samples][c][y][x]; null: no trace */
    uint8_t *const *trace_s;
    int8_t *const *trace_q;
    int64_t *times; /* [op_count][MDSNN_STAGES] ticks, added to; null: not taken. Of calls without a team */
} mdsnn_call;

/* 1 if this machine and this build can run `isa`. */
int mdsnn_supported(int isa);

/* Run a call. `isa` must be supported. Re-entrant: the plan is read only. */
void mdsnn_run(const mdsnn_plan *plan, int isa, const mdsnn_call *call);

/* Take parts of the operations of the call that `team` belongs to, until it ends; at once if it has ended. For any
 * number of threads; nobody waits for one that comes late or never. Of what the call points to, only the team is read
 * after the call has ended. */
void mdsnn_help(mdsnn_team *team);

/* The processor's counter of time, of an unknown rate. */
int64_t mdsnn_ticks(void);

/* Do one kind of work for `rounds` rounds, reads over `size` bytes; returns the units of work done. */
int64_t mdsnn_strain(int isa, int what, const uint8_t *bytes, int64_t size, int64_t rounds);

#endif
