// All that includes torch's headers, in one translation unit: reading them takes longer than compiling what is here. The
// arithmetic is in the kernels; this is called once for a tensor, so that the compiler need not try hard.
#define AT_PER_OPERATOR_HEADERS  // or they declare every operator that torch has
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O1")
#endif

#include "autograd.cpp"
#include "eager.cpp"
#include "plans.cpp"
#include "triton.cpp"
#include "bindings.cpp"
