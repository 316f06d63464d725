// The feeding half of the bitmap kernel: two warps that keep copies of a CTA's stretch of the
// weight, and of the X that goes with it, on their way to shared memory.
//
// Weights travel through rings of bytes: the chunks of a column lie together in memory, so a group
// of four is one bulk copy, or two where the ring ends (never within a chunk). How much is in
// flight thus depends on the rings' size only, not on the density: at 90 % zeros four 2:4 columns
// are. X goes through a ring of stages, 64 or 128 columns each, loaded through a tensor map in the
// 128-byte swizzle that wgmma reads.
//
// The weight may be fetched while the kernel before this one still runs, X may not.
#pragma once

#include <cuda.h>

#include "cuda/bitmap/smem.cuh"
#include "cuda/ptx/sm80.cuh"
#include "cuda/ptx/sm90.cuh"
#include "cuda/schedule/dependent_launch.cuh"

#ifdef FLASH_LLM_SM90A

namespace flash_llm {

// One warp: brings the chunks that go through one ring. It begins before the barriers are ready,
// because where the first chunks lie takes the longest to find out.
template <typename C>
class ChunkProducer {
 public:
  __device__ __forceinline__ ChunkProducer(const BitmapParams& p, const BitmapSmem<C>& smem,
                                           int ring, int lane)
      : p_(p),
        smem_(smem),
        ring_(ring),
        lane_(lane),
        ring_bytes_(smem.ring() + ring * p.ring_units * kChunkUnitBytes) {}

  __device__ __forceinline__ void begin() {
    at_ = ColumnPosition(p_, p_.schedule.first_unit(cluster_idx<C>()));
    end_ = ColumnPosition(p_, p_.schedule.first_unit(cluster_idx<C>() + 1));
    next_ = at_;
    pair_ = load_pair();
#pragma unroll 1
    for (int i = 0; i < kBitmapPairsAhead; ++i) prefetch_pair();
  }

  __device__ __forceinline__ void run() {
#pragma unroll 1
    while (at_.before(end_)) {
      // Where offsets are malformed all is empty.
      const bool sound = pair_.begin >= 0 && pair_.units >= 0 && pair_.units <= kMaxChunkUnits &&
                         pair_.begin <= p_.payload_units - pair_.units;
      const int units = __all_sync(~0U, sound) ? pair_.units : 0;
      const uint32_t flags = column_flags(units);
      copy_column(units, flags);
      at_.advance((flags & kColumnIsTwoFour) != 0 ? 2 : 1, p_.chunk_cols);
      if (at_.col % 2 == 0) next_pair();
    }
    ptx::copy_async_wait<0>();  // shared memory is ours only as long as we are here
  }

 private:
  static constexpr unsigned kStages = C::kRingGroups * kBitmapGroupStages;
  static_assert(kStages <= 32, "begin_of_copy_ has one for each lane");

  // A chunk's place in the payload and its size, in units.
  struct ChunkRange {
    int begin, units;
  };

  // What is brought at once: a group's chunks of a column.
  struct Chunks {
    int chunk;   // this lane's in the group; negative if it has none
    int units;   // of this lane's chunk
    int place;   // where it goes, in units of the ring
    int begin;   // of the first chunk, in the payload
    int total;   // units of all chunks
    int before;  // of which these come before the ring's end, the others at its beginning
    int taken;   // total and what is skipped at the ring's end
  };

  // Turns to this lane's chunk in the first pair of columns of a row of blocks, or of the stretch:
  // lane l's is in row l % 16 of column l / 16.
  __device__ __forceinline__ void begin_row() {
    const int row_block = p_.schedule_rows == p_.row_blocks ? next_.row : next_.row % p_.row_blocks;
    const int band_row = (row_block * C::kCluster + smem_.rank) * C::kChunks;
    const int chunk_row = band_row + lane_ % 16;
    next_.col = next_.col / 2 * 2;
    own_col_ = lane_ % 16 < C::kChunks && chunk_row < p_.chunk_rows ? next_.col + lane_ / 16
                                                                    : p_.chunk_cols;
    own_offset_ =
        p_.offsets + chunk_index(chunk_row, next_.col + lane_ / 16, p_.chunk_rows, p_.chunk_cols);
    pair_chunks_ =
        2 * min(kBandChunkRows, p_.chunk_rows - band_row / kBandChunkRows * kBandChunkRows);
  }

  // Moves on to the pair after it.
  __device__ __forceinline__ void advance_pair() {
    next_.col += 2;
    own_col_ += 2;
    own_offset_ += pair_chunks_;
    if (next_.col >= p_.chunk_cols) {
      next_ = ColumnPosition(next_.row + 1, 0);
      begin_row();
    }
  }

  __device__ __forceinline__ bool has_chunk() const {
    return next_.before(end_) && own_col_ < p_.chunk_cols;
  }

