// The bitmap format on the device: count, pack and unpack, with one warp per chunk (count: per pair
// of chunks). The bytes are those of format/bitmap.cpp; lanes are ranked by comparing counts
// instead of by sorting.
//
// Shared memory holds a chunk's bits row by row, one byte for 8 columns (BitRows), and its values
// in the order in which its runs take them (SlotRows): 32 x 128 elements, or 32 x 128 slots of a
// 2:4 chunk, in which column 64 half + 8 quad + 2 (lane % 4) + slot holds slot `slot` of a group.
#include <cstdint>

#include "cuda/bitmap/decode.cuh"
#include "cuda/dense_matrix.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/sm80.cuh"
#include "format/bitmap.h"

namespace flash_llm {
namespace {

constexpr int kWarps = 2;
constexpr int kThreads = kWarps * 32;
constexpr uint32_t kAllLanes = ~0U;
// A row of slots in shared memory, padded so that a fragment's eight rows of four words are in 32
// different banks.
constexpr int kSlotRowWords = kChunkK / 2 + 4;
constexpr int kMaxChunkBytes = kMaxChunkUnits * kChunkUnitBytes;

using SlotRow = uint32_t[kSlotRowWords];
using SlotRows = SlotRow[kChunkM];

// The word with a lane's two slots of a quad, in the upper (`lower` = 0) or the lower eight rows of
// a strip, which begins at `rows`.
__device__ __forceinline__ uint32_t& slots_of(SlotRow* rows, int lane, int half, int quad,
                                              int lower) {
  return rows[lower * 8 + lane / 4][half * 32 + quad * 4 + lane % 4];
}

// The part of the matrix that a chunk covers.
struct Extent {
  int64_t row0, col0;
  int rows, cols;

  __device__ Extent(int64_t chunk_row, int64_t chunk_col, bool two_four, int64_t m, int64_t k)
      : row0(chunk_row * kChunkM),
        col0(chunk_col * kChunkK),
        rows(static_cast<int>(min(int64_t{kChunkM}, m - row0))),
        cols(static_cast<int>(min(int64_t{two_four ? kTwoFourK : kChunkK}, k - col0))) {}
};

// The position of a warp's chunk. The warps of a CTA work on one column of chunks, so that the
// whole CTA exits at once if this is the empty second column of a 2:4 pair.
struct ChunkPosition {
  int64_t row, col;
  bool paired;    // whether the column has a partner
  int64_t index;  // of the chunk in `offsets`; -1 for a warp without a chunk
  int64_t first;  // of the first chunk of its pair

  __device__ ChunkPosition(int64_t m, int64_t k) {
    const auto rows = static_cast<unsigned>(num_chunk_rows(m));
    const auto cols = static_cast<unsigned>(num_chunk_cols(k));
    row = int64_t{blockIdx.x / cols} * kWarps + threadIdx.x / 32;
    col = blockIdx.x % cols;
    paired = has_partner(col, cols);
    index = row < rows ? chunk_index(row, col, rows, cols) : -1;
    first = row < rows ? chunk_index(row, col & ~int64_t{1}, rows, cols) : -1;
  }

  // The index in `offsets` of the pair's second chunk.
  __device__ int64_t second(int64_t m, int64_t k) const {
    return chunk_index(row, col | 1, num_chunk_rows(m), num_chunk_cols(k));
  }
};

unsigned num_ctas(int64_t m, int64_t k) {
  return static_cast<unsigned>((num_chunk_rows(m) + kWarps - 1) / kWarps * num_chunk_cols(k));
}

// Loads eight neighbouring columns of a row of an extent; elements outside the matrix are zero.
__device__ __forceinline__ uint4 load_eight(const DenseMatrix& dense, bool aligned,
                                            const Extent& extent, int row, int col) {
  if (row >= extent.rows || col >= extent.cols) return make_uint4(0, 0, 0, 0);
  const uint16_t* source = dense.row(extent.row0 + row) + extent.col0 + col;
  if (aligned && col + 8 <= extent.cols) return __ldg(reinterpret_cast<const uint4*>(source));
  uint32_t value[8] = {};
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    if (col + c < extent.cols) value[c] = source[c];
  }
  return make_uint4(value[0] | value[1] << 16, value[2] | value[3] << 16, value[4] | value[5] << 16,
                    value[6] | value[7] << 16);
}

__device__ __forceinline__ bool rows_are_aligned(const DenseMatrix& dense) {
  return dense.ld % 8 == 0 && reinterpret_cast<uintptr_t>(dense.data) % 16 == 0;
}

// Bits 0 and 16 say whether the low and the high value of a word are nonzero.
__device__ __forceinline__ uint32_t nonzero_halves(uint32_t word) {
  return ((word & 0x7FFF7FFFU) + 0x7FFF7FFFU) >> 15 & 0x00010001U;
}

// Bit c says whether value c of eight is nonzero.
__device__ __forceinline__ uint32_t nonzero_byte(const uint4& values) {
  const uint32_t halves = nonzero_halves(values.x) | nonzero_halves(values.y) << 2 |
                          nonzero_halves(values.z) << 4 | nonzero_halves(values.w) << 6;
  return (halves | halves >> 15) & 0xFFU;
}

// Bits that say which of 32 x 256 elements are stored. Rows are padded by a word, so that 32 lanes
// can read a row each without bank conflicts.
struct BitRows {
  uint32_t words[kChunkM][kTwoFourK / 32 + 1];

