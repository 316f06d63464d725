// Unpacks the quantised bitmap format on the GPU and counts its values.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/epilogue.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/sm80.cuh"
#include "cuda/quantized_bitmap/decode.cuh"
#include "cuda/quantized_bitmap/pack.h"
#include "format/quantized_bitmap.h"
#include "plan/quantized_bitmap.h"

namespace flash_llm {
namespace {

constexpr int kWarps = 4;

// The kernels are for int8 values, whose types have the same chunks.
constexpr ValueType kInt8 = ValueType::kInt8Float16;
constexpr int kScaleUnits = static_cast<int>(quant_scale_units(kInt8, 1));

// A chunk in global memory. Malformed offsets give a chunk without values.
struct StoredChunk {
  const uint32_t* words = nullptr;
  int rows = 0;

  __device__ __forceinline__ StoredChunk(const PackedView& view, int64_t strip, int64_t col) {
    const int64_t chunks = num_quant_chunks(kInt8, view.k);
    const int32_t* offsets = view.offsets + strip * chunks + col;
    const int64_t begin = int64_t{offsets[0]} + (col == 0 ? kScaleUnits : 0), end = offsets[1];
    if (offsets[0] < 0 || end <= begin || end * kQuantUnitWords > view.payload_words) return;
    words = view.payload + begin * kQuantUnitWords;
    rows = max(quant_value_rows(kInt8, end - begin), 0);
  }
};

// The four bytes of neighbouring elements of a row, dequantised.
template <ValueType kType>
__device__ __forceinline__ uint2 dequantize(uint32_t bytes, float scale) {
  uint16_t elements[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int value = static_cast<int>(bytes >> (8 * e) & 0xFF) - kQuantZero;
    elements[e] = element_from_float<QuantValues<kType>::kDense>(static_cast<float>(value) * scale);
  }
  return make_uint2(elements[0] | elements[1] << 16, elements[2] | elements[3] << 16);
}

// Stores four elements of a row of dense[m, k] from column `col` on.
__device__ __forceinline__ void store_elements(uint16_t* dense, int64_t row, int64_t col, int64_t m,
                                               int64_t k, uint2 elements) {
  if (row >= m || col >= k) return;
  uint16_t* out = dense + row * k + col;
  if (k % 4 == 0) {
    *reinterpret_cast<uint2*>(out) = elements;
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const uint32_t pair = e < 2 ? elements.x : elements.y;
    if (col + e < k) out[e] = static_cast<uint16_t>(pair >> e % 2 * 16);
  }
}

template <ValueType kType, int kFragment, bool kUp>
__device__ __forceinline__ void unpack_fragment(uint32_t word, RunReader<kUp>& run,
                                                const RunSteps& steps, const float (&scales)[2],
                                                int64_t row, int64_t col, const PackedView& view,
                                                uint16_t* dense) {
  uint32_t low, high;
  run.template take<kFragment>(word, steps, QuantValues<kType>::kZero, low, high);
  store_elements(dense, row, col + 16 * kFragment, view.m, view.k,
                 dequantize<kType>(low, scales[0]));
  store_elements(dense, row + 8, col + 16 * kFragment, view.m, view.k,
                 dequantize<kType>(high, scales[1]));
}

// Each warp unpacks one chunk.
template <ValueType kType>
__global__ void __launch_bounds__(kWarps * 32)
    unpack_kernel(const __grid_constant__ PackedView view, const __grid_constant__ RunSteps steps,
                  uint16_t* dense) {
  __shared__ __align__(128) uint8_t stages[kQuantGuardBytes + kWarps * kQuantMaxChunkBytes];
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int64_t chunks = num_quant_chunks(kInt8, view.k),
                index = int64_t{blockIdx.x} * kWarps + warp;
  if (index >= num_quant_strips(view.m) * chunks) return;
  const int64_t strip = index / chunks, chunk = index % chunks;
  const StoredChunk stored(view, strip, chunk);
  uint8_t* stage = stages + kQuantGuardBytes + warp * kQuantMaxChunkBytes;
  // A chunk without values has no bits either.
  const int vectors = (stored.rows * kQuantRowBytes + kQuantBitsBytes + kQuantColumnsBytes) / 16;
  for (int i = lane; i < vectors; i += 32) {
    reinterpret_cast<uint4*>(stage)[i] =
        stored.rows > 0 ? reinterpret_cast<const uint4*>(stored.words)[i] : make_uint4(0, 0, 0, 0);
  }
  __syncwarp();
  const int64_t row = strip * kQuantStripM + lane / 4, begin = view.offsets[strip * chunks];
  float scales[2] = {1.0F, 1.0F};
  if (stored.rows > 0 && begin >= 0 &&
      (begin + kScaleUnits) * kQuantUnitWords <= view.payload_words) {
    const uint32_t* words = view.payload + begin * kQuantUnitWords + lane / 4;
    scales[0] = __uint_as_float(words[0]);
    scales[1] = __uint_as_float(words[8]);
  }
  const uint32_t address = ptx::smem_address(stage);
  const uint32_t top = address + stored.rows * kQuantRowBytes;
  const QuantChunk parts(top, lane);
  RunReader<true> up(address, lane * 4);
  RunReader<false> down(top, parts.column);
#pragma unroll
  for (int q = 0; q < kQuantWords; ++q) {
    const int64_t col = chunk * quant_chunk_k(kInt8) + quant_col(q, 0, lane, 0);
    const auto unpack = [&](auto& run) {
      unpack_fragment<kType, 0>(parts.bits[q], run, steps, scales, row, col, view, dense);
      unpack_fragment<kType, 1>(parts.bits[q], run, steps, scales, row, col, view, dense);
      unpack_fragment<kType, 2>(parts.bits[q], run, steps, scales, row, col, view, dense);
      unpack_fragment<kType, 3>(parts.bits[q], run, steps, scales, row, col, view, dense);
    };
    if (q < kQuantWords / 2) {
      unpack(up);
    } else {
      unpack(down);
    }
  }
}

__global__ void __launch_bounds__(kWarps * 32)
    count_stored_kernel(const __grid_constant__ PackedView view, int64_t* total) {
  const int64_t chunks = num_quant_chunks(kInt8, view.k);
  const int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (index >= num_quant_strips(view.m) * chunks) return;
  const StoredChunk stored(view, index / chunks, index % chunks);
  int count = 0;
  if (stored.rows > 0) {
    const uint32_t* bits = stored.words + stored.rows * kQuantRowBytes / 4;
    for (int q = 0; q < kQuantWords; ++q) count += __popc(bits[q * 32 + threadIdx.x % 32]);
  }
  count = __reduce_add_sync(~0U, count);
  if (threadIdx.x % 32 == 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(total), static_cast<unsigned long long>(count));
  }
}

int64_t num_ctas(const PackedView& view) {
  return (num_quant_strips(view.m) * num_quant_chunks(kInt8, view.k) + kWarps - 1) / kWarps;
}

Status unpack(const PackedView& view, uint16_t* dense, cudaStream_t stream) {
  const int64_t ctas = num_ctas(view);
  if (ctas == 0) return Status::success();
  void (*kernel)(PackedView, RunSteps, uint16_t*) = view.value_type == ValueType::kInt8Float16
                                                        ? unpack_kernel<ValueType::kInt8Float16>
                                                        : unpack_kernel<ValueType::kInt8Bfloat16>;
  kernel<<<static_cast<unsigned>(ctas), kWarps * 32, 0, stream>>>(view, RunSteps{}, dense);
  return cuda::check(cudaGetLastError(), "quantized bitmap unpack_kernel launch");
}

Status count_stored(const PackedView& view, int64_t* total, cudaStream_t stream) {
  const int64_t ctas = num_ctas(view);
  if (ctas == 0) return Status::success();
  count_stored_kernel<<<static_cast<unsigned>(ctas), kWarps * 32, 0, stream>>>(view, total);
  return cuda::check(cudaGetLastError(), "quantized bitmap count_stored_kernel launch");
}

}  // namespace

cuda::PackKernels cuda::quantized_bitmap_kernels() {
  return {count_quantized_bitmap, pack_quantized_bitmap, unpack, count_stored};
}

}  // namespace flash_llm