  // The first pair's offsets are needed at once.
  __device__ __forceinline__ ChunkRange load_pair() {
    begin_row();
    int begin = 0, end = 0;
    if (has_chunk()) {
      begin = __ldg(own_offset_);
      end = __ldg(own_offset_ + 1);
    }
    advance_pair();
    return {begin, end - begin};
  }

  // Asks for the offsets of the next pair, if there is one. Well ahead, because memory answers late
  // when it is busy.
  __device__ __forceinline__ void prefetch_pair() {
    const bool exists = has_chunk();
    const int32_t* offset = exists ? own_offset_ : p_.offsets;
    const uint32_t smem = smem_.offsets(ring_, prefetch_stage_, lane_);
    ptx::copy_async4(smem, offset, exists);
    ptx::copy_async4(smem + 4, offset + 1, exists);
    ptx::copy_async_commit();
    prefetch_stage_ = (prefetch_stage_ + 1) % kBitmapPairsAhead;
    advance_pair();
  }

  // Takes the offsets of the pair after pair_, and asks for those of one more.
  __device__ __forceinline__ void next_pair() {
    ptx::copy_async_wait<kBitmapPairsAhead - 1>();
    // Each lane reads what it copied itself.
    const uint2 offsets = ptx::load_shared_v2(smem_.offsets(ring_, prefetch_stage_, lane_));
    pair_.begin = static_cast<int>(offsets.x);
    pair_.units = static_cast<int>(offsets.y - offsets.x);
    prefetch_pair();
  }

  // What is to be said of the column at_, in which each lane's own chunk has `units`.
  __device__ __forceinline__ uint32_t column_flags(int units) const {
    // The odd column of a 2:4 pair has no bytes: whoever has the even one does it all.
    const bool two_four =
        __any_sync(~0U, at_.col % 2 == 0 && lane_ < 16 && units > 0 && is_two_four(units));
    ColumnPosition behind = at_;
    behind.advance(two_four ? 2 : 1, p_.chunk_cols);
    const bool last = !behind.before(end_);
    const bool own = !end_.before(behind);  // a 2:4 column may reach into the next CTA's part
    return (two_four ? kColumnIsTwoFour : 0U) | (behind.col == 0 && own ? kColumnEndsRow : 0U) |
           (last ? kColumnIsLast : 0U);
  }

  // Brings the column at_, in which each lane's own chunk has `units`.
  __device__ __forceinline__ void copy_column(int units, uint32_t flags) {
#pragma unroll 1
    for (int i = 0; i < C::kRingGroups; ++i) {
      const int group = ring_ * C::kRingGroups + i;
      Chunks chunks = find_chunks(group, units);
      if (chunks.taken > p_.ring_units) {  // full ones, and the ring's end comes in between
        while (released_ != issued_) release_oldest();
        head_ = 0;
        chunks = find_chunks(group, units);
      }
      wait_for_space(chunks.taken);
      copy_chunks(group, chunks, flags);
    }
  }

  // A group's chunks of the column at_.
  __device__ __forceinline__ Chunks find_chunks(int group, int units) const {
    const int first_lane = at_.col % 2 * 16 + group * C::kGroupChunks;
    const unsigned chunk = lane_ - first_lane;
    Chunks chunks;
    chunks.chunk = chunk < C::kGroupChunks ? static_cast<int>(chunk) : -1;
    chunks.units = chunks.chunk >= 0 ? units : 0;
    // They follow each other in memory, so their offsets say where they go too.
    chunks.begin = __shfl_sync(~0U, pair_.begin, first_lane);
    const int end = chunks.units > 0 ? pair_.begin + units - chunks.begin : 0;
    // Those that would cross the ring's end start over.
    const bool fits = head_ + end <= p_.ring_units;
    chunks.total = static_cast<int>(__reduce_max_sync(~0U, static_cast<unsigned>(end)));
    chunks.before = static_cast<int>(__reduce_max_sync(~0U, static_cast<unsigned>(fits ? end : 0)));
    chunks.place = end - units + (fits ? head_ : -chunks.before);
    chunks.taken =
        chunks.total + (chunks.before < chunks.total ? p_.ring_units - head_ - chunks.before : 0);
    return chunks;
  }

  // Waits until the next stage and `units` more of the ring are free.
  __device__ __forceinline__ void wait_for_space(int units) {
#pragma unroll 1
    while (released_ != issued_) {
      const uint32_t oldest = __shfl_sync(~0U, begin_of_copy_, released_ % 32);
      if (issued_ - released_ < kStages &&
          static_cast<int>(reserved_ + units - oldest) <= p_.ring_units) {
        break;
      }
      release_oldest();
    }
  }

  __device__ __forceinline__ void release_oldest() {
    const PipelineState<kBitmapGroupStages> place = {released_ / C::kRingGroups};
    const int group = ring_ * C::kRingGroups + static_cast<int>(released_ % C::kRingGroups);
    ptx::mbarrier_wait(smem_.group_empty(group, place.stage()), place.phase());
    ++released_;
  }

