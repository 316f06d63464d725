// The kernel that multiplies gather weights on CUDA cores, for few tokens. A CTA has whole slices
// of one part, which is up to 8192 columns, and X of these columns for up to 8 tokens in shared
// memory, where a column's tokens lie side by side. Its warps divide the slices' segments evenly;
// each copies its own through a ring. A lane adds a step in column to the address of its column of
// X, loads that column and multiplies it by the step's value. Sums of lanes and warps are added in
// a fixed order, so results are repeatable bit for bit. Sums of several parts go to the workspace,
// and a second kernel adds them.
//
// Inf and NaN spread as in a dense product, where a zero of the weight times Inf is NaN. As zeros
// are not stored and fillers are, tokens that are not finite are multiplied again, without fillers:
// a row is right if it stores an element for each such column of X, and NaN if not.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "cuda/epilogue.cuh"
#include "cuda/gather/tile.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/sm80.cuh"
#include "cuda/schedule/dependent_launch.cuh"
#include "cuda/schedule/weight_copy.cuh"
#include "plan/gather.h"

namespace flash_llm {

struct GatherParams {
  GatherWeight weight;
  const uint16_t* x;
  int64_t x_stride;
  float* partial;  // [parts][n][m] if there are several parts, else null
  Epilogue epilogue;
  int batch;  // slices
};

// The two families: how they copy weights.
struct GatherSm80 {
  static constexpr KernelFamily kFamily = KernelFamily::kGatherSm80;
  using WeightCopy = AsyncCopy;
};
struct GatherSm90 {
  static constexpr KernelFamily kFamily = KernelFamily::kGatherSm90;
  using WeightCopy = BulkCopy;
};

template <typename Family, ValueType kType_, int kTokens_>
struct GatherKernelConfig {
  using WeightCopy = typename Family::WeightCopy;
  static constexpr ValueType kType = kType_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kColumnBytes = gather_column_bytes(kTokens);
};

// A CTA's work: slices [first, last) of a part, counted over all tile rows.
struct SliceRange {
  int part, first, last;
};

// The CTA's work and the slices of a batch, in shared memory.
struct SliceTable {
  SliceRange range;
  uint32_t first_unit[kGatherMaxBatch];
  uint32_t rows_unit[kGatherMaxBatch];  // where its rows are; kNoRows in a tile without bytes
  uint16_t quads[kGatherMaxBatch];
  // The warps that have segments of the slice; none if the first comes after the last.
  uint8_t first_warp[kGatherMaxBatch], last_warp[kGatherMaxBatch];
  uint16_t rows[kGatherMaxBatch * kGatherSliceRows];  // of the tile

  static constexpr uint32_t kNoRows = UINT32_MAX;
};
static_assert(sizeof(SliceTable) + kGatherMaxWarps * kGatherStages * 8 <= kGatherTableBytes);

template <ValueType kType>
__device__ __forceinline__ void unpack_pair(uint32_t pair, float& low, float& high) {
  if constexpr (kType == ValueType::kFloat16) {
    const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&pair));
    low = both.x;
    high = both.y;
  } else {
    low = __uint_as_float(pair << 16);
    high = __uint_as_float(pair & 0xFFFF0000U);
  }
}

// pair * 0 + sum for both halves: a sum that was zero stays so only if both are finite.
template <ValueType kType>
__device__ __forceinline__ uint32_t add_times_zero(uint32_t pair, uint32_t sum) {
  uint32_t result;
  if constexpr (kType == ValueType::kFloat16) {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(pair), "r"(0), "r"(sum));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(pair), "r"(0), "r"(sum));
  }
  return result;
}

// Fills the table for slices [first, first + count) of a tile row and what follows.
__device__ __forceinline__ void fill_table(SliceTable& table, const LaneSlices& slices,
                                           int tile_row, int first, int count, int lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int in_tile = 2 * lane + i, slice = tile_row * kGatherTileSlices + in_tile - first;
    if (in_tile >= slices.slices || slice < 0 || slice >= count) continue;
    table.first_unit[slice] = slices.first[i];
    table.quads[slice] = static_cast<uint16_t>(slices.quads[i]);
    table.rows_unit[slice] = slices.stored ? slices.begin + in_tile : SliceTable::kNoRows;
  }
}

