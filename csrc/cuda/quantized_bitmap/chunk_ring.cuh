// The packed weight in global memory, and how a warp's chunks of it are copied to shared memory:
// one after the other, into a ring of the warp's own.
#pragma once

#include <cstdint>

#include "cuda/ptx/sm80.cuh"
#include "cuda/ptx/sm90.cuh"
#include "cuda/schedule/weight_copy.cuh"
#include "format/packed_format.h"
#include "format/quantized_bitmap.h"
#include "plan/quantized_bitmap.h"

namespace flash_llm {

// A packed weight, as a parameter of kernels.
struct QuantWeight {
  const uint32_t* payload;
  const int32_t* offsets;
  int payload_units;
  int k;
  int strips, chunk_cols;
  int scale_units;  // of a strip

  static QuantWeight of(const PackedView& view) {
    return {view.payload,
            view.offsets,
            static_cast<int>(view.payload_words / kQuantUnitWords),
            static_cast<int>(view.k),
            static_cast<int>(num_quant_strips(view.m)),
            static_cast<int>(num_quant_chunks(view.value_type, view.k)),
            static_cast<int>(quant_scale_units(view.value_type, view.k))};
  }

  // The scales of a strip's rows, of types with one for each row. Null if the strip has none, which
  // stands for ones: it has no values, or its offsets are malformed.
  __device__ __forceinline__ const float* row_scales(int strip) const {
    const int32_t* strip_offsets = offsets + int64_t{strip} * chunk_cols;
    const int begin = strip_offsets[0], end = strip_offsets[chunk_cols];
    if (begin < 0 || end <= begin || begin + scale_units > payload_units) return nullptr;
    return reinterpret_cast<const float*>(payload + int64_t{begin} * kQuantUnitWords);
  }
};

// Scales that a lane has loaded, as fp16 numbers: nothing is done with them before they are needed,
// so that nobody waits for them.
struct LaneScales {
  uint32_t low = 0x3C00, high = 0x3C00;
};

// The strip and the column of a chunk.
struct ChunkPlace {
  int64_t strip;
  int col;
};

// The chunks of a warp on their way through its ring. All lanes must call its functions. C has
//   kType         of the values
//   kFixedUnits   of a chunk
//   kGroupScales  whether groups of columns have scales
//   WeightCopy    how chunks are copied
//   Chunks        which chunks they are: `total` of them, and operator[] is the place of one, which
//                 may lie below the matrix
template <typename C>
class ChunkRing {
 public:
  using Chunks = typename C::Chunks;

  // Starts to copy as many chunks as the `ring_bytes` bytes at `ring` have room for, at least one.
  // `full` is the first of kQuantRingChunks barriers, of WeightCopy::kArrivals arrivals each.
  __device__ __forceinline__ ChunkRing(const QuantWeight& weight, const Chunks& chunks,
                                       uint32_t full, uint32_t ring, int ring_bytes, int lane)
      : weight_(weight),
        chunks_(chunks),
        full_(full),
        begin_(ring),
        oldest_(ring),
        chunk_(lane),
        lane_(lane) {
    // Each slot of the ring has room for the largest of the warp's chunks.
    found_ = find(lane);
    int rows = found_.rows;
    for (uint32_t chunk = lane + 32; chunk < chunks_.total; chunk += 32) {
      rows = max(rows, find(chunk).rows);
    }
    constexpr int kFixedBytes = (C::kFixedUnits * kQuantUnitBytes + 127) / 128 * 128;
    slot_bytes_ = __reduce_max_sync(~0U, rows) * kQuantRowBytes + kFixedBytes;
    slots_ = 1;
#pragma unroll
    for (int i = 2; i <= kQuantRingChunks; ++i) {
      slots_ += i * slot_bytes_ <= static_cast<uint32_t>(ring_bytes);
    }
    for (uint32_t i = 0; i < min(slots_, chunks_.total); ++i) copy(i, begin_ + i * slot_bytes_);
  }

  // Waits for the oldest chunk. Returns its address; `rows` are its rows of values.
  __device__ __forceinline__ uint32_t wait(int* rows) const {
    *rows = __shfl_sync(~0U, found_.rows, static_cast<int>(done_));
    ptx::mbarrier_wait(full_ + done_ % kQuantRingChunks * 8, done_ / kQuantRingChunks & 1);
    return oldest_;
  }

