// The bitmap kernel for few tokens and layers of up to a few thousand rows. A CTA multiplies whole
// chunk rows of W, so it needs no workspace and no finishing kernel, which together take longer
// than such a layer's bytes.
//
//   X        [n, x_stride] fp16/bf16, see launch.h
//   offsets  int32[chunks + 1], payload: the bitmap format, see format/bitmap.h
//   Y        [n, m]
//
// One persistent CTA per SM works on chunk rows blockIdx.x, blockIdx.x + gridDim.x and so on, with
// the tokens of blockIdx.y. A chunk row is cut into blocks of 8 chunk columns, 4 pairs. The
// consumer warps are teams of 4; teams take the blocks in turn, and each warp of a team multiplies
// one pair by mma.sync, or by mma.sp and a residual. At the end of a chunk row half of the warps
// add the sums of all, through shared memory, while the others go on.
//
//   producer warp:       payload -> ring of bytes, in steps: the      full, empty: per step
//                        even chunks of a block, then the odd ones
//   each consumer warp:  X -> its two stages, which hold the even     full: per stage
//                        and the odd column of its pair
//
// If a chunk row has no more blocks than there are teams, each warp keeps its X for all rows.
// Weights may be copied while the previous kernel in the stream still runs. X may not, because that
// kernel may be writing it.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "cuda/bitmap/decode.cuh"
#include "cuda/bitmap/residual.cuh"
#include "cuda/bitmap/tensor_map.h"
#include "cuda/epilogue.cuh"
#include "cuda/launch.h"
#include "cuda/ptx/sm80.cuh"
#include "cuda/ptx/sm90.cuh"
#include "cuda/schedule/dependent_launch.cuh"
#include "cuda/schedule/warp_arrival.cuh"
#include "format/bitmap.h"
#include "plan/bitmap_rows_sm90.h"

// Defined where the kernel has code. GPUs of compute capability 12 lack the shared memory for it.
#if defined(FLASH_LLM_SM90) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 1200)
#define FLASH_LLM_ROWS_SM90 1
#endif

namespace flash_llm {

// Outside the unnamed namespace, in which nvcc would warn of those that the empty kernel of other
// architectures does not use.
inline constexpr int kTeamWarps = 4;
inline constexpr int kStepChunks = kBitmapRowsStepChunks;
static_assert(kStepChunks == kTeamWarps, "a chunk for each warp of a team");
inline constexpr int kStages = 16;  // steps in the ring, at most
inline constexpr int kPairBoxes = kTwoFourK / kXBoxK;
inline constexpr int kColumnBoxes = kChunkK / kXBoxK;

template <ValueType kTypeArg, int kTokensArg, int kTeamsArg>
struct RowsConfig {
  static constexpr ValueType kType = kTypeArg;
  static constexpr int kTokens = kTokensArg;
  static constexpr int kTeams = kTeamsArg;
  static constexpr int kWarps = kTeams * kTeamWarps;  // consumer warps
  static constexpr int kThreads = (kWarps + 1) * 32;
  static constexpr int kBlocks = kTokens / 8;
  static constexpr int kBoxBytes = kTokens * kXBoxK * 2;
  static constexpr int kRowSums = kChunkM * kTokens;
};

namespace {

struct RowsParams {
  const uint32_t* payload;
  const int32_t* offsets;
  int payload_units;
  int chunk_rows, chunk_cols;
  int row_blocks;  // blocks of 8 columns of a chunk row, at least one for each team
  int ring_units;  // size of the ring after its first gap, in units of 64 bytes
  Epilogue epilogue;
};

#ifdef FLASH_LLM_ROWS_SM90

// The layout of shared memory, in bytes from a 1024-byte boundary. What is before the ring and
// after it keeps the decoder's reads beyond a chunk (smem.cuh) within shared memory.
template <typename C>
struct RowsSmem {
  uint32_t base;

