// Packs the quantised bitmap format on the GPU. A CTA has a strip, and a warp one chunk of it after
// the other: its lanes hold the elements as the format assigns them to lanes, agree on how their
// runs are paired, and place the values in shared memory.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/dense_matrix.cuh"
#include "cuda/launch.h"
#include "cuda/quantized_bitmap/pack.h"
#include "format/packed_checks.h"
#include "format/quantized_bitmap.h"

namespace flash_llm {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;

// The matrix to pack: a byte for each value.
struct ByteMatrix {
  const uint8_t* values;
  int64_t ld, m, k;
  const float* scales;  // [m], or [m, groups of columns]
  bool words;           // whether every row begins at a multiple of 4 bytes

  explicit ByteMatrix(const ValueMatrix& matrix)
      : values(static_cast<const uint8_t*>(matrix.values)),
        ld(matrix.ld),
        m(matrix.m),
        k(matrix.k),
        scales(matrix.scales),
        words((reinterpret_cast<uintptr_t>(values) | static_cast<uint64_t>(ld)) % 4 == 0) {}

  // Four elements of a row from column `col` on, with zeros outside the matrix.
  __device__ __forceinline__ uint32_t load_four(int64_t row, int64_t col) const {
    if (row >= m || col >= k) return 0;
    const uint8_t* from = values + row * ld + col;
    if (words && col + 4 <= k) return *reinterpret_cast<const uint32_t*>(from);
    uint32_t four = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (col + e < k) four |= uint32_t{from[e]} << 8 * e;
    }
    return four;
  }
};

// Bit 4 e says whether byte e is stored: a byte of ±0 is not.
__device__ __forceinline__ uint32_t stored_bytes(uint32_t four) {
  const uint32_t stored = ((four & 0x7F7F7F7FU) + 0x7F7F7F7FU) >> 7;
  return (stored & 1U) | (stored >> 4 & 0x10U) | (stored >> 8 & 0x100U) | (stored >> 12 & 0x1000U);
}

// A lane's part of 16 rows by 256 columns. All lanes of a warp must call its functions.
struct Plane {
  // Four neighbouring columns of each fragment: the low elements and the high ones.
  uint32_t values[kQuantWords][kQuantFragments][2];
  uint32_t bits[kQuantWords];  // as they are stored
  int up, down;                // how many values each run has
  int column;                  // of the downward run

  // From row `row` and column `col` on.
  __device__ __forceinline__ Plane(const ByteMatrix& matrix, int64_t row, int64_t col, int lane) {
#pragma unroll
    for (int i = 0; i < kQuantWords * kQuantFragments * 2; ++i) {
      const int q = i / (2 * kQuantFragments), j = i / 2 % kQuantFragments, high = i % 2;
      values[q][j][high] =
          matrix.load_four(row + quant_row(lane, high), col + quant_col(q, j, lane, 0));
    }
#pragma unroll
    for (int q = 0; q < kQuantWords; ++q) {
      bits[q] = 0;
#pragma unroll
      for (int j = 0; j < kQuantFragments; ++j) {
        bits[q] |= stored_bytes(values[q][j][0]) << quant_bit(j, 0, 0) |
                   stored_bytes(values[q][j][1]) << quant_bit(j, 1, 0);
      }
    }
    up = __popc(bits[0]) + __popc(bits[1]);
    down = __popc(bits[2]) + __popc(bits[3]);
  }

  __device__ __forceinline__ int count() const { return __reduce_add_sync(~0U, up + down); }

  // Bit r says whether row r has a value in words kFirst to kLast - 1.
  template <int kFirst, int kLast>
  __device__ __forceinline__ uint32_t rows_with_values(int lane) const {
    uint32_t any = 0;
#pragma unroll
    for (int q = kFirst; q < kLast; ++q) any |= bits[q];
    return __reduce_or_sync(~0U, (any & 0xFFFFU) == 0 ? 0 : 1U << quant_row(lane, 0)) |
           __reduce_or_sync(~0U, any >> 16 == 0 ? 0 : 1U << quant_row(lane, 1));
  }

