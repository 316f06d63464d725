// Status: how all folders below torch/ report errors. They never print, throw or exit;
// csrc/torch/checks.cpp maps each code to one Python exception type.
#pragma once

#include <string>
#include <utility>

namespace flash_llm {

enum class StatusCode {
  kOk,
  kInvalidValue,  // ValueError: a shape, size, range or malformed buffer
  kInvalidType,   // TypeError: a dtype or device
  kUnsupported,   // NotImplementedError: an unknown or missing architecture, format or feature
  kRuntime,       // RuntimeError: a CUDA call failed, or an input changed during the call
};

struct [[nodiscard]] Status {
  StatusCode code = StatusCode::kOk;
  std::string message;

  bool ok() const { return code == StatusCode::kOk; }

  static Status success() { return {}; }
  static Status invalid_value(std::string message) {
    return {StatusCode::kInvalidValue, std::move(message)};
  }
  static Status invalid_type(std::string message) {
    return {StatusCode::kInvalidType, std::move(message)};
  }
  static Status unsupported(std::string message) {
    return {StatusCode::kUnsupported, std::move(message)};
  }
  static Status runtime(std::string message) { return {StatusCode::kRuntime, std::move(message)}; }
};

}  // namespace flash_llm
