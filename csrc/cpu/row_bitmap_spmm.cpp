// The row bitmap's product on the CPU: converts X for the kernels (row_bitmap_kernels.h), divides
// the work among threads, and applies bias, activation and rounding to the kernels' sums.
#include <algorithm>
#include <cstddef>
#include <limits>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#include "cpu/activation.h"
#include "cpu/row_bitmap_kernels.h"
#include "cpu/spmm.h"
#include "format/element.h"
#include "format/row_bitmap.h"

namespace flash_llm {
namespace {

// Fewest elements of the weight, at one token, for which another thread pays. Measured at 50 %
// zeros with one and two threads (EPYC with AVX2, shared with other processes, fastest of all
// passes, 2026-11-29): N = 1, 256x256 22 and 25 us, 384x384 33 and 30, 1536x576 118 and 75,
// 2048x2048 537 and 338; N = 8, 256x256 52 and 43, 576x576 181 and 112.
constexpr int64_t kGrainElems = int64_t{1} << 17;
// Tokens that are converted at once. This bounds the memory for a long prompt: 60 MB as fp32 at
// K = 16384. Decoding the weight again for each such slice costs less than 1 %.
constexpr int64_t kSliceTokens = 960;

constexpr int kBf16MantissaBits = 7;
// Products of bf16 values whose biased exponents add up to at least this are 2^-112 or larger, and
// multiples of 2^-126, as are all sums of such products.
constexpr uint32_t kNormalExponents = 2 * 127 - 112;
constexpr uint32_t kNever = std::numeric_limits<uint32_t>::max();

// Uninitialised memory that is aligned to cache lines.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : words_(new uint32_t[(bytes + kLineBytes) / sizeof(uint32_t)]) {}

  template <typename T>
  T* data() const {
    const auto address = reinterpret_cast<uintptr_t>(words_.get());
    return reinterpret_cast<T*>(words_.get() + (kLineBytes - address % kLineBytes) % kLineBytes /
                                                   sizeof(uint32_t));
  }

 private:
  static constexpr size_t kLineBytes = 64;
  std::unique_ptr<uint32_t[]> words_;
};

// The smallest nonzero magnitude, and the largest, as integers.
struct Magnitudes {
  uint16_t smallest_less_1 = 0xFFFF;  // zeros wrap around to the largest integer
  uint16_t largest = 0;

  void add(const uint16_t* x, int64_t count) {
    uint16_t low = smallest_less_1, high = largest;
    for (int64_t i = 0; i < count; ++i) {
      const auto magnitude = static_cast<uint16_t>(x[i] & kMagnitudeMask);
      low = std::min(low, static_cast<uint16_t>(magnitude - 1));
      high = std::max(high, magnitude);
    }
    smallest_less_1 = low;
    largest = high;
  }
};

// RowBitmapTokens::smallest_normal for bf16 inputs.
uint32_t smallest_normal_weight(const Magnitudes& x) {
  const uint32_t exponent = (x.smallest_less_1 + 1U) >> kBf16MantissaBits;
  if (exponent == 0) return kNever;  // an input is subnormal
  const uint32_t needed = kNormalExponents > exponent ? kNormalExponents - exponent : 1;
  return std::max(needed, 1U) << kBf16MantissaBits;
}

// The scale of a token that is quantised to int8, and its inverse: the largest magnitude divided by
// 127. A bound on the magnitude keeps both normal numbers. The scale of a token that is not finite
// is NaN, and so is its row of Y. Kernels for GPUs use the same rule.
struct TokenScale {
  float scale, inverse;

  TokenScale(float largest, bool finite)
      : scale(finite ? std::max(largest, kLeastMagnitude) / 127.0F
                     : std::numeric_limits<float>::quiet_NaN()),
        inverse(finite ? 127.0F / std::max(largest, kLeastMagnitude) : 0.0F) {}

