// The row bitmap's kernels of quantised values for AVX-512 VBMI2 and VNNI: one vpexpandb decodes a
// group of two neighbouring rows, whose masks are one mask of 64 bits. Nibbles become bytes first.
//
// Each sum of products of four neighbouring bytes is one vpdpbusd, which multiplies unsigned bytes
// by signed ones. Lanes 0 ... 7 of a vector of sums belong to the first of the two rows, the others
// to the second.
#include "cpu/row_bitmap_kernels.h"

#if defined(__x86_64__)

#include <algorithm>
#include <cstddef>
#include <type_traits>

// GCC 12 warns of registers that its own header leaves undefined on purpose.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "format/element.h"

#define FLASH_LLM_AVX512                                                           \
  __attribute__((                                                                  \
      target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512vnni,avx2,fma," \
             "f16c,popcnt")))

namespace flash_llm {
namespace {

constexpr int kMaxTokens = 8;
static_assert(kMaxTokens <= kMaxRowTokens);
constexpr int kPairs = kBlockRows / 2;  // of rows of a block
constexpr int64_t kHalfLanes = 8;       // 32-bit numbers of a row in a vector
constexpr int kGroupsOfScale = kScaleGroupCols / static_cast<int>(kGroupCols);

// See row_bitmap_avx512.cpp on zero masking.
FLASH_LLM_AVX512 inline __m512i opaque_zero() {
  __m512i zero = _mm512_setzero_si512();
  __asm__("" : "+v"(zero));
  return zero;
}

// Reads the values of two rows at a time. Near the payload's end no load reads past it.
template <bool kNearEnd>
struct Values {
  const uint8_t* next;
  const uint8_t* end;

  // The nibbles of a row in the next group.
  FLASH_LLM_AVX512 inline __m128i take_nibbles(uint32_t mask) {
    const auto left = static_cast<uint64_t>(end - next);
    const auto readable = static_cast<__mmask16>(left < 16 ? (1U << left) - 1 : 0xFFFFU);
    const __m128i nibbles = kNearEnd ? _mm_maskz_loadu_epi8(readable, next)
                                     : _mm_loadu_si128(reinterpret_cast<const __m128i*>(next));
    const auto count = static_cast<uint64_t>((__builtin_popcount(mask) + 1) / 2);
    next += kNearEnd ? std::min(left, count) : count;
    return nibbles;
  }

  // The elements of two rows, which are `absent` where none is stored. Nibbles as they are.
  template <ValueKind kKind>
  FLASH_LLM_AVX512 inline __m512i take_pair(const uint32_t* masks, __m512i absent) {
    if constexpr (kKind == ValueKind::kInt4) {
      const __m128i first = take_nibbles(masks[0]), second = take_nibbles(masks[1]);
      const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_set_m128i(second, first));
      const __m512i both = _mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4));
      const __m512i nibbles = _mm512_and_si512(both, _mm512_set1_epi8(0x0F));
      // Not one expansion: the nibbles of the second row begin at byte 32.
      const __m256i none = _mm512_castsi512_si256(absent);
      const __m256i low = _mm256_mask_expand_epi8(none, masks[0], _mm512_castsi512_si256(nibbles));
      const __m256i high =
          _mm256_mask_expand_epi8(none, masks[1], _mm512_extracti64x4_epi64(nibbles, 1));
      return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    } else {
      return take(masks[0] | uint64_t{masks[1]} << 32, absent);
    }
  }

 private:
  FLASH_LLM_AVX512 inline __m512i take(uint64_t mask, __m512i zero) {
    const auto left = static_cast<uint64_t>(end - next);
    const __mmask64 readable = left < 64 ? (uint64_t{1} << left) - 1 : ~uint64_t{0};
    const __m512i values =
        kNearEnd ? _mm512_maskz_loadu_epi8(readable, next) : _mm512_loadu_si512(next);
    const auto count = static_cast<uint64_t>(__builtin_popcountll(mask));
    next += kNearEnd ? std::min(left, count) : count;
    return _mm512_mask_expand_epi8(zero, mask, values);
  }
};

// How many groups can be read by loads of 64 bytes that all stay within the payload.
int64_t groups_before_end(const uint8_t* next, const uint8_t* end) {
  return (end - next) / (kBlockRows * kGroupCols);
}

// What take_pair returns where no value is stored.
template <ValueKind kKind>
FLASH_LLM_AVX512 inline __m512i absent_value() {
  return kKind == ValueKind::kInt4 ? _mm512_set1_epi8(8) : opaque_zero();
}

// Calls sums.add_group for each group of a block.
template <int kTokens, typename Sums>
FLASH_LLM_AVX512 inline void add_groups(const RowBlockOf<uint8_t>& block, int64_t groups,
                                        const typename Sums::X* x, Sums& sums) {
  const __m512i absent = absent_value<Sums::kKind>();
  const uint32_t* masks = block.masks;
  const uint32_t* const masks_end = masks + groups * kBlockRows;
  Values<false> values{block.values, block.end};
  while (masks != masks_end) {
    const int64_t safe = groups_before_end(values.next, values.end);
    if (safe == 0) break;
    const uint32_t* const stop = masks + std::min<int64_t>(masks_end - masks, safe * kBlockRows);
    for (; masks != stop; masks += kBlockRows, x += kTokens * kGroupCols) {
      prefetch_block(block, masks, values.next);
      sums.add_group(masks, x, absent, values);
    }
  }
  Values<true> last{values.next, values.end};
  for (; masks != masks_end; masks += kBlockRows, x += kTokens * kGroupCols) {
    sums.add_group(masks, x, absent, last);
  }
}

// int8 values and X. 128 is added to each element of the weight, zeros included, which makes it
// unsigned; the caller subtracts 128 times the token's sum. Sums may wrap around in between.
template <int kTokens>
struct Int8X {
  static constexpr ValueKind kKind = ValueKind::kInt8;
  using X = int8_t;
  __m512i sums[kPairs][kTokens];

  FLASH_LLM_AVX512 inline void begin(const RowBlockOf<uint8_t>&) {
    for (auto& pair : sums) {
      for (auto& token : pair) token = _mm512_setzero_si512();
    }
  }

  template <bool kNearEnd>
  FLASH_LLM_AVX512 inline void add_group(const uint32_t* masks, const int8_t* x, __m512i absent,
                                         Values<kNearEnd>& values) {
    __m512i w[kPairs];
#pragma GCC unroll 2
    for (int pair = 0; pair < kPairs; ++pair) {
      const __m512i elements =
          values.template take_pair<kKind>(masks + ptrdiff_t{2} * pair, absent);
      w[pair] = _mm512_xor_si512(elements, _mm512_set1_epi8(-128));
    }
#pragma GCC unroll 8
    for (int token = 0; token < kTokens; ++token) {
      const auto* from = reinterpret_cast<const __m256i*>(x + token * kGroupCols);
      const __m512i input = _mm512_broadcast_i64x4(_mm256_load_si256(from));
#pragma GCC unroll 2
      for (int pair = 0; pair < kPairs; ++pair) {
        sums[pair][token] = _mm512_dpbusd_epi32(sums[pair][token], w[pair], input);
      }
    }
  }

  void end() {}

  // The sums of four rows, of 32-bit integers.
  FLASH_LLM_AVX512 inline __m128 rows_of(int token, const RowBitmapTokens& tokens) const {
    const __m512i a = sums[0][token], b = sums[1][token];
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i halves = _mm512_add_epi32(ab, _mm512_shuffle_epi32(ab, _MM_PERM_BADC));
    const __m128i rows_02 =
        _mm_add_epi32(_mm512_castsi512_si128(halves), _mm512_extracti32x4_epi32(halves, 1));
    const __m128i rows_13 =
        _mm_add_epi32(_mm512_extracti32x4_epi32(halves, 2), _mm512_extracti32x4_epi32(halves, 3));
    const auto excess = static_cast<int32_t>(128U * static_cast<uint32_t>(tokens.totals[token]));
    const __m128i rows =
        _mm_sub_epi32(_mm_unpacklo_epi32(rows_02, rows_13), _mm_set1_epi32(excess));
    return _mm_mul_ps(_mm_cvtepi32_ps(rows), _mm_set1_ps(tokens.scales[token]));
  }
};

// X in fp32. A group is multiplied in four steps of eight columns, in an order in which its
// elements are easy to convert; X of a group is in this order too.
constexpr int kSteps = 4;

// Integers: vpdpbusd with weights of 1 and 0 extends every fourth byte of a vector to 32 bits, the
// first, second, third or fourth. So the order is: columns 0, 4, 8, ... 28, then 1, 5, ... 29.
struct IntegerSteps {
  static constexpr float kUnit = 1.0F;  // what converted elements are divided by
  FLASH_LLM_AVX512 static inline void convert(__m512i elements, __m512* w) {
#pragma GCC unroll 4
    for (int step = 0; step < kSteps; ++step) {
      const __m512i ones = _mm512_set1_epi32(1 << (8 * step));
      w[step] = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, elements));
    }
  }
  static constexpr int column(int i) { return i % 8 * 4 + i / 8; }
};

