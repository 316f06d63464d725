// The tensor map through which the bitmap kernels for Hopper read X.
#pragma once

#include <cuda.h>

#include "base/status.h"
#include "plan/problem.h"

namespace flash_llm {

// A tensor map of X with boxes of 64 columns by `tokens` tokens in the 128-byte swizzle, zero
// outside the matrix.
Status map_x(const SpmmArgs& args, int tokens, CUtensorMap* map);

}  // namespace flash_llm
