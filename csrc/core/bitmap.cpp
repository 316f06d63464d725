#include "core/bitmap.h"

#include <algorithm>
#include <array>
#include <bitset>
#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include "core/element.h"
#include "core/packed_checks.h"

namespace flash_llm {
namespace {

constexpr size_t kLanes = 32;

// A chunk by its place in the matrix, row-major: what it covers, ragged at the edges, and where it
// is stored.
struct ChunkPlace {
  int64_t row0, col0;
  int rows, cols;
  int64_t index;
};

ChunkPlace chunk_place(int64_t nth, int64_t m, int64_t k) {
  const int64_t cols = num_chunk_cols(k), row = nth / cols, col = nth % cols;
  return {row * kChunkM, col * kChunkK,
          static_cast<int>(std::min<int64_t>(kChunkM, m - row * kChunkM)),
          static_cast<int>(std::min<int64_t>(kChunkK, k - col * kChunkK)),
          chunk_index(row, col, num_chunk_rows(m), cols)};
}

// bits[lane][2 half + strip], as stored.
using ChunkBits = std::array<std::array<uint32_t, 4>, kLanes>;

int popcount(uint32_t word) { return static_cast<int>(std::bitset<32>(word).count()); }

ChunkBits chunk_bits(const uint16_t* dense, int64_t ld, const ChunkPlace& place) {
  ChunkBits bits{};
  for (int row = 0; row < place.rows; ++row) {
    const uint16_t* values = dense + (place.row0 + row) * ld + place.col0;
    const int strip = row / kStripM, group = row % 8, upper = row / 8 % 2;
    for (int col = 0; col < place.cols; ++col) {
      const int half = col / kHalfK, quad = col % kHalfK / 8, thread = col % 8 / 2;
      const int lane = group * 4 + thread, word = 2 * half + strip;
      bits[static_cast<size_t>(lane)][static_cast<size_t>(word)] |=
          static_cast<uint32_t>(!is_zero(values[col])) << chunk_bit(quad, 2 * upper + col % 2);
    }
  }
  return bits;
}

int64_t chunk_nnz(const ChunkBits& bits) {
  int64_t nnz = 0;
  for (const auto& words : bits) {
    for (const uint32_t word : words) nnz += popcount(word);
  }
  return nnz;
}

using LaneCounts = std::array<uint8_t, kLanes>;

// Lanes by rising count; equal counts by rising lane.
std::array<uint8_t, kLanes> sorted_lanes(const LaneCounts& counts) {
  std::array<uint8_t, kRunElems + 2> next{};
  for (const uint8_t count : counts) ++next[count + 1U];
  for (size_t i = 1; i < next.size(); ++i) next[i] = static_cast<uint8_t>(next[i] + next[i - 1]);
  std::array<uint8_t, kLanes> order{};
  for (size_t lane = 0; lane < kLanes; ++lane) {
    order[next[counts[lane]]++] = static_cast<uint8_t>(lane);
  }
  return order;
}

struct ChunkLayout {
  int rows = 0;
  std::array<std::array<uint8_t, 2>, kLanes> sigma{};  // [lane][strip]
};

// For each strip the longest downward run goes on top of the shortest upward run, the second
// longest on the second shortest and so on; of the swap patterns the first with the fewest rows
// wins.
ChunkLayout chunk_layout(const ChunkBits& bits) {
  LaneCounts up[2], down[2];  // by strip
  for (size_t lane = 0; lane < kLanes; ++lane) {
    for (size_t strip = 0; strip < 2; ++strip) {
      up[strip][lane] = static_cast<uint8_t>(popcount(bits[lane][strip]));
      down[strip][lane] = static_cast<uint8_t>(popcount(bits[lane][2 + strip]));
    }
  }
  const std::array<uint8_t, kLanes> rising_down[2] = {sorted_lanes(down[0]), sorted_lanes(down[1])};
  ChunkLayout best;
  best.rows = kMaxChunkRows + 1;
  for (int pattern = 0; pattern < kSwapPatterns; ++pattern) {
    ChunkLayout layout;
    for (size_t strip = 0; strip < 2; ++strip) {
      LaneCounts free_up;  // upward runs of the slots that this strip's downward runs may use
      for (size_t column = 0; column < kLanes; ++column) {
        const bool swapped = swaps_slots(pattern, static_cast<int>(column));
        free_up[column] = up[swapped ? 1 - strip : strip][column];
      }
      const std::array<uint8_t, kLanes> rising_up = sorted_lanes(free_up);
      for (size_t i = 0; i < kLanes; ++i) {
        const size_t column = rising_up[i], lane = rising_down[strip][kLanes - 1 - i];
        const bool swapped = swaps_slots(pattern, static_cast<int>(column));
        const size_t slot = swapped ? 1 - strip : strip;
        layout.rows = std::max(layout.rows, free_up[column] + down[strip][lane]);
        layout.sigma[lane][strip] = static_cast<uint8_t>(4 * column + 2 * slot);
      }
    }
    if (layout.rows < best.rows) best = layout;
  }
  return best;
}

void pack_chunk(const uint16_t* dense, int64_t ld, const ChunkPlace& place, uint8_t* out) {
  const ChunkBits bits = chunk_bits(dense, ld, place);
  const ChunkLayout layout = chunk_layout(bits);
  const auto value_bytes = static_cast<size_t>(layout.rows) * kChunkRowBytes;
  std::memset(out, 0, value_bytes);
  std::memcpy(out + value_bytes, bits.data(), kChunkBitsBytes);
  std::memcpy(out + value_bytes + kChunkBitsBytes, layout.sigma.data(), kChunkSigmaBytes);
  for (int lane = 0; lane < static_cast<int>(kLanes); ++lane) {
    for (int half = 0; half < 2; ++half) {
      for (int strip = 0; strip < 2; ++strip) {
        const auto lane_idx = static_cast<size_t>(lane), strip_idx = static_cast<size_t>(strip);
        const uint32_t word = bits[lane_idx][half == 0 ? strip_idx : 2 + strip_idx];
        const int offset =
            half == 0 ? lane * 4 + strip * 2
                      : (layout.rows - 1) * kChunkRowBytes + layout.sigma[lane_idx][strip_idx];
        uint8_t* end = out + offset;
        const int step = half == 0 ? kChunkRowBytes : -kChunkRowBytes;
        for (int quad = 0; quad < kQuads; ++quad) {
          for (int i = 0; i < 4; ++i) {
            const int elem = quad_order(i);
            if ((word >> chunk_bit(quad, elem) & 1U) == 0) continue;
            const uint16_t value = dense[(place.row0 + chunk_row(strip, lane, elem)) * ld +
                                         place.col0 + chunk_col(half, lane, quad, elem)];
            std::memcpy(end, &value, sizeof(value));
            end += step;
          }
        }
      }
    }
  }
}

// A chunk's bytes, clamped into the payload: a malformed weight that slipped past validation gives
// wrong numbers but never touches memory that is not ours. rows is -1 where there is nothing.
struct ChunkBytes {
  const uint8_t* values = nullptr;
  int rows = -1;

