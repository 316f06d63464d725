#include "format/bitmap.h"

#include <algorithm>
#include <array>
#include <bitset>
#include <cstddef>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "format/element.h"
#include "format/packed_checks.h"

namespace flash_llm {
namespace {

constexpr size_t kLanes = 32;
constexpr size_t kStrips = kChunkM / kStripM;

// The part of the matrix that a chunk covers; smaller at the edges.
struct Extent {
  int64_t row0, col0;
  int rows, cols;
};

Extent chunk_extent(int64_t chunk_row, int64_t chunk_col, bool two_four, int64_t m, int64_t k) {
  const int64_t row0 = chunk_row * kChunkM, col0 = chunk_col * kChunkK;
  return {row0, col0, static_cast<int>(std::min<int64_t>(kChunkM, m - row0)),
          static_cast<int>(std::min<int64_t>(two_four ? kTwoFourK : kChunkK, k - col0))};
}

int popcount(uint64_t word) { return static_cast<int>(std::bitset<64>(word).count()); }

// The bits of a row of a chunk: that of column c is bit c % 64 of [c / 64].
using RowBits = std::array<uint64_t, kTwoFourK / 64>;
using ElementBits = std::array<RowBits, kChunkM>;

ElementBits element_bits(const uint16_t* dense, int64_t ld, const Extent& extent) {
  ElementBits bits{};
  for (int row = 0; row < extent.rows; ++row) {
    const uint16_t* values = dense + (extent.row0 + row) * ld + extent.col0;
    for (int col = 0; col < extent.cols; ++col) {
      bits[static_cast<size_t>(row)][static_cast<size_t>(col / 64)] |=
          static_cast<uint64_t>(!is_zero(values[col])) << col % 64;
    }
  }
  return bits;
}

// The bits of one of the two plain chunks that a 2:4 chunk covers.
ElementBits half_of_pair(const ElementBits& pair, size_t second) {
  ElementBits bits{};
  for (size_t row = 0; row < kChunkM; ++row) {
    bits[row] = {pair[row][2 * second], pair[row][2 * second + 1]};
  }
  return bits;
}

int64_t num_stored(const ElementBits& bits) {
  int64_t count = 0;
  for (const RowBits& row : bits) {
    for (const uint64_t word : row) count += popcount(word);
  }
  return count;
}

// The four bits of a group.
size_t group_at(const RowBits& row, int col) {
  return row[static_cast<size_t>(col / 64)] >> col % 64 & 0xFU;
}

struct Group {
  uint8_t slots;     // bit 0, 1: whether slot 0, 1 is stored
  uint8_t residual;  // the elements without a slot, as bits of the group
};

constexpr std::array<Group, 16> make_groups() {
  std::array<Group, 16> groups{};
  for (int bits = 0; bits < 16; ++bits) {
    const int nibble = two_four_nibble(bits), first = nibble & 3, second = nibble >> 2;
    groups[static_cast<size_t>(bits)] = {
        static_cast<uint8_t>((bits >> first & 1) | (bits >> second & 1) << 1),
        static_cast<uint8_t>(bits & ~(1 << first | 1 << second))};
  }
  return groups;
}

constexpr std::array<Group, 16> kGroups = make_groups();

// runs[lane][2 half + strip]: bit chunk_bit(quad, elem) says whether that element of a plain chunk,
// or slot of a 2:4 chunk, is stored.
using RunWords = std::array<std::array<uint32_t, 4>, kLanes>;

// Bit 8 r + c of the result is bit 8 c + r.
uint64_t transposed_8x8(uint64_t bits) {
  for (const auto& [shift, mask] : {std::pair<int, uint64_t>{7, 0x00AA00AA00AA00AA},
                                    {14, 0x0000CCCC0000CCCC},
                                    {28, 0x00000000F0F0F0F0}}) {
    const uint64_t swapped = (bits ^ bits >> shift) & mask;
    bits ^= swapped ^ swapped << shift;
  }
  return bits;
}

// The 64 elements or slots of a row and half: bit 8 quad + 2 (lane % 4) + elem % 2.
uint64_t half_row(const RowBits& row, bool two_four, int half) {
  if (!two_four) return row[static_cast<size_t>(half)];
  uint64_t slots = 0;
  for (int quad = 0; quad < kQuads; ++quad) {
    for (int thread = 0; thread < 4; ++thread) {
      const size_t group = group_at(row, two_four_col(half, thread, quad));
      slots |= static_cast<uint64_t>(kGroups[group].slots) << (8 * quad + 2 * thread);
    }
  }
  return slots;
}

RunWords run_words(const ElementBits& bits, bool two_four) {
  RunWords runs{};
  for (size_t row = 0; row < kChunkM; ++row) {
    const size_t strip = row / kStripM, group = row % 8, upper = row / 8 % 2;
    for (size_t half = 0; half < 2; ++half) {
      // Transposed, it is bit 8 (2 (lane % 4) + elem % 2) + quad: each lane has two bytes.
      const uint64_t lanes = transposed_8x8(half_row(bits[row], two_four, static_cast<int>(half)));
      for (size_t thread = 0; thread < 4; ++thread) {
        runs[4 * group + thread][2 * half + strip] |=
            static_cast<uint32_t>(lanes >> 16 * thread & 0xFFFFU) << 16 * upper;
      }
    }
  }
  return runs;
}

// The inverse of run_words for a plain chunk, whose stored bits are its run words.
ElementBits plain_element_bits(const RunWords& runs) {
  ElementBits bits{};
  for (size_t row = 0; row < kChunkM; ++row) {
    const size_t strip = row / kStripM, group = row % 8, upper = row / 8 % 2;
    for (size_t half = 0; half < 2; ++half) {
      uint64_t lanes = 0;
      for (size_t thread = 0; thread < 4; ++thread) {
        const uint32_t word = runs[4 * group + thread][2 * half + strip];
        lanes |= static_cast<uint64_t>(word >> 16 * upper & 0xFFFFU) << 16 * thread;
      }
      bits[row][half] = transposed_8x8(lanes);
    }
  }
  return bits;
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

using DownOffsets = std::array<std::array<uint8_t, kStrips>, kLanes>;  // [lane][strip]

struct RunLayout {
  int rows = 0;
  DownOffsets down_offsets{};
};

// Pairs the runs of each strip: the longest downward run goes on top of the shortest upward run,
// the second longest on the second shortest and so on. Of the swap patterns the first with the
// fewest rows wins.
RunLayout run_layout(const RunWords& runs) {
  LaneCounts up[kStrips], down[kStrips];
  for (size_t lane = 0; lane < kLanes; ++lane) {
    for (size_t strip = 0; strip < kStrips; ++strip) {
      up[strip][lane] = static_cast<uint8_t>(popcount(runs[lane][strip]));
      down[strip][lane] = static_cast<uint8_t>(popcount(runs[lane][2 + strip]));
    }
  }
  const std::array<uint8_t, kLanes> rising_down[] = {sorted_lanes(down[0]), sorted_lanes(down[1])};
  RunLayout best;
  best.rows = kMaxChunkRows + 1;
  for (int pattern = 0; pattern < kSwapPatterns; ++pattern) {
    RunLayout layout;
    for (size_t strip = 0; strip < kStrips; ++strip) {
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
        layout.down_offsets[lane][strip] = static_cast<uint8_t>(4 * column + 2 * slot);
      }
    }
    if (layout.rows < best.rows) best = layout;
  }
  return best;
}

using ResidualSteps = std::array<int, kStrips>;

ResidualSteps residual_steps(const ElementBits& bits) {
  ResidualSteps steps{};
  for (size_t row = 0; row < kChunkM; ++row) {
    int count = 0;
    for (int col = 0; col < kTwoFourK; col += 4) {
      count += popcount(kGroups[group_at(bits[row], col)].residual);
    }
    steps[row / kStripM] = std::max(steps[row / kStripM], count);
  }
  return steps;
}

// What a chunk stores, and where. Offsets are in bytes from the chunk's first byte.
struct Chunk {
  bool two_four = false;
  ElementBits bits{};
  RunWords runs{};
  int rows = 0;           // of values
  ResidualSteps steps{};  // of the residual, by strip
  DownOffsets down_offsets{};