// Finds the slices of CTA blockIdx.x, which begin in its share of the part's bytes, and fills the
// table for the first batch of them. The share is cut from the bytes of all parts together, whose
// distribution over the rows is much the same. For one warp: all of its loads and shuffles depend
// on each other, and other warps would only delay them.
__device__ __forceinline__ void find_slices(const GatherWeight& weight, int batch,
                                            SliceTable& table, int lane) {
  const int ctas = static_cast<int>(gridDim.x), cta = static_cast<int>(blockIdx.x);
  int part = 0, first_cta = 0, last_cta = ctas;
  if (weight.parts > 1) {
    last_cta = gather_first_cta(1, weight.parts, ctas, weight.k);
    while (cta >= last_cta) {
      first_cta = last_cta;
      last_cta = gather_first_cta(++part + 1, weight.parts, ctas, weight.k);
    }
  }
  const int tile_rows = weight.tile_rows();
  const auto units = static_cast<float>(__ldg(weight.offsets + int64_t{tile_rows} * weight.parts));
  const auto share = [&](int i) {
    return static_cast<uint32_t>(static_cast<float>(i) / static_cast<float>(last_cta - first_cta) *
                                 units);
  };
  const uint32_t target[2] = {share(cta - first_cta), share(cta - first_cta + 1)};
  // The last tile rows that begin at or before the targets.
  int tile_row[2] = {-1, -1};
  for (int row = lane; row - lane < tile_rows; row += 32) {
    const uint32_t begin =
        row < tile_rows ? static_cast<uint32_t>(__ldg(weight.offsets + int64_t{row} * weight.parts))
                        : UINT32_MAX;
#pragma unroll
    for (int i = 0; i < 2; ++i) tile_row[i] += __popc(__ballot_sync(~0U, begin <= target[i]));
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) tile_row[i] = max(tile_row[i], 0);
  const LaneSlices slices[2] = {{weight, tile_row[0], part, lane},
                                {weight, tile_row[1], part, lane}};
  int slice[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int32_t* const offset = weight.offsets + int64_t{tile_row[i]} * weight.parts;
    const float begin = static_cast<float>(__ldg(offset));
    const float end = static_cast<float>(__ldg(offset + weight.parts));
    const float fraction =
        __saturatef((static_cast<float>(target[i]) - begin) / (end - begin));  // 0 for NaN
    const auto part_units = static_cast<float>(__ldg(offset + part + 1) - __ldg(offset + part));
    const uint32_t from = slices[i].begin + static_cast<uint32_t>(fraction * part_units);
    const int before =
        __popc(__ballot_sync(~0U, 2 * lane < slices[i].slices && slices[i].first[0] < from)) +
        __popc(__ballot_sync(~0U, 2 * lane + 1 < slices[i].slices && slices[i].first[1] < from));
    slice[i] = tile_row[i] * kGatherTileSlices + before;
  }
  const int first = cta == first_cta ? 0 : slice[0];
  const int last = cta + 1 == last_cta ? weight.slices() : slice[1];
  if (lane == 0) table.range = {part, first, last};
  if (first >= last) return;
  const int count = min(batch, last - first);
  const int end_row = (first + count - 1) / kGatherTileSlices;
  for (int row = first / kGatherTileSlices; row <= end_row; ++row) {
    if (row == tile_row[0]) {
      fill_table(table, slices[0], row, first, count, lane);
    } else if (row == tile_row[1]) {
      fill_table(table, slices[1], row, first, count, lane);
    } else {
      fill_table(table, LaneSlices(weight, row, part, lane), row, first, count, lane);
    }
  }
}

// A segment in the ring, packed so that a register holds those of all stages.
struct Segment {
  static constexpr int kBits = 10;
  uint32_t bits;

  __device__ Segment(int quads, int slice, bool ends_slice)
      : bits((quads - 1) | slice << 3 | static_cast<uint32_t>(ends_slice) << 9) {}
  __device__ explicit Segment(uint32_t bits) : bits(bits) {}
  __device__ int quads() const { return static_cast<int>(bits & 7U) + 1; }
  __device__ int slice() const { return static_cast<int>(bits >> 3 & 63U); }
  __device__ bool ends_slice() const { return (bits >> 9 & 1U) != 0; }
};

