// Unpacks the quantised bitmap format on the GPU and counts its values.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>

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

// A chunk in global memory. Malformed offsets give a chunk without values.
struct StoredChunk {
  const uint32_t* words = nullptr;
  int rows = 0;

  __device__ __forceinline__ StoredChunk(const PackedView& view, ValueType type, int64_t strip,
                                         int64_t col) {
    const int64_t chunks = num_quant_chunks(type, view.k);
    const int32_t* offsets = view.offsets + strip * chunks + col;
    const int64_t begin = offsets[0] + (col == 0 ? quant_scale_units(type, view.k) : 0),
                  end = offsets[1];
    if (offsets[0] < 0 || end <= begin || end * kQuantUnitWords > view.payload_words) return;
    words = view.payload + begin * kQuantUnitWords;
    rows = max(quant_value_rows(type, end - begin), 0);
  }
};

// The scale of an element of a strip whose bytes begin at unit `begin`; 1 if it lies outside the
// matrix or the payload.
template <ValueType kType>
__device__ __forceinline__ float scale_of(const PackedView& view, int64_t begin, int row,
                                          int64_t col) {
  if (begin < 0 || col >= view.k ||
      (begin + quant_scale_units(kType, view.k)) * kQuantUnitWords > view.payload_words) {
    return 1.0F;
  }
  const uint32_t* scales = view.payload + begin * kQuantUnitWords;
  const int64_t index = scale_group(kType, col) * kQuantStripM + row;
  if constexpr (scale_bytes(kType) == 2) {
    return __half2float(__ushort_as_half(reinterpret_cast<const uint16_t*>(scales)[index]));
  } else {
    return __uint_as_float(scales[index]);
  }
}

// The four bytes of neighbouring elements of a row, dequantised.
template <ValueType kType>
__device__ __forceinline__ uint2 dequantize(uint32_t bytes, float scale) {
  using Values = QuantValues<kType>;
  const uint32_t pairs[2] = {Values::template widen<0>(bytes), Values::template widen<1>(bytes)};
  uint16_t elements[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const auto wide = static_cast<uint16_t>(pairs[e / 2] >> e % 2 * 16);
    const float value = element_to_float<Values::kDense>(wide) * Values::kUnit;
    elements[e] = element_from_float<Values::kDense>(value * scale);
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

// Transposes four words of four neighbouring lanes: word i becomes word lane % 4 of the i-th lane.
__device__ __forceinline__ void transpose_4x4(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & step) != 0) continue;
      const bool upper = (lane & step) != 0;
      const uint32_t got = __shfl_xor_sync(~0U, upper ? words[i] : words[i + step], step);
      (upper ? words[i] : words[i + step]) = got;
    }
  }
}

// Stores a row's elements of the fragments of a word of bits, whose first column is `col`: of
// dense[m, k] dequantised, and of values[m, k], where 16 divides k, as they are stored.
template <ValueType kType>
__device__ __forceinline__ void store_word(uint16_t* dense, int64_t row, int64_t col,
                                           const PackedView& view, int lane,
                                           const uint32_t (&fragments)[kQuantFragments],
                                           float scale) {
#pragma unroll
  for (int j = 0; j < kQuantFragments; ++j) {
    store_elements(dense, row, col + quant_col(0, j, lane, 0), view.m, view.k,
                   dequantize<kType>(fragments[j], scale));
  }
}
template <ValueType kType>
__device__ __forceinline__ void store_word(uint8_t* values, int64_t row, int64_t col,
                                           const PackedView& view, int lane,
                                           const uint32_t (&fragments)[kQuantFragments],
                                           float /*scale*/) {
  uint32_t words[4] = {fragments[0], fragments[1], fragments[2], fragments[3]};
  transpose_4x4(words, lane);
  col += quant_col(0, lane % 4, 0, 0);
  if (row >= view.m || col >= view.k) return;
  *reinterpret_cast<uint4*>(values + row * view.k + col) =
      make_uint4(words[0], words[1], words[2], words[3]);
}

