// The row bitmap's products on the CPU: prepares X for the kernels (row_bitmap_kernels.h), cuts the
// work, and finishes what they have summed.
#include <algorithm>
#include <array>
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

// Tokens first ... first + count - 1 of X as a kernel wants them.
struct TokenBlock {
  int64_t first = 0;
  int count = 0;
  const void* x = nullptr;
  std::vector<uint32_t> buffer;  // behind x, unless x is the caller's
  uint32_t smallest_normal = 0;
  std::array<float, kMaxRowTokens> empty{};
};

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

template <ValueType kType>
void prepare(const SpmmArgs& args, bool float_x, TokenBlock& block) {
  const int64_t k = args.weight.k, groups = num_groups(k);
  const uint16_t infinity = kType == ValueType::kFloat16 ? 0x7C00 : 0x7F80;
  Magnitudes all;
  for (int token = 0; token < block.count; ++token) {
    Magnitudes own;
    own.add(args.x + (block.first + token) * args.x_stride, k);
    block.empty[static_cast<size_t>(token)] =
        own.largest < infinity ? 0.0F : std::numeric_limits<float>::quiet_NaN();
    all.smallest_less_1 = std::min(all.smallest_less_1, own.smallest_less_1);
  }
  block.smallest_normal = smallest_normal_weight(all);

  const uint16_t* first = args.x + block.first * args.x_stride;
  if (!float_x && block.count == 1 && k % kGroupCols == 0) {
    block.x = first;
    return;
  }
  constexpr size_t kLineWords = 16;
  const auto elems = static_cast<size_t>(groups * block.count * kGroupCols);
  block.buffer.assign((float_x ? elems : elems / 2) + kLineWords, 0);
  const auto address = reinterpret_cast<uintptr_t>(block.buffer.data());
  uint32_t* aligned = block.buffer.data() + (64 - address % 64) % 64 / sizeof(uint32_t);
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
void finish(const SpmmArgs& args, const TokenBlock& tokens, int64_t first_block, int64_t last_block,
            const float* sums) {
  const int64_t m = args.weight.m;
  const int64_t row0 = first_block * kBlockRows, rows = std::min(m, last_block * kBlockRows) - row0;
  for (int token = 0; token < tokens.count; ++token) {
    uint16_t* y = args.y + (tokens.first + token) * m + row0;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t block = row / kBlockRows;
      const float sum = sums[(block * tokens.count + token) * kBlockRows + row % kBlockRows];
      const float bias = args.bias ? to_float<kType>(args.bias[row0 + row]) : 0.0F;
      y[row] = from_float<kType>(apply_activation(sum + bias, args.activation));
    }
  }
}

template <ValueType kType>
void multiply(const SpmmArgs& args, CpuIsa isa, const ParallelFor& parallel_for) {
  const RowBitmapKernel kernel = row_bitmap_kernel(isa, kType);
  // Blocks of tokens as equal as can be.
  const int64_t token_blocks = (args.n + kernel.max_tokens - 1) / kernel.max_tokens;
  std::vector<TokenBlock> tokens(static_cast<size_t>(token_blocks));
  for (int64_t i = 0; i < token_blocks; ++i) {
    TokenBlock& block = tokens[static_cast<size_t>(i)];
    block.first = i * args.n / token_blocks;
    block.count = static_cast<int>((i + 1) * args.n / token_blocks - block.first);
  }
  parallel_for(token_blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      prepare<kType>(args, kernel.float_x, tokens[static_cast<size_t>(i)]);
    }
  });

  const int64_t block_work = std::max<int64_t>(1, kBlockRows * args.weight.k * args.n);
  const int64_t grain = std::max<int64_t>(1, kGrainElems / block_work);
  parallel_for(num_row_blocks(args.weight.m), grain, [&](int64_t begin, int64_t end) {
    std::array<float, kCallBlocks * kMaxRowTokens * kBlockRows> sums;
    for (int64_t first = begin; first < end; first += kCallBlocks) {
      const int64_t last = std::min(end, first + kCallBlocks);
      for (const TokenBlock& block : tokens) {
        kernel.multiply({args.weight, block.x, block.count, first, last, block.smallest_normal,
                         block.empty.data(), sums.data()});
        finish<kType>(args, block, first, last, sums.data());
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
    kernel.decode(weight, first + begin, first + end, dense + begin * kBlockRows * weight.k);
  });
}

}  // namespace flash_llm