// A warp's segments in a batch, one after the other.
class SegmentWalk {
 public:
  // Divides the table's segments between the warps; warp 0 notes which warps have which slices. All
  // lanes must call it.
  __device__ __forceinline__ SegmentWalk(SliceTable& table, int count, int warp, int warps,
                                         int lane)
      : table_(table) {
    uint32_t segments[2], before = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int slice = 2 * lane + i;
      segments[i] =
          slice < count ? (table.quads[slice] + kGatherSegmentQuads - 1) / kGatherSegmentQuads : 0;
      before += segments[i];
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t below = __shfl_up_sync(~0U, before, step);
      if (lane >= step) before += below;
    }
    const uint32_t all = __shfl_sync(~0U, before, 31);
    const uint32_t working = min(static_cast<uint32_t>(warps), all);
    uint32_t first[2];
    first[1] = before - segments[1];
    first[0] = first[1] - segments[0];
    if (warp == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int slice = 2 * lane + i;
        if (slice >= count) continue;
        // The last warp w with all * w / working <= segment.
        const auto warp_of = [&](uint32_t segment) {
          return static_cast<uint8_t>(((segment + 1) * working - 1) / all);
        };
        table.first_warp[slice] = segments[i] == 0 ? 1 : warp_of(first[i]);
        table.last_warp[slice] = segments[i] == 0 ? 0 : warp_of(first[i] + segments[i] - 1);
      }
    }
    if (warp >= static_cast<int>(working)) return;
    const uint32_t begin = all * warp / working;
    left_ = all * (warp + 1) / working - begin;
    // The last slice that begins at or before `begin` and has segments.
    slice_ = __popc(__ballot_sync(~0U, first[0] + segments[0] <= begin)) +
             __popc(__ballot_sync(~0U, first[1] + segments[1] <= begin));
    enter(begin - __shfl_sync(~0U, slice_ % 2 == 0 ? first[0] : first[1], slice_ / 2));
  }

  __device__ __forceinline__ int left() const { return left_; }
  // Where the next segment begins, and its bytes.
  __device__ __forceinline__ uint32_t unit() const { return unit_; }
  __device__ __forceinline__ int bytes() const {
    return kGatherHeadBytes + quads() * kGatherQuadBytes;
  }

  // Returns the next segment and goes on to the one after it.
  __device__ __forceinline__ Segment take() {
    const int own = quads(), slice = slice_;
    unit_ += kGatherHeadBytes / kGatherUnitBytes + own * (kGatherQuadBytes / kGatherUnitBytes);
    quads_left_ -= own;
    --left_;
    const bool ends = quads_left_ == 0 || left_ == 0;
    if (quads_left_ == 0 && left_ > 0) {
      do {
        ++slice_;
      } while (table_.quads[slice_] == 0);
      enter(0);
    }
    return Segment(own, slice, ends);
  }

 private:
  __device__ __forceinline__ int quads() const { return min(quads_left_, kGatherSegmentQuads); }

  __device__ __forceinline__ void enter(uint32_t segment) {
    constexpr int kUnits =
        (kGatherSegmentQuads * kGatherQuadBytes + kGatherHeadBytes) / kGatherUnitBytes;
    unit_ = table_.first_unit[slice_] + segment * kUnits;
    quads_left_ = table_.quads[slice_] - static_cast<int>(segment) * kGatherSegmentQuads;
  }

  const SliceTable& table_;
  int left_ = 0, slice_ = 0, quads_left_ = 0;
  uint32_t unit_ = 0;
};

template <typename C>
class GatherCta {
 public:
  __device__ __forceinline__ GatherCta(const GatherParams& p, uint8_t* smem, uint64_t* barriers,
                                       SliceTable& table)
      : p_(p),
        table_(table),
        lane_(static_cast<int>(threadIdx.x) % 32),
        warp_(__shfl_sync(~0U, static_cast<int>(threadIdx.x) / 32, 0)),
        warps_(static_cast<int>(blockDim.x) / 32),
        token0_(static_cast<int>(blockIdx.y) * C::kTokens),
        x_(smem + warps_ * kGatherStages * kGatherSegmentBytes),
        ring_(ptx::smem_address(smem) + warp_ * kGatherStages * kGatherSegmentBytes),
        full_(ptx::smem_address(barriers) + warp_ * kGatherStages * 8) {
    if (lane_ == 0) {
#pragma unroll
      for (int i = 0; i < kGatherStages; ++i) {
        ptx::mbarrier_init(full_ + 8 * i, C::WeightCopy::kArrivals);
      }
      C::WeightCopy::fence_barriers();
    }
    __syncwarp();
  }