  static constexpr uint32_t kSums = C::kWarps * kPairBoxes * C::kBoxBytes;
  static constexpr uint32_t kDescriptors = kSums + C::kWarps * C::kRowSums * 4;
  static constexpr uint32_t kBarriers = kDescriptors + kStages * kStepChunks * 8;
  static constexpr int kXBarriers = 2 * kStages;
  static constexpr int kSumsBarriers = kXBarriers + 2 * C::kWarps;
  static constexpr int kBarrierCount = kSumsBarriers + 2;
  static constexpr uint32_t kRing = (kBarriers + kBarrierCount * 8 + 127) / 128 * 128;
  static_assert(kRing >= 34 * kChunkRowBytes, "the regions before the ring serve as a guard");
  static_assert(kRing + 1024 + kBitmapGuardBytes <=
                    bitmap_rows_fixed_smem_bytes(C::kTokens, C::kTeams),
                "the plan reserves fewer bytes than the layout takes");

  // X of a warp's pair: four boxes of 64 columns.
  __device__ __forceinline__ uint32_t x(int warp) const {
    return base + warp * kPairBoxes * C::kBoxBytes;
  }
  // A warp's sums of a chunk row.
  __device__ __forceinline__ uint32_t sums(int warp) const {
    return base + kSums + warp * C::kRowSums * 4;
  }
  // Two words for each chunk of a step: its address in shared memory and its size in units, 0 if it
  // has no bytes.
  __device__ __forceinline__ uint32_t descriptor(uint32_t step, int chunk) const {
    return base + kDescriptors + (step % kStages * kStepChunks + chunk) * 8;
  }
  // After the gap that precedes it.
  __device__ __forceinline__ uint32_t ring() const { return base + kRing + kDecodeReachBytes; }
  __device__ __forceinline__ uint32_t full(uint32_t step) const { return barrier(step % kStages); }
  __device__ __forceinline__ uint32_t empty(uint32_t step) const {
    return barrier(kStages + step % kStages);
  }
  // `odd`: of the pair's even (0) or odd (1) column.
  __device__ __forceinline__ uint32_t x_full(int warp, int odd) const {
    return barrier(kXBarriers + 2 * warp + odd);
  }
  // Of the sums: all warps write them, half of the warps read them.
  __device__ __forceinline__ uint32_t sums_full() const { return barrier(kSumsBarriers); }
  __device__ __forceinline__ uint32_t sums_empty() const { return barrier(kSumsBarriers + 1); }
  __device__ __forceinline__ uint32_t barrier(int i) const { return base + kBarriers + i * 8; }
  __device__ __forceinline__ static int arrivals(int i) {
    if (i >= kSumsBarriers) {
      return (i == kSumsBarriers ? C::kWarps : C::kWarps / 2) * kWarpArrivals;
    }
    if (i >= kStages && i < kXBarriers) return kTeamWarps * kWarpArrivals;
    return i < kStages ? kWarpArrivals : 1;
  }
};

// The parity of the phase that the n-th use of a barrier completes.
__device__ __forceinline__ uint32_t phase(uint32_t n) { return n & 1; }

// Chunk rows of this CTA.
__device__ __forceinline__ uint32_t own_rows(const RowsParams& p) {
  return (p.chunk_rows - blockIdx.x + gridDim.x - 1) / gridDim.x;
}
__device__ __forceinline__ int chunk_row_of(uint32_t row) {
  return static_cast<int>(blockIdx.x + row * gridDim.x);
}

// One warp, which copies the chunks of all steps, each by a bulk copy of its own. A block is two
// steps: the even chunks of a team's pairs, then the odd ones.
template <typename C>
class StepProducer {
 public:
  __device__ __forceinline__ StepProducer(const RowsParams& p, const RowsSmem<C>& smem, int lane)
      : p_(p), smem_(smem), lane_(lane), steps_(2 * own_rows(p) * p.row_blocks) {}

  // Runs before the barriers are initialised: loading the first offsets takes longest.
  __device__ __forceinline__ void begin() { next_ = load(lane_ / kStepChunks); }

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (uint32_t first = 0; first < steps_; first += kLoaded) {
      const Chunk chunk = lay_out(next_);
      next_ = load(first + kLoaded + lane_ / kStepChunks);
#pragma unroll 1
      for (int i = 0; i < kLoaded && first + i < steps_; ++i) copy_step(chunk, i);
    }
  }

