// The derivatives of spmm in x and bias; the weight is frozen. Where x is quantised they are those
// of the product with x as it is. A call without gradients is passed on. In Python
// (torch.library.register_autograd) the same added 16 us to a call without gradients and 100 us to
// one with them (EPYC, 64x64).
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <vector>

#include "torch/operators.h"

namespace flash_llm {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The arguments of spmm that are not differentiated.
struct Options {
  std::vector<int64_t> header;
  std::string activation, config, x_quantization;
  int64_t ctas;
  bool prefetch;
};

Tensor spmm_with(const Options& options, const Tensor& x, const Tensor& offsets,
                 const Tensor& payload, const std::optional<Tensor>& bias,
                 const std::string& activation) {
  return call_spmm(x, options.header, offsets, payload, bias, activation, options.config,
                   options.ctas, options.prefetch, options.x_quantization);
}

Tensor call_unpack(const std::vector<int64_t>& header, const Tensor& offsets,
                   const Tensor& payload) {
  using Unpack = Tensor(at::IntArrayRef, const Tensor&, const Tensor&);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("flash_llm::unpack", "").typed<Unpack>();
  return op.call(header, offsets, payload);
}

std::optional<Tensor> optional(const Tensor& tensor) {
  return tensor.defined() ? std::optional<Tensor>(tensor) : std::nullopt;
}

// The gradient before an activation, in fp32: z is its input, `grad` the gradient after it.
Tensor activation_backward(const Tensor& grad, const Tensor& z, const std::string& name) {
  Activation activation{};
  raise_if_error("spmm", parse_activation(name, &activation));
  switch (activation) {
    case Activation::kNone:
      return grad;
    case Activation::kRelu:
      return at::threshold_backward(grad, z, 0);
    case Activation::kGelu:
      return at::gelu_backward(grad, z);
    case Activation::kSilu: {  // at::silu_backward itself has no derivative
      const Tensor s = at::sigmoid(z);
      return grad * s * (1 + z * (1 - s));
    }
  }
  TORCH_CHECK(false, "flash_llm::spmm: activation ", name, " has no gradient");
}

class Spmm : public torch::autograd::Function<Spmm> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Options& options,
                        const Tensor& offsets, const Tensor& payload,
                        const std::optional<Tensor>& bias) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    // Without an activation neither gradient needs x or bias.
    const bool recomputes = options.activation != "none";
    ctx->save_for_backward({offsets, payload, recomputes ? x : Tensor(),
                            recomputes ? bias.value_or(Tensor()) : Tensor()});
    ctx->saved_data["header"] = options.header;
    ctx->saved_data["activation"] = options.activation;
    ctx->saved_data["config"] = options.config;
    ctx->saved_data["x_quantization"] = options.x_quantization;
    ctx->saved_data["ctas"] = options.ctas;
    ctx->saved_data["prefetch"] = options.prefetch;
    if (bias) ctx->saved_data["bias_type"] = static_cast<int64_t>(bias->scalar_type());
    return spmm_with(options, x, offsets, payload, bias, options.activation);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &offsets = saved[0], &payload = saved[1], &x = saved[2], &bias = saved[3];
    const Options options = {
        ctx->saved_data["header"].toIntVector(), ctx->saved_data["activation"].toStringRef(),
        ctx->saved_data["config"].toStringRef(), ctx->saved_data["x_quantization"].toStringRef(),
        ctx->saved_data["ctas"].toInt(),         ctx->saved_data["prefetch"].toBool()};
    Tensor grad = grads[0];
    if (options.activation != "none") {
      const Tensor z = spmm_with(options, x, offsets, payload, optional(bias), "none");
      grad = activation_backward(grad.to(at::kFloat), z.to(at::kFloat), options.activation)
                 .to(grad.scalar_type());
    }
    Tensor grad_x, grad_bias;
    if (ctx->needs_input_grad(0)) {
      grad_x = at::matmul(grad, call_unpack(options.header, offsets, payload));
    }
    if (ctx->saved_data.count("bias_type") != 0 && ctx->needs_input_grad(3)) {
      const Tensor tokens = grad.dim() > 1 ? grad.flatten(0, -2) : grad.unsqueeze(0);
      grad_bias = tokens.sum(0, false, at::kFloat)
                      .to(static_cast<at::ScalarType>(ctx->saved_data["bias_type"].toInt()));
    }
    return {grad_x, Tensor(), Tensor(), Tensor(), grad_bias};
  }
};

// Forward-mode AD, which apply() refuses.
bool has_tangent(const Tensor& tensor) { return tensor._fw_grad(/*level=*/0).defined(); }

Tensor spmm_autograd(const Tensor& x, at::IntArrayRef header, const Tensor& offsets,
                     const Tensor& payload, const std::optional<Tensor>& bias,
                     c10::string_view activation, c10::string_view config, int64_t ctas,
                     bool prefetch, c10::string_view x_quantization) {
  const bool differentiable =
      (at::GradMode::is_enabled() && (x.requires_grad() || (bias && bias->requires_grad()))) ||
      has_tangent(x) || (bias && has_tangent(*bias));
  if (differentiable) {
    const Options options = {header.vec(),
                             std::string(activation),
                             std::string(config),
                             std::string(x_quantization),
                             ctas,
                             prefetch};
    return Spmm::apply(x, options, offsets, payload, bias);
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_spmm(x, header, offsets, payload, bias, activation, config, ctas, prefetch,
                   x_quantization);
}

TORCH_LIBRARY_IMPL(flash_llm, Autograd, m) { m.impl("spmm", &spmm_autograd); }

}  // namespace
}  // namespace flash_llm
