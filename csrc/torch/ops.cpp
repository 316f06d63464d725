// The operators: schemas, argument checks, and the CPU and CUDA implementations. The only file that
// sees ATen. It checks everything that a kernel relies on, brings memory, threads and the stream,
// and turns Status into Python exceptions. Fakes and autograd are in flash_llm/ops.py.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "core/cpu_isa.h"
#include "core/huge_pages.h"
#include "core/packed_checks.h"
#include "core/packed_format.h"
#include "core/packed_header.h"
#include "core/prune.h"
#include "core/row_bitmap.h"
#include "core/spmm.h"
#include "core/spmm_plan.h"

#ifdef FLASH_LLM_WITH_CUDA
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>

#include "cuda/launch.h"
#endif

namespace flash_llm {
namespace {

using at::Tensor;
using Packed = std::tuple<Tensor, Tensor, Tensor>;  // header, offsets, payload

// Raises the Python exception that `status` stands for, with the operator's name in front.
void raise_if_error(const char* op, const Status& status) {
  const auto message = [&] { return std::string("flash_llm::") + op + ": " + status.message; };
  switch (status.code) {
    case StatusCode::kOk:
      return;
    case StatusCode::kInvalidValue:
      TORCH_CHECK_VALUE(false, message());
    case StatusCode::kInvalidType:
      TORCH_CHECK_TYPE(false, message());
    case StatusCode::kUnsupported:
      TORCH_CHECK_NOT_IMPLEMENTED(false, message());
    case StatusCode::kRuntime:
      TORCH_CHECK(false, message());
  }
  TORCH_CHECK(false, message());
}

// at::parallel_for, or this thread alone for a while after the others kept it waiting.
//
// A region ends when its last thread does. On a busy machine the system takes a thread from its
// core for 4 to 20 ms, so that with two threads and one more process on two cores each of a token's
// 210 small layers took 8 ms, packed or dense, which one thread computes in 0.03 to 0.5 ms (EPYC
// with AVX2, 2026-11-29). So after a wait that was longer than the others' work, one thread does
// what follows: for 16 times the wait where there is one other, and for less the more others there
// are, whom it then does without. Waiting thus takes 6 % of the time at most. No result depends on
// it.
void parallel_for(int64_t count, int64_t grain, const ParallelBody& body) {
  using Clock = std::chrono::steady_clock;
  constexpr Clock::duration kShortWait = std::chrono::microseconds(500);  // to wake a thread up
  constexpr int64_t kAlone = 16;
  static std::atomic<Clock::rep> alone_until{std::numeric_limits<Clock::rep>::min()};

  const Clock::time_point start = Clock::now();
  const int64_t others = std::min<int64_t>(at::get_num_threads(), (count + grain - 1) / grain) - 1;
  if (others <= 0 || start.time_since_epoch().count() < alone_until.load()) {
    serial_for(count, grain, body);
    return;
  }
  const auto caller = std::this_thread::get_id();
  Clock::time_point own_end = start;
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    body(begin, end);
    if (std::this_thread::get_id() == caller) own_end = Clock::now();
  });
  const Clock::time_point end = Clock::now();
  const Clock::duration waited = end - own_end;
  if (waited > kShortWait && waited > others * (own_end - start)) {
    alone_until = (end + waited * kAlone / others).time_since_epoch().count();
  }
}

at::ScalarType scalar_type(ValueType type) {
  return type == ValueType::kFloat16 ? at::kHalf : at::kBFloat16;
}

ValueType value_type_of(const char* op, const char* name, const Tensor& tensor) {
  TORCH_CHECK_TYPE(
      tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16, "flash_llm::", op,
      ": ", name, " must be float16 or bfloat16, got ", tensor.scalar_type(),
      tensor.scalar_type() == at::kFloat ? " (convert it with .to(torch.bfloat16))" : "");
  return tensor.scalar_type() == at::kHalf ? ValueType::kFloat16 : ValueType::kBfloat16;
}

const uint16_t* raw(const Tensor& tensor) {
  return static_cast<const uint16_t*>(tensor.const_data_ptr());
}

uint16_t* mutable_raw(const Tensor& tensor) {
  return static_cast<uint16_t*>(tensor.mutable_data_ptr());
}