 private:
  static constexpr int kLoaded = 32 / kStepChunks;  // steps whose offsets are loaded at once

  // Where a chunk begins in the payload, and its size, in units.
  struct ChunkRange {
    int begin, units;
  };
  // This lane's chunk of a step. Sizes are in units.
  struct Chunk {
    int begin;  // in the payload
    int units;  // of the bytes that are copied
    int end;    // of the step's chunks up to this one
    int total;  // of all chunks of the step
  };

  // The offsets of this lane's chunk of a step.
  __device__ __forceinline__ ChunkRange load(uint32_t step) const {
    const uint32_t block = step / 2;
    const int row = chunk_row_of(block / p_.row_blocks);
    const int pair = static_cast<int>(block % p_.row_blocks) * kTeamWarps + lane_ % kTeamWarps;
    const int col = 2 * pair + static_cast<int>(step % 2);
    if (step >= steps_ || col >= p_.chunk_cols) return {0, 0};
    const int32_t* offset = p_.offsets + chunk_index(row, col, p_.chunk_rows, p_.chunk_cols);
    const int begin = __ldg(offset), end = __ldg(offset + 1);
    return {begin, end - begin};
  }

  __device__ __forceinline__ Chunk lay_out(const ChunkRange& range) const {
    // A malformed chunk counts as empty. The bytes of a 2:4 pair are those of its even column.
    const bool sound = range.begin >= 0 && range.units >= 0 && range.units <= kMaxChunkUnits &&
                       range.begin <= p_.payload_units - range.units;
    Chunk chunk = {range.begin, sound ? range.units : 0, 0, 0};
    const int even = __shfl_sync(~0U, chunk.units, lane_ & ~kStepChunks);
    if ((lane_ & kStepChunks) != 0 && is_two_four(even)) chunk.units = 0;
    chunk.end = chunk.units;
#pragma unroll
    for (int distance = 1; distance < kStepChunks; distance *= 2) {
      const int before = __shfl_up_sync(~0U, chunk.end, distance, kStepChunks);
      if (lane_ % kStepChunks >= distance) chunk.end += before;
    }
    chunk.total = __shfl_sync(~0U, chunk.end, lane_ | (kStepChunks - 1));
    return chunk;
  }

  // Copies step issued_, whose chunks are those of the i-th kStepChunks lanes.
  __device__ __forceinline__ void copy_step(const Chunk& chunk, int i) {
    const bool own = lane_ / kStepChunks == i;
    const int total = __shfl_sync(~0U, chunk.total, i * kStepChunks);
    // Units of the ring, with the gap after this step; and head_ after it.
    const int needed = total > 0 ? total + kBitmapGapUnits : 0;
    int reserving = needed, after = head_ + needed;
    int slot = head_ + chunk.end - chunk.units;
    if (after > p_.ring_units + kBitmapGapUnits) {
      // Chunks that would cross the ring's end go to its beginning.
      const bool fits = head_ + chunk.end <= p_.ring_units;
      const int before_wrap = static_cast<int>(
          __reduce_max_sync(~0U, static_cast<unsigned>(own && fits ? chunk.end : 0)));
      reserving = needed + p_.ring_units - head_ - before_wrap;
      after = needed - before_wrap;
      slot = chunk.end - chunk.units + (fits ? head_ : -before_wrap);
      // Very full chunks and the unused end together may exceed the ring: then empty it and start
      // at its beginning, where every step fits.
      if (reserving > p_.ring_units) {
        while (released_ != issued_) release_oldest();
        reserving = after = needed;
        slot = chunk.end - chunk.units;
      }
    }
    while (issued_ - released_ == kStages ||
           static_cast<int>(reserved_ + reserving - released_units_) > p_.ring_units) {
      release_oldest();
    }
    const uint32_t full = smem_.full(issued_), place = smem_.ring() + slot * kChunkUnitBytes;
    if (own) {
      ptx::store_shared_v2(smem_.descriptor(issued_, lane_ % kStepChunks), place, chunk.units);
    }
    __syncwarp();
    if (lane_ == i * kStepChunks) {
      ptx::mbarrier_arrive_expect_tx(full, total * kChunkUnitBytes);
    } else if constexpr (kWarpArrivals > 1) {
      ptx::mbarrier_arrive(full);
    }
    __syncwarp();
    if (own && chunk.units > 0) {
      ptx::bulk_copy_streaming(place, p_.payload + int64_t{chunk.begin} * kChunkUnitWords,
                               chunk.units * kChunkUnitBytes, full);
    }
    reserved_ += reserving;
    if (lane_ == issued_ % 32) reserved_after_ = reserved_;
    head_ = after;
    ++issued_;
  }