// fp8: shifted into place, the bits are an fp16 number of 2^-8 times the value. So the order is:
// columns 0, 2, ... 14, then 16, 18, ... 30, then the odd ones.
struct Fp8Steps {
  static constexpr float kUnit = 0x1p8F;
  FLASH_LLM_AVX512 static inline void convert(__m512i elements, __m512* w) {
    const __m512i bits = _mm512_set1_epi16(static_cast<int16_t>(0xBF80));
    // Columns 0 ... 15 of both rows, then the others.
    const __m512i halves = _mm512_shuffle_i64x2(elements, elements, 0xD8);
    const __m512i even = _mm512_and_si512(_mm512_srai_epi16(_mm512_slli_epi16(halves, 8), 1), bits);
    const __m512i odd = _mm512_and_si512(_mm512_srai_epi16(halves, 1), bits);
    w[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(even));
    w[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(even, 1));
    w[2] = _mm512_cvtph_ps(_mm512_castsi512_si256(odd));
    w[3] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(odd, 1));
  }
  static constexpr int column(int i) { return i % 16 * 2 + i / 16; }
};

// With kGrouped, groups of columns have scales: the sums of a group are multiplied by them and
// added to the totals.
template <ValueKind kValueKind, int kTokens>
struct WideX {
  static constexpr ValueKind kKind = kValueKind;
  static constexpr bool kGrouped = kKind == ValueKind::kInt4;
  using Steps = std::conditional_t<kKind == ValueKind::kFp8E4m3, Fp8Steps, IntegerSteps>;
  using X = float;
  // With few tokens the steps have sums of their own: more independent chains of additions hide
  // their latency.
  static constexpr int kSums = kTokens <= 2 ? 2 : 1;
  __m512 sums[kPairs][kTokens][kSums];
  __m512 totals[kPairs][std::max(1, kGrouped* kTokens)];
  const uint32_t* scales;  // of the next group of columns
  int left;                // groups of 32 columns up to the end of these

