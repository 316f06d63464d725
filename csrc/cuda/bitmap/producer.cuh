// The producer warps of the bitmap kernel. They copy the weights of the CTA's work range, and the
// columns of X that these multiply, from global to shared memory ahead of the consumer warps.
//
// Weights go through rings of bytes, one producer warp per ring. The chunks of a column lie next to
// each other in global memory, so a group of up to 8 chunks is one copy, or two where the ring
// wraps around (never within a chunk); by cp.async (weight_copy.cuh) a copy may be of several
// groups. The bytes in flight therefore depend on the size of the rings and not on the density: at
// 90 % zeros four 2:4 columns are in flight. One more warp loads X through a tensor map into stages
// of 64 or 128 columns, in the 128-byte swizzle that wgmma reads.
//
// What limits is how many instructions a copy takes: the producer warps get one issue slot of five.
// So sums over the chunks are computed once for both columns of a pair (99 KB of shared memory,
// 28672x7168, N = 8, 70 % zeros, H200: 67 -> 60 us).
//
// Weights may be copied while the previous kernel in the stream still runs. X may not, because that
// kernel may be writing it.
#pragma once

#include <cuda.h>

#include "cuda/bitmap/smem.cuh"
#include "cuda/ptx/sm80.cuh"
#include "cuda/ptx/sm90.cuh"
#include "cuda/schedule/dependent_launch.cuh"
#include "cuda/schedule/weight_copy.cuh"

namespace flash_llm {

// One warp, which copies the chunks of one ring. begin() runs before the barriers are initialised,
// because loading the first offsets from global memory takes longest.
template <typename C, typename WeightCopy = BulkCopy>
class ChunkProducer {
 public:
  __device__ __forceinline__ ChunkProducer(const BitmapParams& p, const BitmapSmem<C>& smem,
                                           int ring, int lane)
      : p_(p),
        smem_(smem),
        ring_(ring),
        lane_(lane),
        ring_base_(smem.ring() +
                   (ring * (p.ring_units + kBitmapGapUnits) + kBitmapGapUnits) * kChunkUnitBytes),
        free_units_(p.ring_units) {}

  __device__ __forceinline__ void begin() {
    position_ = ColumnPosition(p_, p_.schedule.first_unit(cluster_idx<C>()));
    end_ = ColumnPosition(p_, p_.schedule.first_unit(cluster_idx<C>() + 1));
    next_ = position_;
    lay_out(load_pair());
#pragma unroll 1
    for (int i = 0; i < kBitmapPairsAhead; ++i) prefetch_pair();
  }

  __device__ __forceinline__ void run() {
#pragma unroll 1
    while (position_.before(end_)) {
      const uint32_t flags = column_flags();
      copy_column(flags);
      position_.advance((flags & kColumnIsTwoFour) != 0 ? 2 : 1, p_.chunk_cols);
      if (position_.col % 2 == 0) next_pair();
    }
    ptx::copy_async_wait<0>();  // no copy may outlive the CTA, whose shared memory it writes
  }

 private:
  static constexpr unsigned kStages = C::kRingGroups * kBitmapGroupStages;
  static_assert(kStages <= 32, "reserved_ has one entry per lane");
  static constexpr int kRingChunks = C::kRingGroups * C::kGroupChunks;
  static_assert(kBandChunkRows == 16, "lane l has chunk row l % 16 of column l / 16 of a pair");

  // Where a chunk begins in the payload, and its size, in units.
  struct ChunkRange {
    int begin, units;
  };

