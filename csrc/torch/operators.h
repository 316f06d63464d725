// The operators' implementations, which schemas.cpp registers: one set for the CPU, one for CUDA.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>

#include "torch/checks.h"

namespace flash_llm {

#define FLASH_LLM_OPERATORS(device)                                                                \
  at::Tensor spmm_##device(const at::Tensor& x, at::IntArrayRef header, const at::Tensor& offsets, \
                           const at::Tensor& payload, const std::optional<at::Tensor>& bias,       \
                           c10::string_view activation, c10::string_view config, int64_t ctas,     \
                           bool prefetch, c10::string_view x_quantization);                        \
  Packed pack_##device(const at::Tensor& dense, c10::string_view format, int64_t expected_tokens); \
  Packed pack_quantized_##device(const at::Tensor& values, const at::Tensor& scales,               \
                                 at::ScalarType dtype, c10::string_view format);                   \
  Quantized unpack_quantized_##device(at::IntArrayRef header, const at::Tensor& offsets,           \
                                      const at::Tensor& payload);                                  \
  Packed prune_pack_##device(const at::Tensor& dense, std::optional<double> sparsity,              \
                             c10::string_view scope, c10::string_view format,                      \
                             int64_t expected_tokens);                                             \
  at::Tensor unpack_##device(at::IntArrayRef header, const at::Tensor& offsets,                    \
                             const at::Tensor& payload);                                           \
  void validate_##device(at::IntArrayRef header, const at::Tensor& offsets,                        \
                         const at::Tensor& payload);                                               \
  int64_t count_stored_##device(at::IntArrayRef header, const at::Tensor& offsets,                 \
                                const at::Tensor& payload);
FLASH_LLM_OPERATORS(cpu)
FLASH_LLM_OPERATORS(cuda)
#undef FLASH_LLM_OPERATORS

// Calls flash_llm::spmm through the dispatcher, without boxing its arguments.
at::Tensor call_spmm(const at::Tensor& x, at::IntArrayRef header, const at::Tensor& offsets,
                     const at::Tensor& payload, const std::optional<at::Tensor>& bias,
                     c10::string_view activation, c10::string_view config, int64_t ctas,
                     bool prefetch, c10::string_view x_quantization);

// Packing and unpacking on the host, also used for CUDA tensors in a format without CUDA kernels.
Packed pack_dense_cpu(const char* op, const DenseMatrix& dense, const PackedFormat& format);
at::Tensor unpack_weight_cpu(const char* op, const PackedWeight& weight);
Quantized unpack_quantized_weight_cpu(const PackedWeight& weight);

}  // namespace flash_llm
