// Extraction, the "load as sparse" half of the kernel (Flash-LLM section 4.3.2): the entries of a
// tile are loaded from global memory into registers and scattered into a dense tile in shared
// memory.
//
// The warps that share a tile read its vectors round robin, each warp 32 vectors (512 bytes) at a
// time. Each thread holds kBatch vectors; as soon as one has been scattered, its registers are
// reloaded with a vector of the next batch. So kBatch loads per thread are always in flight, across
// tile boundaries too, because tiles that are adjacent in K are adjacent in memory. The number of
// batches per tile is not limited.
//
// This keeps about 40 KB per SM in flight, but each batch waits for its loads. On sm_90 entries are
// prefetched into L2 kAhead vectors early, so that a batch waits for L2 and not for memory.
#pragma once

#include <cstdint>

#include "cuda/ptx/sm80.cuh"
#include "format/tiled_csl.h"

namespace flash_llm {

// Masks the position in an entry (see format/tiled_csl.h) to lie inside the tile, so that a
// malformed entry cannot write elsewhere. One instruction (LEA) makes an address of the masked
// position; without the asm the compiler would shift first, which takes one more.
__device__ __forceinline__ uint32_t masked(uint32_t bits, uint32_t mask) {
  bits &= mask;
  asm("" : "+r"(bits));
  return bits;
}

// The shared-memory address for the position in the upper half of a word, where entries have it, or
// in the lower half.
__device__ __forceinline__ uint32_t address_of_high(uint32_t smem_tile, uint32_t word) {
  return smem_tile + (masked(word, uint32_t{kTileElems - 1} << 16) >> 15);
}
__device__ __forceinline__ uint32_t address_of_low(uint32_t smem_tile, uint32_t word) {
  return smem_tile + (masked(word, kTileElems - 1) << 1);
}

// Stores the four values of a vector at their positions.
__device__ __forceinline__ void scatter_vector(const uint4& vector, bool active,
                                               uint32_t smem_tile) {
  const uint32_t entries[kVectorEntries] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (const uint32_t entry : entries) {
    ptx::store_shared_u16_if(active, address_of_high(smem_tile, entry), entry);
  }
}

// The positions of a vector's entries, kept to store zeros there later.
struct VectorPositions {
  uint32_t xy, zw;

  __device__ __forceinline__ void keep(const uint4& vector) {
    xy = __byte_perm(vector.x, vector.y, 0x7632);
    zw = __byte_perm(vector.z, vector.w, 0x7632);
  }
  __device__ __forceinline__ void clear(bool active, uint32_t smem_tile) const {
    ptx::store_shared_u16_if(active, address_of_low(smem_tile, xy), 0);
    ptx::store_shared_u16_if(active, address_of_high(smem_tile, xy), 0);
    ptx::store_shared_u16_if(active, address_of_low(smem_tile, zw), 0);
    ptx::store_shared_u16_if(active, address_of_high(smem_tile, zw), 0);
  }
};

// Loads and scatters the entries of consecutive tiles. The positions of the first kKept vectors per
// thread of a tile (a multiple of kBatch, 0 for none) are kept in registers, so that clear() can
// clear a tile that has no more.
template <int kWarpsPerTile, int kBatch, int kKept>
class EntryStream {
 public:
  static constexpr int kStride = kWarpsPerTile * 32;
  // Vectors that are prefetched into L2: 8 KB per warp, in all 13 MB for 12 warps on each of 132
  // SMs, which stay there for a microsecond or two.
  static constexpr int kAhead = 16 * kStride;

  __device__ __forceinline__ EntryStream(const int32_t* offsets, const uint32_t* entries,
                                         int num_vectors, int thread_in_group)
      : offsets_(offsets),
        vectors_(reinterpret_cast<const uint4*>(entries) + thread_in_group),
        num_vectors_(num_vectors),
        thread_(thread_in_group) {}

  // Begins a sequence of `num_tiles` consecutive tiles and issues the loads of the first.
  __device__ __forceinline__ void start(int first_tile, int num_tiles) {
    tile_ = first_tile;
    tiles_left_ = num_tiles;
    base_ = clamped(load_offset(0));
    end_ = clamped(load_offset(1));
    const uint4* first = ptx::opaque(vectors_ + base_);
    const int left = end_ - base_ - thread_;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      ptx::load_streaming_if(j * kStride < left, first + j * kStride, vector_[j]);
    }
    next_end_ = load_offset(2);
    stream_end_ = clamped(load_offset(num_tiles));
    prefetch(base_ + min(kBatch * kStride, stream_end_ - base_), ahead_of(base_));
  }

