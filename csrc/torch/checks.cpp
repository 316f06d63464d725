#include "torch/checks.h"

#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>

#include <algorithm>
#include <limits>

#include "plan/spmm_plan.h"

namespace flash_llm {

using at::Tensor;

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

at::ScalarType scalar_type(ValueType type) {
  return value_traits(type).dense == ValueType::kFloat16 ? at::kHalf : at::kBFloat16;
}

namespace {

ValueType value_type_of(const char* op, const char* name, const Tensor& tensor) {
  TORCH_CHECK_TYPE(
      tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16, "flash_llm::", op,
      ": ", name, " must be float16 or bfloat16, got ", tensor.scalar_type(),
      tensor.scalar_type() == at::kFloat ? " (convert it with .to(torch.bfloat16))" : "");
  return tensor.scalar_type() == at::kHalf ? ValueType::kFloat16 : ValueType::kBfloat16;
}

}  // namespace

const uint16_t* raw(const Tensor& tensor) {
  return static_cast<const uint16_t*>(tensor.const_data_ptr());
}

uint16_t* mutable_raw(const Tensor& tensor) {
  return static_cast<uint16_t*>(tensor.mutable_data_ptr());
}

namespace {

// A tensor's storage may be smaller than its sizes say: UntypedStorage.resize_ does not change
// them. Sharded optimizers free a weight that way between its uses.
void check_storage(const char* op, const char* name, const Tensor& tensor) {
  const size_t needed = at::detail::computeStorageNbytes(
      tensor.sizes(), tensor.strides(), tensor.itemsize(), tensor.storage_offset());
  TORCH_CHECK_VALUE(needed <= tensor.storage().nbytes(), "flash_llm::", op, ": ", name,
                    " of shape ", tensor.sizes(), " needs a storage of ", needed,
                    " bytes, got one of ", tensor.storage().nbytes());
}

void check_words(const char* op, const char* name, const Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kInt, "flash_llm::", op, ": ", name,
                   " must be int32, got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.dim() == 1, "flash_llm::", op, ": ", name,
                    " must be one-dimensional, got ", tensor.dim(), " dimensions");
  check_storage(op, name, tensor);
}

}  // namespace

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
  // Kernels read aligned 16-byte vectors; a view into a larger buffer may start at any word.
  if (reinterpret_cast<uintptr_t>(weight.payload.const_data_ptr()) % 16 != 0) {
    weight.payload = weight.payload.clone();
  }
  weight.copied = !weight.payload.is_alias_of(payload) || !weight.offsets.is_alias_of(offsets);
  return weight;
}

namespace {

void check_tiles(const char* op, const PackedFormat& format, ValueType type, int64_t m, int64_t k) {
  TORCH_CHECK_VALUE(format.tiles(type, m, k) < INT32_MAX, "flash_llm::", op, ": a dense weight of ",
                    m, "x", k, " has more tiles than 32-bit indices can count");
}

}  // namespace

namespace {

DenseMatrix check_matrix(const char* op, const char* name, const Tensor& dense,
                         ValueType value_type) {
  TORCH_CHECK_VALUE(dense.dim() == 2, "flash_llm::", op, ": ", name,
                    " must be two-dimensional [M, K], got ", dense.dim(), " dimensions");
  const int64_t m = dense.size(0), k = dense.size(1);
  TORCH_CHECK_VALUE(m <= INT32_MAX && k <= INT32_MAX, "flash_llm::", op, ": ", name,
                    " must have at most 2^31 - 1 rows and columns, got ", m, "x", k);
  check_storage(op, name, dense);
  // Before anything is copied: no format has larger tiles than this one.
  check_tiles(op, packed_format(Format::kTiledCsl), value_type, m, k);
  const bool rows_contiguous = k <= 1 || dense.stride(1) == 1;
  const Tensor rows =
      rows_contiguous && (m <= 1 || dense.stride(0) >= 0) ? dense : dense.contiguous();
  return {rows, value_type, m, k, rows.stride(0)};
}

}  // namespace

DenseMatrix check_dense(const char* op, const Tensor& dense) {
  return check_matrix(op, "dense", dense, value_type_of(op, "dense", dense));
}