  FLASH_LLM_AVX512 inline void clear_sums() {
    for (auto& pair : sums) {
      for (auto& token : pair) {
        for (auto& sum : token) sum = _mm512_setzero_ps();
      }
    }
  }

  FLASH_LLM_AVX512 inline void begin(const RowBlockOf<uint8_t>& block) {
    clear_sums();
    if constexpr (kGrouped) {
      for (auto& pair : totals) {
        for (auto& token : pair) token = _mm512_setzero_ps();
      }
      scales = block.scales;
      left = kGroupsOfScale;
    }
  }

  // Ends a group of columns that share scales.
  FLASH_LLM_AVX512 inline void add_to_totals() {
    const __m512 rows = _mm512_castps128_ps512(
        _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales))));
#pragma GCC unroll 2
    for (int pair = 0; pair < kPairs; ++pair) {
      const __m512i rows_of_lanes =
          _mm512_add_epi32(_mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
                           _mm512_set1_epi32(2 * pair));
      const __m512 scale = _mm512_permutexvar_ps(rows_of_lanes, rows);
      for (int token = 0; token < kTokens; ++token) {
        totals[pair][token] = _mm512_fmadd_ps(sum_of(pair, token), scale, totals[pair][token]);
      }
    }
    clear_sums();
    scales += kBlockRows / 2;
    left = kGroupsOfScale;
  }

  template <bool kNearEnd>
  FLASH_LLM_AVX512 inline void add_group(const uint32_t* masks, const float* x, __m512i absent,
                                         Values<kNearEnd>& values) {
    __m512 w[kPairs][kSteps];
#pragma GCC unroll 2
    for (int pair = 0; pair < kPairs; ++pair) {
      __m512i elements = values.template take_pair<kKind>(masks + ptrdiff_t{2} * pair, absent);
      if (kKind == ValueKind::kInt4) elements = _mm512_sub_epi8(elements, absent);
      Steps::convert(elements, w[pair]);
    }
#pragma GCC unroll 4
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 8
      for (int token = 0; token < kTokens; ++token) {
        const float* from = x + token * kGroupCols + step * kHalfLanes;
        const __m512 input = _mm512_broadcast_f32x8(_mm256_load_ps(from));
#pragma GCC unroll 2
        for (int pair = 0; pair < kPairs; ++pair) {
          __m512& sum = sums[pair][token][step % kSums];
          sum = _mm512_fmadd_ps(w[pair][step], input, sum);
        }
      }
    }
    if constexpr (kGrouped) {
      if (--left == 0) add_to_totals();
    }
  }

  FLASH_LLM_AVX512 inline __m512 sum_of(int pair, int token) const {
    const auto& parts = sums[pair][token];
    return kSums == 1 ? parts[0] : _mm512_add_ps(parts[0], parts[kSums - 1]);
  }

  FLASH_LLM_AVX512 inline void end() {
    if constexpr (kGrouped) {
      if (left < kGroupsOfScale) add_to_totals();
    }
  }

  FLASH_LLM_AVX512 inline __m128 rows_of(int token, const RowBitmapTokens&) const {
    const __m512 a = kGrouped ? totals[0][token] : sum_of(0, token);
    const __m512 b = kGrouped ? totals[1][token] : sum_of(1, token);
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 halves = _mm512_add_ps(ab, _mm512_shuffle_ps(ab, ab, 0x4E));
    const __m128 rows_02 =
        _mm_add_ps(_mm512_castps512_ps128(halves), _mm512_extractf32x4_ps(halves, 1));
    const __m128 rows_13 =
        _mm_add_ps(_mm512_extractf32x4_ps(halves, 2), _mm512_extractf32x4_ps(halves, 3));
    return _mm_mul_ps(_mm_unpacklo_ps(rows_02, rows_13), _mm_set1_ps(Steps::kUnit));
  }
};

