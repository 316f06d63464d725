// The row bitmap's products on the CPU: prepares X for the kernels (row_bitmap_kernels.h), cuts the
// work, and finishes what they have summed.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>
#include <vector>

#include "core/activation.h"
#include "core/element.h"
#include "core/row_bitmap.h"
#include "core/row_bitmap_kernels.h"
#include "core/spmm.h"

namespace flash_llm {
namespace {

// Blocks that a kernel is called for at once. With more tokens than it takes at a time, their words
// stay in the second-level cache from one call to the next.
constexpr int64_t kCallBlocks = 16;
// Elements of the weight, times tokens, that are worth a thread: about 4 us.
constexpr int64_t kGrainElems = int64_t{1} << 17;

constexpr int kBf16MantissaBits = 7;
// Products whose biased exponents add up to this are 2^-112 or larger, and multiples of 2^-126, as
// are all sums of such products.
constexpr uint32_t kNormalExponents = 2 * 127 - 112;
constexpr uint32_t kNever = std::numeric_limits<uint32_t>::max();

using Buffer = std::vector<uint32_t>;  // behind RowBitmapTokens::x, unless that is the caller's

// The smallest magnitude that is not zero, and the largest, as integers.
struct Magnitudes {
  uint16_t smallest_less_1 = 0xFFFF;  // zeros wrap around and never win
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

// RowBitmapProduct::smallest_normal for bf16 inputs.
uint32_t smallest_normal_weight(const Magnitudes& x) {
  const uint32_t exponent = (x.smallest_less_1 + 1U) >> kBf16MantissaBits;
  if (exponent == 0) return kNever;  // a subnormal input
  const uint32_t needed = kNormalExponents > exponent ? kNormalExponents - exponent : 1;
  return std::max(needed, 1U) << kBf16MantissaBits;
}

// block.count tokens of X from `token0` on.
template <ValueType kType>
void prepare(const SpmmArgs& args, bool float_x, int64_t token0, RowBitmapTokens& block,
             Buffer& buffer) {
  const int64_t k = args.weight.k, groups = num_groups(k);
  const uint16_t infinity = kType == ValueType::kFloat16 ? 0x7C00 : 0x7F80;
  Magnitudes all;
  for (int token = 0; token < block.count; ++token) {
    Magnitudes own;
    own.add(args.x + (token0 + token) * args.x_stride, k);
    block.empty[token] = own.largest < infinity ? 0.0F : std::numeric_limits<float>::quiet_NaN();
    all.smallest_less_1 = std::min(all.smallest_less_1, own.smallest_less_1);
  }
  block.smallest_normal = smallest_normal_weight(all);

  const uint16_t* first = args.x + token0 * args.x_stride;
  if (!float_x && block.count == 1 && k % kGroupCols == 0) {
    block.x = first;
    return;
  }
  constexpr size_t kLineWords = 16;
  const auto elems = static_cast<size_t>(groups * block.count * kGroupCols);
  buffer.assign((float_x ? elems : elems / 2) + kLineWords, 0);
  const auto address = reinterpret_cast<uintptr_t>(buffer.data());
  uint32_t* aligned = buffer.data() + (64 - address % 64) % 64 / sizeof(uint32_t);
  block.x = aligned;
  for (int token = 0; token < block.count; ++token) {
    const uint16_t* row = first + token * args.x_stride;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t to = (group * block.count + token) * kGroupCols;
      const uint16_t* from = row + group * kGroupCols;
      const int64_t cols = std::min<int64_t>(kGroupCols, k - group * kGroupCols);
      if (float_x) {
        auto* out = reinterpret_cast<float*>(aligned) + to;
        for (int64_t i = 0; i < cols; ++i) out[i] = to_float<kType>(from[i]);
      } else {
        std::memcpy(reinterpret_cast<uint16_t*>(aligned) + to, from,
                    static_cast<size_t>(cols) * sizeof(uint16_t));
      }
    }
  }
}

template <ValueType kType>
void finish(const SpmmArgs& args, int64_t token0, int tokens, int64_t first_block,
            int64_t last_block, const float* sums) {
  const int64_t m = args.weight.m;
  const int64_t row0 = first_block * kBlockRows, rows = std::min(m, last_block * kBlockRows) - row0;
  for (int token = 0; token < tokens; ++token) {
    uint16_t* y = args.y + (token0 + token) * m + row0;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t block = row / kBlockRows;
      const float sum = sums[(block * tokens + token) * kBlockRows + row % kBlockRows];
      const float bias = args.bias ? to_float<kType>(args.bias[row0 + row]) : 0.0F;
      y[row] = from_float<kType>(apply_activation(sum + bias, args.activation));
    }
  }
}

template <ValueType kType>
void multiply(const SpmmArgs& args, CpuIsa isa, const ParallelFor& parallel_for) {
  const RowBitmapKernel kernel = row_bitmap_kernel(isa, kType);
  const int64_t at_a_time = args.n <= kernel.max_tokens ? kernel.max_tokens : kernel.tokens_of_many;
  const int64_t token_blocks = (args.n + at_a_time - 1) / at_a_time;
  // Blocks as equal as can be.
  const auto first_token = [&](int64_t i) { return i * args.n / token_blocks; };
  std::vector<RowBitmapTokens> tokens(static_cast<size_t>(token_blocks));
  std::vector<Buffer> buffers(tokens.size());
  parallel_for(token_blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      RowBitmapTokens& block = tokens[static_cast<size_t>(i)];
      block.count = static_cast<int>(first_token(i + 1) - first_token(i));
      prepare<kType>(args, kernel.float_x, first_token(i), block, buffers[static_cast<size_t>(i)]);
    }
  });

  const int64_t block_work = std::max<int64_t>(1, kBlockRows * args.weight.k * args.n);
  const int64_t grain = std::max<int64_t>(1, kGrainElems / block_work);
  parallel_for(num_row_blocks(args.weight.m), grain, [&](int64_t begin, int64_t end) {
    const int64_t most_tokens = std::min(args.n, kMaxRowTokenBlocks * at_a_time);
    std::vector<float> sums(static_cast<size_t>(kCallBlocks * kBlockRows * most_tokens));
    for (int64_t first = begin; first < end; first += kCallBlocks) {
      const int64_t last = std::min(end, first + kCallBlocks);
      for (int64_t i = 0; i < token_blocks; i += kMaxRowTokenBlocks) {
        const int64_t count = std::min(kMaxRowTokenBlocks, token_blocks - i);
        kernel.multiply({args.weight, first, last, tokens.data() + i, count, sums.data()});
        const float* found = sums.data();
        for (int64_t j = i; j < i + count; ++j) {
          const int num_tokens = tokens[static_cast<size_t>(j)].count;
          finish<kType>(args, first_token(j), num_tokens, first, last, found);
          found += (last - first) * num_tokens * kBlockRows;
        }
      }
    }
  });
}

}  // namespace

void spmm_cpu_rows(const SpmmArgs& args, CpuIsa isa, const ParallelFor& parallel_for) {
  if (args.value_type == ValueType::kFloat16) {
    multiply<ValueType::kFloat16>(args, isa, parallel_for);
  } else {
    multiply<ValueType::kBfloat16>(args, isa, parallel_for);
  }
}

void row_bitmap_decode(const PackedView& weight, int64_t first_row, int64_t last_row, CpuIsa isa,
                       const ParallelFor& parallel_for, uint16_t* dense) {
  // Decoding moves patterns, of whatever type.
  const RowBitmapKernel kernel = row_bitmap_kernel(isa, ValueType::kBfloat16);
  const int64_t first = first_row / kBlockRows;
  parallel_for(num_row_blocks(last_row) - first, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const RowBlock block = row_block(weight, first + i);
      const int rows = rows_of_block(weight.m, first + i);
      uint16_t* to = dense + i * kBlockRows * weight.k;
      if (block.masks == nullptr) {
        std::fill_n(to, rows * weight.k, uint16_t{0});
      } else {
        kernel.decode_block(block, rows, weight.k, to);
      }
    }
  });
}

}  // namespace flash_llm
