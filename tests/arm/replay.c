/* replay.c: replays known answers in the C engine, on whatever machine it was compiled for: replay FILE
 *
 * FILE comes from tests/replay_arm.py: plans for the base instruction set as plan.py packs them, with offsets into the
 * file where a structure holds a pointer, pixels, and what kernels/reference.py answers: h, s and q of every neuron and
 * step, logits, and counts of inputs and spikes. Little endian, 64-bit pointers. Each network runs three times: whole
 * with a trace, whole without, and step by step with its state kept.
 *
 * Exit status: 0 all equal; 1 one differs, the first named; 2 the file cannot be replayed here.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "mdsnn.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the file is little endian");
_Static_assert(sizeof(void *) == 8, "the file has room for pointers of 64 bits");

enum { ALIGN = 64, MARGIN = 64, FILLER = 0xA5 };

/* The file's first bytes. A name ends in a zero byte; every other table starts at a multiple of 64. */
typedef struct header {
    char magic[8];
    int64_t bytes; /* of the file */
    int64_t contract, plan_bytes, op_bytes, value_bytes;
    int64_t cases, case_count;
    int64_t pointers, pointer_count; /* places of the offsets that become pointers */
} header;

typedef struct known_case {
    int64_t name, plan, pixels, pixel_step, samples, steps;
    int64_t logits; /* [samples][classes] int32 */
    int64_t counts; /* [counters][steps] int64 */
    int64_t lifs, lif_count;
} known_case;

typedef struct known_lif {
    int64_t name, channels, height, width;
    int64_t h, s, q; /* [steps][samples][c][y][x], int32, uint8 and int8 */
} known_lif;

/* What a comparison is about, for its message. */
typedef struct about {
    const char *name, *run;
    int64_t first_step;
} about;

static void *need(void *memory)
{
    if (!memory) {
        fprintf(stderr, "replay: out of memory\n");
        exit(2);
    }
    return memory;
}

/* Aligned bytes with a margin on both sides, all of them FILLER. */
static uint8_t *guarded(int64_t bytes)
{
    size_t size = ((size_t)bytes + ALIGN - 1) / ALIGN * ALIGN + 2 * MARGIN;
    uint8_t *block = need(aligned_alloc(ALIGN, size));
    memset(block, FILLER, size);
    return block + MARGIN;
}

/* Frees a guarded block; exits where its margins were written. */
static void release(uint8_t *block, int64_t bytes, const about *what, const char *which)
{
    for (int i = 1; i <= MARGIN; i++)
        if (block[-i] != FILLER || block[bytes + i - 1] != FILLER) {
            printf("%s, %s: %s was written outside its %" PRId64 " bytes\n", what->name, what->run, which, bytes);
            exit(1);
        }
    free(block - MARGIN);
}

/* Place of the first element of `size` bytes that differs, or -1. */
static int64_t first_difference(const void *got, const void *want, int64_t count, size_t size)
{
    if (count == 0 || memcmp(got, want, (size_t)count * size) == 0)
        return -1;
    int64_t i = 0;
    while (memcmp((const char *)got + (size_t)i * size, (const char *)want + (size_t)i * size, size) == 0)
        i++;
    return i;
}

static void compare_logits(const about *what, const int32_t *got, const int32_t *want, int64_t samples, int64_t classes)
{
    int64_t i = first_difference(got, want, samples * classes, sizeof *got);
    if (i >= 0) {
        printf("%s, %s: logits of sample %" PRId64 ", class %" PRId64 ": got %" PRId32 ", want %" PRId32 "\n",
               what->name, what->run, i / classes, i % classes, got[i], want[i]);
        exit(1);
    }
}

/* `got` is [counters][steps]; `want` is [counters][all_steps], of which those from what->first_step on are meant. */
static void compare_counts(const about *what, const int64_t *got, const int64_t *want, int64_t counters, int64_t steps,
                           int64_t all_steps)
{
    for (int64_t row = 0; row < counters; row++)
        for (int64_t t = 0; t < steps; t++) {
            int64_t right = want[row * all_steps + what->first_step + t];
            if (got[row * steps + t] != right) {
                printf("%s, %s: count %" PRId64 " of step %" PRId64 ": got %" PRId64 ", want %" PRId64 "\n", what->name,
                       what->run, row, what->first_step + t, got[row * steps + t], right);
                exit(1);
            }
        }
}

