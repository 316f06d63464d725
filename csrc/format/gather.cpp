#include "format/gather.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "format/element.h"
#include "format/packed_checks.h"

namespace flash_llm {
namespace {

constexpr int kClasses = 8;  // columns modulo this are in different banks, 16 bytes per column
constexpr int kPhases = kGatherLanes / kClasses;  // lanes that load 16 bytes each at once
constexpr int kFourByteBanks = 32, kEightByteBanks = 16;
constexpr int kFourBytePenalty = 60, kEightBytePenalty = 80;
constexpr int kNoEntry = 4000, kRunIsDone = 2000;  // more than any candidate costs
constexpr int kSegmentSteps = kGatherSegmentQuads * kGatherQuadSteps;
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
  return (units_of_bytes(int64_t{slices} * kGatherSliceRows * 2) + units_of_bytes(slices * 2)) *
         kUnitBytes;
}

// The assignment of lanes to classes, one each, with the least total cost (the Hungarian method).
std::array<int, kClasses> assign(const std::array<std::array<int, kClasses>, kClasses>& cost) {
  std::array<int, kClasses + 1> lane_price{}, class_price{}, lane_of{}, way{};
  for (int lane = 1; lane <= kClasses; ++lane) {
    std::array<int, kClasses + 1> slack;
    slack.fill(1 << 29);
    std::array<bool, kClasses + 1> done{};
    size_t at = 0;
    lane_of[0] = lane;
    do {
      done[at] = true;
      const auto from = static_cast<size_t>(lane_of[at]);
      int least = 1 << 29;
      size_t next = 0;
      for (size_t c = 1; c <= kClasses; ++c) {
        if (done[c]) continue;
        const int reduced = cost[from - 1][c - 1] - lane_price[from] - class_price[c];
        if (reduced < slack[c]) {
          slack[c] = reduced;
          way[c] = static_cast<int>(at);
        }
        if (slack[c] < least) {
          least = slack[c];
          next = c;
        }
      }
      for (size_t c = 0; c <= kClasses; ++c) {
        if (done[c]) {
          lane_price[static_cast<size_t>(lane_of[c])] += least;
          class_price[c] -= least;
        } else {
          slack[c] -= least;
        }
      }
      at = next;
    } while (lane_of[at] != 0);
    while (at != 0) {
      const auto before = static_cast<size_t>(way[at]);
      lane_of[at] = lane_of[before];
      at = before;
    }
  }
  std::array<int, kClasses> class_of{};
  for (size_t c = 1; c <= kClasses; ++c) {
    class_of[static_cast<size_t>(lane_of[c] - 1)] = static_cast<int>(c) - 1;
  }
  return class_of;
}

struct Entry {
  int col;
  uint16_t value;
  bool stored = false;
};

// A lane's run of nonzeros.
struct Run {
  std::vector<Entry> entries;
  size_t oldest = 0;     // the first entry that is not stored yet
  size_t left = 0;       // entries that are not stored yet
  size_t can_spare = 0;  // steps that need not store an entry
  int col = 0;           // of the last step

  // How far a step that stores nothing may go to meet the oldest entry.
  int bridge(bool segment_begins, int cols) const {
    constexpr int kBridge = kGatherReach - kClasses + 1;  // leaves room to choose a class
    const int target = left > 0 ? entries[oldest].col : segment_begins ? cols : col;
    const int to = segment_begins ? target : std::clamp(target, col - kBridge, col + kBridge);
    return std::max(std::min(to, cols - kClasses), 0) / kClasses * kClasses;
  }
};

// Chooses the order of a slice's runs and collects its steps.
class SlicePacker {
 public:
  SlicePacker(std::array<Run, kGatherLanes>& runs, int cols) : runs_(runs), cols_(cols) {
    size_t longest = 0;
    for (const Run& run : runs_) longest = std::max(longest, run.left);
    const size_t steps = (longest + kGatherQuadSteps - 1) / kGatherQuadSteps * kGatherQuadSteps;
    for (Run& run : runs_) run.can_spare = steps - run.left;
  }

  // Appends the slice's segments; returns its quads.
  int pack(std::vector<uint8_t>* out) {
    int steps = 0;
    while (steps % kGatherQuadSteps != 0 ||
           std::any_of(runs_.begin(), runs_.end(), [](const Run& run) { return run.left > 0; })) {
      store_step(steps, out);
      ++steps;
    }
    return steps / kGatherQuadSteps;
  }

 private:
  // The cheapest entry of each class within a lane's reach.
  struct Candidates {
    std::array<int, kClasses> entry;
    std::array<int, kClasses> cost;
  };