namespace {

constexpr const char* kPackQuantized = "pack_quantized";

// The type of a weight of `dtype` with such values and scales.
ValueType quantized_type(const Tensor& values, const Tensor& scales, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype == at::kHalf || dtype == at::kBFloat16, "flash_llm::", kPackQuantized,
                   ": dtype must be float16 or bfloat16, got ", dtype);
  const bool fp8 = values.scalar_type() == at::kFloat8_e4m3fn, half = dtype == at::kHalf;
  TORCH_CHECK_TYPE(fp8 || values.scalar_type() == at::kChar, "flash_llm::", kPackQuantized,
                   ": values must be int8 or float8_e4m3fn, got ", values.scalar_type());
  if (fp8) return half ? ValueType::kFp8Float16 : ValueType::kFp8Bfloat16;
  if (scales.dim() == 2) return half ? ValueType::kInt4Float16 : ValueType::kInt4Bfloat16;
  return half ? ValueType::kInt8Float16 : ValueType::kInt8Bfloat16;
}

// The largest value of a type.
double largest_value(ValueType type) {
  switch (value_traits(type).kind) {
    case ValueKind::kInt8:
      return 127;
    case ValueKind::kFp8E4m3:
      return 448;
    case ValueKind::kInt4:
      return 7;
    case ValueKind::k16Bit:
      break;
  }
  return 0;  // never: `type` is quantised
}

// Refuses scales of other shapes, and those that cannot be stored.
void check_scales(const DenseMatrix& dense, const Tensor& scales) {
  const ValueType type = dense.value_type;
  TORCH_CHECK_TYPE(scales.scalar_type() == at::kFloat, "flash_llm::", kPackQuantized,
                   ": scales must be float32, got ", scales.scalar_type());
  TORCH_CHECK_TYPE(scales.device() == dense.tensor.device(), "flash_llm::", kPackQuantized,
                   ": scales must be on ", dense.tensor.device(), " like values, got ",
                   scales.device());
  if (value_traits(type).scales == ScaleGroup::kRowGroup) {
    const int64_t groups = scales_per_row(type, dense.k);
    TORCH_CHECK_VALUE(scales.size(0) == dense.m && scales.size(1) == groups,
                      "flash_llm::", kPackQuantized,
                      ": scales of int4 values must have shape [M=", dense.m, ", groups of ",
                      kScaleGroupCols, " columns=", groups, "], got ", scales.sizes());
  } else {
    TORCH_CHECK_VALUE(scales.dim() == 1 && scales.size(0) == dense.m, "flash_llm::", kPackQuantized,
                      ": scales must have shape [M=", dense.m, "], got ", scales.sizes());
  }
  check_storage(kPackQuantized, "scales", scales);
  const bool half = scale_bytes(type) == 2;
  const Tensor stored = half ? scales.to(at::kHalf).to(at::kFloat) : scales;
  const double least = half ? 0x1p-14 : std::numeric_limits<float>::min();
  const Tensor right =
      at::logical_and(at::ge(scales, least), at::isfinite(stored)).logical_and_(stored.eq(scales));
  if (right.all().item<bool>()) return;
  const Tensor index = at::nonzero(right.logical_not())[0].cpu();
  std::string where = std::to_string(index[0].item<int64_t>());
  if (half) where += ", " + std::to_string(index[1].item<int64_t>());
  Tensor scale = scales;
  for (int64_t i = 0; i < index.size(0); ++i) scale = scale[index[i].item<int64_t>()];
  TORCH_CHECK_VALUE(false, "flash_llm::", kPackQuantized, ": scales must be positive normal ",
                    half ? "numbers of float16" : "numbers", ", got scales[", where,
                    "] = ", scale.item<float>());
}

// Refuses values outside the grid.
void check_grid(ValueType type, const Tensor& values) {
  if (value_traits(type).kind == ValueKind::kFp8E4m3) {
    const Tensor magnitudes = at::bitwise_and(values.view(at::kByte), 0x7F);
    TORCH_CHECK_VALUE(magnitudes.max().item<int64_t>() < 0x7F, "flash_llm::", kPackQuantized,
                      ": values must not be NaN");
    return;
  }
  const auto largest = static_cast<int64_t>(largest_value(type));
  const auto [low, high] = at::aminmax(values);
  const int64_t lowest = low.item<int64_t>(), highest = high.item<int64_t>();
  TORCH_CHECK_VALUE(lowest >= -largest && highest <= largest, "flash_llm::", kPackQuantized,
                    ": values must lie in ", -largest, " ... ", largest, ", got ",
                    lowest < -largest ? lowest : highest);
}

