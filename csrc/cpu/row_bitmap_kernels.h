// The kernels of the row bitmap, one set for each instruction set of cpu_isa.h;
// cpu/row_bitmap_spmm.cpp calls them. A kernel multiplies blocks of 4 rows and returns fp32 sums of
// X times the stored values; its caller applies the scales of rows, bias, activation and rounding.
// Scales of groups of columns are applied by the kernel, before it adds up the groups. Of int8
// values some kernels take X as int8 too, with a scale for each token: they sum in int32, which is
// exact, and convert the sum once.
//
// Each set is compiled for its instruction set by attributes of its functions, not by compiler
// flags for its file: with flags, an inline function of a header would be compiled for that
// instruction set too, and the linker could use that copy in code that runs on older CPUs.
#pragma once

#include <cstdint>

#include "base/cpu_isa.h"
#include "format/packed_header.h"
#include "format/row_bitmap.h"

namespace flash_llm {

// Most tokens in a token block, most token blocks in one call, and most blocks of rows in one call.
inline constexpr int kMaxRowTokens = 8;
inline constexpr int64_t kMaxRowTokenBlocks = 16;
inline constexpr int64_t kCallBlocks = 16;

// A kernel may keep each sum as this many fp32 partial sums, the lanes of a vector.
inline constexpr int64_t kKeptLanes = 16;

// A token block: a few tokens in the layout that a kernel reads.
struct RowBitmapTokens {
  // [groups][count][32 columns], zero beyond column k. If the kernel widens X: fp32, 64-byte
  // aligned, the columns of a group in the order that `widen` gives them. If it quantises X: int8,
  // 64-byte aligned. Else raw patterns, which may be the caller's own row.
  const void* x = nullptr;
  int count = 0;
  // A kernel that treats subnormals as zeros multiplies a block correctly if the block's smallest
  // value is at least this.
  uint32_t smallest_normal = 0;
  float empty[kMaxRowTokens] = {};  // the sums of a block without nonzeros: 0 or NaN
  // If the kernel quantises X: the factor of each token's sums, and the sum of its elements.
  float scales[kMaxRowTokens] = {};
  int32_t totals[kMaxRowTokens] = {};
};

// The work of one call: some token blocks times at most kCallBlocks blocks of rows.
struct RowBitmapProduct {
  PackedView weight;
  int64_t first = 0, last = 0;  // blocks
  const RowBitmapTokens* tokens = nullptr;
  int64_t token_blocks = 0;
  float* sums = nullptr;  // token block after token block, each [last - first][count][4 rows]
  float* kept = nullptr;  // scratch: kKeptLanes times the size of sums, 64-byte aligned
};

// Prefetches what lies 1 KB ahead: two cache lines.
inline void prefetch_soon(const void* at) {
  const auto* bytes = static_cast<const char*>(at);
  __builtin_prefetch(bytes + 1024, 0, 3);
  __builtin_prefetch(bytes + 1024 + 64, 0, 3);
}

// Prefetches what lies 1 KB and what lies 8 KB ahead, for a kernel that has read a block up to
// `masks` and `values`. Its position is counted as if masks and values were one stream. Blocks are
// contiguous, so every line is prefetched once. (Prefetching ahead of the values alone skips the
// masks of each block: 4096x4096 with int8 values takes 387 instead of 294 us at 70 % zeros, and
// with 16 bits 676 instead of 600 us at 50 %; AVX-512 on Zen 4.) The hardware prefetcher alone is
// slower, because it sees streams begin and end every few kilobytes and stops at each page: with 16
// bits it takes 960 us at 50 % zeros, where prefetching the values takes 830 (on huge pages 630),
// and 490 instead of 360 us at 90 %.
template <typename Raw>
inline void prefetch_block(const RowBlockOf<Raw>& block, const uint32_t* masks, const Raw* values) {
  // A step of four groups reads up to 144 bytes at 50 % zeros, 80 with values of a byte.
  constexpr int64_t kLines = sizeof(Raw) == 1 ? 2 : 3;
  constexpr auto kBytes = static_cast<int64_t>(sizeof(Raw));
  const char* at = reinterpret_cast<const char*>(masks) + (values - block.values) * kBytes;
  for (int64_t line = 0; line < kLines; ++line) __builtin_prefetch(at + 1024 + line * 64, 0, 3);
  for (int64_t line = 0; line < kLines; ++line) __builtin_prefetch(at + 8192 + line * 64, 0, 2);
}

// Writes the sums of a block without nonzeros.
inline void sum_nothing(const RowBitmapTokens& tokens, float* out) {
  for (int i = 0; i < tokens.count * kBlockRows; ++i) out[i] = tokens.empty[i / kBlockRows];
}

using RowBitmapMultiply = void (*)(const RowBitmapProduct& product);

// Calls multiply_block(token block, block of rows, its sums) for each block of a product that has
// nonzeros, and writes the sums of the others. Raw is as wide as the values.
template <typename Raw, typename MultiplyBlock>
inline void multiply_blocks(const RowBitmapProduct& product, const MultiplyBlock& multiply_block) {
  float* out = product.sums;
  for (int64_t j = 0; j < product.token_blocks; ++j) {
    const RowBitmapTokens& tokens = product.tokens[j];
    for (int64_t i = product.first; i < product.last; ++i, out += tokens.count * kBlockRows) {
      const RowBlockOf<Raw> block = row_block<Raw>(product.weight, i);
      if (block.masks == nullptr) {
        sum_nothing(tokens, out);
      } else {
        multiply_block(tokens, block, out);
      }
    }
  }
}

struct RowBitmapKernel {
  // How X is converted, 32 columns at a time. With neither of them X stays raw.
  void (*widen)(const uint16_t* group, float* widened) = nullptr;
  // Multiplies by `inverse` and rounds the exact product to the nearest integer, ties to even; its
  // magnitude is at most 127, unless an element is NaN or infinite, which gives any integer.
  void (*quantize)(const uint16_t* group, float inverse, int8_t* quantized) = nullptr;
  int max_tokens = 0;       // in a token block
  bool keeps_sums = false;  // whether it needs RowBitmapProduct::kept
  RowBitmapMultiply multiply = nullptr;
  // Decodes a block that has masks into dense[rows, k], contiguous. For 16-bit values.
  void (*decode_block)(const RowBlock& block, int rows, int64_t k, uint16_t* dense) = nullptr;
  // The same for quantised values, dequantised to the type of X; null: the format's own decoder is
  // used.
  void (*decode_quantized_block)(const RowBlockOf<uint8_t>& block, int rows, int64_t k,
                                 uint16_t* dense) = nullptr;
  RowBitmapPackBlock pack_block = nullptr;  // for 16-bit values
};

// The kernels of `isa`, which this CPU must have. int8_x: those that quantise X, for int8 values.
RowBitmapKernel row_bitmap_kernel(CpuIsa isa, ValueType type, bool int8_x = false);

// The kernels of each instruction set; empty if the build is for another architecture.
RowBitmapKernel row_bitmap_portable(ValueType type, bool int8_x);
RowBitmapKernel row_bitmap_avx2(ValueType type, bool int8_x);
RowBitmapKernel row_bitmap_avx512(ValueType type, bool bf16);
RowBitmapKernel row_bitmap_avx512_quantized(ValueType type, bool int8_x);  // for quantised values
RowBitmapKernel row_bitmap_neon(ValueType type, bool int8_x);

// AVX2's packer, which the kernels for AVX-512 use too.
PackedBlock row_bitmap_avx2_pack_block(const uint16_t* dense, int64_t ld, int rows, int64_t k,
                                       uint32_t* masks, uint16_t* values, const uint16_t* end);

}  // namespace flash_llm
