// Helpers that the packers and validators of all formats share.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>

#include "base/parallel.h"
#include "base/status.h"
#include "format/element.h"
#include "format/packed_format.h"
#include "format/packed_header.h"

namespace flash_llm {

// The first failure among several threads: the one in the lowest tile wins, so the message does not
// depend on the threads.
class FirstFailure {
 public:
  // `what`: the noun for a tile in messages, such as "tile".
  explicit FirstFailure(std::string what) : what_(std::move(what)) {}

  void report(int64_t tile, const std::string& message) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (tile_ < 0 || tile < tile_) {
      tile_ = tile;
      message_ = message;
    }
  }
  Status status() const {
    return tile_ < 0 ? Status::success()
                     : Status::invalid_value(what_ + " " + std::to_string(tile_) + ": " + message_);
  }

 private:
  std::string what_;
  std::mutex mutex_;
  int64_t tile_ = -1;
  std::string message_;
};

// Checks buffer lengths against the header, for a format that cuts this weight into `tiles` tiles.
inline Status check_lengths(const PackedHeader& header, int64_t tiles, int64_t num_offsets,
                            int64_t payload_words) {
  const int unit_words = packed_format(header.format).unit_words;
  if (num_offsets != tiles + 1) {
    return Status::invalid_value("offsets must hold " + std::to_string(tiles + 1) +
                                 " elements for a " + std::to_string(header.m) + "x" +
                                 std::to_string(header.k) + " weight, got " +
                                 std::to_string(num_offsets));
  }
  if (payload_words != header.payload_words) {
    return Status::invalid_value("payload must hold " + std::to_string(header.payload_words) +
                                 " words, as the header says, got " +
                                 std::to_string(payload_words));
  }
  if (payload_words % unit_words != 0 || payload_words / unit_words > INT32_MAX) {
    return Status::invalid_value("payload must be whole units of " + std::to_string(unit_words) +
                                 " words, at most 2^31 - 1, got " + std::to_string(payload_words) +
                                 " words");
  }
  return Status::success();
}

// The scale of a row, or of a group of its columns, without values.
inline constexpr float kNoScale = 1.0F;

// What is wrong with scale `group` of a row, which `stored` values have, or "".
inline std::string scale_problem(ValueType type, int64_t row, int64_t group, float scale,
                                 int64_t stored) {
  if (is_normal_scale(type, scale) && (stored > 0 || scale == kNoScale)) return "";
  const bool grouped = value_traits(type).scales == ScaleGroup::kRowGroup;
  return "row " + std::to_string(row) +
         (grouped ? ", columns from " + std::to_string(group * kScaleGroupCols) + " on" : "") +
         ": the scale must be " +
         (stored > 0 ? "a positive normal number" : "1, as there are no values") + ", got " +
         std::to_string(scale);
}

// The error if the matrix to pack has changed since it was counted.
inline Status dense_changed() {
  return Status::runtime("dense was changed by another thread while it was packed");
}

// The error for a header whose nnz the payload cannot hold.
inline Status nnz_does_not_fit(const PackedHeader& header, int64_t tiles, const char* what) {
  return Status::invalid_value("header says nnz = " + std::to_string(header.nnz) +
                               ", which does not fit a payload of " +
                               std::to_string(header.payload_words) + " words in " +
                               std::to_string(tiles) + " " + what + "s");
}

// Checks that offsets begin at 0, never decrease and end with the payload, which is cut into units
// of `unit_words`, and checks the size of each tile by check_units(tile, units).
template <typename CheckUnits>
Status check_offsets(const PackedView& view, int64_t tiles, int unit_words,
                     const CheckUnits& check_units) {
  if (view.offsets[0] != 0) {
    return Status::invalid_value("offsets[0] must be 0, got " + std::to_string(view.offsets[0]));
  }
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t units = int64_t{view.offsets[tile + 1]} - view.offsets[tile];
    if (units < 0) {
      return Status::invalid_value(
          "offsets must never decrease, got offsets[" + std::to_string(tile) +
          "] = " + std::to_string(view.offsets[tile]) + " and offsets[" + std::to_string(tile + 1) +
          "] = " + std::to_string(view.offsets[tile + 1]));
    }
    if (Status status = check_units(tile, units); !status.ok()) return status;
  }
  if (int64_t{view.offsets[tiles]} * unit_words != view.payload_words) {
    return Status::invalid_value("offsets must end at the payload's " +
                                 std::to_string(view.payload_words / unit_words) + " units, got " +
                                 std::to_string(view.offsets[tiles]));
  }
  return Status::success();
}

