/* isa_base.c: the kernels as any machine runs them: 128-bit vectors (SSE2, NEON, or what the compiler makes of them). */
#define ISA base
#define VECTOR_BYTES 16
#include "kernels.h"