  // Stores the bits of columns 8 eighth to 8 eighth + 7.
  __device__ __forceinline__ void store_byte(int row, int eighth, uint32_t bits) {
    reinterpret_cast<uint8_t*>(words[row])[eighth] = static_cast<uint8_t>(bits);
  }
  // The bits of columns 16 sixteenth to 16 sixteenth + 15.
  __device__ __forceinline__ uint32_t half_word(int row, int sixteenth) const {
    return reinterpret_cast<const uint16_t*>(words[row])[sixteenth];
  }
  // The number of bits set in the first `cols` columns of all rows.
  __device__ __forceinline__ int num_stored(int cols, int lane) const {
    int count = 0;
    for (int word = 0; word < cols / 32; ++word) count += __popc(words[lane][word]);
    return __reduce_add_sync(kAllLanes, count);
  }
};

// A lane's bits of its four runs of a chunk.
struct RunWords {
  uint32_t word[2][2];  // [half][strip], bit chunk_bit(quad, elem)

  __device__ __forceinline__ int num_stored() const {
    const int count =
        __popc(word[0][0]) + __popc(word[0][1]) + __popc(word[1][0]) + __popc(word[1][1]);
    return __reduce_add_sync(kAllLanes, count);
  }
};

// The runs of a plain chunk, whose 128 columns begin at word `first_word` of each row.
__device__ __forceinline__ RunWords plain_runs(const BitRows& bits, int first_word, int lane) {
  RunWords runs = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int half = i / 4, strip = i / 2 % 2, lower = i % 2;
    // Each byte holds the bits of 8 columns, of which two are the lane's, in one quad.
    const uint32_t* row =
        &bits.words[strip * kStripM + lower * 8 + lane / 4][first_word + half * 2];
    const uint32_t quads[2] = {row[0] >> lane % 4 * 2, row[1] >> lane % 4 * 2};
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      // dp4a moves bit 0 of byte i to bit i: low for quads 0..3, then 4..7.
      const uint32_t low = __dp4a(quads[0] >> column & 0x01010101U, 0x08040201U, 0U);
      const uint32_t eight = __dp4a(quads[1] >> column & 0x01010101U, 0x80402010U, low);
      runs.word[half][strip] |= eight << chunk_bit(0, 2 * lower + column);
    }
  }
  return runs;
}

// A lane's four words of bits of a strip of a 2:4 chunk, in the stored order.
__device__ __forceinline__ void two_four_bits(const BitRows& bits, int strip, int lane,
                                              uint32_t (&words)[4]) {
  const int row = strip * kStripM + lane / 4;
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    const int sixteenth = p * 4 + lane % 4;
    words[p] = bits.half_word(row, sixteenth) | bits.half_word(row + 8, sixteenth) << 16;
  }
  swap_two_four_words(words);
}

__device__ __forceinline__ RunWords two_four_runs(const BitRows& bits, int lane) {
  RunWords runs;
#pragma unroll
  for (int strip = 0; strip < 2; ++strip) {
    uint32_t words[4];
    two_four_bits(bits, strip, lane, words);
    const TwoFourWords found = two_four_words(words, lane);
    runs.word[0][strip] = found.runs[0];
    runs.word[1][strip] = found.runs[1];
  }
  return runs;
}

// The bits of eight groups without the first two set bits of each group: those of the residual.
__device__ __forceinline__ uint32_t residual_bits(uint32_t bits) {
  const uint32_t b0 = bits << 3, b1 = bits << 2, b2 = bits << 1;
  // At bit 3 of each nibble: at least two of bits 0..2 are set. At bit 2: bits 0 and 1 are set.
  const uint32_t fourth = (b0 & b1) | (b0 & b2) | (b1 & b2);
  const uint32_t third = b1 & b2;
  return bits & ((fourth & 0x88888888U) | (third & 0x44444444U));
}

// The number of steps of each strip's residual.
struct ResidualSteps {
  int steps[2] = {};

  ResidualSteps() = default;
  __device__ __forceinline__ ResidualSteps(const BitRows& bits, int lane) {
    int count = 0;  // residual elements in row `lane`
#pragma unroll
    for (int word = 0; word < kTwoFourK / 32; ++word) {
      count += __popc(residual_bits(bits.words[lane][word]));
    }
    steps[0] = __reduce_max_sync(kAllLanes, lane < kStripM ? count : 0);
    steps[1] = __reduce_max_sync(kAllLanes, lane < kStripM ? 0 : count);
  }
};

