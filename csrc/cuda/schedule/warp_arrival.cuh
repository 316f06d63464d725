// Arrivals of whole warps at mbarriers.
#pragma once

#include <cstdint>

#include "cuda/ptx/sm80.cuh"

namespace flash_llm {

// How many arrivals a warp makes: that of lane 0, after a __syncwarp, which orders what all lanes
// did before it. compute-sanitizer's racecheck does not see that order and reports every refill of
// what a warp has read, so in a build for it each lane arrives.
#ifdef FLASH_LLM_RACECHECK
inline constexpr int kWarpArrivals = 32;
#else
inline constexpr int kWarpArrivals = 1;
#endif

// Arrives for the warp, whose lanes must all call it.
__device__ __forceinline__ void arrive_for_warp(uint32_t barrier, int lane) {
  __syncwarp();
  if (kWarpArrivals > 1 || lane == 0) ptx::mbarrier_arrive(barrier);
}

// Calls arrive(i) for each i < kBarriers, by another lane for each i, or by all lanes for all.
template <int kBarriers, typename Arrive>
__device__ __forceinline__ void arrive_for_warp_at_each(int lane, const Arrive& arrive) {
  static_assert(kBarriers <= 32, "a lane for each");
  __syncwarp();
#pragma unroll
  for (int i = 0; i < (kWarpArrivals == 1 ? 1 : kBarriers); ++i) {
    if (kWarpArrivals > 1 || lane < kBarriers) arrive(kWarpArrivals == 1 ? lane : i);
  }
}

}  // namespace flash_llm
