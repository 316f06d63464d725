// The kernels of the row bitmap, one set for each instruction set of cpu_isa.h;
// cpu/row_bitmap_spmm.cpp calls them. A kernel walks blocks of 4 rows and leaves fp32 sums; bias,
// activation and rounding come after.
//
// Each set is compiled for its instruction set by attributes of its functions, not by flags of its
// file: an inline function of a header that the file happens to instantiate must not be one that
// the rest of the library then runs on a poorer CPU.
#pragma once

#include <cstdint>

#include "base/cpu_isa.h"
#include "format/packed_header.h"
#include "format/row_bitmap.h"

namespace flash_llm {

// Tokens that a kernel takes at a time, how many times of them in one call, and of how many blocks.
inline constexpr int kMaxRowTokens = 6;
inline constexpr int64_t kMaxRowTokenBlocks = 16;
inline constexpr int64_t kCallBlocks = 16;

// fp32 lanes in which a kernel may keep a sum.
inline constexpr int64_t kKeptLanes = 16;

// A few tokens as a kernel wants them.
struct RowBitmapTokens {
  // [groups][count][32 columns], zero beyond column k: fp32, in an order of the kernel's choice and
  // 64-byte aligned, where it widens X; else raw patterns, which may be the caller's own row.
  const void* x = nullptr;
  int count = 0;
  // Blocks whose smallest value is at least this have only products that a kernel which takes
  // subnormals for zeros multiplies right.
  uint32_t smallest_normal = 0;
  float empty[kMaxRowTokens] = {};  // what an empty block's rows sum up to, 0 or NaN
};

// Some tokens times some blocks, kCallBlocks at most.
struct RowBitmapProduct {
  PackedView weight;
  int64_t first = 0, last = 0;  // blocks
  const RowBitmapTokens* tokens = nullptr;
  int64_t token_blocks = 0;
  float* sums = nullptr;  // token block after token block, each [last - first][count][4 rows]
  float* kept = nullptr;  // for the kernel's use: kKeptLanes times as much, 64-byte aligned
};

// What an empty block's rows sum up to.
inline void sum_nothing(const RowBitmapTokens& tokens, float* out) {
  for (int i = 0; i < tokens.count * kBlockRows; ++i) out[i] = tokens.empty[i / kBlockRows];
}

struct RowBitmapKernel {
  void (*widen)(const uint16_t* group, float* widened) = nullptr;  // of X; null: raw is right
  int max_tokens = 0;                                              // of a block
  bool keeps_sums = false;  // whether it needs RowBitmapProduct::kept
  void (*multiply)(const RowBitmapProduct& product) = nullptr;
  // Decodes a block that has masks into dense[rows, k], contiguous.
  void (*decode_block)(const RowBlock& block, int rows, int64_t k, uint16_t* dense) = nullptr;
  RowBitmapPackBlock pack_block = nullptr;
};

// `isa` must be one that this CPU has.
RowBitmapKernel row_bitmap_kernel(CpuIsa isa, ValueType type);

// Its parts; those of another architecture than the build's are empty.
RowBitmapKernel row_bitmap_portable(ValueType type);
RowBitmapKernel row_bitmap_avx2(ValueType type);
RowBitmapKernel row_bitmap_avx512(ValueType type, bool bf16);

// That of AVX2, which AVX-512 takes too.
PackedBlock row_bitmap_avx2_pack_block(const uint16_t* dense, int64_t ld, int rows, int64_t k,
                                       uint32_t* masks, uint16_t* values, const uint16_t* end);

}  // namespace flash_llm
