// The bitmap format on the device: count, pack and unpack, one warp per chunk (or, to count, per
// two chunks side by side). The bytes are those of core/bitmap.cpp: lanes are ranked by comparing
// counts instead of sorting them.
//
// What is stored of a chunk is kept in shared memory row by row, one byte for 8 columns (BitRows).
// The values of a chunk go through shared memory as its runs see them: 32 x 128 elements, or, of a
// 2:4 chunk, 32 x 128 slots, column 64 half + 8 quad + 2 (lane % 4) + slot being that of a slot.
#include <cstdint>

#include "core/bitmap.h"
#include "cuda/bitmap_decode.cuh"
#include "cuda/dense_matrix.cuh"
#include "cuda/launch.h"
#include "cuda/ptx_sm80.cuh"

namespace flash_llm {
namespace {

constexpr int kWarps = 2;
constexpr int kThreads = kWarps * 32;
constexpr uint32_t kAllLanes = ~0U;
// A row of slots in shared memory, padded so that a fragment's eight rows of four words meet 32
// different banks.
constexpr int kSlotRowWords = kChunkK / 2 + 4;
constexpr int kMaxChunkBytes = kMaxChunkUnits * kChunkUnitBytes;

using SlotRows = uint32_t[kChunkM][kSlotRowWords];

// The two slots of a lane in a quad: those of the upper or the lower eight rows of a strip.
__device__ __forceinline__ uint32_t& slots_of(SlotRows& slots, int lane, int strip, int half,
                                              int quad, int lower) {
  return slots[strip * kStripM + lower * 8 + lane / 4][half * 32 + quad * 4 + lane % 4];
}

// What a chunk covers of the matrix.
struct Extent {
  int64_t row0, col0;
  int rows, cols;

  __device__ Extent(int64_t chunk_row, int64_t chunk_col, bool two_four, int64_t m, int64_t k)
      : row0(chunk_row * kChunkM),
        col0(chunk_col * kChunkK),
        rows(static_cast<int>(min(int64_t{kChunkM}, m - row0))),
        cols(static_cast<int>(min(int64_t{two_four ? kTwoFourK : kChunkK}, k - col0))) {}
};

// The chunk of a warp. The warps of a CTA work on one column, so that where the second column of a
// pair has nothing to do the whole CTA goes.
struct ChunkPlace {
  int64_t row, col;
  bool paired;    // whether the column has a partner
  int64_t index;  // where the chunk is stored; -1 for a warp without one
  int64_t first;  // where the first of the pair is

  __device__ ChunkPlace(int64_t m, int64_t k) {
    const auto rows = static_cast<unsigned>(num_chunk_rows(m));
    const auto cols = static_cast<unsigned>(num_chunk_cols(k));
    row = int64_t{blockIdx.x / cols} * kWarps + threadIdx.x / 32;
    col = blockIdx.x % cols;
    paired = has_partner(col, cols);
    index = row < rows ? chunk_index(row, col, rows, cols) : -1;
    first = row < rows ? chunk_index(row, col & ~int64_t{1}, rows, cols) : -1;
  }

  // Where the second of the pair is.
  __device__ int64_t second(int64_t m, int64_t k) const {
    return chunk_index(row, col | 1, num_chunk_rows(m), num_chunk_cols(k));
  }
};

unsigned num_ctas(int64_t m, int64_t k) {
  return static_cast<unsigned>((num_chunk_rows(m) + kWarps - 1) / kWarps * num_chunk_cols(k));
}

// Eight neighbouring columns of a row of an extent, zero outside the matrix.
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

// Bit 0 and bit 16: whether the two values of a word are not zero.
__device__ __forceinline__ uint32_t nonzero_halves(uint32_t word) {
  return ((word & 0x7FFF7FFFU) + 0x7FFF7FFFU) >> 15 & 0x00010001U;
}

// Bit c: whether the c-th of eight values is not zero.
__device__ __forceinline__ uint32_t nonzero_byte(const uint4& values) {
  const uint32_t halves = nonzero_halves(values.x) | nonzero_halves(values.y) << 2 |
                          nonzero_halves(values.z) << 4 | nonzero_halves(values.w) << 6;
  return (halves | halves >> 15) & 0xFFU;
}

// Which elements of 32 x 256 are stored. Rows are padded by a word, so that lanes can read one
// each.
struct BitRows {
  uint32_t words[kChunkM][kTwoFourK / 32 + 1];

