// Where a gather weight's slices lie in its payload, as kernels find it (format/gather.h). Whatever
// the bytes are, nothing that is found here lies outside the payload.
#pragma once

#include <cstdint>

#include "format/gather.h"
#include "format/packed_format.h"
#include "plan/gather.h"

namespace flash_llm {

inline constexpr int kGatherTileSlices = kGatherTileM / kGatherSliceRows;
inline constexpr int kGatherUnitBytes = kGatherUnitWords * 4;
static_assert(kGatherTileSlices == 2 * 32, "a lane looks after two slices of a tile");

struct GatherWeight {
  const uint32_t* payload;
  const int32_t* offsets;
  uint32_t units;  // of the payload
  int64_t m;
  int k, parts;

  explicit GatherWeight(const PackedView& view)
      : payload(view.payload),
        offsets(view.offsets),
        units(static_cast<uint32_t>(view.payload_words / kGatherUnitWords)),
        m(view.m),
        k(static_cast<int>(view.k)),
        parts(gather_parts(view.k)) {}

  __device__ const uint8_t* unit(uint32_t index) const {
    return reinterpret_cast<const uint8_t*>(payload) + uint64_t{index} * kGatherUnitBytes;
  }
  __device__ int tile_rows() const {
    return static_cast<int>((m + kGatherTileM - 1) / kGatherTileM);
  }
  __device__ int slices() const {
    return static_cast<int>((m + kGatherSliceRows - 1) / kGatherSliceRows);
  }
  __device__ int rows_of(int tile_row) const {
    return static_cast<int>(min(m - int64_t{tile_row} * kGatherTileM, int64_t{kGatherTileM}));
  }
  __device__ int cols_of(int part) const { return min(k - part * kGatherTileK, kGatherTileK); }
};

// What a lane knows of a tile: its slices 2 lane and 2 lane + 1.
struct LaneSlices {
  int slices;         // of the tile
  uint32_t begin;     // the tile's first unit; its rows are there
  bool stored;        // false for a tile without bytes
  uint32_t first[2];  // the slices' first units
  uint32_t quads[2];

  // All lanes must call it.
  __device__ __forceinline__ LaneSlices(const GatherWeight& weight, int tile_row, int part,
                                        int lane) {
    const int32_t* const offset = weight.offsets + int64_t{tile_row} * weight.parts + part;
    begin = static_cast<uint32_t>(__ldg(offset));
    const uint32_t end = static_cast<uint32_t>(__ldg(offset + 1));
    slices = gather_slices(weight.rows_of(tile_row));
    // A unit of rows for each slice, then two bytes.
    const uint32_t directory = slices + (slices * 2 + kGatherUnitBytes - 1) / kGatherUnitBytes;
    stored = begin <= end && end <= weight.units && end - begin >= directory;
    uint32_t pair = 0;
    if (stored && 2 * lane < slices) {
      pair = __ldg(reinterpret_cast<const uint32_t*>(weight.unit(begin + slices)) + lane);
    }
    quads[0] = pair & 0xFFFFU;
    quads[1] = 2 * lane + 1 < slices ? pair >> 16 : 0;
    const uint32_t units[2] = {units_of(quads[0]), units_of(quads[1])};
    uint32_t before = units[0] + units[1];  // with those of this lane
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t below = __shfl_up_sync(~0U, before, step);
      if (lane >= step) before += below;
    }
    first[1] = begin + directory + before - units[1];
    first[0] = first[1] - units[0];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (first[i] + units[i] > end) quads[i] = 0;
    }
  }

  __device__ __forceinline__ static uint32_t units_of(uint32_t quads) {
    return (quads + kGatherSegmentQuads - 1) / kGatherSegmentQuads *
               (kGatherHeadBytes / kGatherUnitBytes) +
           quads * (kGatherQuadBytes / kGatherUnitBytes);
  }
};

}  // namespace flash_llm
