// The row bitmap's kernels for NEON, which every AArch64 CPU has: a table lookup (tbl) moves eight
// elements at a time to their columns. Only instructions of the base architecture are used, for
// bf16 too.
//
// NOTE: tested under qemu only (.ci/test_aarch64), never timed on an Arm CPU.
#include "cpu/row_bitmap_kernels.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "cpu/row_bitmap_shuffles.h"

namespace flash_llm {
namespace {

// Times four rows: their sums take half of the 32 registers, the elements of a part another eight.
constexpr int kMaxTokens = 4;

// The values of the next group of four rows. Near the payload's end they are copied before they are
// loaded, so that no load reads past it.
template <bool kNearEnd>
class Group {
 public:
  // General registers have no instruction that counts bits before Armv8.9, so one vector
  // instruction counts those of all 16 parts. They lie in the order of the values: all parts of a
  // row, row after row. A multiplication adds them up.
  Group(const uint32_t* masks, const uint16_t* values, const uint16_t* end)
      : masks_(reinterpret_cast<const uint8_t*>(masks)), end_(end) {
    const uint8x16_t counts = vcntq_u8(vld1q_u8(masks_));
    const uint64x2_t bytes = vreinterpretq_u64_u8(vaddq_u8(counts, counts));
    const uint64_t of_rows_01 = vgetq_lane_u64(bytes, 0) * kEveryByte;
    const uint64_t of_rows_23 = vgetq_lane_u64(bytes, 1) * kEveryByte;
    begins_[0] = of_rows_01 << 8;
    begins_[1] = of_rows_23 << 8;
    values_[0] = values;
    values_[1] = advance(values, of_rows_01 >> 56);
    next_ = advance(values_[1], of_rows_23 >> 56);
  }

  // The elements of a row in eight columns, zeros included.
  uint16x8_t elements(int row, int64_t part) const {
    const auto half = static_cast<size_t>(row / 2);
    const int64_t i = row % 2 * kParts + part;
    const uint16_t* from = advance(values_[half], begins_[half] >> (8 * i) & 0xFF);
    const uint8x16_t expansion = vld1q_u8(kExpansions[masks_[row * kParts + part]].data());
    return vreinterpretq_u16_u8(vqtbl1q_u8(load(from), expansion));
  }

  const uint16_t* next() const { return next_; }

 private:
  static constexpr uint64_t kEveryByte = 0x0101010101010101;

  const uint16_t* advance(const uint16_t* from, uint64_t bytes) const {
    if (kNearEnd) bytes = std::min<uint64_t>(bytes, static_cast<uint64_t>(end_ - from) * 2);
    return reinterpret_cast<const uint16_t*>(reinterpret_cast<const char*>(from) + bytes);
  }

  uint8x16_t load(const uint16_t* from) const {
    if (!kNearEnd) return vld1q_u8(reinterpret_cast<const uint8_t*>(from));
    uint8_t copy[2 * kPartCols] = {};
    const auto left = std::min<std::ptrdiff_t>(end_ - from, kPartCols);
    std::memcpy(copy, from, static_cast<size_t>(left) * sizeof(uint16_t));
    return vld1q_u8(copy);
  }

  const uint8_t* masks_;
  const uint16_t* end_;
  // Of the first two and the last two rows: their first value, and in byte i how many bytes of
  // values precede those of their part i.
  const uint16_t* values_[2];
  uint64_t begins_[2];
  const uint16_t* next_;
};

// How many groups can be read by loads of 16 bytes that all stay within the payload.
int64_t groups_before_end(const uint16_t* next, const uint16_t* end) {
  return (end - next) / (kBlockRows * kGroupCols);
}

// Calls visit(group, its Group) for all groups of a block; `visit` is generic.
template <typename Visit>
inline void for_each_group(const RowBlock& block, int64_t groups, const Visit& visit) {
  const uint16_t* values = block.values;
  int64_t group = 0;
  while (group < groups) {
    const int64_t safe = groups_before_end(values, block.end);
    if (safe == 0) break;
    for (const int64_t stop = std::min(groups, group + safe); group < stop; ++group) {
      const Group<false> found(block.masks + group * kBlockRows, values, block.end);
      visit(group, found);
      values = found.next();
    }
  }
  for (; group < groups; ++group) {
    const Group<true> found(block.masks + group * kBlockRows, values, block.end);
    visit(group, found);
    values = found.next();
  }
}

// Eight elements as fp32.
template <ValueType kType>
inline float32x4x2_t widen(uint16x8_t elements) {
  if constexpr (kType == ValueType::kFloat16) {
    const float16x8_t halves = vreinterpretq_f16_u16(elements);
    return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
  } else {
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(elements), 16)),
            vreinterpretq_f32_u32(vshll_high_n_u16(elements, 16))};
  }
}

