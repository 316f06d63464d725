// The order in which packing stores the nonzeros of a gather slice (format/gather.h): one source
// for the host and for the kernel that packs, so that both write the same bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/host_device.h"
#include "format/gather.h"

namespace flash_llm {

inline constexpr int kGatherClasses = 8;  // columns modulo this: banks of 16 bytes per column
inline constexpr int kGatherFourByteBanks = 32, kGatherEightByteBanks = 16;

FLASH_LLM_HOST_DEVICE inline int count_bits(uint32_t word) {
#ifdef __CUDA_ARCH__
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}

// The index of the lowest bit that is set; one must be.
FLASH_LLM_HOST_DEVICE inline int lowest_bit(uint32_t word) {
#ifdef __CUDA_ARCH__
  return __ffs(static_cast<int>(word)) - 1;
#else
  return __builtin_ctz(word);
#endif
}

// What is known of a slice while it is packed. A kernel keeps it in shared memory.
struct GatherOrderState {
  // A lane's nonzeros: those columns before `end` whose bits are set. `oldest` is at or before the
  // first of them.
  struct Run {
    int oldest, end;
    int left;       // nonzeros that are not stored yet
    int can_spare;  // steps that need not store one
    int col;        // of the last step
  };
  Run runs[kGatherLanes];
  // The cheapest column of each class for eight lanes, -1 if there is none, and what it costs.
  int column[kGatherClasses][kGatherClasses], cost[kGatherClasses][kGatherClasses];
  int class_of[kGatherClasses];     // the assignment
  int class_lanes[kGatherClasses];  // lanes of this phase
  // What the earlier lanes of this step add to the cost of a column, for lanes of either half of
  // the warp, by the column's bank of 4 bytes.
  int penalty[2][kGatherFourByteBanks];
  int least_penalty[kGatherClasses];  // of each class, for the lanes of this phase
  // Of the assignment's search, counted from 1; 0 stands for none.
  int lane_price[kGatherClasses + 1], class_price[kGatherClasses + 1], slack[kGatherClasses + 1];
  int lane_of[kGatherClasses + 1], way[kGatherClasses + 1];
  bool done[kGatherClasses + 1];
};

class GatherOrder {
 public:
  // `bits` has `words` words for each of the slice's rows, with a bit for each of `cols` columns:
  // whether its element is a nonzero. Storing clears it.
  FLASH_LLM_HOST_DEVICE GatherOrder(GatherOrderState& state, uint32_t* bits, int words, int cols)
      : s_(state), bits_(bits), words_(words), cols_(cols) {
    for (int row = 0; row < kGatherSliceRows; ++row) begin_row(row);
    int longest = 0;
    for (const GatherOrderState::Run& run : s_.runs) longest = larger(longest, run.left);
    const int steps = (longest + kGatherQuadSteps - 1) / kGatherQuadSteps * kGatherQuadSteps;
    for (GatherOrderState::Run& run : s_.runs) run.can_spare = steps - run.left;
  }

  // Chooses the order, and returns the slice's quads. `bytes_of(quad)` says where the bytes of a
  // quad go, after those of its segment's first columns if it begins one; null drops them.
  // `value_of(row, column)` is a stored value.
  template <typename BytesOf, typename ValueOf>
  FLASH_LLM_HOST_DEVICE int store(const BytesOf& bytes_of, const ValueOf& value_of) {
    int left = 0;
    for (const GatherOrderState::Run& run : s_.runs) left += run.left;
    int quads = 0;
    for (; left > 0; ++quads) {
      uint8_t* const out = bytes_of(quads);
      for (int step = 0; step < kGatherQuadSteps; ++step) {
        segment_begins_ = step == 0 && quads % kGatherSegmentQuads == 0;
        for (auto& half : s_.penalty) {
          for (int& penalty : half) penalty = 0;
        }
        for (int lane = 0; lane < kGatherLanes; lane += kGatherClasses) {
          left -= store_phase(lane, step, out, value_of);
        }
      }
    }
    return quads;
  }