  __device__ __forceinline__ void run() {
    if (warp_ == 0) find_slices(p_.weight, p_.batch, table_, lane_);
    __syncthreads();
    range_ = table_.range;
    cols_ = p_.weight.cols_of(range_.part);
    sums_ = reinterpret_cast<float*>(x_ + (cols_ + 7) / 8 * 8 * C::kColumnBytes);
    bool finite = true;
#pragma unroll 1
    for (first_ = range_.first; first_ < range_.last; first_ += p_.batch) {
      const bool begins = first_ == range_.first;
      count_ = min(p_.batch, range_.last - first_);
      if (!begins) {
        __syncthreads();  // the table and the sums are free again
        const int last_row = (first_ + count_ - 1) / kGatherTileSlices;
        for (int row = first_ / kGatherTileSlices + warp_; row <= last_row; row += warps_) {
          fill_table(table_, LaneSlices(p_.weight, row, range_.part, lane_), row, first_, count_,
                     lane_);
        }
        __syncthreads();
      }
      SegmentWalk walk(table_, count_, warp_, warps_, lane_);
      const int segments = walk.left();
      uint32_t in_ring = 0;
#pragma unroll
      for (int i = 0; i < kGatherStages; ++i) {
        if (i < segments) {
          const int stage = stage_ + i < kGatherStages ? stage_ + i : stage_ + i - kGatherStages;
          in_ring |= copy(walk, stage).bits << i * Segment::kBits;
        }
      }
      load_rows();
      if (begins) {
        wait_for_previous_kernel();
        finite = __syncthreads_or(!load_x()) == 0;
      }
      multiply(walk, segments, in_ring);
      __syncthreads();
      add_warps();
      if (!finite) {
        __syncthreads();  // the same elements of Y are written again
        multiply_tokens_that_are_not_finite();
      }
    }
  }

 private:
  static constexpr int kRowTokens = C::kTokens * kGatherSliceRows;

  __device__ __forceinline__ Segment copy(SegmentWalk& walk, int stage) {
    const RingCopy ring_copy = {reinterpret_cast<const uint32_t*>(p_.weight.unit(walk.unit())),
                                ring_ + stage * kGatherSegmentBytes,
                                static_cast<uint32_t>(walk.bytes()),
                                0,
                                0,
                                full_ + stage * 8};
    C::WeightCopy::template copy<1>(ring_copy, lane_);
    return walk.take();
  }

  // Stores which rows the batch's slices have, in order in a tile without bytes. They are needed
  // only at the end, so the segments' copies go first.
  __device__ __forceinline__ void load_rows() {
    for (int i = threadIdx.x; i < count_ * kGatherSliceRows; i += blockDim.x) {
      const int slice = i / kGatherSliceRows, row = i % kGatherSliceRows;
      const uint32_t unit = table_.rows_unit[slice];
      table_.rows[i] = static_cast<uint16_t>(
          unit == SliceTable::kNoRows
              ? (first_ + slice) % kGatherTileSlices * kGatherSliceRows + row
              : __ldg(reinterpret_cast<const uint16_t*>(p_.weight.unit(unit)) + row));
    }
  }

