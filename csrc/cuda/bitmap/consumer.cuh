// The consumer warps of the bitmap kernel. For each column of chunks a warp decodes its strips of
// 16 rows into A fragments in registers (decode.cuh) and multiplies them by wgmma or, for few
// tokens, mma.sync (plain chunks), or by wgmma.sp (2:4 chunks). For many tokens 2:4 chunks too are
// decoded into plain fragments. While one batch of fragments is multiplied, the next is decoded
// into other registers. wgmma reads the B operand, X, from shared memory once per warpgroup and
// strip.
//
// The residual of a 2:4 chunk, which is a few elements per row at most, is inserted into the plain
// fragments or, beside wgmma.sp, multiplied by mma.m16n8k16 with a diagonal A. A step of the
// residual holds up to one element of each of 16 rows: A[j][j] is the element of row j, and row j
// of B is the column of X that this element multiplies. X is transposed first, so that a column of
// eight tokens is one row of ldmatrix.
#pragma once

#include "cuda/bitmap/decode.cuh"
#include "cuda/bitmap/residual.cuh"
#include "cuda/bitmap/smem.cuh"
#include "cuda/ptx/sm80.cuh"
#include "cuda/ptx/sm90.cuh"

#ifdef FLASH_LLM_SM90A

namespace flash_llm {

// Fragments of each strip in a batch. Two batches are in registers, 4 * strips for each fragment:
// one batch is multiplied while the other is decoded. Two fragments per batch are too many at 128
// tokens (64 of 112 registers hold the sums) and at 32 tokens with two strips (32 of 104 hold the
// sums, and 32 would hold the batches): ptxas then serialises the wgmmas for want of registers (its
// C7512).
constexpr int batch_fragments(int tile_n, int strips) {
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
    Column column = wait_column();
    for (;;) {
      if (column.is_two_four()) {
        if constexpr (kExpandsTwoFour) {
          multiply_columns<true>(column);
          if (column.ends() && column.is_two_four()) return column.flags;
        } else {
          multiply_two_four(column);
          if (column.ends()) return column.flags;
          column = wait_column();
        }
      } else {
        multiply_columns<false>(column);
        if (column.ends() && !column.is_two_four()) return column.flags;
      }
    }
  }

 private:
  static constexpr int kFragments = 8;  // per strip of a chunk, plain or 2:4
  static constexpr bool kWgmma = bitmap_uses_wgmma(C::kTileN);  // for plain chunks
  static constexpr bool kExpandsTwoFour = bitmap_expands_two_four(C::kTileN);
  static constexpr int kStageFragments = C::kXStageK / 16;
  static constexpr int kTwoFourStages = kTwoFourK / C::kXStageK;
  static constexpr int kBatch = batch_fragments(C::kTileN, C::kStrips);
  static constexpr int kBatches = kFragments / kBatch;
  // Whether to read or compute values again when they are needed instead of keeping them in
  // registers.
  static constexpr bool kFewRegisters = C::kStrips * C::kTileN > 64;
  // Whether the values of a 2:4 batch are loaded while the two batches before it are multiplied. On
  // an H200, 28672x7168, 90 % zeros, 8 / 32 / 64 tokens, with it 35.8 / 44.9 / 67.9 us, without it
  // 35.0 / 46.1 / 69.0. Plain chunks gain nothing (70 %, 32 / 64 tokens: 55.8 / 78.9 and 56.0
  // / 77.3).
  static constexpr bool kLoadsAhead = C::kTileN == 32 || C::kTileN == 64;
  static constexpr int kTransposedN = C::kTileN < 64 ? C::kTileN : 64;
  static constexpr int kTokenBlocks = C::kTileN / kTransposedN;

  using Batch = uint32_t[kBatch][C::kStrips][4];

  // This warp's part of a column of chunks.
  struct Column {
    uint2 descriptor;  // of the warp's chunk, see ColumnFlags
    uint32_t flags;

    __device__ __forceinline__ bool is_two_four() const { return (flags & kColumnIsTwoFour) != 0; }
    __device__ __forceinline__ bool ends() const {
      return (flags & (kColumnEndsTile | kColumnIsLast)) != 0;
    }
  };

  // Multiplies columns of one kind by plain wgmma or mma.sync, from `column` on: up to the end of
  // the output tile or of the work range, of which `column` is then the last column, or up to the
  // first column of the other kind, which it then is. A loop of its own for each kind: wgmmas are
  // still in flight at the end of an iteration, and ptxas tracks their registers only if no other
  // code path can come between two iterations.
  template <bool kTwoFour>
  __device__ __forceinline__ void multiply_columns(Column& column) {
    do {
      if constexpr (kTwoFour) {
        multiply_expanded(column);
      } else {
        multiply_plain(column);
      }
      if (column.ends()) break;
      column = wait_column();
    } while (column.is_two_four() == kTwoFour);
    finish_products();
  }

