// Which instruction set serves this CPU.
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "kernels.h"

namespace smart_fast {
namespace cpu {
namespace {

const Kernels* const widest_first[] = {
#if defined(SMART_FAST_ONLY)  // built for this machine alone
    &SMART_FAST_ONLY,
#else
#if defined(__x86_64__)
    &avx512, &avx2,
#endif
    &portable,
#endif
};

bool supported(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (std::strcmp(name, "avx512") == 0)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && supported("avx2");
  if (std::strcmp(name, "avx2") == 0)  // every CPU with AVX2 and FMA has F16C, which old compilers cannot ask for
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return std::strcmp(name, "portable") == 0;
}

const Kernels* find(const char* name) {
  for (const Kernels* each : widest_first)
    if (supported(each->name) && (std::strcmp(name, "auto") == 0 || std::strcmp(name, each->name) == 0)) return each;
  return nullptr;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* current = chosen.load(std::memory_order_relaxed);
  if (current == nullptr) {
    current = find("auto");
    if (current == nullptr) throw std::runtime_error("smart_fast: the native backend was built for another CPU");
    chosen.store(current, std::memory_order_relaxed);
  }
  return *current;
}

bool choose(const char* name) {
  const Kernels* found = find(name);
  if (found != nullptr) chosen.store(found, std::memory_order_relaxed);
  return found != nullptr;
}

bool runs_here(const char* name) { return find(name) != nullptr; }

}  // namespace cpu
}  // namespace smart_fast
