// The CPU oracle: so short that reading it shows that it is correct.
#include <algorithm>
#include <cstddef>
#include <vector>

#include "cpu/activation.h"
#include "cpu/spmm.h"
#include "format/element.h"

namespace flash_llm {
namespace {

// kType is the type of the stored values, kDense that of X, bias and Y.
template <ValueType kType, ValueType kDense = value_traits(kType).dense>
void reference(const SpmmArgs& args, const ParallelFor& parallel_for) {
  const PackedFormat& format = packed_format(args.format);
  const PackedView& weight = args.weight;
  const int64_t m = weight.m, k = weight.k;
  parallel_for(format.tile_rows(m), 1, [&](int64_t begin, int64_t end) {
    std::vector<RawOf<kType>> values(static_cast<size_t>(format.tile_m * k));  // one tile row
    const int64_t row_scales = scales_per_row(kType, k);
    std::vector<float> scales(static_cast<size_t>(format.tile_m * row_scales));
    for (int64_t tile_row = begin; tile_row < end; ++tile_row) {
      format.unpack_tile_row(weight, tile_row, values.data(), scales.data());
      const int64_t row0 = tile_row * format.tile_m;
      const int64_t rows = std::min<int64_t>(format.tile_m, m - row0);
      for (int64_t token = 0; token < args.n; ++token) {
        for (int64_t row = 0; row < rows; ++row) {
          double sum =
              args.bias ? static_cast<double>(to_float<kDense>(args.bias[row0 + row])) : 0.0;
          for (int64_t col = 0; col < k; ++col) {
            const RawOf<kType> value = values[static_cast<size_t>(row * k + col)];
            const auto group = static_cast<size_t>(row * row_scales + scale_group(kType, col));
            const double scale = is_quantized(kType) ? scales[group] : 1.0;
            sum += scale * static_cast<double>(to_float<kType>(value)) *
                   static_cast<double>(to_float<kDense>(args.x[token * args.x_stride + col]));
          }
          args.y[token * m + row0 + row] =
              from_float<kDense>(round_to_odd(apply_activation(sum, args.activation)));
        }
      }
    }
  });
}

}  // namespace

void spmm_cpu_reference(const SpmmArgs& args, const ParallelFor& parallel_for) {
  switch (args.weight.value_type) {
    case ValueType::kFloat16:
      return reference<ValueType::kFloat16>(args, parallel_for);
    case ValueType::kBfloat16:
      return reference<ValueType::kBfloat16>(args, parallel_for);
    case ValueType::kInt8Float16:
      return reference<ValueType::kInt8Float16>(args, parallel_for);
    case ValueType::kInt8Bfloat16:
      return reference<ValueType::kInt8Bfloat16>(args, parallel_for);
    case ValueType::kFp8Float16:
      return reference<ValueType::kFp8Float16>(args, parallel_for);
    case ValueType::kFp8Bfloat16:
      return reference<ValueType::kFp8Bfloat16>(args, parallel_for);
    case ValueType::kInt4Float16:
      return reference<ValueType::kInt4Float16>(args, parallel_for);
    case ValueType::kInt4Bfloat16:
      return reference<ValueType::kInt4Bfloat16>(args, parallel_for);
  }
}

}  // namespace flash_llm