  Candidates find_candidates(size_t lane) {
    Run& run = runs_[lane];
    Candidates found;
    found.entry.fill(-1);
    found.cost.fill(run.left > 0 ? kNoEntry : kRunIsDone);
    if (run.left == 0) return found;
    while (run.entries[run.oldest].stored) ++run.oldest;
    const int oldest = run.entries[run.oldest].col;
    int dearest = kNoEntry;  // of the classes; entries at this distance or farther cost more
    for (size_t i = run.oldest; i < run.entries.size(); ++i) {
      const Entry& entry = run.entries[i];
      const int distance = entry.col - oldest;
      if (distance > std::min(kGatherReach, dearest - 1)) break;
      if (entry.stored || (!segment_begins_ && std::abs(entry.col - run.col) > kGatherReach)) {
        continue;
      }
      const int cost =
          distance + kFourBytePenalty * four_byte_lanes_[bank(entry.col, kFourByteBanks)] +
          kEightBytePenalty *
              eight_byte_lanes_[lane / kEightByteBanks][bank(entry.col, kEightByteBanks)];
      const size_t c = bank(entry.col, kClasses);
      if (cost < found.cost[c]) {
        found.cost[c] = cost;
        found.entry[c] = static_cast<int>(i);
        dearest = *std::max_element(found.cost.begin(), found.cost.end());
      }
    }
    return found;
  }

  static constexpr size_t bank(int col, unsigned banks) {
    return static_cast<unsigned>(col) % banks;
  }

  void store_step(int step, std::vector<uint8_t>* out) {
    segment_begins_ = step % kSegmentSteps == 0;
    if (segment_begins_) out->resize(out->size() + kGatherHeadBytes);
    if (step % kGatherQuadSteps == 0) out->resize(out->size() + kGatherQuadBytes);
    out_ = out->data() + out->size() - kGatherQuadBytes;
    step_ = static_cast<size_t>(step % kGatherQuadSteps);
    four_byte_lanes_ = {};
    eight_byte_lanes_ = {};
    for (size_t phase = 0; phase < kPhases; ++phase) store_phase(phase * kClasses);
  }

  // One step of eight lanes. Entries of the assignment come first, then what conflicts least.
  void store_phase(size_t first_lane) {
    class_lanes_ = {};
    std::array<Candidates, kClasses> found;
    std::array<std::array<int, kClasses>, kClasses> cost;
    for (size_t i = 0; i < kClasses; ++i) {
      found[i] = find_candidates(first_lane + i);
      cost[i] = found[i].cost;
    }
    const std::array<int, kClasses> class_of = assign(cost);
    std::array<int, kClasses> entry;
    for (size_t i = 0; i < kClasses; ++i) {
      entry[i] = found[i].entry[static_cast<size_t>(class_of[i])];
      if (entry[i] >= 0) store_entry(first_lane + i, entry[i]);
    }
    for (size_t i = 0; i < kClasses; ++i) {
      if (entry[i] < 0) store_rest(first_lane + i, found[i]);
    }
  }

  // A lane that got no class: it stores nothing if it can spare the step, else an entry whose class
  // the fewest lanes have.
  void store_rest(size_t lane, const Candidates& found) {
    Run& run = runs_[lane];
    int best = -1, lanes = kClasses;
    for (size_t c = 0; c < kClasses; ++c) {
      const int entry = found.entry[c];
      if (entry < 0 || class_lanes_[c] > lanes) continue;
      if (class_lanes_[c] == lanes && best >= 0 && entry >= best) continue;
      best = entry;
      lanes = class_lanes_[c];
    }
    if (best >= 0 && (lanes == 0 || run.can_spare == 0)) {
      store_entry(lane, best);
      return;
    }
    if (best >= 0) --run.can_spare;
    const int base = run.bridge(segment_begins_, cols_);
    int col = base;
    for (int c = 1; c < std::min(kClasses, cols_ - base); ++c) {
      const bool reached = segment_begins_ || std::abs(base + c - run.col) <= kGatherReach;
      if (reached && class_lanes_[static_cast<size_t>(c)] < class_lanes_[bank(col, kClasses)]) {
        col = base + c;
      }
    }
    store(lane, col, 0);
  }

  void store_entry(size_t lane, int index) {
    Entry& entry = runs_[lane].entries[static_cast<size_t>(index)];
    entry.stored = true;
    --runs_[lane].left;
    store(lane, entry.col, entry.value);
  }

  void store(size_t lane, int col, uint16_t value) {
    Run& run = runs_[lane];
    if (segment_begins_) {
      const auto head = static_cast<uint16_t>(col);
      std::memcpy(out_ - kGatherHeadBytes + 2 * lane, &head, sizeof(head));
      run.col = col;
    }
    const size_t at = lane * kGatherQuadSteps + step_;
    out_[at] = static_cast<uint8_t>(col - run.col);
    std::memcpy(out_ + kGatherLanes * kGatherQuadSteps + 2 * at, &value, sizeof(value));
    run.col = col;
    ++class_lanes_[bank(col, kClasses)];
    ++four_byte_lanes_[bank(col, kFourByteBanks)];
    ++eight_byte_lanes_[lane / kEightByteBanks][bank(col, kEightByteBanks)];
  }