  // Stores the CTA's columns of X; returns whether this thread's are finite. A thread loads two
  // columns of each token, past L1: that may hold what the previous kernel read there.
  __device__ __forceinline__ bool load_x() {
    const int tokens = static_cast<int>(min(p_.epilogue.n - token0_, int64_t{C::kTokens}));
    const uint16_t* const x = p_.x + token0_ * p_.x_stride + int64_t{range_.part} * kGatherTileK;
    uint32_t zeros[2] = {};
#pragma unroll 4
    for (int pair = threadIdx.x; pair < (cols_ + 1) / 2; pair += blockDim.x) {
      uint32_t of_token[C::kTokens];
#pragma unroll
      for (int j = 0; j < C::kTokens; ++j) {
        of_token[j] =
            j < tokens ? __ldcg(reinterpret_cast<const uint32_t*>(x + j * p_.x_stride) + pair) : 0;
      }
#pragma unroll
      for (int j = 0; j < C::kTokens; ++j) {
        zeros[j % 2] = add_times_zero<C::kType>(of_token[j], zeros[j % 2]);
      }
      if constexpr (C::kTokens == 1) {
        float2 columns;
        unpack_pair<C::kType>(of_token[0], columns.x, columns.y);
        reinterpret_cast<float2*>(x_)[pair] = columns;
      } else {
        // Two tokens in a word; the words of the even column come first.
        uint32_t words[C::kTokens];
#pragma unroll
        for (int j = 0; j < C::kTokens; j += 2) {
          words[j / 2] = __byte_perm(of_token[j], of_token[j + 1], 0x5410);
          words[(C::kTokens + j) / 2] = __byte_perm(of_token[j], of_token[j + 1], 0x7632);
        }
        if constexpr (C::kTokens == 2) {
          reinterpret_cast<uint2*>(x_)[pair] = make_uint2(words[0], words[1]);
        } else {
#pragma unroll
          for (int j = 0; j < C::kTokens; j += 4) {
            reinterpret_cast<uint4*>(x_)[(pair * C::kTokens + j) / 4] =
                make_uint4(words[j], words[j + 1], words[j + 2], words[j + 3]);
          }
        }
      }
    }
    return (zeros[0] & 0x7FFF7FFFU) == 0 && (zeros[1] & 0x7FFF7FFFU) == 0;
  }

  // A quad of the segment in the ring: a lane's four steps and values.
  struct Quad {
    uint32_t steps;
    uint2 values;
  };

  __device__ __forceinline__ Quad load_quad(uint32_t segment, int quad) const {
    const uint32_t at = segment + kGatherHeadBytes + quad * kGatherQuadBytes;
    return {ptx::load_shared_u32(at + lane_ * 4),
            ptx::load_shared_v2(at + kGatherQuadStepBytes + lane_ * 8)};
  }

  // Adds a quad's products. `column` is in bytes from the beginning of X.
  __device__ __forceinline__ void multiply_quad(const Quad& quad, uint32_t x, uint32_t last_column,
                                                uint32_t& column) {
    column = min(column, last_column);  // without effect unless the weight is malformed
    float values[kGatherQuadSteps];
    unpack_pair<C::kType>(quad.values.x, values[0], values[1]);
    unpack_pair<C::kType>(quad.values.y, values[2], values[3]);
#pragma unroll
    for (int i = 0; i < kGatherQuadSteps; ++i) {
      column =
          __dp4a(static_cast<int>(quad.steps), C::kColumnBytes << 8 * i, static_cast<int>(column));
      const float value = values[i];
      if constexpr (C::kTokens == 1) {
        sums_of_lane_[0] += value * __uint_as_float(ptx::load_shared_u32(x + column));
      } else {
        uint32_t tokens[C::kTokens / 2];
        if constexpr (C::kTokens == 2) {
          tokens[0] = ptx::load_shared_u32(x + column);
        } else if constexpr (C::kTokens == 4) {
          const uint2 loaded = ptx::load_shared_v2(x + column);
          tokens[0] = loaded.x;
          tokens[1] = loaded.y;
        } else {
          const uint4 loaded = ptx::load_shared_v4(x + column);
          tokens[0] = loaded.x;
          tokens[1] = loaded.y;
          tokens[2] = loaded.z;
          tokens[3] = loaded.w;
        }
#pragma unroll
        for (int j = 0; j < C::kTokens / 2; ++j) {
          float low, high;
          unpack_pair<C::kType>(tokens[j], low, high);
          sums_of_lane_[2 * j] += value * low;
          sums_of_lane_[2 * j + 1] += value * high;
        }
      }
    }
  }