  // Waits until the next column is in shared memory.
  __device__ __forceinline__ Column wait_column() const {
    ptx::mbarrier_wait(smem_.group_full(group_, group_state_.stage()), group_state_.phase());
    const uint2 descriptor = load_descriptor();
    return {descriptor, __shfl_sync(~0U, descriptor.y, 0) >> 16};
  }

  // Releases the column: this warp has read its chunk.
  __device__ __forceinline__ void release_column() {
    arrive_for_warp(smem_.group_empty(group_, group_state_.stage()), lane_);
    group_state_ = group_state_ + 1;
  }

  // The index within the chunk of this warp's strip s.
  __device__ __forceinline__ int strip(int s) const { return C::kStrips == 2 ? s : warp_ % 2; }

  __device__ __forceinline__ uint2 load_descriptor() const {
    return ptx::load_shared_v2(
        smem_.descriptor(group_, group_state_.stage(), warp_ % C::kGroupWarps / C::kReaders));
  }

  // Releases kStages stages of X, from `first` on, in all CTAs of the cluster: this warp has read
  // them. One lane arrives for each stage and CTA.
  template <int kStages>
  __device__ __forceinline__ void release_x(PipelineState<C::kXStages> first) const {
    arrive_for_warp_at_each<kStages * C::kCluster>(lane_, [&](int i) {
      const uint32_t barrier = smem_.x_empty((first + i % kStages).stage());
      if constexpr (C::kCluster == 1) {
        ptx::mbarrier_arrive(barrier);
      } else {
        ptx::mbarrier_arrive_cluster(barrier, i / kStages);
      }
    });
  }

  // Waits until kStages stages of X are in shared memory, from x_state_ on.
  template <int kStages>
  __device__ __forceinline__ void wait_x() const {
    const PipelineState<C::kXStages> state = kStages > 1 ? x_state_ + lane_ % kStages : x_state_;
    ptx::mbarrier_wait(smem_.x_full(state.stage()), state.phase());
    __syncwarp();
  }

  // Waits for all wgmmas in flight.
  __device__ __forceinline__ void finish_products() {
    if constexpr (kWgmma) {
      ptx::wgmma_wait<0>();
      release_x_in_use();
    }
  }

  // Must be called once the last product with X's stage x_state_ has been issued.
  __device__ __forceinline__ void finish_x_stage() {
    if constexpr (kWgmma) {
      x_in_use_ = true;
    } else {
      release_x<1>(x_state_);
    }
    x_state_ = x_state_ + 1;
  }

  __device__ __forceinline__ void release_x_in_use() {
    if (x_in_use_) release_x<1>(x_state_ + -1);
    x_in_use_ = false;
  }

