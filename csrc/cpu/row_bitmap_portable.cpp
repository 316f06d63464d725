// The row bitmap's kernels in portable C++, for CPUs without any of the other instruction sets, and
// the choice among all kernels.
#include <algorithm>
#include <cstddef>
#include <cstring>

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
void decode_group(uint32_t mask, const RawOf<kType>*& values, const RawOf<kType>* end,
                  Lanes& elements) {
  std::fill_n(elements, kGroupCols, 0.0F);
  for (; mask != 0 && values != end; mask &= mask - 1) {
    elements[__builtin_ctz(mask)] = to_float<kType>(*values++);
  }
}

template <ValueType kType>
void multiply_block(const RowBitmapTokens& block_tokens, int64_t groups,
                    RowBlockOf<RawOf<kType>> block, float* out) {
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
  using Raw = RawOf<kType>;
  multiply_blocks<Raw>(product, [&](const RowBitmapTokens& tokens, const auto& block, float* out) {
    multiply_block<kType>(tokens, groups, block, out);
  });
}

// Adding 1.5 * 2^52, whose neighbours are integers, rounds to one; it is the low byte. The product
// is exact in fp64.
template <ValueType kType>
void quantize_group(const uint16_t* group, float inverse, int8_t* quantized) {
  for (int64_t i = 0; i < kGroupCols; ++i) {
    const double product =
        static_cast<double>(to_float<kType>(group[i])) * static_cast<double>(inverse);
    const double rounded = product + 0x1.8p52;
    uint64_t bits;
    std::memcpy(&bits, &rounded, sizeof(bits));
    quantized[i] = static_cast<int8_t>(bits & 0xFF);
  }
}

// int8 X, so sums are integers: exact in any order.
void multiply_int8_block(const RowBitmapTokens& tokens, int64_t groups, RowBlockOf<uint8_t> block,
                         float* out) {
  int32_t sums[kMaxTokens][kBlockRows] = {};
  const auto* x = static_cast<const int8_t*>(tokens.x);
  for (int64_t group = 0; group < groups; ++group) {
    for (int row = 0; row < kBlockRows; ++row) {
      int8_t w[kGroupCols] = {};
      for (uint32_t mask = *block.masks++; mask != 0 && block.values != block.end;
           mask &= mask - 1) {
        w[__builtin_ctz(mask)] = static_cast<int8_t>(*block.values++);
      }
      for (int token = 0; token < tokens.count; ++token) {
        const int8_t* of_token = x + token * kGroupCols;
        int32_t sum = 0;
        for (int64_t i = 0; i < kGroupCols; ++i) sum += w[i] * of_token[i];
        sums[token][row] += sum;
      }
    }
    x += tokens.count * kGroupCols;
  }
  for (int token = 0; token < tokens.count; ++token) {
    for (const int32_t sum : sums[token]) *out++ = static_cast<float>(sum) * tokens.scales[token];
  }
}

void multiply_int8(const RowBitmapProduct& product) {
  const int64_t groups = num_groups(product.weight.k);
  multiply_blocks<uint8_t>(product,
                           [&](const RowBitmapTokens& tokens, const auto& block, float* out) {
                             multiply_int8_block(tokens, groups, block, out);
                           });
}

// The sums do not depend on the dtype of X, which is widened before.
RowBitmapMultiply multiply_of(ValueType type) {
  switch (type) {
    case ValueType::kFloat16:
      return multiply<ValueType::kFloat16>;
    case ValueType::kBfloat16:
      return multiply<ValueType::kBfloat16>;
    case ValueType::kInt8Float16:
    case ValueType::kInt8Bfloat16:
      break;
  }
  return multiply<ValueType::kInt8Float16>;
}

}  // namespace

RowBitmapKernel row_bitmap_portable(ValueType type, bool int8_x) {
  const bool half = value_traits(type).dense == ValueType::kFloat16;
  RowBitmapKernel kernel;
  if (int8_x) {
    kernel.quantize =
        half ? quantize_group<ValueType::kFloat16> : quantize_group<ValueType::kBfloat16>;
  } else {
    kernel.widen = half ? widen_group<ValueType::kFloat16> : widen_group<ValueType::kBfloat16>;
  }
  kernel.max_tokens = kMaxTokens;
  kernel.multiply = int8_x ? multiply_int8 : multiply_of(type);
  kernel.decode_block = row_bitmap_decode_block;
  kernel.pack_block = row_bitmap_pack_block;
  return kernel;
}

RowBitmapKernel row_bitmap_kernel(CpuIsa isa, ValueType type, bool int8_x) {
  switch (isa) {
    case CpuIsa::kPortable:
      break;
    case CpuIsa::kAvx2:
      return row_bitmap_avx2(type, int8_x);
    case CpuIsa::kAvx512:
    case CpuIsa::kAvx512Bf16:
      return is_quantized(type) ? row_bitmap_avx512_int8(type, int8_x)
                                : row_bitmap_avx512(type, isa == CpuIsa::kAvx512Bf16);
    case CpuIsa::kNeon:
      return row_bitmap_neon(type, int8_x);
  }
  return row_bitmap_portable(type, int8_x);
}

RowBitmapPackBlock row_bitmap_block_packer(CpuIsa isa) {
  return row_bitmap_kernel(isa, ValueType::kBfloat16).pack_block;  // packing copies patterns
}

}  // namespace flash_llm
