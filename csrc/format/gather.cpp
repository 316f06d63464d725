#include "format/gather.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "format/element.h"
#include "format/gather_order.h"
#include "format/packed_checks.h"

namespace flash_llm {
namespace {

constexpr int kUnitBytes = kGatherUnitWords * 4;

// The part of the matrix that a tile covers; smaller at the edges.
struct TileExtent {
  int64_t row0, col0;
  int rows, cols;
};

int64_t tile_cols_of(int64_t k) { return (k + kGatherTileK - 1) / kGatherTileK; }
int64_t tiles_of(int64_t m, int64_t k) {
  return (m + kGatherTileM - 1) / kGatherTileM * tile_cols_of(k);
}

TileExtent tile_extent(int64_t tile, int64_t m, int64_t k) {
  const int64_t row0 = tile / tile_cols_of(k) * kGatherTileM;
  const int64_t col0 = tile % tile_cols_of(k) * kGatherTileK;
  return {row0, col0, static_cast<int>(std::min<int64_t>(kGatherTileM, m - row0)),
          static_cast<int>(std::min<int64_t>(kGatherTileK, k - col0))};
}

int64_t units_of_bytes(int64_t bytes) { return (bytes + kUnitBytes - 1) / kUnitBytes; }

// Bytes before the slices: rows and quads.
int64_t directory_bytes(int slices) {
  return (units_of_bytes(int64_t{slices} * kGatherSliceRows * 2) +
          units_of_bytes(int64_t{slices} * 2)) *
         kUnitBytes;
}

// A tile's bytes, whole units; none if it has no nonzeros. Sets *changed if an element was
// found to be a nonzero and had become zero when it was stored.
std::vector<uint8_t> pack_tile(const uint16_t* dense, int64_t ld, const TileExtent& extent,
                               int64_t* nnz, bool* changed) {
  const uint16_t* tile = dense + extent.row0 * ld + extent.col0;
  const int slices = gather_slices(extent.rows), words = (extent.cols + 31) / 32;
  const auto row_words = static_cast<size_t>(words);
  // Which elements are nonzeros, and how many they are in each row.
  std::vector<uint32_t> bits(static_cast<size_t>(slices) * kGatherSliceRows * row_words);
  std::vector<int> counts(static_cast<size_t>(slices) * kGatherSliceRows);
  for (int row = 0; row < extent.rows; ++row) {
    uint32_t* const own = bits.data() + static_cast<size_t>(row) * row_words;
    for (int col = 0; col < extent.cols; ++col) {
      const bool stored = !is_zero(tile[row * ld + col]);
      own[col / 32] |= static_cast<uint32_t>(stored) << col % 32;
      counts[static_cast<size_t>(row)] += stored ? 1 : 0;
    }
  }
  *nnz = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  if (*nnz == 0) return {};
  std::vector<uint16_t> order(counts.size()), quads(static_cast<size_t>(slices));
  std::iota(order.begin(), order.end(), uint16_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](uint16_t a, uint16_t b) { return counts[a] > counts[b]; });
  std::vector<uint8_t> bytes(static_cast<size_t>(directory_bytes(slices)));
  std::vector<uint32_t> slice_bits(kGatherSliceRows * row_words);
  GatherOrderState state;
  for (size_t slice = 0; slice < quads.size(); ++slice) {
    const uint16_t* const rows = order.data() + slice * kGatherSliceRows;
    for (size_t i = 0; i < kGatherSliceRows; ++i) {
      std::copy_n(bits.data() + rows[i] * row_words, row_words, slice_bits.data() + i * row_words);
    }
    const auto bytes_of = [&](int quad) {
      if (quad % kGatherSegmentQuads == 0) bytes.resize(bytes.size() + kGatherHeadBytes);
      bytes.resize(bytes.size() + kGatherQuadBytes);
      return bytes.data() + bytes.size() - kGatherQuadBytes;
    };
    const auto value_of = [&](int row, int col) {
      const uint16_t value = tile[rows[row] * ld + col];
      if (is_zero(value)) *changed = true;
      return value;
    };
    GatherOrder slice_order(state, slice_bits.data(), words, extent.cols);
    quads[slice] = static_cast<uint16_t>(slice_order.store(bytes_of, value_of));
  }
  std::memcpy(bytes.data(), order.data(), order.size() * 2);
  std::memcpy(bytes.data() + units_of_bytes(static_cast<int64_t>(order.size()) * 2) * kUnitBytes,
              quads.data(), quads.size() * 2);
  return bytes;
}

// A tile's parts. `rows` is null if the tile has no bytes or, in a malformed weight, lies outside
// the payload or is too short for its directory. `end` is the end of the tile.
struct Tile {
  const uint16_t* rows = nullptr;   // [8 slices]
  const uint16_t* quads = nullptr;  // [slices], then zeros up to `slices`
  const uint8_t* slices = nullptr;
  const uint8_t* end = nullptr;
};

Tile tile_parts(const PackedView& view, int64_t tile, const TileExtent& extent) {
  const int64_t begin = int64_t{view.offsets[tile]} * kGatherUnitWords;
  const int64_t end = int64_t{view.offsets[tile + 1]} * kGatherUnitWords;
  const int slices = gather_slices(extent.rows);
  if (begin < 0 || end > view.payload_words ||
      (end - begin) * 4 < std::max<int64_t>(directory_bytes(slices), 1)) {
    return {};
  }
  const auto* bytes = reinterpret_cast<const uint8_t*>(view.payload + begin);
  Tile parts;
  parts.rows = reinterpret_cast<const uint16_t*>(bytes);
  parts.quads = reinterpret_cast<const uint16_t*>(
      bytes + units_of_bytes(int64_t{slices} * kGatherSliceRows * 2) * kUnitBytes);
  parts.slices = bytes + directory_bytes(slices);
  parts.end = bytes + (end - begin) * 4;
  return parts;
}

// Calls visit(position, column, value, step in the segment, step in column) for each stored step,
// fillers included; stops at the tile's end. Returns where the slices end, null if beyond the tile.
template <typename Visit>
const uint8_t* visit_steps(const Tile& tile, int slices, const Visit& visit) {
  const uint8_t* at = tile.slices;
  for (int slice = 0; slice < slices; ++slice) {
    const int quads = tile.quads[slice];
    if (gather_slice_bytes(quads) > tile.end - at) return nullptr;
    std::array<int, kGatherLanes> cols{};
    for (int quad = 0; quad < quads; ++quad) {
      if (quad % kGatherSegmentQuads == 0) {
        for (size_t lane = 0; lane < kGatherLanes; ++lane) {
          uint16_t first;
          std::memcpy(&first, at + 2 * lane, sizeof(first));
          cols[lane] = first;
        }
        at += kGatherHeadBytes;
      }
      for (size_t lane = 0; lane < kGatherLanes; ++lane) {
        for (size_t i = 0; i < kGatherQuadSteps; ++i) {
          const size_t index = lane * kGatherQuadSteps + i;
          const auto step = static_cast<int8_t>(at[index]);
          uint16_t value;
          std::memcpy(&value, at + kGatherQuadStepBytes + 2 * index, sizeof(value));
          cols[lane] += step;
          visit(slice * kGatherSliceRows + static_cast<int>(lane) / kGatherRuns, cols[lane], value,
                quad % kGatherSegmentQuads * kGatherQuadSteps + static_cast<int>(i), step);
        }
      }
      at += kGatherQuadBytes;
    }
  }
  return at;
}

// What is wrong with a tile, or ""; adds its nonzeros to *nnz.
std::string tile_problem(const PackedView& view, int64_t tile, int64_t* nnz) {
  if (view.offsets[tile] == view.offsets[tile + 1]) return "";
  const TileExtent extent = tile_extent(tile, view.m, view.k);
  const int slices = gather_slices(extent.rows), positions = slices * kGatherSliceRows;
  const Tile parts = tile_parts(view, tile, extent);
  if (parts.rows == nullptr) return "is too short for its rows and quads";
  std::vector<bool> seen(static_cast<size_t>(positions));
  for (int i = 0; i < positions; ++i) {
    const int row = parts.rows[i];
    if (row >= positions || seen[static_cast<size_t>(row)]) {
      return "row " + std::to_string(row) + " at position " + std::to_string(i) +
             " lies outside the tile or occurs twice";
    }
    seen[static_cast<size_t>(row)] = true;
  }
  const auto* quads_end = reinterpret_cast<const uint16_t*>(parts.slices);
  if (std::any_of(parts.quads + slices, quads_end, [](uint16_t value) { return value != 0; })) {
    return "padding after the quads must be 0";
  }
  std::string problem;
  std::vector<bool> stored(static_cast<size_t>(extent.rows) * static_cast<size_t>(extent.cols));
  int64_t count = 0;
  const auto check = [&](int position, int col, uint16_t value, int step, int delta) {
    if (!problem.empty()) return;
    if (step == 0 && delta != 0) problem = "the first step of a segment must be 0";
    // Every column is loaded, also that of a filler.
    if (col < 0 || col >= extent.cols) {
      problem = "column " + std::to_string(col) + " lies outside the tile's " +
                std::to_string(extent.cols);
    }
    if (!problem.empty() || value == 0) return;
    const int row = parts.rows[position];
    const std::string where = "row " + std::to_string(row) + ", column " + std::to_string(col);
    if (row >= extent.rows) {
      problem = where + " lies outside the matrix";
      return;
    }
    if (is_zero(value)) problem = where + ": a stored value must not be -0";
    const size_t element =
        static_cast<size_t>(row) * static_cast<size_t>(extent.cols) + static_cast<size_t>(col);
    if (stored[element]) problem = where + " occurs twice";
    stored[element] = true;
    ++count;
  };
  const uint8_t* end = visit_steps(parts, slices, check);
  if (!problem.empty()) return problem;
  if (end != parts.end) return "is not as long as its quads say";
  if (count == 0) return "must have no bytes without nonzeros";
  *nnz += count;
  return "";
}

}  // namespace