  uint32_t bits(int lane, int half, int strip) const {
    const int offset = rows * kChunkRowBytes + lane * 16 + half * 8 + strip * 4;
    uint32_t word;
    std::memcpy(&word, values + offset, sizeof(word));
    return word;
  }
  int sigma(int lane, int strip) const {
    return values[rows * kChunkRowBytes + kChunkBitsBytes + lane * 2 + strip];
  }
  // Byte offset of the n-th value of a run.
  int value_offset(int lane, int half, int strip, int n) const {
    return half == 0
               ? n * kChunkRowBytes + lane * 4 + strip * 2
               : (rows - 1 - n) * kChunkRowBytes + sigma(lane, strip) % kChunkRowBytes / 2 * 2;
  }
};

ChunkBytes chunk_bytes(const PackedView& view, int64_t chunk) {
  const int64_t units = view.payload_words / kChunkUnitWords;
  const int64_t first = std::clamp<int64_t>(view.offsets[chunk], 0, units);
  const int64_t last = std::clamp<int64_t>(view.offsets[chunk + 1], first, units);
  return {reinterpret_cast<const uint8_t*>(view.payload + first * kChunkUnitWords),
          chunk_value_rows(last - first)};
}

// Calls visit(row, col, byte offset of the value) for each bit of a chunk whose value lies inside
// it, in the order of the runs.
template <typename Visit>
void for_each_value(const ChunkBytes& chunk, const Visit& visit) {
  for (int lane = 0; lane < static_cast<int>(kLanes); ++lane) {
    for (int half = 0; half < 2; ++half) {
      for (int strip = 0; strip < 2; ++strip) {
        const uint32_t word = chunk.bits(lane, half, strip);
        int n = 0;
        for (int quad = 0; quad < kQuads; ++quad) {
          for (int i = 0; i < 4; ++i) {
            const int elem = quad_order(i);
            if ((word >> chunk_bit(quad, elem) & 1U) == 0) continue;
            if (n == chunk.rows) break;
            visit(chunk_row(strip, lane, elem), chunk_col(half, lane, quad, elem),
                  chunk.value_offset(lane, half, strip, n++));
          }
        }
      }
    }
  }
}

// What is wrong with a chunk, or "".
std::string chunk_problem(const ChunkBytes& chunk, const ChunkPlace& place, int64_t* nnz) {
  int up[kLanes][2] = {};           // length of the upward run by column and slot
  bool used[kLanes][2] = {};        // slots that a downward run has
  bool strip_used[2][kLanes] = {};  // columns that a strip's downward runs have
  int64_t bits = 0;
  for (int lane = 0; lane < static_cast<int>(kLanes); ++lane) {
    for (int strip = 0; strip < 2; ++strip) {
      up[lane][strip] = popcount(chunk.bits(lane, 0, strip));
      bits += up[lane][strip] + popcount(chunk.bits(lane, 1, strip));
    }
  }
  for (int lane = 0; lane < static_cast<int>(kLanes); ++lane) {
    for (int strip = 0; strip < 2; ++strip) {
      const int sigma = chunk.sigma(lane, strip), column = sigma / 4, slot = sigma % 4 / 2;
      const std::string who = "lane " + std::to_string(lane) + " of strip " + std::to_string(strip);
      if (sigma % 2 != 0 || sigma >= kChunkRowBytes) {
        return who + ": sigma must be even and below 128, got " + std::to_string(sigma);
      }
      if (strip_used[strip][column] || used[column][slot]) {
        return who + ": column " + std::to_string(column) + " is taken twice";
      }
      strip_used[strip][column] = used[column][slot] = true;
      const int down = popcount(chunk.bits(lane, 1, strip));
      if (up[column][slot] + down > chunk.rows) {
        return who + ": runs of " + std::to_string(up[column][slot]) + " and " +
               std::to_string(down) + " values overlap in " + std::to_string(chunk.rows) + " rows";
      }
    }
  }
  if (bits == 0) return "a chunk without nonzeros must have no bytes";
  std::string problem;
  std::bitset<kMaxChunkRows * kChunkRowBytes / 2> written;
  for_each_value(chunk, [&](int row, int col, int offset) {
    uint16_t value;
    std::memcpy(&value, chunk.values + offset, sizeof(value));
    written.set(static_cast<size_t>(offset / 2));
    if (!problem.empty()) return;
    if (row >= place.rows || col >= place.cols) {
      problem = "row " + std::to_string(row) + ", column " + std::to_string(col) +
                " of the chunk lies outside the matrix";
    } else if (is_zero(value)) {
      problem = "a stored value must not be zero (row " + std::to_string(row) + ", column " +
                std::to_string(col) + " of the chunk)";
    }
  });
  if (!problem.empty()) return problem;
  for (int offset = 0; offset < chunk.rows * kChunkRowBytes; offset += 2) {
    uint16_t value;
    std::memcpy(&value, chunk.values + offset, sizeof(value));
    if (value != 0 && !written.test(static_cast<size_t>(offset / 2))) {
      return "padding must be 0, got " + std::to_string(value) + " at byte " +
             std::to_string(offset);
    }
  }
  *nnz += bits;
  return "";
}

}  // namespace

Status bitmap_count(const uint16_t* dense, int64_t ld, int64_t m, int64_t k,
                    const ParallelFor& parallel_for, int32_t* offsets, int64_t* nnz) {
  const int64_t chunks = num_chunk_rows(m) * num_chunk_cols(k);
  std::vector<int64_t> counts(static_cast<size_t>(chunks));
  parallel_for(chunks, 16, [&](int64_t begin, int64_t end) {
    for (int64_t nth = begin; nth < end; ++nth) {
      const ChunkPlace place = chunk_place(nth, m, k);
      const ChunkBits bits = chunk_bits(dense, ld, place);
      const int64_t count = chunk_nnz(bits);
      counts[static_cast<size_t>(nth)] = count;
      offsets[place.index + 1] = count == 0 ? 0 : chunk_units(chunk_layout(bits).rows);
    }
  });
  int64_t units = 0;
  *nnz = 0;
  offsets[0] = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    *nnz += counts[static_cast<size_t>(chunk)];
    units += offsets[chunk + 1];
    if (units > INT32_MAX) {
      return Status::invalid_value("a weight of " + std::to_string(m) + "x" + std::to_string(k) +
                                   " has more bytes than 31-bit chunk offsets can address");
    }
    offsets[chunk + 1] = static_cast<int32_t>(units);
  }
  return Status::success();
}

