/* ticks.h: where the time goes, if the call asks. Otherwise a stage costs one test of a pointer. */
#ifndef MDSNN_TICKS_H
#define MDSNN_TICKS_H

#include <time.h>

#include "view.h"

static inline int64_t ticks_now(void)
{
#if defined(__x86_64__)
    return (int64_t)__builtin_ia32_rdtsc();
#elif defined(__aarch64__)
    int64_t now;
    __asm__ volatile("mrs %0, cntvct_el0" : "=r"(now));
    return now;
#else
    return (int64_t)clock();
#endif
}

/* Now, if the call asks for times. */
static inline int64_t ticks_start(const frame *f) { return f->call->times ? ticks_now() : 0; }

/* Counts the ticks since `since` for a stage of a plan's operation; returns now. */
static inline int64_t ticks_count(const frame *f, const mdsnn_op *op, int stage, int64_t since)
{
    if (!f->call->times)
        return 0;
    int64_t now = ticks_now();
    f->call->times[(op - f->plan->ops) * MDSNN_STAGES + stage] += now - since;
    return now;
}

#endif
