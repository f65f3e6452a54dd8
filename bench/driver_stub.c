/* A libcuda.so.1 for machines without a GPU: it answers what Triton's launcher asks, launches nothing and can record what
 * it was asked to launch. Built and described by driver_stub.py. */
#include <stdint.h>
#include <string.h>

#include "cuda.h"

#define MOST_LAUNCHES 4096
#define MOST_FUNCTIONS 512
#define MOST_PARAMETERS 64

struct function {
  char name[128];
  int parameters;
  int sizes[MOST_PARAMETERS];
};

struct launch {
  int function;
  unsigned grid[3], block[3], shared;
  uint64_t stream;
  uint64_t parameters[MOST_PARAMETERS];
};

static struct function functions[MOST_FUNCTIONS];
static int function_count, next_parameters, next_sizes[MOST_PARAMETERS];
static struct launch launches[MOST_LAUNCHES];
static int recording;
static int64_t launch_count;

/* ---- for driver_stub.py ---- */

/* The bytes of each parameter of the function that is loaded next. */
void stub_expect(int count, const int* sizes) {
  next_parameters = count < MOST_PARAMETERS ? count : MOST_PARAMETERS;
  memcpy(next_sizes, sizes, sizeof(int) * (size_t)next_parameters);
}
void stub_record(int on) {
  recording = on;
  launch_count = 0;
}
int64_t stub_launch_count(void) { return launch_count; }
const struct launch* stub_launch(int64_t index) { return &launches[index]; }
const char* stub_name(int function) { return functions[function].name; }
int stub_parameter_count(int function) { return functions[function].parameters; }

/* ---- the driver ---- */

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction f, void** parameters, void** extra) {
  (void)extra;
  const int64_t index = __atomic_fetch_add(&launch_count, 1, __ATOMIC_RELAXED); /* Python's lock is not held here */
  if (recording && index < MOST_LAUNCHES) {
    struct launch* launch = &launches[index];
    launch->function = (int)(intptr_t)f - 1;
    const struct function* function = &functions[launch->function];
    const unsigned grid[3] = {config->gridDimX, config->gridDimY, config->gridDimZ};
    const unsigned block[3] = {config->blockDimX, config->blockDimY, config->blockDimZ};
    memcpy(launch->grid, grid, sizeof grid);
    memcpy(launch->block, block, sizeof block);
    launch->shared = config->sharedMemBytes;
    launch->stream = (uint64_t)(uintptr_t)config->hStream;
    memset(launch->parameters, 0, sizeof launch->parameters);
    for (int k = 0; k < function->parameters; ++k)
      memcpy(&launch->parameters[k], parameters[k], (size_t)function->sizes[k]);
  }
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  (void)image;
  *module = (CUmodule)1;
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) {
  (void)module;
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* f, CUmodule module, const char* name) {
  (void)module;
  if (function_count == MOST_FUNCTIONS) return CUDA_ERROR_OUT_OF_MEMORY;
  struct function* function = &functions[function_count++];
  strncpy(function->name, name, sizeof function->name - 1);
  function->parameters = next_parameters;
  memcpy(function->sizes, next_sizes, sizeof next_sizes);
  *f = (CUfunction)(intptr_t)function_count; /* one more than its index: null is none */
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  (void)attribute;
  *(CUdeviceptr*)data = pointer;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  (void)device;
  switch (attribute) { /* an H100's, where a launch depends on it */
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = 232448;
      break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = 132;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      *value = 65536;
      break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      *value = 32;
      break;
    default:
      *value = 1;
  }
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction f) {
  (void)f;
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) {
  (void)f, (void)attribute, (void)value;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) {
  (void)f, (void)config;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
  (void)context;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  (void)limit;
  *value = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
  (void)limit, (void)value;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  (void)device;
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int* version) {
  *version = 13010;
  return CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  (void)stream;
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** text) {
  (void)error;
  *text = "an error of the stub";
  return CUDA_SUCCESS;
}