  // Issues the products of a batch of a plain chunk with stage x_state_ of X. The batch holds the
  // fragments from kFirst on, of 16 columns each.
  template <int kFirst>
  __device__ __forceinline__ void start_plain(const Batch& a) {
    if constexpr (kWgmma) {
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int fragment = kFirst + i;
        const uint64_t b = smem_.x_descriptor(x_state_.stage(), fragment % kStageFragments);
#pragma unroll
        for (int s = 0; s < C::kStrips; ++s) {
          ptx::wgmma<C::kType, C::kTileN>(sums[s], a[i][s], b);
        }
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();  // the other batch's registers are overwritten next
    } else {
      static_assert(kBatch == 2, "ldmatrix loads 32 columns");
      // Register i of lane 4 g + t gets columns 8 i + 2 t and 8 i + 2 t + 1 of token g.
      const unsigned token = lane_ % 8U, col8 = lane_ / 8U;
      const uint32_t x = smem_.x(x_state_.stage()) + kFirst % kStageFragments / 4 * C::kXBoxBytes +
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

  // The same for a 2:4 chunk; the batch holds the fragments from kFirst % 4 on of half kFirst / 4.
  // Fragment p of half h multiplies columns 64 p + 32 h to 64 p + 32 h + 31, in the p-th box of X
  // from stage x_state_ on.
  template <int kFirst>
  __device__ __forceinline__ void start_two_four(const Batch& a,
                                                 const TwoFourWords (&words)[C::kStrips]) {
    constexpr int kHalf = kFirst / 4;
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int p = (kFirst + i) % 4;
      const uint64_t b =
          smem_.x_descriptor((x_state_ + p / C::kXBoxes).stage(), p % C::kXBoxes * 4 + kHalf * 2);
#pragma unroll
      for (int s = 0; s < C::kStrips; ++s) {
        ptx::wgmma_sp<C::kType, C::kTileN, kHalf>(sums[s], a[i][s], b, words[s].metadata[p]);
      }
    }
    ptx::wgmma_commit();
  }

  // Values of a batch, as they are loaded.
  using Values = uint32_t[kBatch][C::kStrips][8];

  // The runs of this warp's strips of a chunk, by half.
  struct Runs {
    uint32_t bits[2][C::kStrips], position[2][C::kStrips];
  };

  // Loads the values of the batch from fragment kFirst (0..7) on.
  template <template <int> typename Fragment, int kFirst>
  __device__ __forceinline__ static void load_batch(Runs& runs, Values& values) {
    constexpr int kHalf = kFirst / 4, kStep = kHalf == 0 ? kChunkRowBytes : -kChunkRowBytes;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int s = 0; s < C::kStrips; ++s) {
        const uint32_t bits = runs.bits[kHalf][s];
        uint32_t& position = runs.position[kHalf][s];
        if (i == 0) Fragment<kFirst % 4>::template load<kStep>(bits, position, values[i][s]);
        if (i == 1) Fragment<(kFirst + 1) % 4>::template load<kStep>(bits, position, values[i][s]);
      }
    }
  }

  // Arranges them in fragments.
  template <template <int> typename Fragment, int kFirst>
  __device__ __forceinline__ static void arrange_batch(const Runs& runs, const Values& values,
                                                       Batch& a) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
