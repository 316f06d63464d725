// The bitmap format on the device: count, pack and unpack, one warp per chunk. A chunk passes
// through shared memory, so that global memory is touched in whole rows. bitmap_pack writes the
// same bytes as core/bitmap.cpp: lanes are ranked by comparing counts instead of sorting them.
#include <cstdint>

#include "core/bitmap.h"
#include "cuda/bitmap_decode.cuh"
#include "cuda/dense_matrix.cuh"
#include "cuda/launch.h"
#include "cuda/ptx_sm80.cuh"

namespace flash_llm {
namespace {

constexpr int kWarps = 2;
constexpr int kThreads = kWarps * 32;
constexpr uint32_t kAllLanes = ~0U;
// A row of a dense chunk in shared memory, padded so that a fragment's eight rows of four words
// meet 32 different banks.
constexpr int kDenseRowWords = kChunkK / 2 + 4;
constexpr int kMaxChunkBytes = (2 * kMaxChunkRows + kChunkFixedUnits) * kChunkUnitBytes;

// The chunk that this warp works on.
struct ChunkOrigin {
  int64_t row0, col0;
  int rows, cols;
  int64_t index;  // where it is stored; -1 for a warp without a chunk

  __device__ ChunkOrigin(int64_t m, int64_t k) {
    const int64_t nth = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
    const int64_t chunk_rows = num_chunk_rows(m), chunk_cols = num_chunk_cols(k);
    const int64_t row = nth / chunk_cols, col = nth % chunk_cols;
    index = row < chunk_rows ? chunk_index(row, col, chunk_rows, chunk_cols) : -1;
    row0 = row * kChunkM;
    col0 = col * kChunkK;
    rows = static_cast<int>(min(int64_t{kChunkM}, m - row0));
    cols = static_cast<int>(min(int64_t{kChunkK}, k - col0));
  }
};

unsigned num_ctas(int64_t m, int64_t k) {
  return static_cast<unsigned>((num_chunk_rows(m) * num_chunk_cols(k) + kWarps - 1) / kWarps);
}

// The dense chunk, zero outside the matrix.
__device__ void load_dense_chunk(const DenseMatrix& dense, const ChunkOrigin& origin, int lane,
                                 uint32_t (*words)[kDenseRowWords]) {
  const bool aligned = dense.ld % 4 == 0 && reinterpret_cast<uintptr_t>(dense.data) % 8 == 0;
  for (int row = 0; row < kChunkM; ++row) {  // a lane takes four columns
    uint2 v = make_uint2(0, 0);
    const int col = lane * 4;
    if (row < origin.rows) {
      const uint16_t* source = dense.row(origin.row0 + row) + origin.col0 + col;
      if (aligned && col + 4 <= origin.cols) {
        v = *reinterpret_cast<const uint2*>(source);
      } else {
        uint32_t value[4] = {};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (col + c < origin.cols) value[c] = source[c];
        }
        v = make_uint2(value[0] | value[1] << 16, value[2] | value[3] << 16);
      }
    }
    words[row][lane * 2] = v.x;
    words[row][lane * 2 + 1] = v.y;
  }
  __syncwarp();
}

// Registers (two elements) of a lane in a dense chunk: fragment 0..7, register 0..3.
__device__ __forceinline__ uint32_t* fragment_word(uint32_t (*words)[kDenseRowWords], int lane,
                                                   int strip, int fragment, int reg) {
  return &words[strip * kStripM + lane / 4 + reg % 2 * 8][fragment * 8 + reg / 2 * 4 + lane % 4];
}

__device__ __forceinline__ uint32_t nonzero_bits(uint32_t word) {
  return static_cast<uint32_t>((word & 0x7FFFU) != 0) |
         static_cast<uint32_t>((word & 0x7FFF0000U) != 0) << 8;
}

struct LaneBits {
  uint32_t word[2][2];  // [half][strip]

  __device__ LaneBits(uint32_t (*words)[kDenseRowWords], int lane) : word{} {
#pragma unroll
    for (int strip = 0; strip < 2; ++strip) {
#pragma unroll
      for (int fragment = 0; fragment < 8; ++fragment) {
#pragma unroll
        for (int reg = 0; reg < 4; ++reg) {
          const uint32_t bits = nonzero_bits(*fragment_word(words, lane, strip, fragment, reg));
          word[fragment / 4][strip] |= bits << (reg % 2 * 16 + fragment % 4 * 2 + reg / 2);
        }
      }
    }
  }
};

// Rank of this lane among 32 when sorted by (count, lane).
__device__ int rank_of(int count, int lane) {
  int rank = 0;
  for (int other = 0; other < 32; ++other) {
    const int theirs = __shfl_sync(kAllLanes, count, other);
    rank += theirs < count || (theirs == count && other < lane);
  }
  return rank;
}

// The value of the lane whose rank is this lane's index.
__device__ int sorted(int value, int rank, int lane) {
  int found = 0;
  for (int other = 0; other < 32; ++other) {
    const int their_rank = __shfl_sync(kAllLanes, rank, other);
    const int theirs = __shfl_sync(kAllLanes, value, other);
    if (their_rank == lane) found = theirs;
  }
  return found;
}

struct LaneLayout {
  int rows;
  int sigma[2];  // by strip

