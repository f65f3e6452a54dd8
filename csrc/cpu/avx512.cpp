// x86-64 with AVX-512 F, BW, DQ and VL.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define SMART_FAST_ISA avx512
#define SMART_FAST_LANES 16
#include "kernels_body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
