// The consumer warps of the mma.sync kernel. For each column of chunks a warp decodes its strips of
// 16 rows into A fragments in registers (decode.cuh) and multiplies them by mma.m16n8k16 (plain
// chunks), or by mma.sp.m16n8k32 and the residual by mma.m16n8k16 (2:4 chunks, residual.cuh).
#pragma once

#include <cstdint>

#include "cuda/bitmap/decode.cuh"
#include "cuda/bitmap/mma_sync_config.cuh"
#include "cuda/bitmap/residual.cuh"
#include "cuda/bitmap/smem.cuh"
#include "cuda/ptx/sm80.cuh"

namespace flash_llm {

template <typename C>
class MmaSyncConsumer {
 public:
  float sums[C::kStrips][C::kTileN / 2];

  __device__ __forceinline__ MmaSyncConsumer(const BitmapSmem<C>& smem, int warp, int lane)
      : smem_(smem), warp_(warp), lane_(lane) {
    begin_sums();
  }

  // Columns of chunks that were multiplied so far, in the whole work range.
  __device__ __forceinline__ int columns() const {
    return static_cast<int>(x_state_.count) * C::kXStageK / kChunkK;
  }

  // Clears the sums for the next output tile.
  __device__ __forceinline__ void begin_sums() {
#pragma unroll
    for (auto& strip_sums : sums) {
#pragma unroll
      for (float& sum : strip_sums) sum = 0.0F;
    }
  }

  // Multiplies the columns up to the end of the output tile or of the work range. Returns the flags
  // of the last one.
  __device__ __forceinline__ uint32_t multiply_tile() {
    for (;;) {
      ptx::mbarrier_wait(smem_.group_full(group(), group_state_.stage()), group_state_.phase());
      const uint2 descriptor = ptx::load_shared_v2(
          smem_.descriptor(group(), group_state_.stage(), warp_ % C::kGroupWarps));
      const uint32_t flags = __shfl_sync(~0U, descriptor.y, 0) >> 16;
      if ((flags & kColumnIsTwoFour) != 0) {
        multiply_two_four(descriptor.x, static_cast<int>(descriptor.y & 0xFFFF));
      } else {
        multiply_plain(descriptor.x, descriptor.y & 0xFFFF);
      }
      arrive_for_warp(smem_.group_empty(group(), group_state_.stage()), lane_);
      group_state_ = group_state_ + 1;
      if ((flags & (kColumnEndsTile | kColumnIsLast)) != 0) return flags;
    }
  }

 private:
  static constexpr int kStageFragments = C::kXStageK / 16;
  static constexpr int kTwoFourStages = kTwoFourK / C::kXStageK;
  // Whether to read the parts of a 2:4 chunk again when they are needed instead of keeping them in
  // registers: with 32 tokens half of them hold sums and fragments.
  static constexpr bool kFewRegisters = C::kTileN == 32;

  __device__ __forceinline__ int group() const { return warp_ / C::kGroupWarps; }

  // Waits until kStages stages of X are in shared memory, from x_state_ on.
  template <int kStages>
  __device__ __forceinline__ void wait_x() const {
    const PipelineState<C::kXStages> state = x_state_ + lane_ % kStages;
    ptx::mbarrier_wait(smem_.x_full(state.stage()), state.phase());
    __syncwarp();
  }

  // Releases kStages stages of X, from x_state_ on: this warp has read them.
  template <int kStages>
  __device__ __forceinline__ void release_x() {
    arrive_for_warp_at_each<kStages>(
        lane_, [&](int i) { ptx::mbarrier_arrive(smem_.x_empty((x_state_ + i).stage())); });
    x_state_ = x_state_ + kStages;
  }

  // The B operand of 8 tokens and the 32 columns from column 32 * half on of 64 columns of X, whose
  // shared-memory address is `x`: register i of lane 4 g + t gets columns 8 i + 2 t and 8 i + 2 t +
  // 1 of token g.
  __device__ __forceinline__ void load_x(uint32_t (&b)[4], uint32_t x, int half, int block) const {
    const unsigned token = lane_ % 8U, col8 = lane_ / 8U;
    ptx::ldmatrix_x4(b, x + token * 128 + ((col8 ^ token) * 16 ^ half * 64U) + block * 1024);
  }

  __device__ __forceinline__ void multiply_plain(uint32_t chunk, uint32_t value_bytes) {
    const ChunkCursor cursor(chunk, value_bytes, true, lane_);
    uint32_t bits[2][C::kStrips], position[2][C::kStrips];
#pragma unroll
    for (int s = 0; s < C::kStrips; ++s) {
      bits[0][s] = cursor.bits[s];
      bits[1][s] = cursor.bits[2 + s];
      position[0][s] = cursor.up[s];
      position[1][s] = cursor.down[s];
    }
    multiply_plain_32<0, 0>(bits, position);
    multiply_plain_32<0, 2>(bits, position);
    multiply_plain_32<1, 0>(bits, position);
    multiply_plain_32<1, 2>(bits, position);
  }

