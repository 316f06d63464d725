#include "format/tiled_csl.h"

#include <algorithm>
#include <array>
#include <bitset>
#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "format/element.h"
#include "format/packed_checks.h"

namespace flash_llm {
namespace {

// The part of the matrix that a tile covers; smaller at the edges.
struct TileExtent {
  int64_t row0, col0;
  int rows, cols;
};

TileExtent tile_extent(int64_t tile, int64_t m, int64_t k) {
  const int64_t tile_cols = num_tile_cols(k);
  const int64_t row0 = tile / tile_cols * kTileM;
  const int64_t col0 = tile % tile_cols * kTileK;
  return {row0, col0, static_cast<int>(std::min<int64_t>(kTileM, m - row0)),
          static_cast<int>(std::min<int64_t>(kTileK, k - col0))};
}

int64_t round_up_to_vector(int64_t entries) {
  return (entries + kVectorEntries - 1) / kVectorEntries * kVectorEntries;
}

// The entries of one bank, by rising position; those from `head` on are not stored yet.
struct BankQueue {
  std::array<uint32_t, kTileElems / kNumBanks> entries;
  size_t end = 0;
  size_t head = 0;
  int words = 0;  // with entries from head on

  // Whether entries i and i + 1 exist and lie in one word.
  bool paired(size_t i) const { return i + 1 < end && entries[i] >> 17 == entries[i + 1] >> 17; }
  void push(uint32_t entry) {
    entries[end++] = entry;
    if (end == 1 || !paired(end - 2)) ++words;
  }
};

// Packs a tile. Returns its nonzeros, or kTileChanged if they do not fill `num_entries` entries.
int64_t pack_tile(const uint16_t* dense, int64_t ld, const TileExtent& extent, int num_entries,
                  uint32_t* entries) {
  std::array<BankQueue, kNumBanks> queues;
  std::array<uint16_t, kVectorEntries> free_positions{};  // the lowest; padding needs no more
  int num_free = 0, nnz = 0;
  for (int position = 0; position < kTileElems; ++position) {
    const int row = row_of_position(position), col = col_of_position(position);
    const bool inside = row < extent.rows && col < extent.cols;
    const uint16_t value =
        inside ? dense[(extent.row0 + row) * ld + extent.col0 + col] : uint16_t{0};
    if (!is_zero(value)) {
      queues[static_cast<size_t>(bank_of_position(position))].push(
          static_cast<uint32_t>(position) << 16 | value);
      ++nnz;
    } else if (num_free < kVectorEntries) {
      free_positions[static_cast<size_t>(num_free++)] = static_cast<uint16_t>(position);
    }
  }

  if (round_up_to_vector(nnz) != num_entries) return kTileChanged;

  int nth = 0;  // of the order in which entries are stored
  const auto emit = [&](uint32_t entry) { entries[storage_index(nth++, num_entries)] = entry; };
  while (nth < nnz) {                  // one round
    std::array<int, kNumBanks> order;  // the longest queue first, then the lowest bank
    for (int bank = 0; bank < kNumBanks; ++bank) {
      const auto i = static_cast<size_t>(bank);
      order[i] = queues[i].words * kNumBanks + kNumBanks - 1 - bank;
    }
    std::sort(order.begin(), order.end(), std::greater<>());
    int room = store_room(nth, num_entries);
    for (const int key : order) {
      BankQueue& queue = queues[static_cast<size_t>(kNumBanks - 1 - key % kNumBanks)];
      if (room == 0 || queue.words == 0) break;
      const int word = queue.paired(queue.head) ? 2 : 1, taken = std::min(word, room);
      for (int i = 0; i < taken; ++i) emit(queue.entries[queue.head++]);
      if (taken == word) --queue.words;
      room -= taken;
    }
  }
  for (size_t i = 0; nth < num_entries; ++i) emit(static_cast<uint32_t>(free_positions[i]) << 16);
  return nnz;
}

// What is wrong with a tile's entries, or ""; adds its nonzeros to *nnz.
std::string tile_problem(const PackedView& view, int64_t tile, int64_t* nnz) {
  const TileExtent extent = tile_extent(tile, view.m, view.k);
  std::bitset<kTileElems> seen;
  int padding = 0;
  const auto [first, last] = tile_entry_range(view, tile);
  for (int64_t i = first; i < last; ++i) {
    const auto position = static_cast<int>(view.payload[i] >> 16);
    const auto value = static_cast<uint16_t>(view.payload[i]);
    if (position >= kTileElems) {
      return "position must be below " + std::to_string(kTileElems) + ", got " +
             std::to_string(position);
    }
    const int row = row_of_position(position), col = col_of_position(position);
    // Padding may lie outside the matrix: it writes a zero that is never read.
    if (!is_zero(value) && (row >= extent.rows || col >= extent.cols)) {
      return "position " + std::to_string(position) + " (row " + std::to_string(row) + ", column " +
             std::to_string(col) + ") lies outside the matrix";
    }
    if (seen.test(static_cast<size_t>(position))) {
      return "position " + std::to_string(position) + " occurs twice";
    }
    seen.set(static_cast<size_t>(position));
    if (!is_zero(value)) continue;
    if (value != 0) return "a stored value must not be -0";
    if (++padding >= kVectorEntries) return "padding must have at most 3 entries";
  }
  *nnz += last - first - padding;
  return "";
}

}  // namespace

Status tiled_csl_count(const ValueMatrix& matrix, const ParallelFor& parallel_for, int32_t* offsets,
                       int64_t* nnz) {
  const auto* dense = matrix.row<uint16_t>(0);
  const int64_t ld = matrix.ld, m = matrix.m, k = matrix.k;
  const int64_t tiles = num_tiles(m, k);
  std::vector<int32_t> counts(static_cast<size_t>(tiles));
  parallel_for(tiles, 16, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const TileExtent extent = tile_extent(tile, m, k);
      int32_t count = 0;
      for (int row = 0; row < extent.rows; ++row) {
        const uint16_t* values = dense + (extent.row0 + row) * ld + extent.col0;
        for (int col = 0; col < extent.cols; ++col) count += !is_zero(values[col]);
      }
      counts[static_cast<size_t>(tile)] = count;
    }
  });
  *nnz = 0;
  for (const int32_t count : counts) *nnz += count;
  return fill_offsets(
      m, k, tiles,
      [&](int64_t tile) {
        return round_up_to_vector(counts[static_cast<size_t>(tile)]) / kVectorEntries;
      },
      offsets);
}

