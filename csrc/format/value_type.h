// The type of a packed weight's stored values, and the dtype of the weight that they stand for. X
// must have that dtype (check_spmm in torch/checks.cpp); the table of kernel families
// (plan/kernel_family.h) says which value types a kernel multiplies.
#pragma once

#include <cstdint>
#include <string>

#include "base/enum_set.h"
#include "base/host_device.h"
#include "base/status.h"

namespace flash_llm {

// The numbers are stored in headers of packed weights, so they never change. A type of quantised
// values is named after them and the dtype of the weight.
enum class ValueType : int64_t {
  kFloat16 = 1,
  kBfloat16 = 2,
  kInt8Float16 = 3,
  kInt8Bfloat16 = 4,
  kFp8Float16 = 5,
  kFp8Bfloat16 = 6,
  kInt4Float16 = 7,
  kInt4Bfloat16 = 8,
};

inline constexpr ValueType kValueTypes[] = {ValueType::kFloat16,     ValueType::kBfloat16,
                                            ValueType::kInt8Float16, ValueType::kInt8Bfloat16,
                                            ValueType::kFp8Float16,  ValueType::kFp8Bfloat16,
                                            ValueType::kInt4Float16, ValueType::kInt4Bfloat16};

// What a stored value is, whatever the dtype of the weight.
enum class ValueKind {
  k16Bit,    // an element of the weight
  kInt8,     // -127 ... 127
  kFp8E4m3,  // float8_e4m3fn: 4 bits of exponent, 3 of mantissa; NaN is never stored
  kInt4,     // -7 ... 7
};

// Which elements of a weight share a scale. Scales lie in the payload, where each format says.
enum class ScaleGroup {
  kNone,      // the values are the weight's elements
  kRow,       // one fp32 scale for each row
  kRowGroup,  // one fp16 scale for each row and group of kScaleGroupCols columns
};

// The last group of a row may have fewer columns.
inline constexpr int kScaleGroupCols = 128;

struct ValueTraits {
  const char* name;
  const char* values;  // what Python's `values` calls them
  ValueKind kind;
  int bits;  // of one stored value
  ScaleGroup scales;
  ValueType dense;  // the 16-bit type of the unpacked weight, and of X
};

// An element of the weight is value * scale, rounded to fp32 and then to the 16-bit type
// (dequantize in format/element.h). Products use the unrounded value * scale, except where a weight
// is unpacked for a dense GEMM, and of int4 values where wgmma multiplies them.
FLASH_LLM_HOST_DEVICE constexpr ValueTraits value_traits(ValueType type) {
  constexpr ValueType kHalf = ValueType::kFloat16, kBf16 = ValueType::kBfloat16;
  switch (type) {
    case ValueType::kFloat16:
      return {"float16", "16-bit", ValueKind::k16Bit, 16, ScaleGroup::kNone, kHalf};
    case ValueType::kBfloat16:
      return {"bfloat16", "16-bit", ValueKind::k16Bit, 16, ScaleGroup::kNone, kBf16};
    case ValueType::kInt8Float16:
      return {"int8_float16", "int8", ValueKind::kInt8, 8, ScaleGroup::kRow, kHalf};
    case ValueType::kInt8Bfloat16:
      return {"int8_bfloat16", "int8", ValueKind::kInt8, 8, ScaleGroup::kRow, kBf16};
    case ValueType::kFp8Float16:
      return {"fp8_e4m3_float16", "fp8_e4m3", ValueKind::kFp8E4m3, 8, ScaleGroup::kRow, kHalf};
    case ValueType::kFp8Bfloat16:
      return {"fp8_e4m3_bfloat16", "fp8_e4m3", ValueKind::kFp8E4m3, 8, ScaleGroup::kRow, kBf16};
    case ValueType::kInt4Float16:
      return {"int4_float16", "int4", ValueKind::kInt4, 4, ScaleGroup::kRowGroup, kHalf};
    case ValueType::kInt4Bfloat16:
      return {"int4_bfloat16", "int4", ValueKind::kInt4, 4, ScaleGroup::kRowGroup, kBf16};
  }
  return {};  // unreachable: `type` comes from a checked header
}

FLASH_LLM_HOST_DEVICE constexpr bool is_quantized(ValueType type) {
  return value_traits(type).scales != ScaleGroup::kNone;
}

// Scales of a row of k columns, which of them column `col` has, and bytes of a stored scale.
FLASH_LLM_HOST_DEVICE constexpr int64_t scales_per_row(ValueType type, int64_t k) {
  switch (value_traits(type).scales) {
    case ScaleGroup::kNone:
      return 0;
    case ScaleGroup::kRow:
      return 1;
    case ScaleGroup::kRowGroup:
      return (k + kScaleGroupCols - 1) / kScaleGroupCols;
  }
  return 0;  // never: the switch is exhaustive
}
FLASH_LLM_HOST_DEVICE constexpr int64_t scale_group(ValueType type, int64_t col) {
  return value_traits(type).scales == ScaleGroup::kRowGroup ? col / kScaleGroupCols : 0;
}
FLASH_LLM_HOST_DEVICE constexpr int scale_bytes(ValueType type) {
  return value_traits(type).scales == ScaleGroup::kRowGroup ? 2 : 4;
}

// For tables: the types of one kind of values, and all types.
constexpr EnumSet<ValueType> value_types(ValueKind kind) {
  EnumSet<ValueType> found;
  for (const ValueType type : kValueTypes) {
    if (value_traits(type).kind == kind) found.insert(type);
  }
  return found;
}
constexpr EnumSet<ValueType> every_value_type() {
  EnumSet<ValueType> found;
  for (const ValueType type : kValueTypes) found.insert(type);
  return found;
}
inline constexpr EnumSet<ValueType> k16Bit = value_types(ValueKind::k16Bit);
inline constexpr EnumSet<ValueType> kInt8Types = value_types(ValueKind::kInt8);
inline constexpr EnumSet<ValueType> kFp8Types = value_types(ValueKind::kFp8E4m3);
inline constexpr EnumSet<ValueType> kEveryType = every_value_type();
inline constexpr EnumSet<ValueType> kQuantizedTypes = kEveryType.without(k16Bit);

// The value type for a number in a header, and for a name.
Status value_type_of(int64_t number, ValueType* out);
Status parse_value_type(const std::string& name, ValueType* out);

}  // namespace flash_llm