// The memory of a tensor may be smaller than its sizes say: UntypedStorage.resize_ leaves them as
// they were, and so do sharded optimizers, which free a weight between its uses.
void check_storage(const char* op, const char* name, const Tensor& tensor) {
  const size_t needed = at::detail::computeStorageNbytes(
      tensor.sizes(), tensor.strides(), tensor.itemsize(), tensor.storage_offset());
  TORCH_CHECK_VALUE(needed <= tensor.storage().nbytes(), "flash_llm::", op, ": ", name,
                    " of shape ", tensor.sizes(), " needs a storage of ", needed,
                    " bytes, got one of ", tensor.storage().nbytes());
}

// A packed weight whose sizes, dtypes and device have been checked, and the tensors behind it.
struct PackedWeight {
  PackedHeader header;
  Tensor offsets, payload;
  bool copied = false;  // just now, by kernels in the current stream

  const PackedFormat& format() const { return packed_format(header.format); }

  PackedView view() const {
    return {header.m,
            header.k,
            header.nnz,
            offsets.const_data_ptr<int32_t>(),
            reinterpret_cast<const uint32_t*>(payload.const_data_ptr<int32_t>()),
            header.payload_words};
  }
};

void check_words(const char* op, const char* name, const Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kInt, "flash_llm::", op, ": ", name,
                   " must be int32, got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.dim() == 1, "flash_llm::", op, ": ", name,
                    " must be one-dimensional, got ", tensor.dim(), " dimensions");
  check_storage(op, name, tensor);
}

PackedWeight check_packed(const char* op, at::IntArrayRef header, const Tensor& offsets,
                          const Tensor& payload) {
  PackedWeight weight;
  raise_if_error(op, PackedHeader::from_ints(header.data(), static_cast<int64_t>(header.size()),
                                             &weight.header));
  check_words(op, "offsets", offsets);
  check_words(op, "payload", payload);
  TORCH_CHECK_TYPE(offsets.device() == payload.device(), "flash_llm::", op,
                   ": offsets and payload must be on one device, got ", offsets.device(), " and ",
                   payload.device());
  raise_if_error(op, weight.format().check_sizes(weight.header, offsets.numel(), payload.numel()));
  weight.offsets = offsets.contiguous();
  weight.payload = payload.contiguous();
  // Kernels read whole 16-byte vectors; a view into a larger buffer may start anywhere.
  if (reinterpret_cast<uintptr_t>(weight.payload.const_data_ptr()) % 16 != 0) {
    weight.payload = weight.payload.clone();
  }
  weight.copied = !weight.payload.is_alias_of(payload) || !weight.offsets.is_alias_of(offsets);
  return weight;
}

void check_tiles(const char* op, const PackedFormat& format, int64_t m, int64_t k) {
  TORCH_CHECK_VALUE(format.tiles(m, k) < INT32_MAX, "flash_llm::", op, ": a dense weight of ", m,
                    "x", k, " has more tiles than 32-bit indices can count");
}

// A matrix to pack: two-dimensional, 16-bit, rows contiguous.
struct DenseMatrix {
  Tensor tensor;
  ValueType value_type;
  int64_t m, k, ld;
};

DenseMatrix check_dense(const char* op, const Tensor& dense) {
  const ValueType value_type = value_type_of(op, "dense", dense);
  TORCH_CHECK_VALUE(dense.dim() == 2, "flash_llm::", op,
                    ": dense must be two-dimensional [M, K], got ", dense.dim(), " dimensions");
  const int64_t m = dense.size(0), k = dense.size(1);
  TORCH_CHECK_VALUE(m <= INT32_MAX && k <= INT32_MAX, "flash_llm::", op,
                    ": dense must have at most 2^31 - 1 rows and columns, got ", m, "x", k);
  check_storage(op, "dense", dense);
  // Before anything is copied: no format has larger tiles than this one.
  check_tiles(op, packed_format(Format::kTiledCsl), m, k);
  const bool rows_contiguous = k <= 1 || dense.stride(1) == 1;
  const Tensor rows =
      rows_contiguous && (m <= 1 || dense.stride(0) >= 0) ? dense : dense.contiguous();
  return {rows, value_type, m, k, rows.stride(0)};
}

