// Tiled-CSL: the sparse format of Flash-LLM (arXiv 2309.10285, section 4.3.1).
//
// The weight W[M, K] is cut into tiles of 128 x 64, stored tile row by tile row. Each nonzero is
// one 32-bit entry; `offsets` says where each tile's entries begin.
//
//   offsets  int32[num_tiles + 1], in vectors; offsets[0] = 0, never decreasing,
//            offsets[num_tiles] = payload_words / 4
//   entries  uint32[payload_words]; a vector is 4 entries = 16 bytes, the unit of a global load
//   entry    bits 0..15  the value, a raw fp16 or bf16 pattern
//            bits 16..31 its position in the tile, 0..8191
//
// Invariants (tiled_csl_validate checks all of them):
//   * positions are distinct within a tile and, except for padding, lie inside the matrix;
//   * no stored value is -0; an entry whose value is +0 is padding. A tile has fewer than 4 of
//     them, just enough to fill its last vector. A padding entry writes a zero to an element that
//     is zero, so kernels need no special case;
//   * the number of entries that are not padding is nnz.
//
// Position: the index of an element in the decoded tile. A decoded tile is 128 rows of 128 bytes.
// The 64 columns of row r are permuted and swizzled:
//
//   column c = 32 u + 8 t + 2 v + h      u = 0..1 (half of the tile), t = 0..3 (thread),
//                                        v = 0..3 (word), h = 0..1 (half of a word)
//   chunk  q = 4 u + v                   0..7, 16 bytes each
//   position = 64 r + 8 (q ^ (r mod 8)) + 2 t + h
//
// The XOR is the paper's swizzle: ldmatrix reads eight rows of one chunk without bank conflicts.
// The permutation hands thread t of an mma.m16n8k16 quad, for the two k-steps of half u, the 8
// consecutive columns 32 u + 8 t .. + 7: the kernel loads X directly from global memory, 16 bytes
// per thread and 64 contiguous bytes per quad. (The sum over K may be taken in any order.)
//
// Order. Entries may be in any order; tiled_csl_pack uses the one that the paper calls
// ahead-of-time sparse data reordering. A warp stores 32 entries at a time into shared memory: lane
// l stores entry e of vector l (see storage_index). Such a store takes as many wavefronts as the
// bank that it hits most has different words; bank = word mod 32, word = position / 2. Each bank
// has a queue of its words that hold nonzeros, in rising order. The packer fills one store after
// the other, in rounds: in each round the banks add their first words, with one or two entries
// each, until the store is full. The bank with the longest queue comes first; ties go to the lowest
// bank. (The end of a store may split a word of two entries.) This order takes the fewest
// wavefronts possible, about the number of words in the longest queue: 58 for a tile at 80 % zeros,
// with 52 stores, where the order (rank within bank, bank) takes 73.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "base/host_device.h"
#include "base/parallel.h"
#include "base/status.h"
#include "format/packed_format.h"
#include "format/packed_header.h"

namespace flash_llm {

inline constexpr int kTileM = 128;
inline constexpr int kTileK = 64;
inline constexpr int kTileElems = kTileM * kTileK;
inline constexpr int kTileBytes = kTileElems * 2;  // decoded
inline constexpr int kVectorEntries = 4;
inline constexpr int kNumBanks = 32;
inline constexpr int kWarpEntries =
    32 * kVectorEntries;  // in one warp-wide load of 16 bytes per lane

// The CUDA packer and kernels use these functions too, so both write the same bytes.
FLASH_LLM_HOST_DEVICE constexpr int position_of(int row, int col) {
  const int thread = (col >> 3) & 3, chunk = (col >> 5) * 4 + ((col >> 1) & 3), half = col & 1;
  return row * kTileK + ((chunk ^ (row & 7)) << 3) + thread * 2 + half;
}

FLASH_LLM_HOST_DEVICE constexpr int row_of_position(int position) { return position / kTileK; }

FLASH_LLM_HOST_DEVICE constexpr int col_of_position(int position) {
  const int chunk = ((position >> 3) & 7) ^ ((position >> 6) & 7);
  return (chunk >> 2) * 32 + ((position >> 1) & 3) * 8 + (chunk & 3) * 2 + (position & 1);
}

FLASH_LLM_HOST_DEVICE constexpr int bank_of_position(int position) { return (position >> 1) & 31; }

// The index at which the nth entry of the order above is stored, in a tile of `num_entries` (a
// multiple of 4). Each block of 128 entries is 32 lanes x 4 entries; consecutive entries of the
// order go to consecutive lanes, so 32 of them are stored by one instruction.
FLASH_LLM_HOST_DEVICE constexpr int storage_index(int nth, int num_entries) {
  const int block = nth / kWarpEntries * kWarpEntries;
  const int left = num_entries - block;
  const int lanes = (left < kWarpEntries ? left : kWarpEntries) / kVectorEntries;
  const int within = nth - block;
  return block + within % lanes * kVectorEntries + within / lanes;
}

// How many entries the store that has the nth entry still takes, that entry included.
FLASH_LLM_HOST_DEVICE constexpr int store_room(int nth, int num_entries) {
  const int within = nth % kWarpEntries, left = num_entries - (nth - within);
  const int lanes = (left < kWarpEntries ? left : kWarpEntries) / kVectorEntries;
  return lanes - within % lanes;
}

constexpr int64_t num_tile_rows(int64_t m) { return (m + kTileM - 1) / kTileM; }
FLASH_LLM_HOST_DEVICE constexpr int64_t num_tile_cols(int64_t k) {
  return (k + kTileK - 1) / kTileK;
}
constexpr int64_t num_tiles(int64_t m, int64_t k) { return num_tile_rows(m) * num_tile_cols(k); }

// [first, last) of a tile's entries, clamped to the buffer: a malformed weight that was not
// validated gives wrong numbers, but nothing outside the buffer is read.
inline std::pair<int64_t, int64_t> tile_entry_range(const PackedView& view, int64_t tile) {
  const int64_t first =
      std::clamp<int64_t>(int64_t{view.offsets[tile]} * kVectorEntries, 0, view.payload_words);
  const int64_t last = std::clamp<int64_t>(int64_t{view.offsets[tile + 1]} * kVectorEntries, first,
                                           view.payload_words);
  return {first, last};
}

// The format's row of format/packed_format.h, which says what each of them does.
Status tiled_csl_count(const ValueMatrix& matrix, const ParallelFor& parallel_for, int32_t* offsets,
                       int64_t* nnz);
Status tiled_csl_pack(const ValueMatrix& matrix, const int32_t* offsets, int64_t nnz,
                      const ParallelFor& parallel_for, uint32_t* entries);
void tiled_csl_unpack_tile_row(const PackedView& view, int64_t tile_row, void* values,
                               float* scales);
int64_t tiled_csl_count_stored(const PackedView& view, const ParallelFor& parallel_for);
Status tiled_csl_check_sizes(const PackedHeader& header, int64_t num_offsets,
                             int64_t payload_words);
Status tiled_csl_validate(const PackedView& view, const ParallelFor& parallel_for);

}  // namespace flash_llm