  // Waits until the team has read the oldest step in the ring.
  __device__ __forceinline__ void release_oldest() {
    ptx::mbarrier_wait(smem_.empty(released_), phase(released_ / kStages));
    released_units_ = __shfl_sync(~0U, reserved_after_, released_ % 32);
    ++released_;
  }

  const RowsParams& p_;
  const RowsSmem<C>& smem_;
  int lane_;
  uint32_t steps_;
  ChunkRange next_ = {};         // of the steps after those that are being copied
  int head_ = 0;                 // where the next chunk goes in the ring, in units
  uint32_t issued_ = 0;          // steps copied so far
  uint32_t released_ = 0;        // how many of them were read
  uint32_t reserved_ = 0;        // units of the ring that were reserved so far
  uint32_t released_units_ = 0;  // those of the steps that were read
  // Lane l: reserved_ after step i was copied, for the last i with i % 32 == l.
  uint32_t reserved_after_ = 0;
};

template <typename C>
class RowConsumer {
 public:
  float sums[2][C::kBlocks][4] = {};  // by strip and block of 8 tokens

  __device__ __forceinline__ RowConsumer(const RowsParams& p, const CUtensorMap& map,
                                         const RowsSmem<C>& smem, int warp, int lane)
      : p_(p),
        map_(map),
        smem_(smem),
        warp_(warp),
        lane_(lane),
        blocks_(own_rows(p) * p.row_blocks),
        block_(warp / kTeamWarps) {
    if (lane == 0) {
      ptx::prefetch_tensor_map(&map);
      wait_for_previous_kernel();
      for (int odd = 0; odd < 2; ++odd) load_x(block_, odd);
    }
    __syncwarp();
  }

  // Multiplies this warp's pairs of the CTA's chunk row `row`.
  __device__ __forceinline__ void multiply_row(uint32_t row) {
#pragma unroll 1
    for (; block_ < (row + 1) * p_.row_blocks; block_ += C::kTeams) {
      const uint2 even = wait_chunk(2 * block_);
      wait_x(0);
      if (is_two_four(even.y)) {
        wait_x(1);
        multiply_two_four(even.x, static_cast<int>(even.y));
      } else {
        multiply_plain(even, 0);
      }
      next_x(0);
      arrive_for_warp(smem_.empty(2 * block_), lane_);
      const uint2 odd = wait_chunk(2 * block_ + 1);
      if (!is_two_four(even.y)) {
        wait_x(1);
        multiply_plain(odd, 1);
      }
      next_x(1);
      arrive_for_warp(smem_.empty(2 * block_ + 1), lane_);
      if (!x_stays()) ++x_uses_;
    }
  }

 private:
  static constexpr int kBlockBytes = 8 * 128;  // of 8 tokens in a box

  // Waits for this warp's chunk of a step; returns its descriptor.
  __device__ __forceinline__ uint2 wait_chunk(uint32_t step) const {
    ptx::mbarrier_wait(smem_.full(step), phase(step / kStages));
    return ptx::load_shared_v2(smem_.descriptor(step, warp_ % kTeamWarps));
  }

  // Whether this warp multiplies the same columns of each row.
  __device__ __forceinline__ bool x_stays() const { return p_.row_blocks == C::kTeams; }