Tensor header_tensor(const PackedHeader& header) {
  const auto ints = header.to_ints();
  Tensor tensor = at::empty({kPackedHeaderInts}, at::kLong);
  std::copy(ints.begin(), ints.end(), tensor.mutable_data_ptr<int64_t>());
  return tensor;
}

PackedHeader make_header(const DenseMatrix& dense, Format format, int64_t nnz, int64_t words) {
  PackedHeader header = PackedHeader::of(format);
  header.value_type = dense.value_type;
  header.m = dense.m;
  header.k = dense.k;
  header.nnz = nnz;
  header.payload_words = words;
  return header;
}

// The format to pack `dense`, a checked matrix on `device`, into; "auto" counts its nonzeros.
const PackedFormat& choose_format(const char* op, c10::string_view name, const DenseMatrix& dense,
                                  const DeviceInfo& device) {
  Format id;
  if (name == "auto") {
    // The count waits for the device, and only where it could make a difference.
    const int64_t nnz =
        device.has_sm90a ? at::count_nonzero(dense.tensor).item<int64_t>() : int64_t{0};
    id = select_format(dense.m, dense.k, nnz, device).format;
  } else {
    raise_if_error(op, parse_format(std::string(name), &id));
  }
  const PackedFormat& format = packed_format(id);
  check_tiles(op, format, dense.m, dense.k);
  return format;
}

// Before any work: an unknown name.
void check_format(const char* op, c10::string_view name) {
  Format id;
  if (name != "auto") raise_if_error(op, parse_format(std::string(name), &id));
}

PruneTarget check_prune_target(std::optional<double> sparsity, c10::string_view scope) {
  PruneTarget target;
  raise_if_error("prune_pack", parse_prune_target(std::string(scope), sparsity.has_value(),
                                                  sparsity.value_or(0.0), &target));
  return target;
}

// Everything about one spmm call that does not depend on the device.
struct SpmmCall {
  PackedWeight weight;
  Tensor x;  // [n, k], rows contiguous
  std::optional<Tensor> bias;
  Activation activation;
  int64_t n;
  std::vector<int64_t> y_sizes;

  SpmmProblem problem() const {
    const PackedHeader& h = weight.header;
    return {h.m, n, h.k, h.nnz, h.format, h.value_type};
  }
};

SpmmCall check_spmm(const Tensor& x, at::IntArrayRef header, const Tensor& offsets,
                    const Tensor& payload, const std::optional<Tensor>& bias,
                    c10::string_view activation) {
  SpmmCall call;
  call.weight = check_packed("spmm", header, offsets, payload);
  const PackedHeader& h = call.weight.header;
  TORCH_CHECK_TYPE(x.scalar_type() == scalar_type(h.value_type), "flash_llm::spmm: x must be ",
                   scalar_type(h.value_type), " like the weight, got ", x.scalar_type());
  TORCH_CHECK_TYPE(x.device() == payload.device(), "flash_llm::spmm: x must be on ",
                   payload.device(), " like the weight, got ", x.device());
  TORCH_CHECK_VALUE(x.dim() >= 1, "flash_llm::spmm: x must have at least one dimension, got 0");
  TORCH_CHECK_VALUE(x.size(-1) == h.k, "flash_llm::spmm: x.size(-1) must equal K=", h.k, ", got ",
                    x.size(-1));
  check_storage("spmm", "x", x);
  raise_if_error("spmm", parse_activation(std::string(activation), &call.activation));
  if (bias.has_value() && bias->defined()) {
    TORCH_CHECK_TYPE(bias->scalar_type() == x.scalar_type(), "flash_llm::spmm: bias must be ",
                     x.scalar_type(), " like x, got ", bias->scalar_type());
    TORCH_CHECK_TYPE(bias->device() == x.device(), "flash_llm::spmm: bias must be on ", x.device(),
                     " like x, got ", bias->device());
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == h.m,
                      "flash_llm::spmm: bias must have shape [M=", h.m, "], got ", bias->sizes());
    check_storage("spmm", "bias", *bias);
    call.bias = bias->contiguous();
  }
  call.n = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    call.y_sizes.push_back(x.size(i));
    call.n *= x.size(i);
  }
  call.y_sizes.push_back(h.m);
  call.x = x.reshape({call.n, h.k});
  if (h.k > 1 && call.x.stride(1) != 1) call.x = call.x.contiguous();
  return call;
}

