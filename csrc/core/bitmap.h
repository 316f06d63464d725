// Bitmap: one bit per element and one 16-bit value per nonzero, laid out in "lane columns" so that
// a GPU warp decodes it straight into tensor-core registers.
//
// The weight W[M, K] is cut into chunks of 32 x 128. Sixteen chunk rows (512 rows of W) are a band;
// bands are stored one after the other, within a band column after column of chunks, from top to
// bottom: what a CTA of 16 warps reads together lies together (measured: 3 of 48 us at 90 % zeros).
// A chunk is two strips of 16 rows by two halves of 64 columns; a strip times 16 columns is one A
// fragment of mma.m16n8k16 (and of a warp's part of wgmma.m64nNk16), of which each lane holds 8
// elements.
//
//   offsets  int32[chunks + 1], in units of 64 bytes; offsets[0] = 0, never decreasing,
//            offsets[chunks] = payload_words / 16
//   payload  the chunks' bytes; one without nonzeros has none. Else, with R rows, 1 <= R <= 64:
//              values  uint16[R][32 columns][2 slots]
//              bits    uint32[32 lanes][4]: words 2 h + i of half h and strip i
//              sigma   uint8[32 lanes][2 strips]
//            so a chunk has 2 R + 9 units: at 50 % zeros 7 % more than the exact bytes.
//
// Elements. Lane 4 g + t of strip i and half h owns 32 elements: 8 quads q of 4 elements j,
//   row    = 16 i + g + 8 (j / 2)
//   column = 64 h + 16 (q / 2) + 8 (q % 2) + 2 t + j % 2
// and bit 8 j + q of its word says whether the element is stored. A quad is two registers of the
// fragment: one mask finds its four bits, one per byte.
//
// Runs. A lane's values of one strip and half form a run, quad after quad, in the order j = 0, 1,
// 3, 2 (so the second register can be read backwards from the quad's end: the decoder then needs
// only the position of each quad, not of each element). Column c of the values belongs to lane c,
// slot i to strip i:
//   * the run of half 0 fills its own column and slot upward from row 0;
//   * the run of half 1 fills another column downward from row R - 1; sigma is the byte offset
//     4 column + 2 slot in a row. For each strip the columns are distinct: in any one load every
//     lane reads another bank of shared memory, whatever its position.
// Pairing long runs with short ones keeps R, and so the padding, small.
//
// Invariants (bitmap_validate checks all of them): two runs in one column and slot do not overlap;
// halfwords outside the runs are 0; bits outside the matrix are 0; no stored value is ±0; the
// number of bits is nnz.
//
// Packing is canonical, the same on CPU and GPU: for each strip, with lanes sorted by (length,
// lane), the longest downward run goes on top of the shortest upward run, the second longest on the
// second shortest and so on; of the pairings that kSwapPatterns allows the first with the fewest
// rows wins.
#pragma once

#include <cstdint>

#include "core/host_device.h"
#include "core/packed_format.h"
#include "core/packed_header.h"
#include "core/parallel.h"
#include "core/status.h"

namespace flash_llm {

inline constexpr int kChunkM = 32;
inline constexpr int kChunkK = 128;
inline constexpr int kStripM = 16;
inline constexpr int kHalfK = 64;
inline constexpr int kChunkUnitBytes = 64;
inline constexpr int kChunkUnitWords = kChunkUnitBytes / 4;
inline constexpr int kChunkRowBytes = 128;  // one row of values
inline constexpr int kMaxChunkRows = 64;    // every element stored
inline constexpr int kChunkBitsBytes = kChunkM * kChunkK / 8;
inline constexpr int kChunkSigmaBytes = 64;
inline constexpr int kChunkFixedBytes = kChunkBitsBytes + kChunkSigmaBytes;
inline constexpr int kChunkFixedUnits = kChunkFixedBytes / kChunkUnitBytes;
inline constexpr int kRunElems = 32;
inline constexpr int kQuads = 8;

FLASH_LLM_HOST_DEVICE constexpr int64_t num_chunk_rows(int64_t m) {
  return (m + kChunkM - 1) / kChunkM;
}
FLASH_LLM_HOST_DEVICE constexpr int64_t num_chunk_cols(int64_t k) {
  return (k + kChunkK - 1) / kChunkK;
}

inline constexpr int kBandChunkRows = 16;

// Where chunk (row, col) of `rows` x `cols` chunks is stored.
FLASH_LLM_HOST_DEVICE constexpr int64_t chunk_index(int64_t row, int64_t col, int64_t rows,
                                                    int64_t cols) {
  const int64_t band_row = row / kBandChunkRows * kBandChunkRows;
  const int64_t left = rows - band_row, height = left < kBandChunkRows ? left : kBandChunkRows;
  return band_row * cols + col * height + row - band_row;
}

// Units of a chunk with `rows` rows of values, and back; -1 for a size that no chunk has.
FLASH_LLM_HOST_DEVICE constexpr int chunk_units(int rows) { return 2 * rows + kChunkFixedUnits; }
FLASH_LLM_HOST_DEVICE constexpr int chunk_value_rows(int64_t units) {
  const int64_t twice = units - kChunkFixedUnits;
  const int64_t rows = twice / 2;
  return twice >= 0 && twice % 2 == 0 && rows <= kMaxChunkRows ? static_cast<int>(rows) : -1;
}

// Row and column within the chunk of an element: see above.
FLASH_LLM_HOST_DEVICE constexpr int chunk_row(int strip, int lane, int elem) {
  return strip * kStripM + (lane >> 2) + (elem >> 1) * 8;
}
FLASH_LLM_HOST_DEVICE constexpr int chunk_col(int half, int lane, int quad, int elem) {
  return half * kHalfK + (quad >> 1) * 16 + (quad & 1) * 8 + (lane & 3) * 2 + (elem & 1);
}
FLASH_LLM_HOST_DEVICE constexpr int chunk_bit(int quad, int elem) { return elem * 8 + quad; }

// The order of a quad's elements in a run: 0, 1, 3, 2.
FLASH_LLM_HOST_DEVICE constexpr int quad_order(int i) { return i ^ (i >> 1); }

// The pairings that packing tries: pattern p gives lane c's column to the downward run of the
// other strip, in the slot of its own, where popcount(c & p) is odd. Eight of them save 1.5 % of
// the bytes at 50 % zeros; sixteen would save 0.2 % more.
inline constexpr int kSwapPatterns = 8;
FLASH_LLM_HOST_DEVICE constexpr bool swaps_slots(int pattern, int column) {
  const int bits = pattern & column;
  return ((bits ^ (bits >> 1) ^ (bits >> 2)) & 1) != 0;
}

// The format's row of core/packed_format.h, which says what each of them does.
Status bitmap_count(const uint16_t* dense, int64_t ld, int64_t m, int64_t k,
                    const ParallelFor& parallel_for, int32_t* offsets, int64_t* nnz);
void bitmap_pack(const uint16_t* dense, int64_t ld, int64_t m, int64_t k, const int32_t* offsets,
                 const ParallelFor& parallel_for, uint32_t* payload);
void bitmap_unpack_tile_row(const PackedView& view, int64_t tile_row, uint16_t* dense);
Status bitmap_check_sizes(const PackedHeader& header, int64_t num_offsets, int64_t payload_words);
Status bitmap_validate(const PackedView& view, const ParallelFor& parallel_for);

}  // namespace flash_llm
