// Quantised bitmap: one bit per element and one byte or nibble per nonzero, stored as the tensor
// cores of a GPU take them. It holds values that have scales.
//
// The weight W[M, K] is cut into strips of 16 rows, and each strip into chunks. A chunk is one
// plane of 256 columns or, of int4 values, two of them, side by side: 512 columns.
//
//   offsets  int32[chunks + 1], in units of 32 bytes; offsets[0] = 0, never decreasing,
//            offsets[chunks] = payload_words / 8. Chunks are in the order of strips, and in a strip
//            by rising column, so a strip is one contiguous range.
//   payload  the chunks' bytes. A chunk without nonzeros has none. A strip with nonzeros begins,
//            before its first chunk (in which case the first chunk's bytes include them), with
//              scales   fp32[16], one for each row; of int4 values fp16[groups of 128 columns][16]
//            and a chunk has
//              values   R rows of 32 words, 128 bytes each, which the planes share
//              bits     uint32[planes][4][32 lanes]
//              columns  uint8[planes][32 lanes], 4 * column of the lane's downward run
//
// Elements. A plane is 16 fragments of 16 rows by 16 columns. In fragment (q, j), columns 64 q + 16
// j and the next 15, lane l = 4 g + t holds the 8 elements of columns 4 t + e (e = 0 ... 3) in rows
// g (the low ones) and g + 8 (the high ones). Bit 4 e + j of word q of the lane says whether the
// low element e is stored, bit 16 + 4 e + j whether the high one is. So one mask selects the bits
// of a fragment, one in each nibble, and one multiplication makes byte selectors of them
// (cuda/quantized_bitmap/decode.cuh). In this order 8 elements are the registers of
// mma.m16n8k32 for bytes, and those of mma.m16n8k16 if columns 4 t + 2 and 4 t + 3 stand for its
// columns 2 t + 8 and 2 t + 9.
//
// Runs. The values of a lane's words 0 and 1 are its upward run, those of words 2 and 3 its
// downward run: fragment by fragment, in each the low elements by rising e and then the high ones
// by falling e. In that order the low ones can be read forward from the fragment's begin and the
// high ones backward from its end, so the decoder needs only the positions of the fragments. A
// column of the values is one word of each row, read as bytes. Lane l's upward run fills column l
// from its first byte on; its downward run fills another column from the last byte backward:
//
//              column 0         column 1              column 31
//           +--+--+--+--+    +--+--+--+--+         +--+--+--+--+
//  row R-1  | d| d| d|D0|    |  | d| d|D0|         | d| d| d|D0|
//   ...     | u| d| d| d|    |  |  |  |  |   ...   |  |  |  |  |
//  row 0    |U0| u| u| u|    |U0| u| u|  |         |U0| u|  |  |
//           +--+--+--+--+    +--+--+--+--+         +--+--+--+--+
//
// The columns of the downward runs are distinct, so in any one load every lane reads another bank
// of shared memory. Pairing long runs with short ones keeps R small.
//
// A byte of a value is value + 128 for int8 (in registers a byte that is not stored is set to 128,
// so subtracting 128 from all gives zeros there), and the number itself for fp8 (where a byte that
// is not stored is 0).
//
// int4. Plane 0 is the low nibbles of the values' bytes, plane 1 the high ones; a nibble is value +
// 8. Each plane has bits, runs and columns as if it were a chunk of its own, of the R rows that the
// fuller one of them needs. A byte without its low nibble is 16 * value + 128: the byte of an int8
// value that is 16 times as large. The windows of plane 0 begin 4 bits earlier. Two words of bits
// are one group of columns that share scales.
//
// Invariants (quantized_bitmap_validate checks all of them): a chunk has units for the rows that
// its bits and columns need, and as few as possible; bits outside the matrix are 0; bytes and
// nibbles of the values outside the runs are 0; no value is 0, -128 (int8), -8 (int4) or NaN; a
// strip with bytes has a nonzero; the number of bits is nnz; scales are positive normal numbers,
// and one that no value has, in or outside the matrix, is 1. Packing is canonical: with the lanes
// of a plane sorted by (length, lane), the longest downward run goes on top of the shortest upward
// run, the second longest on the second shortest and so on.
#pragma once

#include <cstdint>

#include "base/host_device.h"
#include "base/parallel.h"
#include "base/status.h"
#include "format/packed_format.h"
#include "format/packed_header.h"