  __device__ __forceinline__ void load_x(uint32_t block, int odd) const {
    const int pair = static_cast<int>(block % p_.row_blocks) * kTeamWarps + warp_ % kTeamWarps;
    const int col = 2 * pair + odd;
    const uint32_t full = smem_.x_full(warp_, odd);
    ptx::mbarrier_arrive_expect_tx(full, kColumnBoxes * C::kBoxBytes);
#pragma unroll
    for (int box = 0; box < kColumnBoxes; ++box) {
      ptx::tensor_copy_2d(smem_.x(warp_) + (odd * kColumnBoxes + box) * C::kBoxBytes, &map_,
                          col * kChunkK + box * kXBoxK, blockIdx.y * C::kTokens, full);
    }
  }

  // Loads the X of this warp's next pair; the warp has read that of this one.
  __device__ __forceinline__ void next_x(int odd) const {
    if (x_stays() || block_ + C::kTeams >= blocks_) return;
    __syncwarp();
    if (lane_ == 0) load_x(block_ + C::kTeams, odd);
  }

  __device__ __forceinline__ void wait_x(int odd) const {
    ptx::mbarrier_wait(smem_.x_full(warp_, odd), phase(x_uses_));
    __syncwarp();
  }

  // Both halves are decoded at a time, so four runs, two by strip, do not wait for each other.
  __device__ __forceinline__ void multiply_plain(uint2 descriptor, int odd) {
    // Lanes 8 m to 8 m + 7 give the rows of matrix m: 8 columns, of half m / 2, by 8 tokens.
    const unsigned token = lane_ % 8U, matrix = lane_ / 8U;
    const uint32_t x_row = smem_.x(warp_) + (2 * odd + matrix / 2) * C::kBoxBytes + token * 128 +
                           (matrix % 2 ^ token) * 16;
    if (descriptor.y == 0) {
      multiply_zeros(x_row);
      return;
    }
    const int value_bytes = static_cast<int>(descriptor.y) * kChunkUnitBytes - kChunkFixedBytes;
    ChunkCursor cursor(descriptor.x, max(value_bytes, 0), true, lane_);
    plain_fragment<0>(cursor, x_row);
    plain_fragment<1>(cursor, x_row);
    plain_fragment<2>(cursor, x_row);
    plain_fragment<3>(cursor, x_row);
  }

  // Multiplies a chunk without nonzeros: zero times Inf is NaN.
  __device__ __forceinline__ void multiply_zeros(uint32_t x_row) {
    const uint32_t a[4] = {};
#pragma unroll
    for (int i = 0; i < 4 * C::kBlocks; ++i) {
      const int fragment = i % 4, block = i / 4;
      uint32_t b[4];
      ptx::ldmatrix_x4(b, (x_row ^ fragment * 32) + block * kBlockBytes);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        ptx::mma_m16n8k16<C::kType>(sums[s][block], a, b[0], b[1]);
        ptx::mma_m16n8k16<C::kType>(sums[s][block], a, b[2], b[3]);
      }
    }
  }