  // Multiplies 32 columns of a plain chunk: fragments kFirst and kFirst + 1 of half kHalf.
  template <int kHalf, int kFirst>
  __device__ __forceinline__ void multiply_plain_32(const uint32_t (&bits)[2][C::kStrips],
                                                    uint32_t (&position)[2][C::kStrips]) {
    constexpr int kStep = kHalf == 0 ? kChunkRowBytes : -kChunkRowBytes;
    constexpr int kFragment = (kHalf * 4 + kFirst) % kStageFragments;  // within the stage of X
    uint32_t a[2][C::kStrips][4];
#pragma unroll
    for (int s = 0; s < C::kStrips; ++s) {
      decode_fragment<kFirst, kStep>(bits[kHalf][s], position[kHalf][s], a[0][s]);
      decode_fragment<kFirst + 1, kStep>(bits[kHalf][s], position[kHalf][s], a[1][s]);
    }
    if constexpr (kFragment == 0) wait_x<1>();
    const uint32_t x = smem_.x(x_state_.stage()) + kFragment / 4 * C::kXBoxBytes;
#pragma unroll
    for (int block = 0; block < C::kBlocksN; ++block) {
      uint32_t b[4];
      load_x(b, x, kFragment / 2 % 2, block);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int s = 0; s < C::kStrips; ++s) {
          ptx::mma_m16n8k16<C::kType>(&sums[s][block * 4], a[i][s], b[2 * i], b[2 * i + 1]);
        }
      }
    }
    if constexpr (kFragment + 2 == kStageFragments) release_x<1>();
  }

  __device__ __forceinline__ void multiply_two_four(uint32_t chunk, int units) {
    TwoFourParts parts(chunk, units, lane_);
    TwoFourWords words[C::kStrips];
    uint32_t position[C::kStrips];
#pragma unroll
    for (int s = 0; s < C::kStrips; ++s) {
      uint32_t bits[4];
      load_bits(bits, parts.bits + s * kTwoFourStripBitsBytes + lane_ * 16);
      words[s] = two_four_words(bits, lane_);
      position[s] = parts.values + lane_ * 4 + s * 2;
    }
    wait_x<kTwoFourStages>();
    multiply_two_four_half<0>(words, position);
    // X is transposed in the middle of the chunk, so that the slowest warp has the time of half a
    // chunk before others wait for it, in here at transposed_empty, below at transposed_full. Only
    // warps of the first group may do it: the ring need not have room for a whole column, and then
    // other groups get their chunks only when the first one has finished.
    if (group() == 0) transpose_x();
    if constexpr (kFewRegisters) parts = TwoFourParts(chunk, units, lane_);
#pragma unroll
    for (int s = 0; s < C::kStrips; ++s) {
      position[s] = parts.residual - kChunkRowBytes + (parts.down_offsets >> (s * 8) & 0x7EU);
    }
    multiply_two_four_half<1>(words, position);
    ptx::mbarrier_wait(smem_.transposed_full(), transposed_phase_);
    // Opaque: otherwise the compiler computes what depends on the lane once, before all columns,
    // and keeps it in registers.
    const int lane = static_cast<int>(ptx::opaque(lane_));
#pragma unroll
    for (int s = 0; s < C::kStrips; ++s) {
      add_residual<C::kType, C::kTileN>(
          smem_.transposed_x(), parts.residual + (s == 0 ? 0 : parts.steps[0] * kResidualStepBytes),
          s == 0 ? parts.steps[0] : parts.steps[1], lane, sums[s]);
    }
    arrive_for_warp(smem_.transposed_empty(), lane_);
    transposed_phase_ ^= 1;
    release_x<kTwoFourStages>();
  }

  template <int kHalf>
  __device__ __forceinline__ void multiply_two_four_half(const TwoFourWords (&words)[C::kStrips],
                                                         uint32_t (&position)[C::kStrips]) {
    multiply_two_four_32<kHalf, 0>(words, position);
    multiply_two_four_32<kHalf, 1>(words, position);
    multiply_two_four_32<kHalf, 2>(words, position);
    multiply_two_four_32<kHalf, 3>(words, position);
  }

  // Multiplies fragment kFragment of half kHalf of a 2:4 chunk: 32 columns from column
  // 64 kFragment + 32 kHalf on.
  template <int kHalf, int kFragment>
  __device__ __forceinline__ void multiply_two_four_32(const TwoFourWords (&words)[C::kStrips],
                                                       uint32_t (&position)[C::kStrips]) {
    constexpr int kStep = kHalf == 0 ? kChunkRowBytes : -kChunkRowBytes;
    uint32_t a[C::kStrips][4];
#pragma unroll
    for (int s = 0; s < C::kStrips; ++s) {
      decode_two_four_fragment<kFragment, kStep>(words[s].runs[kHalf], position[s], a[s]);
    }
    const uint32_t x = x_of_pair(kFragment);
#pragma unroll
    for (int block = 0; block < C::kBlocksN; ++block) {
      uint32_t b[4];
      load_x(b, x, kHalf, block);
#pragma unroll
      for (int s = 0; s < C::kStrips; ++s) {
        ptx::mma_sp_m16n8k32<C::kType, kHalf>(&sums[s][block * 4], a[s], b,
                                              words[s].metadata[kFragment]);
      }
    }
  }

  // Where the `box`-th 64 columns of a 2:4 chunk's X are.
  __device__ __forceinline__ uint32_t x_of_pair(int box) const {
    return smem_.x((x_state_ + box / C::kXBoxes).stage()) + box % C::kXBoxes * C::kXBoxBytes;
  }

  // Writes this warp's part of the transposed X.
  __device__ __forceinline__ void transpose_x() const {
    ptx::mbarrier_wait(smem_.transposed_empty(), transposed_phase_ ^ 1);
    // Opaque: as in multiply_two_four.
    const int lane = static_cast<int>(ptx::opaque(lane_));
#pragma unroll 1
    for (int col8 = warp_ * 4; col8 < kTwoFourK / 8; col8 += C::kGroupWarps * 4) {
      transpose_columns<C::kBlocksN>(x_of_pair(col8 / 8), col8, smem_.transposed_x(), lane);
    }
    arrive_for_warp(smem_.transposed_full(), lane_);
  }

  const BitmapSmem<C>& smem_;
  int warp_, lane_;
  PipelineState<kBitmapGroupStages> group_state_;
  PipelineState<C::kXStages> x_state_;
  uint32_t transposed_phase_ = 0;
};

}  // namespace flash_llm
