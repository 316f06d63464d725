// Slices and concatenations of packed weights, on any device. The result is byte for byte the same
// as packing the sliced or concatenated dense weight, or, of quantised weights, the sliced or
// concatenated values and scales.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

#include "torch/checks.h"

namespace flash_llm {

// Rows [first_row, last_row) and columns [first_col, last_col) of a packed weight, in its format.
// A slice of all columns whose rows begin and end at multiples of PackedFormat::slice_rows is
// copied; any other is unpacked, sliced and packed again.
Packed slice(at::IntArrayRef header, const at::Tensor& offsets, const at::Tensor& payload,
             int64_t first_row, int64_t last_row, int64_t first_col, int64_t last_col);

// The rows of several packed weights, one after the other; headers[8 * number of weights]. All must
// have the same number of columns, format, value type and device. If the rows of each but the last
// are a multiple of PackedFormat::slice_rows they are copied, else unpacked, concatenated and
// packed again.
Packed concat(at::IntArrayRef headers, at::TensorList offsets, at::TensorList payloads);

}  // namespace flash_llm