  int units() const {
    return two_four ? two_four_units(rows, steps[0], steps[1]) : chunk_units(rows);
  }
  int values_begin() const { return two_four ? kTwoFourFixedBytes : 0; }
  int values_end() const { return values_begin() + rows * kChunkRowBytes; }
  int bits_begin() const { return two_four ? 0 : values_end(); }
  int down_offsets_begin() const {
    return bits_begin() + (two_four ? kTwoFourBitsBytes : kChunkBitsBytes);
  }
  int residual_begin() const { return values_end(); }

  // Offset of the n-th value of a run.
  int value_offset(int lane, int half, int strip, int n) const {
    const int down_offset = down_offsets[static_cast<size_t>(lane)][static_cast<size_t>(strip)];
    return values_begin() + (half == 0 ? n * kChunkRowBytes + lane * 4 + strip * 2
                                       : (rows - 1 - n) * kChunkRowBytes + (down_offset & 0x7E));
  }
  // Where a step stores the value of a row's element, and where its residual offset.
  int residual_value_offset(int row, int step) const {
    return step_offset(row, step) + row % 8 * 4 + row / 8 % 2 * 2;
  }
  int residual_column_offset(int row, int step) const {
    return step_offset(row, step) + kResidualStepBytes / 2 + row % kStripM * 2;
  }