#pragma unroll
      for (int s = 0; s < C::kStrips; ++s) {
        const uint32_t bits = runs.bits[kFirst / 4][s];
        if (i == 0) Fragment<kFirst % 4>::arrange(bits, values[i][s], a[i][s]);
        if (i == 1) Fragment<(kFirst + 1) % 4>::arrange(bits, values[i][s], a[i][s]);
      }
    }
  }

  __device__ __forceinline__ void multiply_plain(const Column& column) {
    const ChunkCursor cursor(column.descriptor.x, column.descriptor.y & 0xFFFF, true, lane_);
    Runs runs;
#pragma unroll
    for (int s = 0; s < C::kStrips; ++s) {
      runs.bits[0][s] = strip(s) == 0 ? cursor.bits[0] : cursor.bits[1];
      runs.bits[1][s] = strip(s) == 0 ? cursor.bits[2] : cursor.bits[3];
      runs.position[0][s] = strip(s) == 0 ? cursor.up[0] : cursor.up[1];
      runs.position[1][s] = strip(s) == 0 ? cursor.down[0] : cursor.down[1];
    }
    multiply_fragments([&](auto number, Batch& a) {
      constexpr int kFirst = decltype(number)::value;
      Values values;
      load_batch<PlainFragment, kFirst>(runs, values);
      arrange_batch<PlainFragment, kFirst>(runs, values, a);
    });
    release_column();
  }

  // Multiplies eight plain fragments of each strip, 128 columns, with X from stage x_state_ on.
  // decode(Number<its first fragment>(), batch) decodes a batch; they are decoded in their order.
  template <typename Decode>
  __device__ __forceinline__ void multiply_fragments(const Decode& decode) {
    for_each_batch([&](auto number) {
      constexpr int kNumber = decltype(number)::value, kFirst = kNumber * kBatch;
      Batch& a = batch_[kNumber % 2];
      decode(Number<kFirst>(), a);
      constexpr bool kBeginsX = kFirst % kStageFragments == 0;
      constexpr bool kEndsX = (kFirst + kBatch) % kStageFragments == 0;
      if constexpr (kBeginsX) wait_x<1>();
      start_plain<kFirst>(a);
      if constexpr (kBeginsX && kWgmma) release_x_in_use();
      if constexpr (kEndsX) finish_x_stage();
    });
  }

  __device__ __forceinline__ TwoFourParts find_parts(uint2 descriptor) const {
    return {descriptor.x, static_cast<int>(descriptor.y & 0xFFFF), lane_};
  }

  // The address where this lane's downward run of strip s begins.
  __device__ __forceinline__ uint32_t begin_down(const TwoFourParts& parts, int s) const {
    return parts.residual - kChunkRowBytes + (parts.down_offsets >> (strip(s) * 8) & 0x7EU);
  }

  // Multiplies a 2:4 chunk by plain wgmma, twice 128 columns. Decoding it into plain fragments
  // takes longer than into those of wgmma.sp, but the cost of wgmma.sp's residual grows with the
  // tokens.
  __device__ __forceinline__ void multiply_expanded(const Column& column) {
    const TwoFourParts parts = find_parts(column.descriptor);
    TwoFourGroups groups[C::kStrips];
    uint32_t position[2][C::kStrips], residual[C::kStrips], residual_fragments[C::kStrips];
    int steps[C::kStrips];
#pragma unroll
    for (int s = 0; s < C::kStrips; ++s) {
      const bool lower = strip(s) == 0;
      uint32_t bits[4];
      load_bits(bits, parts.bits + strip(s) * kTwoFourStripBitsBytes + lane_ * 16);
      groups[s] = two_four_groups(bits, lane_);
      position[0][s] = parts.values + lane_ * 4 + strip(s) * 2;
      position[1][s] = begin_down(parts, s);
      residual[s] = parts.residual + (lower ? 0 : parts.steps[0] * kResidualStepBytes);
      steps[s] = lower ? parts.steps[0] : parts.steps[1];
      residual_fragments[s] = fragments_of_residual(residual[s], steps[s], lane_);
    }
#pragma unroll 1
    for (int part = 0; part < 2; ++part) {
      multiply_fragments([&](auto number, Batch& a) {
        constexpr int kFirst = decltype(number)::value;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int fragment = kFirst + i;
#pragma unroll
          for (int s = 0; s < C::kStrips; ++s) {
            uint32_t low[2], high[2];
            decode_groups(fragment, groups[s], position[fragment / 2 % 2][s], low, high);
            if ((residual_fragments[s] >> fragment & 1) != 0) {
              insert_residual(residual[s], steps[s], part * kFragments + fragment, lane_, high);
            }
            exchange_pairs(low, high, lane_, a[i][s]);
          }
        }
      });
#pragma unroll
      for (int s = 0; s < C::kStrips; ++s) {
#pragma unroll
        for (auto& half : groups[s].words) {
#pragma unroll
          for (uint32_t& word : half) word >>= 2;
        }
        residual_fragments[s] >>= kFragments;
      }
    }
    release_column();
  }

  __device__ __forceinline__ void multiply_two_four(const Column& column) {
    TwoFourParts parts = find_parts(column.descriptor);
    TwoFourWords words[C::kStrips];
    Runs runs;
#pragma unroll
    for (int s = 0; s < C::kStrips; ++s) {
      uint32_t bits[4];
      load_bits(bits, parts.bits + strip(s) * kTwoFourStripBitsBytes + lane_ * 16);
      words[s] = two_four_words(bits, lane_);
      runs.bits[0][s] = words[s].runs[0];
      runs.bits[1][s] = words[s].runs[1];
      runs.position[0][s] = parts.values + lane_ * 4 + strip(s) * 2;
    }
    Values values;
    const auto load = [&](auto number) {
      constexpr int kFirst = decltype(number)::value * kBatch;
      if constexpr (kFirst == 4) {
        if constexpr (kFewRegisters) parts = find_parts(load_descriptor());
#pragma unroll
        for (int s = 0; s < C::kStrips; ++s) {
          runs.position[1][s] = begin_down(parts, s);
        }
      }
      load_batch<TwoFourFragment, kFirst>(runs, values);
    };
    if constexpr (kLoadsAhead) load(Number<0>());
    for_each_batch([&](auto number) {
      constexpr int kNumber = decltype(number)::value, kFirst = kNumber * kBatch;
      if constexpr (!kLoadsAhead) load(number);
      Batch& a = batch_[kNumber % 2];
      arrange_batch<TwoFourFragment, kFirst>(runs, values, a);
      if constexpr (kFirst == 0) wait_x<kTwoFourStages>();
      start_two_four<kFirst>(a, words);
      if constexpr (kLoadsAhead && kNumber + 1 < kBatches) load(Number<kNumber + 1>());
      ptx::wgmma_wait<1>();
      // X is transposed in the middle of the chunk, so that the slowest warp has the time of half a
      // chunk before others wait for it, in here at transposed_empty, below at transposed_full.
      if constexpr (kFirst + kBatch == 4 && kTokenBlocks == 1) transpose_x(0);
    });
    if constexpr (kFewRegisters) parts = find_parts(load_descriptor());
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int block = 0; block < kTokenBlocks; ++block) {
      if constexpr (kTokenBlocks > 1) transpose_x(block);
      ptx::mbarrier_wait(smem_.transposed_full(), transposed_phase_);
#pragma unroll
      for (int s = 0; s < C::kStrips; ++s) {
        const bool lower = strip(s) == 0;
        // Opaque: otherwise the compiler computes what depends on the lane once, before all
        // columns, and keeps it in registers.
        const int lane = kFewRegisters ? static_cast<int>(ptx::opaque(lane_)) : lane_;
        add_residual<C::kType, kTransposedN>(
            smem_.transposed_x(),
            parts.residual + (lower ? 0 : parts.steps[0] * kResidualStepBytes),
            lower ? parts.steps[0] : parts.steps[1], lane, &sums[s][block * (kTransposedN / 2)]);
      }
      arrive_for_warp(smem_.transposed_empty(), lane_);
      transposed_phase_ ^= 1;
    }
    release_column();
    release_x<kTwoFourStages>(x_state_);
    x_state_ = x_state_ + kTwoFourStages;
  }

  template <int kNumber>
  struct Number {
    static constexpr int value = kNumber;
  };

  // Calls body(Number<0>()), body(Number<1>()) and so on for all batches. The number is a type
  // because body needs it at compile time.
  template <int kNumber = 0, typename Body>
  __device__ __forceinline__ void for_each_batch(const Body& body) const {
    if constexpr (kNumber < kBatches) {
      body(Number<kNumber>());
      for_each_batch<kNumber + 1>(body);
    }
  }

  // Decodes this lane's groups of plain fragment `fragment` (0..7, a constant after inlining) of
  // half of a 2:4 chunk.
  __device__ __forceinline__ static void decode_groups(int fragment, const TwoFourGroups& groups,
                                                       uint32_t& position, uint32_t (&low)[2],
                                                       uint32_t (&high)[2]) {
    const auto& words = groups.words[fragment / 2 % 2];
    const int shift = fragment % 2 * 4;
    const uint32_t shifted[3] = {words[0] >> shift, words[1] >> shift, words[2] >> shift};
    switch (fragment / 2) {
      case 0:
        return decode_two_four_groups<0, kChunkRowBytes>(shifted, position, low, high);
      case 1:
        return decode_two_four_groups<0, -kChunkRowBytes>(shifted, position, low, high);
      case 2:
        return decode_two_four_groups<1, kChunkRowBytes>(shifted, position, low, high);
      default:
        return decode_two_four_groups<1, -kChunkRowBytes>(shifted, position, low, high);
    }
  }

  // Writes this warp's part of the transposed X: 256 columns of the `block`-th 64 (or all, if
  // fewer) tokens, each column at the offset that residual entries store for it (residual_offset).
  __device__ __forceinline__ void transpose_x(int block) const {
    ptx::mbarrier_wait(smem_.transposed_empty(), transposed_phase_ ^ 1);
    constexpr unsigned kMatrices = kTwoFourK / 8 * kTransposedN / 8;
    constexpr unsigned kPerRound = C::kWarps * 4;  // each warp transposes four at once
    const unsigned row = lane_ % 8U;
    // Opaque: otherwise the compiler hoists the address computation out of the loop over columns,
    // where its results occupy registers.
    const unsigned own = ptx::opaque(warp_ * 4U + lane_ / 8U);
#pragma unroll
    for (unsigned first = 0; first < kMatrices; first += kPerRound) {
      if (kMatrices < kPerRound && warp_ * 4U >= kMatrices) break;
      const unsigned matrix = first + own;
      const unsigned col8 = matrix % 32, token8 = matrix / 32;  // block of 8 columns, of 8 tokens
      const unsigned token = block * kTransposedN + token8 * 8 + row;
      uint32_t reg[4];
      const int box = static_cast<int>(col8 / 8);
      const uint32_t x =
          smem_.x((x_state_ + box / C::kXBoxes).stage()) + box % C::kXBoxes * C::kXBoxBytes;
      ptx::ldmatrix_x4(reg, x + token * 128 + (col8 % 8 ^ row) * 16);
      ptx::stmatrix_x4_trans(smem_.transposed_x() + token8 * kTransposedBlockBytes +
                                 (col8 * 8 + (row ^ col8 % 8)) * 16,
                             reg);
    }
    arrive_for_warp(smem_.transposed_full(), lane_);
  }

  const BitmapSmem<C>& smem_;
  int warp_, lane_;
  int group_;
  Batch batch_[2];  // wgmmas may still read the second one when the next column begins
  PipelineState<kBitmapGroupStages> group_state_;
  PipelineState<C::kXStages> x_state_;
  bool x_in_use_ = false;  // wgmmas in flight may still read the stage before x_state_
  uint32_t transposed_phase_ = 0;
};

}  // namespace flash_llm

#endif  // FLASH_LLM_SM90A
