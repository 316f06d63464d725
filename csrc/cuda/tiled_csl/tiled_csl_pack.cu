// Tiled-CSL on the device: count, pack and unpack, one CTA per tile. The tile goes through shared
// memory in the order of positions (see format/tiled_csl.h), so that packing and unpacking
// access the dense matrix in whole rows. pack_kernel writes the same bytes as format/tiled_csl.cpp.
#include <cstdint>

#include "cuda/dense_matrix.cuh"
#include "cuda/launch.h"
#include "format/element.h"
#include "format/tiled_csl.h"

namespace flash_llm {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBankPositions = kTileElems / kNumBanks;  // of one bank: 128 rows x 2 halves

// The tile that this CTA works on.
struct TileOrigin {
  int64_t row0, col0;
  int rows, cols;

  __device__ TileOrigin(int64_t m, int64_t k) {
    const auto tile_cols = static_cast<unsigned>(num_tile_cols(k));
    row0 = int64_t{blockIdx.x / tile_cols} * kTileM;
    col0 = int64_t{blockIdx.x % tile_cols} * kTileK;
    rows = static_cast<int>(min(int64_t{kTileM}, m - row0));
    cols = static_cast<int>(min(int64_t{kTileK}, k - col0));
  }
};

__device__ __forceinline__ bool is_nonzero(uint16_t value) { return (value & 0x7FFF) != 0; }

__device__ __forceinline__ uint16_t load_or_zero(const DenseMatrix& dense, const TileOrigin& tile,
                                                 int row, int col) {
  return row < tile.rows && col < tile.cols ? dense.row(tile.row0 + row)[tile.col0 + col]
                                            : uint16_t{0};
}

__global__ void __launch_bounds__(kThreads)
    count_kernel(DenseMatrix dense, int32_t* units, int32_t* nnz) {
  const TileOrigin tile(dense.m, dense.k);
  int count = 0;
  for (int i = threadIdx.x; i < kTileElems; i += kThreads) {
    count += is_nonzero(load_or_zero(dense, tile, i / kTileK, i % kTileK));
  }
  count = cta_sum(count);
  if (threadIdx.x == 0) {
    nnz[blockIdx.x] = count;
    units[blockIdx.x] = (count + kVectorEntries - 1) / kVectorEntries;
  }
}

// One warp orders a tile's entries: lane b works through the queue of bank b. Other CTAs keep the
// SM busy meanwhile.
__global__ void __launch_bounds__(kThreads)
    pack_kernel(DenseMatrix dense, const int32_t* __restrict__ offsets,
                const int32_t* __restrict__ counted_nnz, uint32_t* __restrict__ entries,
                int32_t* changed) {
  __shared__ uint16_t values[kTileElems];  // by position
  __shared__ uint32_t
      present[kBankPositions / 32][kNumBanks];  // bit i % 32: position i of the bank

  const TileOrigin tile(dense.m, dense.k);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < kTileElems; i += kThreads) {
    const int row = i / kTileK, col = i % kTileK;
    values[position_of(row, col)] = load_or_zero(dense, tile, row, col);
  }
  __syncthreads();

  // A bank's positions in ascending order: row by row, the two halves of each word.
  const auto position_in_bank = [](int bank, int i) { return i / 2 * kTileK + bank * 2 + i % 2; };
  for (int bank = warp; bank < kNumBanks; bank += kWarps) {
    for (int part = 0; part < kBankPositions / 32; ++part) {
      const uint16_t value = values[position_in_bank(bank, part * 32 + lane)];
      const uint32_t mask = __ballot_sync(~0U, is_nonzero(value));
      if (lane == 0) present[part][bank] = mask;
    }
  }
  __syncthreads();
  if (warp > 0) return;

  const int num_entries = (offsets[blockIdx.x + 1] - offsets[blockIdx.x]) * kVectorEntries;
  uint32_t* out = entries + int64_t{offsets[blockIdx.x]} * kVectorEntries;
  const auto emit = [&](int index, int position) {
    out[storage_index(index, num_entries)] =
        static_cast<uint32_t>(position) << 16 | static_cast<uint32_t>(values[position]);
  };
  int words = 0, count = 0;  // words and entries left in this bank's queue
  for (int part = 0; part < kBankPositions / 32; ++part) {
    const uint32_t mask = present[part][lane];
    words += __popc((mask | mask >> 1) & 0x55555555U);
    count += __popc(mask);
  }
  const int nnz = __reduce_add_sync(~0U, count);
  if (nnz != counted_nnz[blockIdx.x]) {  // another stream writes the matrix
    if (lane == 0) *changed = 1;
    return;
  }
  int pos = 0, part = 0;
  uint32_t mask = present[0][lane];  // what is left of this part of the bank's positions
  while (pos < nnz) {                // one round
    while (mask == 0 && part + 1 < kBankPositions / 32) mask = present[++part][lane];
    const int first = __ffs(static_cast<int>(mask)) - 1;
    const int word = mask == 0 ? 0 : __popc(mask >> (first & ~1) & 3U);  // its entries
    // The longest queue goes first, and the lowest bank among equal ones: all keys are different.
    const int key = words << 7 | (31 - lane) << 2 | word;
    int before = 0;
    for (int bank = 0; bank < kNumBanks; ++bank) {
      const int other = __shfl_sync(~0U, key, bank);
      if (other > key) before += other & 3;
    }
    const int taken = min(word, max(0, store_room(pos, num_entries) - before));
    for (int i = 0; i < taken; ++i) {
      emit(pos + before + i, position_in_bank(lane, part * 32 + __ffs(static_cast<int>(mask)) - 1));
      mask &= mask - 1;
    }
    if (word > 0 && taken == word) --words;
    pos += __reduce_add_sync(~0U, taken);
  }
  // Padding entries get the lowest free positions.
  for (int first = 0; pos < num_entries; first += 32) {
    const uint32_t free = ~__ballot_sync(~0U, is_nonzero(values[first + lane]));
    const int mine = pos + __popc(free & ((1U << lane) - 1U));
    if ((free >> lane & 1U) && mine < num_entries) {
      out[storage_index(mine, num_entries)] = static_cast<uint32_t>(first + lane) << 16;
    }
    pos += __popc(free);
  }
}