 private:
  int step_offset(int row, int step) const {
    return residual_begin() + (step + (row < kStripM ? 0 : steps[0])) * kResidualStepBytes;
  }
};

Chunk lay_out_chunk(const ElementBits& bits, bool two_four) {
  Chunk chunk;
  chunk.two_four = two_four;
  chunk.bits = bits;
  chunk.runs = run_words(bits, two_four);
  const RunLayout layout = run_layout(chunk.runs);
  chunk.rows = layout.rows;
  chunk.down_offsets = layout.down_offsets;
  if (two_four) chunk.steps = residual_steps(bits);
  return chunk;
}

// Calls visit(row, col, offset) for each value that lies within the chunk, in the order of the
// runs.
template <typename Visit>
void for_each_value(const Chunk& chunk, const Visit& visit) {
  for (int lane = 0; lane < static_cast<int>(kLanes); ++lane) {
    for (int half = 0; half < 2; ++half) {
      for (int strip = 0; strip < static_cast<int>(kStrips); ++strip) {
        const int nth = 2 * half + strip;
        const uint32_t word = chunk.runs[static_cast<size_t>(lane)][static_cast<size_t>(nth)];
        int n = 0;
        for (int i = 0; i < kRunElems && n < chunk.rows; ++i) {
          const int quad = chunk.two_four ? two_four_quad_order(i / 4) : i / 4;
          const int elem = quad_order(i % 4);
          if ((word >> chunk_bit(quad, elem) & 1U) == 0) continue;
          const int row = chunk_row(strip, lane, elem);
          int col = chunk_col(half, lane, quad, elem);
          if (chunk.two_four) {
            col = two_four_col(half, lane, quad);
            const size_t group = group_at(chunk.bits[static_cast<size_t>(row)], col);
            col += two_four_nibble(static_cast<int>(group)) >> elem % 2 * 2 & 3;
          }
          visit(row, col, chunk.value_offset(lane, half, strip, n++));
        }
      }
    }
  }
}

// The part of a residual step for kPhaseRows rows: the column of each row's element, 0 where a row
// has none (no residual element lies in column 0), and a bit for each class among them.
struct PhaseStep {
  std::array<uint8_t, kPhaseRows> cols{};
  uint8_t classes = 0;
};

// The residual of kPhaseRows rows. A chunk that was not validated may have more elements than its
// steps hold; the excess is left out.
std::vector<PhaseStep> phase_steps(const Chunk& chunk, int first_row) {
  std::vector<PhaseStep> steps(
      static_cast<size_t>(chunk.steps[static_cast<size_t>(first_row / kStripM)]));
  const auto assign = [&steps](size_t row, int col) {
    const auto of_class = static_cast<uint8_t>(1 << residual_class(col));
    PhaseStep* found = nullptr;
    for (PhaseStep& step : steps) {
      if (step.cols[row] != 0) continue;
      const bool clashes = (step.classes & of_class) != 0;
      if (!clashes || found == nullptr) found = &step;
      if (!clashes) break;
    }
    if (found == nullptr) return;
    found->cols[row] = static_cast<uint8_t>(col);
    found->classes |= of_class;
  };
  for (size_t row = 0; row < kPhaseRows; ++row) {
    const RowBits& bits = chunk.bits[static_cast<size_t>(first_row) + row];
    for (int col = 0; col < kTwoFourK; col += 4) {
      const int residual = kGroups[group_at(bits, col)].residual;
      for (int k = 2; k < 4; ++k) {
        if ((residual >> k & 1) != 0) assign(row, col + k);
      }
    }
  }
  return steps;
}

// Calls visit(row, col, step, stored) for each entry of each step of the residual. An entry without
// an element (`stored` is false) has the column of another entry or 0.
template <typename Visit>
void for_each_residual(const Chunk& chunk, const Visit& visit) {
  if (!chunk.two_four) return;
  for (int first_row = 0; first_row < kChunkM; first_row += kPhaseRows) {
    int nth = 0;
    for (const PhaseStep& step : phase_steps(chunk, first_row)) {
      int fill = 0;
      for (size_t row = kPhaseRows; row-- > 0;) fill = step.cols[row] != 0 ? step.cols[row] : fill;
      for (int row = 0; row < kPhaseRows; ++row) {
        const int col = step.cols[static_cast<size_t>(row)];
        visit(first_row + row, col != 0 ? col : fill, nth, col != 0);
      }
      ++nth;
    }
  }
}

template <typename T>
T load(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <typename T>
void store(uint8_t* to, T value) {
  std::memcpy(to, &value, sizeof(value));
}

// The stored bits of a 2:4 chunk: [strip][lane][word].
using TwoFourBits = std::array<std::array<std::array<uint32_t, 4>, kLanes>, kStrips>;

// Each of a lane's words, before they are transposed, has 16 of 64 columns: of one row in its low
// half and of the row eight below in its high half. Calls visit(row, word, shift of the 16 columns
// in the row's bits, shift in the word).
template <typename Visit>
void for_each_sixteen(size_t strip, size_t lane, const Visit& visit) {
  for (size_t upper = 0; upper < 2; ++upper) {
    const size_t row = strip * kStripM + lane / 4 + upper * 8;
    for (size_t word = 0; word < 4; ++word) visit(row, word, lane % 4 * 16, upper * 16);
  }
}

TwoFourBits two_four_bits(const ElementBits& bits) {
  TwoFourBits stored{};
  for (size_t strip = 0; strip < kStrips; ++strip) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      auto& words = stored[strip][lane];
      for_each_sixteen(strip, lane, [&](size_t row, size_t word, size_t from, size_t to) {
        words[word] |= static_cast<uint32_t>(bits[row][word] >> from & 0xFFFFU) << to;
      });
      swap_two_four_words(words.data());
    }
  }
  return stored;
}

ElementBits two_four_element_bits(TwoFourBits stored) {
  ElementBits bits{};
  for (size_t strip = 0; strip < kStrips; ++strip) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      auto& words = stored[strip][lane];
      swap_two_four_words(words.data());
      for_each_sixteen(strip, lane, [&](size_t row, size_t word, size_t to, size_t from) {
        bits[row][word] |= static_cast<uint64_t>(words[word] >> from & 0xFFFFU) << to;
      });
    }
  }
  return bits;
}