  // Multiplies the warp's segments of a batch, and leaves the sums of each slice in shared memory.
  __device__ __forceinline__ void multiply(SegmentWalk& walk, int segments, uint32_t in_ring) {
    const uint32_t x = ptx::smem_address(x_);
    const uint32_t last_column = (cols_ - 1) * C::kColumnBytes;
#pragma unroll
    for (float& sum : sums_of_lane_) sum = 0.0F;
#pragma unroll 1
    for (int i = 0; i < segments; ++i) {
      const Segment segment(in_ring);
      in_ring >>= Segment::kBits;
      const uint32_t bytes = ring_ + stage_ * kGatherSegmentBytes;
      ptx::mbarrier_wait(full_ + stage_ * 8, phase_);
      uint32_t column = ptx::load_shared_u16(bytes + lane_ * 2) * C::kColumnBytes;
      Quad quads[2] = {load_quad(bytes, 0)};
      if (segment.quads() == kGatherSegmentQuads) {
#pragma unroll
        for (int quad = 0; quad < kGatherSegmentQuads; ++quad) {
          if (quad + 1 < kGatherSegmentQuads) quads[(quad + 1) % 2] = load_quad(bytes, quad + 1);
          multiply_quad(quads[quad % 2], x, last_column, column);
        }
      } else {
#pragma unroll 1
        for (int quad = 0; quad < segment.quads(); quad += 2) {
          if (quad + 1 < segment.quads()) quads[1] = load_quad(bytes, quad + 1);
          multiply_quad(quads[0], x, last_column, column);
          if (quad + 1 == segment.quads()) break;
          if (quad + 2 < segment.quads()) quads[0] = load_quad(bytes, quad + 2);
          multiply_quad(quads[1], x, last_column, column);
        }
      }
      __syncwarp();
      if (walk.left() > 0) {
        in_ring |= copy(walk, stage_).bits << (kGatherStages - 1) * Segment::kBits;
      }
      if (++stage_ == kGatherStages) {
        stage_ = 0;
        phase_ ^= 1;
      }
      if (segment.ends_slice()) store_sums(segment.slice());
    }
  }

  // Adds the sums of a row's four lanes.
  __device__ __forceinline__ void store_sums(int slice) {
    // No other pair of a warp and a slice has this sum: both only rise.
    float* const out = sums_ + (warp_ + slice) * kRowTokens + lane_ / kGatherRuns;
#pragma unroll
    for (int j = 0; j < C::kTokens; ++j) {
      float& sum = sums_of_lane_[j];
      sum += __shfl_xor_sync(~0U, sum, 1);
      sum += __shfl_xor_sync(~0U, sum, 2);
      if (lane_ % kGatherRuns == 0) out[j * kGatherSliceRows] = sum;
      sum = 0.0F;
    }
  }

  // Adds the sums of the warps.
  __device__ __forceinline__ void add_warps() const {
    for (int i = threadIdx.x; i < count_ * kRowTokens; i += blockDim.x) {
      const int row = i % kGatherSliceRows, slice = i / kGatherSliceRows % count_;
      const int token = i / kGatherSliceRows / count_;
      float sum = 0.0F;
      for (int warp = table_.first_warp[slice]; warp <= table_.last_warp[slice]; ++warp) {
        sum += sums_[(warp + slice) * kRowTokens + token * kGatherSliceRows + row];
      }
      store(slice, row, token, sum);
    }
  }

  __device__ __forceinline__ void store(int slice, int row_of_slice, int token, float sum) const {
    const int tile_row = (first_ + slice) / kGatherTileSlices;
    const int row = table_.rows[slice * kGatherSliceRows + row_of_slice];
    if (row >= p_.weight.rows_of(tile_row) || token0_ + token >= p_.epilogue.n) return;
    const int64_t m = int64_t{tile_row} * kGatherTileM + row;
    if (p_.partial != nullptr) {
      const int64_t line = range_.part * p_.epilogue.n + token0_ + token;
      p_.partial[line * p_.epilogue.m + m] = sum;
    } else {
      p_.epilogue.template store_one<C::kType>(token0_ + token, m, sum);
    }
  }

  // A column of X of one token.
  __device__ __forceinline__ float x_of(int column, int token) const {
    if constexpr (C::kTokens == 1) {
      return reinterpret_cast<const float*>(x_)[column];
    } else {
      return element_to_float<C::kType>(
          reinterpret_cast<const uint16_t*>(x_)[column * C::kTokens + token]);
    }
  }

