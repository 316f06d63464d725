// The row bitmap's kernels for AVX-512 VBMI2: one vpexpandw makes the 32 elements of a group.
//
// The sums of four rows (or two, for many tokens) times all tokens stay in registers, so that what
// is decoded meets several tokens and each load of X several rows. On a Zen 4 (EPYC at 3.7 GHz) a
// group takes 3 cycles for one bf16 token, of which the expansion is 1.3 and the product 1.
//
// NOTE: vpexpandw with zero masking waits there for the register that it overwrites (6.4 cycles a
// group instead of 3). Merging into a copy of a zero register waits for nothing.
#include "core/row_bitmap_kernels.h"

#if defined(__x86_64__)

#include <algorithm>
#include <cstddef>

// GCC 12 finds that its own header leaves registers undefined, which is what it means to do.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

// BF16 is among them for Dot alone: nothing but its intrinsic makes compilers use it, and
// row_bitmap_avx512 hands that out only where the CPU has it.
#define FLASH_LLM_AVX512 \
  __attribute__((        \
      target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16,avx2,fma,popcnt")))

namespace flash_llm {
namespace {

// A zero that the compiler does not know for one.
FLASH_LLM_AVX512 inline __m512i opaque_zero() {
  __m512i zero = _mm512_setzero_si512();
  __asm__("" : "+v"(zero));
  return zero;
}

// Where the next values are, and how to read 32 of them: near the payload's end not past it.
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

// Blocks follow each other, so what lies ahead of the values is what will be read, masks too. The
// CPU's own prefetcher, which sees streams begin and end every few kilobytes and stops at each
// page, brings 4096x4096 at 50 % zeros in 960 us; with these it takes 830 (on huge pages 630), at
// 90 % 360 instead of 490 us. Two lines per step of four groups are what is read at 50 %.
FLASH_LLM_AVX512 inline void prefetch(const uint16_t* values) {
  const auto* bytes = reinterpret_cast<const char*>(values);
  _mm_prefetch(bytes + 1024, _MM_HINT_T0);
  _mm_prefetch(bytes + 1024 + 64, _MM_HINT_T0);
  _mm_prefetch(bytes + 8192, _MM_HINT_T1);
  _mm_prefetch(bytes + 8192 + 64, _MM_HINT_T1);
}

// Groups that may be read 64 bytes at a time in each of their rows.
int64_t groups_before_end(const uint16_t* next, const uint16_t* end) {
  return (end - next) / (kBlockRows * kGroupCols);
}

// What follows says how 32 elements of a row are multiplied by those of a token, into 16 sums or
// twice 16, which may be the same.

// bf16 whose subnormals are taken for zeros.
struct Dot {
  using X = uint16_t;
  using Vector = __m512i;
  static constexpr int kParts = 1;

  FLASH_LLM_AVX512 static inline Vector weight(__m512i raw) { return raw; }
  FLASH_LLM_AVX512 static inline Vector input(const X* x) { return _mm512_loadu_si512(x); }
  FLASH_LLM_AVX512 static inline void add(const Vector& w, const Vector& x, __m512& sum, __m512&) {
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<const __m512bh&>(w),
                           reinterpret_cast<const __m512bh&>(x));
  }
};

// 32 elements as fp32.
struct Halves {
  __m512 low, high;
};

struct Wide {
  using Vector = Halves;
  static constexpr int kParts = 2;

  FLASH_LLM_AVX512 static inline void add(const Vector& w, const Vector& x, __m512& low,
                                          __m512& high) {
    low = _mm512_fmadd_ps(w.low, x.low, low);
    high = _mm512_fmadd_ps(w.high, x.high, high);
  }
};

// bf16, any: the even elements and the odd ones.
struct WideBf16 : Wide {
  using X = uint16_t;

  FLASH_LLM_AVX512 static inline Vector weight(__m512i raw) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(raw, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(-0x10000)))};
  }
  FLASH_LLM_AVX512 static inline Vector input(const X* x) { return weight(_mm512_loadu_si512(x)); }
};