// The rank of this lane when all 32 are sorted by (count, lane); counts are at most 32.
__device__ __forceinline__ int rank_of(int count, int lane) {
  uint32_t equal = kAllLanes, less = 0;
#pragma unroll
  for (int bit = 5; bit >= 0; --bit) {
    const bool mine = (count >> bit & 1) != 0;
    const uint32_t same = __ballot_sync(kAllLanes, mine) ^ (mine ? 0U : kAllLanes);
    if (mine) less |= equal & ~same;
    equal &= same;
  }
  return __popc(less | (equal & ((1U << lane) - 1U)));
}

// The lane whose rank equals this lane's index.
__device__ __forceinline__ int lane_of_rank(int rank, int lane) {
  uint32_t found = kAllLanes;
#pragma unroll
  for (int bit = 0; bit < 5; ++bit) {
    const uint32_t set = __ballot_sync(kAllLanes, (rank >> bit & 1) != 0);
    found &= (lane >> bit & 1) != 0 ? set : ~set;
  }
  return __ffs(static_cast<int>(found)) - 1;
}

// The columns of a chunk's downward runs and the number of rows of values, as run_layout in
// format/bitmap.cpp finds them.
class RunLayout {
 public:
  __device__ __forceinline__ RunLayout(const RunWords& runs, int lane) : lane_(lane) {
    int longest_down[2];  // [strip]: the length of the lane-th longest downward run
#pragma unroll
    for (int strip = 0; strip < 2; ++strip) {
      up_[strip] = __popc(runs.word[0][strip]);
      const int down = __popc(runs.word[1][strip]);
      partner_rank_[strip] = 31 - rank_of(down, lane);
      longest_down[strip] = __shfl_sync(kAllLanes, down, lane_of_rank(partner_rank_[strip], lane));
    }
    rows_ = kMaxChunkRows + 1;
#pragma unroll 1
    for (int pattern = 0; pattern < kSwapPatterns; ++pattern) {
      int rows = 0;
#pragma unroll
      for (int strip = 0; strip < 2; ++strip) {
        const int up = free_up(pattern, strip);
        rows = max(rows, up + __shfl_sync(kAllLanes, longest_down[strip], rank_of(up, lane)));
      }
      rows = __reduce_max_sync(kAllLanes, rows);
      if (rows < rows_) {
        rows_ = rows;
        pattern_ = pattern;
      }
    }
  }

  // Rows of values.
  __device__ __forceinline__ int rows() const { return rows_; }

  // The byte offset in a row at which this lane's downward run of a strip begins.
  __device__ __forceinline__ int down_offset(int strip) const {
    const int rank = rank_of(free_up(pattern_, strip), lane_);
    const int column = __shfl_sync(kAllLanes, lane_of_rank(rank, lane_), partner_rank_[strip]);
    return 4 * column + 2 * (swaps_slots(pattern_, column) ? 1 - strip : strip);
  }

 private:
  // The length of the upward run that shares column and slot with the downward run of `strip` that
  // goes to this lane's column.
  __device__ __forceinline__ int free_up(int pattern, int strip) const {
    return swaps_slots(pattern, lane_) ? up_[1 - strip] : up_[strip];
  }

  int lane_;
  int up_[2];            // lengths of this lane's upward runs, by strip
  int partner_rank_[2];  // rank of the upward run that this lane's downward run is paired with
  int rows_, pattern_ = 0;
};

// One CTA for a pair of columns of a band, with one warp for each chunk row, because whether the
// pair is 2:4 depends on all its chunks.
__global__ void __launch_bounds__(kBandChunkRows * 32)
    count_kernel(DenseMatrix dense, int32_t* units, int32_t* nnz) {
  __shared__ BitRows band_bits[kBandChunkRows];
  __shared__ int plain_sum, two_four_sum;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t rows = num_chunk_rows(dense.m), cols = num_chunk_cols(dense.k);
  const auto pairs = static_cast<unsigned>(num_chunk_pairs(cols));
  const int64_t row = int64_t{blockIdx.x / pairs} * kBandChunkRows + warp;
  const int64_t col = int64_t{blockIdx.x % pairs} * 2;
  const bool paired = has_partner(col, cols);
  if (threadIdx.x == 0) plain_sum = two_four_sum = 0;
  __syncthreads();

  int plain[2] = {}, stored[2] = {}, two_four = 0;
  if (row < rows) {
    BitRows& bits = band_bits[warp];
    const Extent extent(row, col, paired, dense.m, dense.k);
    const bool aligned = rows_are_aligned(dense);
#pragma unroll 8
    for (int r = 0; r < kChunkM; ++r) {
      bits.store_byte(r, lane, nonzero_byte(load_eight(dense, aligned, extent, r, lane * 8)));
    }
    __syncwarp();
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      const RunWords runs = plain_runs(bits, second * (kChunkK / 32), lane);
      stored[second] = runs.num_stored();
      if (stored[second] > 0) plain[second] = chunk_units(RunLayout(runs, lane).rows());
    }
    if (paired && stored[0] + stored[1] > 0) {
      const ResidualSteps residual(bits, lane);
      two_four = two_four_units(RunLayout(two_four_runs(bits, lane), lane).rows(),
                                residual.steps[0], residual.steps[1]);
    }
    if (lane == 0) {
      atomicAdd(&plain_sum, plain[0] + plain[1]);
      atomicAdd(&two_four_sum, two_four);
    }
  }
  const bool must_be_plain = __syncthreads_or(!paired || two_four > kMaxChunkUnits);
  if (row >= rows || lane != 0) return;
  const bool pair_is_two_four = !must_be_plain && prefers_two_four(plain_sum, two_four_sum);
