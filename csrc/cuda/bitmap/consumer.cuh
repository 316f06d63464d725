// The multiplying half of the bitmap kernel: what a warp does with a column of chunks.
//
// Its strips of 16 rows become the A fragments of wgmma (plain chunks) or wgmma.sp (2:4 chunks)
// in registers (decode.cuh). While one batch of fragments is multiplied the next is decoded
// into other registers. The B operand, X, is read from shared memory once per warpgroup and strip.
//
// The residual of a 2:4 chunk, at most a few elements of a row, goes through mma.m16n8k16 with a
// diagonal A: k-slot j of a step belongs to row j of the strip, and its row of B is whichever
// column of X the element stands in. For that, X is first transposed, so that a column of eight
// tokens is one row of ldmatrix.
#pragma once

#include "cuda/bitmap/decode.cuh"
#include "cuda/bitmap/smem.cuh"
#include "cuda/ptx/sm80.cuh"
#include "cuda/ptx/sm90.cuh"

#ifdef FLASH_LLM_SM90A

namespace flash_llm {

// Fragments of a strip that are decoded before any is multiplied: two batches are in registers.
constexpr int batch(int tile_n, int strips) {
  return tile_n == 128 || (tile_n == 32 && strips == 2) ? 1 : 2;
}

template <typename C>
class BitmapConsumer {
 public:
  float sums[C::kStrips][C::kTileN / 2];

  __device__ __forceinline__ BitmapConsumer(const BitmapSmem<C>& smem, int warp, int lane)
      : smem_(smem), warp_(warp), lane_(lane), group_(warp / C::kGroupWarps) {
    begin_sums();
  }

  // Columns of chunks that were multiplied so far.
  __device__ __forceinline__ int columns() const {
    return static_cast<int>(x_.count) * C::kXStageK / kChunkK;
  }

  // Makes the next column begin new sums.
  __device__ __forceinline__ void begin_sums() {
#pragma unroll
    for (auto& strip_sums : sums) {
#pragma unroll
      for (float& sum : strip_sums) sum = 0.0F;
    }
  }

  // Multiplies the columns of a row of blocks, or what is left of the stretch; returns the flags of
  // the last of them.
  __device__ __forceinline__ uint32_t multiply_row() {
    Column column = next_column();
    for (;;) {
      if (column.is_two_four()) {
        multiply_two_four(column);
        if (column.ends()) return column.flags;
        column = next_column();
      } else {
        // A loop of its own: products are under way at its end, and ptxas can follow that only
        // where nothing else may happen in between.
        do {
          multiply_plain(column);
          if (column.ends()) break;
          column = next_column();
        } while (!column.is_two_four());
        finish_products();
        if (column.ends() && !column.is_two_four()) return column.flags;
      }
    }
  }

 private:
  static constexpr int kFragments = 8;  // of a strip in a chunk of either kind
  static constexpr bool kWgmma = bitmap_uses_wgmma(C::kTileN);  // for plain chunks
  static constexpr int kStageFragments = C::kXStageK / 16;
  static constexpr int kTwoFourStages = kTwoFourK / C::kXStageK;
  static constexpr int kBatch = batch(C::kTileN, C::kStrips);
  static constexpr int kBatches = kFragments / kBatch;
  // Whether to read what is needed late once more instead of keeping it.
  static constexpr bool kFewRegisters = C::kStrips * C::kTileN > 64;
  static constexpr int kTransposedN = C::kTileN < 64 ? C::kTileN : 64;
  static constexpr int kTokenBlocks = C::kTileN / kTransposedN;
  static constexpr int kTransposedBlockBytes = kTwoFourK * 16;  // of 8 tokens

  using Batch = uint32_t[kBatch][C::kStrips][4];

  // This warp's chunk of a column in the ring, see ColumnFlags.
  struct Column {
    uint2 chunk;
    uint32_t flags;

    __device__ __forceinline__ bool is_two_four() const { return (flags & kColumnIsTwoFour) != 0; }
    __device__ __forceinline__ bool ends() const {
      return (flags & (kColumnEndsRow | kColumnIsLast)) != 0;
    }
  };