// Fills offsets[tiles + 1] from the number of units of each tile, units_of(tile). Fails if all
// tiles take more bytes than 31-bit offsets can address.
template <typename UnitsOf>
Status fill_offsets(int64_t m, int64_t k, int64_t tiles, const UnitsOf& units_of,
                    int32_t* offsets) {
  int64_t units = 0;
  offsets[0] = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    units += units_of(tile);
    if (units > INT32_MAX) {
      return Status::invalid_value("a weight of " + std::to_string(m) + "x" + std::to_string(k) +
                                   " takes more bytes than 31-bit offsets can address");
    }
    offsets[tile + 1] = static_cast<int32_t>(units);
  }
  return Status::success();
}

// The sum of of_item(i) for all i in [0, count).
template <typename OfItem>
int64_t sum_over(int64_t count, int64_t grain, const ParallelFor& parallel_for,
                 const OfItem& of_item) {
  std::mutex mutex;
  int64_t total = 0;
  parallel_for(count, grain, [&](int64_t begin, int64_t end) {
    int64_t own = 0;
    for (int64_t i = begin; i < end; ++i) own += of_item(i);
    const std::lock_guard<std::mutex> lock(mutex);
    total += own;
  });
  return total;
}

// What pack_tile returns for a tile whose size has changed since it was counted.
inline constexpr int64_t kTileChanged = -1;

// Runs pack_tile(tile) for all tiles. pack_tile writes only the words that were counted for the
// tile and returns its nonzeros, or kTileChanged. The total must be `nnz`.
template <typename PackTile>
Status pack_tiles(int64_t tiles, int64_t grain, int64_t nnz, const ParallelFor& parallel_for,
                  const PackTile& pack_tile) {
  std::atomic<int64_t> packed{0};
  std::atomic<bool> changed{false};
  parallel_for(tiles, grain, [&](int64_t begin, int64_t end) {
    int64_t range_nnz = 0;
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t tile_nnz = pack_tile(tile);
      if (tile_nnz == kTileChanged) changed = true;
      range_nnz += tile_nnz;
    }
    packed += range_nnz;
  });
  return changed || packed != nnz ? dense_changed() : Status::success();
}

// Runs check_tile(tile, failure) for all tiles. check_tile reports what is wrong with the tile to
// `failure`, or returns the tile's nonzeros; their total must equal the header's nnz.
template <typename CheckTile>
Status check_tiles(const PackedView& view, int64_t tiles, const char* what,
                   const ParallelFor& parallel_for, const CheckTile& check_tile) {
  FirstFailure failure(what);
  std::mutex nnz_mutex;
  int64_t nnz = 0;
  parallel_for(tiles, 16, [&](int64_t begin, int64_t end) {
    int64_t range_nnz = 0;
    for (int64_t tile = begin; tile < end; ++tile) range_nnz += check_tile(tile, failure);
    const std::lock_guard<std::mutex> lock(nnz_mutex);
    nnz += range_nnz;
  });
  if (Status status = failure.status(); !status.ok()) return status;
  if (nnz != view.nnz) {
    return Status::invalid_value("header says nnz = " + std::to_string(view.nnz) +
                                 ", the payload holds " + std::to_string(nnz));
  }
  return Status::success();
}

// The check_tile of check_tiles() for formats whose tiles are numbered as they are stored.
// tile_problem(view, tile, &nnz) returns what is wrong with a tile, empty if nothing is, and counts
// its nonzeros.
template <typename TileProblem>
auto tile_check(const PackedView& view, const TileProblem& tile_problem) {
  return [&view, &tile_problem](int64_t tile, FirstFailure& failure) {
    int64_t nnz = 0;
    const std::string problem = tile_problem(view, tile, &nnz);
    if (!problem.empty()) failure.report(tile, problem);
    return nnz;
  };
}

}  // namespace flash_llm
