// The operators on CUDA: they allocate memory and pass it, with the current stream, to the kernels.
// A build without CUDA registers them too; each then raises an error that says how to build it.
#include <optional>
#include <string>
#include <vector>

#include "format/packed_checks.h"
#include "torch/operators.h"

#ifdef FLASH_LLM_WITH_CUDA
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>

#include "cuda/launch.h"
#include "plan/spmm_plan.h"
#include "plan/tiled_csl_sm80.h"
#endif

namespace flash_llm {

using at::Tensor;

#ifdef FLASH_LLM_WITH_CUDA

cudaStream_t current_stream() { return at::cuda::getCurrentCUDAStream().stream(); }

DeviceInfo describe_device(int index) {
  const cudaDeviceProp* properties =
      at::cuda::getDeviceProperties(static_cast<c10::DeviceIndex>(index));
  return gpu(properties->major * 10 + properties->minor, properties->multiProcessorCount,
             static_cast<int>(properties->sharedMemPerMultiprocessor), FLASH_LLM_CUDA_ARCHS);
}

// The current device, as plans see it. All devices are described once, since every call needs this.
const DeviceInfo& current_device_info() {
  static const std::vector<DeviceInfo> devices = [] {
    std::vector<DeviceInfo> all;
    for (int i = 0; i < c10::cuda::device_count(); ++i) all.push_back(describe_device(i));
    return all;
  }();
  return devices[static_cast<size_t>(c10::cuda::current_device())];
}

// Packs into a format that has no CUDA kernels for it.
Packed pack_dense_on_host(const char* op, const DenseMatrix& dense, const PackedFormat& format) {
  const Tensor host = dense.tensor.contiguous().cpu();
  const Tensor scales = dense.scales.defined() ? dense.scales.cpu() : Tensor();
  const auto [header, offsets, payload] = pack_dense_cpu(
      op, {host, dense.value_type, dense.m, dense.k, host.stride(0), scales}, format);
  const auto device = dense.tensor.device();
  return {header, offsets.to(device), payload.to(device)};
}

Packed pack_dense_cuda(const char* op, const DenseMatrix& dense, const PackedFormat& format) {
  const cuda::PackKernels* kernels = cuda::pack_kernels(format.id, dense.value_type);
  if (kernels == nullptr) return pack_dense_on_host(op, dense, format);
  const int64_t tiles = format.tiles(dense.value_type, dense.m, dense.k);
  const auto int_options = dense.tensor.options().dtype(at::kInt);
  const Tensor counts = at::empty({2, tiles}, int_options);  // units and nonzeros of each tile
  const Tensor units = counts[0], nnz = counts[1];
  const Tensor scratch =
      at::empty({tiles * kernels->scratch_bytes}, dense.tensor.options().dtype(at::kByte));
  raise_if_error(op, kernels->count(dense.matrix(), units.mutable_data_ptr<int32_t>(),
                                    nnz.mutable_data_ptr<int32_t>(), scratch.mutable_data_ptr(),
                                    current_stream()));
  const Tensor totals = at::sum(counts, 1, false, at::kLong).cpu();
  const int64_t total_units = totals[0].item<int64_t>(), total_nnz = totals[1].item<int64_t>();
  TORCH_CHECK_VALUE(total_units <= INT32_MAX, "flash_llm::", op, ": a weight of ", dense.m, "x",
                    dense.k, " takes more bytes than 31-bit offsets can address");
  Tensor offsets = at::zeros({tiles + 1}, int_options);
  offsets.narrow(0, 1, tiles).copy_(at::cumsum(units, 0, at::kInt));
  Tensor payload = at::empty({total_units * format.unit_words}, int_options);
  const Tensor changed = at::zeros({1}, int_options);
  raise_if_error(op, kernels->pack(dense.matrix(), offsets.const_data_ptr<int32_t>(),
                                   nnz.const_data_ptr<int32_t>(),
                                   reinterpret_cast<uint32_t*>(payload.mutable_data_ptr<int32_t>()),
                                   changed.mutable_data_ptr<int32_t>(), scratch.mutable_data_ptr(),
                                   current_stream()));
  if (changed.item<int32_t>() != 0) raise_if_error(op, dense_changed());
  if (tiles > 0) {
    raise_if_error(op, cuda::end_weight_writes(counts.mutable_data_ptr(), current_stream()));
  }
  return {header_tensor(make_header(dense, format.id, total_nnz, total_units * format.unit_words)),
          offsets, payload};
}

Packed pack_cuda(const Tensor& dense, c10::string_view format, int64_t expected_tokens) {
  const c10::cuda::CUDAGuard guard(dense.device());
  check_format("pack", format);
  const DenseMatrix matrix = check_dense("pack", dense);
  return pack_dense_cuda(
      "pack", matrix,
      choose_format("pack", format, matrix, current_device_info(), expected_tokens));
}

Packed pack_quantized_cuda(const Tensor& values, const Tensor& scales, at::ScalarType dtype,
                           c10::string_view format) {
  const c10::cuda::CUDAGuard guard(values.device());
  check_format("pack_quantized", format);
  const DenseMatrix matrix = check_quantized(values, scales, dtype);
  return pack_dense_cuda("pack_quantized", matrix,
                         choose_format("pack_quantized", format, matrix, current_device_info(), 0));
}

// Cuts for each row from a target for the whole layer: all rows have one threshold, and the ties to
// prune are counted in row-major order.
void layer_cuts(const DenseMatrix& dense, double sparsity, Tensor& thresholds, Tensor& ties) {
  const cudaStream_t stream = current_stream();
  const Tensor histogram = at::zeros({kNumMagnitudes}, ties.options());
  raise_if_error("prune_pack",
                 cuda::prune_histogram(raw(dense.tensor), dense.ld, dense.m, dense.k,
                                       histogram.mutable_data_ptr<int64_t>(), stream));
  const Tensor host_histogram = histogram.cpu();
  const PruneCut cut = find_prune_cut(host_histogram.const_data_ptr<int64_t>(),
                                      num_pruned(sparsity, dense.m * dense.k));
  thresholds.fill_(cut.threshold);
  raise_if_error("prune_pack",
                 cuda::prune_count_ties(raw(dense.tensor), dense.ld, dense.m, dense.k,
                                        cut.threshold, ties.mutable_data_ptr<int64_t>(), stream));
  const Tensor before = at::cumsum(ties, 0) - ties;
  ties.copy_(at::minimum(ties, at::clamp_min(cut.ties - before, 0)));
}

Tensor prune_cuda(const DenseMatrix& dense, const PruneTarget& target) {
  const cudaStream_t stream = current_stream();
  const Tensor pruned =
      at::empty({dense.m, dense.k}, dense.tensor.options(), at::MemoryFormat::Contiguous);
  if (target.scope == PruneScope::kGroup) {
    raise_if_error("prune_pack",
                   cuda::prune_groups(raw(dense.tensor), dense.ld, dense.m, dense.k, target.keep,
                                      target.group, mutable_raw(pruned), stream));
    return pruned;
  }
  Tensor thresholds = at::empty({dense.m}, dense.tensor.options().dtype(at::kInt));
  Tensor ties = at::empty({dense.m}, dense.tensor.options().dtype(at::kLong));
  if (target.scope == PruneScope::kRow) {
    raise_if_error("prune_pack", cuda::prune_row_cuts(raw(dense.tensor), dense.ld, dense.m, dense.k,
                                                      num_pruned(target.sparsity, dense.k),
                                                      thresholds.mutable_data_ptr<int32_t>(),
                                                      ties.mutable_data_ptr<int64_t>(), stream));
  } else {
    layer_cuts(dense, target.sparsity, thresholds, ties);
  }
  raise_if_error("prune_pack", cuda::prune_apply_cuts(raw(dense.tensor), dense.ld, dense.m, dense.k,
                                                      thresholds.const_data_ptr<int32_t>(),
                                                      ties.const_data_ptr<int64_t>(),
                                                      mutable_raw(pruned), stream));
  return pruned;
}

Packed prune_pack_cuda(const Tensor& dense, std::optional<double> sparsity, c10::string_view scope,
                       c10::string_view format, int64_t expected_tokens) {
  const c10::cuda::CUDAGuard guard(dense.device());
  const DenseMatrix matrix = check_dense("prune_pack", dense);
  check_format("prune_pack", format);
  const Tensor pruned = prune_cuda(matrix, check_prune_target(sparsity, scope));
  const DenseMatrix kept = {pruned, matrix.value_type, matrix.m, matrix.k, matrix.k};
  return pack_dense_cuda(
      "prune_pack", kept,
      choose_format("prune_pack", format, kept, current_device_info(), expected_tokens));
}

PackedWeight on_host(const PackedWeight& weight) {
  PackedWeight host = weight;
  host.offsets = weight.offsets.cpu();
  host.payload = weight.payload.cpu();
  return host;
}

Tensor unpack_weight_cuda(const char* op, const PackedWeight& weight) {
  const PackedHeader& h = weight.header;
  const cuda::PackKernels* kernels = cuda::pack_kernels(h.format, h.value_type);
  if (kernels == nullptr) {
    return unpack_weight_cpu(op, on_host(weight)).to(weight.payload.device());
  }
  Tensor dense = at::empty({h.m, h.k}, weight.payload.options().dtype(scalar_type(h.value_type)));
  raise_if_error(op, kernels->unpack(weight.view(), mutable_raw(dense), current_stream()));
  return dense;
}

Tensor unpack_cuda(at::IntArrayRef header, const Tensor& offsets, const Tensor& payload) {
  const PackedWeight weight = check_packed("unpack", header, offsets, payload);
  const c10::cuda::CUDAGuard guard(payload.device());
  return unpack_weight_cuda("unpack", weight);
}

Quantized unpack_quantized_cuda(at::IntArrayRef header, const Tensor& offsets,
                                const Tensor& payload) {
  const PackedWeight weight = check_packed("unpack_quantized", header, offsets, payload);
  const auto [values, scales] = unpack_quantized_weight_cpu(on_host(weight));
  return {values.to(payload.device()), scales.to(payload.device())};
}

// On the host: a weight is validated when it is built or loaded, not in every call.
void validate_cuda(at::IntArrayRef header, const Tensor& offsets, const Tensor& payload) {
  const PackedWeight weight = check_packed("validate", header, offsets, payload);
  validate_cpu(header, weight.offsets.cpu(), weight.payload.cpu());
}

// X as the kernels need it: rows aligned to 16 bytes, a multiple of `multiple` columns. In most
// models it already is; otherwise this makes a small copy, padded with zeros.
Tensor kernel_ready(const Tensor& x, int64_t multiple) {
  const int64_t k = x.size(1), padded_k = (k + multiple - 1) / multiple * multiple;
  const bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 &&
                       (x.size(0) <= 1 || (x.stride(0) % 8 == 0 && x.stride(0) >= k &&
                                           x.stride(0) <= kMaxLscdStride));
  if (padded_k == k && aligned) return x;
  Tensor padded = at::zeros({x.size(0), padded_k}, x.options());
  padded.narrow(1, 0, k).copy_(x);
  return padded;
}

// A graph that is captured on one device silently omits kernels launched on another.
void check_capture(const char* op, const Tensor& x) {
  const c10::DeviceIndex current = c10::cuda::current_device();
  if (x.device().index() == current) return;
  const auto status = c10::cuda::currentStreamCaptureStatusMayInitCtx();
  TORCH_CHECK_VALUE(status == c10::cuda::CaptureStatus::None, "flash_llm::", op, ": x is on ",
                    x.device(),
                    ", but a CUDA graph is being captured on cuda:", static_cast<int>(current));
}

// Adds up in fp32, which takes cuBLASLt a tenth longer than its fast accumulation.
Tensor spmm_dense_fp8x(const SpmmCall& call) {
  const PackedHeader& h = call.weight.header;
  const auto fp8 = call.x.options().dtype(at::kFloat8_e4m3fn);
  const auto fp32 = call.x.options().dtype(at::kFloat);
  const Tensor w = at::empty({h.m, h.k}, fp8), w_scales = at::empty({1, h.m}, fp32);
  const Tensor x = at::empty({call.n, h.k}, fp8), x_scales = at::empty({call.n, 1}, fp32);
  const auto bytes = [](const Tensor& t) { return static_cast<uint8_t*>(t.mutable_data_ptr()); };
  raise_if_error("spmm", cuda::unpack_fp8(call.weight.view(), bytes(w),
                                          w_scales.mutable_data_ptr<float>(), current_stream()));
  raise_if_error("spmm",
                 cuda::round_fp8(h.value_type, raw(call.x), call.x.stride(0), call.n, h.k, bytes(x),
                                 x_scales.mutable_data_ptr<float>(), current_stream()));
  Tensor y = at::_scaled_mm(x, w.t(), x_scales, w_scales, call.bias, std::nullopt,
                            call.x.scalar_type(), /*use_fast_accum=*/false);
  activate_(y, call.activation);
  return y.view(call.y_sizes);
}

Tensor spmm_cuda(const Tensor& x, at::IntArrayRef header, const Tensor& offsets,
                 const Tensor& payload, const std::optional<Tensor>& bias,
                 c10::string_view activation, c10::string_view config, int64_t ctas, bool prefetch,
                 c10::string_view x_quantization) {
  // Checked before the guard: a single argument on a GPU is enough to dispatch a call here.
  SpmmCall call = check_spmm(x, header, offsets, payload, bias, activation, x_quantization);
  check_capture("spmm", x);
  const c10::cuda::CUDAGuard guard(x.device());
  SpmmPlan plan;
  raise_if_error("spmm", select_plan(call.problem(), current_device_info(), std::string(config),
                                     ctas, &plan, false));
  if (call.is_degenerate()) return spmm_degenerate(call);
  if (plan.family == KernelFamily::kDense) {
    return spmm_dense(call, unpack_weight_cuda("spmm", call.weight));
  }
  if (plan.packed_x_bytes == 0) call.x = kernel_ready(call.x, plan.x_multiple);
  if (plan.family == KernelFamily::kDenseFp8X) return spmm_dense_fp8x(call);
  Tensor y = at::empty(call.y_sizes, call.x.options());
  Tensor workspace;
  if (plan.workspace_bytes > 0) {
    workspace = at::empty({plan.workspace_bytes}, y.options().dtype(at::kByte));
  }
  SpmmArgs args = spmm_args(call, y);
  if (plan.rounds_before_activation) args.activation = Activation::kNone;
  // If this call copied the weight, a dependent launch could read the copy before it is written.
  prefetch = prefetch && !call.weight.copied;
  void* scratch = workspace.defined() ? workspace.mutable_data_ptr() : nullptr;
  raise_if_error("spmm", cuda::run_spmm(plan, args, scratch, prefetch, current_stream()));
  if (plan.rounds_before_activation) activate_(y, call.activation);
  return y;
}

int64_t count_stored_cuda(at::IntArrayRef header, const Tensor& offsets, const Tensor& payload) {
  const PackedWeight weight = check_packed("count_stored", header, offsets, payload);
  const c10::cuda::CUDAGuard guard(payload.device());
  const PackedHeader& h = weight.header;
  const cuda::PackKernels* kernels = cuda::pack_kernels(h.format, h.value_type);
  if (kernels == nullptr) return count_stored_cpu(header, offsets.cpu(), payload.cpu());
  const Tensor total = at::zeros({1}, payload.options().dtype(at::kLong));
  raise_if_error(
      "count_stored",
      kernels->count_stored(weight.view(), total.mutable_data_ptr<int64_t>(), current_stream()));
  return total.item<int64_t>();
}

#else  // without FLASH_LLM_WITH_CUDA: every CUDA operator raises an error

[[noreturn]] void raise_no_cuda(const char* op) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, "flash_llm::", op,
      ": flash_llm was built without its CUDA part. Found: ", FLASH_LLM_NO_CUDA_REASON,
      ". Needed: nvcc of the CUDA major version that torch was built with, and a CUDA build of "
      "torch. Then run: FLASH_LLM_BUILD_CUDA=1 pip install --no-build-isolation -e .");
}

