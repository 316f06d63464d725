// The row bitmap's kernels for AVX2: a byte shuffle moves eight elements at a time to their
// columns.
#include "cpu/row_bitmap_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>

#include "cpu/row_bitmap_shuffles.h"
#include "format/element.h"

#define FLASH_LLM_AVX2 __attribute__((target("avx2,fma,f16c,popcnt")))

namespace flash_llm {
namespace {

constexpr int kMaxTokens = 3;  // times four rows: their sums take 12 of the 16 registers

// kExpansions for bf16 that is widened at once: the two bytes of a column become the upper half of
// its fp32 number. Both halves of the shuffled vector hold the packed values.
using WideShuffles = std::array<std::array<uint8_t, 4 * kPartCols>, 256>;

constexpr WideShuffles make_bf16_expansions() {
  WideShuffles table{};
  for (size_t bits = 0; bits < table.size(); ++bits) {
    for (size_t col = 0; col < kPartCols; ++col) {
      table[bits][4 * col] = table[bits][4 * col + 1] = 0x80;
      table[bits][4 * col + 2] = kExpansions[bits][2 * col];
      table[bits][4 * col + 3] = kExpansions[bits][2 * col + 1];
    }
  }
  return table;
}

alignas(64) constexpr WideShuffles kBf16Expansions = make_bf16_expansions();

// The inverse of kExpansions: row `bits` moves the stored columns to the front.
constexpr Shuffles make_gathers() {
  Shuffles table{};
  for (size_t bits = 0; bits < table.size(); ++bits) {
    size_t rank = 0;
    for (size_t col = 0; col < kPartCols; ++col) {
      if ((bits >> col & 1U) == 0) continue;
      table[bits][2 * rank] = static_cast<uint8_t>(2 * col);
      table[bits][2 * rank + 1] = static_cast<uint8_t>(2 * col + 1);
      ++rank;
    }
  }
  return table;
}

alignas(64) constexpr Shuffles kGathers = make_gathers();

template <ValueType kType>
FLASH_LLM_AVX2 inline __m256 widen(__m128i elements) {
  if constexpr (kType == ValueType::kFloat16) {
    return _mm256_cvtph_ps(elements);
  } else {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(elements), 16));
  }
}

// Reads the values of a row. Near the payload's end they are copied first, so that no load reads
// past it.
template <bool kNearEnd>
struct Values {
  const uint16_t* next;
  const uint16_t* end;

  FLASH_LLM_AVX2 inline __m128i load() const {
    if (!kNearEnd) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(next));
    uint16_t copy[kPartCols] = {};
    const auto left = std::min<std::ptrdiff_t>(end - next, kPartCols);
    if (left > 0) std::memcpy(copy, next, static_cast<size_t>(left) * sizeof(uint16_t));
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(copy));
  }
  FLASH_LLM_AVX2 inline void skip(uint32_t mask) {
    const int count = __builtin_popcount(mask);
    next += kNearEnd ? std::min<std::ptrdiff_t>(end - next, count) : count;
  }
  // The elements of the next eight columns, of which those in `bits` are stored.
  FLASH_LLM_AVX2 inline __m128i take(uint32_t bits) {
    const auto* shuffle = reinterpret_cast<const __m128i*>(kExpansions[bits].data());
    const __m128i elements = _mm_shuffle_epi8(load(), _mm_load_si128(shuffle));
    skip(bits);
    return elements;
  }
  // The same as fp32.
  template <ValueType kType>
  FLASH_LLM_AVX2 inline __m256 take_wide(uint32_t bits) {
    if constexpr (kType == ValueType::kFloat16) {
      return widen<kType>(take(bits));
    } else {
      const auto* shuffle = reinterpret_cast<const __m256i*>(kBf16Expansions[bits].data());
      const __m256i elements =
          _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load()), _mm256_load_si256(shuffle));
      skip(bits);
      return _mm256_castsi256_ps(elements);
    }
  }
};

// How many groups can be read by loads of 16 bytes that all stay within the payload.
int64_t groups_before_end(const uint16_t* next, const uint16_t* end) {
  return (end - next) / (kBlockRows * kGroupCols);
}

template <ValueType kType>
FLASH_LLM_AVX2 void widen_group(const uint16_t* group, float* widened) {
  for (int64_t col = 0; col < kGroupCols; col += kPartCols) {
    const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(group + col));
    _mm256_storeu_ps(widened + col, widen<kType>(part));
  }
}

