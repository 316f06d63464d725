#include "plan/problem.h"

#include <algorithm>

namespace flash_llm {

Status parse_activation(const std::string& name, Activation* out) {
  if (name == "none") {
    *out = Activation::kNone;
  } else if (name == "relu") {
    *out = Activation::kRelu;
  } else if (name == "gelu") {
    *out = Activation::kGelu;
  } else if (name == "silu") {
    *out = Activation::kSilu;
  } else {
    return Status::invalid_value(
        "activation must be \"none\", \"relu\", \"gelu\" or \"silu\", got \"" + name + "\"");
  }
  return Status::success();
}

Status parse_x_quantization(const std::string& name, bool* rounds_x) {
  if (name != "none" && name != "dynamic") {
    return Status::invalid_value("x_quantization must be \"none\" or \"dynamic\", got \"" + name +
                                 "\"");
  }
  *rounds_x = name == "dynamic";
  return Status::success();
}

double num_elems(const SpmmProblem& problem) {
  return static_cast<double>(problem.m) * static_cast<double>(problem.k);
}

double density(const SpmmProblem& problem) {
  return static_cast<double>(problem.nnz) / std::max(num_elems(problem), 1.0);
}

}  // namespace flash_llm