void activate_(Tensor& y, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kRelu:
      at::relu_(y);
      return;
    case Activation::kGelu:
      at::gelu_(y);
      return;
    case Activation::kSilu:
      at::silu_(y);
      return;
  }
}

// The dense route: unpack, then the vendor's GEMM. Autocast must not change the dtype underway.
Tensor spmm_dense(const SpmmCall& call, const Tensor& dense) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  Tensor y = at::linear(call.x, dense, call.bias);
  activate_(y, call.activation);
  return y.view(call.y_sizes);
}

SpmmArgs spmm_args(const SpmmCall& call, const Tensor& y) {
  SpmmArgs args;
  args.x = raw(call.x);
  args.x_stride = call.x.stride(0);
  args.format = call.weight.header.format;
  args.weight = call.weight.view();
  args.bias = call.bias ? raw(*call.bias) : nullptr;
  args.y = mutable_raw(y);
  args.n = call.n;
  args.value_type = call.weight.header.value_type;
  args.activation = call.activation;
  return args;
}

// Nothing to multiply: an empty result, or act(bias) where K is 0.
bool is_degenerate(const SpmmCall& call) {
  return call.n == 0 || call.weight.header.m == 0 || call.weight.header.k == 0;
}

Tensor spmm_degenerate(const SpmmCall& call) {
  Tensor y = at::zeros(call.y_sizes, call.x.options());
  if (call.bias) y += *call.bias;
  activate_(y, call.activation);
  return y;
}

// ---- CPU ----

Packed pack_dense_cpu(const char* op, const DenseMatrix& dense, const PackedFormat& format) {
  Tensor offsets =
      at::empty({format.tiles(dense.m, dense.k) + 1}, dense.tensor.options().dtype(at::kInt));
  int32_t* offsets_data = offsets.mutable_data_ptr<int32_t>();
  int64_t nnz = 0;
  raise_if_error(op, format.count(raw(dense.tensor), dense.ld, dense.m, dense.k, parallel_for,
                                  offsets_data, &nnz));
  const int64_t words = int64_t{offsets_data[offsets.numel() - 1]} * format.unit_words;
  Tensor payload = at::empty({words}, offsets.options());
  flash_llm::prefer_huge_pages(payload.mutable_data_ptr(), payload.nbytes());
  raise_if_error(op, format.pack(raw(dense.tensor), dense.ld, dense.m, dense.k, offsets_data, nnz,
                                 parallel_for,
                                 reinterpret_cast<uint32_t*>(payload.mutable_data_ptr<int32_t>())));
  return {header_tensor(make_header(dense, format.id, nnz, words)), offsets, payload};
}

Packed pack_cpu(const Tensor& dense, c10::string_view format) {
  check_format("pack", format);
  const DenseMatrix matrix = check_dense("pack", dense);
  return pack_dense_cpu("pack", matrix, choose_format("pack", format, matrix, DeviceInfo{}));
}

Packed prune_pack_cpu(const Tensor& dense, std::optional<double> sparsity, c10::string_view scope,
                      c10::string_view format) {
  DenseMatrix matrix = check_dense("prune_pack", dense);
  check_format("prune_pack", format);
  const PruneTarget target = check_prune_target(sparsity, scope);
  const Tensor pruned =
      at::empty({matrix.m, matrix.k}, dense.options(), at::MemoryFormat::Contiguous);
  prune_magnitude(raw(matrix.tensor), matrix.ld, matrix.m, matrix.k, target, parallel_for,
                  mutable_raw(pruned));
  const DenseMatrix kept = {pruned, matrix.value_type, matrix.m, matrix.k, matrix.k};
  return pack_dense_cpu("prune_pack", kept,
                        choose_format("prune_pack", format, kept, DeviceInfo{}));
}

CpuIsa cpu_isa(const char* op) {
  CpuIsa isa{};
  raise_if_error(op, select_cpu_isa(&isa));
  return isa;
}

// For a large tensor that is written next: faults of 4 KB pages took 7 of 10 ms of unpacking 4096 x
// 4096.
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

