#include "torch/parallel_for.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>
#include <thread>

namespace flash_llm {

void parallel_for(int64_t count, int64_t grain, const ParallelBody& body) {
  using Clock = std::chrono::steady_clock;
  constexpr Clock::duration kShortWait = std::chrono::microseconds(500);  // to wake a thread up
  constexpr int64_t kAlone = 16;
  static std::atomic<Clock::rep> alone_until{std::numeric_limits<Clock::rep>::min()};

  const Clock::time_point start = Clock::now();
  const int64_t others = std::min<int64_t>(at::get_num_threads(), (count + grain - 1) / grain) - 1;
  if (others <= 0 || start.time_since_epoch().count() < alone_until.load()) {
    serial_for(count, grain, body);
    return;
  }
  const auto caller = std::this_thread::get_id();
  Clock::time_point own_end = start;
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    body(begin, end);
    if (std::this_thread::get_id() == caller) own_end = Clock::now();
  });
  const Clock::time_point end = Clock::now();
  const Clock::duration waited = end - own_end;
  if (waited > kShortWait && waited > others * (own_end - start)) {
    alone_until = (end + waited * kAlone / others).time_since_epoch().count();
  }
}

}  // namespace flash_llm
