// The CPU oracle: short enough to be believed.
#include <algorithm>
#include <cstddef>
#include <vector>

#include "core/activation.h"
#include "core/element.h"
#include "core/spmm.h"

namespace flash_llm {
namespace {

template <ValueType kType>
void reference(const SpmmArgs& args, const ParallelFor& parallel_for) {
  const TiledCslView& weight = args.weight;
  const int64_t m = weight.m, k = weight.k;
  const int64_t tile_cols = num_tile_cols(k);
  const int64_t padded_k = tile_cols * kTileK;
  parallel_for(num_tile_rows(m), 1, [&](int64_t begin, int64_t end) {
    // One tile row of the dense weight: kTileM x padded_k.
    std::vector<double> dense(static_cast<size_t>(kTileM * padded_k));
    for (int64_t tile_row = begin; tile_row < end; ++tile_row) {
      std::fill(dense.begin(), dense.end(), 0.0);
      for (int64_t tile_col = 0; tile_col < tile_cols; ++tile_col) {
        const auto [first, last] = tile_entry_range(weight, tile_row * tile_cols + tile_col);
        for (int64_t i = first; i < last; ++i) {
          const int place = static_cast<int>(weight.entries[i] >> 16) % kTileElems;
          dense[static_cast<size_t>(row_of_place(place) * padded_k + tile_col * kTileK +
                                    col_of_place(place))] =
              to_float<kType>(static_cast<uint16_t>(weight.entries[i]));
        }
      }
      const int64_t rows = std::min<int64_t>(kTileM, m - tile_row * kTileM);
      for (int64_t token = 0; token < args.n; ++token) {
        for (int64_t row = 0; row < rows; ++row) {
          const int64_t out = tile_row * kTileM + row;
          double sum = args.bias ? static_cast<double>(to_float<kType>(args.bias[out])) : 0.0;
          for (int64_t col = 0; col < k; ++col) {
            sum += dense[static_cast<size_t>(row * padded_k + col)] *
                   static_cast<double>(to_float<kType>(args.x[token * args.x_stride + col]));
          }
          args.y[token * m + out] =
              from_float<kType>(round_to_odd(apply_activation(sum, args.activation)));
        }
      }
    }
  });
}

}  // namespace

Status parse_activation(const std::string& name, Activation* out) {
  if (name == "none") {
    *out = Activation::kNone;
  } else if (name == "relu") {
    *out = Activation::kRelu;
  } else if (name == "gelu") {
    *out = Activation::kGelu;
  } else if (name == "silu") {
    *out = Activation::kSilu;
  } else {
    return Status::invalid_value(
        "activation must be \"none\", \"relu\", \"gelu\" or \"silu\", got \"" + name + "\"");
  }
  return Status::success();
}

void spmm_cpu_reference(const SpmmArgs& args, const ParallelFor& parallel_for) {
  if (args.value_type == ValueType::kFloat16) {
    reference<ValueType::kFloat16>(args, parallel_for);
  } else {
    reference<ValueType::kBfloat16>(args, parallel_for);
  }
}

}  // namespace flash_llm