#pragma unroll
  for (int second = 0; second < 2; ++second) {
    if (second != 0 && !paired) break;
    const int64_t index = chunk_index(row, col + second, rows, cols);
    nnz[index] = stored[second];
    units[index] = !pair_is_two_four ? plain[second] : second == 0 ? two_four : 0;
  }
}

// Loads the bits and values of a plain chunk.
__device__ __forceinline__ void load_elements(const DenseMatrix& dense, const Extent& extent,
                                              int lane, BitRows& bits, SlotRows& slots) {
  const bool aligned = rows_are_aligned(dense);
#pragma unroll 8
  for (int i = 0; i < kChunkM / 2; ++i) {  // two rows at a time
    const int row = i * 2 + lane / 16, eighth = lane % 16;
    const uint4 values = load_eight(dense, aligned, extent, row, eighth * 8);
    bits.store_byte(row, eighth, nonzero_byte(values));
    *reinterpret_cast<uint4*>(&slots[row][eighth * 4]) = values;
  }
  __syncwarp();
}

// The word of a row of SlotRows where the slots of columns 8 eighth to 8 eighth + 7 begin: one word
// for each of the two groups.
__device__ __forceinline__ int slot_word(int eighth) {
  return eighth / 4 % 2 * 32 + (eighth / 8 + eighth / 2 % 2 * 4) * 4 + eighth % 2 * 2;
}

// The two slots of a group, which has four values in `low` and `high`.
__device__ __forceinline__ uint32_t select_slots(uint32_t bits, uint32_t low, uint32_t high) {
  const auto nibble = static_cast<uint32_t>(two_four_nibble(static_cast<int>(bits)));
  return byte_permute(low, high, 0x1010U + (nibble & 3U) * 0x22U + (nibble >> 2) * 0x2200U);
}

// The inverse: a group's four values from its two slots, which are zero if not stored.
__device__ __forceinline__ uint2 spread_slots(uint32_t bits, uint32_t slots) {
  const int nibble = two_four_nibble(static_cast<int>(bits));
  const uint64_t values = static_cast<uint64_t>(slots & 0xFFFFU) << 16 * (nibble & 3) |
                          static_cast<uint64_t>(slots >> 16) << 16 * (nibble >> 2);
  return make_uint2(static_cast<uint32_t>(values), static_cast<uint32_t>(values >> 32));
}

// Loads the bits and slots of a 2:4 chunk, but not the values of its residual.
__device__ __forceinline__ void load_slots(const DenseMatrix& dense, const Extent& extent, int lane,
                                           BitRows& bits, SlotRows& slots) {
  const bool aligned = rows_are_aligned(dense);
#pragma unroll 8
  for (int row = 0; row < kChunkM; ++row) {
    const uint4 values = load_eight(dense, aligned, extent, row, lane * 8);
    const uint32_t byte = nonzero_byte(values);
    bits.store_byte(row, lane, byte);
    *reinterpret_cast<uint2*>(&slots[row][slot_word(lane)]) = make_uint2(
        select_slots(byte & 0xFU, values.x, values.y), select_slots(byte >> 4, values.z, values.w));
  }
  __syncwarp();
}

// Where a row's value, and the offset of its column in X, are in a step of the residual, in bytes
// from the first step.
__device__ __forceinline__ int residual_value_byte(int row, int step) {
  return step * kResidualStepBytes + row % 8 * 4 + row / 8 % 2 * 2;
}
__device__ __forceinline__ int residual_column_byte(int row, int step) {
  return step * kResidualStepBytes + kResidualStepBytes / 2 + row % kStripM * 2;
}

// A set of steps of a strip, which has at most 128: two per group of a row, of which it has 64.
struct StepSet {
  uint64_t low, high;

  // All steps from `first` on.
  __device__ __forceinline__ static StepSet from(int first) {
    constexpr uint64_t kAll = ~uint64_t{0};
    if (first < 64) return {kAll << first, kAll};
    return {0, first < 128 ? kAll << (first - 64) : 0};
  }
  __device__ __forceinline__ void insert(int step) {
    const uint64_t bit = uint64_t{1} << step % 64;
    low |= step < 64 ? bit : 0;
    high |= step < 64 ? 0 : bit;
  }
  // The first step that is in neither set, or -1.
  __device__ __forceinline__ static int first_outside(const StepSet& a, const StepSet& b) {
    const uint64_t low = ~(a.low | b.low), high = ~(a.high | b.high);
    if (low != 0) return __ffsll(static_cast<long long>(low)) - 1;
    return high != 0 ? 63 + __ffsll(static_cast<long long>(high)) : -1;
  }
};

