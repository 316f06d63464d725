// ParallelFor: the only way in which host code below torch/ uses several threads. The caller
// provides it (csrc/torch/parallel_for.h runs on torch's threads and so respects
// torch.set_num_threads). Results never depend on how the range is divided.
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