  // Multiplies fragment kFragment of both halves.
  template <int kFragment>
  __device__ __forceinline__ void plain_fragment(ChunkCursor& cursor, uint32_t x_row) {
    uint32_t b[C::kBlocks][4], up[2][4], down[2][4];
#pragma unroll
    for (int block = 0; block < C::kBlocks; ++block) {
      ptx::ldmatrix_x4(b[block], (x_row ^ kFragment * 32U) + block * kBlockBytes);
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      decode_fragment<kFragment, kChunkRowBytes>(cursor.bits[s], cursor.up[s], up[s]);
      decode_fragment<kFragment, -kChunkRowBytes>(cursor.bits[2 + s], cursor.down[s], down[s]);
    }
#pragma unroll
    for (int block = 0; block < C::kBlocks; ++block) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        ptx::mma_m16n8k16<C::kType>(sums[s][block], up[s], b[block][0], b[block][1]);
      }
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        ptx::mma_m16n8k16<C::kType>(sums[s][block], down[s], b[block][2], b[block][3]);
      }
    }
  }

  __device__ __forceinline__ void multiply_two_four(uint32_t chunk, int units) {
    const TwoFourParts parts(chunk, units, lane_);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      uint32_t bits[4];
      load_bits(bits, parts.bits + s * kTwoFourStripBitsBytes + lane_ * 16);
      const TwoFourWords words = two_four_words(bits, lane_);
      uint32_t up = parts.values + lane_ * 4 + s * 2;
      uint32_t down = parts.residual - kChunkRowBytes + (parts.down_offsets >> (s * 8) & 0x7EU);
      two_four_fragment<0>(words, up, down, sums[s]);
      two_four_fragment<1>(words, up, down, sums[s]);
      two_four_fragment<2>(words, up, down, sums[s]);
      two_four_fragment<3>(words, up, down, sums[s]);
      add_residual(parts.residual + (s == 0 ? 0 : parts.steps[0] * kResidualStepBytes),
                   parts.steps[s], sums[s]);
    }
  }

  // Multiplies fragment kFragment of both halves of a strip; that of half h multiplies columns
  // 64 kFragment + 32 h and the next 31.
  template <int kFragment>
  __device__ __forceinline__ void two_four_fragment(const TwoFourWords& words, uint32_t& up,
                                                    uint32_t& down,
                                                    float (&strip_sums)[C::kBlocks][4]) const {
    const unsigned token = lane_ % 8U, matrix = lane_ / 8U;
    const uint32_t x_row =
        smem_.x(warp_) + kFragment * C::kBoxBytes + token * 128 + (matrix ^ token) * 16;
    uint32_t a[2][4], b[C::kBlocks][2][4];
#pragma unroll
    for (int block = 0; block < C::kBlocks; ++block) {
      ptx::ldmatrix_x4(b[block][0], x_row + block * kBlockBytes);
      ptx::ldmatrix_x4(b[block][1], (x_row ^ 64U) + block * kBlockBytes);
    }
    decode_two_four_fragment<kFragment, kChunkRowBytes>(words.runs[0], up, a[0]);
    decode_two_four_fragment<kFragment, -kChunkRowBytes>(words.runs[1], down, a[1]);
    const uint32_t metadata = words.metadata[kFragment];
#pragma unroll
    for (int block = 0; block < C::kBlocks; ++block) {
      ptx::mma_sp_m16n8k32<C::kType, 0>(strip_sums[block], a[0], b[block][0], metadata);
      ptx::mma_sp_m16n8k32<C::kType, 1>(strip_sums[block], a[1], b[block][1], metadata);
    }
  }

  // Adds the products of a strip's residual: A is diagonal, and row j of B is the column of X that
  // the step's element of row j multiplies (format/bitmap.h). With few steps, loading B element by
  // element costs less than transposing X.
  __device__ __forceinline__ void add_residual(uint32_t step, int steps,
                                               float (&strip_sums)[C::kBlocks][4]) const {
    const int group = lane_ / 4, t = lane_ % 4;
    const DiagonalSelectors select(lane_);
    // The columns of two rows, of token `group` of a block.
    const auto load_pair = [&](uint32_t offsets, int block) {
      uint32_t pair[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t place = offsets >> (16 * i + 4) & (kTwoFourK - 1);
        const uint32_t column8 = place / 8, inner = (place ^ column8) % 8;
        pair[i] = load_shared_u16<0>(smem_.x(warp_) + column8 / 8 * C::kBoxBytes + group * 128 +
                                     (column8 % 8 ^ group) * 16 + inner * 2 + block * kBlockBytes);
      }
      return byte_permute(pair[0], pair[1], 0x5410U);
    };
#pragma unroll 1
    for (int i = 0; i < steps; ++i, step += kResidualStepBytes) {
      const uint32_t values = ptx::load_shared_u32(step + group * 4);
      const uint32_t low = ptx::load_shared_u32(step + 32 + t * 4);
      const uint32_t high = ptx::load_shared_u32(step + 48 + t * 4);
      const uint32_t a[4] = {byte_permute(values, 0, select.low), 0, 0,
                             byte_permute(values, 0, select.high)};
#pragma unroll
      for (int block = 0; block < C::kBlocks; ++block) {
        ptx::mma_m16n8k16<C::kType>(strip_sums[block], a, load_pair(low, block),
                                    load_pair(high, block));
      }
    }
  }

  const RowsParams& p_;
  const CUtensorMap& map_;
  const RowsSmem<C>& smem_;
  int warp_, lane_;
  uint32_t blocks_;      // of the CTA
  uint32_t block_;       // this warp's next one
  uint32_t x_uses_ = 0;  // how often X was loaded again
};