void bitmap_pack(const uint16_t* dense, int64_t ld, int64_t m, int64_t k, const int32_t* offsets,
                 const ParallelFor& parallel_for, uint32_t* payload) {
  parallel_for(num_chunk_rows(m) * num_chunk_cols(k), 16, [&](int64_t begin, int64_t end) {
    for (int64_t nth = begin; nth < end; ++nth) {
      const ChunkPlace place = chunk_place(nth, m, k);
      const int64_t first = offsets[place.index];
      if (first == offsets[place.index + 1]) continue;
      pack_chunk(dense, ld, place, reinterpret_cast<uint8_t*>(payload + first * kChunkUnitWords));
    }
  });
}

void bitmap_unpack_tile_row(const PackedView& view, int64_t tile_row, uint16_t* dense) {
  const int64_t cols = num_chunk_cols(view.k);
  const int64_t rows = std::min<int64_t>(kChunkM, view.m - tile_row * kChunkM);
  std::fill_n(dense, rows * view.k, uint16_t{0});
  for (int64_t col = 0; col < cols; ++col) {
    const ChunkPlace place = chunk_place(tile_row * cols + col, view.m, view.k);
    const ChunkBytes chunk = chunk_bytes(view, place.index);
    if (chunk.rows < 0) continue;
    for_each_value(chunk, [&](int r, int c, int offset) {
      if (r >= place.rows || c >= place.cols) return;
      std::memcpy(dense + r * view.k + place.col0 + c, chunk.values + offset, sizeof(uint16_t));
    });
  }
}