  // Pairs the runs, which sets `column`, and returns the rows of values that they need.
  __device__ __forceinline__ int pair_runs(int lane) {
    const int up_key = up * 32 + lane, down_key = down * 32 + lane;
    int up_rank = 0, down_rank = 0;
#pragma unroll 8
    for (int other = 0; other < 32; ++other) {
      up_rank += __shfl_sync(~0U, up_key, other) < up_key;
      down_rank += __shfl_sync(~0U, down_key, other) < down_key;
    }
    column = 0;
#pragma unroll 8
    for (int other = 0; other < 32; ++other) {
      if (__shfl_sync(~0U, up_rank, other) == 31 - down_rank) column = other;
    }
    const int bytes = __shfl_sync(~0U, up, column) + down;
    return (__reduce_max_sync(~0U, bytes) + 3) / 4;
  }

  // Calls put(offset, value) for each of the lane's values, where `offset` is its byte in `rows`
  // rows of values. No two lanes have the same offset.
  template <typename Put>
  __device__ __forceinline__ void place_values(int rows, int lane, const Put& put) const {
#pragma unroll
    for (int run = 0; run < 2; ++run) {
      int place = run == 0 ? 0 : 4 * rows - 1;
      const int first = 4 * (run == 0 ? lane : column);
#pragma unroll
      for (int i = 0; i < kQuantWords / 2 * kQuantFragments * 8; ++i) {
        const int q = 2 * run + i / (8 * kQuantFragments), j = i / 8 % kQuantFragments;
        const int high = i / 4 % 2, e = high == 0 ? i % 4 : 3 - i % 4;
        if ((bits[q] >> quant_bit(j, high, e) & 1) == 0) continue;
        put(place / 4 * kQuantRowBytes + first + place % 4,
            static_cast<uint8_t>(values[q][j][high] >> 8 * e));
        place += run == 0 ? 1 : -1;
      }
    }
  }

  __device__ __forceinline__ void store_bits(uint32_t* to, int lane) const {
#pragma unroll
    for (int q = 0; q < kQuantWords; ++q) to[q * 32 + lane] = bits[q];
  }
};

// A warp's chunk. All lanes must call its functions.
template <ValueType kType>
struct Chunk {
  static constexpr int kPlanes = quant_planes(kType);
  static constexpr ValueKind kKind = value_traits(kType).kind;

  Plane planes[kPlanes];

  __device__ __forceinline__ static Chunk load(const ByteMatrix& matrix, int64_t row, int64_t chunk,
                                               int lane) {
    const int64_t col = chunk * quant_chunk_k(kType);
    if constexpr (kPlanes == 2) {
      return {{Plane(matrix, row, col, lane), Plane(matrix, row, col + kQuantPlaneK, lane)}};
    } else {
      return {{Plane(matrix, row, col, lane)}};
    }
  }

  __device__ __forceinline__ int count() const {
    int sum = 0;
#pragma unroll
    for (const Plane& plane : planes) sum += plane.count();
    return sum;
  }

  __device__ __forceinline__ int pair_runs(int lane) {
    int rows = 0;
#pragma unroll
    for (Plane& plane : planes) rows = max(rows, plane.pair_runs(lane));
    return rows;
  }