template <ValueType kType, int kTokens>
struct Block {
  __m256 sums[kBlockRows][kTokens];

  template <bool kNearEnd>
  FLASH_LLM_AVX2 inline void add_group(const uint32_t* masks, const float* x,
                                       Values<kNearEnd>& values) {
    if (!kNearEnd) {
      prefetch_soon(values.next);
      prefetch_later(values.next);
    }
    Values<kNearEnd> rows[kBlockRows] = {};
#pragma GCC unroll 4
    for (int row = 0; row < kBlockRows; ++row) {
      rows[row] = values;
      values.skip(masks[row]);
    }
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      __m256 input[kTokens];
      for (int token = 0; token < kTokens; ++token) {
        input[token] = _mm256_loadu_ps(x + token * kGroupCols + part * kPartCols);
      }
#pragma GCC unroll 4
      for (int row = 0; row < kBlockRows; ++row) {
        const __m256 w = rows[row].template take_wide<kType>(masks[row] >> (8 * part) & 0xFFU);
        for (int token = 0; token < kTokens; ++token) {
          sums[row][token] = _mm256_fmadd_ps(w, input[token], sums[row][token]);
        }
      }
    }
  }

  FLASH_LLM_AVX2 static void multiply(const RowBlock& block, int64_t groups, const float* x,
                                      float* out) {
    Block sums;
    for (auto& row : sums.sums) {
      for (auto& token : row) token = _mm256_setzero_ps();
    }
    const uint32_t* masks = block.masks;
    const uint32_t* const masks_end = masks + groups * kBlockRows;
    Values<false> values{block.values, block.end};
    while (masks != masks_end) {
      const int64_t safe = groups_before_end(values.next, values.end);
      if (safe == 0) break;
      const uint32_t* const stop = masks + std::min<int64_t>(masks_end - masks, safe * kBlockRows);
      for (; masks != stop; masks += kBlockRows, x += kTokens * kGroupCols) {
        sums.add_group(masks, x, values);
      }
    }
    Values<true> last{values.next, values.end};
    for (; masks != masks_end; masks += kBlockRows, x += kTokens * kGroupCols) {
      sums.add_group(masks, x, last);
    }
    for (int token = 0; token < kTokens; ++token) {
      const __m256 ab = _mm256_hadd_ps(sums.sums[0][token], sums.sums[1][token]);
      const __m256 cd = _mm256_hadd_ps(sums.sums[2][token], sums.sums[3][token]);
      const __m256 abcd = _mm256_hadd_ps(ab, cd);
      _mm_storeu_ps(out + token * kBlockRows,
                    _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
    }
  }
};

using MultiplyBlock = void (*)(const RowBlock&, int64_t groups, const float* x, float* out);

template <ValueType kType>
constexpr MultiplyBlock kMultiplyBlock[kMaxTokens] = {
    Block<kType, 1>::multiply, Block<kType, 2>::multiply, Block<kType, 3>::multiply};

template <ValueType kType>
void multiply(const RowBitmapProduct& product) {
  const int64_t groups = num_groups(product.weight.k);
  multiply_blocks(product, [&](const RowBitmapTokens& tokens, const RowBlock& block, float* out) {
    kMultiplyBlock<kType>[tokens.count - 1](block, groups, static_cast<const float*>(tokens.x),
                                            out);
  });
}

template <bool kNearEnd>
FLASH_LLM_AVX2 inline void decode_group(const uint32_t* masks, int rows, int64_t k, int64_t cols,
                                        Values<kNearEnd>& values, uint16_t* dense) {
  for (int row = 0; row < kBlockRows; ++row) {
    Values<kNearEnd> next = values;
    values.skip(masks[row]);
    if (row >= rows) continue;
    for (int64_t part = 0; part < kParts && part * kPartCols < cols; ++part) {
      const __m128i elements = next.take(masks[row] >> (8 * part) & 0xFFU);
      uint16_t* to = dense + row * k + part * kPartCols;
      if (cols - part * kPartCols >= kPartCols) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), elements);
      } else {
        uint16_t copy[kPartCols];
        _mm_storeu_si128(reinterpret_cast<__m128i*>(copy), elements);
        std::copy_n(copy, cols - part * kPartCols, to);
      }
    }
  }
}

