// Bitmap: one bit per element and one 16-bit value per nonzero, laid out so that a GPU warp decodes
// them straight into tensor-core registers.
//
// The weight W[M, K] is cut into chunk rows of 32 rows and chunk columns of 128 columns. Sixteen
// chunk rows (512 rows of W) are a band. Bands are stored one after the other; within a band the
// chunks are stored column by column, each column from top to bottom. So the chunks that a CTA of
// 16 warps reads together are contiguous (saves 3 of 48 us at 90 % zeros, H200). An even column of
// a band and the next column are a pair. A pair is stored in one of two ways, whichever the packer
// finds better (a last column without a partner is plain):
//
//   plain   every chunk covers 32 x 128 elements
//   2:4     every chunk of the even column covers 32 x 256 elements, those of the odd column have
//           no bytes. Of four neighbours in a row (a group) the first two nonzeros are multiplied
//           by the sparse tensor cores, which take half as long as the dense ones. The other
//           nonzeros are the residual, 0.7 % of the elements at 80 % zeros.
//
//   offsets  int32[chunks + 1], in units of 64 bytes; offsets[0] = 0, never decreasing,
//            offsets[chunks] = payload_words / 16
//   payload  the chunks' bytes. A chunk without nonzeros has none. The size of any other chunk
//            tells its kind; it has R rows of values, R >= 1:
//
//   plain, 2 R + 9 units (odd), at most 137:
//              values        uint16[R][32 columns][2 slots]
//              bits          uint32[32 lanes][4]: words 2 h + i of half h and strip i
//              down offsets  uint16[32 lanes]: strip 0 in the low byte, strip 1 in the high byte
//   2:4, 2 R + 17 + G units (even), at most 146. G = G0 + G1, plus 1 if that sum is even:
//              bits          uint32[2 strips][32 lanes][4]
//              down offsets  uint16[32 lanes], as above. Bit 0, which is 0 in any down offset, is
//                            for lane l bit l of R | G0 << 8 | G1 << 16
//              values        uint16[R][32 columns][2 slots]
//              residual      G0 steps of strip 0, then G1 of strip 1, then zeros. A step is
//                            uint16[8][2] values, of rows g and g + 8 of the strip for g = 0..7,
//                            and uint16[16] residual offsets of its rows
//
// At 50 % zeros plain chunks have 7 % more bytes than their bits and nonzeros alone need, at 90 %
// zeros 2:4 chunks have 22 % more.
//
// A plain chunk, and how it is stored (each part is explained below):
//
//             half 0: columns 0..63                half 1: columns 64..127
//           +--------+--------+--------+--------+--------+--------+--------+--------+
//  strip 0, | quads  | quads  | quads  | quads  | quads  | quads  | quads  | quads  |
//  16 rows  | 0 and 1| 2 and 3| 4 and 5| 6 and 7| 0 and 1| 2 and 3| 4 and 5| 6 and 7|
//           +--------+--------+--------+--------+--------+--------+--------+--------+
//  strip 1, | quads  | quads  | quads  | quads  | quads  | quads  | quads  | quads  |
//  16 rows  | 0 and 1| 2 and 3| 4 and 5| 6 and 7| 0 and 1| 2 and 3| 4 and 5| 6 and 7|
//           +--------+--------+--------+--------+--------+--------+--------+--------+
//
//  Rows g and g + 8 of one of these boxes of 16 x 16. A cell is two elements of lane 4 g + t:
//
//                first quad              second quad
//           +-----+-----+-----+-----+-----+-----+-----+-----+
//  row g    | t=0 | t=1 | t=2 | t=3 | t=0 | t=1 | t=2 | t=3 |   j = 0, 1
//           +-----+-----+-----+-----+-----+-----+-----+-----+
//  row g+8  | t=0 | t=1 | t=2 | t=3 | t=0 | t=1 | t=2 | t=3 |   j = 2, 3
//           +-----+-----+-----+-----+-----+-----+-----+-----+
//
//  values, from byte 0 on: row r, column c, slot s is at byte 128 r + 4 c + 2 s; here R = 4. u is
//  an upward run: the values of half 0 of strip s that lane c holds. d is a downward run: the
//  values of half 1 of a strip that some lane holds; the lane's down offset for that strip is
//  4 c + 2 s. Empty cells are padding.
//
//              column 0    column 1               column 31
//             slot  slot  slot  slot             slot  slot
//               0     1     0     1                0     1
//           +-----+-----+-----+-----+---     ---+-----+-----+
//  row 3    |  d  |     |  d  |  u  |           |  d  |  d  |   |  downward runs begin in
//  row 2    |  d  |     |     |  u  |    ...    |  d  |  u  |   v  row R - 1
//  row 1    |  d  |  u  |     |  u  |           |  d  |  u  |   ^  upward runs begin in
//  row 0    |  u  |  u  |  u  |  u  |           |  d  |  u  |   |  row 0
//           +-----+-----+-----+-----+---     ---+-----+-----+
//
//  bits, from byte 128 R on                             down offsets, from byte 128 R + 512 on
//
//              half 0           half 1
//          strip 0 strip 1  strip 0 strip 1                      strip 0 strip 1
//          +-------+-------+-------+-------+                     +-------+-------+
//  lane 0  | word 0| word 1| word 2| word 3|             lane 0  | byte 0| byte 1|
//   ...    |       |       |       |       |              ...    |       |       |
//  lane 31 | word 0| word 1| word 2| word 3|             lane 31 | byte 0| byte 1|
//          +-------+-------+-------+-------+                     +-------+-------+
//
// Elements of a plain chunk. It is two strips of 16 rows by two halves of 64 columns. A strip times
// 16 columns is one A fragment of mma.m16n8k16 (and of a warp's part of wgmma.m64nNk16), of which
// each lane holds 8 elements. Lane 4 g + t of strip i and half h holds 32 elements: 8 quads q of 4
// elements j,
//   row    = 16 i + g + 8 (j / 2)
//   column = 64 h + 16 (q / 2) + 8 (q % 2) + 2 t + j % 2
// and bit 8 j + q of its word says whether the element is stored. A quad fills two registers of the
// fragment; one mask selects its four bits, one in each byte.
//
// Elements of a 2:4 chunk. A group has two slots. The fragment of mma.sp.m16n8k32 (wgmma.sp) is a
// strip times 32 columns, or 16 slots. Its sparsity metadata is another register, with one nibble
// per group, that only some lanes hold. The bits are stored for the lanes that hold the metadata,
// one word for each column k of the groups, so that one operation works on all groups of a word:
// bit 4 n + p of word k of lane 4 g + 2 h + u is that of
//   row    = 16 i + g + 8 (n / 4)
//   column = 64 p + 32 h + 16 u + 4 (n % 4) + k
// Of a group with bits b0..b3 the slots hold columns i0 < i1, and the nibble is i0 | i1 << 2:
//   i0 = 0 if b0, else 1 if b1, else 2
//   i1 = 1 if b0 and b1, else 2 if b2 and (b0 or b1), else 3
// A slot whose column has no bit is not stored. From the bits a warp derives
// (cuda/bitmap/decode.cuh) words like those of a plain chunk: lane 4 g + t of strip i and half h
// has 8 quads q of 4 slots j,
//   row   = 16 i + g + 8 (j / 2)
//   group = columns 64 (q % 4) + 32 h + 16 (q / 4) + 4 t and the next three
//   slot  = j % 2
//
// Residual. A row's elements beyond the second of their group are its residual, and G_i is the
// largest number of them that a row of strip i has. A step holds at most one element of each row,
// with its residual offset: 16 * (c ^ c / 8 % 8) for column c (0..255, within the chunk). That is
// the byte at which the kernel keeps column c of the transposed X in shared memory, 16 bytes for 8
// tokens. The kernel loads the columns that a step names for eight rows at once. That takes as many
// cycles as the largest class among them has different columns; a class is the columns whose
// residual offsets are equal modulo 128. (The exclusive or spreads the columns over the classes:
// residual columns are 2 or 3 modulo 4.) Elements are therefore assigned to steps as follows, for
// rows 0..7 and rows 8..15 of a strip separately: row after row, and in a row by rising column, an
// element goes to the first of the G_i steps that has no element of its row and none of its class;
// if there is no such step, to the first that has no element of its row. (Simulated at 80 % zeros:
// 1.06 cycles; 1.47 without the exclusive or, 1.88 in the order of columns.) An entry that stays
// empty has value 0 and the residual offset of the first of the eight rows that has an element in
// the step, because that column is loaded anyway, or 0 if none has.
//
// Runs. A lane's values of one strip and half form a run: quad after quad (in a 2:4 chunk in the
// order 0, 4, 1, 5, 2, 6, 3, 7, two quads to a fragment), in each quad in the order j = 0, 1, 3, 2.
// In that order the second register can be read backwards from the quad's end, so the decoder needs
// only the position of each quad, not of each element. Column c of the values belongs to lane c,
// slot i to strip i:
//   * the run of half 0 fills its own column and slot upward from row 0;
//   * the run of half 1 fills another column downward from row R - 1. The down offset, 4 column +
//     2 slot, is the byte offset in that row at which it begins. For each strip the columns are
//     distinct: in any one load every lane reads another bank of shared memory, whatever its row.
// Pairing long runs with short ones keeps R, and so the padding, small.
//
// Invariants (bitmap_validate checks all of them): the chunks of a pair, within a band, are of one
// kind; R, G0 and G1 give the size, and the other spare bits of the down offsets are 0; two runs in
// one column and slot do not overlap; halfwords outside the runs are 0; bits outside the matrix are
// 0; no stored value is ±0; the residual is exactly what the bits say, in the steps given above;
// the number of bits is nnz.
//
// Packing is canonical, the same on CPU and GPU: for each strip, with lanes sorted by (length,
// lane), the longest downward run goes on top of the shortest upward run, the second longest on the
// second shortest and so on; of the pairings that kSwapPatterns allows the first with the fewest
// rows wins. For the kind of a pair see prefers_two_four.
//
// Version 1 had plain chunks only. They have the same bytes in version 2, so a reader need not tell
// the versions apart.
#pragma once