 private:
  static constexpr float kLeastMagnitude = 0x1p-100F;
};

// Fills tokens[groups][count][32 columns] from X[count, stride]. inverses[count] are those of
// TokenScale.
template <typename T>
void prepare_groups(const RowBitmapKernel& kernel, const uint16_t* x, int64_t stride, int64_t k,
                    int count, const float* inverses, T* tokens) {
  for (int64_t first = 0; first < k; first += kGroupCols) {
    for (int token = 0; token < count; ++token, tokens += kGroupCols) {
      const uint16_t* group = x + token * stride + first;
      uint16_t padded[kGroupCols] = {};
      if (k - first < kGroupCols) {
        std::copy_n(group, k - first, padded);
        group = padded;
      }
      if constexpr (std::is_same_v<T, float>) {
        kernel.widen(group, tokens);
      } else if constexpr (std::is_same_v<T, int8_t>) {
        kernel.quantize(group, inverses[token], tokens);
      } else {
        std::copy_n(group, kGroupCols, tokens);
      }
    }
  }
}

// Fills `block` with its block.count tokens of X from `token0` on, in the kernel's layout. `x` is
// memory for them; a single row that needs no conversion is not copied.
template <ValueType kType, typename T>
void prepare(const SpmmArgs& args, const RowBitmapKernel& kernel, int64_t token0, T* x,
             RowBitmapTokens& block) {
  const int64_t k = args.weight.k;
  const uint16_t infinity = kType == ValueType::kFloat16 ? 0x7C00 : 0x7F80;
  Magnitudes all;
  float inverses[kMaxRowTokens];
  for (int token = 0; token < block.count; ++token) {
    Magnitudes own;
    own.add(args.x + (token0 + token) * args.x_stride, k);
    const bool finite = own.largest < infinity;
    block.empty[token] = finite ? 0.0F : std::numeric_limits<float>::quiet_NaN();
    all.smallest_less_1 = std::min(all.smallest_less_1, own.smallest_less_1);
    const TokenScale scale(to_float<kType>(own.largest), finite);
    block.scales[token] = scale.scale;
    inverses[token] = scale.inverse;
  }
  block.smallest_normal = smallest_normal_weight(all);

  const uint16_t* first = args.x + token0 * args.x_stride;
  if (std::is_same_v<T, uint16_t> && block.count == 1 && k % kGroupCols == 0) {
    block.x = first;
    return;
  }
  prepare_groups(kernel, first, args.x_stride, k, block.count, inverses, x);
  block.x = x;
  if constexpr (std::is_same_v<T, int8_t>) {
    for (int64_t group = 0; group < num_groups(k); ++group) {
      for (int token = 0; token < block.count; ++token, x += kGroupCols) {
        block.totals[token] += std::accumulate(x, x + kGroupCols, int32_t{0});
      }
    }
  }
}

// The scales of a block's rows; all 1 for types that have none of whole rows.
struct RowScales {
  float of[kBlockRows] = {1.0F, 1.0F, 1.0F, 1.0F};

  RowScales(const PackedView& weight, int64_t block) {
    if (value_traits(weight.value_type).scales != ScaleGroup::kRow) return;
    const auto parts = row_block<uint8_t>(weight, block);
    if (parts.masks == nullptr) return;
    for (int row = 0; row < kBlockRows; ++row)
      of[row] = load_scale(weight.value_type, parts.scales, row);
  }
};

// Applies the scales, adds the bias, applies the activation and rounds.
template <ValueType kType>
void finish(const SpmmArgs& args, int64_t token0, int tokens, int64_t first_block,
            int64_t last_block, const float* sums) {
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t row0 = block * kBlockRows;
    const int rows = rows_of_block(args.weight.m, block);
    float bias[kBlockRows] = {};
    for (int row = 0; args.bias != nullptr && row < rows; ++row) {
      bias[row] = to_float<kType>(args.bias[row0 + row]);
    }
    const RowScales scales(args.weight, block);
    for (int token = 0; token < tokens; ++token, sums += kBlockRows) {
      uint16_t* y = args.y + (token0 + token) * args.weight.m + row0;
      for (int row = 0; row < rows; ++row) {
        y[row] = from_float<kType>(
            apply_activation(sums[row] * scales.of[row] + bias[row], args.activation));
      }
    }
  }
}