// Returns false if a value has become zero since its bit was found.
bool write_chunk(const Chunk& chunk, const uint16_t* dense, int64_t ld, const Extent& extent,
                 uint8_t* out) {
  std::memset(out, 0, static_cast<size_t>(chunk.units()) * kChunkUnitBytes);
  DownOffsets down_offsets = chunk.down_offsets;
  if (chunk.two_four) {
    const TwoFourBits bits = two_four_bits(chunk.bits);
    std::memcpy(out + chunk.bits_begin(), bits.data(), kTwoFourBitsBytes);
    const auto sizes =
        static_cast<uint32_t>(chunk.rows | chunk.steps[0] << 8 | chunk.steps[1] << 16);
    for (size_t lane = 0; lane < kLanes; ++lane) {
      down_offsets[lane][0] = static_cast<uint8_t>(down_offsets[lane][0] | (sizes >> lane & 1U));
    }
  } else {
    std::memcpy(out + chunk.bits_begin(), chunk.runs.data(), kChunkBitsBytes);
  }
  std::memcpy(out + chunk.down_offsets_begin(), down_offsets.data(), kChunkDownOffsetBytes);
  bool changed = false;
  const auto store_value = [&](int row, int col, int offset) {
    const uint16_t value = dense[(extent.row0 + row) * ld + extent.col0 + col];
    changed |= is_zero(value);
    store(out + offset, value);
  };
  for_each_value(chunk, store_value);
  for_each_residual(chunk, [&](int row, int col, int step, bool stored) {
    if (stored) store_value(row, col, chunk.residual_value_offset(row, step));
    store(out + chunk.residual_column_offset(row, step),
          static_cast<uint16_t>(residual_offset(col)));
  });
  return !changed;
}

// A chunk's bytes, clamped to the payload: a malformed weight that was not validated gives wrong
// numbers, but nothing outside the payload is read.
struct StoredChunk {
  const uint8_t* bytes;
  int64_t units;
};

