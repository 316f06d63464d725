// The gather format on the device: count, pack and unpack. One thread chooses the order of a slice,
// by the code that the host runs (format/gather_order.h): each step depends on the one before, and
// there are many slices.
#include <algorithm>
#include <cstdint>

#include "cuda/dense_matrix.cuh"
#include "cuda/gather/tile.cuh"
#include "cuda/launch.h"
#include "cuda/schedule/dependent_launch.cuh"
#include "format/element.h"
#include "format/gather.h"
#include "format/gather_order.h"

namespace flash_llm {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * 32;
// Columns of a slice in shared memory: 64 KB of them, so that a CTA fits on every GPU.
constexpr int kWindow = 4096;
constexpr int kWindowBytes = kGatherSliceRows * kWindow * 2;

// A lane's position in a slice's segments, of which each warp takes every kWarps-th.
struct SliceOfCta {
  uint32_t first_unit;
  int quads, tile_row, in_tile, part;
  uint32_t tile_begin;
  bool stored;

  // For slice blockIdx.x % slices of part blockIdx.x / slices. All lanes must call it.
  __device__ __forceinline__ SliceOfCta(const GatherWeight& weight, int lane) {
    const auto slices = static_cast<unsigned>(weight.slices());
    part = static_cast<int>(blockIdx.x / slices);
    const int slice = static_cast<int>(blockIdx.x % slices);
    tile_row = slice / kGatherTileSlices;
    in_tile = slice % kGatherTileSlices;
    const LaneSlices lanes(weight, tile_row, part, lane);
    const int i = in_tile % 2;
    first_unit = __shfl_sync(~0U, i == 0 ? lanes.first[0] : lanes.first[1], in_tile / 2);
    quads =
        static_cast<int>(__shfl_sync(~0U, i == 0 ? lanes.quads[0] : lanes.quads[1], in_tile / 2));
    tile_begin = lanes.begin;
    stored = lanes.stored;
  }

