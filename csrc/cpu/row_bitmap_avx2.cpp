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

// The same for values of one byte. A row is loaded as 16 bytes, of which the last eight, which are
// the next row's, do not matter; so there is one row more than sets of bits.
using ByteShuffles = std::array<std::array<uint8_t, kPartCols>, 257>;

constexpr ByteShuffles make_byte_expansions() {
  ByteShuffles table{};
  for (size_t bits = 0; bits < 256; ++bits) {
    uint8_t rank = 0;
    for (size_t col = 0; col < kPartCols; ++col) {
      table[bits][col] = (bits >> col & 1U) != 0 ? rank++ : uint8_t{0x80};
    }
  }
  return table;
}

alignas(64) constexpr ByteShuffles kByteExpansions = make_byte_expansions();

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

// Loads eight elements of 16 or 8 bits.
template <typename Raw>
FLASH_LLM_AVX2 inline __m128i load_part(const Raw* from) {
  const auto* vector = reinterpret_cast<const __m128i*>(from);
  return sizeof(Raw) == 2 ? _mm_loadu_si128(vector) : _mm_loadl_epi64(vector);
}

template <typename Raw>
FLASH_LLM_AVX2 inline __m128i expansion_of(uint32_t bits) {
  if constexpr (sizeof(Raw) == 2) {
    return _mm_load_si128(reinterpret_cast<const __m128i*>(kExpansions[bits].data()));
  } else {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(kByteExpansions[bits].data()));
  }
}

template <ValueType kType>
FLASH_LLM_AVX2 inline __m256 widen(__m128i elements) {
  if constexpr (value_traits(kType).kind == ValueKind::kFp8E4m3) {
    // Shifted into place, the bits are an fp16 number of 2^-8 times the value.
    const __m128i high = _mm_unpacklo_epi8(_mm_setzero_si128(), elements);
    const __m128i halves =
        _mm_and_si128(_mm_srai_epi16(high, 1), _mm_set1_epi16(static_cast<int16_t>(0xBF80)));
    return _mm256_mul_ps(_mm256_cvtph_ps(halves), _mm256_set1_ps(0x1p8F));
  } else if constexpr (is_quantized(kType)) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(elements));
  } else if constexpr (kType == ValueType::kFloat16) {
    return _mm256_cvtph_ps(elements);
  } else {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(elements), 16));
  }
}

// Reads the values of a row. Near the payload's end they are copied first, so that no load reads
// past it.
template <bool kNearEnd, typename Raw = uint16_t>
struct Values {
  const Raw* next;
  const Raw* end;

  FLASH_LLM_AVX2 inline __m128i load() const {
    if (!kNearEnd) return load_part(next);
    Raw copy[kPartCols] = {};
    const auto left = std::min<std::ptrdiff_t>(end - next, kPartCols);
    if (left > 0) std::memcpy(copy, next, static_cast<size_t>(left) * sizeof(Raw));
    return load_part(copy);
  }
  FLASH_LLM_AVX2 inline void skip(uint32_t mask) {
    const int count = __builtin_popcount(mask);
    next += kNearEnd ? std::min<std::ptrdiff_t>(end - next, count) : count;
  }
  // The elements of the next eight columns, of which those in `bits` are stored. Bytes: in the
  // lower half.
  FLASH_LLM_AVX2 inline __m128i take(uint32_t bits) {
    const __m128i elements = _mm_shuffle_epi8(load(), expansion_of<Raw>(bits));
    skip(bits);
    return elements;
  }
  // The same as fp32.
  template <ValueType kType>
  FLASH_LLM_AVX2 inline __m256 take_wide(uint32_t bits) {
    if constexpr (kType != ValueType::kBfloat16) {
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

// The int4 values of a row, as bytes. (Cutting the nibbles of each part from memory instead takes
// longer: 4096x4096 at 50 % zeros and one token 4.1 instead of 2.9 ms on one core, EPYC with AVX2,
// 2026-11-30.)
template <bool kNearEnd>
FLASH_LLM_AVX2 inline void take_nibbles(uint32_t mask, Values<kNearEnd, uint8_t>& values,
                                        uint8_t (&bytes)[kGroupCols]) {
  constexpr std::ptrdiff_t kNibbleBytes = kGroupCols / 2;
  uint8_t copy[kNibbleBytes];
  const uint8_t* from = values.next;
  if (kNearEnd) {
    const auto left = std::min(values.end - values.next, kNibbleBytes);
    std::memset(copy, 0, sizeof(copy));
    if (left > 0) std::memcpy(copy, from, static_cast<size_t>(left));
    from = copy;
  }
  const __m256i pairs =
      _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m256i both = _mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4));
  const __m256i nibbles = _mm256_and_si256(both, _mm256_set1_epi8(0x0F));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes),
                      _mm256_sub_epi8(nibbles, _mm256_set1_epi8(8)));
  const std::ptrdiff_t count = (__builtin_popcount(mask) + 1) / 2;
  values.next += kNearEnd ? std::min(values.end - values.next, count) : count;
}