// Refuses elements that overflow the weight's dtype.
void check_elements(const DenseMatrix& dense, const Tensor& scales) {
  const at::ScalarType dtype = scalar_type(dense.value_type);
  const Tensor columns = scales.dim() == 1 ? scales.unsqueeze(1) : scales;
  const Tensor safe = at::isfinite((columns * largest_value(dense.value_type)).to(dtype)).all(1);
  if (safe.all().item<bool>()) return;
  const Tensor rows = at::nonzero(safe.logical_not()).squeeze(1);
  // The type of bytes, as torch cannot index the others.
  const Tensor values = dense.tensor.view(at::kByte)
                            .index_select(0, rows)
                            .view(dense.tensor.scalar_type())
                            .to(at::kFloat);
  const int64_t repeats = scales.dim() == 1 ? dense.k : kScaleGroupCols;
  const Tensor of_values =
      columns.index_select(0, rows).repeat_interleave(repeats, 1).narrow(1, 0, dense.k);
  const Tensor overflows = at::isfinite((values * of_values).to(dtype)).logical_not_();
  if (!overflows.any().item<bool>()) return;
  const Tensor index = at::nonzero(overflows)[0].cpu();
  const int64_t i = index[0].item<int64_t>(), col = index[1].item<int64_t>();
  TORCH_CHECK_VALUE(false, "flash_llm::", kPackQuantized, ": row ", rows[i].item<int64_t>(),
                    " must be finite in ", dtype, ", got a value of ", values[i][col].item<float>(),
                    " times a scale of ", of_values[i][col].item<float>());
}

}  // namespace

DenseMatrix check_quantized(const Tensor& values, const Tensor& scales, at::ScalarType dtype) {
  DenseMatrix dense =
      check_matrix(kPackQuantized, "values", values, quantized_type(values, scales, dtype));
  check_scales(dense, scales);
  if (values.numel() > 0) {
    check_grid(dense.value_type, values);
    check_elements(dense, scales);
  }
  dense.scales = scales.contiguous();
  return dense;
}

void check_quantized(const PackedWeight& weight) {
  const ValueType type = weight.header.value_type;
  TORCH_CHECK_TYPE(is_quantized(type), "flash_llm::unpack_quantized: values of type ",
                   value_traits(type).name, " are not quantised");
}

ValueMatrix DenseMatrix::matrix() const {
  return {tensor.const_data_ptr(),
          ld,
          m,
          k,
          value_type,
          scales.defined() ? scales.const_data_ptr<float>() : nullptr};
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

const PackedFormat& choose_format(const char* op, c10::string_view name, const DenseMatrix& dense,
                                  const DeviceInfo& device, int64_t expected_tokens) {
  TORCH_CHECK_VALUE(expected_tokens >= 0, "flash_llm::", op,
                    ": expected_tokens must not be negative, got ", expected_tokens);
  Format id;
  if (name == "auto") {
    // Counting waits for the device, so it is done only if the format depends on the count.
    const int64_t nnz = format_depends_on_density(dense.value_type, device)
                            ? at::count_nonzero(dense.tensor).item<int64_t>()
                            : 0;
    id = select_format(dense.m, dense.k, nnz, dense.value_type, device, expected_tokens).format;
  } else {
    raise_if_error(op, parse_format(std::string(name), &id));
  }
  const PackedFormat& format = packed_format(id);
  raise_if_error(op, check_holds(format, dense.value_type));
  check_tiles(op, format, dense.value_type, dense.m, dense.k);
  return format;
}

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

SpmmCall check_spmm(const Tensor& x, at::IntArrayRef header, const Tensor& offsets,
                    const Tensor& payload, const std::optional<Tensor>& bias,
                    c10::string_view activation, c10::string_view x_quantization) {
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
  raise_if_error("spmm", parse_x_quantization(std::string(x_quantization), &call.rounds_x));
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

// Autocast must not change the dtype of the GEMM.
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
  args.activation = call.activation;
  return args;
}

Tensor spmm_degenerate(const SpmmCall& call) {
  Tensor y = at::zeros(call.y_sizes, call.x.options());
  if (call.bias) y += *call.bias;
  activate_(y, call.activation);
  return y;
}

PackedView PackedWeight::view() const {
  return {header.m,
          header.k,
          header.nnz,
          offsets.const_data_ptr<int32_t>(),
          reinterpret_cast<const uint32_t*>(payload.const_data_ptr<int32_t>()),
          header.payload_words,
          header.value_type};
}

SpmmProblem SpmmCall::problem() const {
  const PackedHeader& h = weight.header;
  return {h.m, n, h.k, h.nnz, h.format, h.value_type, rounds_x};
}

bool SpmmCall::is_degenerate() const {
  return n == 0 || weight.header.m == 0 || weight.header.k == 0;
}

}  // namespace flash_llm
