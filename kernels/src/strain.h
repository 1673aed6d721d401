/* strain.h: loops of one instruction, to measure what the processor can do at most (`mdsnn bench --profile`).
 *
 * Eight sums in registers hide the latency of an addition. The empty asm keeps a sum where it is: without it, the
 * compiler would do the work of all rounds at once.
 */

#if defined(__AVX512F__)
#define HELD "+v"
#elif defined(__x86_64__)
#define HELD "+x"
#elif defined(__aarch64__)
#define HELD "+w"
#else
#define HELD "+m"
#endif
#define HOLD(a, b, c, d, e, f, g, h)                                                                                   \
    __asm__ volatile("" : HELD(a), HELD(b), HELD(c), HELD(d), HELD(e), HELD(f), HELD(g), HELD(h))
#define STRAIN_SUMS 8 /* their own variables: gcc 12 keeps an array of them in memory */

#ifdef MDSNN_WITH_TILES
static int64_t NAME(strain_tiles)(int64_t rounds)
{
    NAME(tiles_begin)();
    for (int64_t i = 0; i < rounds; i++) {
        _tile_dpbssd(0, 4, 5);
        _tile_dpbssd(1, 4, 6);
        _tile_dpbssd(2, 4, 5);
        _tile_dpbssd(3, 4, 6);
    }
    NAME(tiles_end)();
    return rounds * 4 * 16 * 16 * 64;
}
#endif

int64_t NAME(mdsnn_strain)(int what, const uint8_t *bytes, int64_t size, int64_t rounds);

int64_t NAME(mdsnn_strain)(int what, const uint8_t *bytes, int64_t size, int64_t rounds)
{
    NAME(v8) one = {0}, a0 = one, a1 = one, a2 = one, a3 = one, a4 = one, a5 = one, a6 = one, a7 = one;
    NAME(v32) none = {0}, p0 = none, p1 = none, p2 = none, p3 = none, p4 = none, p5 = none, p6 = none, p7 = none;
    memset(&one, 1, sizeof one);
    if (what == MDSNN_BYTE_ADDS) {
        for (int64_t i = 0; i < rounds; i++) {
            a0 += one, a1 += one, a2 += one, a3 += one, a4 += one, a5 += one, a6 += one, a7 += one;
            HOLD(a0, a1, a2, a3, a4, a5, a6, a7);
        }
        return rounds * STRAIN_SUMS * VECTOR_BYTES;
    }
    if (what == MDSNN_PAIR_PRODUCTS) {
#define PRODUCTS(sum)                                                                                                  \
    __asm__ volatile("" : HELD(one));                                                                                  \
    sum += NAME(multiply_pairs)((NAME(v16))one, (NAME(v16))one)
        for (int64_t i = 0; i < rounds; i++) {
            PRODUCTS(p0);
            PRODUCTS(p1);
            PRODUCTS(p2);
            PRODUCTS(p3);
            PRODUCTS(p4);
            PRODUCTS(p5);
            PRODUCTS(p6);
            PRODUCTS(p7);
            HOLD(p0, p1, p2, p3, p4, p5, p6, p7);
        }
#undef PRODUCTS
        return rounds * STRAIN_SUMS * VECTOR_BYTES / 2;
    }
    if (what == MDSNN_READS) {
        int64_t stretches = size / (STRAIN_SUMS * VECTOR_BYTES);
        for (int64_t i = 0; i < rounds; i++) {
            const NAME(v8) *from = (const NAME(v8) *)bytes;
            for (int64_t j = 0; j < stretches; j++, from += STRAIN_SUMS) {
                a0 += from[0], a1 += from[1], a2 += from[2], a3 += from[3];
                a4 += from[4], a5 += from[5], a6 += from[6], a7 += from[7];
            }
            HOLD(a0, a1, a2, a3, a4, a5, a6, a7);
        }
        return rounds * stretches * STRAIN_SUMS * VECTOR_BYTES;
    }
#ifdef MDSNN_WITH_TILES
    if (what == MDSNN_TILE_PRODUCTS)
        return NAME(strain_tiles)(rounds);
#endif
    return 0;
}

#undef HOLD
#undef HELD