void validate_cpu(at::IntArrayRef header, const Tensor& offsets, const Tensor& payload) {
  const PackedWeight weight = check_packed("validate", header, offsets, payload);
  raise_if_error("validate", weight.format().validate(weight.view(), parallel_for));
}

// The dense route a block of rows at a time: what is decoded is multiplied while it is in the
// cache.
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
                bool /*prefetch*/) {
  const SpmmCall call = check_spmm(x, header, offsets, payload, bias, activation);
  SpmmPlan plan;
  DeviceInfo device;
  raise_if_error("spmm", detect_cpu(&device));
  raise_if_error("spmm", select_plan(call.problem(), device, std::string(config), ctas, &plan));
  if (is_degenerate(call)) return spmm_degenerate(call);
  if (plan.route == SpmmRoute::kDense) {
    return spmm_dense(call, unpack_weight_cpu("spmm", call.weight));
  }
  if (plan.route == SpmmRoute::kCpuBlocks) return spmm_cpu_blocks(call, device.cpu_isa);
  const Tensor y = at::empty(call.y_sizes, call.x.options());
  if (plan.route == SpmmRoute::kCpuReference) {
    spmm_cpu_reference(spmm_args(call, y), parallel_for);
  } else if (plan.route == SpmmRoute::kCpuRows) {
    spmm_cpu_rows(spmm_args(call, y), device.cpu_isa, parallel_for);
  } else {
    spmm_cpu_tiles(spmm_args(call, y), parallel_for);
  }
  return y;
}

// ---- CUDA ----

#ifdef FLASH_LLM_WITH_CUDA

cudaStream_t current_stream() { return at::cuda::getCurrentCUDAStream().stream(); }

DeviceInfo current_device_info() {
  const cudaDeviceProp* properties = at::cuda::getCurrentDeviceProperties();
  DeviceInfo device;
  device.compute_capability = properties->major * 10 + properties->minor;
  device.num_sms = properties->multiProcessorCount;
  device.smem_per_sm_bytes = static_cast<int>(properties->sharedMemPerMultiprocessor);
  device.has_sm90a = device.compute_capability == 90 &&
                     std::string(FLASH_LLM_CUDA_ARCHS).find("9.0a") != std::string::npos;
  return device;
}

cuda::PackKernels pack_kernels(Format format) {
  return format == Format::kTiledCsl ? cuda::tiled_csl_kernels() : cuda::bitmap_kernels();
}

// A format without kernels here is packed on the host.
Packed pack_dense_on_host(const char* op, const DenseMatrix& dense, const PackedFormat& format) {
  const Tensor host = dense.tensor.contiguous().cpu();
  const auto [header, offsets, payload] =
      pack_dense_cpu(op, {host, dense.value_type, dense.m, dense.k, host.stride(0)}, format);
  const auto device = dense.tensor.device();
  return {header, offsets.to(device), payload.to(device)};
}

Packed pack_dense_cuda(const char* op, const DenseMatrix& dense, const PackedFormat& format) {
  if (format.id == Format::kRowBitmap) return pack_dense_on_host(op, dense, format);
  const cuda::PackKernels kernels = pack_kernels(format.id);
  const int64_t tiles = format.tiles(dense.m, dense.k);
  const auto int_options = dense.tensor.options().dtype(at::kInt);
  const Tensor counts = at::empty({2, tiles}, int_options);  // units and nonzeros of each tile
  const Tensor units = counts[0], nnz = counts[1];
  raise_if_error(op, kernels.count(raw(dense.tensor), dense.ld, dense.m, dense.k,
                                   units.mutable_data_ptr<int32_t>(),
                                   nnz.mutable_data_ptr<int32_t>(), current_stream()));
  const Tensor totals = at::sum(counts, 1, false, at::kLong).cpu();
  const int64_t total_units = totals[0].item<int64_t>(), total_nnz = totals[1].item<int64_t>();
  TORCH_CHECK_VALUE(total_units <= INT32_MAX, "flash_llm::", op, ": a weight of ", dense.m, "x",
                    dense.k, " has more nonzeros than 31-bit offsets can address");
  Tensor offsets = at::zeros({tiles + 1}, int_options);
  offsets.narrow(0, 1, tiles).copy_(at::cumsum(units, 0, at::kInt));
  Tensor payload = at::empty({total_units * format.unit_words}, int_options);
  const Tensor changed = at::zeros({1}, int_options);
  raise_if_error(op, kernels.pack(raw(dense.tensor), dense.ld, dense.m, dense.k,
                                  offsets.const_data_ptr<int32_t>(), nnz.const_data_ptr<int32_t>(),
                                  reinterpret_cast<uint32_t*>(payload.mutable_data_ptr<int32_t>()),
                                  changed.mutable_data_ptr<int32_t>(), current_stream()));
  if (changed.item<int32_t>() != 0) raise_if_error(op, dense_changed());
  if (tiles > 0) {
    raise_if_error(op, cuda::end_weight_writes(counts.mutable_data_ptr(), current_stream()));
  }
  return {header_tensor(make_header(dense, format.id, total_nnz, total_units * format.unit_words)),
          offsets, payload};
}