  // Scales of the chunk that wait() returns (kAhead = 0) or of the next one: those of rows lane / 4
  // and lane / 4 + 8 for group lane % 4 of its columns. Groups outside the matrix, and those of a
  // strip without values, have ones.
  template <int kAhead>
  __device__ __forceinline__ LaneScales load_group_scales() const {
    const auto finder = static_cast<int>(done_ + kAhead);
    const int unit = __shfl_sync(~0U, found_.scale_unit, finder);
    const int units = __shfl_sync(~0U, found_.scale_units, finder);
    LaneScales scales;
    if (lane_ % 4 < units) {
      // A unit is the scales of a group.
      const auto* rows = reinterpret_cast<const uint16_t*>(
          weight_.payload + int64_t{unit + lane_ % 4} * kQuantUnitWords);
      scales.low = rows[lane_ / 4];
      scales.high = rows[lane_ / 4 + 8];
    }
    return scales;
  }

  // Copies another chunk to where the oldest is, which the warp has read.
  __device__ __forceinline__ void release() {
    __syncwarp();
    const uint32_t next = done_ + slots_;
    if (next < chunks_.total) {
      copy(next, oldest_);
      // The lanes whose chunks were multiplied find further ones, well before these are copied.
      if (next % 16 == 0 && chunk_ <= done_) {
        chunk_ += 32;
        found_ = find(chunk_);
      }
    }
    ++done_;
    oldest_ += slot_bytes_;
    if (oldest_ == begin_ + slots_ * slot_bytes_) oldest_ = begin_;
  }

 private:
  struct Found {
    int first_unit = 0;
    int rows = 0;  // of values; none if the chunk has no bytes or its offsets are malformed
    // Where its scales are, of types with scales for groups of columns.
    int scale_unit = 0, scale_units = 0;
  };

  __device__ __forceinline__ Found find(uint32_t chunk) const {
    Found found;
    if (chunk >= chunks_.total) return found;
    const auto [strip, col] = chunks_[chunk];
    if (strip >= weight_.strips) return found;
    const int32_t* offsets = weight_.offsets + strip * weight_.chunk_cols + col;
    const int begin = offsets[0], end = offsets[1];
    const bool stored = begin >= 0 && end > begin && end <= weight_.payload_units;
    found.first_unit = stored ? begin + (col == 0 ? weight_.scale_units : 0) : 0;
    found.rows = stored ? max(quant_value_rows(C::kType, end - found.first_unit), 0) : 0;
    if constexpr (C::kGroupScales) {
      // No branch: a load in it would begin after the two above.
      const int scales = weight_.offsets[strip * weight_.chunk_cols];
      const bool scaled =
          stored & (scales >= 0) & (scales <= weight_.payload_units - weight_.scale_units);
      constexpr int kChunkScaleUnits = quant_chunk_k(C::kType) / kScaleGroupCols;
      found.scale_unit = scaled ? scales + col * kChunkScaleUnits : 0;
      found.scale_units = scaled ? weight_.scale_units - col * kChunkScaleUnits : 0;
    }
    return found;
  }

  // Starts to copy a chunk that lane chunk % 32 has found. If one lane makes the copy, it does.
  __device__ __forceinline__ void copy(uint32_t chunk, uint32_t to) const {
    const auto finder = static_cast<int>(chunk % 32);
    Found found = found_;
    using WeightCopy = typename C::WeightCopy;
    if constexpr (!WeightCopy::kOneLane) {
      found.first_unit = __shfl_sync(~0U, found.first_unit, finder);
      found.rows = __shfl_sync(~0U, found.rows, finder);
    }
    const uint32_t bytes =
        found.rows == 0 ? 0 : found.rows * kQuantRowBytes + C::kFixedUnits * kQuantUnitBytes;
    const RingCopy copy = {weight_.payload + int64_t{found.first_unit} * kQuantUnitWords,
                           to,
                           bytes,
                           0,
                           0,
                           full_ + chunk % kQuantRingChunks * 8};
    WeightCopy::template copy<1>(copy, WeightCopy::kOneLane ? lane_ - finder : lane_);
  }

  const QuantWeight& weight_;
  Chunks chunks_;
  uint32_t full_, begin_;
  uint32_t oldest_;  // address of the oldest chunk
  uint32_t chunk_;   // what this lane has found
  Found found_;
  int lane_;
  uint32_t slots_;
  uint32_t slot_bytes_;
  uint32_t done_ = 0;  // chunks that were released
};

}  // namespace flash_llm
