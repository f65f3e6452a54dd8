// What the kernels use of CUDA. Tests define SMART_FAST_EMULATION, a header that runs the same sources on a CPU.
#pragma once

#if defined(SMART_FAST_EMULATION)
#include SMART_FAST_EMULATION
#else
#include <cuda_runtime.h>
#define SMART_FAST_DYNAMIC_SHARED(type, name)        \
  extern __shared__ __align__(16) char bytes_of_##name[]; \
  type* const name = reinterpret_cast<type*>(bytes_of_##name)
#endif

#include "../platform.h"