FLASH_LLM_AVX2 void decode_block(const RowBlock& block, int rows, int64_t k, uint16_t* dense) {
  const int64_t groups = num_groups(k);
  int64_t group = 0;
  Values<false> values{block.values, block.end};
  while (group < groups) {
    const int64_t safe = groups_before_end(values.next, values.end);
    if (safe == 0) break;
    for (const int64_t stop = std::min(groups, group + safe); group < stop; ++group) {
      decode_group(block.masks + group * kBlockRows, rows, k, k - group * kGroupCols, values,
                   dense + group * kGroupCols);
    }
  }
  for (Values<true> last{values.next, values.end}; group < groups; ++group) {
    decode_group(block.masks + group * kBlockRows, rows, k, k - group * kGroupCols, last,
                 dense + group * kGroupCols);
  }
}

// Returns the mask of 32 columns and writes their nonzeros to kept[0], kept[1], ...; up to eight
// elements after them may be overwritten. `below` is the running minimum of magnitude - 1, in which
// zeros wrap around to the largest number.
FLASH_LLM_AVX2 inline uint32_t pack_group(const uint16_t* from, uint16_t* kept, __m128i& below) {
  uint32_t mask = 0;
#pragma GCC unroll 4
  for (int part = 0; part < kParts; ++part) {
    const __m128i values =
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + part * kPartCols));
    const __m128i magnitudes = _mm_and_si128(values, _mm_set1_epi16(kMagnitudeMask));
    const __m128i zeros = _mm_cmpeq_epi16(magnitudes, _mm_setzero_si128());
    below = _mm_min_epu16(below, _mm_sub_epi16(magnitudes, _mm_set1_epi16(1)));
    const auto bits =
        ~static_cast<uint32_t>(_mm_movemask_epi8(_mm_packs_epi16(zeros, zeros))) & 0xFFU;
    const auto* gather = reinterpret_cast<const __m128i*>(kGathers[bits].data());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(kept),
                     _mm_shuffle_epi8(values, _mm_load_si128(gather)));
    kept += __builtin_popcount(bits);
    mask |= bits << (part * kPartCols);
  }
  return mask;
}

}  // namespace

FLASH_LLM_AVX2 PackedBlock row_bitmap_avx2_pack_block(const uint16_t* dense, int64_t ld, int rows,
                                                      int64_t k, uint32_t* masks, uint16_t* values,
                                                      const uint16_t* end) {
  __m128i below = _mm_set1_epi16(kMagnitudeMask);
  for (int64_t group = 0; group < num_groups(k); ++group) {
    const int64_t cols = std::min<int64_t>(kGroupCols, k - group * kGroupCols);
    for (int row = 0; row < rows; ++row) {
      const uint16_t* from = dense + row * ld + group * kGroupCols;
      uint16_t padded[kGroupCols] = {};
      if (cols < kGroupCols) {
        std::memcpy(padded, from, static_cast<size_t>(cols) * sizeof(uint16_t));
        from = padded;
      }
      // Not written to `values` directly: pack_group writes more than `count` elements, and another
      // thread may be writing what follows the block.
      uint16_t kept[kGroupCols + kPartCols];
      const uint32_t mask = pack_group(from, kept, below);
      const int count = __builtin_popcount(mask);
      if (count > end - values) return {};
      values = std::copy_n(kept, count, values);
      masks[group * kBlockRows + row] = mask;
    }
  }
  return {static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_minpos_epu16(below)) & 0xFFFF) + 1U, values};
}

RowBitmapKernel row_bitmap_avx2(ValueType type) {
  return {
      type == ValueType::kFloat16 ? widen_group<ValueType::kFloat16>
                                  : widen_group<ValueType::kBfloat16>,
      kMaxTokens,
      false,
      type == ValueType::kFloat16 ? multiply<ValueType::kFloat16> : multiply<ValueType::kBfloat16>,
      decode_block,
      row_bitmap_avx2_pack_block};
}

}  // namespace flash_llm

#else

namespace flash_llm {

RowBitmapKernel row_bitmap_avx2(ValueType) { return {}; }

PackedBlock row_bitmap_avx2_pack_block(const uint16_t*, int64_t, int, int64_t, uint32_t*, uint16_t*,
                                       const uint16_t*) {
  return {};
}

}  // namespace flash_llm

#endif