  __device__ __forceinline__ void copy_chunks(int group, const Chunks& chunks, uint32_t flags) {
    const int stage = PipelineState<kBitmapGroupStages>{issued_ / C::kRingGroups}.stage();
    if (chunks.chunk >= 0) {
      const bool two_four = (flags & kColumnIsTwoFour) != 0;
      const int size =
          two_four ? chunks.units : max(chunks.units * kChunkUnitBytes - kChunkFixedBytes, 0);
      ptx::store_shared_v2(
          smem_.descriptor(group, stage, chunks.chunk),
          chunks.units > 0 ? ring_bytes_ + chunks.place * kChunkUnitBytes : smem_.empty_chunk(),
          size | flags << 16);
    }
    __syncwarp();
    if (lane_ == 0) {
      const uint32_t full = smem_.group_full(group, stage);
      const int after = chunks.total - chunks.before;
      ptx::mbarrier_expect(full, chunks.total * kChunkUnitBytes);
      const uint32_t* source = p_.payload + int64_t{chunks.begin} * kChunkUnitWords;
      if (chunks.before > 0) {
        ptx::bulk_copy_streaming(ring_bytes_ + head_ * kChunkUnitBytes, source,
                                 chunks.before * kChunkUnitBytes, full);
      }
      if (after > 0) {
        ptx::bulk_copy_streaming(ring_bytes_, source + chunks.before * kChunkUnitWords,
                                 after * kChunkUnitBytes, full);
      }
    }
    if (lane_ == issued_ % 32) begin_of_copy_ = reserved_;
    reserved_ += chunks.taken;
    head_ = chunks.before < chunks.total ? chunks.total - chunks.before : head_ + chunks.total;
    ++issued_;
  }

  const BitmapParams& p_;
  const BitmapSmem<C>& smem_;
  int ring_, lane_;
  uint32_t ring_bytes_;  // where it begins

  ColumnPosition at_{0, 0}, end_{0, 0};

  // The next pair whose offsets will be asked for, and this lane's chunk there, if own_col_ exists.
  ColumnPosition next_{0, 0};
  int own_col_ = 0;
  const int32_t* own_offset_ = nullptr;
  int pair_chunks_ = 0;   // from there to the lane's chunk in the next pair
  ChunkRange pair_ = {};  // which at_ is in
  int prefetch_stage_ = 0;

  int head_ = 0;                // where the next chunk goes, in the ring
  uint32_t issued_ = 0;         // columns of groups, the groups of the ring in turn
  uint32_t released_ = 0;       // of these, how many have been read
  uint32_t reserved_ = 0;       // units of the ring handed out, ever
  uint32_t begin_of_copy_ = 0;  // lane l: reserved_ before the one whose number is l mod 32
};

// One thread: brings X, stage after stage, once the kernel before has written it. Each CTA of a
// cluster brings some tokens for all of them. (A stretch that ends in the middle of a 2:4 pair
// needs the next column's X too.)
template <typename C>
__device__ __forceinline__ void produce_x(const BitmapParams& p, const CUtensorMap& map,
                                          const BitmapSmem<C>& smem) {
  ptx::prefetch_tensor_map(&map);
  wait_for_previous_kernel();
  ColumnPosition at(p, p.schedule.first_unit(cluster_idx<C>()));
  ColumnPosition end(p, p.schedule.first_unit(cluster_idx<C>() + 1));
  const bool one_more = end.col % 2 != 0;
  if (one_more) end.advance(1, p.chunk_cols);
  PipelineState<C::kXStages> place;
#pragma unroll 1
  for (; at.before(end); at.advance(1, p.chunk_cols)) {
    constexpr int kTokens = C::kTileN / C::kCluster;
    const int token = (p.schedule_rows == p.row_blocks ? 0 : at.row / p.row_blocks * C::kTileN) +
                      smem.rank * kTokens;
#pragma unroll
    for (int k = 0; k < kChunkK; k += C::kXStageK) {
      ptx::mbarrier_wait(smem.x_empty(place.stage()), place.phase() ^ 1);
      const uint32_t full = smem.x_full(place.stage());
      ptx::mbarrier_expect(full, C::kXStageBytes);
#pragma unroll
      for (int box = 0; box < C::kXBoxes; ++box) {
        const uint32_t x =
            smem.x(place.stage()) + box * C::kXBoxBytes + smem.rank * kTokens * kXBoxK * 2;
        const int col = at.col * kChunkK + k + box * kXBoxK;
        if constexpr (C::kCluster == 1) {
          ptx::tensor_copy_2d(x, &map, col, token, full);
        } else {
          ptx::tensor_copy_2d_multicast(x, &map, col, token, full, (1 << C::kCluster) - 1);
        }
      }
      place = place + 1;
    }
  }
  // Perhaps nobody needed the last column, but shared memory is ours only as long as we are here.
  if (one_more) {
    for (int i = 0; i < kChunkK / C::kXStageK; ++i) {
      place = place + -1;
      ptx::mbarrier_wait(smem.x_full(place.stage()), place.phase());
    }
  }
}

}  // namespace flash_llm

#endif  // FLASH_LLM_SM90A