// Adds the warps' sums of a chunk row in a fixed order, so that results are repeatable bit for bit,
// and stores Y; for one of `threads` threads.
template <typename C>
__device__ __forceinline__ void add_sums(const RowsParams& p, const RowsSmem<C>& smem, uint32_t row,
                                         int thread, int threads) {
#pragma unroll 1
  for (int i = thread; i < C::kRowSums; i += threads) {
    // Float i % 4 of lane i / 4 % 32 of a block of 8 tokens of a strip.
    const int block = i / 128 % C::kBlocks, strip = i / 128 / C::kBlocks;
    const int64_t token = int64_t{blockIdx.y} * C::kTokens + block * 8 + i / 4 % 4 * 2 + i % 2;
    const int64_t m =
        int64_t{chunk_row_of(row)} * kChunkM + strip * kStripM + i / 16 % 8 + i / 2 % 2 * 8;
    if (token >= p.epilogue.n || m >= p.epilogue.m) continue;
    float sum = 0.0F;
#pragma unroll
    for (int w = 0; w < C::kWarps; ++w) {
      sum += __uint_as_float(ptx::load_shared_u32(smem.sums(w) + i * 4));
    }
    p.epilogue.template store_one<C::kType>(token, m, sum);
  }
}

// What a consumer warp does.
template <typename C>
__device__ __forceinline__ void multiply_rows(const RowsParams& p, const CUtensorMap& map,
                                              const RowsSmem<C>& smem, int warp, int lane) {
  RowConsumer<C> consumer(p, map, smem, warp, lane);
  const uint32_t rows = own_rows(p);
#pragma unroll 1
  for (uint32_t row = 0; row < rows; ++row) {
    consumer.multiply_row(row);
    ptx::mbarrier_wait(smem.sums_empty(), phase(row) ^ 1);
#pragma unroll
    for (int i = 0; i < 2 * C::kBlocks; ++i) {
      float(&sums)[4] = consumer.sums[i / C::kBlocks][i % C::kBlocks];
      ptx::store_shared_v4(smem.sums(warp) + (i * 32 + lane) * 16, sums);
#pragma unroll
      for (float& sum : sums) sum = 0.0F;
    }
    arrive_for_warp(smem.sums_full(), lane);
    // The halves of the warps take turns in adding the sums; the others go on to the next row.
    constexpr uint32_t kHalf = C::kWarps / 2;
    if (warp / kHalf != row % 2) continue;
    ptx::mbarrier_wait(smem.sums_full(), phase(row));
    add_sums(p, smem, row, (warp % kHalf) * 32 + lane, kHalf * 32);
    arrive_for_warp(smem.sums_empty(), lane);
  }
}

