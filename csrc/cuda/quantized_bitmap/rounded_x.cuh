// How X is rounded, with a scale for each token: the largest magnitude of a token becomes the
// largest number of the type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "cuda/epilogue.cuh"
#include "cuda/quantized_bitmap/decode.cuh"
#include "plan/problem.h"

namespace flash_llm {

// The larger magnitudes of two pairs of elements; NaN is the largest. `largest` has no signs.
template <ValueType kDense>
__device__ __forceinline__ uint32_t larger_magnitudes(uint32_t largest, uint32_t pair) {
  using Pair = std::conditional_t<kDense == ValueType::kFloat16, __half2, __nv_bfloat162>;
  const Pair larger = __hmax2_nan(__habs2(reinterpret_cast<const Pair&>(pair)),
                                  reinterpret_cast<const Pair&>(largest));
  return reinterpret_cast<const uint32_t&>(larger);
}
template <ValueType kDense>
__device__ __forceinline__ uint32_t larger_magnitudes(uint32_t largest, uint4 pairs) {
  largest = larger_magnitudes<kDense>(largest, pairs.x);
  largest = larger_magnitudes<kDense>(largest, pairs.y);
  largest = larger_magnitudes<kDense>(largest, pairs.z);
  return larger_magnitudes<kDense>(largest, pairs.w);
}

// The scale of a token, and its inverse. The scale of a token that is not finite is NaN, and so is
// its row of Y.
struct TokenScale {
  float scale, inverse;

  template <XValues kX, ValueType kDense>
  __device__ __forceinline__ static TokenScale of(uint32_t magnitude) {
    static_assert(kX != XValues::kUnrounded);
    constexpr float kLargest = kX == XValues::kInt8 ? 127.0F : 448.0F;
    constexpr uint32_t kInfinity = kDense == ValueType::kFloat16 ? 0x7C00 : 0x7F80;
    // The bound keeps the inverse finite; all elements of a token below it become 0.
    const float largest =
        fmaxf(element_to_float<kDense>(static_cast<uint16_t>(magnitude)), 0x1p-100F);
    return {magnitude < kInfinity ? largest / kLargest : __uint_as_float(0x7FFFFFFF),
            kLargest / largest};
  }
};

// The scale of a token whose elements the threads of the CTA share: `pairs` are the larger
// magnitudes of those of this thread. All threads must call it, once.
template <XValues kX, ValueType kDense>
__device__ __forceinline__ TokenScale scale_of_token(uint32_t pairs) {
  __shared__ uint32_t magnitude;
  if (threadIdx.x == 0) magnitude = 0;
  __syncthreads();
  const uint32_t largest = __reduce_max_sync(~0U, max(pairs >> 16, pairs & 0xFFFFU));
  if (threadIdx.x % 32 == 0) atomicMax(&magnitude, largest);
  __syncthreads();
  return TokenScale::of<kX, kDense>(magnitude);
}

// The sum over all threads of the CTA, which must all call it, once.
__device__ __forceinline__ int add_threads(int sum) {
  __shared__ int total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  sum = __reduce_add_sync(~0U, sum);
  if (threadIdx.x % 32 == 0) atomicAdd(&total, sum);
  __syncthreads();
  return total;
}

// Rounds four elements to four bytes, ties to even.
template <XValues kX, ValueType kDense>
__device__ __forceinline__ uint32_t round_elements(uint2 four, float inverse) {
  const auto value = [&](int e) {
    const uint32_t pair = e < 2 ? four.x : four.y;
    return element_to_float<kDense>(static_cast<uint16_t>(pair >> e % 2 * 16));
  };
  if constexpr (kX == XValues::kInt8) {
    // The units of 1.5 * 2^23 are 1, so the low byte of the sum is the integer.
    const auto rounded = [&](int e) {
      return __float_as_uint(__fmaf_rn(value(e), inverse, 12582912.0F));
    };
    const uint32_t low = permute_bytes(rounded(0), rounded(1), 0x0040U);
    return permute_bytes(low, permute_bytes(rounded(2), rounded(3), 0x0040U), 0x5410U);
  } else {
    const auto rounded = [&](int e) -> uint32_t {
      return __nv_cvt_float2_to_fp8x2(make_float2(value(e) * inverse, value(e + 1) * inverse),
                                      __NV_SATFINITE, __NV_E4M3);
    };
    return rounded(0) | rounded(2) << 16;
  }
}

// The sum of four signed bytes, and `sum`.
__device__ __forceinline__ int add_bytes(uint32_t four, int sum) {
  return __dp4a(static_cast<int>(four), 0x01010101, sum);
}

}  // namespace flash_llm
