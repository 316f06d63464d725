// The row bitmap's kernels for AVX-512 VBMI2: one vpexpandw decodes the 32 elements of a group.
//
// The sums of four rows times some tokens stay in registers, so that decoded elements are
// multiplied by several tokens and each load of X serves several rows. For one bf16 token a group
// takes 3 cycles on a Zen 4 (EPYC at 3.7 GHz), of which the expansion takes 1.3 and the product 1,
// and 4 cycles on an Emerald Rapids (Xeon at 3 GHz), whose port for the mask and the expansion is
// busy for 3 of them. There, each further token costs 1.1 cycles, of which the product takes 1.
//
// NOTE: on Zen 4 vpexpandw with zero masking depends on the old value of the register that it
// writes (6.4 cycles a group instead of 3). Merging into a copy of a zero register has no such
// dependency.
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

// BF16 is in the list only for Dot. Compilers emit its instructions only for the intrinsic in Dot,
// and row_bitmap_avx512 returns kernels with Dot only if the CPU has BF16.
#define FLASH_LLM_AVX512 \
  __attribute__((        \
      target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,avx2,fma,popcnt")))

namespace flash_llm {
namespace {

// A zero register whose value is hidden from the compiler, which would else use zero masking.
FLASH_LLM_AVX512 inline __m512i opaque_zero() {
  __m512i zero = _mm512_setzero_si512();
  __asm__("" : "+v"(zero));
  return zero;
}

// Reads values, 32 at a time. Near the payload's end no load reads past it.
template <bool kNearEnd>
struct Values {
  const uint16_t* next;
  const uint16_t* end;

  FLASH_LLM_AVX512 inline __m512i load() const {
    if (!kNearEnd) return _mm512_loadu_si512(next);
    const auto left = std::min<std::ptrdiff_t>(end - next, kGroupCols);
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << left) - 1), next);
  }
  FLASH_LLM_AVX512 inline void skip(uint32_t mask) {
    const int count = __builtin_popcount(mask);
    next += kNearEnd ? std::min<std::ptrdiff_t>(end - next, count) : count;
  }
};

// How many groups can be read by loads of 64 bytes that all stay within the payload.
int64_t groups_before_end(const uint16_t* next, const uint16_t* end) {
  return (end - next) / (kBlockRows * kGroupCols);
}

constexpr int64_t kLanes = 16;  // fp32 numbers in a vector
static_assert(kLanes <= kKeptLanes);

// The following structs define how 32 elements of a row are multiplied by those of a token. They
// are kept decoded in kStored vectors; kParts vectors are multiplied and added to 16 sums.

// bf16, by the dot-product instruction, which treats subnormals as zeros.
struct Dot {
  using X = uint16_t;
  using Vector = __m512i;
  static constexpr int kStored = 1;
  static constexpr int kParts = 1;

  FLASH_LLM_AVX512 static inline void store(__m512i raw, Vector* w) { w[0] = raw; }
  FLASH_LLM_AVX512 static inline Vector weight(const Vector* w, int) { return w[0]; }
  FLASH_LLM_AVX512 static inline Vector input(const X* x, int) { return _mm512_loadu_si512(x); }
  FLASH_LLM_AVX512 static inline void add(const Vector& w, const Vector& x, __m512& sum) {
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<const __m512bh&>(w),
                           reinterpret_cast<const __m512bh&>(x));
  }
};

// Multiplication in fp32.
struct Wide {
  using X = float;
  using Vector = __m512;
  static constexpr int kStored = 2;
  static constexpr int kParts = 2;

  FLASH_LLM_AVX512 static inline Vector weight(const Vector* w, int part) { return w[part]; }
  FLASH_LLM_AVX512 static inline Vector input(const X* x, int part) {
    return _mm512_loadu_ps(x + part * kLanes);
  }
  FLASH_LLM_AVX512 static inline void add(const Vector& w, const Vector& x, __m512& sum) {
    sum = _mm512_fmadd_ps(w, x, sum);
  }
};

FLASH_LLM_AVX512 inline __m512 even_bf16(__m512i raw) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
}

FLASH_LLM_AVX512 inline __m512 odd_bf16(__m512i raw) {
  return _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(-0x10000)));
}

// bf16 with subnormals, as fp32: the even elements in one vector, the odd ones in the other.
struct WideBf16 : Wide {
  FLASH_LLM_AVX512 static inline void store(__m512i raw, Vector* w) {
    w[0] = even_bf16(raw);
    w[1] = odd_bf16(raw);
  }
};

