// The row bitmap's kernels in portable C++, for CPUs without any of the other instruction sets, and
// the choice among all kernels.
#include <algorithm>
#include <cstddef>

#include "cpu/row_bitmap_kernels.h"
#include "format/element.h"

namespace flash_llm {
namespace {

constexpr int kMaxTokens = 4;

// One sum for each column of a group, so that loops over them vectorise for any vector width.
using Lanes = float[kGroupCols];

template <ValueType kType>
void widen_group(const uint16_t* group, float* widened) {
  for (int64_t i = 0; i < kGroupCols; ++i) widened[i] = to_float<kType>(group[i]);
}

// Decodes the next group of a row, zeros included: they are multiplied too, since infinity times
// zero is NaN.
template <ValueType kType>
void decode_group(uint32_t mask, const uint16_t*& values, const uint16_t* end, Lanes& elements) {
  std::fill_n(elements, kGroupCols, 0.0F);
  for (; mask != 0 && values != end; mask &= mask - 1) {
    elements[__builtin_ctz(mask)] = to_float<kType>(*values++);
  }
}

template <ValueType kType>
void multiply_block(const RowBitmapTokens& block_tokens, int64_t groups, RowBlock block,
                    float* out) {
  const auto tokens = static_cast<size_t>(block_tokens.count);
  Lanes sums[kBlockRows][kMaxTokens] = {};
  const auto* x = static_cast<const float*>(block_tokens.x);
  for (int64_t group = 0; group < groups; ++group) {
    for (auto& row : sums) {
      Lanes w;
      decode_group<kType>(*block.masks++, block.values, block.end, w);
      for (size_t token = 0; token < tokens; ++token) {
        for (size_t i = 0; i < kGroupCols; ++i) row[token][i] += w[i] * x[token * kGroupCols + i];
      }
    }
    x += tokens * kGroupCols;
  }
  for (size_t token = 0; token < tokens; ++token) {
    for (auto& row : sums) {
      float sum = 0.0F;
      for (const float lane : row[token]) sum += lane;
      *out++ = sum;
    }
  }
}

template <ValueType kType>
void multiply(const RowBitmapProduct& product) {
  const int64_t groups = num_groups(product.weight.k);
  multiply_blocks(product, [&](const RowBitmapTokens& tokens, const RowBlock& block, float* out) {
    multiply_block<kType>(tokens, groups, block, out);
  });
}

}  // namespace

RowBitmapKernel row_bitmap_portable(ValueType type) {
  return {
      type == ValueType::kFloat16 ? widen_group<ValueType::kFloat16>
                                  : widen_group<ValueType::kBfloat16>,
      kMaxTokens,
      false,
      type == ValueType::kFloat16 ? multiply<ValueType::kFloat16> : multiply<ValueType::kBfloat16>,
      row_bitmap_decode_block,
      row_bitmap_pack_block};
}

RowBitmapKernel row_bitmap_kernel(CpuIsa isa, ValueType type) {
  switch (isa) {
    case CpuIsa::kPortable:
      break;
    case CpuIsa::kAvx2:
      return row_bitmap_avx2(type);
    case CpuIsa::kAvx512:
      return row_bitmap_avx512(type, false);
    case CpuIsa::kAvx512Bf16:
      return row_bitmap_avx512(type, true);
    case CpuIsa::kNeon:
      return row_bitmap_neon(type);
  }
  return row_bitmap_portable(type);
}

RowBitmapPackBlock row_bitmap_block_packer(CpuIsa isa) {
  return row_bitmap_kernel(isa, ValueType::kBfloat16).pack_block;  // packing copies patterns
}

}  // namespace flash_llm
