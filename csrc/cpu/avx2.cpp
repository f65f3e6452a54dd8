// x86-64 with AVX2, FMA and F16C.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define SMART_FAST_ISA avx2
#define SMART_FAST_LANES 8
#include "kernels_body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
