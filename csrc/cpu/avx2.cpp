// x86-64 with AVX2, FMA and F16C.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define SMART_FAST_ISA avx2
#define SMART_FAST_LANES 8
#include "kernels_body.h"
#endif