// The values of a row in the next group, which `values` moves past. `bytes` is memory for those of
// int4.
template <ValueType kType, bool kNearEnd>
FLASH_LLM_AVX2 inline auto take_row(uint32_t mask, Values<kNearEnd, RawOf<kType>>& values,
                                    uint8_t (&bytes)[kGroupCols]) {
  if constexpr (value_traits(kType).bits == 4) {
    take_nibbles(mask, values, bytes);
    return Values<false, uint8_t>{bytes, bytes + kGroupCols};
  } else {
    const Values<kNearEnd, RawOf<kType>> row = values;
    values.skip(mask);
    return row;
  }
}

// How many groups can be read by loads of eight values that all stay within the payload.
template <typename Raw>
int64_t groups_before_end(const Raw* next, const Raw* end) {
  return (end - next) / (kBlockRows * kGroupCols);
}

template <ValueType kType>
FLASH_LLM_AVX2 void widen_group(const uint16_t* group, float* widened) {
  for (int64_t col = 0; col < kGroupCols; col += kPartCols) {
    const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(group + col));
    _mm256_storeu_ps(widened + col, widen<kType>(part));
  }
}

// Calls sums.add_group for `groups` groups, whose masks and values begin at those of `block`, and
// returns where their values end.
template <int kTokens, typename Raw, typename X, typename Sums>
FLASH_LLM_AVX2 inline const Raw* add_groups(const RowBlockOf<Raw>& block, int64_t groups,
                                            const X* x, Sums& sums) {
  const uint32_t* masks = block.masks;
  const uint32_t* const masks_end = masks + groups * kBlockRows;
  Values<false, Raw> values{block.values, block.end};
  while (masks != masks_end) {
    const int64_t safe = groups_before_end(values.next, values.end);
    if (safe == 0) break;
    const uint32_t* const stop = masks + std::min<int64_t>(masks_end - masks, safe * kBlockRows);
    for (; masks != stop; masks += kBlockRows, x += kTokens * kGroupCols) {
      if constexpr (Sums::kReadsWholeBlock) prefetch_block(block, masks, values.next);
      sums.add_group(masks, x, values);
    }
  }
  Values<true, Raw> last{values.next, values.end};
  for (; masks != masks_end; masks += kBlockRows, x += kTokens * kGroupCols) {
    sums.add_group(masks, x, last);
  }
  return last.next;
}

template <ValueType kType, int kTokens>
struct Block {
  using Raw = RawOf<kType>;
  // Whether groups of columns have scales, by which elements are multiplied before X.
  static constexpr bool kGrouped = value_traits(kType).scales == ScaleGroup::kRowGroup;
  static constexpr bool kReadsWholeBlock = true;
  __m256 sums[kBlockRows][kTokens];
  float scales[kBlockRows];
  const uint32_t* next_scales;
  int left = 0;  // groups of 32 columns that have `scales`

