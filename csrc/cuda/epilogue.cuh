// The epilogue: y = act(sum + bias), rounded once from fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "base/host_device.h"
#include "cuda/ptx/sm80.cuh"
#include "plan/problem.h"

namespace flash_llm {

template <ValueType kType>
__device__ __forceinline__ float element_to_float(uint16_t raw) {
  if constexpr (kType == ValueType::kFloat16) {
    return __half2float(__ushort_as_half(raw));
  } else {
    return __bfloat162float(__ushort_as_bfloat16(raw));
  }
}

template <ValueType kType>
__device__ __forceinline__ uint16_t element_from_float(float value) {
  if constexpr (kType == ValueType::kFloat16) {
    return __half_as_ushort(__float2half_rn(value));
  } else {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
}

// For the host too, because only the host compiler refuses a switch that lacks an enumerator.
FLASH_LLM_HOST_DEVICE __forceinline__ float activate(float value, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return value;
    case Activation::kRelu:
      return value < 0.0F ? 0.0F : value;  // NaN stays NaN, as in torch
    case Activation::kGelu:
      return value * 0.5F * (1.0F + erff(value * 0.70710678118654752F));
    case Activation::kSilu:
      return value / (1.0F + expf(-value));
  }
  return value;  // never: the switch is exhaustive
}

// Turns the fp32 sums of one SpMM into Y.
struct Epilogue {
  const uint16_t* bias;  // [m] or null
  uint16_t* y;           // [n, m]
  int64_t m;
  int64_t n;
  Activation activation;

  // Stores y[token, row], which must lie within the matrix.
  template <ValueType kType>
  __device__ __forceinline__ void store_one(int64_t token, int64_t row, float sum) const {
    const float b = bias ? element_to_float<kType>(bias[row]) : 0.0F;
    y[token * m + row] = element_from_float<kType>(activate(sum + b, activation));
  }

  // Stores a thread's four sums of an m16n8 accumulator: rows `row` and `row` + 8 of tokens `token`
  // and `token` + 1. Rows and tokens outside the matrix are dropped.
  template <ValueType kType>
  __device__ __forceinline__ void store_fragment(int64_t token, int64_t row, float4 sums) const {
    const float sum[4] = {sums.x, sums.y, sums.z, sums.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t r = row + i / 2 * 8, t = token + i % 2;
      if (t >= n || r >= m) continue;
      store_one<kType>(t, r, sum[i]);
    }
  }

  // Stores round(sum + bias), or that of the activation if kActivates, for a thread's sums of an
  // m16nN accumulator: rows `row` and `row` + 8, tokens `token`, `token` + 1 and so on in steps of
  // 8.
  template <ValueType kType, int kTileN, bool kActivates = false>
  __device__ __forceinline__ void store_rows(int64_t token, int64_t row,
                                             const float (&sums)[kTileN / 2]) const {
    float b[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      b[i] = bias && row + i * 8 < m ? element_to_float<kType>(bias[row + i * 8]) : 0.0F;
    }
    uint16_t* out = y + token * m + row;
#pragma unroll
    for (int block = 0; block < kTileN / 8; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (token + block * 8 + i % 2 < n && row + i / 2 * 8 < m) {
          float sum = sums[block * 4 + i] + b[i / 2];
          if constexpr (kActivates) sum = activate(sum, activation);
          out[(block * 8 + i % 2) * m + i / 2 * 8] = element_from_float<kType>(sum);
        }
      }
    }
  }

  // The same for a warp's sums of the 16 rows from `first_row` on and the tokens from `first_token`
  // on, whose lanes must all call it. It stores two rows of a token at a time where it can.
  template <ValueType kType, int kTileN, bool kActivates>
  __device__ __forceinline__ void store_strip(int64_t first_token, int64_t first_row, int lane,
                                              const float (&sums)[kTileN / 2]) const {
    if (m % 2 != 0 || first_row + 16 > m) {
      store_rows<kType, kTileN, kActivates>(first_token + lane % 4 * 2, first_row + lane / 4, sums);
      return;
    }
    float b[2] = {};
#pragma unroll
    for (int i = 0; bias != nullptr && i < 2; ++i) {
      b[i] = element_to_float<kType>(bias[first_row + lane / 4 + i * 8]);
    }
    // Of an 8x8 block a lane has a row and two tokens, and then a token and two rows.
    const int64_t token = first_token + lane / 4;
    uint16_t* out = y + token * m + first_row + lane % 4 * 2;
#pragma unroll
    for (int block = 0; block < kTileN / 8; ++block) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint16_t pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float sum = sums[block * 4 + i * 2 + e] + b[i];
          if constexpr (kActivates) sum = activate(sum, activation);
          pair[e] = element_from_float<kType>(sum);
        }
        const uint32_t rows = ptx::transpose_8x8(pair[0] | uint32_t{pair[1]} << 16);
        if (token + block * 8 < n) {
          *reinterpret_cast<uint32_t*>(out + block * 8 * m + i * 8) = rows;
        }
      }
    }
  }

  // Stores y[token, row .. row + 3], with bias and activation as store_fragment does.
  template <ValueType kType>
  __device__ __forceinline__ void store(int64_t token, int64_t row, float4 sums) const {
    if (token >= n || row >= m) return;
    uint16_t* out = y + token * m + row;
    const float sum[4] = {sums.x, sums.y, sums.z, sums.w};
    uint16_t result[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float b = bias && row + i < m ? element_to_float<kType>(bias[row + i]) : 0.0F;
      result[i] = element_from_float<kType>(activate(sum[i] + b, activation));
    }
    if (m % 4 == 0) {  // y is 8-byte aligned, so the four rows are one 8-byte store
      *reinterpret_cast<ushort4*>(out) = make_ushort4(result[0], result[1], result[2], result[3]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (row + i < m) out[i] = result[i];
      }
    }
  }
};

}  // namespace flash_llm
