// What the formats' validators share.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <utility>

#include "core/status.h"

namespace flash_llm {

// First failure of several threads: the one in the lowest tile wins, so messages are repeatable.
class FirstFailure {
 public:
  // `what` a failure is in: "tile".
  explicit FirstFailure(std::string what) : what_(std::move(what)) {}

  void report(int64_t tile, const std::string& message) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (tile_ < 0 || tile < tile_) {
      tile_ = tile;
      message_ = message;
    }
  }
  Status status() const {
    return tile_ < 0 ? Status::success()
                     : Status::invalid_value(what_ + " " + std::to_string(tile_) + ": " + message_);
  }

 private:
  std::string what_;
  std::mutex mutex_;
  int64_t tile_ = -1;
  std::string message_;
};

}  // namespace flash_llm