template <int kTokens>
using WideInt8 = WideX<ValueKind::kInt8, kTokens>;
template <int kTokens>
using WideFp8 = WideX<ValueKind::kFp8E4m3, kTokens>;
template <int kTokens>
using WideInt4 = WideX<ValueKind::kInt4, kTokens>;

template <typename Sums, int kTokens>
FLASH_LLM_AVX512 void multiply_block(const RowBlockOf<uint8_t>& block, int64_t groups,
                                     const RowBitmapTokens& tokens, float* out) {
  Sums sums;
  sums.begin(block);
  add_groups<kTokens>(block, groups, static_cast<const typename Sums::X*>(tokens.x), sums);
  sums.end();
#pragma GCC unroll 8
  for (int token = 0; token < kTokens; ++token) {
    _mm_storeu_ps(out + token * kBlockRows, sums.rows_of(token, tokens));
  }
}

using MultiplyBlock = void (*)(const RowBlockOf<uint8_t>&, int64_t groups, const RowBitmapTokens&,
                               float* out);

template <template <int> class Sums>
constexpr MultiplyBlock kMultiplyBlock[kMaxTokens] = {
    multiply_block<Sums<1>, 1>, multiply_block<Sums<2>, 2>, multiply_block<Sums<3>, 3>,
    multiply_block<Sums<4>, 4>, multiply_block<Sums<5>, 5>, multiply_block<Sums<6>, 6>,
    multiply_block<Sums<7>, 7>, multiply_block<Sums<8>, 8>};

