// A packed weight as the kernels see it, and the table of formats: what every format must be able
// to do on the host. Whoever handles packed weights in general (csrc/torch, the CPU oracle, the
// fuzzer) goes through this table, so that a new format is a pair of files and one row of it.
#pragma once

#include <cstdint>
#include <string>

#include "core/packed_header.h"
#include "core/parallel.h"
#include "core/status.h"

namespace flash_llm {

// The caller owns the buffers. A tile is the format's unit of storage.
struct PackedView {
  int64_t m = 0;
  int64_t k = 0;
  int64_t nnz = 0;
  const int32_t* offsets = nullptr;   // [tiles + 1]; where each tile's part of the payload begins
  const uint32_t* payload = nullptr;  // [payload_words]
  int64_t payload_words = 0;
};

struct PackedFormat {
  Format id;
  const char* name;
  int tile_m, tile_k;  // rows and columns of a tile; tiles are stored tile row by tile row
  int unit_words;      // offsets count in units of this many payload words

  // Pass 1 of packing: fills offsets[tiles + 1] and *nnz from dense[m, k] (row stride `ld`, in
  // elements, raw 16-bit patterns). Fails when the units would not be addressable with 31 bits.
  Status (*count)(const uint16_t* dense, int64_t ld, int64_t m, int64_t k,
                  const ParallelFor& parallel_for, int32_t* offsets, int64_t* nnz);
  // Pass 2: writes payload[unit_words * offsets[tiles]]. `offsets` and `nnz` come from pass 1.
  // Fails, having written nothing outside the payload, where `dense` no longer is what pass 1 saw:
  // the caller cannot keep other threads from changing it.
  Status (*pack)(const uint16_t* dense, int64_t ld, int64_t m, int64_t k, const int32_t* offsets,
                 int64_t nnz, const ParallelFor& parallel_for, uint32_t* payload);
  // Writes every element of one tile row: dense is [min(tile_m, rows left), k], contiguous. Safe on
  // any buffer that check_sizes accepts; what a malformed one unpacks to is unspecified.
  void (*unpack_tile_row)(const PackedView& view, int64_t tile_row, uint16_t* dense);
  // The cheap check of every call: buffer lengths against the shape, nothing is read.
  Status (*check_sizes)(const PackedHeader& header, int64_t num_offsets, int64_t payload_words);
  // The check in depth, on host buffers of checked sizes: every invariant of the format.
  Status (*validate)(const PackedView& view, const ParallelFor& parallel_for);

  int64_t tile_rows(int64_t m) const { return (m + tile_m - 1) / tile_m; }
  int64_t tile_cols(int64_t k) const { return (k + tile_k - 1) / tile_k; }
  int64_t tiles(int64_t m, int64_t k) const { return tile_rows(m) * tile_cols(k); }
};

Status parse_format(const std::string& name, Format* out);

// `id` must come from a checked header.
const PackedFormat& packed_format(Format id);

// Unpacks all of dense[m, k] (contiguous).
void unpack(const PackedFormat& format, const PackedView& view, const ParallelFor& parallel_for,
            uint16_t* dense);

}  // namespace flash_llm
