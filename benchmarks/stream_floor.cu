// The floor: a plain streaming read of a buffer, 16 bytes per load, eight loads in flight per
// thread. No kernel that must read these bytes from memory can be faster. stream_floor.py compiles
// and calls it.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 8;

__global__ void __launch_bounds__(kThreads)
    stream_read_kernel(const uint4* __restrict__ data, int64_t num_vectors, uint32_t* sink) {
  uint32_t sum = 0;
  const int64_t block_vectors = kThreads * kUnroll;
  int64_t first = blockIdx.x * block_vectors + threadIdx.x;
  for (; first - threadIdx.x + block_vectors <= num_vectors; first += gridDim.x * block_vectors) {
    uint4 vectors[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) vectors[i] = __ldcs(data + first + i * kThreads);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      sum ^= vectors[i].x ^ vectors[i].y ^ vectors[i].z ^ vectors[i].w;
    }
  }
  for (int64_t i = first; i < num_vectors && i < first + block_vectors; i += kThreads) {
    const uint4 vector = __ldcs(data + i);
    sum ^= vector.x ^ vector.y ^ vector.z ^ vector.w;
  }
  // Keeps the compiler from removing the loads. The store almost never runs, and nobody reads it.
  if (sum == 0x9E3779B9U) *sink = sum;
}

}  // namespace

// data: 16-byte aligned; num_bytes: a multiple of 16. Returns a cudaError_t.
extern "C" int stream_read(const void* data, int64_t num_bytes, void* sink, int num_blocks,
                           void* stream) {
  stream_read_kernel<<<num_blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint4*>(data), num_bytes / 16, static_cast<uint32_t*>(sink));
  return static_cast<int>(cudaGetLastError());
}
