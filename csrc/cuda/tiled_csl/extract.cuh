// Extraction, the "load as sparse" half of the kernel (Flash-LLM section 4.3.2): entries of a tile
// travel from global memory into registers, and from there into a dense tile in shared memory.
//
// The warps that share a tile read its vectors round robin, 32 vectors (512 bytes) a warp at a
// time. Each thread holds kBatch vectors; as soon as one has been scattered, its register is
// refilled with a vector of the next batch. So kBatch loads per thread are always in flight, across
// tile boundaries too: tiles that follow each other in K follow each other in memory. A batch is no
// limit on a tile: one that holds more entries simply takes more batches.
//
// That is some 40 KB per SM on their way, and after each batch a wait for the next. On sm_90 L2 is
// asked for entries kAhead vectors early, so that the wait is for L2 and not for memory.
#pragma once

#include <cstdint>

#include "cuda/ptx/sm80.cuh"
#include "format/tiled_csl.h"

namespace flash_llm {

// Places are masked into the tile, so that not even a malformed entry can write elsewhere. Once
// masked, a place becomes an address by one instruction (LEA). The asm keeps the compiler from
// shifting first, which takes one more.
__device__ __forceinline__ uint32_t masked(uint32_t bits, uint32_t mask) {
  bits &= mask;
  asm("" : "+r"(bits));
  return bits;
}

// Shared-memory address of the place in the upper half of a word, as in an entry, or the lower one.
__device__ __forceinline__ uint32_t address_of_high(uint32_t smem_tile, uint32_t word) {
  return smem_tile + (masked(word, uint32_t{kTileElems - 1} << 16) >> 15);
}
__device__ __forceinline__ uint32_t address_of_low(uint32_t smem_tile, uint32_t word) {
  return smem_tile + (masked(word, kTileElems - 1) << 1);
}

// Stores one vector's four values at their places.
__device__ __forceinline__ void scatter_vector(const uint4& vector, bool active,
                                               uint32_t smem_tile) {
  const uint32_t entries[kVectorEntries] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (const uint32_t entry : entries) {
    ptx::store_shared_u16_if(active, address_of_high(smem_tile, entry), entry);
  }
}

// The places of one vector's entries, to store zeros there later.
struct VectorPlaces {
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

// The places of the first kKept vectors per thread of a tile are kept in registers (a multiple of
// kBatch; 0 for none), so that clear() can clear a tile that holds no more.
template <int kWarpsPerTile, int kBatch, int kKept>
class EntryStream {
 public:
  static constexpr int kStride = kWarpsPerTile * 32;
  // 8 KB per warp. 12 warps on 132 SMs then want 13 MB in L2, some of it for a microsecond or two.
  static constexpr int kAhead = 16 * kStride;

  __device__ __forceinline__ EntryStream(const int32_t* offsets, const uint32_t* entries,
                                         int num_vectors, int thread_in_group)
      : offsets_(offsets),
        vectors_(reinterpret_cast<const uint4*>(entries) + thread_in_group),
        num_vectors_(num_vectors),
        thread_(thread_in_group) {}

  // Makes `num_tiles` consecutive tiles the ones to come and begins to load the first.
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

  // Scatters the current tile into shared memory and begins to load the next one.
  __device__ __forceinline__ void extract(uint32_t smem_tile) {
    const int next_end = clamped(next_end_);
    next_end_ = load_offset(3);  // nobody waits for it before the next tile
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

  // Stores zeros where extract() has stored the entries of its tile; false if it has not kept all
  // of their places.
  __device__ __forceinline__ bool clear(uint32_t smem_tile) const {
    if (tile_vectors_ > kKept * kStride) return false;
#pragma unroll
    for (int first = 0; first < kKept; first += kBatch) {
      if (first * kStride >= tile_vectors_) break;
#pragma unroll
      for (int j = first; j < first + kBatch; ++j) {
        places_[j].clear(j * kStride + thread_ < tile_vectors_, smem_tile);
      }
    }
    return true;
  }

 private:
  // Scatters the batch in registers and loads the next one, of the tile that ends at `next_end` if
  // this was the tile's last: returns whether it was. Keeps the places as those of vectors `first`
  // and on, if that is less than kKept.
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
      if (first < kKept) places_[first + j].keep(vector_[j]);
      ptx::load_streaming_if(j * kStride < next_left, next + j * kStride, vector_[j]);
    }
    base_ = next_base;
    return last_batch;
  }

  // Where tile tile_ + i begins, but not past the stream's last tile.
  __device__ __forceinline__ int load_offset(int i) const {
    return __ldg(offsets_ + tile_ + min(i, tiles_left_));
  }

  // Up to where L2 should have been asked when the batch at `base` comes into registers.
  __device__ __forceinline__ int ahead_of(int base) const {
    return base + min(kAhead, stream_end_ - base);
  }
  __device__ __forceinline__ void prefetch(int begin, int end) const {
    if (thread_ == 0 && begin < end) ptx::prefetch_l2(vectors_ + begin, (end - begin) * 16);
  }

  // Malformed offsets lead nowhere outside the buffer.
  __device__ __forceinline__ int clamped(int offset) const {
    return max(0, min(offset, num_vectors_));
  }

  const int32_t* offsets_;
  const uint4* vectors_;  // shifted by this thread's place in its group
  int num_vectors_;
  int thread_;
  int tile_;          // the current one
  int tiles_left_;    // the current one included
  int base_;          // first vector of the batch in registers
  int end_;           // end of the current tile
  int next_end_;      // end of the tile after it, as it was loaded
  int stream_end_;    // end of the last tile
  int tile_vectors_;  // in the tile that was extracted last
  uint4 vector_[kBatch] = {};
  VectorPlaces places_[kKept == 0 ? 1 : kKept];

  static_assert(kKept % kBatch == 0, "whole batches are kept");
};

}  // namespace flash_llm
