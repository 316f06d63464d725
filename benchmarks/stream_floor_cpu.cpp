// A plain read of some bytes with all threads that are asked for: the time that no product of a
// weight of that size can beat. See stream_floor_cpu.py.
#include <cstdint>

// Sums that are independent and are added up once per 64 KiB, so that additions are not what takes
// the time; the compiler vectorises.
extern "C" uint64_t stream_read(const uint64_t* words, int64_t count, int threads) {
  constexpr int64_t kSums = 32, kChunk = 8192;
  uint64_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int64_t i = 0; i < count / kChunk; ++i) {
    const uint64_t* chunk = words + kChunk * i;
    uint64_t sums[kSums] = {};
    for (int64_t j = 0; j < kChunk; j += kSums) {
      for (int64_t k = 0; k < kSums; ++k) sums[k] += chunk[j + k];
    }
    for (const uint64_t sum : sums) total += sum;
  }
  return total;
}
