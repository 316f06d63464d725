// Cutting and joining packed weights, on any device. The result is byte for byte what packing the
// cut or joined dense weight gives.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

#include "torch/checks.h"

namespace flash_llm {

// Rows [first_row, last_row) and columns [first_col, last_col) of a packed weight, in its format.
// All columns of rows that begin and end at the format's natural borders (PackedFormat::slice_rows)
// are copied; anything else is unpacked, cut and packed again.
Packed slice(at::IntArrayRef header, const at::Tensor& offsets, const at::Tensor& payload,
             int64_t first_row, int64_t last_row, int64_t first_col, int64_t last_col);

// The rows of several packed weights, one after the other: headers[8 * number of weights]. All must
// have the same columns, format, value type and device. Where each but the last ends at a natural
// border of the format they are copied, else unpacked, joined and packed again.
Packed concat(at::IntArrayRef headers, at::TensorList offsets, at::TensorList payloads);

}  // namespace flash_llm