template <ValueType kType>
void widen_group(const uint16_t* group, float* widened) {
  for (int64_t col = 0; col < kGroupCols; col += kPartCols) {
    const float32x4x2_t part = widen<kType>(vld1q_u16(group + col));
    vst1q_f32(widened + col, part.val[0]);
    vst1q_f32(widened + col + kPartCols / 2, part.val[1]);
  }
}

template <ValueType kType, int kTokens>
void multiply_block(const RowBlock& block, int64_t groups, const float* x, float* out) {
  // One token has two sums for each row: eight independent chains of additions hide their latency.
  constexpr int kSums = kTokens == 1 ? 2 : 1;
  float32x4_t sums[kBlockRows][kTokens][kSums] = {};
  for_each_group(block, groups, [&](int64_t group, const auto& found) {
    const float* x_group = x + group * kTokens * kGroupCols;
#pragma GCC unroll 4
    for (int64_t part = 0; part < kParts; ++part) {
      float32x4x2_t w[kBlockRows];
#pragma GCC unroll 4
      for (int row = 0; row < kBlockRows; ++row) w[row] = widen<kType>(found.elements(row, part));
#pragma GCC unroll 4
      for (int token = 0; token < kTokens; ++token) {
        const float* from = x_group + token * kGroupCols + part * kPartCols;
        const float32x4_t low = vld1q_f32(from), high = vld1q_f32(from + kPartCols / 2);
#pragma GCC unroll 4
        for (int row = 0; row < kBlockRows; ++row) {
          auto& sum = sums[row][token];
          sum[0] = vfmaq_f32(sum[0], w[row].val[0], low);
          sum[kSums - 1] = vfmaq_f32(sum[kSums - 1], w[row].val[1], high);
        }
      }
    }
  });
#pragma GCC unroll 4
  for (int token = 0; token < kTokens; ++token) {
    float32x4_t rows[kBlockRows];
    for (int row = 0; row < kBlockRows; ++row) {
      const auto& sum = sums[row][token];
      rows[row] = kSums == 1 ? sum[0] : vaddq_f32(sum[0], sum[kSums - 1]);
    }
    vst1q_f32(out + token * kBlockRows,
              vpaddq_f32(vpaddq_f32(rows[0], rows[1]), vpaddq_f32(rows[2], rows[3])));
  }
}

using MultiplyBlock = void (*)(const RowBlock&, int64_t groups, const float* x, float* out);

template <ValueType kType>
constexpr MultiplyBlock kMultiplyBlock[kMaxTokens] = {
    multiply_block<kType, 1>, multiply_block<kType, 2>, multiply_block<kType, 3>,
    multiply_block<kType, 4>};

template <ValueType kType>
void multiply(const RowBitmapProduct& product) {
  const int64_t groups = num_groups(product.weight.k);
  multiply_blocks<uint16_t>(product,
                            [&](const RowBitmapTokens& tokens, const RowBlock& block, float* out) {
                              kMultiplyBlock<kType>[tokens.count - 1](
                                  block, groups, static_cast<const float*>(tokens.x), out);
                            });
}

void decode_block(const RowBlock& block, int rows, int64_t k, uint16_t* dense) {
  for_each_group(block, num_groups(k), [&](int64_t group, const auto& found) {
    const int64_t cols = k - group * kGroupCols;
    for (int row = 0; row < rows; ++row) {
      uint16_t* to = dense + row * k + group * kGroupCols;
      for (int64_t part = 0; part < kParts && part * kPartCols < cols; ++part, to += kPartCols) {
        const uint16x8_t elements = found.elements(row, part);
        if (cols - part * kPartCols >= kPartCols) {
          vst1q_u16(to, elements);
        } else {
          uint16_t copy[kPartCols];
          vst1q_u16(copy, elements);
          std::copy_n(copy, cols - part * kPartCols, to);
        }
      }
    }
  });
}

}  // namespace

RowBitmapKernel row_bitmap_neon(ValueType type, bool int8_x) {
  if (is_quantized(type)) return row_bitmap_portable(type, int8_x);
  const bool half = type == ValueType::kFloat16;
  RowBitmapKernel kernel;
  kernel.widen = half ? widen_group<ValueType::kFloat16> : widen_group<ValueType::kBfloat16>;
  kernel.max_tokens = kMaxTokens;
  kernel.multiply = half ? multiply<ValueType::kFloat16> : multiply<ValueType::kBfloat16>;
  kernel.decode_block = decode_block;
  kernel.pack_block = row_bitmap_pack_block;
  return kernel;
}

}  // namespace flash_llm

#else

namespace flash_llm {

RowBitmapKernel row_bitmap_neon(ValueType, bool) { return {}; }

}  // namespace flash_llm

#endif
