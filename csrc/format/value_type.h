// The type of a packed weight's stored values, and the dtype of the weight that they stand for. X
// must have that dtype (check_spmm in torch/checks.cpp); the table of kernel families
// (plan/kernel_family.h) says which value types a kernel multiplies.
#pragma once

#include <cstdint>
#include <string>

#include "base/enum_set.h"
#include "base/status.h"

namespace flash_llm {

// The numbers are stored in headers of packed weights, so they never change. A type of quantised
// values is named after them and the dtype of the weight.
enum class ValueType : int64_t {
  kFloat16 = 1,
  kBfloat16 = 2,
  kInt8Float16 = 3,
  kInt8Bfloat16 = 4,
};

inline constexpr ValueType kValueTypes[] = {ValueType::kFloat16, ValueType::kBfloat16,
                                            ValueType::kInt8Float16, ValueType::kInt8Bfloat16};

// Which elements of a weight share a scale. Scales lie in the payload, where each format says.
enum class ScaleGroup {
  kNone,  // the values are the weight's elements
  kRow,   // one fp32 scale for each row
};

struct ValueTraits {
  const char* name;
  const char* values;  // what Python's `values` calls them
  int bits;            // of one stored value
  ScaleGroup scales;
  ValueType dense;  // the 16-bit type of the unpacked weight, and of X
};

// int8 values are -127 ... 127. An element of the weight is value * scale, rounded to fp32 and then
// to the 16-bit type (dequantize in format/element.h). Products use the unrounded value * scale,
// except where a weight is unpacked for a dense GEMM.
constexpr ValueTraits value_traits(ValueType type) {
  switch (type) {
    case ValueType::kFloat16:
      return {"float16", "16-bit", 16, ScaleGroup::kNone, ValueType::kFloat16};
    case ValueType::kBfloat16:
      return {"bfloat16", "16-bit", 16, ScaleGroup::kNone, ValueType::kBfloat16};
    case ValueType::kInt8Float16:
      return {"int8_float16", "int8", 8, ScaleGroup::kRow, ValueType::kFloat16};
    case ValueType::kInt8Bfloat16:
      return {"int8_bfloat16", "int8", 8, ScaleGroup::kRow, ValueType::kBfloat16};
  }
  return {};  // unreachable: `type` comes from a checked header
}

constexpr bool is_quantized(ValueType type) {
  return value_traits(type).scales != ScaleGroup::kNone;
}

// For tables: the types whose values are the weight's elements, and all types.
constexpr EnumSet<ValueType> value_types(bool quantized) {
  EnumSet<ValueType> found;
  for (const ValueType type : kValueTypes) {
    if (quantized || !is_quantized(type)) found.insert(type);
  }
  return found;
}
inline constexpr EnumSet<ValueType> k16Bit = value_types(false);
inline constexpr EnumSet<ValueType> kEveryType = value_types(true);
inline constexpr EnumSet<ValueType> kQuantizedTypes = kEveryType.without(k16Bit);

// The value type for a number in a header, and for a name.
Status value_type_of(int64_t number, ValueType* out);
Status parse_value_type(const std::string& name, ValueType* out);

}  // namespace flash_llm
