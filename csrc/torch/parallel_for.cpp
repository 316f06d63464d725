#include "torch/parallel_for.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <ctime>
#include <limits>
#include <thread>

namespace flash_llm {

namespace {

// CPU time of this thread, which waiting for a core does not take.
std::chrono::nanoseconds thread_time() {
  timespec time = {};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
}

}  // namespace

void parallel_for(int64_t count, int64_t grain, const ParallelBody& body) {
  using Clock = std::chrono::steady_clock;
  constexpr Clock::duration kShortDelay = std::chrono::microseconds(500);  // to wake a thread up
  constexpr int64_t kAlone = 16;
  static std::atomic<Clock::rep> alone_until{std::numeric_limits<Clock::rep>::min()};

  const Clock::time_point start = Clock::now();
  const int64_t others = std::min<int64_t>(at::get_num_threads(), (count + grain - 1) / grain) - 1;
  if (others <= 0 || start.time_since_epoch().count() < alone_until.load()) {
    serial_for(count, grain, body);
    return;
  }
  const auto caller = std::this_thread::get_id();
  std::chrono::nanoseconds own_work{0};
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    if (std::this_thread::get_id() != caller) return body(begin, end);
    const auto before = thread_time();
    body(begin, end);
    own_work += thread_time() - before;
  });
  const Clock::time_point end = Clock::now();
  const Clock::duration delay = end - start - own_work;
  if (delay > kShortDelay && delay > others * own_work) {
    alone_until = (end + delay * kAlone / others).time_since_epoch().count();
  }
}

}  // namespace flash_llm