// Assigns the residual's elements to steps and writes their columns' offsets into the steps, which
// must be zero before. Lanes 8 e to 8 e + 7 work on rows 8 e to 8 e + 7, one row after the other;
// lane 8 e + c knows which steps have an element of class c.
__device__ __forceinline__ void write_residual_columns(const BitRows& bits, int first_step,
                                                       int steps, int lane, uint8_t* out) {
  // The steps that have an element of this lane's class, and those that the strip does not have.
  StepSet with_class = StepSet::from(steps);
#pragma unroll 1
  for (int i = 0; i < kPhaseRows; ++i) {
    const int row = lane / kPhaseRows * kPhaseRows + i;
    StepSet with_row = {0, 0};
#pragma unroll 1
    for (int word = 0; word < kTwoFourK / 32; ++word) {
      uint32_t left = residual_bits(bits.words[row][word]);
      while (__any_sync(kAllLanes, left != 0)) {
        const int col = word * 32 + __ffs(static_cast<int>(left)) - 1;
        int step = StepSet::first_outside(with_class, with_row);
        if (step < 0) step = StepSet::first_outside(with_row, with_row);
        step = __shfl_sync(kAllLanes, step, left != 0 ? residual_class(col) : 0, 8);
        if (left != 0) {
          with_row.insert(step);
          if (lane % 8 == residual_class(col)) {
            with_class.insert(step);
            *reinterpret_cast<uint16_t*>(out + residual_column_byte(row, first_step + step)) =
                static_cast<uint16_t>(residual_offset(col));
          }
        }
        left &= left - 1;
      }
    }
  }
}

// Writes the residual's steps, which are zero so far. Returns whether the lane's values are what
// their bits say: they are read from the matrix once more.
__device__ __forceinline__ bool write_residual(const DenseMatrix& dense, const Extent& extent,
                                               const BitRows& bits, const ResidualSteps& residual,
                                               int lane, uint8_t* out) {
  const int first_step = lane < kStripM ? 0 : residual.steps[0];
  const int steps = lane < kStripM ? residual.steps[0] : residual.steps[1];
  write_residual_columns(bits, first_step, steps, lane, out);
  __syncwarp();
  // Each lane completes its own row: it writes the values and, where a step has no element of the
  // row, a column that another row of the step reads anyway.
  const int row = lane, most_steps = max(residual.steps[0], residual.steps[1]);
  bool right = true;
  for (int i = 0; i < most_steps; ++i) {
    const int step = first_step + i;
    auto* column = reinterpret_cast<uint16_t*>(out + residual_column_byte(row, step));
    const uint32_t own = i < steps ? *column : 0U;  // 0 means none: column 0 is never residual
    const uint32_t stored = __ballot_sync(kAllLanes, own != 0) >> (lane & 24) & 0xFFU;
    const uint32_t other = __shfl_sync(kAllLanes, own, __ffs(static_cast<int>(stored)) - 1, 8);
    if (own != 0) {
      const uint16_t value =
          dense.row(extent.row0 + row)[extent.col0 + residual_column(static_cast<int>(own))];
      right = right && (value & 0x7FFF) != 0;
      *reinterpret_cast<uint16_t*>(out + residual_value_byte(row, step)) = value;
    } else if (stored != 0) {
      *column = static_cast<uint16_t>(other);
    }
  }
  return right;
}

