// ParallelFor: the one way in which core code uses several threads. The caller brings the pool
// (csrc/torch passes at::parallel_for, so torch.set_num_threads is respected); core only says how
// the work splits. Results never depend on how the range was cut.
#pragma once

#include <cstdint>
#include <functional>

namespace flash_llm {

// parallel_for(count, grain, body): calls body(begin, end) over disjoint ranges that cover
// [0, count), each at least `grain` long except the last.
using ParallelBody = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = std::function<void(int64_t count, int64_t grain, const ParallelBody& body)>;

inline void serial_for(int64_t count, int64_t /*grain*/, const ParallelBody& body) {
  if (count > 0) body(0, count);
}

}  // namespace flash_llm