  // Slow, and rare: a warp has whole slices, and reads them from global memory for each token.
  __device__ __forceinline__ void multiply_tokens_that_are_not_finite() const {
#pragma unroll 1
    for (int token = 0; token < C::kTokens; ++token) {
      int columns = 0;  // that are not finite
      for (int column = lane_; column < cols_; column += 32) {
        columns += isfinite(x_of(column, token)) ? 0 : 1;
      }
      columns = __reduce_add_sync(~0U, columns);
      if (columns == 0) continue;
#pragma unroll 1
      for (int slice = warp_; slice < count_; slice += warps_) {
        float sum = 0.0F;
        int met = 0, column = 0;
        const uint8_t* at = p_.weight.unit(table_.first_unit[slice]);
#pragma unroll 1
        for (int quad = 0; quad < table_.quads[slice]; ++quad) {
          if (quad % kGatherSegmentQuads == 0) {
            column = __ldg(reinterpret_cast<const uint16_t*>(at) + lane_);
            at += kGatherHeadBytes;
          }
          const uint32_t steps = __ldg(reinterpret_cast<const uint32_t*>(at) + lane_);
          const auto* values = reinterpret_cast<const uint16_t*>(at + kGatherQuadStepBytes);
#pragma unroll 1
          for (int i = 0; i < kGatherQuadSteps; ++i) {
            column += static_cast<int8_t>(steps >> 8 * i);
            const uint16_t value = __ldg(values + lane_ * kGatherQuadSteps + i);
            if (value == 0) continue;
            const float x = x_of(min(max(column, 0), cols_ - 1), token);
            sum += element_to_float<C::kType>(value) * x;
            met += isfinite(x) ? 0 : 1;
          }
          at += kGatherQuadBytes;
        }
#pragma unroll
        for (int step = 1; step < kGatherRuns; step *= 2) {
          sum += __shfl_xor_sync(~0U, sum, step);
          met += __shfl_xor_sync(~0U, met, step);
        }
        if (met != columns) sum = __int_as_float(0x7FFFFFFF);  // NaN
        if (lane_ % kGatherRuns == 0) store(slice, lane_ / kGatherRuns, token, sum);
      }
    }
  }

  const GatherParams& p_;
  SliceTable& table_;
  const int lane_, warp_, warps_;
  const int64_t token0_;
  uint8_t* const x_;
  const uint32_t ring_, full_;
  SliceRange range_;
  int cols_, first_, count_;  // columns of X; the batch's slices
  float* sums_;               // [warp + slice][tokens][rows of a slice]
  int stage_ = 0;
  uint32_t phase_ = 0;
  float sums_of_lane_[C::kTokens];
};

template <typename C>
__global__ void __launch_bounds__(kGatherMaxWarps * 32, 1)
    gather_kernel(const __grid_constant__ GatherParams p) {
  if constexpr (kHasSm90 || !C::WeightCopy::kNeedsSm90) {
    extern __shared__ __align__(16) uint8_t smem_bytes[];
    __shared__ SliceTable table;
    __shared__ uint64_t barriers[kGatherMaxWarps * kGatherStages];
    allow_next_kernel();
    GatherCta<C>(p, smem_bytes, barriers, table).run();
  }
}

inline constexpr int kGatherFinishThreads = 256;

// Adds the sums of the parts.
template <ValueType kType>
__global__ void __launch_bounds__(kGatherFinishThreads)
    gather_finish_kernel(const __grid_constant__ Epilogue epilogue, const float* partial,
                         int parts) {
  allow_next_kernel();
  const int64_t m = int64_t{blockIdx.x} * kGatherFinishThreads + threadIdx.x;
  wait_for_previous_kernel();
  if (m >= epilogue.m) return;
  for (int64_t token = blockIdx.y; token < epilogue.n; token += gridDim.y) {
    float sum = 0.0F;
    for (int part = 0; part < parts; ++part) {
      sum += __ldcg(partial + (part * epilogue.n + token) * epilogue.m + m);
    }
    epilogue.store_one<kType>(token, m, sum);
  }
}