  // Calls visit(column in the part, value) for each step of this warp's segments.
  template <typename Visit>
  __device__ __forceinline__ void visit_steps(const GatherWeight& weight, int warp, int lane,
                                              const Visit& visit) const {
    constexpr int kSegmentBytes = kGatherHeadBytes + kGatherSegmentQuads * kGatherQuadBytes;
    for (int quad = warp * kGatherSegmentQuads; quad < quads;
         quad += kWarps * kGatherSegmentQuads) {
      const uint8_t* at =
          weight.unit(first_unit) + int64_t{quad / kGatherSegmentQuads} * kSegmentBytes;
      int column = __ldg(reinterpret_cast<const uint16_t*>(at) + lane);
      at += kGatherHeadBytes;
      const int count = min(quads - quad, kGatherSegmentQuads);
#pragma unroll 4
      for (int q = 0; q < count; ++q, at += kGatherQuadBytes) {
        const auto steps = static_cast<int>(__ldg(reinterpret_cast<const uint32_t*>(at) + lane));
        const uint2 values =
            __ldg(reinterpret_cast<const uint2*>(at + kGatherQuadStepBytes) + lane);
        const uint32_t words[2] = {values.x, values.y};
#pragma unroll
        for (int i = 0; i < kGatherQuadSteps; ++i) {
          column = __dp4a(steps, 1 << 8 * i, column);
          visit(column, static_cast<uint16_t>(words[i / 2] >> i % 2 * 16));
        }
      }
    }
  }
};

// A CTA writes the elements of a slice in one part, window by window.
__global__ void __launch_bounds__(kThreads, 2)
    unpack_kernel(const __grid_constant__ GatherWeight weight, uint16_t* dense) {
  extern __shared__ __align__(16) uint16_t values[];  // [kGatherSliceRows][kWindow]
  const int lane = threadIdx.x % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const SliceOfCta slice(weight, lane);
  uint16_t* const own = values + lane / kGatherRuns * kWindow;
  const int cols = weight.cols_of(slice.part);
  for (int window = 0; window < cols; window += kWindow) {
    const int width = min(cols - window, kWindow);
    if (window > 0) __syncthreads();
    for (int i = threadIdx.x; i < kWindowBytes / 16; i += kThreads) {
      reinterpret_cast<uint4*>(values)[i] = make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
    slice.visit_steps(weight, warp, lane, [&](int column, uint16_t value) {
      const int in_window = column - window;
      if (value != 0 && in_window >= 0 && in_window < width) own[in_window] = value;
    });
    __syncthreads();
    // Two warps write a row.
    const int i = warp / 2;
    int row = slice.in_tile * kGatherSliceRows + i;
    if (slice.stored) {
      row = __ldg(reinterpret_cast<const uint16_t*>(weight.unit(slice.tile_begin + slice.in_tile)) +
                  i);
    }
    if (row >= weight.rows_of(slice.tile_row)) continue;
    uint16_t* const out = dense + (int64_t{slice.tile_row} * kGatherTileM + row) * weight.k +
                          int64_t{slice.part} * kGatherTileK + window;
    const uint16_t* const from = values + i * kWindow;
    const int thread = static_cast<int>(threadIdx.x) % 64;
    if (weight.k % 8 == 0) {  // rows, and so windows, begin at 16-byte boundaries
      for (int c = thread; c < width / 8; c += 64) {
        __stcs(reinterpret_cast<uint4*>(out) + c, reinterpret_cast<const uint4*>(from)[c]);
      }
    } else {
      for (int c = thread; c < width; c += 64) out[c] = from[c];
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    count_stored_kernel(const __grid_constant__ GatherWeight weight, int64_t* total) {
  const int lane = threadIdx.x % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int count = 0;
  SliceOfCta(weight, lane).visit_steps(weight, warp, lane, [&](int /*column*/, uint16_t value) {
    count += value != 0 ? 1 : 0;
  });
  count = __reduce_add_sync(~0U, count);
  if (lane == 0 && count > 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(total), static_cast<unsigned long long>(count));
  }
}

// What packing knows of a tile from pass 1 on.
struct TileScratch {
  uint16_t rows[kGatherTileM];  // in the order of the format
  uint32_t nnz[kGatherTileSlices];
  uint16_t quads[kGatherTileSlices];
};
static_assert(sizeof(TileScratch) % 16 == 0);

// The tile of CTA `index` of those that work on one each.
struct DenseTile {
  int64_t row0, col0;
  int rows, cols;
  const uint16_t* values;
  int64_t ld;

  __device__ DenseTile(const DenseMatrix& dense, unsigned index) : ld(dense.ld) {
    const auto parts = static_cast<unsigned>((dense.k + kGatherTileK - 1) / kGatherTileK);
    row0 = int64_t{index / parts} * kGatherTileM;
    col0 = int64_t{index % parts} * kGatherTileK;
    rows = static_cast<int>(min(dense.m - row0, int64_t{kGatherTileM}));
    cols = static_cast<int>(min(dense.k - col0, int64_t{kGatherTileK}));
    values = dense.row(row0) + col0;
  }

  __device__ uint16_t value(int row, int col) const { return values[row * ld + col]; }
  __device__ bool stored(int row, int col) const { return (value(row, col) & kMagnitudeMask) != 0; }
};

unsigned tiles_of(int64_t m, int64_t k) {
  return static_cast<unsigned>((m + kGatherTileM - 1) / kGatherTileM) *
         static_cast<unsigned>(gather_parts(k));
}

constexpr int kOrderThreads = kGatherTileM;

// Sorts the rows of a tile.
__global__ void __launch_bounds__(kOrderThreads)
    order_kernel(const __grid_constant__ DenseMatrix dense, TileScratch* scratch) {
  __shared__ int counts[kGatherTileM];
  const DenseTile tile(dense, blockIdx.x);
  const int lane = threadIdx.x % 32;
  for (int row = static_cast<int>(threadIdx.x) / 32; row < kGatherTileM;
       row += kOrderThreads / 32) {
    int count = 0;
    if (row < tile.rows) {
#pragma unroll 4
      for (int col = lane; col < tile.cols; col += 32) count += tile.stored(row, col) ? 1 : 0;
    }
    count = __reduce_add_sync(~0U, count);
    if (lane == 0) counts[row] = count;
  }
  __syncthreads();
  const int row = static_cast<int>(threadIdx.x), own = counts[row];
  int before = 0;
  for (int other = 0; other < kGatherTileM; ++other) {
    before += counts[other] > own || (counts[other] == own && other < row) ? 1 : 0;
  }
  scratch[blockIdx.x].rows[before] = static_cast<uint16_t>(row);
}

// A warp's slice while it is packed: blockIdx.x / 64 is the tile, the rest the slice.
class SliceToPack {
 public:
  __device__ __forceinline__ SliceToPack(const DenseMatrix& dense, const TileScratch* scratch,
                                         uint32_t* bits, GatherOrderState& state)
      : tile_(dense, blockIdx.x / kGatherTileSlices),
        rows_(scratch[blockIdx.x / kGatherTileSlices].rows +
              blockIdx.x % kGatherTileSlices * kGatherSliceRows),
        bits_(bits),
        words_((tile_.cols + 31) / 32),
        state_(state) {}

  __device__ bool exists() const {
    return static_cast<int>(blockIdx.x % kGatherTileSlices) < gather_slices(tile_.rows);
  }

  // Finds the nonzeros, and returns how many there are. All lanes must call it.
  __device__ __forceinline__ uint32_t find_nonzeros() {
    const int lane = threadIdx.x;
    uint32_t count = 0;
    for (int i = 0; i < kGatherSliceRows; ++i) {
      const int row = rows_[i];
#pragma unroll 4
      for (int word = 0; word < words_; ++word) {
        const int col = word * 32 + lane;
        const uint32_t found =
            __ballot_sync(~0U, row < tile_.rows && col < tile_.cols && tile_.stored(row, col));
        if (lane == 0) bits_[i * words_ + word] = found;
        count += __popc(found);
      }
    }
    __syncwarp();
    return count;
  }

  // Stores the slice from unit `first` of the payload, which has room for `quads`, and returns its
  // quads; without a payload it only counts them. Sets *changed if an element has become zero.
  __device__ __forceinline__ int store(uint8_t* payload, int quads, int32_t* changed) {
    const auto bytes_of = [&](int quad) -> uint8_t* {
      if (quad >= quads) return nullptr;
      return payload + (quad / kGatherSegmentQuads + 1) * kGatherHeadBytes +
             int64_t{quad} * kGatherQuadBytes;
    };
    const auto value_of = [&](int row, int col) {
      const uint16_t value = tile_.value(rows_[row], col);
      if ((value & kMagnitudeMask) == 0) *changed = 1;
      return value;
    };
    return GatherOrder(state_, bits_, words_, tile_.cols).store(bytes_of, value_of);
  }

  __device__ int row(int i) const { return rows_[i]; }

 private:
  DenseTile tile_;
  const uint16_t* rows_;
  uint32_t* bits_;  // [kGatherSliceRows][words_]
  int words_;
  GatherOrderState& state_;
};

// Shared memory for a slice's bits.
int bits_bytes(int64_t k) {
  return static_cast<int>((std::min<int64_t>(k, kGatherTileK) + 31) / 32) * kGatherSliceRows * 4;
}

__global__ void __launch_bounds__(32)
    count_kernel(const __grid_constant__ DenseMatrix dense, TileScratch* scratch) {
  extern __shared__ uint32_t bits[];
  __shared__ GatherOrderState state;
  SliceToPack slice(dense, scratch, bits, state);
  uint32_t nnz = 0;
  int quads = 0;
  if (slice.exists()) {
    nnz = slice.find_nonzeros();
    if (threadIdx.x == 0 && nnz > 0) quads = slice.store(nullptr, 0, nullptr);
  }
  if (threadIdx.x != 0) return;
  TileScratch& tile = scratch[blockIdx.x / kGatherTileSlices];
  tile.nnz[blockIdx.x % kGatherTileSlices] = nnz;
  tile.quads[blockIdx.x % kGatherTileSlices] = static_cast<uint16_t>(quads);
}

// Units before the slices.
__device__ __forceinline__ int directory_units(int slices) {
  return slices + (slices * 2 + kGatherUnitBytes - 1) / kGatherUnitBytes;
}

// What a warp knows of a tile from pass 1.
struct TileCounts {
  uint32_t nnz;     // of the tile
  uint32_t units;   // of all slices
  uint32_t before;  // units of the slices before this lane's two

  __device__ __forceinline__ TileCounts(const TileScratch& tile, int lane) {
    nnz = __reduce_add_sync(~0U, tile.nnz[2 * lane] + tile.nnz[2 * lane + 1]);
    const uint32_t own =
        LaneSlices::units_of(tile.quads[2 * lane]) + LaneSlices::units_of(tile.quads[2 * lane + 1]);
    uint32_t sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t below = __shfl_up_sync(~0U, sum, step);
      if (lane >= step) sum += below;
    }
    before = sum - own;
    units = __shfl_sync(~0U, sum, 31);
  }
};

__global__ void __launch_bounds__(32)
    units_kernel(const __grid_constant__ DenseMatrix dense, const TileScratch* scratch,
                 int32_t* units, int32_t* nnz) {
  const TileCounts counts(scratch[blockIdx.x], threadIdx.x);
  if (threadIdx.x != 0) return;
  const int slices = gather_slices(DenseTile(dense, blockIdx.x).rows);
  units[blockIdx.x] =
      counts.nnz == 0 ? 0 : static_cast<int32_t>(directory_units(slices) + counts.units);
  nnz[blockIdx.x] = static_cast<int32_t>(counts.nnz);
}

// Each warp writes a slice and its part of the tile's directory.
__global__ void __launch_bounds__(32)
    pack_kernel(const __grid_constant__ DenseMatrix dense, const TileScratch* scratch,
                const int32_t* offsets, uint8_t* payload, int32_t* changed) {
  extern __shared__ uint32_t bits[];
  __shared__ GatherOrderState state;
  const int lane = threadIdx.x, in_tile = static_cast<int>(blockIdx.x % kGatherTileSlices);
  const unsigned index = blockIdx.x / kGatherTileSlices;
  const TileScratch& tile = scratch[index];
  const TileCounts counts(tile, lane);
  SliceToPack slice(dense, scratch, bits, state);
  if (counts.nnz == 0 || !slice.exists()) return;
  const int slices = gather_slices(DenseTile(dense, index).rows);
  uint8_t* const begin = payload + int64_t{offsets[index]} * kGatherUnitBytes;
  uint8_t* const own_rows = begin + in_tile * kGatherUnitBytes;
  uint8_t* const all_quads = begin + slices * kGatherUnitBytes;
  if (lane < kGatherSliceRows) {
    reinterpret_cast<uint16_t*>(own_rows)[lane] = static_cast<uint16_t>(slice.row(lane));
  }
  // The first warp writes the padding after the quads too.
  const int padded = (directory_units(slices) - slices) * kGatherUnitBytes / 2;
  if (lane == 0) reinterpret_cast<uint16_t*>(all_quads)[in_tile] = tile.quads[in_tile];
  for (int i = slices + lane; in_tile == 0 && i < padded; i += 32) {
    reinterpret_cast<uint16_t*>(all_quads)[i] = 0;
  }
  uint32_t first = __shfl_sync(~0U, counts.before, in_tile / 2);
  if (in_tile % 2 != 0) first += LaneSlices::units_of(tile.quads[in_tile - 1]);
  const uint32_t nnz = slice.find_nonzeros();
  if (lane != 0) return;
  const int quads =
      nnz == 0 ? 0
               : slice.store(begin + int64_t{directory_units(slices) + first} * kGatherUnitBytes,
                             tile.quads[in_tile], changed);
  if (nnz != tile.nnz[in_tile] || quads != tile.quads[in_tile]) *changed = 1;
}

Status count(const ValueMatrix& values, int32_t* units, int32_t* nnz, void* scratch,
             cudaStream_t stream) {
  const DenseMatrix matrix = dense_matrix(values);
  const unsigned tiles = tiles_of(matrix.m, matrix.k);
  if (tiles == 0) return Status::success();
  auto* const tile_scratch = static_cast<TileScratch*>(scratch);
  order_kernel<<<tiles, kOrderThreads, 0, stream>>>(matrix, tile_scratch);
  count_kernel<<<tiles * kGatherTileSlices, 32, bits_bytes(matrix.k), stream>>>(matrix,
                                                                                tile_scratch);
  units_kernel<<<tiles, 32, 0, stream>>>(matrix, tile_scratch, units, nnz);
  return cuda::check(cudaGetLastError(), "gather count_kernel launch");
}

Status pack(const ValueMatrix& matrix, const int32_t* offsets, const int32_t* /*nnz*/,
            uint32_t* payload, int32_t* changed, void* scratch, cudaStream_t stream) {
  const unsigned tiles = tiles_of(matrix.m, matrix.k);
  if (tiles == 0) return Status::success();
  pack_kernel<<<tiles * kGatherTileSlices, 32, bits_bytes(matrix.k), stream>>>(
      dense_matrix(matrix), static_cast<const TileScratch*>(scratch), offsets,
      reinterpret_cast<uint8_t*>(payload), changed);
  return cuda::check(cudaGetLastError(), "gather pack_kernel launch");
}

// CTAs of a kernel that has one for each slice of each part.
unsigned slice_ctas(const PackedView& view) {
  return static_cast<unsigned>(gather_slices(view.m)) * static_cast<unsigned>(gather_parts(view.k));
}

Status unpack(const PackedView& view, uint16_t* dense, cudaStream_t stream) {
  if (slice_ctas(view) == 0) return Status::success();
  const Status sized =
      allow_smem("cudaFuncSetAttribute(gather unpack_kernel)", unpack_kernel, kWindowBytes);
  if (!sized.ok()) return sized;
  unpack_kernel<<<slice_ctas(view), kThreads, kWindowBytes, stream>>>(GatherWeight(view), dense);
  return cuda::check(cudaGetLastError(), "gather unpack_kernel launch");
}

Status count_stored(const PackedView& view, int64_t* total, cudaStream_t stream) {
  if (slice_ctas(view) == 0) return Status::success();
  count_stored_kernel<<<slice_ctas(view), kThreads, 0, stream>>>(GatherWeight(view), total);
  return cuda::check(cudaGetLastError(), "gather count_stored_kernel launch");
}

}  // namespace

cuda::PackKernels cuda::gather_kernels() {
  return {count, pack, unpack, count_stored, sizeof(TileScratch)};
}

}  // namespace flash_llm
