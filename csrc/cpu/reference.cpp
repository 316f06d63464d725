// The CPU oracle: so short that reading it shows that it is correct.
#include <algorithm>
#include <cstddef>
#include <vector>

#include "cpu/activation.h"
#include "cpu/spmm.h"
#include "format/element.h"

namespace flash_llm {
namespace {

template <ValueType kType>
void reference(const SpmmArgs& args, const ParallelFor& parallel_for) {
  const PackedFormat& format = packed_format(args.format);
  const PackedView& weight = args.weight;
  const int64_t m = weight.m, k = weight.k;
  parallel_for(format.tile_rows(m), 1, [&](int64_t begin, int64_t end) {
    std::vector<uint16_t> dense(static_cast<size_t>(format.tile_m * k));  // one tile row
    for (int64_t tile_row = begin; tile_row < end; ++tile_row) {
      format.unpack_tile_row(weight, tile_row, dense.data());
      const int64_t row0 = tile_row * format.tile_m;
      const int64_t rows = std::min<int64_t>(format.tile_m, m - row0);
      for (int64_t token = 0; token < args.n; ++token) {
        for (int64_t row = 0; row < rows; ++row) {
          double sum =
              args.bias ? static_cast<double>(to_float<kType>(args.bias[row0 + row])) : 0.0;
          for (int64_t col = 0; col < k; ++col) {
            sum += static_cast<double>(to_float<kType>(dense[static_cast<size_t>(row * k + col)])) *
                   static_cast<double>(to_float<kType>(args.x[token * args.x_stride + col]));
          }
          args.y[token * m + row0 + row] =
              from_float<kType>(round_to_odd(apply_activation(sum, args.activation)));
        }
      }
    }
  });
}

}  // namespace

void spmm_cpu_reference(const SpmmArgs& args, const ParallelFor& parallel_for) {
  switch (args.value_type) {
    case ValueType::kFloat16:
      return reference<ValueType::kFloat16>(args, parallel_for);
    case ValueType::kBfloat16:
      return reference<ValueType::kBfloat16>(args, parallel_for);
  }
}

}  // namespace flash_llm