  // Waits for the next column.
  __device__ __forceinline__ Column next_column() const {
    ptx::mbarrier_wait(smem_.group_full(group_, chunks_state_.stage()), chunks_state_.phase());
    const uint2 chunk = load_chunk();
    return {chunk, __shfl_sync(~0U, chunk.y, 0) >> 16};
  }

  // This warp has read its chunk.
  __device__ __forceinline__ void release_column() {
    arrive(smem_.group_empty(group_, chunks_state_.stage()));
    chunks_state_ = chunks_state_ + 1;
  }

  // Strip s of this warp, of the chunk.
  __device__ __forceinline__ int strip(int s) const { return C::kStrips == 2 ? s : warp_ % 2; }

  __device__ __forceinline__ uint2 load_chunk() const {
    return ptx::load_shared_v2(
        smem_.descriptor(group_, chunks_state_.stage(), warp_ % C::kGroupWarps / C::kReaders));
  }

  __device__ __forceinline__ void arrive(uint32_t barrier) const {
    __syncwarp();
    if (lane_ == 0) ptx::mbarrier_arrive(barrier);
  }

  // Says in every CTA of the cluster that this warp has read kStages stages of X, from `first` on:
  // one lane each.
  template <int kStages>
  __device__ __forceinline__ void release_x(PipelineState<C::kXStages> first) const {
    __syncwarp();
    if (lane_ < kStages * C::kCluster) {
      if constexpr (kStages > 1) first = first + lane_ % kStages;
      if constexpr (C::kCluster == 1) {
        ptx::mbarrier_arrive(smem_.x_empty(first.stage()));
      } else {
        ptx::mbarrier_arrive_cluster(smem_.x_empty(first.stage()), lane_ / kStages);
      }
    }
  }

  // Waits until kStages stages of X are there, from x_ on.
  template <int kStages>
  __device__ __forceinline__ void wait_x() const {
    const PipelineState<C::kXStages> place = kStages > 1 ? x_ + lane_ % kStages : x_;
    ptx::mbarrier_wait(smem_.x_full(place.stage()), place.phase());
    __syncwarp();
  }

  // Waits for all products.
  __device__ __forceinline__ void finish_products() {
    if constexpr (kWgmma) {
      ptx::wgmma_wait<0>();
      release_x_in_use();
    }
  }

  // After the last product with the stage x_ was started.
  __device__ __forceinline__ void finish_x_stage() {
    if constexpr (kWgmma) {
      x_in_use_ = true;
    } else {
      release_x<1>(x_);
    }
    x_ = x_ + 1;
  }

  __device__ __forceinline__ void release_x_in_use() {
    if (x_in_use_) release_x<1>(x_ + -1);
    x_in_use_ = false;
  }

