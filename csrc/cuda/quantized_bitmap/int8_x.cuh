// How X is rounded to int8, with a scale for each token: the largest magnitude of a token becomes
// 127.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/epilogue.cuh"
#include "cuda/quantized_bitmap/decode.cuh"

namespace flash_llm {

// The larger magnitudes of two pairs of elements; NaN is the largest. `largest` has no signs.
template <ValueType kDense>
__device__ __forceinline__ uint32_t larger_magnitudes(uint32_t largest, uint32_t pair) {
  using Pair = std::conditional_t<kDense == ValueType::kFloat16, __half2, __nv_bfloat162>;
  const Pair larger = __hmax2_nan(__habs2(reinterpret_cast<const Pair&>(pair)),
                                  reinterpret_cast<const Pair&>(largest));
  return reinterpret_cast<const uint32_t&>(larger);
}

// The scale of a token, and its inverse: the largest magnitude divided by 127. The scale of a token
// that is not finite is NaN, and so is its row of Y.
struct TokenScale {
  float scale, inverse;

  template <ValueType kDense>
  __device__ __forceinline__ static TokenScale of(uint32_t magnitude) {
    constexpr uint32_t kInfinity = kDense == ValueType::kFloat16 ? 0x7C00 : 0x7F80;
    // The bound keeps the inverse finite; all elements of a token below it become 0.
    const float largest =
        fmaxf(element_to_float<kDense>(static_cast<uint16_t>(magnitude)), 0x1p-100F);
    return {magnitude < kInfinity ? largest / 127.0F : __uint_as_float(0x7FFFFFFF),
            127.0F / largest};
  }
};

// Rounds four elements to int8, ties to even.
template <ValueType kDense>
__device__ __forceinline__ uint32_t quantize(uint2 four, float inverse) {
  uint32_t rounded[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const uint32_t pair = e < 2 ? four.x : four.y;
    const float value = element_to_float<kDense>(static_cast<uint16_t>(pair >> e % 2 * 16));
    // The units of 1.5 * 2^23 are 1, so the low byte of the sum is the integer.
    rounded[e] = __float_as_uint(__fmaf_rn(value, inverse, 12582912.0F));
  }
  const uint32_t low = permute_bytes(rounded[0], rounded[1], 0x0040U);
  return permute_bytes(low, permute_bytes(rounded[2], rounded[3], 0x0040U), 0x5410U);
}

}  // namespace flash_llm