// The same, but reads X and keeps decoded elements as Dot does: for the few blocks that Dot would
// multiply incorrectly.
struct WideDot : Wide {
  using X = uint16_t;
  using Vector = __m512i;
  static constexpr int kStored = 1;

  FLASH_LLM_AVX512 static inline void store(__m512i raw, Vector* w) { w[0] = raw; }
  FLASH_LLM_AVX512 static inline __m512 weight(const Vector* w, int part) {
    return part == 0 ? even_bf16(w[0]) : odd_bf16(w[0]);
  }
  FLASH_LLM_AVX512 static inline __m512 input(const X* x, int part) {
    const __m512i raw = _mm512_loadu_si512(x);
    return weight(&raw, part);
  }
};

// fp16, as fp32: the first 16 elements in one vector, the other 16 in the other.
struct WideHalf : Wide {
  FLASH_LLM_AVX512 static inline void store(__m512i raw, Vector* w) {
    w[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(raw));
    w[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(raw, 1));
  }
};

// Widens a group of X to fp32, its elements in the order in which Math keeps those of the weight.
template <typename Math>
FLASH_LLM_AVX512 void widen(const uint16_t* group, float* widened) {
  typename Math::Vector parts[Math::kStored];
  Math::store(_mm512_loadu_si512(group), parts);
  for (int part = 0; part < Math::kStored; ++part) {
    _mm512_storeu_ps(widened + part * kLanes, parts[part]);
  }
}

