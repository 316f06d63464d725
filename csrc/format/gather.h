// Gather: each nonzero is a 16-bit value and an 8-bit step in column, for weights of 80 % zeros and
// more and products with few tokens, whose time then is that of 3 bytes per nonzero. A lane of a
// warp walks along one run of nonzeros: it adds the step to its column, loads that column of X from
// shared memory and multiplies. The work is per nonzero, where that of the bitmap is per element.
//
// The weight W[M, K] is cut into tiles of 512 x 8192, stored tile row by tile row. The rows of a
// tile are sorted by their nonzeros, most first, equal ones in their order; eight consecutive
// positions are a slice. The nonzeros of a row, in order of their columns, are cut into four runs
// of (nearly) equal length, one for each of four lanes: run i of n nonzeros has those from n i / 4
// (rounded down) to before n (i + 1) / 4.
//
//   offsets  int32[tiles + 1], in units of 16 bytes; offsets[0] = 0, never decreasing,
//            offsets[tiles] = payload_words / 4
//   payload  the tiles' bytes. A tile without nonzeros has none. Any other has, with S slices:
//              rows    uint16[8 S]: the row of the tile at each position. Rows that do not exist
//                      in the last tile have no nonzeros, so they come last
//              quads   uint16[S]: quads in each slice; then zeros up to the next unit
//              slices  the slices' segments. A segment has eight quads, the last one of a slice
//                      what is left:
//                first columns  uint16[32 lanes], counted from the tile's first column
//                per quad       int8[32 lanes][4 steps in column], uint16[32 lanes][4 values]
//
// Lane l has run l % 4 of the row at position l / 4 of the slice. Its column before a segment is
// the first column; each step in column is added before the value beside it is used. The first step
// of a segment is 0. A filler is a step with the value 0: it bridges more than 127 columns, or
// fills up a run that is shorter than the slice's longest.
//
// Order. A run may be stored in any order that the steps reach. The packer chooses it such that
// lanes of a warp load X from different banks of shared memory: the paper's ahead-of-time sparse
// data reordering. Of 16 bytes per column (8 tokens) the hardware loads 8 lanes at once; they do
// not conflict if their columns differ modulo 8 (their classes). So each step assigns to the lanes
// 8 q .. 8 q + 7, for q = 0 .. 3, entries of eight different classes where it can. Candidates are,
// for each lane and class, the entries within reach: at most 127 columns behind the oldest entry
// of the run that is not stored yet, and at most 127 from the lane's column. Each costs its
// distance from the oldest entry, plus 60 for each lane before of this step with the same column
// modulo 32 (4 bytes per column), plus 80 for each lane before of the same half of the warp with
// the same column modulo 16 (8 bytes per column); a lane's cheapest candidate of a class counts.
// The assignment with the least total cost is taken. Wavefronts of a load, 1 / 1, 2 / 2 and 4 / 4
// without conflicts: at 80 % zeros 2.0, 3.2, 4.4 and at 90 % 2.2, 3.8, 4.8 for 4, 8 and 16 bytes
// per column, where the order of columns takes 3.4, 6.1 and 10.2.
//
// Invariants (gather_validate checks all of them): a tile is as long as its parts say; rows are a
// permutation; columns lie inside the matrix where the value is not 0; no element is stored twice;
// no stored value is -0; first steps and padding are 0; the number of values that are not 0 is nnz.
#pragma once

#include <cstdint>

#include "base/host_device.h"
#include "base/parallel.h"
#include "base/status.h"
#include "format/packed_format.h"
#include "format/packed_header.h"

namespace flash_llm {

inline constexpr int kGatherTileM = 512;
inline constexpr int kGatherTileK = 8192;
inline constexpr int kGatherUnitWords = 4;
inline constexpr int kGatherSliceRows = 8;
inline constexpr int kGatherLanes = 32;
inline constexpr int kGatherRuns = kGatherLanes / kGatherSliceRows;  // of a row
inline constexpr int kGatherQuadSteps = 4;
inline constexpr int kGatherSegmentQuads = 8;
inline constexpr int kGatherReach = 127;  // columns that a step can cross, either way
inline constexpr int kGatherHeadBytes = kGatherLanes * 2;  // of a segment's first columns
inline constexpr int kGatherQuadStepBytes = kGatherLanes * kGatherQuadSteps;  // then the values
inline constexpr int kGatherQuadBytes = kGatherQuadStepBytes * 3;

FLASH_LLM_HOST_DEVICE constexpr int gather_slices(int64_t rows) {
  return static_cast<int>((rows + kGatherSliceRows - 1) / kGatherSliceRows);
}
// Bytes of a slice's segments.
constexpr int64_t gather_slice_bytes(int64_t quads) {
  return (quads + kGatherSegmentQuads - 1) / kGatherSegmentQuads * kGatherHeadBytes +
         quads * kGatherQuadBytes;
}

// The format's row of format/packed_format.h, which says what each of them does.
Status gather_count(const ValueMatrix& matrix, const ParallelFor& parallel_for, int32_t* offsets,
                    int64_t* nnz);
Status gather_pack(const ValueMatrix& matrix, const int32_t* offsets, int64_t nnz,
                   const ParallelFor& parallel_for, uint32_t* payload);
void gather_unpack_tile_row(const PackedView& view, int64_t tile_row, void* values, float* scales);
int64_t gather_count_stored(const PackedView& view, const ParallelFor& parallel_for);
Status gather_check_sizes(const PackedHeader& header, int64_t num_offsets, int64_t payload_words);
Status gather_validate(const PackedView& view, const ParallelFor& parallel_for);

}  // namespace flash_llm