/* One of a LIF's traces: `letter` is h, s or q, and element i of it is number(array, letter, i). */
static int number(const void *array, char letter, int64_t i)
{
    return letter == 'h' ? ((const int32_t *)array)[i]
         : letter == 's' ? ((const uint8_t *)array)[i]
                         : ((const int8_t *)array)[i];
}

static void compare_trace(const about *what, const char *base, const known_lif *lif, char letter, const void *got,
                          int64_t want_at, int64_t samples, int64_t steps)
{
    size_t size = letter == 'h' ? sizeof(int32_t) : 1;
    int64_t plane = lif->height * lif->width, neurons = lif->channels * plane;
    const char *want = base + want_at + (size_t)(what->first_step * samples * neurons) * size;
    int64_t i = first_difference(got, want, steps * samples * neurons, size);
    if (i >= 0) {
        printf("%s, %s: %c of '%s' at step %" PRId64 ", sample %" PRId64 ", channel %" PRId64 ", y %" PRId64
               ", x %" PRId64 ": got %d, want %d\n",
               what->name, what->run, letter, base + lif->name, what->first_step + i / neurons / samples,
               i / neurons % samples, i % neurons / plane, i % plane / lif->width, i % lif->width,
               number(got, letter, i), number(want, letter, i));
        exit(1);
    }
}

/* Steps first_step.. of a case in `state`, compared with what is known. `pitch` as in mdsnn_call. */
static void replay_steps(const char *base, const known_case *c, const about *what, int64_t steps, int fresh,
                         uint8_t *state, int64_t pitch, int trace)
{
    const mdsnn_plan *plan = (const mdsnn_plan *)(const void *)(base + c->plan);
    const known_lif *lifs = (const known_lif *)(const void *)(base + c->lifs);
    int64_t classes = plan->classes, counters = plan->counters;
    size_t lif_count = (size_t)c->lif_count;
    uint8_t **traces = need(calloc(3 * lif_count + 1, sizeof *traces));
    int32_t **h = need(calloc(lif_count + 1, sizeof *h));
    int8_t **q = need(calloc(lif_count + 1, sizeof *q));
    for (size_t l = 0; trace && l < lif_count; l++) {
        int64_t bytes = steps * c->samples * lifs[l].channels * lifs[l].height * lifs[l].width;
        traces[l] = guarded(bytes);
        traces[lif_count + l] = guarded(bytes);
        traces[2 * lif_count + l] = guarded(4 * bytes);
        q[l] = (int8_t *)traces[lif_count + l];
        h[l] = (int32_t *)(void *)traces[2 * lif_count + l];
    }
    int64_t logit_bytes = c->samples * classes * (int64_t)sizeof(int32_t);
    int64_t count_bytes = counters * steps * (int64_t)sizeof(int64_t);
    uint8_t *scratch = guarded(plan->scratch_bytes), *logits = guarded(logit_bytes), *counts = guarded(count_bytes);
    uint8_t *work = guarded(plan->work_bytes);
    memset(counts, 0, (size_t)count_bytes);

    mdsnn_call call;
    memset(&call, 0, sizeof call);
    call.pixels = (const uint8_t *)base + c->pixels + what->first_step * c->pixel_step;
    call.pixel_step = c->pixel_step;
    call.samples = (int32_t)c->samples;
    call.steps = (int32_t)steps;
    call.fresh = fresh;
    call.state_pitch = pitch;
    call.state = state;
    call.scratch = scratch;
    call.work = work;
    call.logits = (int32_t *)(void *)logits;
    call.counts = (int64_t *)(void *)counts;
    if (trace) {
        call.trace_h = h;
        call.trace_s = traces;
        call.trace_q = q;
    }
    mdsnn_run(plan, MDSNN_BASE, &call);

    for (size_t l = 0; trace && l < lif_count; l++) {
        compare_trace(what, base, &lifs[l], 'h', h[l], lifs[l].h, c->samples, steps);
        compare_trace(what, base, &lifs[l], 's', traces[l], lifs[l].s, c->samples, steps);
        compare_trace(what, base, &lifs[l], 'q', q[l], lifs[l].q, c->samples, steps);
        int64_t bytes = steps * c->samples * lifs[l].channels * lifs[l].height * lifs[l].width;
        release(traces[l], bytes, what, "a trace of s");
        release(traces[lif_count + l], bytes, what, "a trace of q");
        release(traces[2 * lif_count + l], 4 * bytes, what, "a trace of h");
    }
    if (what->first_step + steps == c->steps) /* the answers are those after the last step */
        compare_logits(what, call.logits, (const int32_t *)(const void *)(base + c->logits), c->samples, classes);
    compare_counts(what, call.counts, (const int64_t *)(const void *)(base + c->counts), counters, steps, c->steps);
    release(scratch, plan->scratch_bytes, what, "the scratch");
    release(work, plan->work_bytes, what, "the work of a part");
    release(logits, logit_bytes, what, "the logits");
    release(counts, count_bytes, what, "the counts");
    free(traces);
    free(h);
    free(q);
}