  FLASH_LLM_AVX2 inline void load_scales() {
    if (left == 0) {
      left = kScaleGroupCols / static_cast<int>(kGroupCols);
      _mm_storeu_ps(scales,
                    _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(next_scales))));
      next_scales += kBlockRows / 2;
    }
    --left;
  }

  template <bool kNearEnd>
  FLASH_LLM_AVX2 inline void add_group(const uint32_t* masks, const float* x,
                                       Values<kNearEnd, Raw>& values) {
    if constexpr (kGrouped) load_scales();
    uint8_t bytes[kBlockRows][kGroupCols];
    decltype(take_row<kType>(0U, values, bytes[0])) rows[kBlockRows] = {};
#pragma GCC unroll 4
    for (int row = 0; row < kBlockRows; ++row) {
      rows[row] = take_row<kType>(masks[row], values, bytes[row]);
    }
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      __m256 input[kTokens];
      for (int token = 0; token < kTokens; ++token) {
        input[token] = _mm256_loadu_ps(x + token * kGroupCols + part * kPartCols);
      }
#pragma GCC unroll 4
      for (int row = 0; row < kBlockRows; ++row) {
        __m256 w = rows[row].template take_wide<kType>(masks[row] >> (8 * part) & 0xFFU);
        if constexpr (kGrouped) w = _mm256_mul_ps(w, _mm256_broadcast_ss(scales + row));
        for (int token = 0; token < kTokens; ++token) {
          sums[row][token] = _mm256_fmadd_ps(w, input[token], sums[row][token]);
        }
      }
    }
  }

  FLASH_LLM_AVX2 static void multiply(const RowBlockOf<Raw>& block, int64_t groups, const float* x,
                                      float* out) {
    Block sums;
    sums.next_scales = block.scales;
    for (auto& row : sums.sums) {
      for (auto& token : row) token = _mm256_setzero_ps();
    }
    add_groups<kTokens>(block, groups, x, sums);
    for (int token = 0; token < kTokens; ++token) {
      const __m256 ab = _mm256_hadd_ps(sums.sums[0][token], sums.sums[1][token]);
      const __m256 cd = _mm256_hadd_ps(sums.sums[2][token], sums.sums[3][token]);
      const __m256 abcd = _mm256_hadd_ps(ab, cd);
      _mm_storeu_ps(out + token * kBlockRows,
                    _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
    }
  }
};

template <ValueType kType>
using MultiplyBlock = void (*)(const RowBlockOf<RawOf<kType>>&, int64_t groups, const float* x,
                               float* out);

template <ValueType kType>
constexpr MultiplyBlock<kType> kMultiplyBlock[kMaxTokens] = {
    Block<kType, 1>::multiply, Block<kType, 2>::multiply, Block<kType, 3>::multiply};

template <ValueType kType>
void multiply(const RowBitmapProduct& product) {
  const int64_t groups = num_groups(product.weight.k);
  using Raw = RawOf<kType>;
  multiply_blocks<Raw>(product, [&](const RowBitmapTokens& tokens, const auto& block, float* out) {
    kMultiplyBlock<kType>[tokens.count - 1](block, groups, static_cast<const float*>(tokens.x),
                                            out);
  });
}

// Rounds as RowBitmapKernel::quantize says: adding 1.5 * 2^23, whose neighbours are integers.
template <ValueType kType>
FLASH_LLM_AVX2 void quantize_group(const uint16_t* group, float inverse, int8_t* quantized) {
  __m256i parts[kParts];
  const __m256 magic = _mm256_set1_ps(0x1.8p23F);
  for (int part = 0; part < kParts; ++part) {
    const auto* from = reinterpret_cast<const __m128i*>(group + part * kPartCols);
    const __m256 rounded =
        _mm256_fmadd_ps(widen<kType>(_mm_loadu_si128(from)), _mm256_set1_ps(inverse), magic);
    parts[part] = _mm256_sub_epi32(_mm256_castps_si256(rounded), _mm256_castps_si256(magic));
  }
  // Packing works in each half of a vector; the permutation undoes it.
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(parts[0], parts[1]),
                                           _mm256_packs_epi32(parts[2], parts[3]));
  const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_store_si256(reinterpret_cast<__m256i*>(quantized),
                     _mm256_permutevar8x32_epi32(bytes, in_order));
}

// The 32 elements of a row in a group, as bytes.
template <bool kNearEnd>
FLASH_LLM_AVX2 inline __m256i take_bytes(const uint32_t& mask, Values<kNearEnd, uint8_t>& values) {
  const auto* bits = reinterpret_cast<const uint8_t*>(&mask);
  const __m128i a = values.take(bits[0]), b = values.take(bits[1]);
  const __m128i c = values.take(bits[2]), d = values.take(bits[3]);
  return _mm256_set_m128i(_mm_unpacklo_epi64(c, d), _mm_unpacklo_epi64(a, b));
}