  std::array<Run, kGatherLanes>& runs_;
  int cols_;
  bool segment_begins_ = false;
  uint8_t* out_ = nullptr;  // the quad that is being filled
  size_t step_ = 0;         // of the quad
  // Lanes of this step, by bank; class_lanes_ counts those of one phase.
  std::array<int, kClasses> class_lanes_{};
  std::array<int, kFourByteBanks> four_byte_lanes_{};
  std::array<std::array<int, kEightByteBanks>, 2> eight_byte_lanes_{};
};

// A tile's bytes, whole units; none if it has no nonzeros.
std::vector<uint8_t> pack_tile(const uint16_t* dense, int64_t ld, const TileExtent& extent,
                               int64_t* nnz) {
  const uint16_t* tile = dense + extent.row0 * ld + extent.col0;
  const int slices = gather_slices(extent.rows);
  std::vector<std::vector<Entry>> rows(static_cast<size_t>(slices) * kGatherSliceRows);
  *nnz = 0;
  for (int row = 0; row < extent.rows; ++row) {
    std::vector<Entry>& entries = rows[static_cast<size_t>(row)];
    for (int col = 0; col < extent.cols; ++col) {
      const uint16_t value = tile[row * ld + col];
      if (!is_zero(value)) entries.push_back({col, value});
    }
    *nnz += static_cast<int64_t>(entries.size());
  }
  if (*nnz == 0) return {};
  std::vector<uint16_t> order(rows.size()), quads(static_cast<size_t>(slices));
  std::iota(order.begin(), order.end(), uint16_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](uint16_t a, uint16_t b) { return rows[a].size() > rows[b].size(); });
  std::vector<uint8_t> bytes(static_cast<size_t>(directory_bytes(slices)));
  for (size_t slice = 0; slice < quads.size(); ++slice) {
    std::array<Run, kGatherLanes> runs;
    for (size_t lane = 0; lane < kGatherLanes; ++lane) {
      const auto& row = rows[order[slice * kGatherSliceRows + lane / kGatherRuns]];
      const size_t run = lane % kGatherRuns;
      const auto at = [&](size_t i) {
        return row.begin() + static_cast<std::ptrdiff_t>(row.size() * i / kGatherRuns);
      };
      runs[lane].entries.assign(at(run), at(run + 1));
      runs[lane].left = runs[lane].entries.size();
    }
    quads[slice] = static_cast<uint16_t>(SlicePacker(runs, extent.cols).pack(&bytes));
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
          std::memcpy(&value, at + kGatherLanes * kGatherQuadSteps + 2 * index, sizeof(value));
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

Status gather_count(const uint16_t* dense, int64_t ld, int64_t m, int64_t k,
                    const ParallelFor& parallel_for, int32_t* offsets, int64_t* nnz) {
  // How many fillers a run needs depends on its order, so counting packs.
  const int64_t tiles = tiles_of(m, k);
  std::vector<int64_t> bytes(static_cast<size_t>(tiles)), stored(static_cast<size_t>(tiles));
  parallel_for(tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const auto i = static_cast<size_t>(tile);
      bytes[i] =
          static_cast<int64_t>(pack_tile(dense, ld, tile_extent(tile, m, k), &stored[i]).size());
    }
  });
  *nnz = std::accumulate(stored.begin(), stored.end(), int64_t{0});
  return fill_offsets(
      m, k, tiles, [&](int64_t tile) { return units_of_bytes(bytes[static_cast<size_t>(tile)]); },
      offsets);
}

Status gather_pack(const uint16_t* dense, int64_t ld, int64_t m, int64_t k, const int32_t* offsets,
                   int64_t nnz, const ParallelFor& parallel_for, uint32_t* payload) {
  return pack_tiles(tiles_of(m, k), 1, nnz, parallel_for, [&](int64_t tile) -> int64_t {
    int64_t stored = 0;
    const std::vector<uint8_t> bytes = pack_tile(dense, ld, tile_extent(tile, m, k), &stored);
    const auto units = units_of_bytes(static_cast<int64_t>(bytes.size()));
    if (units != int64_t{offsets[tile + 1]} - offsets[tile]) return kTileChanged;
    if (units > 0) {
      std::memcpy(payload + int64_t{offsets[tile]} * kGatherUnitWords, bytes.data(), bytes.size());
    }
    return stored;
  });
}

void gather_unpack_tile_row(const PackedView& view, int64_t tile_row, uint16_t* dense) {
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
  const auto check_tile = [&](int64_t tile, FirstFailure& failure) {
    int64_t nnz = 0;
    const std::string problem = tile_problem(view, tile, &nnz);
    if (!problem.empty()) failure.report(tile, problem);
    return nnz;
  };
  return check_tiles(view, tiles, "tile", parallel_for, check_tile);
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
