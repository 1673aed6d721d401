/* isa_avx512.c: the kernels for x86-64 with AVX-512 F, BW, DQ and VL. */
#include "view.h"

#if defined(MDSNN_X86)
#pragma GCC target("avx2,bmi,bmi2,lzcnt,popcnt,fma,avx512f,avx512bw,avx512dq,avx512vl")
#define ISA avx512
#define VECTOR_BYTES 64
#include "kernels.h"
#else
typedef int isa_avx512_is_empty;
#endif