// fp16: the first 16 elements and the others.
struct WideHalf : Wide {
  using X = float;

  FLASH_LLM_AVX512 static inline Vector weight(__m512i raw) {
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(raw)),
            _mm512_cvtph_ps(_mm512_extracti64x4_epi64(raw, 1))};
  }
  FLASH_LLM_AVX512 static inline Vector input(const X* x) {
    return {_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16)};
  }
};

// Each of four vectors added up.
FLASH_LLM_AVX512 inline __m128 add_up(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Rows kFirst ... kFirst + kCount - 1 of a block, times all tokens.
template <typename Math, int kFirst, int kCount, int kTokens>
struct Rows {
  // A chain of additions is as slow as their latency unless enough of them are under way.
  static constexpr int kParts = kCount * kTokens <= 8 ? Math::kParts : 1;
  __m512 sums[kCount][kTokens][kParts];

  template <bool kNearEnd>
  FLASH_LLM_AVX512 inline void add_group(const uint32_t* masks, const typename Math::X* x,
                                         __m512i zero, Values<kNearEnd>& values) {
    if (!kNearEnd && kFirst == 0) prefetch(values.next);
    typename Math::Vector w[kCount];
#pragma GCC unroll 4
    for (int row = 0; row < kBlockRows; ++row) {
      if (row >= kFirst && row < kFirst + kCount) {
        w[row - kFirst] = Math::weight(_mm512_mask_expand_epi16(zero, masks[row], values.load()));
      }
      values.skip(masks[row]);
    }
#pragma GCC unroll 8
    for (int token = 0; token < kTokens; ++token) {
      const typename Math::Vector input = Math::input(x + token * kGroupCols);
#pragma GCC unroll 4
      for (int row = 0; row < kCount; ++row) {
        Math::add(w[row], input, sums[row][token][0], sums[row][token][kParts - 1]);
      }
    }
  }

  FLASH_LLM_AVX512 inline __m512 sum_of(int row, int token) const {
    return kParts == 1 ? sums[row][token][0]
                       : _mm512_add_ps(sums[row][token][0], sums[row][token][kParts - 1]);
  }

  FLASH_LLM_AVX512 static inline void multiply(const RowBlock& block, int64_t groups,
                                               const typename Math::X* x, float* out) {
    Rows rows;
#pragma GCC unroll 4
    for (int row = 0; row < kCount; ++row) {
#pragma GCC unroll 8
      for (int token = 0; token < kTokens; ++token) {
        rows.sums[row][token][0] = _mm512_setzero_ps();
        rows.sums[row][token][kParts - 1] = _mm512_setzero_ps();
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
        rows.add_group(masks, x, zero, values);
      }
    }
    Values<true> last{values.next, values.end};
    for (; masks != masks_end; masks += kBlockRows, x += kTokens * kGroupCols) {
      rows.add_group(masks, x, zero, last);
    }

    if constexpr (kCount == kBlockRows) {
#pragma GCC unroll 8
      for (int token = 0; token < kTokens; ++token) {
        _mm_storeu_ps(out + token * kBlockRows,
                      add_up(rows.sum_of(0, token), rows.sum_of(1, token), rows.sum_of(2, token),
                             rows.sum_of(3, token)));
      }
    } else {
      static_assert(kCount == 2);
#pragma GCC unroll 8
      for (int token = 0; token < kTokens; ++token) {
        const __m512 a = rows.sum_of(0, token), b = rows.sum_of(1, token);
        _mm_storel_pi(reinterpret_cast<__m64*>(out + token * kBlockRows + kFirst),
                      add_up(a, b, a, b));
      }
    }
  }
};

template <typename Math, int kTokens>
FLASH_LLM_AVX512 void multiply_block(const RowBlock& block, int64_t groups, const void* x,
                                     float* out) {
  const auto* typed = static_cast<const typename Math::X*>(x);
  // Sums, weights and an input must fit 32 registers; two rows read X twice as often as four.
  constexpr int kVectorRegisters = Math::kParts;
  if constexpr (kBlockRows * kTokens + (kBlockRows + 1) * kVectorRegisters <= 30) {
    Rows<Math, 0, kBlockRows, kTokens>::multiply(block, groups, typed, out);
  } else {
    Rows<Math, 0, 2, kTokens>::multiply(block, groups, typed, out);
    Rows<Math, 2, 2, kTokens>::multiply(block, groups, typed, out);
  }
}

using MultiplyBlock = void (*)(const RowBlock&, int64_t groups, const void* x, float* out);

template <typename Math>
MultiplyBlock multiply_block_of(int tokens) {
  static constexpr MultiplyBlock kByTokens[kMaxRowTokens] = {
      multiply_block<Math, 1>, multiply_block<Math, 2>, multiply_block<Math, 3>,
      multiply_block<Math, 4>, multiply_block<Math, 5>, multiply_block<Math, 6>,
      multiply_block<Math, 7>, multiply_block<Math, 8>};
  return kByTokens[tokens - 1];
}

// One block of tokens. Blocks that have normal products only are multiplied by Normal, the others
// by Any.
template <typename Normal, typename Any>
void multiply_few(const RowBitmapProduct& product) {
  const RowBitmapTokens& tokens = product.tokens[0];
  const MultiplyBlock normal = multiply_block_of<Normal>(tokens.count);
  const MultiplyBlock any = multiply_block_of<Any>(tokens.count);
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

// Many tokens: a panel of two blocks of rows times some groups is decoded into the first-level
// cache and meets all tokens there, four at a time. In registers are the sums of four rows times
// four tokens, which are kept in memory from one panel to the next.
constexpr int64_t kPanelBlocks = 2;
constexpr int64_t kPanelGroups = 32;
constexpr int kPanelTokens = 6;
constexpr int kPanelSums = kBlockRows * kPanelTokens;
constexpr int64_t kGroupElems = kBlockRows * kGroupCols;

struct alignas(64) Panel {
  uint16_t elements[kPanelBlocks][kPanelGroups * kGroupElems];  // [groups][4 rows][32 columns]
  __m512 sums[kMaxRowTokenBlocks][kPanelBlocks][kPanelSums];    // [4 rows][tokens]
};

FLASH_LLM_AVX512 void decode_panel(const uint32_t* masks, int64_t groups, RowBlock& block,
                                   uint16_t* elements) {
  const __m512i zero = opaque_zero();
  const uint32_t* const end = masks + groups * kBlockRows;
  if (groups_before_end(block.values, block.end) >= groups) {
    Values<false> values{block.values, block.end};
    for (; masks != end; ++masks, elements += kGroupCols) {
      prefetch(values.next);
      _mm512_store_si512(elements, _mm512_mask_expand_epi16(zero, *masks, values.load()));
      values.skip(*masks);
    }
    block.values = values.next;
  } else {
    Values<true> values{block.values, block.end};
    for (; masks != end; ++masks, elements += kGroupCols) {
      _mm512_store_si512(elements, _mm512_mask_expand_epi16(zero, *masks, values.load()));
      values.skip(*masks);
    }
    block.values = values.next;
  }
}

template <typename Math, int kTokens>
FLASH_LLM_AVX512 void multiply_panel(const uint16_t* elements, int64_t groups,
                                     const void* x_of_groups, bool begins, __m512* kept,
                                     float* out) {
  const auto* x = static_cast<const typename Math::X*>(x_of_groups);
  __m512 sums[kBlockRows][kTokens];
#pragma GCC unroll 4
  for (int row = 0; row < kBlockRows; ++row) {
#pragma GCC unroll 6
    for (int token = 0; token < kTokens; ++token) {
      sums[row][token] = begins ? _mm512_setzero_ps() : kept[row * kTokens + token];
    }
  }
  for (; groups > 0; --groups, elements += kGroupElems, x += kTokens * kGroupCols) {
    typename Math::Vector w[kBlockRows];
#pragma GCC unroll 4
    for (int row = 0; row < kBlockRows; ++row) {
      w[row] = Math::weight(_mm512_load_si512(elements + row * kGroupCols));
    }
#pragma GCC unroll 6
    for (int token = 0; token < kTokens; ++token) {
      const typename Math::Vector input = Math::input(x + token * kGroupCols);
#pragma GCC unroll 4
      for (int row = 0; row < kBlockRows; ++row) {
        Math::add(w[row], input, sums[row][token], sums[row][token]);
      }
    }
  }
#pragma GCC unroll 6
  for (int token = 0; token < kTokens; ++token) {
    if (out != nullptr) {
      _mm_storeu_ps(out + token * kBlockRows,
                    add_up(sums[0][token], sums[1][token], sums[2][token], sums[3][token]));
      continue;
    }
#pragma GCC unroll 4
    for (int row = 0; row < kBlockRows; ++row) kept[row * kTokens + token] = sums[row][token];
  }
}

using MultiplyPanel = void (*)(const uint16_t*, int64_t groups, const void* x, bool begins,
                               __m512* kept, float* out);

template <typename Math>
constexpr MultiplyPanel kMultiplyPanel[kPanelTokens] = {
    multiply_panel<Math, 1>, multiply_panel<Math, 2>, multiply_panel<Math, 3>,
    multiply_panel<Math, 4>, multiply_panel<Math, 5>, multiply_panel<Math, 6>};

template <typename Normal, typename Any>
void multiply_many(const RowBitmapProduct& product) {
  constexpr size_t kXBytes = sizeof(typename Normal::X);
  const int64_t groups = num_groups(product.weight.k);
  Panel panel;
  for (int64_t first = product.first; first < product.last; first += kPanelBlocks) {
    const int64_t blocks = std::min(kPanelBlocks, product.last - first);
    RowBlock rows[kPanelBlocks];
    for (int64_t i = 0; i < blocks; ++i) rows[i] = row_block(product.weight, first + i);
    for (int64_t group = 0; group < groups; group += kPanelGroups) {
      const int64_t count = std::min(kPanelGroups, groups - group);
      const bool ends = group + count == groups;
      for (int64_t i = 0; i < blocks; ++i) {
        if (rows[i].masks == nullptr) continue;
        decode_panel(rows[i].masks + group * kBlockRows, count, rows[i], panel.elements[i]);
      }
      float* sums = product.sums;
      for (int64_t j = 0; j < product.token_blocks; ++j) {
        const RowBitmapTokens& tokens = product.tokens[j];
        const auto* x = static_cast<const char*>(tokens.x) +
                        static_cast<size_t>(group * tokens.count * kGroupCols) * kXBytes;
        for (int64_t i = 0; i < blocks; ++i) {
          float* out = sums + (first + i - product.first) * tokens.count * kBlockRows;
          if (rows[i].masks == nullptr) {
            sum_nothing(tokens, out);
            continue;
          }
          const bool normal = rows[i].smallest >= tokens.smallest_normal;
          const auto multiply =
              (normal ? kMultiplyPanel<Normal> : kMultiplyPanel<Any>)[tokens.count - 1];
          multiply(panel.elements[i], count, x, group == 0, panel.sums[j][i], ends ? out : nullptr);
        }
        sums += (product.last - product.first) * tokens.count * kBlockRows;
      }
    }
  }
}

template <typename Normal, typename Any>
void multiply(const RowBitmapProduct& product) {
  if (product.token_blocks == 1) {
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
  if (type == ValueType::kFloat16) {
    return {true, 4, 4, multiply<WideHalf, WideHalf>, decode_block, row_bitmap_avx2_pack_block};
  }
  if (!bf16) {
    return {false, 4, 4, multiply<WideBf16, WideBf16>, decode_block, row_bitmap_avx2_pack_block};
  }
  return {false,        kMaxRowTokens,
          kPanelTokens, multiply<Dot, WideBf16>,
          decode_block, row_bitmap_avx2_pack_block};
}

}  // namespace flash_llm

#else

namespace flash_llm {

RowBitmapKernel row_bitmap_avx512(ValueType, bool) { return {}; }

}  // namespace flash_llm

#endif
