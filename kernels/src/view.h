/* view.h: how kernels address a value, and the small things every family needs.
 *
 * Included once per instruction set (see kernels.h). `>>` of a negative integer is arithmetic on every compiler this
 * builds with (gcc and clang define it so); the reference's `>>` floors, and this is the same.
 */
#ifndef MDSNN_VIEW_H
#define MDSNN_VIEW_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "mdsnn.h"

/* Which instruction sets are compiled: gcc's target pragma is what sets them, and AMX came with gcc 11. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MDSNN_X86
#if __GNUC__ >= 11
#define MDSNN_X86_AMX
#endif
#endif

_Static_assert((-3 >> 1) == -2, "the shift of a negative integer must floor");

/* Not inlined: the compiler has registers enough for each part alone, and a profile shows them by name. */
#define APART __attribute__((noinline))

/* A value at hand. Distances are in elements; `step` is 0 for a fixed value, so that it reads the same at every t. */
typedef struct view {
    uint8_t *at;
    ptrdiff_t row, pixel, step;
    int height, width, channels, pitch, type, border;
} view;

/* What one pass over the operations works on: one sample, `steps` of its steps. */
typedef struct frame {
    const mdsnn_plan *plan;
    const mdsnn_call *call;
    uint8_t *state;
    int sample, first_step, steps;
    int fresh; /* 1: nothing was run of this sample before */
    int keep;  /* 1: the state is read again after this pass */
    uint8_t *work;   /* this part's own */
    int part, parts; /* which part of an operation this thread does, of how many */
} frame;

/* Of `count` rows (or blocks), those of a frame's part: first_of(f, count) up to end_of(f, count). */
static inline int first_of(const frame *f, int count) { return (int)((int64_t)count * f->part / f->parts); }
static inline int end_of(const frame *f, int count) { return (int)((int64_t)count * (f->part + 1) / f->parts); }

/* Rows first..end and blocks of outputs first..end of a frame's part: of all blocks, `by_rows`, or of all rows. */
typedef struct share {
    int y, end_y, out, end_out;
} share;

static inline share share_of(const frame *f, int height, int outs, int by_rows)
{
    share s = {0, height, 0, outs};
    if (by_rows) {
        s.y = first_of(f, height);
        s.end_y = end_of(f, height);
    } else {
        s.out = first_of(f, outs);
        s.end_out = end_of(f, outs);
    }
    return s;
}

static inline view view_of(const frame *f, int index)
{
    const mdsnn_value *v = &f->plan->values[index];
    ptrdiff_t kept = v->fixed ? 1 : f->steps;
    view w;
    w.at = (v->place == MDSNN_STATE ? f->state : f->call->scratch) + v->offset;
    w.pixel = kept * v->pitch;
    w.row = w.pixel * (v->width + 2 * v->border);
    w.at += v->border * (w.row + w.pixel) * (1 << v->type);
    w.step = v->fixed ? 0 : v->pitch;
    w.height = v->height;
    w.width = v->width;
    w.channels = v->channels;
    w.pitch = v->pitch;
    w.type = v->type;
    w.border = v->border;
    return w;
}

/* What a thread does of an operation: `what` is the kernels' own business. */
typedef void (*part_run)(const frame *f, const mdsnn_op *op, int what);

/* Do all parts of an operation, with the help of the call's team if there is one. Returns when all are done. */
void mdsnn_share(const frame *f, const mdsnn_op *op, int what, int parts, part_run run);

/* Steps an operation computes: 1 where all it reads is fixed. */
static inline int steps_of(const frame *f, const mdsnn_op *op) { return op->fixed ? 1 : f->steps; }

#endif
