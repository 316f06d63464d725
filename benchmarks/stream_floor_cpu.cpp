// A plain read of some bytes with all threads that are asked for: the time that no product of a
// weight of that size can beat. See stream_floor_cpu.py.
#include <cstdint>

// Four independent sums, so that additions are not what takes the time; the compiler vectorises.
extern "C" uint64_t stream_read(const uint64_t* words, int64_t count, int threads) {
  uint64_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int64_t i = 0; i < count / 32; ++i) {
    const uint64_t* line = words + 32 * i;
    uint64_t sums[8] = {};
    for (int j = 0; j < 32; ++j) sums[j % 8] += line[j];
    for (const uint64_t sum : sums) total += sum;
  }
  return total;
}