  // core/bitmap.cpp: chunk_layout.
  __device__ LaneLayout(const LaneBits& bits, int lane) : rows(kMaxChunkRows + 1), sigma{} {
    int down_rank[2], falling_down[2];  // falling_down: the lane-th longest downward run
#pragma unroll
    for (int strip = 0; strip < 2; ++strip) {
      const int down = __popc(bits.word[1][strip]);
      down_rank[strip] = 31 - rank_of(down, lane);
      falling_down[strip] = sorted(down, down_rank[strip], lane);
    }
    for (int pattern = 0; pattern < kSwapPatterns; ++pattern) {
      const bool swapped = swaps_slots(pattern, lane);
      int tried_rows = 0, tried_sigma[2];
#pragma unroll
      for (int strip = 0; strip < 2; ++strip) {
        const int slot = swapped ? 1 - strip : strip;
        const int up = __popc(slot == 0 ? bits.word[0][0] : bits.word[0][1]);
        const int up_rank = rank_of(up, lane);
        const int together = up + __shfl_sync(kAllLanes, falling_down[strip], up_rank);
        tried_rows = max(tried_rows, __reduce_max_sync(kAllLanes, together));
        const int rising_slot = sorted(4 * lane + 2 * slot, up_rank, lane);
        tried_sigma[strip] = __shfl_sync(kAllLanes, rising_slot, down_rank[strip]);
      }
      if (tried_rows < rows) {
        rows = tried_rows;
        sigma[0] = tried_sigma[0];
        sigma[1] = tried_sigma[1];
      }
    }
  }
};

__global__ void __launch_bounds__(kThreads)
    count_kernel(DenseMatrix dense, int32_t* units, int32_t* nnz) {
  __shared__ __align__(16) uint32_t words[kWarps][kChunkM][kDenseRowWords];
  const ChunkOrigin origin(dense.m, dense.k);
  if (origin.index < 0) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  load_dense_chunk(dense, origin, lane, words[warp]);
  const LaneBits bits(words[warp], lane);
  const int stored = __popc(bits.word[0][0]) + __popc(bits.word[0][1]) + __popc(bits.word[1][0]) +
                     __popc(bits.word[1][1]);
  const int count = __reduce_add_sync(kAllLanes, stored);
  const LaneLayout layout(bits, lane);
  if (lane == 0) {
    nnz[origin.index] = count;
    units[origin.index] = count == 0 ? 0 : chunk_units(layout.rows);
  }
}

__global__ void __launch_bounds__(kThreads)
    pack_kernel(DenseMatrix dense, const int32_t* __restrict__ offsets,
                uint32_t* __restrict__ payload) {
  __shared__ __align__(16) uint32_t words[kWarps][kChunkM][kDenseRowWords];
  __shared__ __align__(16) uint8_t packed[kWarps][kMaxChunkBytes];
  const ChunkOrigin origin(dense.m, dense.k);
  if (origin.index < 0 || offsets[origin.index] == offsets[origin.index + 1]) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  load_dense_chunk(dense, origin, lane, words[warp]);
  const LaneBits bits(words[warp], lane);
  const LaneLayout layout(bits, lane);

  uint8_t* out = packed[warp];
  const int value_bytes = layout.rows * kChunkRowBytes;
  for (int i = lane; i < value_bytes / 16; i += 32) {
    reinterpret_cast<uint4*>(out)[i] = make_uint4(0, 0, 0, 0);
  }
  __syncwarp();
  reinterpret_cast<uint4*>(out + value_bytes)[lane] =
      make_uint4(bits.word[0][0], bits.word[0][1], bits.word[1][0], bits.word[1][1]);
  reinterpret_cast<uint16_t*>(out + value_bytes + kChunkBitsBytes)[lane] =
      static_cast<uint16_t>(layout.sigma[0] | layout.sigma[1] << 8);
  for (int half = 0; half < 2; ++half) {
    for (int strip = 0; strip < 2; ++strip) {
      const uint32_t word = bits.word[half][strip];
      uint8_t* end = out + (half == 0 ? lane * 4 + strip * 2
                                      : (layout.rows - 1) * kChunkRowBytes + layout.sigma[strip]);
      const int step = half == 0 ? kChunkRowBytes : -kChunkRowBytes;
      for (int quad = 0; quad < kQuads; ++quad) {
        const int fragment = half * 4 + quad / 2;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int elem = quad_order(i);
          if ((word >> chunk_bit(quad, elem) & 1U) == 0) continue;
          const uint32_t pair =
              *fragment_word(words[warp], lane, strip, fragment, quad % 2 * 2 + elem / 2);
          *reinterpret_cast<uint16_t*>(end) = static_cast<uint16_t>(pair >> (elem % 2 * 16));
          end += step;
        }
      }
    }
  }
  __syncwarp();
  auto* target =
      reinterpret_cast<uint4*>(payload + int64_t{offsets[origin.index]} * kChunkUnitWords);
  const int vectors = chunk_units(layout.rows) * kChunkUnitBytes / 16;
  for (int i = lane; i < vectors; i += 32) target[i] = reinterpret_cast<const uint4*>(out)[i];
}

