// How a producer warp copies chunks from global memory into a ring in shared memory. Each
// struct has
//   kArrivals         arrivals on the full barrier that a copy makes
//   kNeedsSm90        whether it has instructions that exist from sm_90 on
//   fence_barriers()  makes barriers that this thread has initialised visible to the copies
//   kCopiesGroups     whether a copy may be of several groups of chunks
//   kOneLane          whether lane 0 makes the copy
//   copy<kGroups>()   starts a copy for so many groups; all lanes must call it
#pragma once

#include <cstdint>

#include "cuda/ptx/sm80.cuh"
#include "cuda/ptx/sm90.cuh"
#include "cuda/schedule/warp_arrival.cuh"

namespace flash_llm {

// Adjacent chunks in global memory, which may wrap around at the end of the ring.
struct RingCopy {
  const uint32_t* source;
  uint32_t to, bytes;                  // the bytes before the wrap
  uint32_t wrapped_to, wrapped_bytes;  // those after it
  uint32_t full;                       // the full barrier of the first group for which it is made
  uint32_t group_bytes = 0;            // from it to the full barrier of the next group
};

// By bulk copies, which one lane issues and which complete on the barrier themselves.
struct BulkCopy {
  static constexpr int kArrivals = kWarpArrivals;
  static constexpr bool kNeedsSm90 = true;
  static constexpr bool kCopiesGroups = false;
  static constexpr bool kOneLane = true;

  __device__ __forceinline__ static void fence_barriers() { ptx::mbarrier_init_fence(); }

  template <int kGroups>
  __device__ __forceinline__ static void copy(const RingCopy& c, int lane) {
    if (lane != 0) {
      if constexpr (kWarpArrivals > 1) ptx::mbarrier_arrive(c.full);
      return;
    }
    ptx::mbarrier_arrive_expect_tx(c.full, c.bytes + c.wrapped_bytes);
    if (c.bytes > 0) ptx::bulk_copy_streaming(c.to, c.source, c.bytes, c.full);
    if (c.wrapped_bytes > 0) {
      ptx::bulk_copy_streaming(c.wrapped_to, c.source + c.bytes / 4, c.wrapped_bytes, c.full);
    }
  }
};

// By cp.async of 16 bytes a lane. Each lane arrives when its copies are complete; an arrival of the
// warp makes what it wrote to shared memory before the copy visible.
struct AsyncCopy {
  static constexpr int kArrivals = 32 + kWarpArrivals;
  static constexpr bool kNeedsSm90 = false;
  static constexpr bool kCopiesGroups = true;
  static constexpr bool kOneLane = false;

  __device__ __forceinline__ static void fence_barriers() {}  // __syncthreads suffices

  template <int kGroups>
  __device__ __forceinline__ static void copy(const RingCopy& c, int lane) {
    copy_part(c.to, c.source, static_cast<int>(c.bytes), lane);
    if (c.wrapped_bytes > 0) {
      copy_part(c.wrapped_to, c.source + c.bytes / 4, static_cast<int>(c.wrapped_bytes), lane);
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const uint32_t full = c.full + group * c.group_bytes;
      ptx::mbarrier_arrive_after_copies(full);
      arrive_for_warp(full, lane);
    }
  }

 private:
  static constexpr int kWarpBytes = 32 * 16;
  static constexpr int kUnroll = 8;
  static constexpr int kMiddle = kUnroll * kWarpBytes / 2;

  // The consumer warps leave a producer warp few issue slots, so the loop has few instructions.
  // `source` points to the middle of the bytes that an iteration copies.
  __device__ __forceinline__ static void copy_part(uint32_t to, const uint32_t* source, int bytes,
                                                   int lane) {
    to += lane * 16;
    source += (lane * 16 + kMiddle) / 4;
    bytes -= lane * 16;  // of those from `to` on, or fewer
#pragma unroll 1
    while (bytes + lane * 16 >= kUnroll * kWarpBytes) {
      copy_unrolled<0, false>(to, source, bytes);
      to += kUnroll * kWarpBytes;
      source += kUnroll * kWarpBytes / 4;
      bytes -= kUnroll * kWarpBytes;
    }
    copy_unrolled<0, true>(to, source, bytes);
  }

  template <int kCopy, bool kChecked>
  __device__ __forceinline__ static void copy_unrolled(uint32_t to, const uint32_t* source,
                                                       int bytes) {
    if constexpr (kCopy < kUnroll) {
      if (!kChecked || bytes > kCopy * kWarpBytes) {
        ptx::copy_async16_streaming<kCopy * kWarpBytes, kCopy * kWarpBytes - kMiddle>(to, source);
      }
      copy_unrolled<kCopy + 1, kChecked>(to, source, bytes);
    }
  }
};

}  // namespace flash_llm
