// The kernels of the row bitmap, one set for each instruction set of cpu_isa.h; spmm_rows.cpp calls
// them. A kernel walks blocks of 4 rows and leaves fp32 sums; bias, activation and rounding come
// after.
//
// Each set is compiled for its instruction set by attributes of its functions, not by flags of its
// file: an inline function of a header that the file happens to instantiate must not be one that
// the rest of the library then runs on a poorer CPU.
#pragma once

#include <cstdint>

#include "core/cpu_isa.h"
#include "core/packed_header.h"
#include "core/row_bitmap.h"

namespace flash_llm {

inline constexpr int kMaxRowTokens = 8;

// Some tokens times some blocks.
struct RowBitmapProduct {
  PackedView weight;
  // [groups][tokens][32 columns], zero beyond column k, 64-byte aligned unless it is the caller's
  // own row: raw patterns, or fp32 where the kernel wants that.
  const void* x = nullptr;
  int tokens = 0;                  // 1 ... the kernel's max_tokens
  int64_t first = 0, last = 0;     // blocks
  // Blocks whose smallest value is at least this have only products that a kernel which takes
  // subnormals for zeros multiplies right.
  uint32_t smallest_normal = 0;
  const float* empty = nullptr;    // [tokens]: what an empty block's rows sum up to, 0 or NaN
  float* sums = nullptr;           // [last - first][tokens][4 rows]
};

struct RowBitmapKernel {
  bool float_x = false;
  int max_tokens = 0;
  void (*multiply)(const RowBitmapProduct& product) = nullptr;
  // Decodes blocks first ... last into dense[rows, k] (contiguous, from row 4 first on).
  void (*decode)(const PackedView& weight, int64_t first, int64_t last, uint16_t* dense) = nullptr;
};

// `isa` must be one that this CPU has.
RowBitmapKernel row_bitmap_kernel(CpuIsa isa, ValueType type);

// Its parts; those of another architecture than the build's are empty.
RowBitmapKernel row_bitmap_portable(ValueType type);
RowBitmapKernel row_bitmap_avx2(ValueType type);
RowBitmapKernel row_bitmap_avx512(ValueType type, bool bf16);

}  // namespace flash_llm
