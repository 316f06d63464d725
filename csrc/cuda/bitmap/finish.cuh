// The partial sums of the bitmap kernel, and the finishing kernel that turns them into results. If
// several clusters share an output tile (stream_k.cuh), each stores its sums in the workspace, in a
// slot float4[block_m / 16 strips][8-token blocks][32 lanes] in fragment order. They are added in a
// fixed order, so that results are repeatable bit for bit: by the finishing kernel or, where a tile
// has few clusters, by the cluster that has its first column. Up to 64 tokens the finishing kernel
// does this for all output tiles, shared or not.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/bitmap/smem.cuh"
#include "cuda/ptx/sm80.cuh"
#include "cuda/schedule/dependent_launch.cuh"

namespace flash_llm {

// Where a strip's sums are in slot `slot`.
__device__ __forceinline__ float4* partial_strip(float4* partial, int slot, int strips, int strip,
                                                 int blocks_n) {
  return partial + (int64_t{slot} * strips + strip) * blocks_n * 32;
}

// The slot of `cluster`'s partial sums of an output tile, see bitmap_sums_bytes. A cluster that
// stores complete tiles itself has two slots: one for the tile that its work range begins in the
// middle of, one for the tile that it begins but does not complete.
template <bool kFinishesAll>
__device__ __forceinline__ int partial_slot(int cluster, int tile, bool begins_tile) {
  return kFinishesAll ? cluster + tile : 2 * cluster + (begins_tile ? 1 : 0);
}

#ifdef FLASH_LLM_SM90A

// Where a consumer warp is after `columns` columns of its work range: the output tile that they end
// in, and the warp's first strip in it. The main loop has no registers to keep this in, so it is
// computed whenever it is needed.
template <typename C>
struct TilePosition {
  int lane, warp, rank, cluster, tile;
  bool begins_tile;  // whether the cluster has the tile's first column

  __device__ __forceinline__ TilePosition(const BitmapParams& p, int columns) {
    const int thread = static_cast<int>(ptx::read_thread_idx());
    lane = thread % 32;
    warp = thread / 32;
    rank = C::kCluster == 1 ? 0 : static_cast<int>(ptx::cluster_rank());
    cluster = cluster_idx<C>();
    const ColumnPosition first(p, p.schedule.first_unit(cluster));
    tile = first.tile + (first.col + columns - 1) / p.chunk_cols;
    begins_tile = tile > first.tile || first.col == 0;
  }