// int8 X. Products of |w| and x with the sign of w are added in pairs, whose sums fit 16 bits: they
// are at most 2 * 127 * 127.
template <int kTokens>
struct Int8Block {
  static constexpr bool kReadsWholeBlock = true;
  __m256i sums[kBlockRows][kTokens];

  FLASH_LLM_AVX2 inline void clear() {
    for (auto& row : sums) {
      for (auto& token : row) token = _mm256_setzero_si256();
    }
  }

  FLASH_LLM_AVX2 inline void add_row(int row, __m256i w, const int8_t* x) {
    const __m256i magnitudes = _mm256_abs_epi8(w);
    for (int token = 0; token < kTokens; ++token) {
      const auto* from = reinterpret_cast<const __m256i*>(x + token * kGroupCols);
      const __m256i pairs =
          _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(_mm256_load_si256(from), w));
      sums[row][token] =
          _mm256_add_epi32(sums[row][token], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
  }

  template <bool kNearEnd>
  FLASH_LLM_AVX2 inline void add_group(const uint32_t* masks, const int8_t* x,
                                       Values<kNearEnd, uint8_t>& values) {
#pragma GCC unroll 4
    for (int row = 0; row < kBlockRows; ++row) add_row(row, take_bytes(masks[row], values), x);
  }

  FLASH_LLM_AVX2 inline void store(const RowBitmapTokens& tokens, float* out) const {
    for (int token = 0; token < kTokens; ++token) {
      const __m256i ab = _mm256_hadd_epi32(sums[0][token], sums[1][token]);
      const __m256i cd = _mm256_hadd_epi32(sums[2][token], sums[3][token]);
      const __m256i abcd = _mm256_hadd_epi32(ab, cd);
      const __m128i total =
          _mm_add_epi32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256(abcd, 1));
      _mm_storeu_ps(out + token * kBlockRows,
                    _mm_mul_ps(_mm_cvtepi32_ps(total), _mm_set1_ps(tokens.scales[token])));
    }
  }

  FLASH_LLM_AVX2 static void multiply(const RowBlockOf<uint8_t>& block, int64_t groups,
                                      const RowBitmapTokens& tokens, float* out) {
    Int8Block sums;
    sums.clear();
    add_groups<kTokens>(block, groups, static_cast<const int8_t*>(tokens.x), sums);
    sums.store(tokens, out);
  }

  // Adds the products of a panel to the sums in `kept`, [4 rows][tokens], and writes them to `out`
  // unless it is null.
  FLASH_LLM_AVX2 static void multiply_panel(const __m256i* elements, int64_t groups,
                                            const RowBitmapTokens& tokens, int64_t first_group,
                                            __m256i* kept, float* out) {
    Int8Block sums;
    sums.clear();
    if (first_group > 0) std::memcpy(&sums, kept, sizeof(sums));
    const auto* x = static_cast<const int8_t*>(tokens.x) + first_group * kTokens * kGroupCols;
    for (; groups > 0; --groups, x += kTokens * kGroupCols, elements += kBlockRows) {
#pragma GCC unroll 4
      for (int row = 0; row < kBlockRows; ++row) sums.add_row(row, elements[row], x);
    }
    std::memcpy(kept, &sums, sizeof(sums));
    if (out != nullptr) sums.store(tokens, out);
  }
};

using MultiplyInt8Block = void (*)(const RowBlockOf<uint8_t>&, int64_t groups,
                                   const RowBitmapTokens&, float* out);

constexpr MultiplyInt8Block kMultiplyInt8Block[kMaxTokens] = {
    Int8Block<1>::multiply, Int8Block<2>::multiply, Int8Block<3>::multiply};

using MultiplyInt8Panel = void (*)(const __m256i* elements, int64_t groups, const RowBitmapTokens&,
                                   int64_t first_group, __m256i* kept, float* out);