  // Writes the chunk to shared memory, which is 0 where the values go.
  __device__ __forceinline__ void store(uint8_t* to, int rows, int lane) const {
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      planes[p].place_values(rows, lane, [&](int offset, uint8_t value) {
        if constexpr (kKind == ValueKind::kInt4) {
          const int nibble = (value + 8) & 0xF;
          to[offset] = static_cast<uint8_t>(p == 0 ? nibble : to[offset] | nibble << 4);
        } else {
          to[offset] = kKind == ValueKind::kInt8 ? static_cast<uint8_t>(value ^ kQuantZero) : value;
        }
      });
      __syncwarp();  // the next plane's values share bytes with these
    }
    uint8_t* const above = to + rows * kQuantRowBytes;
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      planes[p].store_bits(reinterpret_cast<uint32_t*>(above + p * kQuantBitsBytes), lane);
      above[kPlanes * kQuantBitsBytes + p * kQuantColumnsBytes + lane] =
          static_cast<uint8_t>(4 * planes[p].column);
    }
  }

  // Writes the scales of the chunk's groups to those of its strip: uint16[groups][16 rows].
  __device__ __forceinline__ void store_group_scales(const ByteMatrix& matrix, int64_t row0,
                                                     int64_t chunk, int lane, uint16_t* to) const {
    const int64_t groups = scales_per_row(kType, matrix.k);
#pragma unroll
    for (int g = 0; g < 2 * kPlanes; ++g) {
      const Plane& plane = planes[g / 2];
      const uint32_t scaled = g % 2 == 0 ? plane.template rows_with_values<0, 2>(lane)
                                         : plane.template rows_with_values<2, 4>(lane);
      const int64_t group = chunk * 2 * kPlanes + g;
      if (group >= groups || lane >= kQuantStripM) continue;
      const float scale =
          (scaled >> lane & 1) != 0 ? matrix.scales[(row0 + lane) * groups + group] : kNoScale;
      to[group * kQuantStripM + lane] = __half_as_ushort(__float2half_rn(scale));
    }
  }
};

template <ValueType kType>
__device__ __forceinline__ int units_of(int rows) {
  return rows == 0 ? 0 : rows * kQuantRowUnits + quant_fixed_units(kType);
}

template <ValueType kType>
__global__ void __launch_bounds__(kThreads)
    count_kernel(const __grid_constant__ ByteMatrix matrix, int32_t* units, int32_t* nnz) {
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int64_t chunks = num_quant_chunks(kType, matrix.k), first = blockIdx.x * chunks;
  int first_units = 0, stored = 0;
  for (int64_t col = warp; col < chunks; col += kWarps) {
    auto chunk = Chunk<kType>::load(matrix, int64_t{blockIdx.x} * kQuantStripM, col, lane);
    const int count = chunk.count(), own_units = units_of<kType>(chunk.pair_runs(lane));
    if (lane != 0) continue;
    stored += count;
    nnz[first + col] = count;
    if (col == 0) {
      first_units = own_units;
    } else {
      units[first + col] = own_units;
    }
  }
  const int total = cta_sum(stored);
  if (threadIdx.x == 0) {
    const auto scale_units = static_cast<int>(quant_scale_units(kType, matrix.k));
    units[first] = first_units + (total > 0 ? scale_units : 0);
  }
}

template <ValueType kType>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const __grid_constant__ ByteMatrix matrix, const int32_t* __restrict__ offsets,
                const int32_t* __restrict__ nnz, uint32_t* payload, int32_t* changed) {
  constexpr bool kGroupScales = value_traits(kType).scales == ScaleGroup::kRowGroup;
  __shared__ __align__(16) uint8_t stages[kWarps][quant_max_units(kType) * kQuantUnitBytes];
  __shared__ uint32_t rows_with_values;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int64_t chunks = num_quant_chunks(kType, matrix.k), first = blockIdx.x * chunks;
  const int64_t row0 = int64_t{blockIdx.x} * kQuantStripM;
  const int32_t* own = offsets + first;
  const bool empty = own[chunks] == own[0];
  uint32_t* const scales = payload + int64_t{own[0]} * kQuantUnitWords;
  uint8_t* const stage = stages[warp];
  uint32_t found = 0;
  for (int64_t col = warp; col < chunks; col += kWarps) {
    auto chunk = Chunk<kType>::load(matrix, row0, col, lane);
    const int count = chunk.count(), rows = chunk.pair_runs(lane);
    const auto scale_units =
        col == 0 && !empty ? static_cast<int>(quant_scale_units(kType, matrix.k)) : 0;
    if (own[col + 1] - own[col] != units_of<kType>(rows) + scale_units ||
        count != nnz[first + col]) {
      if (lane == 0) *changed = 1;
      continue;
    }
    if constexpr (kGroupScales) {
      if (!empty) {
        chunk.store_group_scales(matrix, row0, col, lane, reinterpret_cast<uint16_t*>(scales));
      }
    } else {
      found |= chunk.planes[0].template rows_with_values<0, kQuantWords>(lane);
    }
    if (rows == 0) continue;
    __syncwarp();  // the chunk before has been copied
    for (int i = lane; i < rows * kQuantRowBytes / 16; i += 32) {
      reinterpret_cast<uint4*>(stage)[i] = make_uint4(0, 0, 0, 0);
    }
    __syncwarp();
    chunk.store(stage, rows, lane);
    __syncwarp();
    auto* to =
        reinterpret_cast<uint4*>(payload + int64_t{own[col] + scale_units} * kQuantUnitWords);
    for (int i = lane; i < units_of<kType>(rows) * kQuantUnitBytes / 16; i += 32) {
      __stcs(to + i, reinterpret_cast<const uint4*>(stage)[i]);
    }
  }
  if (empty || kGroupScales) return;
  if (threadIdx.x == 0) rows_with_values = 0;
  __syncthreads();
  if (lane == 0) atomicOr(&rows_with_values, found);
  __syncthreads();
  if (threadIdx.x < kQuantStripM) {
    const bool scaled = (rows_with_values >> threadIdx.x & 1) != 0;
    scales[threadIdx.x] = __float_as_uint(scaled ? matrix.scales[row0 + threadIdx.x] : kNoScale);
  }
}

