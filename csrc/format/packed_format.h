// A packed weight as the kernels see it, and the table of formats: the functions that every format
// implements on the host. Code that handles packed weights of any format (csrc/torch, the CPU
// oracle, the fuzzer) calls them through this table, so a new format is a pair of files and one
// row.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "base/parallel.h"
#include "base/status.h"
#include "format/packed_header.h"

namespace flash_llm {

// The caller owns the buffers. A tile is the format's unit of storage.
struct PackedView {
  int64_t m = 0;
  int64_t k = 0;
  int64_t nnz = 0;
  const int32_t* offsets = nullptr;   // [tiles + 1]; where each tile begins in the payload
  const uint32_t* payload = nullptr;  // [payload_words]
  int64_t payload_words = 0;
  ValueType value_type = ValueType::kFloat16;
};

// A matrix to pack: values as they are stored, and their scales. The caller owns the memory.
struct ValueMatrix {
  const void* values = nullptr;  // raw patterns (RawOf in format/element.h), [m, k]
  int64_t ld = 0;                // row stride, in elements
  int64_t m = 0;
  int64_t k = 0;
  ValueType type = ValueType::kFloat16;
  // [m, scales_per_row(type, k)], contiguous: positive normal numbers, also of the type that stores
  // them; null for types without scales.
  const float* scales = nullptr;

  // Raw is the type's RawOf: uint16_t or uint8_t.
  template <typename Raw>
  const Raw* row(int64_t i) const {
    return static_cast<const Raw*>(values) + i * ld;
  }
};

struct PackedFormat {
  Format id;
  const char* name;
  // The version that is written, raised when the meaning of any stored byte changes. Readers know
  // all versions from 1 up to it and refuse others.
  int64_t version;
  // Rows of a tile, and its columns for a value type. Tiles are stored tile row by tile row.
  int tile_m;
  int (*tile_k)(ValueType type);
  int unit_words;  // offsets count in units of this many payload words
  // If a and b are multiples of this, the bytes of rows [a, b) do not depend on other rows: such a
  // slice is a copy of a part of offsets and payload.
  int slice_rows;
  EnumSet<ValueType> value_types;  // that the format can hold
  // Estimated bytes per element of a weight with values of `value_bits` bits in which the fraction
  // `density` of the elements is not zero. format="auto" compares the formats by it.
  double (*bytes_per_element)(double density, int value_bits);

  // In the following functions the value type is one of `value_types`.

  // Pass 1 of packing: fills offsets[tiles + 1] and *nnz from a matrix. Fails if there are more
  // units than 31 bits can address.
  Status (*count)(const ValueMatrix& matrix, const ParallelFor& parallel_for, int32_t* offsets,
                  int64_t* nnz);
  // Pass 2: writes payload[unit_words * offsets[tiles]]. `offsets` and `nnz` come from pass 1.
  // Fails, without writing outside the payload, if the matrix has changed since pass 1: the caller
  // cannot keep other threads from changing it.
  Status (*pack)(const ValueMatrix& matrix, const int32_t* offsets, int64_t nnz,
                 const ParallelFor& parallel_for, uint32_t* payload);
  // Writes one tile row as it is stored: every value as its RawOf, [min(tile_m, rows left), k],
  // contiguous, with zeros where none is stored; and, if the value type has scales, those of each
  // of the rows, [rows, scales_per_row]. Safe on any buffers that check_sizes accepts; the result
  // for malformed ones is unspecified.
  void (*unpack_tile_row)(const PackedView& view, int64_t tile_row, void* values, float* scales);
  // The number of stored values; safe on the same buffers.
  int64_t (*count_stored)(const PackedView& view, const ParallelFor& parallel_for);
  // The cheap check of every call: buffer lengths against the shape. Reads no buffer.
  Status (*check_sizes)(const PackedHeader& header, int64_t num_offsets, int64_t payload_words);
  // The full check, of every invariant of the format, on host buffers of checked sizes.
  Status (*validate)(const PackedView& view, const ParallelFor& parallel_for);

  constexpr int64_t tile_rows(int64_t m) const { return (m + tile_m - 1) / tile_m; }
  int64_t tile_cols(ValueType type, int64_t k) const {
    return (k + tile_k(type) - 1) / tile_k(type);
  }
  int64_t tiles(ValueType type, int64_t m, int64_t k) const {
    return tile_rows(m) * tile_cols(type, k);
  }
};

inline constexpr int kNumFormats = 5;

const std::array<PackedFormat, kNumFormats>& all_formats();

// `id` must come from one of the two functions below.
const PackedFormat& packed_format(Format id);

// The format for a number in a header, and for a name.
Status format_of(int64_t number, const PackedFormat** out);
Status parse_format(const std::string& name, Format* out);

// Fails if the format cannot hold values of this type.
Status check_holds(const PackedFormat& format, ValueType type);

// Unpacks the tile rows first ... last - 1 to dense[rows, k] (contiguous), in the 16-bit type of
// the weight.
void unpack_tile_rows(const PackedFormat& format, const PackedView& view, int64_t first,
                      int64_t last, const ParallelFor& parallel_for, uint16_t* dense);

// Unpacks all of dense[m, k].
void unpack(const PackedFormat& format, const PackedView& view, const ParallelFor& parallel_for,
            uint16_t* dense);

// Unpacks values[m, k] and, for types with scales, scales[m, scales_per_row], both contiguous.
// For other types `scales` may be null.
void unpack_values(const PackedFormat& format, const PackedView& view,
                   const ParallelFor& parallel_for, void* values, float* scales);

}  // namespace flash_llm
