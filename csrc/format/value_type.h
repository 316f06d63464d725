// The type of a packed weight's stored values. X must have the same dtype (check_spmm in
// torch/checks.cpp); the table of kernel families (plan/kernel_family.h) says which value types a
// kernel multiplies.
#pragma once

#include <cstdint>
#include <string>

#include "base/status.h"

namespace flash_llm {

// The numbers are stored in headers of packed weights, so they never change.
enum class ValueType : int64_t { kFloat16 = 1, kBfloat16 = 2 };

inline constexpr ValueType kValueTypes[] = {ValueType::kFloat16, ValueType::kBfloat16};

// Which elements of a weight share a scale. Weights of a value type with scales have a third tensor
// besides offsets and payload.
enum class ScaleGroup {
  kNone,  // the values are the weight's elements
  kRow,   // one scale for each row
};

struct ValueTraits {
  const char* name;  // as torch names the dtype
  int bits;          // of one stored value
  ScaleGroup scales;
};

constexpr ValueTraits value_traits(ValueType type) {
  switch (type) {
    case ValueType::kFloat16:
      return {"float16", 16, ScaleGroup::kNone};
    case ValueType::kBfloat16:
      return {"bfloat16", 16, ScaleGroup::kNone};
  }
  return {};  // unreachable: `type` comes from a checked header
}

// The value type for a number in a header, and for a name.
Status value_type_of(int64_t number, ValueType* out);
Status parse_value_type(const std::string& name, ValueType* out);

}  // namespace flash_llm
