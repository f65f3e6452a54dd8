// What host and device compilers call things.
#pragma once

#if defined(__CUDACC__)
#define SMART_FAST_INLINE __host__ __device__ __forceinline__
#else
// Always inlined: a copy left over from a file built for AVX-512 must never be linked into a portable one.
#define SMART_FAST_INLINE inline __attribute__((always_inline))
#endif
#define SMART_FAST_HOST_INLINE inline __attribute__((always_inline))  // no device ever calls it
