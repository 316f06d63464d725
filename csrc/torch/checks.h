// The checks that the operators make first, and the structs that hold checked arguments. The checks
// do not depend on the device; every failure raises the Python exception for its Status.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "base/status.h"
#include "format/packed_format.h"
#include "format/packed_header.h"
#include "format/prune.h"
#include "plan/device.h"
#include "plan/problem.h"

namespace flash_llm {

using Packed = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // header, offsets, payload

using Quantized = std::tuple<at::Tensor, at::Tensor>;  // values [m, k], and scales

// Raises the Python exception for `status`, unless it is success; the message begins with the
// operator's name.
void raise_if_error(const char* op, const Status& status);

// The dtype of an unpacked weight of this value type, and of the x that it multiplies.
at::ScalarType scalar_type(ValueType type);

// A tensor's elements as raw 16-bit patterns.
const uint16_t* raw(const at::Tensor& tensor);
uint16_t* mutable_raw(const at::Tensor& tensor);

// A packed weight whose sizes, dtypes and device have been checked, and the tensors behind it.
struct PackedWeight {
  PackedHeader header;
  at::Tensor offsets, payload;
  bool copied = false;  // by this call, with kernels in the current stream

  const PackedFormat& format() const { return packed_format(header.format); }
  PackedView view() const;
};

PackedWeight check_packed(const char* op, at::IntArrayRef header, const at::Tensor& offsets,
                          const at::Tensor& payload);

// Refuses a weight whose values are not quantised, for unpack_quantized.
void check_quantized(const PackedWeight& weight);

// A matrix to pack: two-dimensional, values as wide as those of its type, rows contiguous.
struct DenseMatrix {
  at::Tensor tensor;
  ValueType value_type;
  int64_t m, k, ld;
  at::Tensor scales = {};  // float32 [m] or [m, groups], contiguous, for types with scales

  ValueMatrix matrix() const;
};

DenseMatrix check_dense(const char* op, const at::Tensor& dense);
// The values and scales of pack_quantized, for a weight of `dtype`: int8 values with scales [m],
// int4 values, also as int8, with scales [m, groups], or float8_e4m3fn with scales [m].
DenseMatrix check_quantized(const at::Tensor& values, const at::Tensor& scales,
                            at::ScalarType dtype);

at::Tensor header_tensor(const PackedHeader& header);
PackedHeader make_header(const DenseMatrix& dense, Format format, int64_t nnz, int64_t words);

// Refuses the name of an unknown format; "auto" is allowed.
void check_format(const char* op, c10::string_view name);

// The format into which to pack `dense` on `device`; "auto" may count its nonzeros.
// expected_tokens is as in select_format.
const PackedFormat& choose_format(const char* op, c10::string_view name, const DenseMatrix& dense,
                                  const DeviceInfo& device, int64_t expected_tokens);

PruneTarget check_prune_target(std::optional<double> sparsity, c10::string_view scope);

// One checked spmm call; nothing in it depends on the device.
struct SpmmCall {
  PackedWeight weight;
  at::Tensor x;  // [n, k], rows contiguous
  std::optional<at::Tensor> bias;
  Activation activation;
  bool rounds_x;
  int64_t n;
  std::vector<int64_t> y_sizes;

  SpmmProblem problem() const;
  // Whether there is nothing to multiply: the result is empty, or act(bias) if K is 0.
  bool is_degenerate() const;
};

SpmmCall check_spmm(const at::Tensor& x, at::IntArrayRef header, const at::Tensor& offsets,
                    const at::Tensor& payload, const std::optional<at::Tensor>& bias,
                    c10::string_view activation, c10::string_view x_quantization);

// The arguments of the kernels. The call must not be degenerate.
SpmmArgs spmm_args(const SpmmCall& call, const at::Tensor& y);

void activate_(at::Tensor& y, Activation activation);

// The result of a degenerate call.
at::Tensor spmm_degenerate(const SpmmCall& call);

// The product by the vendor's GEMM, with the unpacked weight `dense`.
at::Tensor spmm_dense(const SpmmCall& call, const at::Tensor& dense);

}  // namespace flash_llm
