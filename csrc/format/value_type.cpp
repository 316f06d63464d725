#include "format/value_type.h"

namespace flash_llm {
namespace {

// "1 (float16), 2 (bfloat16)"
std::string known_numbers() {
  std::string known;
  for (const ValueType type : kValueTypes) {
    known += (known.empty() ? "" : ", ") + std::to_string(static_cast<int64_t>(type)) + " (" +
             value_traits(type).name + ")";
  }
  return known;
}

}  // namespace

Status value_type_of(int64_t number, ValueType* out) {
  for (const ValueType type : kValueTypes) {
    if (number == static_cast<int64_t>(type)) {
      *out = type;
      return Status::success();
    }
  }
  return Status::invalid_type("header names value type " + std::to_string(number) +
                              ", this build knows " + known_numbers());
}

Status parse_value_type(const std::string& name, ValueType* out) {
  std::string known;
  for (const ValueType type : kValueTypes) {
    if (name == value_traits(type).name) {
      *out = type;
      return Status::success();
    }
    known += (known.empty() ? "\"" : " or \"") + std::string(value_traits(type).name) + "\"";
  }
  return Status::invalid_type("value_type must be " + known + ", got \"" + name + "\"");
}

}  // namespace flash_llm
