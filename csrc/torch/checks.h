// What the operators check before any work, and what they know afterwards. The checks do not depend
// on the device; every failure becomes the Python exception that its Status stands for.
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

// Raises the Python exception that `status` stands for, with the operator's name in front.
void raise_if_error(const char* op, const Status& status);

// The dtype of an unpacked weight, and of the x that it multiplies.
at::ScalarType scalar_type(ValueType type);

// Raw 16-bit elements.
const uint16_t* raw(const at::Tensor& tensor);
uint16_t* mutable_raw(const at::Tensor& tensor);

// A packed weight whose sizes, dtypes and device have been checked, and the tensors behind it.
struct PackedWeight {
  PackedHeader header;
  at::Tensor offsets, payload;
  bool copied = false;  // just now, by kernels in the current stream

  const PackedFormat& format() const { return packed_format(header.format); }
  PackedView view() const;
};

// `scales` must be there exactly where the value type has scales, which none has yet.
PackedWeight check_packed(const char* op, at::IntArrayRef header, const at::Tensor& offsets,
                          const at::Tensor& payload, const std::optional<at::Tensor>& scales);

// A matrix to pack: two-dimensional, 16-bit, rows contiguous.
struct DenseMatrix {
  at::Tensor tensor;
  ValueType value_type;
  int64_t m, k, ld;
};

DenseMatrix check_dense(const char* op, const at::Tensor& dense);

at::Tensor header_tensor(const PackedHeader& header);
PackedHeader make_header(const DenseMatrix& dense, Format format, int64_t nnz, int64_t words);

// Refuses the name of a format that does not exist; "auto" is one that does.
void check_format(const char* op, c10::string_view name);

// The format to pack `dense`, a checked matrix on `device`, into; "auto" counts its nonzeros.
const PackedFormat& choose_format(const char* op, c10::string_view name, const DenseMatrix& dense,
                                  const DeviceInfo& device);

PruneTarget check_prune_target(std::optional<double> sparsity, c10::string_view scope);

// Everything about one spmm call that does not depend on the device.
struct SpmmCall {
  PackedWeight weight;
  at::Tensor x;  // [n, k], rows contiguous
  std::optional<at::Tensor> bias;
  Activation activation;
  int64_t n;
  std::vector<int64_t> y_sizes;

  SpmmProblem problem() const;
  // Nothing to multiply: an empty result, or act(bias) where K is 0.
  bool is_degenerate() const;
};

SpmmCall check_spmm(const at::Tensor& x, at::IntArrayRef header, const at::Tensor& offsets,
                    const at::Tensor& payload, const std::optional<at::Tensor>& bias,
                    c10::string_view activation, const std::optional<at::Tensor>& scales);

// Of a call that has something to multiply.
SpmmArgs spmm_args(const SpmmCall& call, const at::Tensor& y);

void activate_(at::Tensor& y, Activation activation);

// The result of a degenerate call.
at::Tensor spmm_degenerate(const SpmmCall& call);

// The vendor's GEMM with the unpacked weight.
at::Tensor spmm_dense(const SpmmCall& call, const at::Tensor& dense);

}  // namespace flash_llm
