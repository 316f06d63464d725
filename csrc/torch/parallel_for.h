// ParallelFor (base/parallel.h) on torch's threads.
#pragma once

#include <cstdint>

#include "base/parallel.h"

namespace flash_llm {

// Runs at::parallel_for or, for a while after regions that were delayed, only the calling thread.
//
// A region ends when its last thread does. On a busy machine the system takes a thread from its
// core for 4 to 20 ms. So with two threads, and one other process on the two cores, each of the 210
// small layers that a token passes took 8 ms, packed or dense, although one thread computes it in
// 0.03 to 0.5 ms (EPYC with AVX2, 2026-11-29). Therefore, when recent regions lost more time to
// delays than the calling thread would need for the other threads' work, it computes the next
// regions alone: for 16 times the delay if there is one other thread, and for less with more
// threads, since running alone then costs more. Occasional short delays, as on virtual machines,
// change nothing. No result depends on this choice.
void parallel_for(int64_t count, int64_t grain, const ParallelBody& body);

}  // namespace flash_llm