namespace flash_llm {

inline constexpr int kQuantStripM = 16;
inline constexpr int kQuantPlaneK = 256;
inline constexpr int kQuantMaxPlanes = 2;
inline constexpr int kQuantUnitBytes = 32;
inline constexpr int kQuantUnitWords = kQuantUnitBytes / 4;
inline constexpr int kQuantRowBytes = 128;                               // one row of values
inline constexpr int kQuantMaxRows = 32;                                 // every element stored
inline constexpr int kQuantBitsBytes = kQuantStripM * kQuantPlaneK / 8;  // of a plane
inline constexpr int kQuantColumnsBytes = 32;                            // of a plane
inline constexpr int kQuantRowUnits = kQuantRowBytes / kQuantUnitBytes;
inline constexpr int kQuantWords = 4;      // of bits, for each lane and plane
inline constexpr int kQuantFragments = 4;  // in a word
inline constexpr int kQuantZero = 128;     // the byte of an int8 value of 0

FLASH_LLM_HOST_DEVICE constexpr int quant_planes(ValueType type) {
  return value_traits(type).bits == 4 ? 2 : 1;
}
FLASH_LLM_HOST_DEVICE constexpr int quant_chunk_k(ValueType type) {
  return quant_planes(type) * kQuantPlaneK;
}
FLASH_LLM_HOST_DEVICE constexpr int64_t num_quant_strips(int64_t m) {
  return (m + kQuantStripM - 1) / kQuantStripM;
}
FLASH_LLM_HOST_DEVICE constexpr int64_t num_quant_chunks(ValueType type, int64_t k) {
  return (k + quant_chunk_k(type) - 1) / quant_chunk_k(type);
}

// Units of a strip's scales, of a chunk's bits and columns, and of the largest chunk (without
// scales).
FLASH_LLM_HOST_DEVICE constexpr int64_t quant_scale_units(ValueType type, int64_t k) {
  return scales_per_row(type, k) * kQuantStripM * scale_bytes(type) / kQuantUnitBytes;
}
FLASH_LLM_HOST_DEVICE constexpr int quant_fixed_units(ValueType type) {
  return quant_planes(type) * (kQuantBitsBytes + kQuantColumnsBytes) / kQuantUnitBytes;
}
FLASH_LLM_HOST_DEVICE constexpr int quant_max_units(ValueType type) {
  return kQuantMaxRows * kQuantRowUnits + quant_fixed_units(type);
}

// Rows of the values of a chunk of `units` units (without scales); -1 for a size that no chunk with
// nonzeros has.
FLASH_LLM_HOST_DEVICE constexpr int quant_value_rows(ValueType type, int64_t units) {
  const int64_t rest = units - quant_fixed_units(type);
  return rest > 0 && rest % kQuantRowUnits == 0 && units <= quant_max_units(type)
             ? static_cast<int>(rest / kQuantRowUnits)
             : -1;
}

// Row and column within the plane of an element, and its bit in word `word`.
FLASH_LLM_HOST_DEVICE constexpr int quant_row(int lane, int high) { return lane / 4 + 8 * high; }
FLASH_LLM_HOST_DEVICE constexpr int quant_col(int word, int fragment, int lane, int elem) {
  return 64 * word + 16 * fragment + 4 * (lane % 4) + elem;
}
FLASH_LLM_HOST_DEVICE constexpr int quant_bit(int fragment, int high, int elem) {
  return 16 * high + 4 * elem + fragment;
}

// The format's row of format/packed_format.h, which says what each of them does.
Status quantized_bitmap_count(const ValueMatrix& matrix, const ParallelFor& parallel_for,
                              int32_t* offsets, int64_t* nnz);
Status quantized_bitmap_pack(const ValueMatrix& matrix, const int32_t* offsets, int64_t nnz,
                             const ParallelFor& parallel_for, uint32_t* payload);
void quantized_bitmap_unpack_strip(const PackedView& view, int64_t strip, void* values,
                                   float* scales);
int64_t quantized_bitmap_count_stored(const PackedView& view, const ParallelFor& parallel_for);
Status quantized_bitmap_check_sizes(const PackedHeader& header, int64_t num_offsets,
                                    int64_t payload_words);
Status quantized_bitmap_validate(const PackedView& view, const ParallelFor& parallel_for);

}  // namespace flash_llm