StoredChunk stored_chunk(const PackedView& view, int64_t index) {
  const int64_t units = view.payload_words / kChunkUnitWords;
  const int64_t first = std::clamp<int64_t>(view.offsets[index], 0, units);
  const int64_t last = std::clamp<int64_t>(view.offsets[index + 1], first, units);
  return {reinterpret_cast<const uint8_t*>(view.payload + first * kChunkUnitWords), last - first};
}

// Reads everything but the values of a chunk that has bytes. Returns what is wrong with its size,
// or "": then every offset that a Chunk can give lies within the bytes.
std::string read_chunk(const StoredChunk& stored, Chunk* chunk) {
  chunk->two_four = is_two_four(stored.units);
  if (!chunk->two_four) {
    chunk->rows = chunk_value_rows(stored.units);
    if (chunk->rows < 0) return "no chunk has " + std::to_string(stored.units) + " units";
    std::memcpy(chunk->runs.data(), stored.bytes + chunk->bits_begin(), kChunkBitsBytes);
    chunk->bits = plain_element_bits(chunk->runs);
    std::memcpy(chunk->down_offsets.data(), stored.bytes + chunk->down_offsets_begin(),
                kChunkDownOffsetBytes);
    return "";
  }
  std::memcpy(chunk->down_offsets.data(), stored.bytes + chunk->down_offsets_begin(),
              kChunkDownOffsetBytes);
  uint32_t sizes = 0;
  for (size_t lane = 0; lane < kLanes; ++lane) {
    uint8_t& down_offset = chunk->down_offsets[lane][0];
    sizes |= static_cast<uint32_t>(down_offset & 1U) << lane;
    down_offset = static_cast<uint8_t>(down_offset & ~1U);
  }
  chunk->rows = static_cast<int>(sizes & 0xFFU);
  chunk->steps = {static_cast<int>(sizes >> 8 & 0xFFU), static_cast<int>(sizes >> 16 & 0xFFU)};
  if (sizes >> 24 != 0 || chunk->units() != stored.units) {
    return "the spare bits of the down offsets say R = " + std::to_string(chunk->rows) +
           ", G0 = " + std::to_string(chunk->steps[0]) +
           ", G1 = " + std::to_string(chunk->steps[1]) + " and " + std::to_string(sizes >> 24) +
           ", which does not give a size of " + std::to_string(stored.units) + " units";
  }
  chunk->bits = two_four_element_bits(load<TwoFourBits>(stored.bytes + chunk->bits_begin()));
  chunk->runs = run_words(chunk->bits, true);
  return "";
}

// A pair of columns of one band; a last column without a partner counts as a pair too.
struct PairPosition {
  int64_t rows, cols;  // chunks of the weight
  int64_t row_begin, row_end;
  int64_t col;

  PairPosition(int64_t nth, int64_t m, int64_t k)
      : rows(num_chunk_rows(m)), cols(num_chunk_cols(k)) {
    const int64_t pairs = num_chunk_pairs(cols);
    row_begin = nth / pairs * kBandChunkRows;
    row_end = std::min(rows, row_begin + kBandChunkRows);
    col = nth % pairs * 2;
  }
  int64_t width() const { return has_partner(col, cols) ? 2 : 1; }
  int64_t index(int64_t row, int64_t second) const {
    return chunk_index(row, col + second, rows, cols);
  }
};

std::string position_text(int row, int col) {
  return "row " + std::to_string(row) + ", column " + std::to_string(col) + " of the chunk";
}

// What is wrong with the layout of the runs, or "".
std::string runs_problem(const Chunk& chunk) {
  int up[kLanes][2] = {};           // length of the upward run by column and slot
  bool used[kLanes][2] = {};        // whether a downward run has this column and slot
  bool strip_used[2][kLanes] = {};  // whether a downward run of this strip has this column
  for (size_t lane = 0; lane < kLanes; ++lane) {
    for (size_t strip = 0; strip < kStrips; ++strip) {
      up[lane][strip] = popcount(chunk.runs[lane][strip]);
    }
  }
  for (size_t lane = 0; lane < kLanes; ++lane) {
    for (size_t strip = 0; strip < kStrips; ++strip) {
      const int down_offset = chunk.down_offsets[lane][strip];
      const int column = down_offset / 4, slot = down_offset % 4 / 2;
      const auto who = [lane, strip] {
        return "lane " + std::to_string(lane) + " of strip " + std::to_string(strip);
      };
      if (down_offset % 2 != 0 || down_offset >= kChunkRowBytes) {
        return who() + ": down offset must be even and below 128, got " +
               std::to_string(down_offset);
      }
      if (strip_used[strip][column] || used[column][slot]) {
        return who() + ": another downward run has column " + std::to_string(column) + " too";
      }
      strip_used[strip][column] = used[column][slot] = true;
      const int down = popcount(chunk.runs[lane][2 + strip]);
      if (up[column][slot] + down > chunk.rows) {
        return who() + ": runs of " + std::to_string(up[column][slot]) + " and " +
               std::to_string(down) + " values overlap in " + std::to_string(chunk.rows) + " rows";
      }
    }
  }
  return "";
}

