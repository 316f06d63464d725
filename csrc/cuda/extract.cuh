// Extraction, the "load as sparse" half of the kernel (Flash-LLM section 4.3.2): entries of a tile
// travel from global memory into registers, and from there into a dense tile in shared memory.
//
// The warps that share a tile read its vectors round robin, 32 vectors (512 bytes) a warp at a
// time. Each thread holds kBatch vectors; as soon as one has been scattered, its register is
// refilled with a vector of the next batch. So kBatch loads per thread are always in flight, across
// tile boundaries too: tiles that follow each other in K follow each other in memory. A batch is no
// limit on a tile: one that holds more entries simply takes more batches.
#pragma once

#include <cstdint>

#include "core/tiled_csl.h"
#include "cuda/ptx_sm80.cuh"

namespace flash_llm {

// Stores one vector's four values at their places. Places are masked into the tile, so that not
// even a malformed entry can write elsewhere.
__device__ __forceinline__ void scatter_vector(const uint4& vector, bool active,
                                               uint32_t smem_tile) {
  const uint32_t entries[kVectorEntries] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < kVectorEntries; ++i) {
    const uint32_t byte_offset = (entries[i] >> 15) & ((kTileElems - 1) * 2);
    ptx::store_shared_u16_if(active, smem_tile + byte_offset, entries[i]);
  }
}

template <int kWarpsPerTile, int kBatch>
class EntryStream {
 public:
  static constexpr int kStride = kWarpsPerTile * 32;

  // A stream of `num_tiles` consecutive tiles; starts loading the first.
  __device__ __forceinline__ EntryStream(const int32_t* offsets, const uint32_t* entries,
                                         int num_vectors, int first_tile, int num_tiles,
                                         int thread_in_group)
      : offsets_(offsets + first_tile),
        vectors_(reinterpret_cast<const uint4*>(entries) + thread_in_group),
        num_vectors_(num_vectors),
        thread_(thread_in_group),
        tiles_left_(num_tiles) {
    base_ = load_offset(0);
    end_ = load_offset(1);
    next_end_ = load_offset(2);
#pragma unroll
    for (int j = 0; j < kBatch; ++j) refill(j, base_, end_);
  }

  __device__ __forceinline__ int tiles_left() const { return tiles_left_; }

  // Scatters the current tile into shared memory and begins to load the next one.
  __device__ __forceinline__ void extract(uint32_t smem_tile) {
    const int after_next_end = load_offset(3);
    bool last_batch;
    do {
      int next_base = base_ + kBatch * kStride;
      int next_batch_end = end_;
      last_batch = next_base >= end_;
      if (last_batch) {
        next_base = end_;
        next_batch_end = next_end_;
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        scatter_vector(vector_[j], base_ + j * kStride + thread_ < end_, smem_tile);
        refill(j, next_base, next_batch_end);
      }
      base_ = next_base;
    } while (!last_batch);
    end_ = next_end_;
    next_end_ = after_next_end;
    ++offsets_;
    --tiles_left_;
  }

 private:
  // offsets[tile + i], clamped into the buffer and to the stream's last tile.
  __device__ __forceinline__ int load_offset(int i) const {
    const int offset = __ldg(offsets_ + min(i, tiles_left_));
    return max(0, min(offset, num_vectors_));
  }

  __device__ __forceinline__ void refill(int j, int base, int end) {
    const int idx = base + j * kStride;
    if (idx + thread_ < end) vector_[j] = ptx::load_streaming(vectors_ + idx);
  }

  const int32_t* offsets_;  // of the current tile
  const uint4* vectors_;    // shifted by this thread's place in its group
  int num_vectors_;
  int thread_;
  int tiles_left_;  // the current one included
  int base_;        // first vector of the batch in registers
  int end_;         // end of the current tile
  int next_end_;    // end of the tile after it
  uint4 vector_[kBatch];
};

}  // namespace flash_llm