#include <cstdint>

#include "base/host_device.h"
#include "base/parallel.h"
#include "base/status.h"
#include "format/packed_format.h"
#include "format/packed_header.h"

namespace flash_llm {

inline constexpr int kChunkM = 32;
inline constexpr int kChunkK = 128;            // columns of a plain chunk
inline constexpr int kTwoFourK = 2 * kChunkK;  // columns of a 2:4 chunk
inline constexpr int kStripM = 16;
inline constexpr int kHalfK = 64;
inline constexpr int kChunkUnitBytes = 64;
inline constexpr int kChunkUnitWords = kChunkUnitBytes / 4;
inline constexpr int kChunkRowBytes = 128;  // one row of values
inline constexpr int kMaxChunkRows = 64;    // every element stored
inline constexpr int kChunkBitsBytes = kChunkM * kChunkK / 8;
inline constexpr int kTwoFourBitsBytes = kChunkM * kTwoFourK / 8;
inline constexpr int kTwoFourStripBitsBytes = kTwoFourBitsBytes / 2;
inline constexpr int kChunkDownOffsetBytes = 64;
inline constexpr int kChunkFixedBytes = kChunkBitsBytes + kChunkDownOffsetBytes;
inline constexpr int kChunkFixedUnits = kChunkFixedBytes / kChunkUnitBytes;
inline constexpr int kTwoFourFixedBytes = kTwoFourBitsBytes + kChunkDownOffsetBytes;
inline constexpr int kTwoFourFixedUnits = kTwoFourFixedBytes / kChunkUnitBytes;
inline constexpr int kResidualStepBytes = kChunkUnitBytes;
inline constexpr int kMaxPlainUnits = 2 * kMaxChunkRows + kChunkFixedUnits;
// The most of either kind, taken by a full 2:4 chunk, as of a weight that was pruned to 2:4.
inline constexpr int kMaxChunkUnits = 2 * kMaxChunkRows + kTwoFourFixedUnits + 1;
// A reader of whole quads (cuda/bitmap/decode.cuh) loads, and does not use, bytes up to two rows
// before a plain chunk and up to 192 bytes after a 2:4 chunk. No other thread should write there
// meanwhile: what it writes does not matter, but tools report it as a race.
inline constexpr int kDecodeReachBytes = 2 * kChunkRowBytes;
inline constexpr int kRunElems = 32;
inline constexpr int kQuads = 8;

FLASH_LLM_HOST_DEVICE constexpr int64_t num_chunk_rows(int64_t m) {
  return (m + kChunkM - 1) / kChunkM;
}
FLASH_LLM_HOST_DEVICE constexpr int64_t num_chunk_cols(int64_t k) {
  return (k + kChunkK - 1) / kChunkK;
}

inline constexpr int kBandChunkRows = 16;

FLASH_LLM_HOST_DEVICE constexpr int64_t num_bands(int64_t chunk_rows) {
  return (chunk_rows + kBandChunkRows - 1) / kBandChunkRows;
}
// Pairs of one band; a last column without a partner counts as one.
FLASH_LLM_HOST_DEVICE constexpr int64_t num_chunk_pairs(int64_t chunk_cols) {
  return (chunk_cols + 1) / 2;
}
// Whether a column belongs to a pair of two.
FLASH_LLM_HOST_DEVICE constexpr bool has_partner(int64_t col, int64_t chunk_cols) {
  return (col | 1) < chunk_cols;
}

// Index of chunk (row, col), of `rows` x `cols` chunks, in the order in which they are stored.
FLASH_LLM_HOST_DEVICE constexpr int64_t chunk_index(int64_t row, int64_t col, int64_t rows,
                                                    int64_t cols) {
  const int64_t band_row = row / kBandChunkRows * kBandChunkRows;
  const int64_t left = rows - band_row, height = left < kBandChunkRows ? left : kBandChunkRows;
  return band_row * cols + col * height + row - band_row;
}

// Units of a plain chunk with `rows` rows of values, and the inverse: -1 for a size that no plain
// chunk has.
FLASH_LLM_HOST_DEVICE constexpr int chunk_units(int rows) { return 2 * rows + kChunkFixedUnits; }
FLASH_LLM_HOST_DEVICE constexpr int chunk_value_rows(int64_t units) {
  const int64_t twice = units - kChunkFixedUnits;
  const int64_t rows = twice / 2;
  return twice >= 0 && twice % 2 == 0 && rows <= kMaxChunkRows ? static_cast<int>(rows) : -1;
}

// Units of a 2:4 chunk. If they exceed kMaxChunkUnits, the pair must be plain.
FLASH_LLM_HOST_DEVICE constexpr int two_four_units(int rows, int steps0, int steps1) {
  const int steps = steps0 + steps1;
  return 2 * rows + kTwoFourFixedUnits + (steps | 1);
}
// Whether this is a size of 2:4 chunks.
FLASH_LLM_HOST_DEVICE constexpr bool is_two_four(int64_t units) {
  return units % 2 == 0 && units > kTwoFourFixedUnits && units <= kMaxChunkUnits;
}

// The bytes of a stored chunk of this size that are its bits, counted from its beginning; empty for
// a size that no chunk has.
struct ChunkBits {
  int begin, end;
};
FLASH_LLM_HOST_DEVICE constexpr ChunkBits chunk_bits(int64_t units) {
  if (is_two_four(units)) return {0, kTwoFourBitsBytes};
  const int rows = chunk_value_rows(units);
  return rows < 0 ? ChunkBits{0, 0}
                  : ChunkBits{rows * kChunkRowBytes, rows * kChunkRowBytes + kChunkBitsBytes};
}

// The kind of a pair, from the units that all its chunks take as plain and as 2:4 chunks. 2:4 is
// chosen if it takes at most a 64th more bytes, which is the case from 83 % zeros on, because it
// needs three quarters of the instructions. (Measured at 80, 85 and 90 % zeros, in us: 8 tokens
// plain 43.9 44.6 44.3, 2:4 42.2 38.2 36.0; 64 tokens, where the residual costs more, plain 72.7
// 74.1 73.8, 2:4 86.3 76.1 70.9.) A pair with a chunk over kMaxChunkUnits cannot be 2:4; callers
// check that.
FLASH_LLM_HOST_DEVICE constexpr bool prefers_two_four(int64_t plain_units, int64_t two_four_units) {
  return two_four_units > 0 && 64 * two_four_units <= 65 * plain_units;
}

// Row and column within the chunk of an element of a plain chunk: see above.
FLASH_LLM_HOST_DEVICE constexpr int chunk_row(int strip, int lane, int elem) {
  return strip * kStripM + (lane >> 2) + (elem >> 1) * 8;
}
FLASH_LLM_HOST_DEVICE constexpr int chunk_col(int half, int lane, int quad, int elem) {
  return half * kHalfK + (quad >> 1) * 16 + (quad & 1) * 8 + (lane & 3) * 2 + (elem & 1);
}
FLASH_LLM_HOST_DEVICE constexpr int chunk_bit(int quad, int elem) { return elem * 8 + quad; }

// The order of a quad's elements in a run: 0, 1, 3, 2.
FLASH_LLM_HOST_DEVICE constexpr int quad_order(int i) { return i ^ (i >> 1); }

// First column, within a 2:4 chunk, of the groups whose slots a quad has (chunk_row gives their
// rows); and the order of quads in a run.
FLASH_LLM_HOST_DEVICE constexpr int two_four_col(int half, int lane, int quad) {
  return (quad & 3) * 64 + half * 32 + (quad >> 2) * 16 + (lane & 3) * 4;
}
FLASH_LLM_HOST_DEVICE constexpr int two_four_quad_order(int i) { return (i >> 1) + (i & 1) * 4; }

// The nibble of a group with bits `group` (4 bits): its low two bits are the column of slot 0, its
// high two bits that of slot 1.
FLASH_LLM_HOST_DEVICE constexpr int two_four_nibble(int group) {
  const bool b0 = (group & 1) != 0, b1 = (group & 2) != 0, b2 = (group & 4) != 0;
  const int first = b0 ? 0 : b1 ? 1 : 2;
  const int second = b0 && b1 ? 1 : b2 && (b0 || b1) ? 2 : 3;
  return first | second << 2;
}

// Rows of the residual whose columns of X are loaded at once; residual offset and class of a column
// (see above), and the column of a residual offset.
inline constexpr int kPhaseRows = 8;
FLASH_LLM_HOST_DEVICE constexpr int residual_offset(int col) { return 16 * (col ^ (col / 8 % 8)); }
FLASH_LLM_HOST_DEVICE constexpr int residual_class(int col) {
  return residual_offset(col) / 16 % 8;
}
FLASH_LLM_HOST_DEVICE constexpr int residual_column(int offset) {
  return residual_offset(offset / 16) / 16;
}

// Converts a lane's four words of a 2:4 chunk's bits between words of 64 columns each (bit 4 n + k
// of word p) and those that are stored (bit 4 n + p of word k), in either direction: nibble n of
// the four words is transposed as 4 x 4 bits.
FLASH_LLM_HOST_DEVICE constexpr void swap_two_four_words(uint32_t* words) {
  for (int i = 0; i < 4; i += 2) {
    const uint32_t differ = (words[i] >> 1 ^ words[i + 1]) & 0x55555555U;
    words[i] ^= differ << 1;
    words[i + 1] ^= differ;
  }
  for (int i = 0; i < 2; ++i) {
    const uint32_t differ = (words[i] >> 2 ^ words[i + 2]) & 0x33333333U;
    words[i] ^= differ << 2;
    words[i + 2] ^= differ;
  }
}

// The pairings that packing tries. Where popcount(c & p) is odd, pattern p puts the downward runs
// in column c into the slot of the other strip: strip i's into slot 1 - i. Eight patterns save
// 1.5 % of the bytes at 50 % zeros; sixteen would save 0.2 % more.
inline constexpr int kSwapPatterns = 8;
FLASH_LLM_HOST_DEVICE constexpr bool swaps_slots(int pattern, int column) {
  const int bits = pattern & column;
  return ((bits ^ (bits >> 1) ^ (bits >> 2)) & 1) != 0;
}

// The format's row of format/packed_format.h, which says what each of them does.
Status bitmap_count(const uint16_t* dense, int64_t ld, int64_t m, int64_t k,
                    const ParallelFor& parallel_for, int32_t* offsets, int64_t* nnz);
Status bitmap_pack(const uint16_t* dense, int64_t ld, int64_t m, int64_t k, const int32_t* offsets,
                   int64_t nnz, const ParallelFor& parallel_for, uint32_t* payload);
void bitmap_unpack_tile_row(const PackedView& view, int64_t tile_row, uint16_t* dense);
int64_t bitmap_count_stored(const PackedView& view, const ParallelFor& parallel_for);
Status bitmap_check_sizes(const PackedHeader& header, int64_t num_offsets, int64_t payload_words);
Status bitmap_validate(const PackedView& view, const ParallelFor& parallel_for);

}  // namespace flash_llm