Packed pack_cuda(const Tensor& dense, c10::string_view format) {
  const c10::cuda::CUDAGuard guard(dense.device());
  check_format("pack", format);
  const DenseMatrix matrix = check_dense("pack", dense);
  return pack_dense_cuda("pack", matrix,
                         choose_format("pack", format, matrix, current_device_info()));
}

// Per-row cuts of a layer-wide target: one threshold, ties spent in row-major order.
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
                       c10::string_view format) {
  const c10::cuda::CUDAGuard guard(dense.device());
  const DenseMatrix matrix = check_dense("prune_pack", dense);
  check_format("prune_pack", format);
  const Tensor pruned = prune_cuda(matrix, check_prune_target(sparsity, scope));
  const DenseMatrix kept = {pruned, matrix.value_type, matrix.m, matrix.k, matrix.k};
  return pack_dense_cuda("prune_pack", kept,
                         choose_format("prune_pack", format, kept, current_device_info()));
}

Tensor unpack_weight_cuda(const char* op, const PackedWeight& weight) {
  const PackedHeader& h = weight.header;
  if (h.format == Format::kRowBitmap) {
    PackedWeight host = weight;
    host.offsets = weight.offsets.cpu();
    host.payload = weight.payload.cpu();
    return unpack_weight_cpu(op, host).to(weight.payload.device());
  }
  Tensor dense = at::empty({h.m, h.k}, weight.payload.options().dtype(scalar_type(h.value_type)));
  raise_if_error(
      op, pack_kernels(h.format).unpack(weight.view(), mutable_raw(dense), current_stream()));
  return dense;
}

Tensor unpack_cuda(at::IntArrayRef header, const Tensor& offsets, const Tensor& payload) {
  const PackedWeight weight = check_packed("unpack", header, offsets, payload);
  const c10::cuda::CUDAGuard guard(payload.device());
  return unpack_weight_cuda("unpack", weight);
}

// In depth on the host: validation happens when a weight is built or loaded, not per call.
void validate_cuda(at::IntArrayRef header, const Tensor& offsets, const Tensor& payload) {
  const PackedWeight weight = check_packed("validate", header, offsets, payload);
  validate_cpu(header, weight.offsets.cpu(), weight.payload.cpu());
}

// X as the kernels want it: 16-byte pieces, rows padded with zeros to a multiple of `multiple`
// columns. Most models have it so; else a small copy is made.
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

// A graph that is captured on one device would leave out, silently, what is launched on another.
void check_capture(const char* op, const Tensor& x) {
  const c10::DeviceIndex current = c10::cuda::current_device();
  if (x.device().index() == current) return;
  const auto status = c10::cuda::currentStreamCaptureStatusMayInitCtx();
  TORCH_CHECK_VALUE(status == c10::cuda::CaptureStatus::None, "flash_llm::", op, ": x is on ",
                    x.device(),
                    ", but a CUDA graph is being captured on cuda:", static_cast<int>(current));
}