 private:
  static constexpr int kFourBytePenalty = 60, kEightBytePenalty = 80;
  static constexpr int kNoEntry = 4000, kRunIsDone = 2000;  // more than any candidate costs
  static constexpr int kInfinity = 1 << 29;

  FLASH_LLM_HOST_DEVICE static int larger(int a, int b) { return a < b ? b : a; }
  FLASH_LLM_HOST_DEVICE static int smaller(int a, int b) { return a < b ? a : b; }
  FLASH_LLM_HOST_DEVICE static bool reaches(int from, int to) {
    return to - from <= kGatherReach && from - to <= kGatherReach;
  }

  FLASH_LLM_HOST_DEVICE uint32_t* row_bits(int lane) const {
    return bits_ + ptrdiff_t{lane / kGatherRuns} * words_;
  }

  // Cuts a row into runs.
  FLASH_LLM_HOST_DEVICE void begin_row(int row) {
    GatherOrderState::Run* const runs = s_.runs + ptrdiff_t{row} * kGatherRuns;
    const uint32_t* const bits = bits_ + ptrdiff_t{row} * words_;
    int count = 0;
    for (int i = 0; i < words_; ++i) count += count_bits(bits[i]);
    for (int run = 0; run < kGatherRuns; ++run) {
      runs[run].oldest = runs[run].end = cols_;
      runs[run].left = count * (run + 1) / kGatherRuns - count * run / kGatherRuns;
      runs[run].col = 0;
    }
    int seen = 0, run = 0;
    for (int i = 0; i < words_ && run < kGatherRuns; ++i) {
      const int in_word = count_bits(bits[i]);
      for (; run < kGatherRuns && count * run / kGatherRuns < seen + in_word; ++run) {
        uint32_t word = bits[i];
        for (int skip = count * run / kGatherRuns - seen; skip > 0; --skip) word &= word - 1;
        runs[run].oldest = 32 * i + lowest_bit(word);
        if (run > 0) runs[run - 1].end = runs[run].oldest;
      }
      seen += in_word;
    }
  }

  // The first column from `col` on whose bit is set; `end` if there is none before it.
  FLASH_LLM_HOST_DEVICE static int next_column(const uint32_t* bits, int col, int end) {
    while (col < end) {
      const uint32_t word = bits[col / 32] >> col % 32;
      if (word != 0) return smaller(col + lowest_bit(word), end);
      col = (col / 32 + 1) * 32;
    }
    return end;
  }

  // The banks whose columns have a class.
  FLASH_LLM_HOST_DEVICE static uint32_t banks_of_class(int c) { return 0x01010101U << c; }

  // Finds the cheapest column of each class within a lane's reach, the first of equals.
  FLASH_LLM_HOST_DEVICE void find_candidates(int lane, int* column, int* cost) {
    GatherOrderState::Run& run = s_.runs[lane];
    for (int c = 0; c < kGatherClasses; ++c) {
      column[c] = -1;
      cost[c] = run.left > 0 ? kNoEntry : kRunIsDone;
    }
    if (run.left == 0) return;
    const uint32_t* const bits = row_bits(lane);
    const int* const penalty = s_.penalty[lane / kGatherEightByteBanks];
    const int oldest = run.oldest = next_column(bits, run.oldest, run.end);
    int begin = oldest, end = smaller(run.end, oldest + kGatherReach + 1);
    if (!segment_begins_) {
      begin = larger(begin, run.col - kGatherReach);
      end = smaller(end, run.col + kGatherReach + 1);
    }
    // Banks of which no column that follows can be the cheapest of its class: one nearer has the
    // same penalty, or the least of the class.
    uint32_t settled = 0;
    for (int word_begin = begin / 32 * 32; word_begin < end && settled != ~0U; word_begin += 32) {
      uint32_t word = bits[word_begin / 32] & ~settled;
      if (word_begin < begin) word &= ~0U << begin % 32;
      if (end - word_begin < 32) word &= ~(~0U << (end - word_begin));
      settled |= word;
      while (word != 0) {
        const int bank = lowest_bit(word), c = bank % kGatherClasses;
        word &= word - 1;
        const int here = word_begin + bank - oldest + penalty[bank];
        if (here < cost[c]) {
          cost[c] = here;
          column[c] = word_begin + bank;
        }
        if (penalty[bank] == s_.least_penalty[c]) {
          settled |= banks_of_class(c);
          word &= ~banks_of_class(c);
        }
      }
    }
  }