  __device__ __forceinline__ int strip() const {
    return rank * C::kStripsOfCta + warp * C::kStrips;
  }
  // A strip's partial sums in `slot`, of which this lane has every 32nd float4.
  __device__ __forceinline__ float4* partial(const BitmapParams& p, int slot, int strip) const {
    return partial_strip(p.partial, slot, C::kCluster * C::kStripsOfCta, strip, C::kBlocksN) + lane;
  }
  // The word that says whether the partial sums of this warp in cluster `of` are stored.
  __device__ __forceinline__ uint32_t* stored(const BitmapParams& p, int of) const {
    return p.stored + (of * C::kCluster + rank) * C::kWarps + warp;
  }
};

// Adds the partial sums of all other clusters that share an output tile to those of the cluster
// with its first column. That cluster comes to the tile last, and the others come to it first, so
// that this seldom waits.
template <typename C>
__device__ __forceinline__ void add_shared_sums(const BitmapParams& p, int columns,
                                                float (&sums)[C::kStrips][C::kTileN / 2]) {
  constexpr int kStripSums = C::kBlocksN * 32;
  constexpr int kSlotSums = C::kCluster * C::kStripsOfCta * kStripSums;
  const TilePosition<C> at(p, columns);
  const int last = p.schedule.worker_of((at.tile + 1) * p.schedule.units_per_row - 1);
  const uint32_t* stored = at.stored(p, at.cluster + 1);
  const float4* in =
      at.partial(p, partial_slot<C::kFinishesAll>(at.cluster + 1, at.tile, false), at.strip());
#pragma unroll 1
  for (int others = last - at.cluster; others > 0; --others) {
    if (at.lane == 0) {
      while (ptx::load_acquire(stored) == 0) {
      }
    }
    __syncwarp();
#pragma unroll
    for (int s = 0; s < C::kStrips; ++s) {
#pragma unroll
      for (int b = 0; b < C::kBlocksN; ++b) {
        const float4 more = __ldcg(in + s * kStripSums + b * 32);
        float* sum = &sums[s][4 * b];
        sum[0] += more.x;
        sum[1] += more.y;
        sum[2] += more.z;
        sum[3] += more.w;
      }
    }
    stored += C::kCluster * C::kWarps;
    in += 2 * kSlotSums;
  }
}

// Stores a warp's sums of an output tile, to Y or to the workspace. `flags` are those that
// multiply_tile returned; `columns` columns of chunks were multiplied so far in the whole work
// range.
template <typename C>
__device__ __forceinline__ void finish_tile(const BitmapParams& p, uint32_t flags, int columns,
                                            float (&sums)[C::kStrips][C::kTileN / 2]) {
  const bool adds = p.stored != nullptr;
  if constexpr (!C::kFinishesAll) {
    // Opaque, so that nothing that is computed in here is kept for what follows.
    if (adds && (ptx::opaque(flags) & kColumnEndsTile) == 0 &&
        TilePosition<C>(p, columns).begins_tile) {
      add_shared_sums<C>(p, static_cast<int>(ptx::opaque(columns)), sums);
    }
  }
  const TilePosition<C> at(p, columns);
  const bool complete =
      !C::kFinishesAll && at.begins_tile && (adds || (flags & kColumnEndsTile) != 0);
  const int slot = partial_slot<C::kFinishesAll>(at.cluster, at.tile, at.begins_tile);
#pragma unroll
  for (int s = 0; s < C::kStrips; ++s) {
    const int strip = at.strip() + s;
    if (complete) {
      p.epilogue.store_rows<C::kType, C::kTileN>(
          int64_t{at.tile / p.row_blocks} * C::kTileN + at.lane % 4 * 2,
          int64_t{at.tile % p.row_blocks} * C::kBlockM + strip * kStripM + at.lane / 4, sums[s]);
    } else {
      float4* out = at.partial(p, slot, strip);
#pragma unroll
      for (int b = 0; b < C::kBlocksN; ++b) {
        const float* sum = &sums[s][4 * b];
        out[b * 32] = make_float4(sum[0], sum[1], sum[2], sum[3]);
      }
    }
  }
  if (!C::kFinishesAll && !complete && adds) {
    __syncwarp();
    if (at.lane == 0) ptx::store_release(at.stored(p, at.cluster), 1);
  }
}

#endif  // FLASH_LLM_SM90A

// Clears BitmapParams::stored before the main kernel, which may start while this kernel runs, but
// uses the words only after it has waited for this kernel. One warp, which fits beside the main
// kernel of the previous call.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    bitmap_clear_kernel(const __grid_constant__ BitmapParams p, int words) {
  allow_next_kernel();
  wait_for_previous_kernel();
  for (int i = static_cast<int>(threadIdx.x); i < words; i += kThreads) p.stored[i] = 0;
}

template <typename C>
Status launch_clear(const BitmapParams& params, bool dependent, cudaStream_t stream) {
  constexpr int kThreads = 32;
  return launch_kernel("bitmap_clear_kernel launch", bitmap_clear_kernel<kThreads>, 1, kThreads, 0,
                       dependent, stream, params,
                       params.schedule.workers * C::kCluster * C::kWarps);
}

constexpr int kFinishWarps = 4;
// Loads in flight per lane. With more, the kernel would need more than 32 registers, and the main
// kernel leaves at most 4096 of an SM's 64K: no CTA could be resident before the main kernel ends.
constexpr int kFinishInFlight = 4;