  // Starts the product of a batch of a plain chunk, fragments kFirst and so on of 16 columns each,
  // and the stage x_ of X.
  template <int kFirst>
  __device__ __forceinline__ void start_plain(const Batch& a) {
    if constexpr (kWgmma) {
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int fragment = kFirst + i;
        const uint64_t b = smem_.x_descriptor(x_.stage(), fragment % kStageFragments);
#pragma unroll
        for (int s = 0; s < C::kStrips; ++s) {
          ptx::wgmma<C::kType, C::kTileN>(sums[s], a[i][s], b);
        }
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();  // the other batch's registers will be written next
    } else {
      static_assert(kBatch == 2, "ldmatrix brings 32 columns");
      // Register i of lane 4 g + t is columns 8 i + 2 t and the next of token g.
      const unsigned token = lane_ % 8U, col8 = lane_ / 8U;
      const uint32_t x = smem_.x(x_.stage()) + kFirst % kStageFragments / 4 * C::kXBoxBytes +
                         token * 128 + ((col8 ^ token) * 16 ^ kFirst / 2 % 2 * 64U);
#pragma unroll
      for (int block = 0; block < C::kBlocksN; ++block) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, x + block * 1024);
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
#pragma unroll
          for (int s = 0; s < C::kStrips; ++s) {
            ptx::mma_m16n8k16<C::kType>(&sums[s][block * 4], a[i][s], b[2 * i], b[2 * i + 1]);
          }
        }
      }
    }
  }

  // The same for fragments kFirst % 4 and so on of half kFirst / 4 of a 2:4 chunk: fragment p of
  // half h is columns 64 p + 32 h and the next 31, in box p of X from stage x_ on.
  template <int kFirst>
  __device__ __forceinline__ void start_two_four(const Batch& a,
                                                 const TwoFourWords (&words)[C::kStrips]) {
    constexpr int kHalf = kFirst / 4;
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int p = (kFirst + i) % 4;
      const uint64_t b =
          smem_.x_descriptor((x_ + p / C::kXBoxes).stage(), p % C::kXBoxes * 4 + kHalf * 2);
#pragma unroll
      for (int s = 0; s < C::kStrips; ++s) {
        ptx::wgmma_sp<C::kType, C::kTileN, kHalf>(sums[s], a[i][s], b, words[s].metadata[p]);
      }
    }
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void multiply_plain(const Column& column) {
    const ChunkCursor cursor(column.chunk.x, column.chunk.y & 0xFFFF, true, lane_);
    uint32_t bits[2][C::kStrips], position[2][C::kStrips];
#pragma unroll
    for (int s = 0; s < C::kStrips; ++s) {
      bits[0][s] = strip(s) == 0 ? cursor.bits[0] : cursor.bits[1];
      bits[1][s] = strip(s) == 0 ? cursor.bits[2] : cursor.bits[3];
      position[0][s] = strip(s) == 0 ? cursor.up[0] : cursor.up[1];
      position[1][s] = strip(s) == 0 ? cursor.down[0] : cursor.down[1];
    }
    for_each_batch([&](auto number) {
      constexpr int kNumber = decltype(number)::value, kFirst = kNumber * kBatch;
      constexpr int kHalf = kFirst / 4;
      Batch& a = batch_[kNumber % 2];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
#pragma unroll
        for (int s = 0; s < C::kStrips; ++s) {
          decode_nth<kFirst % 4, kHalf, false>(i, bits[kHalf][s], position[kHalf][s], a[i][s]);
        }
      }
      constexpr bool kBeginsX = kFirst % kStageFragments == 0;
      constexpr bool kEndsX = (kFirst + kBatch) % kStageFragments == 0;
      if constexpr (kBeginsX) wait_x<1>();
      start_plain<kFirst>(a);
      if constexpr (kBeginsX && kWgmma) release_x_in_use();
      if constexpr (kEndsX) finish_x_stage();
    });
    release_column();
  }

  // Where the parts of a 2:4 chunk lie: what it says itself, clamped to its size.
  struct TwoFourParts {
    uint32_t bits, values, residual;
    uint32_t sigma;
    int steps[2];  // of the residual, by strip
  };

  __device__ __forceinline__ TwoFourParts find_parts(uint2 chunk) const {
    const int units = static_cast<int>(chunk.y & 0xFFFF);
    TwoFourParts parts;
    parts.bits = chunk.x;
    asm volatile("ld.shared.u16 %0, [%1];"
                 : "=r"(parts.sigma)
                 : "r"(chunk.x + kTwoFourBitsBytes + lane_ * 2));
    const uint32_t counts = __ballot_sync(~0U, (parts.sigma & 1) != 0);
    const int rows = min(static_cast<int>(counts & 0xFF), units / 2);
    const int spare = max(units - kTwoFourFixedUnits - 2 * rows, 0);
    parts.steps[0] = min(static_cast<int>(counts >> 8 & 0xFF), spare);
    parts.steps[1] = min(static_cast<int>(counts >> 16 & 0xFF), spare - parts.steps[0]);
    parts.values = chunk.x + kTwoFourFixedBytes;
    parts.residual = parts.values + rows * kChunkRowBytes;
    return parts;
  }

  __device__ __forceinline__ void multiply_two_four(const Column& column) {
    TwoFourParts parts = find_parts(column.chunk);
    TwoFourWords words[C::kStrips];
    uint32_t position[C::kStrips];
#pragma unroll
    for (int s = 0; s < C::kStrips; ++s) {
      uint32_t bits[4];
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3])
                   : "r"(parts.bits + strip(s) * kTwoFourStripBitsBytes + lane_ * 16));
      words[s] = two_four_words(bits, lane_);
      position[s] = parts.values + lane_ * 4 + strip(s) * 2;
    }
    for_each_batch([&](auto number) {
      constexpr int kNumber = decltype(number)::value, kFirst = kNumber * kBatch;
      constexpr int kHalf = kFirst / 4;
      if constexpr (kFirst == 4) {
        if constexpr (kFewRegisters) parts = find_parts(load_chunk());
#pragma unroll
        for (int s = 0; s < C::kStrips; ++s) {
          position[s] = parts.residual - kChunkRowBytes + (parts.sigma >> (strip(s) * 8) & 0x7EU);
        }
      }
      Batch& a = batch_[kNumber % 2];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
#pragma unroll
        for (int s = 0; s < C::kStrips; ++s) {
          decode_nth<kFirst % 4, kHalf, true>(i, words[s].runs[kHalf], position[s], a[i][s]);
        }
      }
      if constexpr (kFirst == 0) wait_x<kTwoFourStages>();
      start_two_four<kFirst>(a, words);
      ptx::wgmma_wait<1>();
      // In the middle, so that no warp waits for the slowest at either end.
      if constexpr (kFirst + kBatch == 4 && kTokenBlocks == 1) transpose_x(0);
    });
    if constexpr (kFewRegisters) parts = find_parts(load_chunk());
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int block = 0; block < kTokenBlocks; ++block) {
      if constexpr (kTokenBlocks > 1) transpose_x(block);
      ptx::mbarrier_wait(smem_.transposed_full(), transposed_phase_);
#pragma unroll
      for (int s = 0; s < C::kStrips; ++s) {
        const bool lower = strip(s) == 0;
        add_residual(parts.residual + (lower ? 0 : parts.steps[0] * kResidualStepBytes),
                     lower ? parts.steps[0] : parts.steps[1], &sums[s][block * (kTransposedN / 2)]);
      }
      arrive(smem_.transposed_empty());
      transposed_phase_ ^= 1;
    }
    release_column();
    release_x<kTwoFourStages>(x_);
    x_ = x_ + kTwoFourStages;
  }

  template <int kNumber>
  struct Number {
    static constexpr int value = kNumber;
  };

  // Calls body(Number<0>()) .. in order: what a batch does depends on its number at compile time.
  template <int kNumber = 0, typename Body>
  __device__ __forceinline__ void for_each_batch(const Body& body) const {
    if constexpr (kNumber < kBatches) {
      body(Number<kNumber>());
      for_each_batch<kNumber + 1>(body);
    }
  }

  // Decodes fragment kFirst + i (of four) of a half.
  template <int kFirst, int kHalf, bool kTwoFour>
  __device__ __forceinline__ static void decode_nth(int i, uint32_t bits, uint32_t& position,
                                                    uint32_t* reg) {
    constexpr int kStep = kHalf == 0 ? kChunkRowBytes : -kChunkRowBytes;
    if constexpr (kTwoFour) {
      if (i == 0) decode_two_four_fragment<kFirst, kStep>(bits, position, reg);
      if (i == 1) decode_two_four_fragment<(kFirst + 1) % 4, kStep>(bits, position, reg);
    } else {
      if (i == 0) decode_fragment<kFirst, kStep>(bits, position, reg);
      if (i == 1) decode_fragment<(kFirst + 1) % 4, kStep>(bits, position, reg);
    }
  }

  // This warp's part of the transposed copy of `block` of up to 64 tokens of X, 256 columns, each
  // at its residual_place.
  __device__ __forceinline__ void transpose_x(int block) const {
    ptx::mbarrier_wait(smem_.transposed_empty(), transposed_phase_ ^ 1);
    constexpr unsigned kMatrices = kTwoFourK / 8 * kTransposedN / 8;
    constexpr unsigned kPerRound = C::kWarps * 4;  // each warp takes four, one after the other
    const unsigned row = lane_ % 8U;
    // Opaque: what follows is cheap, but takes registers when it is done once before all units.
    const unsigned own = ptx::opaque(warp_ * 4U + lane_ / 8U);
#pragma unroll
    for (unsigned first = 0; first < kMatrices; first += kPerRound) {
      if (kMatrices < kPerRound && warp_ * 4U >= kMatrices) break;
      const unsigned matrix = first + own;
      const unsigned col8 = matrix % 32, token8 = matrix / 32;  // in eights
      const unsigned token = block * kTransposedN + token8 * 8 + row;
      uint32_t reg[4];
      const int box = static_cast<int>(col8 / 8);
      const uint32_t x =
          smem_.x((x_ + box / C::kXBoxes).stage()) + box % C::kXBoxes * C::kXBoxBytes;
      ptx::ldmatrix_x4(reg, x + token * 128 + (col8 % 8 ^ row) * 16);
      ptx::stmatrix_x4_trans(smem_.transposed_x() + token8 * kTransposedBlockBytes +
                                 (col8 * 8 + (row ^ col8 % 8)) * 16,
                             reg);
    }
    arrive(smem_.transposed_full());
  }

  // Adds `steps` steps of a strip's residual, from `step` on, to the sums of kTransposedN tokens.
  __device__ __forceinline__ void add_residual(uint32_t step, int steps, float* strip_sums) const {
    constexpr int kUnroll = kTransposedN <= 16 ? 2 : 1;
    // Opaque: else what follows from it is kept in registers from the beginning.
    const int lane = kFewRegisters ? static_cast<int>(ptx::opaque(lane_)) : lane_;
    // Lane 4 g + t has A[g][2 t ..] and A[g + 8][2 t + 8 ..]: the diagonal if t is g / 2.
    const bool diagonal = lane % 4 == lane / 8;
    const bool high = (lane / 4) % 2 != 0;
    const uint32_t select_low = !diagonal ? 0x4444U : high ? 0x1044U : 0x4410U;
    const uint32_t select_high = !diagonal ? 0x4444U : high ? 0x3244U : 0x4432U;
    const uint32_t tokens =
        smem_.transposed_x() + (kTransposedN > 8 ? lane / 16 : 0) * kTransposedBlockBytes;
    const uint32_t own_pair = lane / 4 * 4, own_place = 32 + lane % 16 * 2;
    const auto load_pair = [&] { return ptx::load_shared_u32(step + own_pair); };
    const auto load_column = [&] {
      return tokens + (load_shared_u16<0>(step + own_place) & (kTransposedBlockBytes - 16));
    };
    // One step ahead; after the last one there is something else to read.
    uint32_t next_pair = load_pair(), next_column = load_column();
#pragma unroll kUnroll
    for (int i = 0; i < steps; ++i) {
      const uint32_t pair = next_pair, column = next_column;
      step += kResidualStepBytes;
      next_pair = load_pair();
      next_column = load_column();
      const uint32_t a[4] = {byte_permute(pair, 0, select_low), 0, 0,
                             byte_permute(pair, 0, select_high)};
      if constexpr (kTransposedN == 8) {
        uint32_t b[2];
        ptx::ldmatrix_x2_trans(b, column);
        ptx::mma_m16n8k16<C::kType>(strip_sums, a, b[0], b[1]);
      } else {
#pragma unroll
        for (int pair8 = 0; pair8 < kTransposedN / 16; ++pair8) {
          uint32_t b[4];
          ptx::ldmatrix_x4_trans(b, column + pair8 * 2 * kTransposedBlockBytes);
          ptx::mma_m16n8k16<C::kType>(strip_sums + pair8 * 8, a, b[0], b[1]);
          ptx::mma_m16n8k16<C::kType>(strip_sums + pair8 * 8 + 4, a, b[2], b[3]);
        }
      }
    }
  }

  const BitmapSmem<C>& smem_;
  int warp_, lane_;
  int group_;
  Batch batch_[2];  // the second may still be multiplied when the next column begins
  PipelineState<kBitmapGroupStages> chunks_state_;
  PipelineState<C::kXStages> x_;
  bool x_in_use_ = false;  // products under way may still read the stage before x_
  uint32_t transposed_phase_ = 0;
};

}  // namespace flash_llm

#endif  // FLASH_LLM_SM90A