// Writes a lane's runs into the rows of values.
__device__ __forceinline__ void write_runs(const RunWords& runs, const RunLayout& layout,
                                           const int (&down_offset)[2], bool two_four, int lane,
                                           SlotRows& slots, uint8_t* values) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int strip = 0; strip < 2; ++strip) {
      const uint32_t word = half == 0 ? runs.word[0][strip] : runs.word[1][strip];
      uint8_t* next =
          values + (half == 0 ? lane * 4 + strip * 2
                              : (layout.rows() - 1) * kChunkRowBytes + down_offset[strip]);
      const int step = half == 0 ? kChunkRowBytes : -kChunkRowBytes;
      for (int i = 0; i < kQuads; ++i) {
        const int quad = two_four ? two_four_quad_order(i) : i;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int elem = quad_order(j);
          if ((word >> chunk_bit(quad, elem) & 1U) == 0) continue;
          const uint32_t pair = slots_of(&slots[strip * kStripM], lane, half, quad, elem / 2);
          *reinterpret_cast<uint16_t*>(next) = static_cast<uint16_t>(pair >> elem % 2 * 16);
          next += step;
        }
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    pack_kernel(DenseMatrix dense, const int32_t* __restrict__ offsets,
                const int32_t* __restrict__ counted_nnz, uint32_t* __restrict__ payload,
                int32_t* changed) {
  __shared__ __align__(16) SlotRows warp_slots[kWarps];
  __shared__ __align__(16) uint8_t packed[kWarps][kMaxChunkBytes];
  __shared__ BitRows warp_bits[kWarps];
  const ChunkPosition position(dense.m, dense.k);
  if (position.index < 0) return;
  const int64_t first = offsets[position.index];
  const int units = offsets[position.index + 1] - static_cast<int>(first);
  if (units == 0) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool two_four = is_two_four(units);
  const Extent extent(position.row, position.col, two_four, dense.m, dense.k);
  BitRows& bits = warp_bits[warp];
  SlotRows& slots = warp_slots[warp];
  if (two_four) {
    load_slots(dense, extent, lane, bits, slots);
  } else {
    load_elements(dense, extent, lane, bits, slots);
  }
  const RunWords runs = two_four ? two_four_runs(bits, lane) : plain_runs(bits, 0, lane);
  const RunLayout layout(runs, lane);
  const int down_offset[2] = {layout.down_offset(0), layout.down_offset(1)};
  const ResidualSteps residual = two_four ? ResidualSteps(bits, lane) : ResidualSteps();

  const int needed = two_four ? two_four_units(layout.rows(), residual.steps[0], residual.steps[1])
                              : chunk_units(layout.rows());
  const int counted =
      counted_nnz[position.index] + (two_four ? counted_nnz[position.second(dense.m, dense.k)] : 0);
  const int stored = bits.num_stored(two_four ? kTwoFourK : kChunkK, lane);
  if (needed != units || stored != counted) {  // another stream writes the matrix
    if (lane == 0) *changed = 1;
    return;
  }

  uint8_t* out = packed[warp];
  const int vectors = units * (kChunkUnitBytes / 16);
  for (int i = lane; i < vectors; i += 32) {
    reinterpret_cast<uint4*>(out)[i] = make_uint4(0, 0, 0, 0);
  }
  __syncwarp();
  const int value_bytes = layout.rows() * kChunkRowBytes;
  uint8_t* values = out + (two_four ? kTwoFourFixedBytes : 0);
  uint8_t* down_offsets = out + (two_four ? kTwoFourBitsBytes : value_bytes + kChunkBitsBytes);
  uint32_t size_bit = 0;  // this lane's bit of the sizes of a 2:4 chunk's parts
  if (two_four) {
#pragma unroll
    for (int strip = 0; strip < 2; ++strip) {
      uint32_t words[4];
      two_four_bits(bits, strip, lane, words);
      reinterpret_cast<uint4*>(out + strip * kTwoFourStripBitsBytes)[lane] =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
    if (!write_residual(dense, extent, bits, residual, lane, values + value_bytes)) *changed = 1;
    size_bit =
        static_cast<uint32_t>(layout.rows() | residual.steps[0] << 8 | residual.steps[1] << 16) >>
            lane &
        1U;
  } else {
    reinterpret_cast<uint4*>(out + value_bytes)[lane] =
        make_uint4(runs.word[0][0], runs.word[0][1], runs.word[1][0], runs.word[1][1]);
  }
  reinterpret_cast<uint16_t*>(down_offsets)[lane] =
      static_cast<uint16_t>(static_cast<uint32_t>(down_offset[0] | down_offset[1] << 8) | size_bit);
  write_runs(runs, layout, down_offset, two_four, lane, slots, values);
  __syncwarp();
  auto* target = reinterpret_cast<uint4*>(payload + first * kChunkUnitWords);
  for (int i = lane; i < vectors; i += 32) target[i] = reinterpret_cast<const uint4*>(out)[i];
}

// Decodes the run of a half of a strip into the strip's rows of slots.
template <bool kTwoFour, int kHalf>
__device__ __forceinline__ void decode_run(uint32_t bits, uint32_t position, int lane,
                                           SlotRow* slots) {
  constexpr int kStep = kHalf == 0 ? kChunkRowBytes : -kChunkRowBytes;
  uint32_t reg[4][4];
  if constexpr (kTwoFour) {
    decode_two_four_fragment<0, kStep>(bits, position, reg[0]);
    decode_two_four_fragment<1, kStep>(bits, position, reg[1]);
    decode_two_four_fragment<2, kStep>(bits, position, reg[2]);
    decode_two_four_fragment<3, kStep>(bits, position, reg[3]);
  } else {
    decode_fragment<0, kStep>(bits, position, reg[0]);
    decode_fragment<1, kStep>(bits, position, reg[1]);
    decode_fragment<2, kStep>(bits, position, reg[2]);
    decode_fragment<3, kStep>(bits, position, reg[3]);
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int nth = i / 2;
    const int quad = kTwoFour ? two_four_quad_order(nth) : nth;
    slots_of(slots, lane, kHalf, quad, i % 2) = reg[i / 4][i % 4];
  }
}

// Stores eight neighbouring columns of a row of an extent; elements outside the matrix are dropped.
__device__ __forceinline__ void store_eight(uint16_t* dense, int64_t k, const Extent& extent,
                                            int row, int col, const uint4& values) {
  if (row >= extent.rows || col >= extent.cols) return;
  uint16_t* out = dense + (extent.row0 + row) * k + extent.col0 + col;
  if (k % 8 == 0 && col + 8 <= extent.cols) {  // rows then begin at 16-byte boundaries
    *reinterpret_cast<uint4*>(out) = values;
    return;
  }
  const uint32_t word[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    if (col + c < extent.cols) out[c] = static_cast<uint16_t>(word[c / 2] >> (c % 2 * 16));
  }
}

// `smem` is the chunk's address in shared memory, `rows` its rows of values; -1 stands for zeros.
// `slots` has the rows of one strip, here and below.
__device__ __forceinline__ void unpack_plain(uint32_t smem, int rows, int lane,
                                             const Extent& extent, int64_t k, SlotRow* slots,
                                             uint16_t* dense) {
  const ChunkCursor cursor(smem, max(rows, 0) * kChunkRowBytes, rows >= 0, lane);
#pragma unroll
  for (int strip = 0; strip < 2; ++strip) {
    decode_run<false, 0>(cursor.bits[strip], cursor.up[strip], lane, slots);
    decode_run<false, 1>(cursor.bits[2 + strip], cursor.down[strip], lane, slots);
    __syncwarp();
#pragma unroll 4
    for (int i = 0; i < kStripM / 2; ++i) {
      const int row = i * 2 + lane / 16, eighth = lane % 16;
      store_eight(dense, k, extent, strip * kStripM + row, eighth * 8,
                  *reinterpret_cast<const uint4*>(&slots[row][eighth * 4]));
    }
    __syncwarp();
  }
}

// `chunk` is in shared memory, and `smem` its address there.
__device__ __forceinline__ void unpack_two_four(uint8_t* chunk, uint32_t smem, int units, int lane,
                                                const Extent& extent, int64_t k, SlotRow* slots,
                                                uint16_t* dense) {
  const uint32_t down_offsets = reinterpret_cast<const uint16_t*>(chunk + kTwoFourBitsBytes)[lane];
  const uint32_t sizes = __ballot_sync(kAllLanes, (down_offsets & 1U) != 0);
  const int rows = static_cast<int>(sizes & 0xFFU);
  const int steps0 = static_cast<int>(sizes >> 8 & 0xFFU);
  const int steps1 = static_cast<int>(sizes >> 16 & 0xFFU);
  const bool stored = two_four_units(rows, steps0, steps1) == units;
  const uint32_t smem_values = smem + kTwoFourFixedBytes;
  const uint32_t last_row = smem_values + (stored ? (rows - 1) * kChunkRowBytes : 0);
#pragma unroll
  for (int strip = 0; strip < 2; ++strip) {
    uint8_t* strip_bits = chunk + strip * kTwoFourStripBitsBytes;
    uint4& stored_bits = reinterpret_cast<uint4*>(strip_bits)[lane];
    uint32_t bits[4] = {stored_bits.x, stored_bits.y, stored_bits.z, stored_bits.w};
    const TwoFourWords words = two_four_words(bits, lane);
    swap_two_four_words(bits);  // below, the bits are read in the order of columns
    stored_bits = make_uint4(bits[0], bits[1], bits[2], bits[3]);
    __syncwarp();  // decoding reads, and does not use, up to two rows before the values: other bits
    decode_run<true, 0>(stored ? words.runs[0] : 0, smem_values + lane * 4 + strip * 2, lane,
                        slots);
    decode_run<true, 1>(stored ? words.runs[1] : 0, last_row + (down_offsets >> strip * 8 & 0x7EU),
                        lane, slots);
    __syncwarp();
    // Each lane unpacks eight columns of a row: a byte of bits and two words of slots.
    const uint8_t* bytes = strip_bits + lane / 2 % 4 * 16 + lane / 8 * 4 + lane % 2;
#pragma unroll 4
    for (int row = 0; row < kStripM; ++row) {
      const uint32_t byte = bytes[row % 8 * 64 + row / 8 * 2];
      const auto two = *reinterpret_cast<const uint2*>(&slots[row][slot_word(lane)]);
      const uint2 low = spread_slots(byte & 0xFU, two.x), high = spread_slots(byte >> 4, two.y);
      store_eight(dense, k, extent, strip * kStripM + row, lane * 8,
                  make_uint4(low.x, low.y, high.x, high.y));
    }
    __syncwarp();  // the next strip takes the slots, and the residual overwrites zeros stored above
  }
  const int row = lane;
  if (!stored || row >= extent.rows) return;
  const uint8_t* residual = chunk + kTwoFourFixedBytes + rows * kChunkRowBytes;
  const int end = row < kStripM ? steps0 : steps0 + steps1;
  for (int step = row < kStripM ? 0 : steps0; step < end; ++step) {
    const auto value =
        *reinterpret_cast<const uint16_t*>(residual + residual_value_byte(row, step));
    const int col = residual_column(
        *reinterpret_cast<const uint16_t*>(residual + residual_column_byte(row, step)));
    if (value != 0 && col < extent.cols) dense[(extent.row0 + row) * k + extent.col0 + col] = value;
  }
}

__global__ void __launch_bounds__(kThreads) unpack_kernel(PackedView view, uint16_t* dense) {
  // The decoder reads up to two rows beyond a run, or up to 33 rows if the bits are malformed. What
  // it reads there does not matter, but it must lie in this CTA's shared memory, and a gap between
  // the warps' chunks keeps a warp's reads from the other's writes.
  constexpr int kGuard = 34 * kChunkRowBytes, kWarpBytes = kMaxChunkBytes + kDecodeReachBytes;
  // Slots of one strip per warp: with both, fewer CTAs would fit on an SM.
  __shared__ __align__(16) SlotRow warp_slots[kWarps][kStripM];
  __shared__ __align__(16) uint8_t packed[kGuard + kWarps * kWarpBytes];
  const ChunkPosition position(view.m, view.k);
  if (position.index < 0) return;
  const int64_t max_units = view.payload_words / kChunkUnitWords;
  const auto clamped = [&](int64_t index) {
    return max(int64_t{0}, min(int64_t{view.offsets[index]}, max_units));
  };
  if (position.paired && position.col % 2 != 0 &&
      is_two_four(clamped(position.first + 1) - clamped(position.first))) {
    return;  // the first chunk of the pair covers this column
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first = clamped(position.index), units = clamped(position.index + 1) - first;
  const bool two_four = position.paired && position.col % 2 == 0 && is_two_four(units);
  const int rows = chunk_value_rows(units);
  uint8_t* chunk = packed + kGuard + warp * kWarpBytes;
  const uint32_t smem = ptx::smem_address(chunk);
  if (two_four || rows >= 0) {
    const uint32_t* source = view.payload + first * kChunkUnitWords;
    const int vectors = static_cast<int>(units) * (kChunkUnitBytes / 16);
    for (int i = lane; i < vectors; i += 32) ptx::copy_async16(smem + i * 16, source + i * 4, true);
    ptx::copy_async_commit();
    ptx::copy_async_wait<0>();
  }
  __syncwarp();
  const Extent extent(position.row, position.col, two_four, view.m, view.k);
  if (two_four) {
    unpack_two_four(chunk, smem, static_cast<int>(units), lane, extent, view.k, warp_slots[warp],
                    dense);
  } else {
    unpack_plain(smem, rows, lane, extent, view.k, warp_slots[warp], dense);
  }
}

// One warp for each chunk.
__global__ void __launch_bounds__(kThreads)
    count_stored_kernel(PackedView view, int64_t chunks, int64_t* total) {
  const int64_t chunk = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (chunk >= chunks) return;
  const int64_t max_units = view.payload_words / kChunkUnitWords;
  const int64_t first = max(int64_t{0}, min(int64_t{view.offsets[chunk]}, max_units));
  const int64_t last = max(first, min(int64_t{view.offsets[chunk + 1]}, max_units));
  const ChunkBits bits = chunk_bits(last - first);
  const auto* bytes = reinterpret_cast<const uint8_t*>(view.payload + first * kChunkUnitWords);
  int count = 0;
  for (int i = bits.begin + threadIdx.x % 32 * 4; i < bits.end; i += 32 * 4) {
    count += __popc(*reinterpret_cast<const uint32_t*>(bytes + i));
  }
  count = __reduce_add_sync(~0U, count);
  if (threadIdx.x % 32 == 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(total), static_cast<unsigned long long>(count));
  }
}

Status count(const ValueMatrix& matrix, int32_t* units, int32_t* nnz, void* /*scratch*/,
             cudaStream_t stream) {
  if (matrix.m == 0 || matrix.k == 0) return Status::success();
  const int64_t pairs =
      num_bands(num_chunk_rows(matrix.m)) * num_chunk_pairs(num_chunk_cols(matrix.k));
  count_kernel<<<static_cast<unsigned>(pairs), kBandChunkRows * 32, 0, stream>>>(
      dense_matrix(matrix), units, nnz);
  return cuda::check(cudaGetLastError(), "bitmap count_kernel launch");
}

Status pack(const ValueMatrix& matrix, const int32_t* offsets, const int32_t* nnz,
            uint32_t* payload, int32_t* changed, void* /*scratch*/, cudaStream_t stream) {
  if (matrix.m == 0 || matrix.k == 0) return Status::success();
  pack_kernel<<<num_ctas(matrix.m, matrix.k), kThreads, 0, stream>>>(dense_matrix(matrix), offsets,
                                                                     nnz, payload, changed);
  return cuda::check(cudaGetLastError(), "bitmap pack_kernel launch");
}

Status unpack(const PackedView& view, uint16_t* dense, cudaStream_t stream) {
  if (view.m == 0 || view.k == 0) return Status::success();
  unpack_kernel<<<num_ctas(view.m, view.k), kThreads, 0, stream>>>(view, dense);
  return cuda::check(cudaGetLastError(), "bitmap unpack_kernel launch");
}

Status count_stored(const PackedView& view, int64_t* total, cudaStream_t stream) {
  const int64_t chunks = num_chunk_rows(view.m) * num_chunk_cols(view.k);
  if (chunks == 0) return Status::success();
  count_stored_kernel<<<static_cast<unsigned>((chunks + kWarps - 1) / kWarps), kThreads, 0,
                        stream>>>(view, chunks, total);
  return cuda::check(cudaGetLastError(), "bitmap count_stored_kernel launch");
}

}  // namespace

cuda::PackKernels cuda::bitmap_kernels() { return {count, pack, unpack, count_stored}; }

}  // namespace flash_llm