Tensor spmm_cuda(const Tensor& x, at::IntArrayRef header, const Tensor& offsets,
                 const Tensor& payload, const std::optional<Tensor>& bias,
                 c10::string_view activation, c10::string_view config, int64_t ctas,
                 bool prefetch) {
  // Checked before the guard: any one argument on a GPU brings a call here.
  SpmmCall call = check_spmm(x, header, offsets, payload, bias, activation);
  check_capture("spmm", x);
  const c10::cuda::CUDAGuard guard(x.device());
  SpmmPlan plan;
  raise_if_error(
      "spmm", select_plan(call.problem(), current_device_info(), std::string(config), ctas, &plan));
  if (is_degenerate(call)) return spmm_degenerate(call);
  if (plan.route == SpmmRoute::kDense) {
    return spmm_dense(call, unpack_weight_cuda("spmm", call.weight));
  }
  const bool bitmap = plan.route == SpmmRoute::kBitmap;
  if (plan.packed_x_bytes == 0) call.x = kernel_ready(call.x, bitmap ? 8 : kTileK);
  Tensor y = at::empty(call.y_sizes, call.x.options());
  const Tensor workspace = at::empty({plan.workspace_bytes}, y.options().dtype(at::kByte));
  SpmmArgs args = spmm_args(call, y);
  if (plan.rounds_before_activation) args.activation = Activation::kNone;
  // A weight that was copied just now is still being written when a dependent launch would read it.
  prefetch = prefetch && !call.weight.copied;
  const auto spmm = bitmap ? cuda::spmm_bitmap : cuda::spmm_lscd;
  raise_if_error("spmm",
                 spmm(plan, args, workspace.mutable_data_ptr(), prefetch, current_stream()));
  if (plan.rounds_before_activation) activate_(y, call.activation);
  return y;
}

#else  // without FLASH_LLM_WITH_CUDA: every CUDA call explains itself

[[noreturn]] void raise_no_cuda(const char* op) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, "flash_llm::", op,
      ": flash_llm was built without its CUDA part. Found: ", FLASH_LLM_NO_CUDA_REASON,
      ". Needed: nvcc of the CUDA major version that torch was built with, and a CUDA build of "
      "torch. Then run: FLASH_LLM_BUILD_CUDA=1 pip install --no-build-isolation -e .");
}

Packed pack_cuda(const Tensor&, c10::string_view) { raise_no_cuda("pack"); }
Packed prune_pack_cuda(const Tensor&, std::optional<double>, c10::string_view, c10::string_view) {
  raise_no_cuda("prune_pack");
}
Tensor unpack_cuda(at::IntArrayRef, const Tensor&, const Tensor&) { raise_no_cuda("unpack"); }
void validate_cuda(at::IntArrayRef, const Tensor&, const Tensor&) { raise_no_cuda("validate"); }
Tensor spmm_cuda(const Tensor&, at::IntArrayRef, const Tensor&, const Tensor&,
                 const std::optional<Tensor>&, c10::string_view, c10::string_view, int64_t, bool) {
  raise_no_cuda("spmm");
}

#endif

}  // namespace
}  // namespace flash_llm

TORCH_LIBRARY(flash_llm, m) {
  m.def(
      "spmm(Tensor x, int[] header, Tensor offsets, Tensor payload, Tensor? bias=None, "
      "str activation=\"none\", str config=\"auto\", int ctas=0, bool prefetch=True) -> Tensor");
  m.def("pack(Tensor dense, str format=\"auto\") -> (Tensor, Tensor, Tensor)");
  m.def(
      "prune_pack(Tensor dense, float? sparsity=None, str scope=\"row\", "
      "str format=\"auto\") -> (Tensor, Tensor, Tensor)");
  m.def("unpack(int[] header, Tensor offsets, Tensor payload) -> Tensor");
  m.def("validate(int[] header, Tensor offsets, Tensor payload) -> ()");
}

TORCH_LIBRARY_IMPL(flash_llm, CPU, m) {
  m.impl("spmm", &flash_llm::spmm_cpu);
  m.impl("pack", &flash_llm::pack_cpu);
  m.impl("prune_pack", &flash_llm::prune_pack_cpu);
  m.impl("unpack", &flash_llm::unpack_cpu);
  m.impl("validate", &flash_llm::validate_cpu);
}

TORCH_LIBRARY_IMPL(flash_llm, CUDA, m) {
  m.impl("spmm", &flash_llm::spmm_cuda);
  m.impl("pack", &flash_llm::pack_cuda);
  m.impl("prune_pack", &flash_llm::prune_pack_cuda);
  m.impl("unpack", &flash_llm::unpack_cuda);
  m.impl("validate", &flash_llm::validate_cuda);
}