// What is wrong with the bits, or "".
std::string bits_problem(const Chunk& chunk, const Extent& extent) {
  const int width = chunk.two_four ? kTwoFourK : kChunkK;
  if (num_stored(chunk.bits) == 0) return "a chunk without nonzeros must have no bytes";
  for (int row = 0; row < kChunkM; ++row) {
    for (int col = row < extent.rows ? extent.cols : 0; col < width; ++col) {
      const uint64_t word = chunk.bits[static_cast<size_t>(row)][static_cast<size_t>(col / 64)];
      if ((word >> col % 64 & 1U) != 0) return position_text(row, col) + " lies outside the matrix";
    }
  }
  if (!chunk.two_four) return "";
  const ResidualSteps needed = residual_steps(chunk.bits);
  for (size_t strip = 0; strip < kStrips; ++strip) {
    if (chunk.steps[strip] != needed[strip]) {
      return "the residual of strip " + std::to_string(strip) + " must have " +
             std::to_string(needed[strip]) + " steps, got " + std::to_string(chunk.steps[strip]);
    }
  }
  return "";
}

// What is wrong with the values, the residual or the padding of a chunk whose runs and bits are
// valid, or "".
std::string values_problem(const Chunk& chunk, const uint8_t* bytes) {
  std::string problem;
  std::bitset<kMaxChunkUnits * kChunkUnitBytes / 2> written;
  const auto check_value = [&](int row, int col, int offset) {
    written.set(static_cast<size_t>(offset / 2));
    if (problem.empty() && is_zero(load<uint16_t>(bytes + offset))) {
      problem = "a stored value must not be zero (" + position_text(row, col) + ")";
    }
  };
  for_each_value(chunk, check_value);
  for_each_residual(chunk, [&](int row, int col, int step, bool stored) {
    if (stored) check_value(row, col, chunk.residual_value_offset(row, step));
    const int offset = chunk.residual_column_offset(row, step);
    written.set(static_cast<size_t>(offset / 2));
    const int found = load<uint16_t>(bytes + offset);
    if (problem.empty() && found != residual_offset(col)) {
      problem = "step " + std::to_string(step) + " of row " + std::to_string(row) +
                " must have residual offset " + std::to_string(residual_offset(col)) + ", got " +
                std::to_string(found);
    }
  });
  if (!problem.empty()) return problem;
  const int end = chunk.two_four ? chunk.units() * kChunkUnitBytes : chunk.values_end();
  for (int offset = chunk.values_begin(); offset < end; offset += 2) {
    const auto value = load<uint16_t>(bytes + offset);
    if (value != 0 && !written.test(static_cast<size_t>(offset / 2))) {
      return "padding must be 0, got " + std::to_string(value) + " at byte " +
             std::to_string(offset);
    }
  }
  return "";
}

// What is wrong with a chunk that has bytes, or ""; adds its nonzeros to *nnz.
std::string chunk_problem(const StoredChunk& stored, const Extent& extent, int64_t* nnz) {
  Chunk chunk;
  std::string problem = read_chunk(stored, &chunk);
  if (problem.empty()) problem = runs_problem(chunk);
  if (problem.empty()) problem = bits_problem(chunk, extent);
  if (problem.empty()) problem = values_problem(chunk, stored.bytes);
  if (problem.empty()) *nnz += num_stored(chunk.bits);
  return problem;
}