Status gather_count(const ValueMatrix& matrix, const ParallelFor& parallel_for, int32_t* offsets,
                    int64_t* nnz) {
  const auto* dense = matrix.row<uint16_t>(0);
  const int64_t ld = matrix.ld, m = matrix.m, k = matrix.k;
  // How many fillers a run needs depends on its order, so counting packs.
  const int64_t tiles = tiles_of(m, k);
  std::vector<int64_t> bytes(static_cast<size_t>(tiles)), stored(static_cast<size_t>(tiles));
  parallel_for(tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const auto i = static_cast<size_t>(tile);
      bool changed = false;  // packing finds out
      const TileExtent extent = tile_extent(tile, m, k);
      bytes[i] = static_cast<int64_t>(pack_tile(dense, ld, extent, &stored[i], &changed).size());
    }
  });
  *nnz = std::accumulate(stored.begin(), stored.end(), int64_t{0});
  return fill_offsets(
      m, k, tiles, [&](int64_t tile) { return units_of_bytes(bytes[static_cast<size_t>(tile)]); },
      offsets);
}

Status gather_pack(const ValueMatrix& matrix, const int32_t* offsets, int64_t nnz,
                   const ParallelFor& parallel_for, uint32_t* payload) {
  const auto* dense = matrix.row<uint16_t>(0);
  const int64_t ld = matrix.ld, m = matrix.m, k = matrix.k;
  return pack_tiles(tiles_of(m, k), 1, nnz, parallel_for, [&](int64_t tile) -> int64_t {
    int64_t stored = 0;
    bool changed = false;
    const std::vector<uint8_t> bytes =
        pack_tile(dense, ld, tile_extent(tile, m, k), &stored, &changed);
    const auto units = units_of_bytes(static_cast<int64_t>(bytes.size()));
    if (changed || units != int64_t{offsets[tile + 1]} - offsets[tile]) return kTileChanged;
    if (units > 0) {
      std::memcpy(payload + int64_t{offsets[tile]} * kGatherUnitWords, bytes.data(), bytes.size());
    }
    return stored;
  });
}