  // Of eight columns.
  __device__ __forceinline__ void store_byte(int row, int eighth, uint32_t bits) {
    reinterpret_cast<uint8_t*>(words[row])[eighth] = static_cast<uint8_t>(bits);
  }
  // Of sixteen.
  __device__ __forceinline__ uint32_t half_word(int row, int sixteenth) const {
    return reinterpret_cast<const uint16_t*>(words[row])[sixteenth];
  }
  // Of the first `cols` columns, in all rows.
  __device__ __forceinline__ int num_stored(int cols, int lane) const {
    int count = 0;
    for (int word = 0; word < cols / 32; ++word) count += __popc(words[lane][word]);
    return __reduce_add_sync(kAllLanes, count);
  }
};

// What a lane knows of the runs of a chunk.
struct RunWords {
  uint32_t word[2][2];  // [half][strip], bit chunk_bit(quad, elem)

  __device__ __forceinline__ int num_stored() const {
    const int count =
        __popc(word[0][0]) + __popc(word[0][1]) + __popc(word[1][0]) + __popc(word[1][1]);
    return __reduce_add_sync(kAllLanes, count);
  }
};

// Of a plain chunk, which has the 128 columns from word `first_word` of the rows on.
__device__ __forceinline__ RunWords plain_runs(const BitRows& bits, int first_word, int lane) {
  RunWords runs = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int half = i / 4, strip = i / 2 % 2, lower = i % 2;
    // A byte is a quad, of which the lane has two columns.
    const uint32_t* row =
        &bits.words[strip * kStripM + lower * 8 + lane / 4][first_word + half * 2];
    const uint32_t quads[2] = {row[0] >> lane % 4 * 2, row[1] >> lane % 4 * 2};
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      // The sum of the bits of four bytes, weighted by their place, twice.
      const uint32_t low = __dp4a(quads[0] >> column & 0x01010101U, 0x08040201U, 0U);
      const uint32_t eight = __dp4a(quads[1] >> column & 0x01010101U, 0x80402010U, low);
      runs.word[half][strip] |= eight << chunk_bit(0, 2 * lower + column);
    }
  }
  return runs;
}

// A lane's words of a strip of a 2:4 chunk, as they are stored.
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

// Of eight groups, the bits beyond the second of each.
__device__ __forceinline__ uint32_t residual_bits(uint32_t bits) {
  const uint32_t b0 = bits << 3, b1 = bits << 2, b2 = bits << 1;
  const uint32_t fourth = (b0 & b1) | (b0 & b2) | (b1 & b2);  // seen from bit 3
  const uint32_t third = b1 & b2;                             // b0 and b1, seen from bit 2
  return bits & ((fourth & 0x88888888U) | (third & 0x44444444U));
}

// Steps of a strip's residual: [strip].
struct ResidualSteps {
  int steps[2] = {};

  ResidualSteps() = default;
  __device__ __forceinline__ ResidualSteps(const BitRows& bits, int lane) {
    int count = 0;  // of the lane's row
#pragma unroll
    for (int word = 0; word < kTwoFourK / 32; ++word) {
      count += __popc(residual_bits(bits.words[lane][word]));
    }
    steps[0] = __reduce_max_sync(kAllLanes, lane < kStripM ? count : 0);
    steps[1] = __reduce_max_sync(kAllLanes, lane < kStripM ? 0 : count);
  }
};

