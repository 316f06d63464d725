// SpMM: Y[N, M] = act(X[N, K] . W[M, K]^T + bias) with W packed. Plain structs that the torch layer
// passes to the plan and to the kernels.
#pragma once

#include <cstdint>
#include <string>

#include "base/status.h"
#include "format/packed_format.h"
#include "format/packed_header.h"

namespace flash_llm {

// Applied to the fp32 sum after the bias. kGelu is the exact (erf) form, which is torch's default.
enum class Activation { kNone, kRelu, kGelu, kSilu };

Status parse_activation(const std::string& name, Activation* out);

// "none", or "dynamic": kernels may round X (SpmmProblem::rounds_x).
Status parse_x_quantization(const std::string& name, bool* rounds_x);

// What a kernel multiplies X as: as it is, or rounded, with a scale for each token.
enum class XValues { kUnrounded, kInt8, kFp8E4m3 };

struct SpmmProblem {
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  int64_t nnz = 0;
  Format format = Format::kTiledCsl;
  ValueType value_type = ValueType::kFloat16;
  bool rounds_x = false;  // whether kernels may round X, token by token, where that is faster
};

// Elements of the weight, zeros included.
double num_elems(const SpmmProblem& problem);

// Nonzeros for each element; 0 for a weight without elements.
double density(const SpmmProblem& problem);

struct SpmmArgs {
  const uint16_t* x = nullptr;  // [n, x_stride], row-major
  int64_t x_stride = 0;         // elements between rows of x; each kernel has its own requirements
  Format format = Format::kTiledCsl;
  PackedView weight;
  const uint16_t* bias = nullptr;  // [m] or null
  uint16_t* y = nullptr;           // [n, m], contiguous
  int64_t n = 0;
  Activation activation = Activation::kNone;
};

}  // namespace flash_llm
