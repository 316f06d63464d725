// The row bitmap's kernels of int8 values for AVX-512 VBMI2 and VNNI: one vpexpandb decodes a group
// of two neighbouring rows, whose masks are one mask of 64 bits.
//
// Each sum of products of four neighbouring bytes is one vpdpbusd, which multiplies unsigned bytes
// by signed ones. Lanes 0 ... 7 of a vector of sums belong to the first of the two rows, the others
// to the second.
#include "cpu/row_bitmap_kernels.h"

#if defined(__x86_64__)

#include <algorithm>
#include <cstddef>

// GCC 12 warns of registers that its own header leaves undefined on purpose.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

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

// Calls sums.add_group for each group of a block.
template <int kTokens, typename Sums>
FLASH_LLM_AVX512 inline void add_groups(const RowBlockOf<uint8_t>& block, int64_t groups,
                                        const typename Sums::X* x, Sums& sums) {
  const __m512i zero = opaque_zero();
  const uint32_t* masks = block.masks;
  const uint32_t* const masks_end = masks + groups * kBlockRows;
  Values<false> values{block.values, block.end};
  while (masks != masks_end) {
    const int64_t safe = groups_before_end(values.next, values.end);
    if (safe == 0) break;
    const uint32_t* const stop = masks + std::min<int64_t>(masks_end - masks, safe * kBlockRows);
    for (; masks != stop; masks += kBlockRows, x += kTokens * kGroupCols) {
      prefetch_soon(values.next);
      prefetch_later(values.next);
      sums.add_group(masks, x, zero, values);
    }
  }
  Values<true> last{values.next, values.end};
  for (; masks != masks_end; masks += kBlockRows, x += kTokens * kGroupCols) {
    sums.add_group(masks, x, zero, last);
  }
}

FLASH_LLM_AVX512 inline uint64_t mask_of_pair(const uint32_t* masks, ptrdiff_t pair) {
  return masks[2 * pair] | uint64_t{masks[2 * pair + 1]} << 32;
}

// int8 X. 128 is added to each element of the weight, zeros included, which makes it unsigned; the
// caller subtracts 128 times the token's sum. Sums may wrap around in between.
template <int kTokens>
struct Int8X {
  using X = int8_t;
  __m512i sums[kPairs][kTokens];

  FLASH_LLM_AVX512 inline void clear() {
    for (auto& pair : sums) {
      for (auto& token : pair) token = _mm512_setzero_si512();
    }
  }

  template <bool kNearEnd>
  FLASH_LLM_AVX512 inline void add_group(const uint32_t* masks, const int8_t* x, __m512i zero,
                                         Values<kNearEnd>& values) {
    __m512i w[kPairs];
#pragma GCC unroll 2
    for (int pair = 0; pair < kPairs; ++pair) {
      const __m512i elements = values.take(mask_of_pair(masks, pair), zero);
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

// X in fp32. vpdpbusd with weights of 1 and 0 extends every fourth byte of a vector to 32 bits, the
// first, second, third or fourth; so X of a group is in this order too: columns 0, 4, 8, ... 28,
// then 1, 5, ... 29.
template <int kTokens>
struct WideX {
  using X = float;
  static constexpr int kSteps = 4;
  // With few tokens the steps have sums of their own: more independent chains of additions hide
  // their latency.
  static constexpr int kSums = kTokens <= 2 ? 2 : 1;
  __m512 sums[kPairs][kTokens][kSums];

  FLASH_LLM_AVX512 inline void clear() {
    for (auto& pair : sums) {
      for (auto& token : pair) {
        for (auto& sum : token) sum = _mm512_setzero_ps();
      }
    }
  }

  template <bool kNearEnd>
  FLASH_LLM_AVX512 inline void add_group(const uint32_t* masks, const float* x, __m512i zero,
                                         Values<kNearEnd>& values) {
    __m512 w[kPairs][kSteps];
#pragma GCC unroll 2
    for (int pair = 0; pair < kPairs; ++pair) {
      const __m512i elements = values.take(mask_of_pair(masks, pair), zero);
#pragma GCC unroll 4
      for (int step = 0; step < kSteps; ++step) {
        const __m512i ones = _mm512_set1_epi32(1 << (8 * step));
        w[pair][step] =
            _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, elements));
      }
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
  }

  FLASH_LLM_AVX512 inline __m512 sum_of(int pair, int token) const {
    const auto& parts = sums[pair][token];
    return kSums == 1 ? parts[0] : _mm512_add_ps(parts[0], parts[kSums - 1]);
  }

  FLASH_LLM_AVX512 inline __m128 rows_of(int token, const RowBitmapTokens&) const {
    const __m512 a = sum_of(0, token), b = sum_of(1, token);
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 halves = _mm512_add_ps(ab, _mm512_shuffle_ps(ab, ab, 0x4E));
    const __m128 rows_02 =
        _mm_add_ps(_mm512_castps512_ps128(halves), _mm512_extractf32x4_ps(halves, 1));
    const __m128 rows_13 =
        _mm_add_ps(_mm512_extractf32x4_ps(halves, 2), _mm512_extractf32x4_ps(halves, 3));
    return _mm_unpacklo_ps(rows_02, rows_13);
  }
};

template <typename Sums, int kTokens>
FLASH_LLM_AVX512 void multiply_block(const RowBlockOf<uint8_t>& block, int64_t groups,
                                     const RowBitmapTokens& tokens, float* out) {
  Sums sums;
  sums.clear();
  add_groups<kTokens>(block, groups, static_cast<const typename Sums::X*>(tokens.x), sums);
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

// In the order of WideX.
template <ValueType kType>
FLASH_LLM_AVX512 void widen_group(const uint16_t* group, float* widened) {
  const __m512 low = load_wide<kType>(group), high = load_wide<kType>(group + 16);
  const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(2));
  _mm512_store_ps(widened, _mm512_permutex2var_ps(low, first, high));
  _mm512_store_ps(widened + 16, _mm512_permutex2var_ps(low, second, high));
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

RowBitmapKernel row_bitmap_avx512_int8(ValueType type, bool int8_x) {
  const bool half = value_traits(type).dense == ValueType::kFloat16;
  RowBitmapKernel kernel;
  if (int8_x) {
    kernel.quantize =
        half ? quantize_group<ValueType::kFloat16> : quantize_group<ValueType::kBfloat16>;
    kernel.multiply = multiply<Int8X>;
  } else {
    kernel.widen = half ? widen_group<ValueType::kFloat16> : widen_group<ValueType::kBfloat16>;
    kernel.multiply = multiply<WideX>;
  }
  kernel.max_tokens = kMaxTokens;
  kernel.decode_int8_block = row_bitmap_avx2(type, int8_x).decode_int8_block;
  return kernel;
}

}  // namespace flash_llm

#else

namespace flash_llm {

RowBitmapKernel row_bitmap_avx512_int8(ValueType, bool) { return {}; }

}  // namespace flash_llm

#endif