// Checks that the chunks of a pair are of one kind, and that 2:4 chunks are in its first column.
Status check_kinds(const PackedView& view) {
  const int64_t num_pairs =
      num_bands(num_chunk_rows(view.m)) * num_chunk_pairs(num_chunk_cols(view.k));
  for (int64_t nth = 0; nth < num_pairs; ++nth) {
    const PairPosition pair(nth, view.m, view.k);
    int64_t plain = -1, two_four = -1;  // the first of each
    for (int64_t row = pair.row_begin; row < pair.row_end; ++row) {
      for (int64_t second = 0; second < pair.width(); ++second) {
        const int64_t index = pair.index(row, second);
        const int64_t units = view.offsets[index + 1] - view.offsets[index];
        if (units == 0) continue;
        int64_t& first = is_two_four(units) ? two_four : plain;
        if (first < 0) first = index;
        if (is_two_four(units) && (second != 0 || pair.width() == 1)) {
          return Status::invalid_value(
              "chunk " + std::to_string(index) + " holds " + std::to_string(units) +
              " units, a size of 2:4 chunks, but is not the first of two columns");
        }
      }
    }
    if (plain >= 0 && two_four >= 0) {
      return Status::invalid_value("the chunks of a pair must be of one kind, but chunk " +
                                   std::to_string(plain) + " is plain and chunk " +
                                   std::to_string(two_four) + " is 2:4");
    }
  }
  return Status::success();
}

// Chooses the kind of a pair. Writes the units of its chunks to `units` and returns its nonzeros.
int64_t count_pair(const uint16_t* dense, int64_t ld, const PairPosition& pair, int64_t m,
                   int64_t k, int32_t* units) {
  const bool paired = pair.width() == 2;
  std::array<int, kBandChunkRows> two_four{};
  int64_t nnz = 0, plain_sum = 0, two_four_sum = 0;
  bool fits = paired;
  for (int64_t row = pair.row_begin; row < pair.row_end; ++row) {
    const ElementBits bits = element_bits(dense, ld, chunk_extent(row, pair.col, paired, m, k));
    const int64_t stored = num_stored(bits);
    nnz += stored;
    for (int64_t second = 0; second < pair.width(); ++second) {
      const ElementBits chunk = half_of_pair(bits, static_cast<size_t>(second));
      const int plain = num_stored(chunk) == 0 ? 0 : lay_out_chunk(chunk, false).units();
      units[pair.index(row, second)] = plain;
      plain_sum += plain;
    }
    if (!fits || stored == 0) continue;
    int& of_row = two_four[static_cast<size_t>(row - pair.row_begin)];
    of_row = lay_out_chunk(bits, true).units();
    two_four_sum += of_row;
    fits = of_row <= kMaxChunkUnits;
  }
  if (fits && prefers_two_four(plain_sum, two_four_sum)) {
    for (int64_t row = pair.row_begin; row < pair.row_end; ++row) {
      units[pair.index(row, 0)] = two_four[static_cast<size_t>(row - pair.row_begin)];
      units[pair.index(row, 1)] = 0;
    }
  }
  return nnz;
}

}  // namespace

Status bitmap_count(const ValueMatrix& matrix, const ParallelFor& parallel_for, int32_t* offsets,
                    int64_t* nnz) {
  const auto* dense = matrix.row<uint16_t>(0);
  const int64_t ld = matrix.ld, m = matrix.m, k = matrix.k;
  const int64_t rows = num_chunk_rows(m), cols = num_chunk_cols(k);
  const int64_t pairs = num_bands(rows) * num_chunk_pairs(cols);
  std::vector<int64_t> counts(static_cast<size_t>(pairs));
  parallel_for(pairs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t nth = begin; nth < end; ++nth) {
      counts[static_cast<size_t>(nth)] =
          count_pair(dense, ld, PairPosition(nth, m, k), m, k, offsets + 1);
    }
  });
  *nnz = 0;
  for (const int64_t count : counts) *nnz += count;
  return fill_offsets(
      m, k, rows * cols, [&](int64_t chunk) { return offsets[chunk + 1]; }, offsets);
}

Status bitmap_pack(const ValueMatrix& matrix, const int32_t* offsets, int64_t nnz,
                   const ParallelFor& parallel_for, uint32_t* payload) {
  const auto* dense = matrix.row<uint16_t>(0);
  const int64_t ld = matrix.ld, m = matrix.m, k = matrix.k;
  const int64_t rows = num_chunk_rows(m), cols = num_chunk_cols(k);
  return pack_tiles(rows * cols, 16, nnz, parallel_for, [&](int64_t nth) -> int64_t {
    const int64_t row = nth / cols, col = nth % cols, index = chunk_index(row, col, rows, cols);
    const int64_t first = offsets[index], units = offsets[index + 1] - first;
    if (units == 0) return 0;
    const Extent extent = chunk_extent(row, col, is_two_four(units), m, k);
    const Chunk chunk = lay_out_chunk(element_bits(dense, ld, extent), is_two_four(units));
    auto* out = reinterpret_cast<uint8_t*>(payload + first * kChunkUnitWords);
    const bool fits = chunk.units() == units && write_chunk(chunk, dense, ld, extent, out);
    return fits ? num_stored(chunk.bits) : kTileChanged;
  });
}

