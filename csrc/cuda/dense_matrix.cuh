// A dense row-major matrix of 16-bit values, as the packers and the pruning kernels read it.
#pragma once

#include <cstdint>

#include "format/packed_format.h"

namespace flash_llm {

struct DenseMatrix {
  const uint16_t* data;
  int64_t ld;  // elements between rows
  int64_t m, k;

  __device__ const uint16_t* row(int64_t r) const { return data + r * ld; }
};

inline DenseMatrix dense_matrix(const ValueMatrix& matrix) {
  return {static_cast<const uint16_t*>(matrix.values), matrix.ld, matrix.m, matrix.k};
}

// The sum of `count` over the CTA's threads. All threads must call it, and only once per kernel.
__device__ __forceinline__ int cta_sum(int count) {
  __shared__ int sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, count);
  __syncthreads();
  return sum;
}

}  // namespace flash_llm
