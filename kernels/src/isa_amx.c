/* isa_amx.c: the kernels for x86-64 with AVX-512, VNNI, GFNI and AMX's 8-bit tiles. */
#include "view.h"

#if defined(MDSNN_X86_AMX)
#pragma GCC target("avx2,bmi,bmi2,lzcnt,popcnt,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,gfni,amx-tile,amx-int8")
#define ISA amx
#define VECTOR_BYTES 64
#define MDSNN_WITH_TILES
#include "kernels.h"
#else
typedef int isa_amx_is_empty;
#endif