void gather_unpack_tile_row(const PackedView& view, int64_t tile_row, void* values,
                            float* /*scales*/) {
  auto* dense = static_cast<uint16_t*>(values);
  const int64_t rows = std::min<int64_t>(kGatherTileM, view.m - tile_row * kGatherTileM);
  std::fill_n(dense, rows * view.k, uint16_t{0});
  for (int64_t tile_col = 0; tile_col < tile_cols_of(view.k); ++tile_col) {
    const int64_t tile = tile_row * tile_cols_of(view.k) + tile_col;
    const TileExtent extent = tile_extent(tile, view.m, view.k);
    const Tile parts = tile_parts(view, tile, extent);
    if (parts.rows == nullptr) continue;
    const auto write = [&](int position, int col, uint16_t value, int /*step*/, int /*delta*/) {
      const int row = parts.rows[position];
      if (value != 0 && row < extent.rows && col >= 0 && col < extent.cols) {
        dense[row * view.k + extent.col0 + col] = value;
      }
    };
    visit_steps(parts, gather_slices(extent.rows), write);
  }
}

Status gather_check_sizes(const PackedHeader& header, int64_t num_offsets, int64_t payload_words) {
  const int64_t tiles = tiles_of(header.m, header.k);
  if (Status status = check_lengths(header, tiles, num_offsets, payload_words); !status.ok()) {
    return status;
  }
  if (header.nnz > payload_words * 4 / 3 || (tiles == 0 && payload_words > 0)) {
    return nnz_does_not_fit(header, tiles, "tile");
  }
  return Status::success();
}

Status gather_validate(const PackedView& view, const ParallelFor& parallel_for) {
  const int64_t tiles = tiles_of(view.m, view.k);
  Status offsets = check_offsets(view, tiles, kGatherUnitWords,
                                 [](int64_t, int64_t) { return Status::success(); });
  if (!offsets.ok()) return offsets;
  return check_tiles(view, tiles, "tile", parallel_for, tile_check(view, tile_problem));
}

int64_t gather_count_stored(const PackedView& view, const ParallelFor& parallel_for) {
  return sum_over(tiles_of(view.m, view.k), 1, parallel_for, [&](int64_t tile) {
    const TileExtent extent = tile_extent(tile, view.m, view.k);
    const Tile parts = tile_parts(view, tile, extent);
    int64_t count = 0;
    if (parts.rows == nullptr) return count;
    visit_steps(parts, gather_slices(extent.rows),
                [&](int, int, uint16_t value, int, int) { count += value != 0; });
    return count;
  });
}

}  // namespace flash_llm