Packed pack_cuda(const Tensor&, c10::string_view, int64_t) { raise_no_cuda("pack"); }
Packed prune_pack_cuda(const Tensor&, std::optional<double>, c10::string_view, c10::string_view,
                       int64_t) {
  raise_no_cuda("prune_pack");
}
Packed pack_quantized_cuda(const Tensor&, const Tensor&, at::ScalarType, c10::string_view) {
  raise_no_cuda("pack_quantized");
}
Quantized unpack_quantized_cuda(at::IntArrayRef, const Tensor&, const Tensor&) {
  raise_no_cuda("unpack_quantized");
}
Tensor unpack_cuda(at::IntArrayRef, const Tensor&, const Tensor&) { raise_no_cuda("unpack"); }
void validate_cuda(at::IntArrayRef, const Tensor&, const Tensor&) { raise_no_cuda("validate"); }
int64_t count_stored_cuda(at::IntArrayRef, const Tensor&, const Tensor&) {
  raise_no_cuda("count_stored");
}
Tensor spmm_cuda(const Tensor&, at::IntArrayRef, const Tensor&, const Tensor&,
                 const std::optional<Tensor>&, c10::string_view, c10::string_view, int64_t, bool,
                 c10::string_view) {
  raise_no_cuda("spmm");
}

#endif

}  // namespace flash_llm
