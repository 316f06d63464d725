// The threads of torch for the kernels of the layers below.
#pragma once

#include <cstdint>

#include "base/parallel.h"

namespace flash_llm {

// at::parallel_for, or this thread alone for a while after regions that were delayed.
//
// A region ends when its last thread does. On a busy machine the system takes a thread from its
// core for 4 to 20 ms, so that with two threads and one more process on two cores each of a token's
// 210 small layers took 8 ms, packed or dense, which one thread computes in 0.03 to 0.5 ms (EPYC
// with AVX2, 2026-11-29). So when recent regions lost more time to delays than the other threads'
// work would have taken this thread, it computes what follows alone: for 16 times the delay where
// there is one other thread, and for less the more others there are, because it then does without
// them. A short delay now and then, as virtual machines have, changes nothing. No result depends on
// it.
void parallel_for(int64_t count, int64_t grain, const ParallelBody& body);

}  // namespace flash_llm
