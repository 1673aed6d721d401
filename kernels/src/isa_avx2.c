/* isa_avx2.c: the kernels for x86-64 with AVX2. */
#include "view.h"

#if defined(MDSNN_X86)
#pragma GCC target("avx2,bmi,bmi2,lzcnt,popcnt,fma")
#define ISA avx2
#define VECTOR_BYTES 32
#include "kernels.h"
#else
typedef int isa_avx2_is_empty;
#endif
