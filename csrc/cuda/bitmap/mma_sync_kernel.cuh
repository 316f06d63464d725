// The bitmap kernel for GPUs without wgmma. It needs mma.sync and mbarriers, which every GPU from
// sm_80 on has, and one of the kinds of copies in weight_copy.cuh. It has the structure of the
// kernel for Hopper (bitmap_sm90a.cu) with these differences:
//   * plain chunks are multiplied by mma.m16n8k16, 2:4 chunks by mma.sp.m16n8k32, for any number of
//     tokens, at most 64 in a pass
//   * X is copied by cp.async into the same swizzled stages, instead of through a tensor map
//   * no clusters, no setmaxnreg
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string>

#include "cuda/bitmap/finish.cuh"
#include "cuda/bitmap/mma_sync_config.cuh"
#include "cuda/bitmap/mma_sync_consumer.cuh"
#include "cuda/bitmap/producer.cuh"
#include "cuda/bitmap/smem.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/sm80.cuh"
#include "cuda/ptx/sm90.cuh"
#include "cuda/schedule/dependent_launch.cuh"
#include "cuda/schedule/stream_k.cuh"
#include "cuda/schedule/weight_copy.cuh"
#include "format/bitmap.h"
#include "plan/bitmap_mma_sync.h"

namespace flash_llm {

// One warp, which copies X stage by stage, once the previous kernel has written it. Columns and
// tokens outside the matrix become zeros. If the work range ends between the columns of a 2:4 pair,
// X of the second column is copied too.
template <typename C>
__device__ __forceinline__ void copy_x(const MmaSyncParams& p, const BitmapSmem<C>& smem,
                                       int lane) {
  // Lane 8 i + j copies the j-th 8 columns of a box of 64, of tokens i, i + 4 and so on.
  const int token = lane / 8, col = lane % 8 * 8;
  const uint32_t even = token * 128 + (lane % 8 ^ token) * 16;
  const uint32_t odd = even ^ 64;  // of tokens i + 4, i + 12 and so on
  wait_for_previous_kernel();
  ColumnPosition position(p, p.schedule.first_unit(cluster_idx<C>()));
  ColumnPosition end(p, p.schedule.first_unit(cluster_idx<C>() + 1));
  if (end.col % 2 != 0) end.advance(1, p.chunk_cols);
  PipelineState<C::kXStages> state;
#pragma unroll 1
  for (; position.before(end); position.advance(1, p.chunk_cols)) {
    const int token_block =
        p.output_tiles == p.row_blocks ? 0 : position.tile / p.row_blocks * C::kTileN;
    const int own_tokens = static_cast<int>(p.epilogue.n) - token_block - token;
    const uint16_t* own = p.x + (token_block + token) * p.x_stride + col;
#pragma unroll
    for (int k = 0; k < kChunkK; k += C::kXStageK) {
      ptx::mbarrier_wait(smem.x_empty(state.stage()), state.phase() ^ 1);
#pragma unroll
      for (int box = 0; box < C::kXBoxes; ++box) {
        const uint32_t x = smem.x(state.stage()) + box * C::kXBoxBytes;
        const int first_col = position.col * kChunkK + k + box * kXBoxK;
        const bool has_columns = first_col + col < p.k;
#pragma unroll
        for (int i = 0; i < C::kTileN / 4; ++i) {
          const bool valid = has_columns && 4 * i < own_tokens;
          ptx::copy_async16(x + (i % 2 == 0 ? even : odd) + i * 4 * 128,
                            valid ? own + first_col + 4 * i * p.x_stride : p.x, valid);
        }
      }
      ptx::mbarrier_arrive_after_copies(smem.x_full(state.stage()));
      state = state + 1;
    }
  }
  ptx::copy_async_wait_all();  // no copy may outlive the CTA, whose shared memory it writes
}

// How many arrivals complete a phase of barrier i.
template <typename C>
__device__ __forceinline__ int mma_sync_arrivals(int i) {
  using Smem = BitmapSmem<C>;
  if (i < C::kGroups * kBitmapGroupStages) return C::WeightCopy::kArrivals;
  const int x_full = static_cast<int>(Smem::kXBarriers);
  if (i >= x_full && i < x_full + C::kXStages) return 32;  // the lanes of copy_x
  // The warps that transpose X.
  if (i == static_cast<int>(Smem::kTransposedBarriers)) return C::kGroupWarps * kWarpArrivals;
  return Smem::arrivals(i);
}

// What a consumer warp does: multiplies the CTA's work range, output tile by output tile.
template <typename C>
__device__ __forceinline__ void multiply_by_mma_sync(const MmaSyncParams& p,
                                                     const BitmapSmem<C>& smem, int warp,
                                                     int lane) {
  MmaSyncConsumer<C> consumer(smem, warp, lane);
  for (;;) {
    const uint32_t flags = consumer.multiply_tile();
    // What the main loop has no registers to keep is computed again.
    const int thread = static_cast<int>(ptx::read_thread_idx());
    const int cta = static_cast<int>(ptx::opaque(blockIdx.x));
    const ColumnPosition first(p, p.schedule.first_unit(cta));
    const int tile = first.tile + (first.col + consumer.columns() - 1) / p.chunk_cols;
    const int slot = partial_slot<true>(cta, tile, false);
#pragma unroll
    for (int s = 0; s < C::kStrips; ++s) {
      const int strip = thread / 32 * C::kStrips + s;
      float4* out = partial_strip(p.partial, slot, C::kStripsOfCta, strip, C::kBlocksN);
#pragma unroll
      for (int b = 0; b < C::kBlocksN; ++b) {
        const float* sum = &consumer.sums[s][4 * b];
        out[b * 32 + thread % 32] = make_float4(sum[0], sum[1], sum[2], sum[3]);
      }
    }
    if ((flags & kColumnIsLast) != 0) return;
    consumer.begin_sums();
  }
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
    bitmap_mma_sync_kernel(const __grid_constant__ MmaSyncParams p) {
  if constexpr (kHasSm90 || !C::WeightCopy::kNeedsSm90) {
    extern __shared__ uint8_t smem_bytes[];
    const uint32_t base = (ptx::smem_address(smem_bytes) + 1023) / 1024 * 1024;
    const BitmapSmem<C> smem = {ptx::opaque(base), 0};
    const int warp = __shfl_sync(~0U, static_cast<int>(threadIdx.x) / 32, 0);
    const int lane = threadIdx.x % 32;
    allow_next_kernel();
    int ring =
        warp - C::kWarps;  // index of a producer warp, and of its ring; negative in consumers
    ChunkProducer<C, typename C::WeightCopy> producer(p, smem, ring, lane);
    if (ring >= 0 && ring < C::kRings) producer.begin();
    for (uint32_t i = threadIdx.x; i < kTwoFourFixedBytes / 16; i += C::kThreads) {
      ptx::store_shared_zero16(smem.empty_chunk() + i * 16);
    }
    if (lane == 0) {
      for (int i = warp; i < static_cast<int>(BitmapSmem<C>::kBarrierCount); i += C::kAllWarps) {
        ptx::mbarrier_init(smem.barrier(i), mma_sync_arrivals<C>(i));
      }
      C::WeightCopy::fence_barriers();
    }
    __syncthreads();
    // Opaque: otherwise the compiler branches on the role earlier and duplicates the barrier above.
    ring = static_cast<int>(ptx::opaque(ring));
    if (ring < 0) {
      multiply_by_mma_sync(p, smem, warp, lane);
    } else if (ring < C::kRings) {
      producer.run();
    } else {
      copy_x(p, smem, lane);
    }
  }
}

template <typename C>
Status launch_mma_sync(const MmaSyncParams& params, int smem_bytes, bool prefetch,
                       cudaStream_t stream) {
  const Status sized = allow_smem("cudaFuncSetAttribute(bitmap_mma_sync_kernel)",
                                  bitmap_mma_sync_kernel<C>, smem_bytes);
  if (!sized.ok()) return sized;
  bool dependent = C::WeightCopy::kNeedsSm90;
  if (!dependent) {
    const Status described = waits_for_previous_kernel(
        "cudaFuncGetAttributes(bitmap_mma_sync_kernel)", bitmap_mma_sync_kernel<C>, &dependent);
    if (!described.ok()) return described;
  }
  const Status multiplied =
      launch_kernel("bitmap_mma_sync_kernel launch", bitmap_mma_sync_kernel<C>,
                    static_cast<unsigned>(params.schedule.workers), C::kThreads, smem_bytes,
                    dependent && prefetch, stream, params);
  if (!multiplied.ok()) return multiplied;
  return launch_finish<C>(params, dependent, stream);
}

template <typename Family, ValueType kType, size_t kIndex = 0>
Status launch_mma_sync_config(int config, const MmaSyncParams& params, int smem_bytes,
                              bool prefetch, cudaStream_t stream) {
  if constexpr (kIndex < std::size(Family::kConfigs)) {
    if (config == static_cast<int>(kIndex)) {
      return launch_mma_sync<MmaSyncConfig<Family, kType, kIndex>>(params, smem_bytes, prefetch,
                                                                   stream);
    }
    return launch_mma_sync_config<Family, kType, kIndex + 1>(config, params, smem_bytes, prefetch,
                                                             stream);
  }
  return Status::invalid_value("no bitmap configuration has index " + std::to_string(config));
}

// Runs a plan of a family.
template <typename Family>
Status spmm_mma_sync(const SpmmPlan& plan, const SpmmArgs& args, void* workspace, bool prefetch,
                     cudaStream_t stream) {
  if (plan.config < 0 || plan.config >= static_cast<int>(std::size(Family::kConfigs))) {
    return Status::invalid_value("no bitmap configuration has index " +
                                 std::to_string(plan.config));
  }
  const MmaSyncPlanConfig& config = Family::kConfigs[plan.config];
  if (Status fits = check_plan(plan, Family::kFamily, args); !fits.ok()) return fits;
  if (plan.ctas != plan.work.workers || plan.ring_bytes < mma_sync_min_ring_bytes(config)) {
    return Status::invalid_value("plan " + plan.to_string() + " does not fit its configuration");
  }
  const int64_t sums_bytes = mma_sync_sums_bytes(config, plan.work);
  if (Status fits = cuda::check_launch(plan, sums_bytes); !fits.ok()) return fits;
  MmaSyncParams params = {{plan, args, workspace, config.block_m(), config.rings}};
  params.x = args.x;
  params.x_stride = args.x_stride;
  params.k = static_cast<int>(args.weight.k);
  const int smem_bytes = mma_sync_smem_bytes(config, plan.ring_bytes);
  switch (args.weight.value_type) {
    case ValueType::kFloat16:
      return launch_mma_sync_config<Family, ValueType::kFloat16>(plan.config, params, smem_bytes,
                                                                 prefetch, stream);
    case ValueType::kBfloat16:
      return launch_mma_sync_config<Family, ValueType::kBfloat16>(plan.config, params, smem_bytes,
                                                                  prefetch, stream);
    case ValueType::kInt8Float16:
    case ValueType::kInt8Bfloat16:
    case ValueType::kFp8Float16:
    case ValueType::kFp8Bfloat16:
    case ValueType::kInt4Float16:
    case ValueType::kInt4Bfloat16:
      break;
  }
  return Status::invalid_type("the bitmap kernel has no code for this value type");
}

}  // namespace flash_llm
