// The CPU kernel of Tiled-CSL, for few tokens. Each thread computes whole tile rows. A tile is
// decoded, transposed, into a 16 KB buffer that stays in L1: column after column of 128 rows. So
// the inner loop is a multiply-add over consecutive rows, which vectorises without reordering any
// sum.
#include <algorithm>
#include <array>
#include <cstddef>

#include "cpu/activation.h"
#include "cpu/spmm.h"
#include "format/element.h"
#include "format/tiled_csl.h"

// Compiles a function for several instruction sets; the loader picks the best clone for the CPU.
// Sanitizer builds, other compilers and other architectures compile it once.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define FLASH_LLM_VECTOR_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FLASH_LLM_VECTOR_CLONES
#endif

namespace flash_llm {
namespace {

constexpr int kMaxTokens = 8;
// Rows whose sums are held in registers at a time.
constexpr int kRowBlock = 32;

struct Tile {
  // values[c * kTileM + r] = raw value at (row r, column c)
  alignas(64) std::array<uint16_t, kTileElems> values;
};

using Sums = std::array<std::array<float, kTileM>, kMaxTokens>;

// The index in a Tile for each position of the format: a load instead of a dozen shifts per
// nonzero.
constexpr std::array<uint16_t, kTileElems> transposed_positions() {
  std::array<uint16_t, kTileElems> table{};
  for (int position = 0; position < kTileElems; ++position) {
    table[static_cast<size_t>(position)] =
        static_cast<uint16_t>(col_of_position(position) * kTileM + row_of_position(position));
  }
  return table;
}

constexpr std::array<uint16_t, kTileElems> kTransposedPosition = transposed_positions();

void decode(const PackedView& weight, int64_t tile_idx, Tile& tile) {
  tile.values.fill(0);
  const auto [first, last] = tile_entry_range(weight, tile_idx);
  for (int64_t i = first; i < last; ++i) {
    const uint32_t entry = weight.payload[i];
    tile.values[kTransposedPosition[(entry >> 16) % kTileElems]] = static_cast<uint16_t>(entry);
  }
}

// sums[n][r] += sum over c of x[n][c] * tile[c][r]; x has `cols` valid columns per token.
template <ValueType kType, int kTokens>
FLASH_LLM_VECTOR_CLONES void accumulate(const Tile& tile, const float (*x)[kTileK], int cols,
                                        Sums& sums) {
  for (size_t row0 = 0; row0 < kTileM; row0 += kRowBlock) {
    float acc[kTokens][kRowBlock];
    for (size_t n = 0; n < kTokens; ++n) {
      for (size_t r = 0; r < kRowBlock; ++r) acc[n][r] = sums[n][row0 + r];
    }
    for (size_t c = 0; c < static_cast<size_t>(cols); ++c) {
      const uint16_t* column = tile.values.data() + c * kTileM + row0;
      float w[kRowBlock];
      for (size_t r = 0; r < kRowBlock; ++r) w[r] = to_float<kType>(column[r]);
      for (size_t n = 0; n < kTokens; ++n) {
        for (size_t r = 0; r < kRowBlock; ++r) acc[n][r] += x[n][c] * w[r];
      }
    }
    for (size_t n = 0; n < kTokens; ++n) {
      for (size_t r = 0; r < kRowBlock; ++r) sums[n][row0 + r] = acc[n][r];
    }
  }
}

// One tile row times `tokens` (at most 8) rows of X, which start at `token0`.
template <ValueType kType>
void multiply_tile_row(const SpmmArgs& args, int64_t tile_row, int64_t token0, int tokens) {
  const PackedView& weight = args.weight;
  const int64_t tile_cols = num_tile_cols(weight.k);
  Tile tile;
  alignas(64) float x[kMaxTokens][kTileK] = {};
  alignas(64) Sums sums{};
  for (int64_t tile_col = 0; tile_col < tile_cols; ++tile_col) {
    decode(weight, tile_row * tile_cols + tile_col, tile);
    const int64_t col0 = tile_col * kTileK;
    const int cols = static_cast<int>(std::min<int64_t>(kTileK, weight.k - col0));
    for (int n = 0; n < tokens; ++n) {
      const uint16_t* row = args.x + (token0 + n) * args.x_stride + col0;
      for (int c = 0; c < cols; ++c) x[n][c] = to_float<kType>(row[c]);
    }
    if (tokens == 1) {
      accumulate<kType, 1>(tile, x, cols, sums);
    } else if (tokens <= 4) {
      accumulate<kType, 4>(tile, x, cols, sums);
    } else {
      accumulate<kType, kMaxTokens>(tile, x, cols, sums);
    }
  }
  const int64_t row0 = tile_row * kTileM;
  const int64_t rows = std::min<int64_t>(kTileM, weight.m - row0);
  for (int n = 0; n < tokens; ++n) {
    for (int64_t r = 0; r < rows; ++r) {
      const float bias = args.bias ? to_float<kType>(args.bias[row0 + r]) : 0.0F;
      const float sum = sums[static_cast<size_t>(n)][static_cast<size_t>(r)] + bias;
      args.y[(token0 + n) * weight.m + row0 + r] =
          from_float<kType>(apply_activation(sum, args.activation));
    }
  }
}

template <ValueType kType>
void multiply(const SpmmArgs& args, const ParallelFor& parallel_for) {
  parallel_for(num_tile_rows(args.weight.m), 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile_row = begin; tile_row < end; ++tile_row) {
      for (int64_t token0 = 0; token0 < args.n; token0 += kMaxTokens) {
        const int tokens = static_cast<int>(std::min<int64_t>(kMaxTokens, args.n - token0));
        multiply_tile_row<kType>(args, tile_row, token0, tokens);
      }
    }
  });
}

}  // namespace

void spmm_cpu_tiled_csl(const SpmmArgs& args, const ParallelFor& parallel_for) {
  switch (args.weight.value_type) {
    case ValueType::kFloat16:
      return multiply<ValueType::kFloat16>(args, parallel_for);
    case ValueType::kBfloat16:
      return multiply<ValueType::kBfloat16>(args, parallel_for);
    case ValueType::kInt8Float16:
    case ValueType::kInt8Bfloat16:
    case ValueType::kFp8Float16:
    case ValueType::kFp8Bfloat16:
    case ValueType::kInt4Float16:
    case ValueType::kInt4Bfloat16:
      return;  // never: the format holds 16-bit values only
  }
}

}  // namespace flash_llm