__global__ void __launch_bounds__(kThreads) unpack_kernel(PackedView view, uint16_t* dense) {
  __shared__ __align__(16) uint16_t values[kTileElems];
  const TileOrigin tile(view.m, view.k);
  for (int i = threadIdx.x; i < kTileBytes / 16; i += kThreads) {
    reinterpret_cast<uint4*>(values)[i] = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();
  const int max_vectors = static_cast<int>(view.payload_words / kVectorEntries);
  const int first = max(0, min(view.offsets[blockIdx.x], max_vectors));
  const int last = max(0, min(view.offsets[blockIdx.x + 1], max_vectors));
  const uint4* vectors = reinterpret_cast<const uint4*>(view.payload);
#pragma unroll 4
  for (int i = first + static_cast<int>(threadIdx.x); i < last; i += kThreads) {
    const uint4 v = __ldg(vectors + i);
    const uint32_t entries[kVectorEntries] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (const uint32_t entry : entries) {
      values[(entry >> 16) % kTileElems] = static_cast<uint16_t>(entry);
    }
  }
  __syncthreads();

  // A thread stores 8 consecutive columns, which it reads as one word from each of 4 chunks (of 16
  // bytes), without bank conflicts.
  const bool aligned = view.k % 8 == 0;  // rows then begin at 16-byte boundaries
  const uint32_t* words = reinterpret_cast<const uint32_t*>(values);
#pragma unroll 4
  for (int i = threadIdx.x; i < kTileElems / 8; i += kThreads) {
    const int row = i / 8, col0 = i % 8 * 8;
    if (row >= tile.rows || col0 >= tile.cols) continue;
    uint32_t word[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) word[q] = words[position_of(row, col0 + 2 * q) / 2];
    uint16_t* out = dense + (tile.row0 + row) * view.k + tile.col0 + col0;
    if (aligned && col0 + 8 <= tile.cols) {
      *reinterpret_cast<uint4*>(out) = make_uint4(word[0], word[1], word[2], word[3]);
    } else {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        if (col0 + c < tile.cols) out[c] = static_cast<uint16_t>(word[c / 2] >> (c % 2 * 16));
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) count_stored_kernel(PackedView view, int64_t* total) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const bool stored = i < view.payload_words && (view.payload[i] & kMagnitudeMask) != 0;
  const int count = __popc(__ballot_sync(~0U, stored));
  if (threadIdx.x % 32 == 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(total), static_cast<unsigned long long>(count));
  }
}

Status count(const ValueMatrix& matrix, int32_t* units, int32_t* nnz, void* /*scratch*/,
             cudaStream_t stream) {
  const int64_t tiles = num_tiles(matrix.m, matrix.k);
  if (tiles == 0) return Status::success();
  count_kernel<<<static_cast<unsigned>(tiles), kThreads, 0, stream>>>(dense_matrix(matrix), units,
                                                                      nnz);
  return cuda::check(cudaGetLastError(), "count_kernel launch");
}

Status pack(const ValueMatrix& matrix, const int32_t* offsets, const int32_t* nnz,
            uint32_t* entries, int32_t* changed, void* /*scratch*/, cudaStream_t stream) {
  const int64_t tiles = num_tiles(matrix.m, matrix.k);
  if (tiles == 0) return Status::success();
  pack_kernel<<<static_cast<unsigned>(tiles), kThreads, 0, stream>>>(dense_matrix(matrix), offsets,
                                                                     nnz, entries, changed);
  return cuda::check(cudaGetLastError(), "pack_kernel launch");
}

Status unpack(const PackedView& view, uint16_t* dense, cudaStream_t stream) {
  const int64_t tiles = num_tiles(view.m, view.k);
  if (tiles == 0) return Status::success();
  unpack_kernel<<<static_cast<unsigned>(tiles), kThreads, 0, stream>>>(view, dense);
  return cuda::check(cudaGetLastError(), "unpack_kernel launch");
}

Status count_stored(const PackedView& view, int64_t* total, cudaStream_t stream) {
  const int64_t ctas = (view.payload_words + kThreads - 1) / kThreads;
  if (ctas == 0) return Status::success();
  count_stored_kernel<<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(view, total);
  return cuda::check(cudaGetLastError(), "count_stored_kernel launch");
}

}  // namespace

cuda::PackKernels cuda::tiled_csl_kernels() { return {count, pack, unpack, count_stored}; }

}  // namespace flash_llm
