// How a producer warp copies chunks from global memory into a ring in shared memory. Each
// struct has
//   kArrivals         arrivals on the full barrier that a copy makes
//   kNeedsSm90        whether it has instructions that exist from sm_90 on
//   fence_barriers()  makes barriers that this thread has initialised visible to the copies
//   copy()            starts a copy; all lanes must call it
#pragma once

#include <cstdint>

#include "cuda/ptx/sm80.cuh"
#include "cuda/ptx/sm90.cuh"

namespace flash_llm {

// Whether the code is compiled for sm_90 or newer.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
inline constexpr bool kHasSm90 = true;
#else
inline constexpr bool kHasSm90 = false;
#endif

// Adjacent chunks in global memory, which may wrap around at the end of the ring.
struct RingCopy {
  const uint32_t* source;
  uint32_t to, bytes;                  // the bytes before the wrap
  uint32_t wrapped_to, wrapped_bytes;  // those after it
  uint32_t full;                       // the barrier on which the copy arrives
};

// By bulk copies, which one lane issues and which complete on the barrier themselves.
struct BulkCopy {
  static constexpr int kArrivals = 1;
  static constexpr bool kNeedsSm90 = true;

  __device__ __forceinline__ static void fence_barriers() { ptx::mbarrier_init_fence(); }

  __device__ __forceinline__ static void copy(const RingCopy& c, int lane) {
    if (lane != 0) return;
    ptx::mbarrier_arrive_expect_tx(c.full, c.bytes + c.wrapped_bytes);
    if (c.bytes > 0) ptx::bulk_copy_streaming(c.to, c.source, c.bytes, c.full);
    if (c.wrapped_bytes > 0) {
      ptx::bulk_copy_streaming(c.wrapped_to, c.source + c.bytes / 4, c.wrapped_bytes, c.full);
    }
  }
};

// By cp.async of 16 bytes a lane. Each lane arrives when its copies are complete; one more arrival
// makes what the warp wrote to shared memory before the copy visible.
struct AsyncCopy {
  static constexpr int kArrivals = 33;
  static constexpr bool kNeedsSm90 = false;

  __device__ __forceinline__ static void fence_barriers() {}  // __syncthreads suffices

  __device__ __forceinline__ static void copy(const RingCopy& c, int lane) {
    copy_part(c.to, c.source, static_cast<int>(c.bytes), lane);
    if (c.wrapped_bytes > 0) {
      copy_part(c.wrapped_to, c.source + c.bytes / 4, static_cast<int>(c.wrapped_bytes), lane);
    }
    ptx::mbarrier_arrive_after_copies(c.full);
    if (lane == 0) ptx::mbarrier_arrive(c.full);
  }

 private:
  static constexpr int kWarpBytes = 32 * 16;
  static constexpr int kUnroll = 8;

  // The consumer warps leave a producer warp few issue slots, so the loop has few instructions.
  __device__ __forceinline__ static void copy_part(uint32_t to, const uint32_t* source, int bytes,
                                                   int lane) {
    to += lane * 16;
    source += lane * 4;
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
        ptx::copy_async16_streaming<kCopy * kWarpBytes>(to, source);
      }
      copy_unrolled<kCopy + 1, kChecked>(to, source, bytes);
    }
  }
};

}  // namespace flash_llm
