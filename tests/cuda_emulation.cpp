// The C++ API of csrc/cuda for ctypes, run by cuda_emulation.h, and the formulas it is made of one element at a time.
#include "cuda/kernels.h"
#include "cuda/divergence.h"
#include "cuda/launch.h"
#include "cuda/noise.h"

using namespace smart_fast;

namespace {

// Launched by tests in ways that a device refuses.
void probe_kernel(float* out) {
  SMART_FAST_SHARED(cuda::Shared, shared);
  SMART_FAST_DYNAMIC_SHARED(float, stored);
  cuda::Group group(shared);
  stored[0] = 1.0f;
  cuda::vector_at<float4>(out) = {stored[0], 1.0f, 1.0f, 1.0f};
}

}  // namespace

extern "C" {

int64_t size_of(int which) {
  const int64_t sizes[] = {sizeof(cuda::Perturb), sizeof(cuda::Ascend), sizeof(cuda::Divergence),
                           sizeof(cuda::Fisher)};
  return sizes[which];
}
// The current device from here on: one of its own for every new combination.
void set_device(int major, int multiprocessors, int shared_of_multiprocessor, int shared_of_block) {
  const emulation::Device wanted = {shared_of_multiprocessor, shared_of_block, major, multiprocessors};
  auto& devices = emulation::devices;
  emulation::device = size_t(std::find(devices.begin(), devices.end(), wanted) - devices.begin());
  if (emulation::device == devices.size()) devices.push_back(wanted);
}
void run_only(unsigned last_clusters, int64_t last_row) {
  emulation::last_clusters = last_clusters;
  emulation::last_row = last_row;
}
int64_t device_queries() { return int64_t(emulation::queries); }

// A launch past our own launcher: `opt_in` is the size to ask for, if it is positive.
int probe(float* out, unsigned x, unsigned y, unsigned z, unsigned threads, int64_t shared, int opt_in, unsigned cluster) {
  if (opt_in > 0) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(probe_kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, opt_in);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute = {cudaLaunchAttributeClusterDimension, {{cluster, 1, 1}}};
  const cudaLaunchConfig_t config = {dim3(x, y, z), dim3(threads), size_t(shared), nullptr, &attribute, 1};
  return cudaLaunchKernelEx(&config, probe_kernel, out);
}

int perturb(const cuda::Perturb* args) { return cuda::perturb(*args, nullptr); }
int ascend(const cuda::Ascend* args) { return cuda::ascend(*args, nullptr); }
int forward_partials(const cuda::Divergence* args, int64_t* count) { return cuda::forward_partials(*args, *count); }
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