#endif  // FLASH_LLM_ROWS_SM90

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
    bitmap_rows_kernel(const __grid_constant__ RowsParams p,
                       const __grid_constant__ CUtensorMap map) {
#ifdef FLASH_LLM_ROWS_SM90
  extern __shared__ uint8_t smem_bytes[];
  const RowsSmem<C> smem = {ptx::opaque((ptx::smem_address(smem_bytes) + 1023) / 1024 * 1024)};
  const int warp = __shfl_sync(~0U, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = threadIdx.x % 32;
  allow_next_kernel();
  StepProducer<C> producer(p, smem, lane);
  if (warp == C::kWarps) producer.begin();
  if (lane == 0) {
    for (int i = warp; i < RowsSmem<C>::kBarrierCount; i += C::kThreads / 32) {
      ptx::mbarrier_init(smem.barrier(i), RowsSmem<C>::arrivals(i));
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if (warp < C::kWarps) {
    multiply_rows<C>(p, map, smem, warp, lane);
  } else {
    producer.run();
  }
#else
  __trap();  // never: the plan refuses
#endif
}

template <typename C>
Status launch(const RowsParams& params, const SpmmArgs& args, dim3 grid, int smem_bytes,
              bool prefetch, cudaStream_t stream) {
  CUtensorMap map;
  if (Status mapped = map_x(args, C::kTokens, &map); !mapped.ok()) return mapped;
  const Status sized =
      allow_smem("cudaFuncSetAttribute(bitmap_rows_kernel)", bitmap_rows_kernel<C>, smem_bytes);
  if (!sized.ok()) return sized;
  return launch_kernel("bitmap_rows_kernel launch", bitmap_rows_kernel<C>, grid, C::kThreads,
                       smem_bytes, prefetch, stream, params, map);
}

template <ValueType kType>
Status launch_config(int config, const RowsParams& params, const SpmmArgs& args, dim3 grid,
                     int smem_bytes, bool prefetch, cudaStream_t stream) {
  int idx = 0;
#define FLASH_LLM_ROW(name, tokens, teams)                                                    \
  if (config == idx++) {                                                                      \
    return launch<RowsConfig<kType, tokens, teams>>(params, args, grid, smem_bytes, prefetch, \
                                                    stream);                                  \
  }
  FLASH_LLM_BITMAP_ROWS_CONFIGS(FLASH_LLM_ROW)
#undef FLASH_LLM_ROW
  return Status::invalid_value("no configuration for whole rows has index " +
                               std::to_string(config));
}

}  // namespace

Status cuda::spmm_bitmap_rows(const SpmmPlan& plan, const SpmmArgs& args, bool prefetch,
                              cudaStream_t stream) {
  if (Status fits = check_plan(plan, KernelFamily::kBitmapRowsSm90, args); !fits.ok()) return fits;
  const PackedView& weight = args.weight;
  if (plan.config < 0 || plan.config >= static_cast<int>(bitmap_rows_configs().size())) {
    return Status::invalid_value("no configuration for whole rows has index " +
                                 std::to_string(plan.config));
  }
  if (plan.ctas < 1 || plan.ctas > num_chunk_rows(weight.m) ||
      plan.ring_bytes < kBitmapRowsMinRingBytes) {
    return Status::invalid_value("plan " + plan.to_string() + " does not fit its configuration");
  }
  const BitmapRowsConfig& config = bitmap_rows_configs()[static_cast<size_t>(plan.config)];
  RowsParams params;
  params.payload = weight.payload;
  params.offsets = weight.offsets;
  params.payload_units = static_cast<int>(weight.payload_words / kChunkUnitWords);
  params.chunk_rows = static_cast<int>(num_chunk_rows(weight.m));
  params.chunk_cols = static_cast<int>(num_chunk_cols(weight.k));
  params.row_blocks =
      std::max((params.chunk_cols + 2 * kTeamWarps - 1) / (2 * kTeamWarps), config.teams);
  params.ring_units = plan.ring_bytes / kChunkUnitBytes - kBitmapGapUnits;
  params.epilogue = {args.bias, args.y, weight.m, args.n, args.activation};
  const dim3 grid(static_cast<unsigned>(plan.ctas),
                  static_cast<unsigned>((args.n + config.tile_n - 1) / config.tile_n));
  const int smem_bytes =
      bitmap_rows_fixed_smem_bytes(config.tile_n, config.teams) + plan.ring_bytes;
  switch (args.weight.value_type) {
    case ValueType::kFloat16:
      return launch_config<ValueType::kFloat16>(plan.config, params, args, grid, smem_bytes,
                                                prefetch, stream);
    case ValueType::kBfloat16:
      return launch_config<ValueType::kBfloat16>(plan.config, params, args, grid, smem_bytes,
                                                 prefetch, stream);
    case ValueType::kInt8Float16:
    case ValueType::kInt8Bfloat16:
    case ValueType::kFp8Float16:
    case ValueType::kFp8Bfloat16:
    case ValueType::kInt4Float16:
    case ValueType::kInt4Bfloat16:
      break;
  }
  return Status::invalid_type("the bitmap rows kernel has no code for this value type");
}

}  // namespace flash_llm
