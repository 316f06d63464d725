// The operators on the CPU.
#include <ATen/autocast_mode.h>

#include <algorithm>
#include <string>
#include <vector>

#include "base/cpu_isa.h"
#include "base/huge_pages.h"
#include "cpu/spmm.h"
#include "format/row_bitmap.h"
#include "plan/cpu.h"
#include "plan/spmm_plan.h"
#include "torch/operators.h"
#include "torch/parallel_for.h"

namespace flash_llm {

using at::Tensor;

Packed pack_dense_cpu(const char* op, const DenseMatrix& dense, const PackedFormat& format) {
  Tensor offsets = at::empty({format.tiles(dense.value_type, dense.m, dense.k) + 1},
                             dense.tensor.options().dtype(at::kInt));
  int32_t* offsets_data = offsets.mutable_data_ptr<int32_t>();
  int64_t nnz = 0;
  raise_if_error(op, format.count(dense.matrix(), parallel_for, offsets_data, &nnz));
  const int64_t words = int64_t{offsets_data[offsets.numel() - 1]} * format.unit_words;
  Tensor payload = at::empty({words}, offsets.options());
  flash_llm::prefer_huge_pages(payload.mutable_data_ptr(), payload.nbytes());
  raise_if_error(op, format.pack(dense.matrix(), offsets_data, nnz, parallel_for,
                                 reinterpret_cast<uint32_t*>(payload.mutable_data_ptr<int32_t>())));
  return {header_tensor(make_header(dense, format.id, nnz, words)), offsets, payload};
}

Packed pack_cpu(const Tensor& dense, c10::string_view format, int64_t expected_tokens) {
  check_format("pack", format);
  const DenseMatrix matrix = check_dense("pack", dense);
  return pack_dense_cpu("pack", matrix,
                        choose_format("pack", format, matrix, DeviceInfo{}, expected_tokens));
}

Packed pack_quantized_cpu(const Tensor& values, const Tensor& scales, at::ScalarType dtype,
                          c10::string_view format) {
  check_format("pack_quantized", format);
  const DenseMatrix matrix = check_quantized(values, scales, dtype);
  return pack_dense_cpu("pack_quantized", matrix,
                        choose_format("pack_quantized", format, matrix, DeviceInfo{}, 0));
}

Packed prune_pack_cpu(const Tensor& dense, std::optional<double> sparsity, c10::string_view scope,
                      c10::string_view format, int64_t expected_tokens) {
  DenseMatrix matrix = check_dense("prune_pack", dense);
  check_format("prune_pack", format);
  const PruneTarget target = check_prune_target(sparsity, scope);
  const Tensor pruned =
      at::empty({matrix.m, matrix.k}, dense.options(), at::MemoryFormat::Contiguous);
  prune_magnitude(raw(matrix.tensor), matrix.ld, matrix.m, matrix.k, target, parallel_for,
                  mutable_raw(pruned));
  const DenseMatrix kept = {pruned, matrix.value_type, matrix.m, matrix.k, matrix.k};
  return pack_dense_cpu("prune_pack", kept,
                        choose_format("prune_pack", format, kept, DeviceInfo{}, expected_tokens));
}

CpuIsa cpu_isa(const char* op) {
  CpuIsa isa{};
  raise_if_error(op, select_cpu_isa(&isa));
  return isa;
}

// Call it for a large tensor before it is first written: page faults of 4 KB pages took 7 of 10 ms
// of unpacking 4096 x 4096.
void prefer_huge_pages(const Tensor& tensor) {
  flash_llm::prefer_huge_pages(tensor.mutable_data_ptr(), tensor.nbytes());
}

Tensor unpack_weight_cpu(const char* op, const PackedWeight& weight) {
  const PackedHeader& h = weight.header;
  Tensor dense = at::empty({h.m, h.k}, weight.payload.options().dtype(scalar_type(h.value_type)));
  prefer_huge_pages(dense);
  if (h.format == Format::kRowBitmap && dense.numel() > 0) {
    row_bitmap_decode(weight.view(), 0, h.m, cpu_isa(op), parallel_for, mutable_raw(dense));
  } else {
    unpack(weight.format(), weight.view(), parallel_for, mutable_raw(dense));
  }
  return dense;
}

Tensor unpack_cpu(at::IntArrayRef header, const Tensor& offsets, const Tensor& payload) {
  return unpack_weight_cpu("unpack", check_packed("unpack", header, offsets, payload));
}

Quantized unpack_quantized_weight_cpu(const PackedWeight& weight) {
  check_quantized(weight);
  const PackedHeader& h = weight.header;
  const ValueTraits traits = value_traits(h.value_type);
  const auto dtype = traits.kind == ValueKind::kFp8E4m3 ? at::kFloat8_e4m3fn : at::kChar;
  std::vector<int64_t> sizes = {h.m};
  if (traits.scales == ScaleGroup::kRowGroup) sizes.push_back(scales_per_row(h.value_type, h.k));
  const Tensor values = at::empty({h.m, h.k}, weight.payload.options().dtype(dtype));
  const Tensor scales = at::empty(sizes, weight.payload.options().dtype(at::kFloat));
  unpack_values(weight.format(), weight.view(), parallel_for, values.mutable_data_ptr(),
                scales.mutable_data_ptr<float>());
  return {values, scales};
}

Quantized unpack_quantized_cpu(at::IntArrayRef header, const Tensor& offsets,
                               const Tensor& payload) {
  return unpack_quantized_weight_cpu(check_packed("unpack_quantized", header, offsets, payload));
}

void validate_cpu(at::IntArrayRef header, const Tensor& offsets, const Tensor& payload) {
  const PackedWeight weight = check_packed("validate", header, offsets, payload);
  raise_if_error("validate", weight.format().validate(weight.view(), parallel_for));
}

// The product by the dense GEMM, one block of rows at a time: decoded rows are multiplied while
// they are in the cache.
Tensor spmm_cpu_blocks(const SpmmCall& call, CpuIsa isa) {
  const PackedHeader& h = call.weight.header;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const int64_t rows = std::min(h.m, cpu_block_rows(h.k));
  const Tensor dense = at::empty({rows, h.k}, call.x.options());
  prefer_huge_pages(dense);
  Tensor y = at::empty({call.n, h.m}, call.x.options());
  for (int64_t row = 0; row < h.m; row += rows) {
    const int64_t count = std::min(rows, h.m - row);
    row_bitmap_decode(call.weight.view(), row, row + count, isa, parallel_for, mutable_raw(dense));
    std::optional<Tensor> bias;
    if (call.bias) bias = call.bias->narrow(0, row, count);
    y.narrow(1, row, count).copy_(at::linear(call.x, dense.narrow(0, 0, count), bias));
  }
  activate_(y, call.activation);
  return y.view(call.y_sizes);
}

Tensor spmm_cpu(const Tensor& x, at::IntArrayRef header, const Tensor& offsets,
                const Tensor& payload, const std::optional<Tensor>& bias,
                c10::string_view activation, c10::string_view config, int64_t ctas,
                bool /*prefetch*/, c10::string_view x_quantization) {
  const SpmmCall call = check_spmm(x, header, offsets, payload, bias, activation, x_quantization);
  SpmmPlan plan;
  DeviceInfo device;
  raise_if_error("spmm", detect_cpu(&device));
  raise_if_error("spmm",
                 select_plan(call.problem(), device, std::string(config), ctas, &plan, false));
  if (call.is_degenerate()) return spmm_degenerate(call);
  if (plan.family == KernelFamily::kDense) {
    return spmm_dense(call, unpack_weight_cpu("spmm", call.weight));
  }
  if (plan.family == KernelFamily::kRowBitmapBlocks) return spmm_cpu_blocks(call, device.cpu_isa);
  const Tensor y = at::empty(call.y_sizes, call.x.options());
  raise_if_error("spmm", run_spmm(plan, spmm_args(call, y), device.cpu_isa, parallel_for));
  return y;
}

int64_t count_stored_cpu(at::IntArrayRef header, const Tensor& offsets, const Tensor& payload) {
  const PackedWeight weight = check_packed("count_stored", header, offsets, payload);
  return weight.format().count_stored(weight.view(), parallel_for);
}

}  // namespace flash_llm