// Finishes the output tiles; CTAs with equal blockIdx.x work on one tile. kParts warps work on 16
// rows and 8 tokens: kParts lanes share a sum, and each adds the partial sums of every kParts-th
// cluster. With one part, the many clusters that share a tile of a small weight would be a chain of
// round trips to L2. If the main kernel stores complete tiles, only shared ones remain.
template <ValueType kType, bool kFinishesAll, int kParts>
__global__ void __launch_bounds__(kFinishWarps * 32)
    bitmap_finish_kernel(const __grid_constant__ BitmapParams p, int strips) {
  allow_next_kernel();
  int tile = blockIdx.x;
  if constexpr (!kFinishesAll) {
    // blockIdx.x counts tiles or boundaries between work ranges, whichever are fewer. Of the
    // boundaries within a tile only the first does the work.
    if (gridDim.x < static_cast<unsigned>(p.output_tiles)) {
      const int unit = p.schedule.first_unit(blockIdx.x + 1);
      tile = unit / p.schedule.units_per_row;
      if (unit == tile * p.schedule.units_per_row ||
          p.schedule.first_unit(blockIdx.x) > tile * p.schedule.units_per_row) {
        return;
      }
    }
  }
  const int tile_begin = tile * p.schedule.units_per_row;
  const int first = p.schedule.worker_of(tile_begin);
  const int last = p.schedule.worker_of(tile_begin + p.schedule.units_per_row - 1);
  if (!kFinishesAll && first == last) return;

  constexpr int kPartLanes = 32 / kParts;
  const int warp = blockIdx.y * kFinishWarps + threadIdx.x / 32, strip = warp / kParts;
  const int part = threadIdx.x % 32 / kPartLanes;
  // The lane of the main kernel's fragment whose sums this lane adds.
  const int lane = warp % kParts * kPartLanes + threadIdx.x % kPartLanes;
  const int block_n = blockIdx.z, blocks_n = gridDim.z;
  const auto sums_of = [&](int cluster) {
    const int slot = partial_slot<kFinishesAll>(cluster, tile, cluster == first);
    return partial_strip(p.partial, slot, strips, strip, blocks_n) + block_n * 32 + lane;
  };
  wait_for_previous_kernel();  // the main kernel, which writes the partial sums

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
  const int64_t row0 = (int64_t{tile % p.row_blocks} * strips + strip) * kStripM + lane / 4;
  const int64_t token0 = (int64_t{tile / p.row_blocks} * blocks_n + block_n) * 8 + lane % 4 * 2;
  p.epilogue.store_fragment<kType>(token0, row0, total);
}

template <typename C, int kParts>
Status launch_finish(const BitmapParams& params, dim3 grid, bool dependent, cudaStream_t stream) {
  grid.y *= kParts;
  return launch_kernel(
      "bitmap_finish_kernel launch", bitmap_finish_kernel<C::kType, C::kFinishesAll, kParts>, grid,
      kFinishWarps * 32, 0, dependent, stream, params, C::kCluster * C::kStripsOfCta);
}

template <typename C>
Status launch_finish(const BitmapParams& params, bool dependent, cudaStream_t stream) {
  constexpr unsigned kStripsOfBlock = C::kCluster * C::kStripsOfCta;
  static_assert(kStripsOfBlock % kFinishWarps == 0,
                "each warp of the finishing kernel adds one strip");
  const int clusters = params.schedule.workers;
  const int rows =
      C::kFinishesAll ? params.output_tiles : std::min(params.output_tiles, clusters - 1);
  const dim3 grid(static_cast<unsigned>(rows), kStripsOfBlock / kFinishWarps, C::kBlocksN);
  if constexpr (C::kFinishesAll) {
    static_assert(C::kCluster == 1, "there is one cluster per SM only if a cluster is one CTA");
    const int finish_ctas = static_cast<int>(grid.x * grid.y * grid.z);
    const int round = kFinishInFlight * rows;  // sums that one part loads at a time
    if constexpr (kStripsOfBlock * kStripM > 256) {
      // Several parts pay only where an output tile has sums of more than 8 clusters to add.
      // Measured on an H100 with one, two and four parts, in us: 4096x4096, N = 8: 13.4, 11.9 and
      // 13.3; N = 32: 18.1, 17.1 and 16.5; 7168x7168, N = 8: 16.1, 18.8 and 17.7. So two parts are
      // faster if even then one CTA per SM suffices, and four if one part alone takes more than
      // that.
      if (clusters > 2 * round) {
        if (finish_ctas * 2 <= clusters) {
          return launch_finish<C, 2>(params, grid, dependent, stream);
        }
        if (finish_ctas > clusters) return launch_finish<C, 4>(params, grid, dependent, stream);
      }
    } else {
      // Lower tiles are shared by fewer clusters, and there are more of them. On an H200, 50 %, in
      // us (2026-11-30), where a tile has sums of
      //   8.3 clusters (4096x14336)  N = 32: 24.1 with four parts, 25.7 with two
      //                              N = 64: 28.9 with four parts, 28.4 with two
      //   5.5 clusters (6144x4096)   N = 32: 15.5 with two, 17.1 with one; N = 64: 18.0 and 18.5
      //   2.4 clusters (14336x4096)  N = 32: 26.7 with two, 24.0 with one; N = 64: 32.3 and 29.0
      if (clusters > 2 * round && finish_ctas <= 2 * clusters) {
        return launch_finish<C, 4>(params, grid, dependent, stream);
      }
      if (clusters > round) return launch_finish<C, 2>(params, grid, dependent, stream);
    }
  }
  return launch_finish<C, 1>(params, grid, dependent, stream);
}

}  // namespace flash_llm