Status tiled_csl_pack(const ValueMatrix& matrix, const int32_t* offsets, int64_t nnz,
                      const ParallelFor& parallel_for, uint32_t* entries) {
  const auto* dense = matrix.row<uint16_t>(0);
  const int64_t ld = matrix.ld, m = matrix.m, k = matrix.k;
  return pack_tiles(num_tiles(m, k), 4, nnz, parallel_for, [&](int64_t tile) {
    return pack_tile(dense, ld, tile_extent(tile, m, k),
                     (offsets[tile + 1] - offsets[tile]) * kVectorEntries,
                     entries + int64_t{offsets[tile]} * kVectorEntries);
  });
}

void tiled_csl_unpack_tile_row(const PackedView& view, int64_t tile_row, void* values,
                               float* /*scales*/) {
  auto* dense = static_cast<uint16_t*>(values);
  const int64_t tile_cols = num_tile_cols(view.k);
  const int64_t rows = std::min<int64_t>(kTileM, view.m - tile_row * kTileM);
  std::fill_n(dense, rows * view.k, uint16_t{0});
  for (int64_t tile_col = 0; tile_col < tile_cols; ++tile_col) {
    const int64_t tile = tile_row * tile_cols + tile_col;
    const TileExtent extent = tile_extent(tile, view.m, view.k);
    const auto [first, last] = tile_entry_range(view, tile);
    for (int64_t i = first; i < last; ++i) {
      const int position = static_cast<int>(view.payload[i] >> 16) % kTileElems;
      const int row = row_of_position(position), col = col_of_position(position);
      if (row < extent.rows && col < extent.cols) {
        dense[row * view.k + extent.col0 + col] = static_cast<uint16_t>(view.payload[i]);
      }
    }
  }
}

Status tiled_csl_check_sizes(const PackedHeader& header, int64_t num_offsets,
                             int64_t payload_words) {
  const int64_t tiles = num_tiles(header.m, header.k);
  if (Status status = check_lengths(header, tiles, num_offsets, payload_words); !status.ok()) {
    return status;
  }
  const int64_t padding = payload_words - header.nnz;
  if (padding < 0 || padding > tiles * (kVectorEntries - 1)) {
    return nnz_does_not_fit(header, tiles, "tile");
  }
  return Status::success();
}

Status tiled_csl_validate(const PackedView& view, const ParallelFor& parallel_for) {
  const int64_t tiles = num_tiles(view.m, view.k);
  constexpr int kTileVectors = kTileElems / kVectorEntries;
  Status offsets = check_offsets(view, tiles, kVectorEntries, [](int64_t tile, int64_t vectors) {
    if (vectors <= kTileVectors) return Status::success();
    return Status::invalid_value("tile " + std::to_string(tile) + " must have at most " +
                                 std::to_string(kTileVectors) + " vectors, got " +
                                 std::to_string(vectors));
  });
  if (!offsets.ok()) return offsets;
  return check_tiles(view, tiles, "tile", parallel_for, tile_check(view, tile_problem));
}

int64_t tiled_csl_count_stored(const PackedView& view, const ParallelFor& parallel_for) {
  // Padding entries have the value zero.
  return sum_over(view.payload_words, int64_t{1} << 14, parallel_for, [&](int64_t i) {
    return is_zero(static_cast<uint16_t>(view.payload[i])) ? 0 : 1;
  });
}

}  // namespace flash_llm