template <int kHalf>
__device__ void decode_half(const ChunkCursor& cursor, int strip, int lane,
                            uint32_t (*words)[kDenseRowWords]) {
  constexpr int kStep = kHalf == 0 ? kChunkRowBytes : -kChunkRowBytes;
  const uint32_t bits = cursor.bits[2 * kHalf + strip];
  uint32_t position = kHalf == 0 ? cursor.up[strip] : cursor.down[strip];
  uint32_t reg[4][4];
  decode_fragment<0, kStep>(bits, position, reg[0]);
  decode_fragment<1, kStep>(bits, position, reg[1]);
  decode_fragment<2, kStep>(bits, position, reg[2]);
  decode_fragment<3, kStep>(bits, position, reg[3]);
#pragma unroll
  for (int fragment = 0; fragment < 4; ++fragment) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      *fragment_word(words, lane, strip, kHalf * 4 + fragment, i) = reg[fragment][i];
    }
  }
}

__global__ void __launch_bounds__(kThreads) unpack_kernel(PackedView view, uint16_t* dense) {
  // The decoder reads up to two rows beyond a run, and malformed bits send it up to 33 rows beyond;
  // what it finds there does not matter, but it must be ours.
  constexpr int kGuard = 34 * kChunkRowBytes;
  __shared__ __align__(16) uint32_t words[kWarps][kChunkM][kDenseRowWords];
  __shared__ __align__(16) uint8_t packed[kGuard + kWarps * kMaxChunkBytes];
  const ChunkOrigin origin(view.m, view.k);
  if (origin.index < 0) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t units = view.payload_words / kChunkUnitWords;
  const int64_t first = max(int64_t{0}, min(int64_t{view.offsets[origin.index]}, units));
  const int64_t last = max(first, min(int64_t{view.offsets[origin.index + 1]}, units));
  const int rows = chunk_value_rows(last - first);
  uint8_t* staged = packed + kGuard + warp * kMaxChunkBytes;
  if (rows >= 0) {
    const auto* source = reinterpret_cast<const uint4*>(view.payload + first * kChunkUnitWords);
    const int vectors = chunk_units(rows) * kChunkUnitBytes / 16;
    for (int i = lane; i < vectors; i += 32) {
      reinterpret_cast<uint4*>(staged)[i] = ptx::load_streaming(source + i);
    }
  }
  __syncwarp();
  const ChunkCursor cursor(ptx::smem_address(staged), max(rows, 0) * kChunkRowBytes, rows >= 0,
                           lane);
#pragma unroll
  for (int strip = 0; strip < 2; ++strip) {
    decode_half<0>(cursor, strip, lane, words[warp]);
    decode_half<1>(cursor, strip, lane, words[warp]);
  }
  __syncwarp();

  const bool aligned = view.k % 8 == 0;  // rows then begin at 16-byte boundaries
  for (int i = lane; i < kChunkM * kChunkK / 8; i += 32) {
    const int row = i / (kChunkK / 8), col = i % (kChunkK / 8) * 8;
    if (row >= origin.rows || col >= origin.cols) continue;
    const uint32_t* word = &words[warp][row][col / 2];
    uint16_t* out = dense + (origin.row0 + row) * view.k + origin.col0 + col;
    if (aligned && col + 8 <= origin.cols) {
      *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(word);
    } else {
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        if (col + c < origin.cols) out[c] = static_cast<uint16_t>(word[c / 2] >> (c % 2 * 16));
      }
    }
  }
}

Status count(const uint16_t* dense, int64_t ld, int64_t m, int64_t k, int32_t* units, int32_t* nnz,
             cudaStream_t stream) {
  if (m == 0 || k == 0) return Status::success();
  count_kernel<<<num_ctas(m, k), kThreads, 0, stream>>>({dense, ld, m, k}, units, nnz);
  return cuda::check(cudaGetLastError(), "bitmap count_kernel launch");
}

Status pack(const uint16_t* dense, int64_t ld, int64_t m, int64_t k, const int32_t* offsets,
            uint32_t* payload, cudaStream_t stream) {
  if (m == 0 || k == 0) return Status::success();
  pack_kernel<<<num_ctas(m, k), kThreads, 0, stream>>>({dense, ld, m, k}, offsets, payload);
  return cuda::check(cudaGetLastError(), "bitmap pack_kernel launch");
}

Status unpack(const PackedView& view, uint16_t* dense, cudaStream_t stream) {
  if (view.m == 0 || view.k == 0) return Status::success();
  unpack_kernel<<<num_ctas(view.m, view.k), kThreads, 0, stream>>>(view, dense);
  return cuda::check(cudaGetLastError(), "bitmap unpack_kernel launch");
}

}  // namespace

cuda::PackKernels cuda::bitmap_kernels() { return {count, pack, unpack}; }

}  // namespace flash_llm
