// Rounds X to e4m3, as a dense FP8 product takes it: the values, and the scale of each token.
#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "cuda/launch.h"
#include "cuda/quantized_bitmap/rounded_x.cuh"

namespace flash_llm {
namespace {

constexpr int kThreads = 256;

// Each CTA rounds a token. Its columns are a multiple of 8.
template <ValueType kDense>
__global__ void __launch_bounds__(kThreads)
    round_fp8_kernel(const uint16_t* x, int64_t x_stride, int k, uint8_t* values, float* scales) {
  const auto* row = reinterpret_cast<const uint4*>(x + int64_t{blockIdx.x} * x_stride);
  auto* out = reinterpret_cast<uint2*>(values + int64_t{blockIdx.x} * k);
  uint32_t pairs = 0;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < k / 8; i += kThreads) {
    pairs = larger_magnitudes<kDense>(pairs, row[i]);
  }
  const TokenScale scale = scale_of_token<XValues::kFp8E4m3, kDense>(pairs);
  const auto rounded = [&](uint32_t low, uint32_t high) {
    return round_elements<XValues::kFp8E4m3, kDense>(make_uint2(low, high), scale.inverse);
  };
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < k / 8; i += kThreads) {
    const uint4 eight = row[i];
    out[i] = make_uint2(rounded(eight.x, eight.y), rounded(eight.z, eight.w));
  }
  if (threadIdx.x == 0) scales[blockIdx.x] = scale.scale;
}

}  // namespace

Status cuda::round_fp8(ValueType type, const uint16_t* x, int64_t x_stride, int64_t n, int64_t k,
                       uint8_t* values, float* scales, cudaStream_t stream) {
  const ValueType dense = value_traits(type).dense;
  if (k % 8 != 0 || k > INT32_MAX || n > INT32_MAX) {
    return Status::invalid_value("round_fp8 takes K of 31 bits that is a multiple of 8, got " +
                                 std::to_string(k));
  }
  auto* kernel = round_fp8_kernel<ValueType::kFloat16>;
  if (dense == ValueType::kBfloat16) kernel = round_fp8_kernel<ValueType::kBfloat16>;
  kernel<<<static_cast<unsigned>(n), kThreads, 0, stream>>>(x, x_stride, static_cast<int>(k),
                                                            values, scales);
  return check(cudaGetLastError(), "round_fp8_kernel launch");
}

}  // namespace flash_llm