constexpr MultiplyInt8Panel kMultiplyInt8Panel[kMaxTokens] = {
    Int8Block<1>::multiply_panel, Int8Block<2>::multiply_panel, Int8Block<3>::multiply_panel};

// More tokens than registers hold sums of: a panel, some columns of a block of rows, is decoded
// into the first-level cache and multiplied by all tokens. Between panels the sums are kept in
// memory.
constexpr int64_t kPanelGroups = 64;  // 8 KB

struct Panel {
  static constexpr bool kReadsWholeBlock = false;
  __m256i elements[kPanelGroups * kBlockRows];
  __m256i* next = elements;

  template <bool kNearEnd>
  FLASH_LLM_AVX2 inline void add_group(const uint32_t* masks, const int8_t*,
                                       Values<kNearEnd, uint8_t>& values) {
    if (!kNearEnd) prefetch_soon(values.next);
#pragma GCC unroll 4
    for (int row = 0; row < kBlockRows; ++row) *next++ = take_bytes(masks[row], values);
  }

  // Decodes the next groups of a block and moves its masks and values to the groups after them.
  FLASH_LLM_AVX2 void decode(RowBlockOf<uint8_t>& block, int64_t groups) {
    next = elements;
    block.values = add_groups<0>(block, groups, static_cast<const int8_t*>(nullptr), *this);
    block.masks += groups * kBlockRows;
  }
};

FLASH_LLM_AVX2 void multiply_int8_panels(const RowBitmapProduct& product) {
  const int64_t groups = num_groups(product.weight.k), blocks = product.last - product.first;
  Panel panel;
  auto* kept = reinterpret_cast<__m256i*>(product.kept);
  for (int64_t i = 0; i < blocks; ++i) {
    RowBlockOf<uint8_t> block = row_block<uint8_t>(product.weight, product.first + i);
    if (block.masks == nullptr) {
      float* out = product.sums;
      for (int64_t j = 0; j < product.token_blocks; ++j) {
        const RowBitmapTokens& tokens = product.tokens[j];
        sum_nothing(tokens, out + i * tokens.count * kBlockRows);
        out += blocks * tokens.count * kBlockRows;
      }
      continue;
    }
    for (int64_t group = 0; group < groups; group += kPanelGroups) {
      const int64_t count = std::min(kPanelGroups, groups - group);
      panel.decode(block, count);
      float* out = product.sums;
      for (int64_t j = 0; j < product.token_blocks; ++j) {
        const RowBitmapTokens& tokens = product.tokens[j];
        const int64_t num_sums = tokens.count * kBlockRows;
        kMultiplyInt8Panel[tokens.count - 1](
            panel.elements, count, tokens, group, kept + j * kMaxTokens * kBlockRows,
            group + count == groups ? out + i * num_sums : nullptr);
        out += blocks * num_sums;
      }
    }
  }
}

void multiply_int8(const RowBitmapProduct& product) {
  if (product.token_blocks > 1) return multiply_int8_panels(product);
  const int64_t groups = num_groups(product.weight.k);
  multiply_blocks<uint8_t>(product,
                           [&](const RowBitmapTokens& tokens, const auto& block, float* out) {
                             kMultiplyInt8Block[tokens.count - 1](block, groups, tokens, out);
                           });
}