Status bitmap_check_sizes(const PackedHeader& header, int64_t num_offsets, int64_t payload_words) {
  const int64_t chunks = num_chunk_rows(header.m) * num_chunk_cols(header.k);
  if (Status status = check_lengths(header, chunks, num_offsets, payload_words); !status.ok()) {
    return status;
  }
  const int64_t units = payload_words / kChunkUnitWords;
  if (payload_words % kChunkUnitWords != 0 || units > INT32_MAX) {
    return Status::invalid_value("payload must be whole units of 16 words, at most 2^31 - 1, got " +
                                 std::to_string(payload_words) + " words");
  }
  // A unit of values holds 32 of them, and some units hold bits instead.
  if (units > chunks * chunk_units(kMaxChunkRows) || header.nnz > units * (kChunkUnitBytes / 2)) {
    return nnz_does_not_fit(header, chunks, "chunk");
  }
  return Status::success();
}

Status bitmap_validate(const PackedView& view, const ParallelFor& parallel_for) {
  const int64_t chunks = num_chunk_rows(view.m) * num_chunk_cols(view.k);
  Status offsets = check_offsets(view, chunks, [](int64_t chunk, int64_t units) {
    if (units == 0 || chunk_value_rows(units) >= 0) return Status::success();
    return Status::invalid_value("chunk " + std::to_string(chunk) + " holds " +
                                 std::to_string(units) + " units; 0 or 9, 11, ... 137 are sizes");
  });
  if (!offsets.ok()) return offsets;
  if (int64_t{view.offsets[chunks]} * kChunkUnitWords != view.payload_words) {
    return Status::invalid_value(
        "offsets must end at " + std::to_string(view.payload_words / kChunkUnitWords) +
        ", the payload's units, got " + std::to_string(view.offsets[chunks]));
  }
  const auto check_range = [&](int64_t begin, int64_t end, FirstFailure& failure) {
    int64_t range_nnz = 0;
    for (int64_t nth = begin; nth < end; ++nth) {
      const ChunkPlace place = chunk_place(nth, view.m, view.k);
      const ChunkBytes chunk = chunk_bytes(view, place.index);
      if (chunk.rows < 0) continue;
      const std::string problem = chunk_problem(chunk, place, &range_nnz);
      if (!problem.empty()) {
        failure.report(place.index, problem);
        return range_nnz;
      }
    }
    return range_nnz;
  };
  return check_tiles(view, chunks, "chunk", parallel_for, check_range);
}

}  // namespace flash_llm
