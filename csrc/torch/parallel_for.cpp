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

// CPU time of this thread. It does not advance while the thread waits for a core.
std::chrono::nanoseconds thread_time() {
  timespec time = {};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
}

}  // namespace

void parallel_for(int64_t count, int64_t grain, const ParallelBody& body) {
  using Clock = std::chrono::steady_clock;
  using std::chrono::nanoseconds;
  constexpr nanoseconds kShortDelay = std::chrono::microseconds(500);  // time to wake up a thread
  constexpr nanoseconds kWindow = std::chrono::milliseconds(64);
  constexpr int64_t kAlone = 16;
  // Totals of recent regions, in nanoseconds. If threads overwrite each other's totals, no harm is
  // done.
  static std::atomic<int64_t> recent_work{0}, recent_delay{0};
  static std::atomic<Clock::rep> alone_until{std::numeric_limits<Clock::rep>::min()};

  const Clock::time_point start = Clock::now();
  const int64_t others = std::min<int64_t>(at::get_num_threads(), (count + grain - 1) / grain) - 1;
  if (others <= 0 || start.time_since_epoch().count() < alone_until.load()) {
    serial_for(count, grain, body);
    return;
  }
  const auto caller = std::this_thread::get_id();
  nanoseconds own_work{0};
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    if (std::this_thread::get_id() != caller) return body(begin, end);
    const nanoseconds before = thread_time();
    body(begin, end);
    own_work += thread_time() - before;
  });
  const Clock::time_point end = Clock::now();
  int64_t work = recent_work + own_work.count();
  int64_t delay = recent_delay + nanoseconds(end - start - own_work).count();
  if (delay > kShortDelay.count() && delay > others * work) {
    alone_until = (end + nanoseconds(delay * kAlone / others)).time_since_epoch().count();
    delay = 0;
  } else if (work + delay > kWindow.count()) {
    work /= 2;
    delay /= 2;
  }
  recent_work = work;
  recent_delay = delay;
}

}  // namespace flash_llm