unsigned strips_of(const ValueMatrix& matrix) {
  return matrix.k == 0 ? 0 : static_cast<unsigned>(num_quant_strips(matrix.m));
}

// Bytes do not depend on the dtype of the weight, so there is one kernel for each kind of values.
template <ValueType kType>
Status count(const ValueMatrix& matrix, int32_t* units, int32_t* nnz, cudaStream_t stream) {
  count_kernel<kType><<<strips_of(matrix), kThreads, 0, stream>>>(ByteMatrix(matrix), units, nnz);
  return cuda::check(cudaGetLastError(), "quantized bitmap count_kernel launch");
}

template <ValueType kType>
Status pack(const ValueMatrix& matrix, const int32_t* offsets, const int32_t* nnz,
            uint32_t* payload, int32_t* changed, cudaStream_t stream) {
  pack_kernel<kType><<<strips_of(matrix), kThreads, 0, stream>>>(ByteMatrix(matrix), offsets, nnz,
                                                                 payload, changed);
  return cuda::check(cudaGetLastError(), "quantized bitmap pack_kernel launch");
}

Status no_such_values() {
  return Status::invalid_type("the quantised bitmap does not hold 16-bit values");
}

}  // namespace

Status cuda::count_quantized_bitmap(const ValueMatrix& matrix, int32_t* units, int32_t* nnz,
                                    void* /*scratch*/, cudaStream_t stream) {
  if (strips_of(matrix) == 0) return Status::success();
  switch (value_traits(matrix.type).kind) {
    case ValueKind::kInt8:
      return count<ValueType::kInt8Float16>(matrix, units, nnz, stream);
    case ValueKind::kFp8E4m3:
      return count<ValueType::kFp8Float16>(matrix, units, nnz, stream);
    case ValueKind::kInt4:
      return count<ValueType::kInt4Float16>(matrix, units, nnz, stream);
    case ValueKind::k16Bit:
      break;
  }
  return no_such_values();
}

Status cuda::pack_quantized_bitmap(const ValueMatrix& matrix, const int32_t* offsets,
                                   const int32_t* nnz, uint32_t* payload, int32_t* changed,
                                   void* /*scratch*/, cudaStream_t stream) {
  if (strips_of(matrix) == 0) return Status::success();
  switch (value_traits(matrix.type).kind) {
    case ValueKind::kInt8:
      return pack<ValueType::kInt8Float16>(matrix, offsets, nnz, payload, changed, stream);
    case ValueKind::kFp8E4m3:
      return pack<ValueType::kFp8Float16>(matrix, offsets, nnz, payload, changed, stream);
    case ValueKind::kInt4:
      return pack<ValueType::kInt4Float16>(matrix, offsets, nnz, payload, changed, stream);
    case ValueKind::k16Bit:
      break;
  }
  return no_such_values();
}

}  // namespace flash_llm