// Rank of this lane among 32 when sorted by (count, lane); counts are at most 32.
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

// The lane whose rank is this lane's index.
__device__ __forceinline__ int lane_of_rank(int rank, int lane) {
  uint32_t found = kAllLanes;
#pragma unroll
  for (int bit = 0; bit < 5; ++bit) {
    const uint32_t set = __ballot_sync(kAllLanes, (rank >> bit & 1) != 0);
    found &= (lane >> bit & 1) != 0 ? set : ~set;
  }
  return __ffs(static_cast<int>(found)) - 1;
}

// Where the runs go; core/bitmap.cpp: run_layout.
class RunLayout {
 public:
  __device__ __forceinline__ RunLayout(const RunWords& runs, int lane) : lane_(lane) {
    int falling_down[2];  // the lane-th longest downward run
#pragma unroll
    for (int strip = 0; strip < 2; ++strip) {
      up_[strip] = __popc(runs.word[0][strip]);
      const int down = __popc(runs.word[1][strip]);
      partner_rank_[strip] = 31 - rank_of(down, lane);
      falling_down[strip] = __shfl_sync(kAllLanes, down, lane_of_rank(partner_rank_[strip], lane));
    }
    rows_ = kMaxChunkRows + 1;
#pragma unroll 1
    for (int pattern = 0; pattern < kSwapPatterns; ++pattern) {
      int rows = 0;
#pragma unroll
      for (int strip = 0; strip < 2; ++strip) {
        const int up = free_up(pattern, strip);
        rows = max(rows, up + __shfl_sync(kAllLanes, falling_down[strip], rank_of(up, lane)));
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

  // Where in a row this lane's downward run is, in bytes.
  __device__ __forceinline__ int sigma(int strip) const {
    const int rank = rank_of(free_up(pattern_, strip), lane_);
    const int column = __shfl_sync(kAllLanes, lane_of_rank(rank, lane_), partner_rank_[strip]);
    return 4 * column + 2 * (swaps_slots(pattern_, column) ? 1 - strip : strip);
  }

 private:
  // The upward run in this lane's column that a downward run of `strip` may meet.
  __device__ __forceinline__ int free_up(int pattern, int strip) const {
    return swaps_slots(pattern, lane_) ? up_[1 - strip] : up_[strip];
  }

  int lane_;
  int up_[2];            // by strip
  int partner_rank_[2];  // of the upward run that this lane's downward run goes on
  int rows_, pattern_ = 0;
};

// One CTA for a pair of columns of a band, one warp for each of its chunk rows: together they find
// the pair's kind.
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
  const bool refused = __syncthreads_or(!paired || two_four > kMaxChunkUnits);
  if (row >= rows || lane != 0) return;
  const bool chosen = !refused && prefers_two_four(plain_sum, two_four_sum);
#pragma unroll
  for (int second = 0; second < 2; ++second) {
    if (second != 0 && !paired) break;
    const int64_t index = chunk_index(row, col + second, rows, cols);
    nnz[index] = stored[second];
    units[index] = !chosen ? plain[second] : second == 0 ? two_four : 0;
  }
}

// Loads a plain chunk.
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

// Where the two groups of eight columns have their slots in a row of SlotRows: two words.
__device__ __forceinline__ int slot_word(int eighth) {
  return eighth / 4 % 2 * 32 + (eighth / 8 + eighth / 2 % 2 * 4) * 4 + eighth % 2 * 2;
}

// The two slots of four values.
__device__ __forceinline__ uint32_t select_slots(uint32_t bits, uint32_t low, uint32_t high) {
  const auto nibble = static_cast<uint32_t>(two_four_nibble(static_cast<int>(bits)));
  return byte_permute(low, high, 0x1010U + (nibble & 3U) * 0x22U + (nibble >> 2) * 0x2200U);
}

// And back: four values from two slots, which are zero where nothing is stored.
__device__ __forceinline__ uint2 spread_slots(uint32_t bits, uint32_t slots) {
  const int nibble = two_four_nibble(static_cast<int>(bits));
  const uint64_t values = static_cast<uint64_t>(slots & 0xFFFFU) << 16 * (nibble & 3) |
                          static_cast<uint64_t>(slots >> 16) << 16 * (nibble >> 2);
  return make_uint2(static_cast<uint32_t>(values), static_cast<uint32_t>(values >> 32));
}

// Loads a 2:4 chunk, all but the values of its residual.
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

// Where the residual of a row has its value and its place, in bytes from the first step.
__device__ __forceinline__ int residual_value_offset(int row, int step) {
  return step * kResidualStepBytes + row % 8 * 4 + row / 8 % 2 * 2;
}
__device__ __forceinline__ int residual_place_offset(int row, int step) {
  return step * kResidualStepBytes + kResidualStepBytes / 2 + row % kStripM * 2;
}

// A set of steps of a strip; a row of 64 groups has no more than 128.
struct StepSet {
  uint64_t low, high;

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
  // The first that is in neither, or -1.
  __device__ __forceinline__ static int first_outside(const StepSet& a, const StepSet& b) {
    const uint64_t low = ~(a.low | b.low), high = ~(a.high | b.high);
    if (low != 0) return __ffsll(static_cast<long long>(low)) - 1;
    return high != 0 ? 63 + __ffsll(static_cast<long long>(high)) : -1;
  }
};

// Chooses the residual's steps and writes the places into them, which are zero so far. Rows 8 e to
// 8 e + 7 have the lanes of the same numbers, lane 8 e + c for class c.
__device__ __forceinline__ void write_residual_places(const BitRows& bits, int first_step,
                                                      int steps, int lane, uint8_t* out) {
  // In which steps the class is; those that the strip does not have are as good as taken.
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
            *reinterpret_cast<uint16_t*>(out + residual_place_offset(row, first_step + step)) =
                static_cast<uint16_t>(residual_place(col));
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
  write_residual_places(bits, first_step, steps, lane, out);
  __syncwarp();
  // Now each lane does its row: the values, and the places where there are none.
  const int row = lane, most_steps = max(residual.steps[0], residual.steps[1]);
  bool right = true;
  for (int i = 0; i < most_steps; ++i) {
    const int step = first_step + i;
    auto* place = reinterpret_cast<uint16_t*>(out + residual_place_offset(row, step));
    const uint32_t own = i < steps ? *place : 0U;  // no residual element is in column 0
    const uint32_t stored = __ballot_sync(kAllLanes, own != 0) >> (lane & 24) & 0xFFU;
    const uint32_t other = __shfl_sync(kAllLanes, own, __ffs(static_cast<int>(stored)) - 1, 8);
    if (own != 0) {
      const uint16_t value =
          dense.row(extent.row0 + row)[extent.col0 + residual_column(static_cast<int>(own))];
      right = right && (value & 0x7FFF) != 0;
      *reinterpret_cast<uint16_t*>(out + residual_value_offset(row, step)) = value;
    } else if (stored != 0) {
      *place = static_cast<uint16_t>(other);
    }
  }
  return right;
}

// Writes the runs into rows of values.
__device__ __forceinline__ void write_runs(const RunWords& runs, const RunLayout& layout,
                                           const int (&sigma)[2], bool two_four, int lane,
                                           SlotRows& slots, uint8_t* values) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int strip = 0; strip < 2; ++strip) {
      const uint32_t word = half == 0 ? runs.word[0][strip] : runs.word[1][strip];
      uint8_t* end = values + (half == 0 ? lane * 4 + strip * 2
                                         : (layout.rows() - 1) * kChunkRowBytes + sigma[strip]);
      const int step = half == 0 ? kChunkRowBytes : -kChunkRowBytes;
      for (int i = 0; i < kQuads; ++i) {
        const int quad = two_four ? two_four_quad_order(i) : i;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int elem = quad_order(j);
          if ((word >> chunk_bit(quad, elem) & 1U) == 0) continue;
          const uint32_t pair = slots_of(slots, lane, strip, half, quad, elem / 2);
          *reinterpret_cast<uint16_t*>(end) = static_cast<uint16_t>(pair >> elem % 2 * 16);
          end += step;
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
  const ChunkPlace place(dense.m, dense.k);
  if (place.index < 0) return;
  const int64_t first = offsets[place.index];
  const int units = offsets[place.index + 1] - static_cast<int>(first);
  if (units == 0) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool two_four = is_two_four(units);
  const Extent extent(place.row, place.col, two_four, dense.m, dense.k);
  BitRows& bits = warp_bits[warp];
  SlotRows& slots = warp_slots[warp];
  if (two_four) {
    load_slots(dense, extent, lane, bits, slots);
  } else {
    load_elements(dense, extent, lane, bits, slots);
  }
  const RunWords runs = two_four ? two_four_runs(bits, lane) : plain_runs(bits, 0, lane);
  const RunLayout layout(runs, lane);
  const int sigma[2] = {layout.sigma(0), layout.sigma(1)};
  const ResidualSteps residual = two_four ? ResidualSteps(bits, lane) : ResidualSteps();

  const int needed = two_four ? two_four_units(layout.rows(), residual.steps[0], residual.steps[1])
                              : chunk_units(layout.rows());
  const int counted =
      counted_nnz[place.index] + (two_four ? counted_nnz[place.second(dense.m, dense.k)] : 0);
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
  uint8_t* out_sigma = out + (two_four ? kTwoFourBitsBytes : value_bytes + kChunkBitsBytes);
  uint32_t spare = 0;
  if (two_four) {
#pragma unroll
    for (int strip = 0; strip < 2; ++strip) {
      uint32_t words[4];
      two_four_bits(bits, strip, lane, words);
      reinterpret_cast<uint4*>(out + strip * kTwoFourStripBitsBytes)[lane] =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
    if (!write_residual(dense, extent, bits, residual, lane, values + value_bytes)) *changed = 1;
    spare =
        static_cast<uint32_t>(layout.rows() | residual.steps[0] << 8 | residual.steps[1] << 16) >>
            lane &
        1U;
  } else {
    reinterpret_cast<uint4*>(out + value_bytes)[lane] =
        make_uint4(runs.word[0][0], runs.word[0][1], runs.word[1][0], runs.word[1][1]);
  }
  reinterpret_cast<uint16_t*>(out_sigma)[lane] =
      static_cast<uint16_t>(static_cast<uint32_t>(sigma[0] | sigma[1] << 8) | spare);
  write_runs(runs, layout, sigma, two_four, lane, slots, values);
  __syncwarp();
  auto* target = reinterpret_cast<uint4*>(payload + first * kChunkUnitWords);
  for (int i = lane; i < vectors; i += 32) target[i] = reinterpret_cast<const uint4*>(out)[i];
}

// Decodes the run of a strip and half into rows of slots.
template <bool kTwoFour, int kHalf>
__device__ __forceinline__ void decode_run(uint32_t bits, uint32_t position, int strip, int lane,
                                           SlotRows& slots) {
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
    slots_of(slots, lane, strip, kHalf, quad, i % 2) = reg[i / 4][i % 4];
  }
}

// Writes eight neighbouring columns of a row of an extent; what lies outside the matrix is dropped.
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

// `chunk` is in shared memory, and `smem` its address there.
__device__ __forceinline__ void unpack_plain(uint32_t smem, int rows, int lane,
                                             const Extent& extent, int64_t k, SlotRows& slots,
                                             uint16_t* dense) {
  const ChunkCursor cursor(smem, max(rows, 0) * kChunkRowBytes, rows >= 0, lane);
#pragma unroll
  for (int strip = 0; strip < 2; ++strip) {
    decode_run<false, 0>(cursor.bits[strip], cursor.up[strip], strip, lane, slots);
    decode_run<false, 1>(cursor.bits[2 + strip], cursor.down[strip], strip, lane, slots);
  }
  __syncwarp();
#pragma unroll 4
  for (int i = 0; i < kChunkM / 2; ++i) {
    const int row = i * 2 + lane / 16, eighth = lane % 16;
    store_eight(dense, k, extent, row, eighth * 8,
                *reinterpret_cast<const uint4*>(&slots[row][eighth * 4]));
  }
}

__device__ __forceinline__ void unpack_two_four(uint8_t* chunk, uint32_t smem, int units, int lane,
                                                const Extent& extent, int64_t k, SlotRows& slots,
                                                uint16_t* dense) {
  const uint32_t sigma = reinterpret_cast<const uint16_t*>(chunk + kTwoFourBitsBytes)[lane];
  const uint32_t sizes = __ballot_sync(kAllLanes, (sigma & 1U) != 0);
  const int rows = static_cast<int>(sizes & 0xFFU);
  const int steps0 = static_cast<int>(sizes >> 8 & 0xFFU);
  const int steps1 = static_cast<int>(sizes >> 16 & 0xFFU);
  const bool stored = two_four_units(rows, steps0, steps1) == units;
  const uint32_t smem_values = smem + kTwoFourFixedBytes;
  const uint32_t last_row = smem_values + (stored ? (rows - 1) * kChunkRowBytes : 0);
#pragma unroll
  for (int strip = 0; strip < 2; ++strip) {
    uint4& stored_bits = reinterpret_cast<uint4*>(chunk + strip * kTwoFourStripBitsBytes)[lane];
    uint32_t bits[4] = {stored_bits.x, stored_bits.y, stored_bits.z, stored_bits.w};
    const TwoFourWords words = two_four_words(bits, lane);
    swap_two_four_words(bits);  // below they are read column after column
    stored_bits = make_uint4(bits[0], bits[1], bits[2], bits[3]);
    decode_run<true, 0>(stored ? words.runs[0] : 0, smem_values + lane * 4 + strip * 2, strip, lane,
                        slots);
    decode_run<true, 1>(stored ? words.runs[1] : 0, last_row + (sigma >> strip * 8 & 0x7EU), strip,
                        lane, slots);
  }
  __syncwarp();
  // A lane takes eight columns of a row: a byte of the bits, two words of slots.
  const uint8_t* bytes = chunk + lane / 2 % 4 * 16 + lane / 8 * 4 + lane % 2;
#pragma unroll 4
  for (int row = 0; row < kChunkM; ++row) {
    const uint32_t byte =
        bytes[row / kStripM * kTwoFourStripBitsBytes + row % 8 * 64 + row / 8 % 2 * 2];
    const auto two = *reinterpret_cast<const uint2*>(&slots[row][slot_word(lane)]);
    const uint2 low = spread_slots(byte & 0xFU, two.x), high = spread_slots(byte >> 4, two.y);
    store_eight(dense, k, extent, row, lane * 8, make_uint4(low.x, low.y, high.x, high.y));
  }
  __syncwarp();  // the residual goes over what was just written
  const int row = lane;
  if (!stored || row >= extent.rows) return;
  const uint8_t* residual = chunk + kTwoFourFixedBytes + rows * kChunkRowBytes;
  const int end = row < kStripM ? steps0 : steps0 + steps1;
  for (int step = row < kStripM ? 0 : steps0; step < end; ++step) {
    const auto value =
        *reinterpret_cast<const uint16_t*>(residual + residual_value_offset(row, step));
    const int col = residual_column(
        *reinterpret_cast<const uint16_t*>(residual + residual_place_offset(row, step)));
    if (value != 0 && col < extent.cols) dense[(extent.row0 + row) * k + extent.col0 + col] = value;
  }
}

__global__ void __launch_bounds__(kThreads) unpack_kernel(PackedView view, uint16_t* dense) {
  // The decoder reads up to two rows beyond a run, and malformed bits send it up to 33 rows beyond;
  // what it finds there does not matter, but it must be ours.
  constexpr int kGuard = 34 * kChunkRowBytes;
  __shared__ __align__(16) SlotRows warp_slots[kWarps];
  __shared__ __align__(16) uint8_t packed[kGuard + kWarps * kMaxChunkBytes];
  const ChunkPlace place(view.m, view.k);
  if (place.index < 0) return;
  const int64_t max_units = view.payload_words / kChunkUnitWords;
  const auto clamped = [&](int64_t index) {
    return max(int64_t{0}, min(int64_t{view.offsets[index]}, max_units));
  };
  if (place.paired && place.col % 2 != 0 &&
      is_two_four(clamped(place.first + 1) - clamped(place.first))) {
    return;  // the first chunk of the pair covers this column
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first = clamped(place.index), units = clamped(place.index + 1) - first;
  const bool two_four = place.paired && place.col % 2 == 0 && is_two_four(units);
  const int rows = chunk_value_rows(units);
  uint8_t* chunk = packed + kGuard + warp * kMaxChunkBytes;
  if (two_four || rows >= 0) {
    const auto* source = reinterpret_cast<const uint4*>(view.payload + first * kChunkUnitWords);
    const int vectors = static_cast<int>(units) * (kChunkUnitBytes / 16);
    for (int i = lane; i < vectors; i += 32) {
      reinterpret_cast<uint4*>(chunk)[i] = ptx::load_streaming(source + i);
    }
  }
  __syncwarp();
  const Extent extent(place.row, place.col, two_four, view.m, view.k);
  const uint32_t smem = ptx::smem_address(chunk);
  if (two_four) {
    unpack_two_four(chunk, smem, static_cast<int>(units), lane, extent, view.k, warp_slots[warp],
                    dense);
  } else {
    unpack_plain(smem, rows, lane, extent, view.k, warp_slots[warp], dense);
  }
}

Status count(const uint16_t* dense, int64_t ld, int64_t m, int64_t k, int32_t* units, int32_t* nnz,
             cudaStream_t stream) {
  if (m == 0 || k == 0) return Status::success();
  const int64_t pairs = num_bands(num_chunk_rows(m)) * num_chunk_pairs(num_chunk_cols(k));
  count_kernel<<<static_cast<unsigned>(pairs), kBandChunkRows * 32, 0, stream>>>({dense, ld, m, k},
                                                                                 units, nnz);
  return cuda::check(cudaGetLastError(), "bitmap count_kernel launch");
}

Status pack(const uint16_t* dense, int64_t ld, int64_t m, int64_t k, const int32_t* offsets,
            const int32_t* nnz, uint32_t* payload, int32_t* changed, cudaStream_t stream) {
  if (m == 0 || k == 0) return Status::success();
  pack_kernel<<<num_ctas(m, k), kThreads, 0, stream>>>({dense, ld, m, k}, offsets, nnz, payload,
                                                       changed);
  return cuda::check(cudaGetLastError(), "bitmap pack_kernel launch");
}

Status unpack(const PackedView& view, uint16_t* dense, cudaStream_t stream) {
  if (view.m == 0 || view.k == 0) return Status::success();
  unpack_kernel<<<num_ctas(view.m, view.k), kThreads, 0, stream>>>(view, dense);
  return cuda::check(cudaGetLastError(), "bitmap unpack_kernel launch");
}

}  // namespace

cuda::PackKernels cuda::bitmap_kernels() { return {count, pack, unpack}; }

}  // namespace flash_llm