// The sums over the lanes of each of four vectors.
FLASH_LLM_AVX512 inline __m128 add_up(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Few tokens: the four rows of a block are decoded and multiplied in registers.
constexpr int kFewTokens = 4;

template <typename Math, int kTokens>
struct FewTokens {
  // With few tokens the parts have sums of their own: more independent chains of additions hide
  // their latency.
  static constexpr int kSums = kTokens <= 2 ? Math::kParts : 1;
  __m512 sums[kBlockRows][kTokens][kSums];

  template <bool kNearEnd>
  FLASH_LLM_AVX512 inline void add_group(const uint32_t* masks, const typename Math::X* x,
                                         __m512i zero, Values<kNearEnd>& values) {
    typename Math::Vector w[kBlockRows][Math::kStored];
#pragma GCC unroll 4
    for (int row = 0; row < kBlockRows; ++row) {
      Math::store(_mm512_mask_expand_epi16(zero, masks[row], values.load()), w[row]);
      values.skip(masks[row]);
    }
#pragma GCC unroll 4
    for (int token = 0; token < kTokens; ++token) {
#pragma GCC unroll 2
      for (int part = 0; part < Math::kParts; ++part) {
        const auto input = Math::input(x + token * kGroupCols, part);
#pragma GCC unroll 4
        for (int row = 0; row < kBlockRows; ++row) {
          Math::add(Math::weight(w[row], part), input, sums[row][token][part % kSums]);
        }
      }
    }
  }

  FLASH_LLM_AVX512 inline __m512 sum_of(int row, int token) const {
    const auto& parts = sums[row][token];
    return kSums == 1 ? parts[0] : _mm512_add_ps(parts[0], parts[kSums - 1]);
  }

  FLASH_LLM_AVX512 static void multiply(const RowBlock& block, int64_t groups, const void* x_tokens,
                                        float* out) {
    const auto* x = static_cast<const typename Math::X*>(x_tokens);
    FewTokens rows;
#pragma GCC unroll 4
    for (int row = 0; row < kBlockRows; ++row) {
#pragma GCC unroll 4
      for (int token = 0; token < kTokens; ++token) {
        for (auto& sum : rows.sums[row][token]) sum = _mm512_setzero_ps();
      }
    }
    const __m512i zero = opaque_zero();
    const uint32_t* masks = block.masks;
    const uint32_t* const masks_end = masks + groups * kBlockRows;
    Values<false> values{block.values, block.end};
    while (masks != masks_end) {
      const int64_t safe = groups_before_end(values.next, values.end);
      if (safe == 0) break;
      const uint32_t* const stop = masks + std::min<int64_t>(masks_end - masks, safe * kBlockRows);
      for (; masks != stop; masks += kBlockRows, x += kTokens * kGroupCols) {
        prefetch_block(block, masks, values.next);
        rows.add_group(masks, x, zero, values);
      }
    }
    Values<true> last{values.next, values.end};
    for (; masks != masks_end; masks += kBlockRows, x += kTokens * kGroupCols) {
      rows.add_group(masks, x, zero, last);
    }
#pragma GCC unroll 4
    for (int token = 0; token < kTokens; ++token) {
      _mm_storeu_ps(out + token * kBlockRows, add_up(rows.sum_of(0, token), rows.sum_of(1, token),
                                                     rows.sum_of(2, token), rows.sum_of(3, token)));
    }
  }
};

using MultiplyBlock = void (*)(const RowBlock&, int64_t groups, const void* x, float* out);

template <typename Math>
constexpr MultiplyBlock kMultiplyFew[kFewTokens] = {
    FewTokens<Math, 1>::multiply, FewTokens<Math, 2>::multiply, FewTokens<Math, 3>::multiply,
    FewTokens<Math, 4>::multiply};

// Blocks whose products are all normal numbers are multiplied by Normal, the others by Any.
template <typename Normal, typename Any>
void multiply_few(const RowBitmapProduct& product) {
  const RowBitmapTokens& tokens = product.tokens[0];
  const MultiplyBlock normal = kMultiplyFew<Normal>[tokens.count - 1];
  const MultiplyBlock any = kMultiplyFew<Any>[tokens.count - 1];
  const int64_t groups = num_groups(product.weight.k);
  float* out = product.sums;
  for (int64_t i = product.first; i < product.last; ++i, out += tokens.count * kBlockRows) {
    const RowBlock block = row_block(product.weight, i);
    if (block.masks == nullptr) {
      sum_nothing(tokens, out);
    } else {
      (block.smallest >= tokens.smallest_normal ? normal : any)(block, groups, tokens.x, out);
    }
  }
}

// More tokens: a panel, some columns of two blocks of rows, is decoded into the first-level cache
// and multiplied by all tokens. The same columns of X stay in a cache for the next panel below it.
// The sums of four rows times some tokens are in registers; between the panels of one range of
// columns and those of the next they are kept in memory. Meanwhile the blocks of the next call are
// prefetched: they are streams that start anew every two kilobytes, which the hardware prefetcher
// does not detect. 4096x4096 at 90 % zeros and 8 tokens takes 1.29 ms with these prefetches and
// 1.45 ms without (Emerald Rapids).
constexpr int kPanelTokens = 6;
static_assert(kPanelTokens <= kMaxRowTokens);
constexpr int kLeastPanelTokens = 3;  // 7 tokens are divided into 3 and 4
constexpr int64_t kPanelBlocks = 2;
constexpr int64_t kPanelStored = 32;  // vectors per row of a panel: 8 KB per block

template <typename Math>
constexpr int64_t kPanelGroups = kPanelStored / Math::kStored;

// Bytes to prefetch, because the next call reads them: `step` of them at a time.
struct Ahead {
  const char* next = nullptr;
  const char* stop = nullptr;
  int64_t step = 0;

  FLASH_LLM_AVX512 inline void fetch() {
    for (stop += step; next < stop; next += 64) _mm_prefetch(next, _MM_HINT_T1);
  }
};

template <typename Math, bool kNearEnd>
FLASH_LLM_AVX512 inline void decode_rows(const uint32_t* masks, const uint32_t* masks_end,
                                         RowBlock& block, typename Math::Vector* elements) {
  const __m512i zero = opaque_zero();
  Values<kNearEnd> values{block.values, block.end};
  for (; masks != masks_end; masks += kBlockRows) {
    if (!kNearEnd) prefetch_soon(values.next);
#pragma GCC unroll 4
    for (int row = 0; row < kBlockRows; ++row, elements += Math::kStored) {
      Math::store(_mm512_mask_expand_epi16(zero, masks[row], values.load()), elements);
      values.skip(masks[row]);
    }
  }
  block.values = values.next;
}

// elements[groups][4 rows][kStored]
template <typename Math>
FLASH_LLM_AVX512 void decode_panel(const uint32_t* masks, int64_t groups, RowBlock& block,
                                   typename Math::Vector* elements) {
  const uint32_t* const end = masks + groups * kBlockRows;
  if (groups_before_end(block.values, block.end) >= groups) {
    decode_rows<Math, false>(masks, end, block, elements);
  } else {
    decode_rows<Math, true>(masks, end, block, elements);
  }
}

template <typename Math, int kTokens>
FLASH_LLM_AVX512 void multiply_panel(const void* decoded, int64_t groups, const void* x_of_groups,
                                     bool begins, Ahead& ahead, float* kept, float* out) {
  const auto* elements = static_cast<const typename Math::Vector*>(decoded);
  const auto* x = static_cast<const typename Math::X*>(x_of_groups);
  __m512 sums[kBlockRows][kTokens];
#pragma GCC unroll 4
  for (int row = 0; row < kBlockRows; ++row) {
#pragma GCC unroll 6
    for (int token = 0; token < kTokens; ++token) {
      sums[row][token] = begins ? _mm512_setzero_ps()
                                : _mm512_load_ps(kept + (row * kTokens + token) * kKeptLanes);
    }
  }
  for (; groups > 0; --groups, x += kTokens * kGroupCols) {
    ahead.fetch();
#pragma GCC unroll 2
    for (int part = 0; part < Math::kParts; ++part) {
#pragma GCC unroll 6
      for (int token = 0; token < kTokens; ++token) {
        const auto input = Math::input(x + token * kGroupCols, part);
#pragma GCC unroll 4
        for (int row = 0; row < kBlockRows; ++row) {
          Math::add(Math::weight(elements + row * Math::kStored, part), input, sums[row][token]);
        }
      }
    }
    elements += kBlockRows * Math::kStored;
  }
#pragma GCC unroll 6
  for (int token = 0; token < kTokens; ++token) {
    if (out != nullptr) {
      _mm_storeu_ps(out + token * kBlockRows,
                    add_up(sums[0][token], sums[1][token], sums[2][token], sums[3][token]));
      continue;
    }
#pragma GCC unroll 4
    for (int row = 0; row < kBlockRows; ++row) {
      _mm512_store_ps(kept + (row * kTokens + token) * kKeptLanes, sums[row][token]);
    }
  }
}

using MultiplyPanel = void (*)(const void* elements, int64_t groups, const void* x, bool begins,
                               Ahead& ahead, float* kept, float* out);

template <typename Math>
constexpr MultiplyPanel kMultiplyPanel[] = {multiply_panel<Math, 3>, multiply_panel<Math, 4>,
                                            multiply_panel<Math, 5>, multiply_panel<Math, 6>};

// The words of a block of the next call; its prefetches are spread over the groups and token blocks
// of this call.
Ahead ahead_of(const RowBitmapProduct& product, int64_t block) {
  if (block >= num_row_blocks(product.weight.m)) return {};
  const RowBlock row = row_block(product.weight, block);
  if (row.masks == nullptr) return {};
  constexpr int64_t kUnitBytes = kBlockUnitWords * sizeof(uint32_t);
  const int32_t* offsets = product.weight.offsets + block;
  const auto* begin = reinterpret_cast<const char*>(row.masks);
  const int64_t bytes = std::min<int64_t>((int64_t{offsets[1]} - offsets[0]) * kUnitBytes,
                                          reinterpret_cast<const char*>(row.end) - begin);
  const int64_t steps = num_groups(product.weight.k) * product.token_blocks;
  return {begin, begin, (bytes + steps - 1) / steps};
}

template <typename Normal, typename Any>
void multiply_many(const RowBitmapProduct& product) {
  static_assert(Normal::kStored == Any::kStored, "one panel serves both");
  using Vector = typename Normal::Vector;
  const int64_t groups = num_groups(product.weight.k), blocks = product.last - product.first;
  alignas(64) Vector elements[kPanelBlocks][kPanelStored * kBlockRows];
  RowBlock rows[kCallBlocks];
  Ahead ahead[kCallBlocks];  // the blocks of the next call
  for (int64_t i = 0; i < blocks; ++i) {
    rows[i] = row_block(product.weight, product.first + i);
    ahead[i] = ahead_of(product, product.last + i);
  }
  float* sums_of_empty = product.sums;
  for (int64_t j = 0; j < product.token_blocks; ++j) {
    const RowBitmapTokens& tokens = product.tokens[j];
    for (int64_t i = 0; i < blocks; ++i, sums_of_empty += tokens.count * kBlockRows) {
      if (rows[i].masks == nullptr) sum_nothing(tokens, sums_of_empty);
    }
  }
  for (int64_t group = 0; group < groups; group += kPanelGroups<Normal>) {
    const int64_t count = std::min(kPanelGroups<Normal>, groups - group);
    const bool ends = group + count == groups;
    for (int64_t first = 0; first < blocks; first += kPanelBlocks) {
      const int64_t last = std::min(blocks, first + kPanelBlocks);
      for (int64_t i = first; i < last; ++i) {
        if (rows[i].masks == nullptr) continue;
        decode_panel<Normal>(rows[i].masks + group * kBlockRows, count, rows[i],
                             elements[i - first]);
      }
      float* sums = product.sums;
      float* kept = product.kept;
      for (int64_t j = 0; j < product.token_blocks; ++j) {
        const RowBitmapTokens& tokens = product.tokens[j];
        const int64_t num_sums = tokens.count * kBlockRows;
        const auto* x =
            static_cast<const typename Normal::X*>(tokens.x) + group * tokens.count * kGroupCols;
        for (int64_t i = first; i < last; ++i) {
          if (rows[i].masks == nullptr) continue;
          const bool normal = rows[i].smallest >= tokens.smallest_normal;
          (normal ? kMultiplyPanel<Normal> : kMultiplyPanel<Any>)[tokens.count - kLeastPanelTokens](
              elements[i - first], count, x, group == 0, ahead[i], kept + i * num_sums * kKeptLanes,
              ends ? sums + i * num_sums : nullptr);
        }
        sums += blocks * num_sums;
        kept += blocks * num_sums * kKeptLanes;
      }
    }
  }
}

template <typename Normal, typename Any>
void multiply(const RowBitmapProduct& product) {
  if (product.token_blocks == 1 && product.tokens[0].count <= kFewTokens) {
    multiply_few<Normal, Any>(product);
  } else {
    multiply_many<Normal, Any>(product);
  }
}

template <bool kNearEnd>
FLASH_LLM_AVX512 inline void decode_group(const uint32_t* masks, int rows, int64_t k, int cols,
                                          __m512i zero, Values<kNearEnd>& values, uint16_t* dense) {
#pragma GCC unroll 4
  for (int row = 0; row < kBlockRows; ++row) {
    const __m512i elements = _mm512_mask_expand_epi16(zero, masks[row], values.load());
    values.skip(masks[row]);
    if (row >= rows) continue;
    if (cols == kGroupCols) {
      _mm512_storeu_si512(dense + row * k, elements);
    } else {
      _mm512_mask_storeu_epi16(dense + row * k, (1U << cols) - 1, elements);
    }
  }
}

FLASH_LLM_AVX512 void decode_block(const RowBlock& block, int rows, int64_t k, uint16_t* dense) {
  const __m512i zero = opaque_zero();
  const int64_t groups = num_groups(k);
  int64_t group = 0;
  const auto cols = [&] {
    return static_cast<int>(std::min<int64_t>(kGroupCols, k - group * kGroupCols));
  };
  Values<false> values{block.values, block.end};
  while (group < groups) {
    const int64_t safe = groups_before_end(values.next, values.end);
    if (safe == 0) break;
    for (const int64_t stop = std::min(groups, group + safe); group < stop; ++group) {
      decode_group(block.masks + group * kBlockRows, rows, k, cols(), zero, values,
                   dense + group * kGroupCols);
    }
  }
  for (Values<true> last{values.next, values.end}; group < groups; ++group) {
    decode_group(block.masks + group * kBlockRows, rows, k, cols(), zero, last,
                 dense + group * kGroupCols);
  }
}

}  // namespace

RowBitmapKernel row_bitmap_avx512(ValueType type, bool bf16) {
  const bool half = type == ValueType::kFloat16;
  RowBitmapKernel kernel;
  kernel.widen = half ? widen<WideHalf> : bf16 ? nullptr : widen<WideBf16>;
  kernel.max_tokens = kPanelTokens;
  kernel.keeps_sums = true;
  kernel.multiply = half   ? multiply<WideHalf, WideHalf>
                    : bf16 ? multiply<Dot, WideDot>
                           : multiply<WideBf16, WideBf16>;
  kernel.decode_block = decode_block;
  kernel.pack_block = row_bitmap_avx2_pack_block;
  return kernel;
}

}  // namespace flash_llm

#else

namespace flash_llm {

RowBitmapKernel row_bitmap_avx512(ValueType, bool) { return {}; }

}  // namespace flash_llm

#endif