  // Sets own_offset_ to this lane's chunk in the pair of columns at next_, the first of an output
  // tile or of the work range. Lane l's chunk is in row l % 16 of column l / 16 of a pair.
  __device__ __forceinline__ void begin_tile() {
    const int row_block =
        p_.output_tiles == p_.row_blocks ? next_.tile : next_.tile % p_.row_blocks;
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

  // Moves next_ and own_offset_ on to the next pair.
  __device__ __forceinline__ void advance_pair() {
    next_.col += 2;
    own_col_ += 2;
    own_offset_ += pair_chunks_;
    if (next_.col >= p_.chunk_cols) {
      next_ = ColumnPosition(next_.tile + 1, 0);
      begin_tile();
    }
  }

  __device__ __forceinline__ bool has_chunk() const {
    return next_.before(end_) && own_col_ < p_.chunk_cols;
  }

  // Loads the first pair's offsets, which are needed at once, without a prefetch.
  __device__ __forceinline__ ChunkRange load_pair() {
    begin_tile();
    int begin = 0, end = 0;
    if (has_chunk()) {
      begin = __ldg(own_offset_);
      end = __ldg(own_offset_ + 1);
    }
    advance_pair();
    return {begin, end - begin};
  }

  // Prefetches the offsets of the pair at next_, if it exists, kBitmapPairsAhead pairs before they
  // are used, because a busy memory has a long latency.
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

  // Lays out the next pair, whose offsets were prefetched, and prefetches one more.
  __device__ __forceinline__ void next_pair() {
    ptx::copy_async_wait<kBitmapPairsAhead - 1>();
    // Each lane reads what it has copied itself, so no barrier is needed.
    const uint2 offsets = ptx::load_shared_v2(smem_.offsets(ring_, prefetch_stage_, lane_));
    lay_out({static_cast<int>(offsets.x), static_cast<int>(offsets.y - offsets.x)});
    prefetch_pair();
  }

  // Computes what the copies of both columns of a pair need of this lane's chunk.
  __device__ __forceinline__ void lay_out(const ChunkRange& chunk) {
    // If any offset is malformed, both columns are treated as empty.
    const bool sound = chunk.begin >= 0 && chunk.units >= 0 && chunk.units <= kMaxChunkUnits &&
                       chunk.begin <= p_.payload_units - chunk.units;
    units_ = __all_sync(~0U, sound) ? chunk.units : 0;
    is_two_four_ = __any_sync(~0U, lane_ < kBandChunkRows && units_ > 0 && is_two_four(units_));
    // The chunks of a ring are contiguous in the payload.
    ring_begin_ = __shfl_sync(~0U, chunk.begin, 0, kRingChunks);
    end_in_ring_ = units_ > 0 ? chunk.begin + units_ - ring_begin_ : 0;
#pragma unroll
    for (int distance = 1; distance < kRingChunks; distance *= 2) {
      const int before = __shfl_up_sync(~0U, end_in_ring_, distance, kRingChunks);
      if (lane_ % kRingChunks >= distance) end_in_ring_ = max(end_in_ring_, before);
    }
  }

  // The flags of the column at position_.
  __device__ __forceinline__ uint32_t column_flags() const {
    // The even column of a 2:4 pair holds the chunks of both: the odd one has no bytes.
    const bool two_four = is_two_four_ && position_.col % 2 == 0;
    ColumnPosition after = position_;
    after.advance(two_four ? 2 : 1, p_.chunk_cols);
    const bool last = !after.before(end_);
    // False if the work range ends between the two columns of a 2:4 pair. The next cluster then
    // begins with the odd column, which is empty, and ends the output tile if the column does.
    const bool own = !end_.before(after);
    return (two_four ? kColumnIsTwoFour : 0U) | (after.col == 0 && own ? kColumnEndsTile : 0U) |
           (last ? kColumnIsLast : 0U);
  }

  // Copies the ring's chunks of the column at position_: those of all groups together where the
  // ring has room for two such copies, one to be read and one to arrive, else group by group.
  __device__ __forceinline__ void copy_column(uint32_t flags) {
    const int first_lane = position_.col % 2 * kBandChunkRows + ring_ * kRingChunks;
    const uint32_t begin = __shfl_sync(~0U, ring_begin_, first_lane);
    if constexpr (WeightCopy::kCopiesGroups) {
      const int end = __shfl_sync(~0U, end_in_ring_, first_lane + kRingChunks - 1);
      if (2 * (end + kBitmapGapUnits) <= p_.ring_units) {
        copy_groups<C::kRingGroups>(0, first_lane, begin, 0, end, flags);
        return;
      }
    }
    int end = 0;
#pragma unroll 1
    for (int i = 0; i < C::kRingGroups; ++i) {
      const int first = end;
      end = __shfl_sync(~0U, end_in_ring_, first_lane + (i + 1) * C::kGroupChunks - 1);
      copy_groups<1>(i, first_lane, begin, first, end, flags);
    }
  }

  // Copies the chunks of kGroups groups from group `group` of the ring on, which are units `first`
  // to `end` of the ring's chunks: waits for room in the ring, writes the chunk descriptors and
  // issues the copy. They stay contiguous in the ring, but where they would cross its end: the
  // chunk that would, and those after it, go to its beginning.
  template <int kGroups>
  __device__ __forceinline__ void copy_groups(int group, int first_lane, uint32_t begin, int first,
                                              int end, uint32_t flags) {
    const unsigned chunk = lane_ - first_lane - group * C::kGroupChunks;
    const bool own = chunk < kGroups * C::kGroupChunks;
    const int total = end - first;
    int before_wrap = total;
    // With the gap after the copy, and with what stays unused at the end of the ring.
    int reserved = total > 0 ? total + kBitmapGapUnits : 0, head = head_ + reserved;
    if (head > p_.ring_units + kBitmapGapUnits) {
      const bool fits = own && head_ + end_in_ring_ - first <= p_.ring_units;
      before_wrap = static_cast<int>(
          __reduce_max_sync(~0U, static_cast<unsigned>(fits ? end_in_ring_ - first : 0)));
      head -= head_ + before_wrap;
      reserved += p_.ring_units - head_ - before_wrap;
      // Very full chunks and the unused end of the ring together may exceed the ring: then empty it
      // and start at its beginning, where every group fits (bitmap_least_ring_bytes).
      if (reserved > p_.ring_units) {
        while (released_ != issued_) release_oldest();
        head_ = 0;
        before_wrap = total;
        reserved = head = total + kBitmapGapUnits;
      }
    }
    while (issued_ - released_ > kStages - kGroups || reserved > free_units_) release_oldest();
    free_units_ -= reserved;
    const int stage = PipelineState<kBitmapGroupStages>{issued_ / C::kRingGroups}.stage();
    // The last of the groups to be released frees all of the copy.
    const unsigned ago = (lane_ - issued_) % 32;
    if (ago < kGroups) reserved_ = ago == kGroups - 1 ? reserved : 0;

    const int cta_group = ring_ * C::kRingGroups + group;
    if (own) {
      const int end_in_copy = end_in_ring_ - first;
      const int place = end_in_copy + (end_in_copy <= before_wrap ? head_ : -before_wrap) - units_;
      const int size = (flags & kColumnIsTwoFour) != 0
                           ? units_
                           : max(units_ * kChunkUnitBytes - kChunkFixedBytes, 0);
      ptx::store_shared_v2(smem_.descriptor(cta_group + static_cast<int>(chunk / C::kGroupChunks),
                                            stage, chunk % C::kGroupChunks),
                           units_ > 0 ? ring_base_ + place * kChunkUnitBytes : smem_.empty_chunk(),
                           size | flags << 16);
    }
    __syncwarp();
    RingCopy copy;
    copy.source = p_.payload + int64_t{begin + first} * kChunkUnitWords;
    copy.to = ring_base_ + head_ * kChunkUnitBytes;
    copy.bytes = before_wrap * kChunkUnitBytes;
    copy.wrapped_to = ring_base_;
    copy.wrapped_bytes = (total - before_wrap) * kChunkUnitBytes;
    copy.full = smem_.group_full(cta_group, stage);
    copy.group_bytes = kBitmapGroupStages * 8;
    WeightCopy::template copy<kGroups>(copy, lane_);
    head_ = head;
    issued_ += kGroups;
  }

  // Waits until the consumers have released the oldest copy in the ring.
  __device__ __forceinline__ void release_oldest() {
    const PipelineState<kBitmapGroupStages> state = {released_ / C::kRingGroups};
    const int group = ring_ * C::kRingGroups + static_cast<int>(released_ % C::kRingGroups);
    ptx::mbarrier_wait(smem_.group_empty(group, state.stage()), state.phase());
    free_units_ += __shfl_sync(~0U, reserved_, released_ % 32);
    ++released_;
  }

  const BitmapParams& p_;
  const BitmapSmem<C>& smem_;
  int ring_, lane_;
  uint32_t ring_base_;  // shared-memory address of the ring after its first gap

  ColumnPosition position_{0, 0};  // the column that is copied next
  ColumnPosition end_{0, 0};       // of the work range

  // The pair whose offsets are prefetched next, and this lane's chunk in it: its column, which may
  // lie outside the matrix, and where its offset is.
  ColumnPosition next_{0, 0};
  int own_col_ = 0;
  const int32_t* own_offset_ = nullptr;
  int pair_chunks_ = 0;  // chunks from own_offset_ to the lane's chunk in the next pair
  int prefetch_stage_ = 0;

  // The pair that position_ is in: whether it is 2:4; the size of this lane's chunk; where the
  // first chunk of its ring and column begins in the payload, and the size of the ring's chunks up
  // to this lane's. All in units.
  bool is_two_four_ = false;
  int units_ = 0, ring_begin_ = 0, end_in_ring_ = 0;

  int head_ = 0;           // where the next chunk goes in the ring, in units
  int free_units_;         // of the ring
  uint32_t issued_ = 0;    // copies issued so far; the groups of the ring take turns
  uint32_t released_ = 0;  // how many of them the consumers have released
  // Lane l: the units of the ring that copy i reserved, for the last i with i % 32 == l.
  int reserved_ = 0;
};

// One thread, which loads X stage by stage, once the previous kernel has written it. Each CTA of a
// cluster loads a part of the tokens and multicasts it to all of them. If the work range ends
// between the columns of a 2:4 pair, X of the second column is loaded too.
template <typename C>
__device__ __forceinline__ void produce_x(const BitmapParams& p, const CUtensorMap& map,
                                          const BitmapSmem<C>& smem) {
  ptx::prefetch_tensor_map(&map);
  wait_for_previous_kernel();
  ColumnPosition position(p, p.schedule.first_unit(cluster_idx<C>()));
  ColumnPosition end(p, p.schedule.first_unit(cluster_idx<C>() + 1));
  const bool one_more = end.col % 2 != 0;
  if (one_more) end.advance(1, p.chunk_cols);
  PipelineState<C::kXStages> state;
#pragma unroll 1
  for (; position.before(end); position.advance(1, p.chunk_cols)) {
    constexpr int kTokens = C::kTileN / C::kCluster;
    const int token =
        (p.output_tiles == p.row_blocks ? 0 : position.tile / p.row_blocks * C::kTileN) +
        smem.rank * kTokens;
#pragma unroll
    for (int k = 0; k < kChunkK; k += C::kXStageK) {
      ptx::mbarrier_wait(smem.x_empty(state.stage()), state.phase() ^ 1);
      const uint32_t full = smem.x_full(state.stage());
      ptx::mbarrier_arrive_expect_tx(full, C::kXStageBytes);
#pragma unroll
      for (int box = 0; box < C::kXBoxes; ++box) {
        const uint32_t x =
            smem.x(state.stage()) + box * C::kXBoxBytes + smem.rank * kTokens * kXBoxK * 2;
        const int col = position.col * kChunkK + k + box * kXBoxK;
        if constexpr (C::kCluster == 1) {
          ptx::tensor_copy_2d(x, &map, col, token, full);
        } else {
          ptx::tensor_copy_2d_multicast(x, &map, col, token, full, (1 << C::kCluster) - 1);
        }
      }
      state = state + 1;
    }
  }
  // If the last pair is plain, no consumer waits for the additional column. Wait for it here: no
  // copy may outlive the CTA, whose shared memory it writes.
  if (one_more) {
    for (int i = 0; i < kChunkK / C::kXStageK; ++i) {
      state = state + -1;
      ptx::mbarrier_wait(smem.x_full(state.stage()), state.phase());
    }
  }
}

}  // namespace flash_llm
