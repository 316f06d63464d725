// Sums of the bitmap kernel that are not yet results, because clusters share a row of blocks
// (stream_k.cuh). They wait in the workspace, in slots of float4[block_m / 16 strips][8-token
// blocks][32 lanes], in fragment order, for a second small kernel that adds them in a fixed order,
// so results are repeatable bit for bit. Up to 64 tokens all rows go that way, shared or not.
#pragma once

#include <cstdint>

#include "cuda/bitmap/smem.cuh"
#include "cuda/ptx/sm80.cuh"
#include "cuda/schedule/dependent_launch.cuh"

namespace flash_llm {

// The strip's part of a slot.
__device__ __forceinline__ float4* partial_strip(float4* partial, int slot, int strips, int strip,
                                                 int blocks_n) {
  return partial + (int64_t{slot} * strips + strip) * blocks_n * 32;
}

// The slot of what `cluster` leaves of a row, see bitmap_sums_bytes. Where it stores
// rows itself, it has two: one for a row that began before it, one for a row that begins in it.
template <bool kFinishesAll>
__device__ __forceinline__ int partial_slot(int cluster, int row, bool begins_row) {
  return kFinishesAll ? cluster + row : 2 * cluster + (begins_row ? 1 : 0);
}

#ifdef FLASH_LLM_SM90A

// Stores a warp's sums after multiply_row returned `flags`, when `columns` columns of chunks have
// been multiplied in all.
template <typename C>
__device__ __forceinline__ void store_sums(const BitmapParams& p, uint32_t flags, int columns,
                                           const float (&sums)[C::kStrips][C::kTileN / 2]) {
  // All else is found out anew: the main loop has no registers for it.
  const int thread = static_cast<int>(ptx::read_thread_idx()), warp = thread / 32;
  const int lane = thread % 32;
  const int rank = C::kCluster == 1 ? 0 : static_cast<int>(ptx::cluster_rank());
  const ColumnPosition first(p, p.schedule.first_unit(cluster_idx<C>()));
  const int row = first.row + (first.col + columns - 1) / p.chunk_cols;
  const bool begins_row = row > first.row || first.col == 0;
  const bool complete = begins_row && (flags & kColumnEndsRow) != 0;
  const int slot = partial_slot<C::kFinishesAll>(cluster_idx<C>(), row, begins_row);
#pragma unroll
  for (int s = 0; s < C::kStrips; ++s) {
    const int strip = rank * C::kStripsOfCta + warp * C::kStrips + s;
    if (!C::kFinishesAll && complete) {
      p.epilogue.store_rows<C::kType, C::kTileN>(
          int64_t{row / p.row_blocks} * C::kTileN + lane % 4 * 2,
          int64_t{row % p.row_blocks} * C::kBlockM + strip * kStripM + lane / 4, sums[s]);
    } else {
      float4* out =
          partial_strip(p.partial, slot, C::kCluster * C::kStripsOfCta, strip, C::kBlocksN) + lane;
#pragma unroll
      for (int b = 0; b < C::kBlocksN; ++b) {
        const float* sum = &sums[s][4 * b];
        out[b * 32] = make_float4(sum[0], sum[1], sum[2], sum[3]);
      }
    }
  }
}

#endif  // FLASH_LLM_SM90A

constexpr int kFinishWarps = 4;
constexpr int kFinishInFlight = 4;  // with more the first would not fit beside the main kernel

// Finishes each row of blocks: kParts warps per 16 rows and 8 tokens, CTAs with equal x per row. As
// many lanes share a sum, and take every kParts-th cluster: many clusters, which small weights
// have, would else be a chain of round trips to L2. Where the main kernel stores rows, only those
// that clusters share are left.
template <ValueType kType, bool kFinishesAll, int kParts>
__global__ void __launch_bounds__(kFinishWarps * 32)
    bitmap_finish_kernel(const __grid_constant__ BitmapParams p, int strips) {
  allow_next_kernel();
  int row = blockIdx.x;
  if constexpr (!kFinishesAll) {
    // Of the cuts or of all rows, whichever are fewer: the first cut within a row stands for it.
    if (gridDim.x < static_cast<unsigned>(p.schedule_rows)) {
      const int unit = p.schedule.first_unit(blockIdx.x + 1);
      row = unit / p.schedule.tile_cols;
      if (unit == row * p.schedule.tile_cols ||
          p.schedule.first_unit(blockIdx.x) > row * p.schedule.tile_cols) {
        return;
      }
    }
  }
  const int row_begin = row * p.schedule.tile_cols;
  const int first = p.schedule.cta_of(row_begin);
  const int last = p.schedule.cta_of(row_begin + p.schedule.tile_cols - 1);
  if (!kFinishesAll && first == last) return;

  constexpr int kPartLanes = 32 / kParts;
  const int warp = blockIdx.y * kFinishWarps + threadIdx.x / 32, strip = warp / kParts;
  const int part = threadIdx.x % 32 / kPartLanes;
  const int lane = warp % kParts * kPartLanes + threadIdx.x % kPartLanes;  // of the fragment
  const int block_n = blockIdx.z, blocks_n = gridDim.z;
  const auto sums_of = [&](int cluster) {
    const int slot = partial_slot<kFinishesAll>(cluster, row, cluster == first);
    return partial_strip(p.partial, slot, strips, strip, blocks_n) + block_n * 32 + lane;
  };
  wait_for_previous_kernel();  // the sums are complete

  float4 total = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
  for (int begin = first + part; begin <= last; begin += kFinishInFlight * kParts) {
    float4 sums[kFinishInFlight];
#pragma unroll
    for (int i = 0; i < kFinishInFlight; ++i) {
      const int cluster = begin + i * kParts;
      sums[i] = cluster <= last ? __ldcg(sums_of(cluster)) : make_float4(0.0F, 0.0F, 0.0F, 0.0F);
    }
#pragma unroll
    for (int i = 0; i < kFinishInFlight; ++i) {
      total.x += sums[i].x;
      total.y += sums[i].y;
      total.z += sums[i].z;
      total.w += sums[i].w;
    }
  }
#pragma unroll
  for (int step = kPartLanes; step < 32; step *= 2) {
    total.x += __shfl_xor_sync(~0U, total.x, step);
    total.y += __shfl_xor_sync(~0U, total.y, step);
    total.z += __shfl_xor_sync(~0U, total.z, step);
    total.w += __shfl_xor_sync(~0U, total.w, step);
  }
  if (part != 0) return;
  const int64_t row0 = (int64_t{row % p.row_blocks} * strips + strip) * kStripM + lane / 4;
  const int64_t token0 = (int64_t{row / p.row_blocks} * blocks_n + block_n) * 8 + lane % 4 * 2;
  p.epilogue.store_fragment<kType>(token0, row0, total);
}

}  // namespace flash_llm