// Unpacks a run, two words of a plane whose first column is `col`; `begin` as in scale_of.
template <ValueType kType, int kFirstWord, typename Run, typename Element>
__device__ __forceinline__ void unpack_run(const uint32_t (&bits)[kQuantWords], Run run,
                                           const RunSteps& steps, const PackedView& view,
                                           int64_t begin, int64_t row0, int64_t col, int lane,
                                           Element* out) {
  const int64_t first = col + quant_col(kFirstWord, 0, lane, 0);
  const float scales[2] = {scale_of<kType>(view, begin, lane / 4, first),
                           scale_of<kType>(view, begin, lane / 4 + 8, first)};
#pragma unroll
  for (int q = kFirstWord; q < kFirstWord + kQuantWords / 2; ++q) {
    using Bytes = typename QuantValues<kType>::Bytes;
    uint32_t low[kQuantFragments], high[kQuantFragments];
    run.template take<0, Bytes>(bits[q], steps, low[0], high[0]);
    run.template take<1, Bytes>(bits[q], steps, low[1], high[1]);
    run.template take<2, Bytes>(bits[q], steps, low[2], high[2]);
    run.template take<3, Bytes>(bits[q], steps, low[3], high[3]);
    const int64_t row = row0 + lane / 4, word_col = col + quant_col(q, 0, 0, 0);
    store_word<kType>(out, row, word_col, view, lane, low, scales[0]);
    store_word<kType>(out, row + 8, word_col, view, lane, high, scales[1]);
  }
}

// `values` and `top` are the addresses of the values and of what lies above them.
template <ValueType kType, int kPlane, typename Element>
__device__ __forceinline__ void unpack_plane(uint32_t values, uint32_t top, const RunSteps& steps,
                                             const PackedView& view, int64_t begin, int64_t row0,
                                             int64_t chunk_col, int lane, Element* out) {
  constexpr int kPlanes = quant_planes(kType);
  constexpr int kFirstBit = QuantValues<kType>::Bytes::first_bit(kPlane);
  const QuantPlane<kPlanes> parts(top, kPlane, lane);
  const int64_t col = chunk_col + kPlane * kQuantPlaneK;
  unpack_run<kType, 0>(parts.bits, RunReader<true>(values, lane * 4, kFirstBit), steps, view, begin,
                       row0, col, lane, out);
  unpack_run<kType, 2>(parts.bits, RunReader<false>(top, parts.column, kFirstBit), steps, view,
                       begin, row0, col, lane, out);
}

// Each warp unpacks one chunk, and the first of a strip writes the scale of each row if
// `row_scales` is not null.
template <ValueType kType, typename Element>
__global__ void __launch_bounds__(kWarps * 32)
    unpack_kernel(const __grid_constant__ PackedView view, const __grid_constant__ RunSteps steps,
                  Element* out, float* row_scales) {
  constexpr int kStageBytes = quant_max_chunk_bytes(kType);
  __shared__ __align__(128) uint8_t stages[kQuantGuardBytes + kWarps * kStageBytes];
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int64_t chunks = num_quant_chunks(kType, view.k),
                index = int64_t{blockIdx.x} * kWarps + warp;
  if (index >= num_quant_strips(view.m) * chunks) return;
  const int64_t strip = index / chunks, chunk = index % chunks;
  const StoredChunk stored(view, kType, strip, chunk);
  uint8_t* stage = stages + kQuantGuardBytes + warp * kStageBytes;
  // A chunk without values has no bits either.
  const int vectors =
      (stored.rows * kQuantRowBytes + quant_fixed_units(kType) * kQuantUnitBytes) / 16;
  for (int i = lane; i < vectors; i += 32) {
    reinterpret_cast<uint4*>(stage)[i] =
        stored.rows > 0 ? reinterpret_cast<const uint4*>(stored.words)[i] : make_uint4(0, 0, 0, 0);
  }
  __syncwarp();
  const int64_t row0 = strip * kQuantStripM, col = chunk * quant_chunk_k(kType);
  const int64_t begin = stored.rows > 0 ? view.offsets[strip * chunks] : -1;
  const uint32_t values = ptx::smem_address(stage), top = values + stored.rows * kQuantRowBytes;
  unpack_plane<kType, 0>(values, top, steps, view, begin, row0, col, lane, out);
  if constexpr (quant_planes(kType) == 2) {
    unpack_plane<kType, 1>(values, top, steps, view, begin, row0, col, lane, out);
  }
  if (row_scales != nullptr && chunk == 0 && lane < kQuantStripM && row0 + lane < view.m) {
    const int32_t* offsets = view.offsets + strip * chunks;  // without bytes it has no scales
    row_scales[row0 + lane] =
        scale_of<kType>(view, offsets[chunks] > offsets[0] ? offsets[0] : -1, lane, 0);
  }
}

