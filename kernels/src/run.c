/* run.c: what Python calls. Picks the instruction set, and cuts a call into passes of one sample and some steps. */

#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* syscall */
#endif

#include "view.h"

#if defined(MDSNN_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

void mdsnn_pass_base(const frame *f);
#if defined(MDSNN_X86)
void mdsnn_pass_avx2(const frame *f);
void mdsnn_pass_avx512(const frame *f);
#if defined(MDSNN_X86_AMX)
void mdsnn_pass_amx(const frame *f);

/* AMX's registers are large: Linux hands them out on request, to the whole process, and its answer is what counts. */
static int amx_granted(void)
{
#if defined(__linux__) && defined(SYS_arch_prctl)
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1))
        return 0;
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
#else
    return 0;
#endif
}
#endif
#endif

int mdsnn_supported(int isa)
{
    if (isa == MDSNN_BASE)
        return 1;
#if defined(MDSNN_X86)
    __builtin_cpu_init();
    if (isa == MDSNN_AVX2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
               __builtin_cpu_supports("lzcnt") && __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("fma");
    if (isa == MDSNN_AVX512)
        return mdsnn_supported(MDSNN_AVX2) && __builtin_cpu_supports("avx512f") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl");
#if defined(MDSNN_X86_AMX)
    if (isa == MDSNN_AMX)
        return mdsnn_supported(MDSNN_AVX512) && amx_granted();
#endif
#endif
    return 0;
}

void mdsnn_run(const mdsnn_plan *plan, int isa, const mdsnn_call *call)
{
    void (*pass)(const frame *) = mdsnn_pass_base;
#if defined(MDSNN_X86)
    if (isa == MDSNN_AVX2)
        pass = mdsnn_pass_avx2;
    else if (isa == MDSNN_AVX512)
        pass = mdsnn_pass_avx512;
#if defined(MDSNN_X86_AMX)
    else if (isa == MDSNN_AMX)
        pass = mdsnn_pass_amx;
#endif
#else
    (void)isa;
#endif
    for (int sample = 0; sample < call->samples; sample++)
        for (int first = 0; first < call->steps; first += plan->chunk) {
            frame f;
            f.plan = plan;
            f.call = call;
            f.state = call->state + sample * call->state_pitch;
            f.sample = sample;
            f.first_step = first;
            f.steps = call->steps - first < plan->chunk ? call->steps - first : plan->chunk;
            f.fresh = call->fresh && first == 0;
            f.keep = call->state_pitch != 0 || first + f.steps < call->steps;
            pass(&f);
        }
}