  __device__ __forceinline__ int tiles_left() const { return tiles_left_; }

  // Scatters the current tile into shared memory and issues the loads of the next one.
  __device__ __forceinline__ void extract(uint32_t smem_tile) {
    const int next_end = clamped(next_end_);
    next_end_ = load_offset(3);  // not used before the next tile
    tile_vectors_ = end_ - base_;
    bool done = false;
#pragma unroll
    for (int first = 0; first < kKept; first += kBatch) {
      if (!done) done = scatter_batch(smem_tile, next_end, first);
    }
    while (!done) done = scatter_batch(smem_tile, next_end, kKept);
    end_ = next_end;
    ++tile_;
    --tiles_left_;
  }

  // Stores zeros where extract() stored the entries of its tile. Returns false, and does nothing,
  // if not all positions were kept.
  __device__ __forceinline__ bool clear(uint32_t smem_tile) const {
    if (tile_vectors_ > kKept * kStride) return false;
#pragma unroll
    for (int first = 0; first < kKept; first += kBatch) {
      if (first * kStride >= tile_vectors_) break;
#pragma unroll
      for (int j = first; j < first + kBatch; ++j) {
        positions_[j].clear(j * kStride + thread_ < tile_vectors_, smem_tile);
      }
    }
    return true;
  }

 private:
  // Scatters the batch in registers, loads the next one, and returns whether this was the tile's
  // last batch. If it was, the next batch is the first of the next tile, which ends at `next_end`.
  // `first` is the batch's first vector in the tile: if it is less than kKept, positions are kept.
  __device__ __forceinline__ bool scatter_batch(uint32_t smem_tile, int next_end, int first) {
    const bool last_batch = end_ - base_ <= kBatch * kStride;
    const int next_base = last_batch ? end_ : base_ + kBatch * kStride;
    const int next_batch_end = last_batch ? next_end : end_;
    prefetch(ahead_of(base_), ahead_of(next_base));
    const uint4* next = ptx::opaque(vectors_ + next_base);
    const int left = end_ - base_ - thread_, next_left = next_batch_end - next_base - thread_;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      scatter_vector(vector_[j], j * kStride < left, smem_tile);
      if (first < kKept) positions_[first + j].keep(vector_[j]);
      ptx::load_streaming_if(j * kStride < next_left, next + j * kStride, vector_[j]);
    }
    base_ = next_base;
    return last_batch;
  }

  // The offset of tile tile_ + i, but not beyond the end of the sequence's last tile.
  __device__ __forceinline__ int load_offset(int i) const {
    return __ldg(offsets_ + tile_ + min(i, tiles_left_));
  }

  // The end of what must have been prefetched into L2 when the batch at `base` is loaded.
  __device__ __forceinline__ int ahead_of(int base) const {
    return base + min(kAhead, stream_end_ - base);
  }
  __device__ __forceinline__ void prefetch(int begin, int end) const {
    if (thread_ == 0 && begin < end) ptx::prefetch_l2(vectors_ + begin, (end - begin) * 16);
  }

  // Malformed offsets must not lead outside the payload.
  __device__ __forceinline__ int clamped(int offset) const {
    return max(0, min(offset, num_vectors_));
  }

  const int32_t* offsets_;
  const uint4* vectors_;  // the payload, from this thread's index in its group on
  int num_vectors_;
  int thread_;
  int tile_;          // the current one
  int tiles_left_;    // the current one included
  int base_;          // first vector of the batch in registers
  int end_;           // end of the current tile
  int next_end_;      // end of the tile after it, not clamped yet
  int stream_end_;    // end of the last tile
  int tile_vectors_;  // vectors of the tile that was extracted last
  uint4 vector_[kBatch] = {};
  VectorPositions positions_[kKept == 0 ? 1 : kKept];

  static_assert(kKept % kBatch == 0, "whole batches are kept");
};

}  // namespace flash_llm