static void replay_case(const char *base, const known_case *c)
{
    int64_t bytes = ((const mdsnn_plan *)(const void *)(base + c->plan))->state_bytes;
    about what = {base + c->name, "with a trace", 0};
    uint8_t *state = guarded(bytes);
    replay_steps(base, c, &what, c->steps, 1, state, 0, 1);
    what.run = "without a trace";
    replay_steps(base, c, &what, c->steps, 1, state, 0, 0);
    release(state, bytes, &what, "the state");

    what.run = "step by step";
    state = guarded(c->samples * bytes);
    for (; what.first_step < c->steps; what.first_step++)
        replay_steps(base, c, &what, 1, what.first_step == 0, state, bytes, 1);
    release(state, c->samples * bytes, &what, "the state");
}

/* The whole file, aligned; exits where it is not one of ours, whole and of this build. */
static char *load(const char *path)
{
    FILE *file = fopen(path, "rb");
    header head;
    if (!file || fread(&head, sizeof head, 1, file) != 1 || memcmp(head.magic, "mdsnnKAT", sizeof head.magic) != 0) {
        fprintf(stderr, "replay: %s is not a file of known answers\n", path);
        exit(2);
    }
    if (head.contract != MDSNN_CONTRACT || head.plan_bytes != sizeof(mdsnn_plan) ||
        head.op_bytes != sizeof(mdsnn_op) || head.value_bytes != sizeof(mdsnn_value)) {
        fprintf(stderr, "replay: %s holds plans of another mdsnn.h; build it again\n", path);
        exit(2);
    }
    int whole = head.bytes > (int64_t)sizeof head && fseek(file, 0, SEEK_END) == 0 && ftell(file) == head.bytes;
    size_t bytes = whole ? (size_t)head.bytes : 0;
    char *base = need(aligned_alloc(ALIGN, (bytes + ALIGN) / ALIGN * ALIGN));
    if (!whole || fseek(file, 0, SEEK_SET) != 0 || fread(base, 1, bytes, file) != bytes) {
        fprintf(stderr, "replay: %s is not whole\n", path);
        exit(2);
    }
    fclose(file);
    for (int64_t i = 0; i < head.pointer_count; i++) {
        int64_t place, offset;
        memcpy(&place, base + head.pointers + i * (int64_t)sizeof place, sizeof place);
        memcpy(&offset, base + place, sizeof offset);
        const void *pointer = base + offset;
        memcpy(base + place, &pointer, sizeof pointer);
    }
    return base;
}

int main(int count, char **arguments)
{
    if (count != 2) {
        fprintf(stderr, "use: replay FILE\n");
        return 2;
    }
    char *base = load(arguments[1]);
    const header *head = (const header *)(void *)base;
    const known_case *cases = (const known_case *)(const void *)(base + head->cases);
    for (int64_t i = 0; i < head->case_count; i++)
        replay_case(base, &cases[i]);
    printf("%" PRId64 " networks equal\n", head->case_count);
    free(base);
    return 0;
}
