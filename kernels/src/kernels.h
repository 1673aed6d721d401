/* kernels.h: every operator family, for one instruction set.
 *
 * isa_base.c, isa_avx2.c, ... each define ISA and VECTOR_BYTES, set the compiler's target by a pragma, and include this
 * file: the same source, compiled again. The families of the residual stream come twice, for 16 and 32 bits.
 */

#define PASTE3(a, b, c) a##_##b##_##c
#define EXPAND3(a, b, c) PASTE3(a, b, c)
#define PASTE2(a, b) a##_##b
#define EXPAND2(a, b) PASTE2(a, b)
#define NAME(function) EXPAND2(function, ISA)
#define STREAM_NAME(function) EXPAND3(function, STREAM_SUFFIX, ISA)

#define MDSNN_MAX_COMPARED 32
#define MDSNN_STEPS 16 /* most steps of a pass */

#include "ticks.h"
#include "view.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "input.h"
#include "conv.h"
#include "pool.h"
#include "readout.h"

#define STREAM int16_t
#define STREAM_IS_NARROW
#define USTREAM uint16_t
#define STREAM_SUFFIX i16
#include "bn.h"
#include "lif.h"
#include "residual.h"
#undef STREAM
#undef STREAM_IS_NARROW
#undef USTREAM
#undef STREAM_SUFFIX

#define STREAM int32_t
#define USTREAM uint32_t
#define STREAM_SUFFIX i32
#include "bn.h"
#include "lif.h"
#include "residual.h"
#undef STREAM
#undef USTREAM
#undef STREAM_SUFFIX

#include "events.h"
#include "pairs.h"
#include "grouped.h"
#include "follow_wide.h"
#include "epilogue.h"
#include "wide.h"
#ifdef MDSNN_WITH_TILES
#include "follow.h"
#include "tiles.h"
#endif
#include "fused.h"
#include "strain.h"

#include "pass.h"
