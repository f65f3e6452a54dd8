// perturb: embed + noise_var * unit * noise(seed), the noise never touching memory. Floor: read embed, write the result.
#include "launch.h"
#include "noise.h"

namespace smart_fast {
namespace cuda {
namespace {

constexpr int PER_THREAD = 2;  // chunks: two loads in flight while the first noise is computed
constexpr int THREADS = 256;   // of a block

template <class T, Noise KIND>
__global__ void __launch_bounds__(THREADS, 3) perturb_kernel(const Perturb args) {
  constexpr int size = Chunk<T>::size;
  const Shape& shape = args.shape;
  const int64_t seed = seed_of(args.seed);
  if (args.seed_out != nullptr && blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0 && threadIdx.y == 0)
    *args.seed_out = seed;

  for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < shape.rows;
       row += int64_t(gridDim.y) * blockDim.y) {
    const Reader<T> embed(shape, args.embed, row);
    const Writer<T> out(args.out, args.embed.dtype, row, shape.width);
    float* noise_out = args.noise_out == nullptr ? nullptr : args.noise_out + row * shape.width;
    const bool real = args.mask == nullptr || args.mask[row] != 0;
    const float scale = args.noise_var * unit_of(args.unit, row);
    const int64_t skew = row * shape.width % size, stride = int64_t(gridDim.x) * blockDim.x * PER_THREAD * size;

    for (int64_t begin = (int64_t(blockIdx.x) * blockDim.x * PER_THREAD + threadIdx.x) * size - skew;
         begin < shape.width; begin += stride) {
      Chunk<T> chunks[PER_THREAD];
#pragma unroll
      for (int k = 0; k < PER_THREAD; ++k)
        chunks[k] = embed.read(begin + int64_t(k) * blockDim.x * size, shape.width, Fill::zero);
#pragma unroll
      for (int k = 0; k < PER_THREAD; ++k) {
        const int64_t first = begin + int64_t(k) * blockDim.x * size;
        if (first >= shape.width) break;
        float values[size], noise[size];
        chunks[k].unpack(values);
        noise_of(KIND, uint64_t(seed), row * shape.width + first, noise);
#pragma unroll
        for (int i = 0; i < size; ++i) {
          noise[i] = real ? noise[i] * scale : 0.0f;
          values[i] += noise[i];
        }
        out.write(first, shape.width, values);
        if (noise_out != nullptr) Floats<size>::write(noise_out, first, shape.width, noise);
      }
    }
  }
}

template <class T, Noise KIND>
cudaError_t run(const Perturb& args, cudaStream_t stream) {
  const int64_t chunks = chunks_of(args.shape, Chunk<T>::size);
  const dim3 block = block_of(ceil_div(chunks, PER_THREAD), THREADS);
  return launch(perturb_kernel<T, KIND>, Config{tiles_grid(args.shape, block, chunks, PER_THREAD), block}, stream, args);
}

}  // namespace

cudaError_t perturb(const Perturb& given, cudaStream_t stream) {
  Perturb args = given;
  if (args.shape.rows * args.shape.width == 0) return cudaSuccess;
  const bool flat = args.shape.size1 == 1 && args.shape.size2 == 1 && args.embed.column == 1 &&
                    (args.embed.stride0 == args.shape.width || args.shape.rows == 1);
  if (flat && args.mask == nullptr && args.unit == nullptr) {  // one long row: only the element index counts
    args.shape = {1, args.shape.rows * args.shape.width, 1, 1};
    args.embed.stride0 = 0;
  }
  return with_noise(
      args.kind,
      [&](auto kind) {
        constexpr Noise KIND = decltype(kind)::value;
        if (!aligned(args.shape, args.embed, chunk_size(args.embed.dtype))) return run<Any<4>, KIND>(args, stream);
        return with_type(args.embed.dtype,
                         [&](auto tag) { return run<typename decltype(tag)::type, KIND>(args, stream); });
      },
      unknown_choice);
}

}  // namespace cuda
}  // namespace smart_fast