template <typename C>
Status launch_gather(const GatherParams& params, dim3 grid, int warps, int smem_bytes,
                     bool prefetch, cudaStream_t stream) {
  const Status sized =
      allow_smem("cudaFuncSetAttribute(gather_kernel)", gather_kernel<C>, smem_bytes);
  if (!sized.ok()) return sized;
  // An SM must have shared memory for the CTAs of two kernels.
  const Status preferred = cuda::check(
      cudaFuncSetAttribute(gather_kernel<C>, cudaFuncAttributePreferredSharedMemoryCarveout,
                           cudaSharedmemCarveoutMaxShared),
      "cudaFuncSetAttribute(gather_kernel)");
  if (!preferred.ok()) return preferred;
  bool dependent = C::WeightCopy::kNeedsSm90;
  if (!dependent) {
    const Status described = waits_for_previous_kernel("cudaFuncGetAttributes(gather_kernel)",
                                                       gather_kernel<C>, &dependent);
    if (!described.ok()) return described;
  }
  const Status multiplied =
      launch_kernel("gather_kernel launch", gather_kernel<C>, grid, warps * 32, smem_bytes,
                    dependent && prefetch, stream, params);
  if (!multiplied.ok() || params.partial == nullptr) return multiplied;
  const dim3 finish_grid(
      static_cast<unsigned>((params.epilogue.m + kGatherFinishThreads - 1) / kGatherFinishThreads),
      static_cast<unsigned>(std::min<int64_t>(params.epilogue.n, UINT16_MAX)));
  return launch_kernel("gather_finish_kernel launch", gather_finish_kernel<C::kType>, finish_grid,
                       kGatherFinishThreads, 0, dependent, stream, params.epilogue, params.partial,
                       params.weight.parts);
}

template <typename Family, ValueType kType>
Status launch_gather_config(int config, const GatherParams& params, dim3 grid, int warps,
                            int smem_bytes, bool prefetch, cudaStream_t stream) {
  int idx = 0;
#define FLASH_LLM_ROW(name, tokens, pair_warps)                                                    \
  if (config == idx++) {                                                                           \
    return launch_gather<GatherKernelConfig<Family, kType, tokens>>(params, grid, warps,           \
                                                                    smem_bytes, prefetch, stream); \
  }
  FLASH_LLM_GATHER_CONFIGS(FLASH_LLM_ROW)
#undef FLASH_LLM_ROW
  return Status::invalid_value("no gather configuration has index " + std::to_string(config));
}

// Runs a plan of a family.
template <typename Family>
Status spmm_gather(const SpmmPlan& plan, const SpmmArgs& args, void* workspace, bool prefetch,
                   cudaStream_t stream) {
  if (Status fits = check_plan(plan, Family::kFamily, args); !fits.ok()) return fits;
  const auto& configs = gather_configs(Family::kFamily);
  if (plan.config < 0 || plan.config >= static_cast<int>(configs.size())) {
    return Status::invalid_value("no gather configuration has index " +
                                 std::to_string(plan.config));
  }
  const PackedView& weight = args.weight;
  const GatherConfig& config = configs[static_cast<size_t>(plan.config)];
  const int warps = plan.ring_bytes / gather_ring_bytes(1);
  if (plan.work.rows != gather_slices(weight.m) || plan.work.cols != gather_parts(weight.k) ||
      plan.ctas != plan.work.workers || plan.ctas < plan.work.cols || warps < kGatherMinWarps ||
      warps > kGatherMaxWarps) {
    return Status::invalid_value("plan " + plan.to_string() + " does not fit its configuration");
  }
  const int64_t sums_bytes = gather_sums_bytes(weight.m, args.n, weight.k);
  if (Status fits = cuda::check_launch(plan, sums_bytes); !fits.ok()) return fits;
  const int batch = gather_batch(plan.work);
  const GatherParams params = {GatherWeight(weight),
                               args.x,
                               args.x_stride,
                               sums_bytes > 0 ? static_cast<float*>(workspace) : nullptr,
                               {args.bias, args.y, weight.m, args.n, args.activation},
                               batch};
  const dim3 grid(static_cast<unsigned>(plan.ctas),
                  static_cast<unsigned>(gather_passes(config, args.n)));
  const int smem_bytes = gather_smem_bytes(config, weight.k, warps, batch);
  switch (args.weight.value_type) {
    case ValueType::kFloat16:
      return launch_gather_config<Family, ValueType::kFloat16>(plan.config, params, grid, warps,
                                                               smem_bytes, prefetch, stream);
    case ValueType::kBfloat16:
      return launch_gather_config<Family, ValueType::kBfloat16>(plan.config, params, grid, warps,
                                                                smem_bytes, prefetch, stream);
    case ValueType::kInt8Float16:
    case ValueType::kInt8Bfloat16:
    case ValueType::kFp8Float16:
    case ValueType::kFp8Bfloat16:
    case ValueType::kInt4Float16:
    case ValueType::kInt4Bfloat16:
      break;
  }
  return Status::invalid_type("the gather kernel has no code for this value type");
}

}  // namespace flash_llm
