// The activations on the host, in the precision of the sums (fp32, or fp64 in the oracle).
#pragma once

#include <cmath>

#include "plan/problem.h"

namespace flash_llm {

template <typename Real>
Real apply_activation(Real value, Activation activation) {
  switch (activation) {
    case Activation::kNone:
      return value;
    case Activation::kRelu:
      return value < Real{0} ? Real{0} : value;  // NaN passes, as in torch
    case Activation::kGelu:
      return value * Real{0.5} * (Real{1} + std::erf(value * static_cast<Real>(M_SQRT1_2)));
    case Activation::kSilu:
      return value / (Real{1} + std::exp(-value));
  }
  return value;
}

}  // namespace flash_llm
