// The parts and the residual of a 2:4 chunk (format/bitmap.h). The residual is for mma.sync: a step
// holds up to one element of each of 16 rows. It is multiplied by mma.m16n8k16 with a diagonal A:
// A[j][j] is the element of row j, and row j of B is the column of X that this element multiplies.
// X is transposed first, so that a column of eight tokens is one row of ldmatrix.
#pragma once

#include <cstdint>

#include "cuda/bitmap/decode.cuh"
#include "cuda/ptx/sm80.cuh"
#include "format/bitmap.h"

namespace flash_llm {

// The parts of a 2:4 chunk: shared-memory addresses and counts. The counts come from the chunk
// itself and are clamped by its size, so that even a malformed chunk leads to no address beyond the
// guard after the rings.
struct TwoFourParts {
  uint32_t bits, values, residual;
  uint32_t down_offsets;  // where this lane's downward runs begin, one byte per strip
  int steps[2];           // of the residual, by strip

  // All lanes of a warp must call it. `units` is the chunk's size.
  __device__ __forceinline__ TwoFourParts(uint32_t smem_chunk, int units, int lane) {
    bits = smem_chunk;
    asm volatile("ld.shared.u16 %0, [%1];"
                 : "=r"(down_offsets)
                 : "r"(smem_chunk + kTwoFourBitsBytes + lane * 2));
    const uint32_t counts = __ballot_sync(~0U, (down_offsets & 1) != 0);
    const int rows = min(static_cast<int>(counts & 0xFF), units / 2);
    const int spare = max(units - kTwoFourFixedUnits - 2 * rows, 0);
    steps[0] = min(static_cast<int>(counts >> 8 & 0xFF), spare);
    steps[1] = min(static_cast<int>(counts >> 16 & 0xFF), spare - steps[0]);
    values = smem_chunk + kTwoFourFixedBytes;
    residual = values + rows * kChunkRowBytes;
  }
};

// PRMT selectors that build a lane's registers 0 and 3 of a diagonal A from the step's values of
// rows g and g + 8, which are the halves of a word. Lane 4 g + t holds A[g][2 t], A[g][2 t + 1] and
// A[g + 8][2 t + 8], A[g + 8][2 t + 9]; one of each is on the diagonal if t == g / 2.
struct DiagonalSelectors {
  uint32_t low, high;

  __device__ __forceinline__ explicit DiagonalSelectors(int lane) {
    const bool diagonal = lane % 4 == lane / 8;
    const bool odd_row = (lane / 4) % 2 != 0;
    low = !diagonal ? 0x4444U : odd_row ? 0x1044U : 0x4410U;
    high = !diagonal ? 0x4444U : odd_row ? 0x3244U : 0x4432U;
  }
};

inline constexpr int kTransposedBlockBytes = kTwoFourK * 16;  // 8 tokens

// Writes a part of the transposed X, [block of 8 tokens][column][token]: 32 columns from column
// 8 * col8 on, each at the offset that residual entries store for it (residual_offset), of kBlocks
// blocks of tokens. `x` is the shared-memory address of the 64 columns of X, in the 128-byte
// swizzle, that contain them.
template <int kBlocks>
__device__ __forceinline__ void transpose_columns(uint32_t x, int col8, uint32_t transposed,
                                                  int lane) {
  const int row = lane % 8, own = (col8 + lane / 8) % 8;
  x += row * 128 + (own ^ row) * 16;
  // Lane 4 g + t gets tokens 2 t and 2 t + 1 of column g of each of four matrices.
  uint32_t to[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[i] = transposed + ((col8 + i) * 8 + (lane / 4 ^ (col8 + i) % 8)) * 16 + lane % 4 * 4;
  }
#pragma unroll(kBlocks < 4 ? kBlocks : 4)
  for (int block = 0; block < kBlocks; ++block) {
    uint32_t reg[4];
    ptx::ldmatrix_x4_trans(reg, x + block * 1024);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ptx::store_shared_u32(to[i] + block * kTransposedBlockBytes, reg[i]);
    }
  }
}

// Adds the products of `steps` steps of a strip's residual to the sums of kTokens tokens; `step` is
// the shared-memory address of the first step.
template <ValueType kType, int kTokens>
__device__ __forceinline__ void add_residual(uint32_t transposed, uint32_t step, int steps,
                                             int lane, float* sums) {
  const DiagonalSelectors select(lane);
  const uint32_t tokens = transposed + (kTokens > 8 ? lane / 16 : 0) * kTransposedBlockBytes;
  const uint32_t own_pair = lane / 4 * 4, own_column = 32 + lane % 16 * 2;
  const auto load_pair = [&] { return ptx::load_shared_u32(step + own_pair); };
  const auto load_column = [&] {
    return tokens + (load_shared_u16<0>(step + own_column) & (kTransposedBlockBytes - 16));
  };
  // Loads are one step ahead. The loads after the last step read shared memory beyond the residual,
  // and their results are not used.
  uint32_t next_pair = load_pair(), next_column = load_column();
#pragma unroll(kTokens <= 16 ? 2 : 1)
  for (int i = 0; i < steps; ++i) {
    const uint32_t pair = next_pair, column = next_column;
    step += kResidualStepBytes;
    next_pair = load_pair();
    next_column = load_column();
    const uint32_t a[4] = {byte_permute(pair, 0, select.low), 0, 0,
                           byte_permute(pair, 0, select.high)};
    if constexpr (kTokens == 8) {
      uint32_t b[2];
      ptx::ldmatrix_x2_trans(b, column);
      ptx::mma_m16n8k16<kType>(sums, a, b[0], b[1]);
    } else {
#pragma unroll
      for (int token16 = 0; token16 < kTokens / 16; ++token16) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, column + token16 * 2 * kTransposedBlockBytes);
        ptx::mma_m16n8k16<kType>(sums + token16 * 8, a, b[0], b[1]);
        ptx::mma_m16n8k16<kType>(sums + token16 * 8 + 4, a, b[2], b[3]);
      }
    }
  }
}

}  // namespace flash_llm
