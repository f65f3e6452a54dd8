// The C++ API of csrc/cuda for ctypes, run by cuda_emulation.h, and the formulas it is made of one element at a time.
#include "cuda/kernels.h"
#include "cuda/divergence.h"
#include "cuda/noise.h"

using namespace smart_fast;

extern "C" {

int64_t size_of(int which) {
  const int64_t sizes[] = {sizeof(cuda::Perturb), sizeof(cuda::Ascend), sizeof(cuda::Divergence),
                           sizeof(cuda::Fisher)};
  return sizes[which];
}
void set_device(int major, int multiprocessors, int shared_memory) {
  emulation::major = major;
  emulation::multiprocessors = multiprocessors;
  emulation::shared_memory = shared_memory;
}

int perturb(const cuda::Perturb* args) { return cuda::perturb(*args, nullptr); }
int ascend(const cuda::Ascend* args) { return cuda::ascend(*args, nullptr); }
int64_t forward_partials(const cuda::Divergence* args) { return cuda::forward_partials(*args); }
int divergence_forward(const cuda::Divergence* args) { return cuda::divergence_forward(*args, nullptr); }
int divergence_finish(const cuda::Divergence* args) { return cuda::divergence_finish(*args, nullptr); }
int divergence_backward(const cuda::Divergence* args) { return cuda::divergence_backward(*args, nullptr); }
int divergence_elements_backward(const cuda::Divergence* args) {
  return cuda::divergence_elements_backward(*args, nullptr);
}
int fisher_direction(const cuda::Fisher* args) { return cuda::fisher_direction(*args, nullptr); }

// The conversions of all 65536 halves to float and back.
void halves(float* bf16, float* fp16, uint16_t* bf16_back, uint16_t* fp16_back) {
  for (uint32_t i = 0; i < 65536; ++i) {
    bf16[i] = cuda::bf16_to_float(i);
    fp16[i] = cuda::fp16_to_float(i);
    bf16_back[i] = uint16_t(cuda::floats_to_bf16(bf16[i], 0.0f));
    fp16_back[i] = uint16_t(cuda::floats_to_fp16(0.0f, fp16[i]) >> 16);
  }
}
int64_t seed_from(uint64_t generator_seed, uint64_t offset) { return cuda::seed_from(generator_seed, offset); }
}