__global__ void __launch_bounds__(kWarps * 32)
    count_stored_kernel(const __grid_constant__ PackedView view, int64_t* total) {
  const ValueType type = view.value_type;
  const int64_t chunks = num_quant_chunks(type, view.k);
  const int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (index >= num_quant_strips(view.m) * chunks) return;
  const StoredChunk stored(view, type, index / chunks, index % chunks);
  int count = 0;
  if (stored.rows > 0) {
    const uint32_t* bits = stored.words + stored.rows * kQuantRowBytes / 4;
    for (int q = 0; q < quant_planes(type) * kQuantWords; ++q) {
      count += __popc(bits[q * 32 + threadIdx.x % 32]);
    }
  }
  count = __reduce_add_sync(~0U, count);
  if (threadIdx.x % 32 == 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(total), static_cast<unsigned long long>(count));
  }
}

int64_t num_ctas(const PackedView& view) {
  const int64_t chunks = num_quant_strips(view.m) * num_quant_chunks(view.value_type, view.k);
  return (chunks + kWarps - 1) / kWarps;
}

Status unpack(const PackedView& view, uint16_t* dense, cudaStream_t stream) {
  const int64_t ctas = num_ctas(view);
  if (ctas == 0) return Status::success();
  return run_for_type(view.value_type, [&](auto type) {
    unpack_kernel<decltype(type)::value>
        <<<static_cast<unsigned>(ctas), kWarps * 32, 0, stream>>>(view, RunSteps{}, dense, nullptr);
    return cuda::check(cudaGetLastError(), "quantized bitmap unpack_kernel launch");
  });
}

Status count_stored(const PackedView& view, int64_t* total, cudaStream_t stream) {
  const int64_t ctas = num_ctas(view);
  if (ctas == 0) return Status::success();
  count_stored_kernel<<<static_cast<unsigned>(ctas), kWarps * 32, 0, stream>>>(view, total);
  return cuda::check(cudaGetLastError(), "quantized bitmap count_stored_kernel launch");
}

}  // namespace

Status cuda::unpack_fp8(const PackedView& view, uint8_t* values, float* scales,
                        cudaStream_t stream) {
  if (value_traits(view.value_type).kind != ValueKind::kFp8E4m3) {
    return Status::invalid_type("unpack_fp8 takes fp8 values");
  }
  if (view.k % 16 != 0) {
    return Status::invalid_value("unpack_fp8 takes K that is a multiple of 16, got " +
                                 std::to_string(view.k));
  }
  const int64_t ctas = num_ctas(view);
  if (ctas == 0) return Status::success();
  // The type of X does not matter here.
  unpack_kernel<ValueType::kFp8Float16>
      <<<static_cast<unsigned>(ctas), kWarps * 32, 0, stream>>>(view, RunSteps{}, values, scales);
  return check(cudaGetLastError(), "quantized bitmap unpack_kernel launch");
}

cuda::PackKernels cuda::quantized_bitmap_kernels() {
  return {count_quantized_bitmap, pack_quantized_bitmap, unpack, count_stored};
}

}  // namespace flash_llm