  // Assigns a class to each of eight lanes with the least total cost (the Hungarian method).
  FLASH_LLM_HOST_DEVICE void assign() {
    for (int i = 0; i <= kGatherClasses; ++i) {
      s_.lane_price[i] = s_.class_price[i] = s_.lane_of[i] = s_.way[i] = 0;
    }
    for (int lane = 1; lane <= kGatherClasses; ++lane) {
      // Most lanes find their cheapest class free, which the search below would give them too.
      int cheapest = 1, price = kInfinity;
      for (int c = 1; c <= kGatherClasses; ++c) {
        const int reduced = s_.cost[lane - 1][c - 1] - s_.class_price[c];
        if (reduced < price) {
          price = reduced;
          cheapest = c;
        }
      }
      if (s_.lane_of[cheapest] == 0) {
        s_.lane_of[cheapest] = lane;
        s_.lane_price[lane] = price;
        continue;
      }
      for (int c = 0; c <= kGatherClasses; ++c) {
        s_.slack[c] = kInfinity;
        s_.done[c] = false;
      }
      int at = 0;
      s_.lane_of[0] = lane;
      do {
        s_.done[at] = true;
        const int from = s_.lane_of[at];
        int least = kInfinity, next = 0;
        for (int c = 1; c <= kGatherClasses; ++c) {
          if (s_.done[c]) continue;
          const int reduced = s_.cost[from - 1][c - 1] - s_.lane_price[from] - s_.class_price[c];
          if (reduced < s_.slack[c]) {
            s_.slack[c] = reduced;
            s_.way[c] = at;
          }
          if (s_.slack[c] < least) {
            least = s_.slack[c];
            next = c;
          }
        }
        for (int c = 0; c <= kGatherClasses; ++c) {
          if (s_.done[c]) {
            s_.lane_price[s_.lane_of[c]] += least;
            s_.class_price[c] -= least;
          } else {
            s_.slack[c] -= least;
          }
        }
        at = next;
      } while (s_.lane_of[at] != 0);
      while (at != 0) {
        s_.lane_of[at] = s_.lane_of[s_.way[at]];
        at = s_.way[at];
      }
    }
    for (int c = 1; c <= kGatherClasses; ++c) s_.class_of[s_.lane_of[c] - 1] = c - 1;
  }

  // One step of eight lanes; returns how many nonzeros it stores. Those of the assignment come
  // first, then what conflicts least.
  template <typename ValueOf>
  FLASH_LLM_HOST_DEVICE int store_phase(int first_lane, int step, uint8_t* out,
                                        const ValueOf& value_of) {
    const int* const penalty = s_.penalty[first_lane / kGatherEightByteBanks];
    for (int c = 0; c < kGatherClasses; ++c) {
      s_.class_lanes[c] = 0;
      s_.least_penalty[c] = penalty[c];
      for (int bank = c + kGatherClasses; bank < kGatherFourByteBanks; bank += kGatherClasses) {
        s_.least_penalty[c] = smaller(s_.least_penalty[c], penalty[bank]);
      }
    }
    for (int i = 0; i < kGatherClasses; ++i) {
      find_candidates(first_lane + i, s_.column[i], s_.cost[i]);
    }
    assign();
    int stored = 0;
    for (int i = 0; i < kGatherClasses; ++i) {
      const int col = s_.column[i][s_.class_of[i]];
      if (col >= 0) stored += store_nonzero(first_lane + i, col, step, out, value_of);
    }
    for (int i = 0; i < kGatherClasses; ++i) {
      if (s_.column[i][s_.class_of[i]] >= 0) continue;
      const int lane = first_lane + i, col = least_conflict(s_.column[i]);
      if (col >= 0 && (s_.class_lanes[col % kGatherClasses] == 0 || s_.runs[lane].can_spare == 0)) {
        stored += store_nonzero(lane, col, step, out, value_of);
        continue;
      }
      if (col >= 0) --s_.runs[lane].can_spare;
      store_step(lane, filler_column(s_.runs[lane]), 0, step, out);
    }
    return stored;
  }

