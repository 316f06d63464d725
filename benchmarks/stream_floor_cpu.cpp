// The floor: a plain read of a buffer with a given number of threads. No product that must read
// these bytes from memory can be faster. stream_floor_cpu.py compiles and calls it.
#include <cstdint>

// Each thread reads a part of its own into independent sums, so that the compiler vectorises and the
// additions do not limit the speed.
extern "C" uint64_t stream_read(const uint64_t* words, int64_t count, int threads) {
  constexpr int64_t kSums = 32;
  const int64_t steps = count / kSums;
  uint64_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int64_t thread = 0; thread < threads; ++thread) {
    uint64_t sums[kSums] = {};
    const int64_t end = steps * (thread + 1) / threads;
    for (int64_t step = steps * thread / threads; step < end; ++step) {
      for (int64_t i = 0; i < kSums; ++i) sums[i] += words[step * kSums + i];
    }
    for (const uint64_t sum : sums) total += sum;
  }
  return total;
}