// Eight elements of the weight as 16-bit patterns: the products of int8 values and a scale, rounded
// as `dequantize` of format/element.h does.
template <ValueType kType>
FLASH_LLM_AVX2 inline __m128i dequantize_part(__m128i elements, float scale) {
  const __m256 products = _mm256_mul_ps(widen<kType>(elements), _mm256_set1_ps(scale));
  if constexpr (value_traits(kType).dense == ValueType::kFloat16) {
    return _mm256_cvtps_ph(products, _MM_FROUND_TO_NEAREST_INT);
  } else {
    const __m256i bits = _mm256_castps_si256(products);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i halves = _mm256_srli_epi32(rounded, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  }
}

template <ValueType kType, bool kNearEnd>
FLASH_LLM_AVX2 inline void decode_group(const RowBlockOf<RawOf<kType>>& block, int64_t group,
                                        int rows, int64_t k, Values<kNearEnd, RawOf<kType>>& values,
                                        uint16_t* dense) {
  const uint32_t* masks = block.masks + group * kBlockRows;
  const int64_t cols = k - group * kGroupCols;
  dense += group * kGroupCols;
  for (int row = 0; row < kBlockRows; ++row) {
    uint8_t bytes[kGroupCols];
    auto next = take_row<kType>(masks[row], values, bytes);
    if (row >= rows) continue;
    float scale = 1.0F;
    if constexpr (is_quantized(kType)) {
      scale = load_scale(kType, block.scales, row_block_scale(kType, row, group * kGroupCols));
    }
    for (int64_t part = 0; part < kParts && part * kPartCols < cols; ++part) {
      __m128i elements = next.take(masks[row] >> (8 * part) & 0xFFU);
      if constexpr (sizeof(RawOf<kType>) == 1) {
        elements = dequantize_part<kType>(elements, scale);
      }
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

// 16-bit values are copied, so one instantiation serves both types of them.
template <ValueType kType>
FLASH_LLM_AVX2 void decode_block(const RowBlockOf<RawOf<kType>>& block, int rows, int64_t k,
                                 uint16_t* dense) {
  const int64_t groups = num_groups(k);
  int64_t group = 0;
  Values<false, RawOf<kType>> values{block.values, block.end};
  while (group < groups) {
    const int64_t safe = groups_before_end(values.next, values.end);
    if (safe == 0) break;
    for (const int64_t stop = std::min(groups, group + safe); group < stop; ++group) {
      decode_group<kType>(block, group, rows, k, values, dense);
    }
  }
  for (Values<true, RawOf<kType>> last{values.next, values.end}; group < groups; ++group) {
    decode_group<kType>(block, group, rows, k, last, dense);
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

RowBitmapMultiply multiply_of(ValueType type) {
  switch (value_traits(type).kind) {
    case ValueKind::k16Bit:
      return type == ValueType::kFloat16 ? multiply<ValueType::kFloat16>
                                         : multiply<ValueType::kBfloat16>;
    case ValueKind::kInt8:
      return multiply<ValueType::kInt8Float16>;
    case ValueKind::kFp8E4m3:
      return multiply<ValueType::kFp8Float16>;
    case ValueKind::kInt4:
      break;
  }
  return multiply<ValueType::kInt4Float16>;
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

RowBitmapKernel row_bitmap_avx2(ValueType type, bool int8_x) {
  const bool half = value_traits(type).dense == ValueType::kFloat16;
  RowBitmapKernel kernel;
  if (int8_x) {
    kernel.quantize =
        half ? quantize_group<ValueType::kFloat16> : quantize_group<ValueType::kBfloat16>;
  } else {
    kernel.widen = half ? widen_group<ValueType::kFloat16> : widen_group<ValueType::kBfloat16>;
  }
  kernel.max_tokens = kMaxTokens;
  kernel.keeps_sums = int8_x;
  kernel.multiply = int8_x ? multiply_int8 : multiply_of(type);
  kernel.decode_block = decode_block<ValueType::kBfloat16>;
  switch (value_traits(type).kind) {
    case ValueKind::kInt8:
      kernel.decode_quantized_block =
          half ? decode_block<ValueType::kInt8Float16> : decode_block<ValueType::kInt8Bfloat16>;
      break;
    case ValueKind::kFp8E4m3:
      kernel.decode_quantized_block =
          half ? decode_block<ValueType::kFp8Float16> : decode_block<ValueType::kFp8Bfloat16>;
      break;
    case ValueKind::kInt4:
      kernel.decode_quantized_block =
          half ? decode_block<ValueType::kInt4Float16> : decode_block<ValueType::kInt4Bfloat16>;
      break;
    case ValueKind::k16Bit:
      break;
  }
  kernel.pack_block = row_bitmap_avx2_pack_block;
  return kernel;
}

}  // namespace flash_llm

#else

namespace flash_llm {

RowBitmapKernel row_bitmap_avx2(ValueType, bool) { return {}; }

PackedBlock row_bitmap_avx2_pack_block(const uint16_t*, int64_t, int, int64_t, uint32_t*, uint16_t*,
                                       const uint16_t*) {
  return {};
}

}  // namespace flash_llm

#endif
