// Row bitmap: one bit per element and one value of 16, 8 or 4 bits per nonzero, stored in the order
// in which a CPU kernel reads them: block of rows after block of rows.
//
// The weight W[M, K] is cut into blocks of 4 rows, and each row into groups of 32 columns. One
// vector instruction (AVX-512 VBMI2 vpexpandw) expands a group's values by its mask into the 32
// elements. A kernel multiplies the groups of the four rows of a block by one load of X.
//
//   offsets  int32[blocks + 1], in units of 16 bytes; offsets[0] = 0, never decreasing,
//            offsets[blocks] = payload_words / 4
//   payload  the blocks' words. A block without nonzeros has none, any other has
//              word 0   of 16-bit values the smallest without their signs, as an integer; else 0
//              scales   only for value types with scales: fp32[4 rows], or of int4 values
//                       fp16[groups of 128 columns][4 rows]
//              masks    uint32[groups][4 rows]: bit c of group j of a row says whether the element
//                       of column 32 j + c is stored
//              values   uint16, uint8 or nibbles, in the order of the masks: group by group, in
//                       each group row by row, in each row by rising column
//              zeros    up to the next unit
//
// A nibble is an int4 value + 8. The nibbles of each row of each group begin at a byte, the first
// in its low half; behind an odd number of them follows a nibble of 0.
//
// So at 50 % zeros a large weight's payload has 0.1 % more bytes than its bits and nonzeros alone
// need. A kernel reads two streams, masks and values, from one end to the other; where a group's
// values begin depends on nothing but the masks before it.
//
// Word 0 decides whether bf16 values may be multiplied by an instruction that treats subnormals as
// zeros: it gives the same result if no product of the block can be subnormal
// (cpu/row_bitmap_spmm.cpp).
//
// A kernel may load the bytes of 32 values where a group has fewer, but not within 64 bytes of the
// payload's end: there is no padding behind it.
//
// Invariants (row_bitmap_validate checks all of them): a block is as long as its masks say, word 0
// is right, bits outside the matrix are 0, no stored value is ±0 (nor -128 of int8, NaN of fp8, -8
// of int4), what follows the last value is 0, a block with words has a bit, the number of bits is
// nnz, and scales are positive normal numbers. One that no value has, in or outside the matrix,
// is 1. Packing is canonical: a matrix of values and scales has one packed form.
#pragma once

#include <cstdint>

#include "base/cpu_isa.h"
#include "base/parallel.h"
#include "base/status.h"
#include "format/packed_format.h"
#include "format/packed_header.h"

namespace flash_llm {

inline constexpr int64_t kBlockRows = 4;
inline constexpr int64_t kGroupCols = 32;
inline constexpr int kBlockUnitWords = 4;

constexpr int64_t num_row_blocks(int64_t m) { return (m + kBlockRows - 1) / kBlockRows; }
constexpr int64_t num_groups(int64_t k) { return (k + kGroupCols - 1) / kGroupCols; }

// The number of rows of a block that lie inside the matrix.
constexpr int rows_of_block(int64_t m, int64_t block) {
  const int64_t left = m - block * kBlockRows;
  return static_cast<int>(left < kBlockRows ? left : kBlockRows);
}

// Words of a block before its masks: word 0 and the scales.
constexpr int64_t row_block_head_words(ValueType type, int64_t k) {
  return 1 + scales_per_row(type, k) * kBlockRows * scale_bytes(type) / 4;
}

// The index among a block's scales of that of column `col` in a row.
constexpr int64_t row_block_scale(ValueType type, int64_t row, int64_t col) {
  return scale_group(type, col) * kBlockRows + row;
}

// Bytes of the values of a row in a group that stores `count` of them.
constexpr int64_t group_bytes(ValueType type, int64_t count) {
  return (count * value_traits(type).bits + 7) / 8;
}

// A block's parts. `masks` is null if the block has no words or, in a malformed weight, lies
// outside the payload. `end` is the end of the payload. There may be fewer values up to it than the
// masks say, so readers must check. Raw is the type's RawOf; nibbles are read as bytes.
template <typename Raw>
struct RowBlockOf {
  const uint32_t* masks = nullptr;  // [groups][kBlockRows]
  const Raw* values = nullptr;
  const Raw* end = nullptr;
  uint32_t smallest = 0;             // word 0
  const uint32_t* scales = nullptr;  // for load_scale; only for types with scales
};
using RowBlock = RowBlockOf<uint16_t>;

// The result of packing a block: word 0, and the end of its values, null if they did not fit.
struct PackedBlock {
  uint32_t smallest = 0;
  const uint16_t* end = nullptr;
};

template <typename Raw = uint16_t>
RowBlockOf<Raw> row_block(const PackedView& view, int64_t block) {
  if (view.k == 0 || view.payload == nullptr) return {};  // without columns there are no offsets
  const int64_t begin = int64_t{view.offsets[block]} * kBlockUnitWords;
  const int64_t head_words = row_block_head_words(view.value_type, view.k);
  const int64_t mask_words = num_groups(view.k) * kBlockRows;
  if (view.offsets[block + 1] <= view.offsets[block] || begin < 0 ||
      begin + head_words + mask_words > view.payload_words) {
    return {};
  }
  const uint32_t* words = view.payload + begin;
  const uint32_t* masks = words + head_words;
  return {masks, reinterpret_cast<const Raw*>(masks + mask_words),
          reinterpret_cast<const Raw*>(view.payload + view.payload_words), words[0], words + 1};
}

// The format's row of format/packed_format.h, which says what each of them does.
Status row_bitmap_count(const ValueMatrix& matrix, const ParallelFor& parallel_for,
                        int32_t* offsets, int64_t* nnz);
Status row_bitmap_pack(const ValueMatrix& matrix, const int32_t* offsets, int64_t nnz,
                       const ParallelFor& parallel_for, uint32_t* payload);
// Decodes a block that has masks into dense[rows, k], contiguous.
void row_bitmap_decode_block(const RowBlock& block, int rows, int64_t k, uint16_t* dense);
// Packs `rows` rows of k columns with row stride `ld`: writes masks[groups][4 rows], which must be
// all zero before, and one value for each nonzero, but nothing at `end` or beyond. For 16-bit
// values.
using RowBitmapPackBlock = PackedBlock (*)(const uint16_t* dense, int64_t ld, int rows, int64_t k,
                                           uint32_t* masks, uint16_t* values, const uint16_t* end);
// The portable one, in C++.
PackedBlock row_bitmap_pack_block(const uint16_t* dense, int64_t ld, int rows, int64_t k,
                                  uint32_t* masks, uint16_t* values, const uint16_t* end);
// The fastest packer for `isa`, which this CPU must have; all write the same bytes. Defined in
// cpu/.
RowBitmapPackBlock row_bitmap_block_packer(CpuIsa isa);
void row_bitmap_unpack_block(const PackedView& view, int64_t block, void* values, float* scales);
int64_t row_bitmap_count_stored(const PackedView& view, const ParallelFor& parallel_for);
Status row_bitmap_check_sizes(const PackedHeader& header, int64_t num_offsets,
                              int64_t payload_words);
Status row_bitmap_validate(const PackedView& view, const ParallelFor& parallel_for);

}  // namespace flash_llm