template <template <int> class Sums>
void multiply(const RowBitmapProduct& product) {
  const int64_t groups = num_groups(product.weight.k);
  multiply_blocks<uint8_t>(product,
                           [&](const RowBitmapTokens& tokens, const auto& block, float* out) {
                             kMultiplyBlock<Sums>[tokens.count - 1](block, groups, tokens, out);
                           });
}

// 16 elements of X.
template <ValueType kType>
FLASH_LLM_AVX512 inline __m512 load_wide(const uint16_t* from) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  if constexpr (kType == ValueType::kFloat16) {
    return _mm512_cvtph_ps(raw);
  } else {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
  }
}

// In the order of Steps.
template <ValueType kType, typename Steps>
FLASH_LLM_AVX512 void widen_group(const uint16_t* group, float* widened) {
  const __m512 low = load_wide<kType>(group), high = load_wide<kType>(group + 16);
  alignas(64) int32_t columns[kGroupCols];
  for (int i = 0; i < kGroupCols; ++i) columns[i] = Steps::column(i);
  for (int64_t i = 0; i < kGroupCols; i += 16) {
    const __m512 part = _mm512_permutex2var_ps(low, _mm512_load_si512(columns + i), high);
    _mm512_store_ps(widened + i, part);
  }
}

// Rounds as RowBitmapKernel::quantize says: adding 1.5 * 2^23, whose neighbours are integers.
template <ValueType kType>
FLASH_LLM_AVX512 void quantize_group(const uint16_t* group, float inverse, int8_t* quantized) {
  const __m512 magic = _mm512_set1_ps(0x1.8p23F), factor = _mm512_set1_ps(inverse);
  for (int64_t col = 0; col < kGroupCols; col += 16) {
    const __m512 rounded = _mm512_fmadd_ps(load_wide<kType>(group + col), factor, magic);
    _mm_store_si128(reinterpret_cast<__m128i*>(quantized + col),
                    _mm512_cvtepi32_epi8(_mm512_castps_si512(rounded)));  // the low bytes
  }
}

}  // namespace

RowBitmapKernel row_bitmap_avx512_quantized(ValueType type, bool int8_x) {
  const bool half = value_traits(type).dense == ValueType::kFloat16;
  RowBitmapKernel kernel;
  kernel.widen = half ? widen_group<ValueType::kFloat16, IntegerSteps>
                      : widen_group<ValueType::kBfloat16, IntegerSteps>;
  switch (value_traits(type).kind) {
    case ValueKind::kInt8:
      kernel.multiply = multiply<WideInt8>;
      break;
    case ValueKind::kFp8E4m3:
      kernel.widen = half ? widen_group<ValueType::kFloat16, Fp8Steps>
                          : widen_group<ValueType::kBfloat16, Fp8Steps>;
      kernel.multiply = multiply<WideFp8>;
      break;
    case ValueKind::kInt4:
      kernel.multiply = multiply<WideInt4>;
      break;
    case ValueKind::k16Bit:
      break;
  }
  if (int8_x) {
    kernel.widen = nullptr;
    kernel.quantize =
        half ? quantize_group<ValueType::kFloat16> : quantize_group<ValueType::kBfloat16>;
    kernel.multiply = multiply<Int8X>;
  }
  kernel.max_tokens = kMaxTokens;
  kernel.decode_quantized_block = row_bitmap_avx2(type, int8_x).decode_quantized_block;
  return kernel;
}

}  // namespace flash_llm

#else

namespace flash_llm {

RowBitmapKernel row_bitmap_avx512_quantized(ValueType, bool) { return {}; }

}  // namespace flash_llm

#endif
