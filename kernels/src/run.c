/* run.c: what Python calls. Picks the instruction set, and cuts a call into passes of one sample and some steps. */

#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* syscall */
#endif

#include "ticks.h"
#include "view.h"

#if !defined(_WIN32)
#include <sched.h>
#endif
#if defined(MDSNN_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

void mdsnn_pass_base(const frame *f);
int64_t mdsnn_strain_base(int what, const uint8_t *bytes, int64_t size, int64_t rounds);
#if defined(MDSNN_X86)
void mdsnn_pass_avx2(const frame *f);
void mdsnn_pass_avx512(const frame *f);
int64_t mdsnn_strain_avx2(int what, const uint8_t *bytes, int64_t size, int64_t rounds);
int64_t mdsnn_strain_avx512(int what, const uint8_t *bytes, int64_t size, int64_t rounds);
#if defined(MDSNN_X86_AMX)
void mdsnn_pass_amx(const frame *f);
int64_t mdsnn_strain_amx(int what, const uint8_t *bytes, int64_t size, int64_t rounds);

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
        return mdsnn_supported(MDSNN_AVX512) && __builtin_cpu_supports("avx512vnni") &&
               __builtin_cpu_supports("gfni") && amx_granted();
#endif
#endif
    return 0;
}

/* One operation to share; lies on the stack of the thread that runs the call, and is read by who has taken a part. */
typedef struct job {
    const frame *f;
    const mdsnn_op *op;
    int what, parts;
    part_run run;
} job;

#define CLOSED UINT64_MAX /* a ticket after the call */

static void relax(unsigned *idle)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
#if !defined(_WIN32)
    if (++*idle % 1024 == 0)
        sched_yield(); /* more threads than processors, perhaps */
#else
    (void)idle;
#endif
}

static void do_part(const job *j, int part)
{
    frame mine = *j->f;
    mine.part = part;
    mine.parts = j->parts;
    mine.work = mine.call->work + part * mine.plan->work_bytes;
    j->run(&mine, j->op, j->what);
}

/* Takes a part of the team's job and does it. 0 if there was none to take. */
static int take_part(mdsnn_team *team, uint64_t ticket)
{
    int part = (int)(ticket & 0xFFFF), parts = (int)(ticket >> 16 & 0xFFFF);
    if (part >= parts ||
        !__atomic_compare_exchange_n(&team->ticket, &ticket, ticket + 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
        return 0;
    do_part((const job *)team->job, part);
    __atomic_fetch_add(&team->done, 1, __ATOMIC_RELEASE);
    return 1;
}

void mdsnn_share(const frame *f, const mdsnn_op *op, int what, int parts, part_run run)
{
    mdsnn_team *team = f->call->team;
    job j = {f, op, what, parts, run};
    unsigned idle = 0;
    if (!team || parts < 2) {
        j.parts = 1;
        do_part(&j, 0);
        return;
    }
    uint64_t number = (__atomic_load_n(&team->ticket, __ATOMIC_RELAXED) >> 32) + 1;
    team->job = &j;
    __atomic_store_n(&team->done, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&team->ticket, number << 32 | (uint64_t)parts << 16, __ATOMIC_RELEASE);
    for (;;) {
        uint64_t ticket = __atomic_load_n(&team->ticket, __ATOMIC_ACQUIRE);
        if ((ticket & 0xFFFF) >= (uint64_t)parts)
            break;
        take_part(team, ticket);
    }
    while (__atomic_load_n(&team->done, __ATOMIC_ACQUIRE) != parts)
        relax(&idle);
}

void mdsnn_help(mdsnn_team *team)
{
    unsigned idle = 0;
    for (;;) {
        uint64_t ticket = __atomic_load_n(&team->ticket, __ATOMIC_ACQUIRE);
        if (ticket == CLOSED)
            return;
        if (take_part(team, ticket))
            idle = 0;
        else
            relax(&idle);
    }
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
            f.work = call->work;
            f.part = 0;
            f.parts = 1;
            pass(&f);
        }
    if (call->team)
        __atomic_store_n(&call->team->ticket, CLOSED, __ATOMIC_RELEASE);
}

int64_t mdsnn_ticks(void) { return ticks_now(); }

int64_t mdsnn_strain(int isa, int what, const uint8_t *bytes, int64_t size, int64_t rounds)
{
#if defined(MDSNN_X86)
    if (isa == MDSNN_AVX2)
        return mdsnn_strain_avx2(what, bytes, size, rounds);
    if (isa == MDSNN_AVX512)
        return mdsnn_strain_avx512(what, bytes, size, rounds);
#if defined(MDSNN_X86_AMX)
    if (isa == MDSNN_AMX)
        return mdsnn_strain_amx(what, bytes, size, rounds);
#endif
#else
    (void)isa;
#endif
    return mdsnn_strain_base(what, bytes, size, rounds);
}