// T is the element type of X that the kernel reads.
template <ValueType kType, typename T>
void multiply_slice(const SpmmArgs& args, const RowBitmapKernel& kernel,
                    const ParallelFor& parallel_for) {
  const int64_t token_blocks = (args.n + kernel.max_tokens - 1) / kernel.max_tokens;
  // Blocks whose sizes differ by at most one token.
  const auto first_token = [&](int64_t i) { return i * args.n / token_blocks; };
  const int64_t token_elems = num_groups(args.weight.k) * kGroupCols;
  const Buffer x(static_cast<size_t>(args.n * token_elems) * sizeof(T));
  std::vector<RowBitmapTokens> tokens(static_cast<size_t>(token_blocks));
  parallel_for(token_blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      RowBitmapTokens& block = tokens[static_cast<size_t>(i)];
      block.count = static_cast<int>(first_token(i + 1) - first_token(i));
      prepare<kType>(args, kernel, first_token(i), x.data<T>() + first_token(i) * token_elems,
                     block);
    }
  });

  // Each further token costs a third of what decoding and the first token cost.
  const int64_t block_work = std::max<int64_t>(1, kBlockRows * args.weight.k * (args.n + 2) / 3);
  const int64_t grain = std::max<int64_t>(1, kGrainElems / block_work);
  parallel_for(num_row_blocks(args.weight.m), grain, [&](int64_t begin, int64_t end) {
    const int64_t most_tokens = std::min(args.n, kMaxRowTokenBlocks * kernel.max_tokens);
    const auto num_sums = static_cast<size_t>(kCallBlocks * kBlockRows * most_tokens);
    const Buffer sums(num_sums * sizeof(float));
    const Buffer kept(kernel.keeps_sums ? num_sums * kKeptLanes * sizeof(float) : 0);
    for (int64_t first = begin; first < end; first += kCallBlocks) {
      const int64_t last = std::min(end, first + kCallBlocks);
      for (int64_t i = 0; i < token_blocks; i += kMaxRowTokenBlocks) {
        const int64_t count = std::min(kMaxRowTokenBlocks, token_blocks - i);
        kernel.multiply({args.weight, first, last, tokens.data() + i, count, sums.data<float>(),
                         kept.data<float>()});
        const float* found = sums.data<float>();
        for (int64_t j = i; j < i + count; ++j) {
          const int num_tokens = tokens[static_cast<size_t>(j)].count;
          finish<kType>(args, first_token(j), num_tokens, first, last, found);
          found += (last - first) * num_tokens * kBlockRows;
        }
      }
    }
  });
}

// kType is the type of X, bias and Y.
template <ValueType kType>
void multiply_slices(const SpmmArgs& args, const RowBitmapKernel& kernel,
                     const ParallelFor& parallel_for) {
  for (int64_t first = 0; first < args.n; first += kSliceTokens) {
    SpmmArgs slice = args;
    slice.x += first * args.x_stride;
    slice.y += first * args.weight.m;
    slice.n = std::min(kSliceTokens, args.n - first);
    if (kernel.quantize != nullptr) {
      multiply_slice<kType, int8_t>(slice, kernel, parallel_for);
    } else if (kernel.widen == nullptr) {
      multiply_slice<kType, uint16_t>(slice, kernel, parallel_for);
    } else {
      multiply_slice<kType, float>(slice, kernel, parallel_for);
    }
  }
}

void multiply(const SpmmArgs& args, const RowBitmapKernel& kernel,
              const ParallelFor& parallel_for) {
  if (value_traits(args.weight.value_type).dense == ValueType::kFloat16) {
    multiply_slices<ValueType::kFloat16>(args, kernel, parallel_for);
  } else {
    multiply_slices<ValueType::kBfloat16>(args, kernel, parallel_for);
  }
}

// Decodes blocks first ... last - 1 by decode_block(block, its rows, k, where to).
template <typename Raw, typename DecodeBlock>
void decode_blocks(const PackedView& weight, int64_t first, int64_t last,
                   const DecodeBlock& decode_block, const ParallelFor& parallel_for,
                   uint16_t* dense) {
  parallel_for(last - first, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const RowBlockOf<Raw> block = row_block<Raw>(weight, first + i);
      const int rows = rows_of_block(weight.m, first + i);
      uint16_t* to = dense + i * kBlockRows * weight.k;
      if (block.masks == nullptr) {
        std::fill_n(to, rows * weight.k, uint16_t{0});
      } else {
        decode_block(block, rows, weight.k, to);
      }
    }
  });
}

}  // namespace

void spmm_cpu_row_bitmap(const SpmmArgs& args, CpuIsa isa, const ParallelFor& parallel_for) {
  multiply(args, row_bitmap_kernel(isa, args.weight.value_type), parallel_for);
}

void spmm_cpu_row_bitmap_int8x(const SpmmArgs& args, CpuIsa isa, const ParallelFor& parallel_for) {
  multiply(args, row_bitmap_kernel(isa, args.weight.value_type, true), parallel_for);
}

void row_bitmap_decode(const PackedView& weight, int64_t first_row, int64_t last_row, CpuIsa isa,
                       const ParallelFor& parallel_for, uint16_t* dense) {
  const int64_t first = first_row / kBlockRows, last = num_row_blocks(last_row);
  const RowBitmapKernel kernel = row_bitmap_kernel(isa, weight.value_type);
  if (value_traits(weight.value_type).bits == 16) {
    decode_blocks<uint16_t>(weight, first, last, kernel.decode_block, parallel_for, dense);
  } else if (kernel.decode_quantized_block != nullptr) {
    decode_blocks<uint8_t>(weight, first, last, kernel.decode_quantized_block, parallel_for, dense);
  } else {
    unpack_tile_rows(packed_format(Format::kRowBitmap), weight, first, last, parallel_for, dense);
  }
}

}  // namespace flash_llm