void bitmap_unpack_tile_row(const PackedView& view, int64_t tile_row, void* values,
                            float* /*scales*/) {
  auto* dense = static_cast<uint16_t*>(values);
  const int64_t rows = num_chunk_rows(view.m), cols = num_chunk_cols(view.k);
  std::fill_n(dense, std::min<int64_t>(kChunkM, view.m - tile_row * kChunkM) * view.k, uint16_t{0});
  for (int64_t col = 0; col < cols; ++col) {
    const StoredChunk stored = stored_chunk(view, chunk_index(tile_row, col, rows, cols));
    Chunk chunk;
    if (stored.units == 0 || !read_chunk(stored, &chunk).empty()) continue;
    const Extent extent = chunk_extent(tile_row, col, chunk.two_four, view.m, view.k);
    const auto copy = [&](int r, int c, int offset) {
      if (r >= extent.rows || c >= extent.cols) return;
      dense[r * view.k + extent.col0 + c] = load<uint16_t>(stored.bytes + offset);
    };
    for_each_value(chunk, copy);
    for_each_residual(chunk, [&](int r, int c, int step, bool has_value) {
      if (has_value) copy(r, c, chunk.residual_value_offset(r, step));
    });
  }
}

Status bitmap_check_sizes(const PackedHeader& header, int64_t num_offsets, int64_t payload_words) {
  const int64_t chunks = num_chunk_rows(header.m) * num_chunk_cols(header.k);
  if (Status status = check_lengths(header, chunks, num_offsets, payload_words); !status.ok()) {
    return status;
  }
  const int64_t units = payload_words / kChunkUnitWords;
  // A unit holds at most 32 values.
  if (units > chunks * kMaxPlainUnits || header.nnz > units * (kChunkUnitBytes / 2)) {
    return nnz_does_not_fit(header, chunks, "chunk");
  }
  return Status::success();
}

Status bitmap_validate(const PackedView& view, const ParallelFor& parallel_for) {
  const int64_t rows = num_chunk_rows(view.m), cols = num_chunk_cols(view.k), chunks = rows * cols;
  Status offsets = check_offsets(view, chunks, kChunkUnitWords, [](int64_t chunk, int64_t units) {
    if (units == 0 || chunk_value_rows(units) >= 0 || is_two_four(units)) return Status::success();
    return Status::invalid_value("chunk " + std::to_string(chunk) + " must have 0, 9, 11 ... 137 " +
                                 "(plain) or 18, 20 ... 146 (2:4) units, got " +
                                 std::to_string(units));
  });
  if (!offsets.ok()) return offsets;
  if (Status kinds = check_kinds(view); !kinds.ok()) return kinds;
  const auto check_chunk = [&](int64_t nth, FirstFailure& failure) {
    const int64_t row = nth / cols, col = nth % cols, index = chunk_index(row, col, rows, cols);
    const StoredChunk stored = stored_chunk(view, index);
    int64_t nnz = 0;
    if (stored.units == 0) return nnz;
    const Extent extent = chunk_extent(row, col, is_two_four(stored.units), view.m, view.k);
    const std::string problem = chunk_problem(stored, extent, &nnz);
    if (!problem.empty()) failure.report(index, problem);
    return nnz;
  };
  return check_tiles(view, chunks, "chunk", parallel_for, check_chunk);
}

int64_t bitmap_count_stored(const PackedView& view, const ParallelFor& parallel_for) {
  const int64_t chunks = num_chunk_rows(view.m) * num_chunk_cols(view.k);
  return sum_over(chunks, 64, parallel_for, [&](int64_t i) {
    const StoredChunk stored = stored_chunk(view, i);
    const ChunkBits bits = chunk_bits(stored.units);
    int64_t count = 0;
    for (int offset = bits.begin; offset < bits.end; offset += 4) {
      count += static_cast<int64_t>(std::bitset<32>(load<uint32_t>(stored.bytes + offset)).count());
    }
    return count;
  });
}

}  // namespace flash_llm
