// The operators of torch.ops.flash_llm: schemas and registrations. Their fake implementations are
// in flash_llm/ops.py, the derivatives in torch/autograd.cpp.
#include <torch/library.h>

#include "torch/operators.h"
#include "torch/packed_parts.h"

TORCH_LIBRARY(flash_llm, m) {
  m.def(
      "spmm(Tensor x, int[] header, Tensor offsets, Tensor payload, Tensor? bias=None, "
      "str activation=\"none\", str config=\"auto\", int ctas=0, bool prefetch=True, "
      "str x_quantization=\"none\") -> Tensor");
  m.def(
      "pack(Tensor dense, str format=\"auto\", int expected_tokens=0) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "pack_quantized(Tensor values, Tensor scales, ScalarType dtype, str format=\"auto\") -> "
      "(Tensor, Tensor, Tensor)");
  m.def("unpack_quantized(int[] header, Tensor offsets, Tensor payload) -> (Tensor, Tensor)");
  m.def(
      "prune_pack(Tensor dense, float? sparsity=None, str scope=\"row\", "
      "str format=\"auto\", int expected_tokens=0) -> (Tensor, Tensor, Tensor)");
  m.def("unpack(int[] header, Tensor offsets, Tensor payload) -> Tensor");
  m.def("validate(int[] header, Tensor offsets, Tensor payload) -> ()");
  m.def("count_stored(int[] header, Tensor offsets, Tensor payload) -> int");
  m.def(
      "slice(int[] header, Tensor offsets, Tensor payload, int first_row, int last_row, "
      "int first_col, int last_col) -> (Tensor, Tensor, Tensor)");
  m.def("concat(int[] headers, Tensor[] offsets, Tensor[] payloads) -> (Tensor, Tensor, Tensor)");
}

#define FLASH_LLM_REGISTER(key, device)                                \
  TORCH_LIBRARY_IMPL(flash_llm, key, m) {                              \
    m.impl("spmm", &flash_llm::spmm_##device);                         \
    m.impl("pack", &flash_llm::pack_##device);                         \
    m.impl("pack_quantized", &flash_llm::pack_quantized_##device);     \
    m.impl("unpack_quantized", &flash_llm::unpack_quantized_##device); \
    m.impl("prune_pack", &flash_llm::prune_pack_##device);             \
    m.impl("unpack", &flash_llm::unpack_##device);                     \
    m.impl("validate", &flash_llm::validate_##device);                 \
    m.impl("count_stored", &flash_llm::count_stored_##device);         \
  }
FLASH_LLM_REGISTER(CPU, cpu)
FLASH_LLM_REGISTER(CUDA, cuda)
#undef FLASH_LLM_REGISTER

TORCH_LIBRARY_IMPL(flash_llm, CompositeExplicitAutograd, m) {
  m.impl("slice", &flash_llm::slice);
  m.impl("concat", &flash_llm::concat);
}

namespace flash_llm {

at::Tensor call_spmm(const at::Tensor& x, at::IntArrayRef header, const at::Tensor& offsets,
                     const at::Tensor& payload, const std::optional<at::Tensor>& bias,
                     c10::string_view activation, c10::string_view config, int64_t ctas,
                     bool prefetch, c10::string_view x_quantization) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("flash_llm::spmm", "")
                             .typed<decltype(spmm_cpu)>();
  return op.call(x, header, offsets, payload, bias, activation, config, ctas, prefetch,
                 x_quantization);
}

}  // namespace flash_llm