  // The candidate whose class the fewest lanes have, the first of several; -1 if there is none.
  FLASH_LLM_HOST_DEVICE int least_conflict(const int* column) const {
    int best = -1, lanes = kGatherClasses;
    for (int c = 0; c < kGatherClasses; ++c) {
      if (column[c] < 0 || s_.class_lanes[c] > lanes) continue;
      if (s_.class_lanes[c] == lanes && best >= 0 && column[c] >= best) continue;
      best = column[c];
      lanes = s_.class_lanes[c];
    }
    return best;
  }

  // Where a step that stores nothing goes: towards the run's oldest nonzero, to a class that the
  // fewest lanes have.
  FLASH_LLM_HOST_DEVICE int filler_column(const GatherOrderState::Run& run) const {
    constexpr int kBridge = kGatherReach - kGatherClasses + 1;  // leaves room to choose a class
    int to = run.left > 0 ? run.oldest : segment_begins_ ? cols_ : run.col;
    if (!segment_begins_) to = smaller(larger(to, run.col - kBridge), run.col + kBridge);
    const int base =
        larger(smaller(to, cols_ - kGatherClasses), 0) / kGatherClasses * kGatherClasses;
    int col = base;
    for (int c = 1; c < smaller(kGatherClasses, cols_ - base); ++c) {
      if ((segment_begins_ || reaches(run.col, base + c)) &&
          s_.class_lanes[c] < s_.class_lanes[col % kGatherClasses]) {
        col = base + c;
      }
    }
    return col;
  }

  template <typename ValueOf>
  FLASH_LLM_HOST_DEVICE int store_nonzero(int lane, int col, int step, uint8_t* out,
                                          const ValueOf& value_of) {
    row_bits(lane)[col / 32] &= ~(1U << col % 32);
    --s_.runs[lane].left;
    store_step(lane, col, out == nullptr ? uint16_t{0} : value_of(lane / kGatherRuns, col), step,
               out);
    return 1;
  }

  FLASH_LLM_HOST_DEVICE void store_step(int lane, int col, uint16_t value, int step, uint8_t* out) {
    GatherOrderState::Run& run = s_.runs[lane];
    if (segment_begins_) run.col = col;
    if (out != nullptr) {
      if (segment_begins_) {
        const auto first = static_cast<uint16_t>(col);
        std::memcpy(out - kGatherHeadBytes + ptrdiff_t{lane} * 2, &first, sizeof(first));
      }
      const int at = lane * kGatherQuadSteps + step;
      out[at] = static_cast<uint8_t>(col - run.col);
      std::memcpy(out + kGatherQuadStepBytes + ptrdiff_t{at} * 2, &value, sizeof(value));
    }
    run.col = col;
    ++s_.class_lanes[col % kGatherClasses];
    const int bank = col % kGatherFourByteBanks;
    for (auto& half : s_.penalty) half[bank] += kFourBytePenalty;
    int* const own_half = s_.penalty[lane / kGatherEightByteBanks];
    own_half[bank] += kEightBytePenalty;
    own_half[bank ^ kGatherEightByteBanks] += kEightBytePenalty;
  }

  GatherOrderState& s_;
  uint32_t* bits_;
  int words_, cols_;
  bool segment_begins_ = false;
};

}  // namespace flash_llm
