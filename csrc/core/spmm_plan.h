// Which kernel multiplies, and how its work is cut: a pure function of the problem and the device,
// so that it can be tested without a GPU, printed in a bug report, and forced from a test.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/bitmap.h"
#include "core/cpu_isa.h"
#include "core/spmm.h"
#include "core/status.h"
#include "core/tiled_csl.h"

namespace flash_llm {

// What a plan may depend on. compute_capability is 10 * major + minor, and 0 means the CPU.
struct DeviceInfo {
  int compute_capability = 0;
  int num_sms = 0;
  int smem_per_sm_bytes = 0;
  // Whether code for sm_90a, which no other device runs, can run here: the GPU is a Hopper and the
  // build has such code.
  bool has_sm90a = false;
  // Of the CPU's kernels.
  CpuIsa cpu_isa = CpuIsa::kPortable;
  // See cpu_isa.h.
  bool cpu_fast_dense_bf16 = false, cpu_fast_dense_fp16 = false;
};

// Fills in what concerns the CPU. Fails as select_cpu_isa does.
Status detect_cpu(DeviceInfo* device);

enum class SpmmRoute {
  kCpuReference,  // spmm_cpu_reference
  kCpuTiles,      // spmm_cpu_tiles
  kCpuRows,       // spmm_cpu_rows
  kCpuBlocks,     // Row bitmap: blocks of rows are decoded, and multiplied by the dense GEMM
  kLscd,          // Tiled-CSL on CUDA: load as sparse, compute as dense
  kBitmap,        // Bitmap on sm_90a
  kDense,         // unpack, then the vendor's dense GEMM; CPU and CUDA
};

// One built instantiation of the CUDA kernel. The kernel sources, the launch table, the test matrix
// and Python's list of configurations all expand this list.
//   name, warps that share a tile, columns of X per CTA, CTAs that fit an SM's registers, and
//   whether X is first reordered into fragments (pays off once several warps or many columns read
//   it)
// clang-format off
#define FLASH_LLM_LSCD_CONFIGS(row) \
  row(w1n8, 1, 8, 3, false)         \
  row(w1n16, 1, 16, 3, false)       \
  row(w2n32, 2, 32, 3, true)        \
  row(w4n64, 4, 64, 2, true)
// clang-format on

struct LscdConfig {
  const char* name;
  int warps_per_tile;
  int tile_n;
  int ctas_per_sm;  // by registers; shared memory may allow fewer
  bool packed_x;
};

inline constexpr int kLscdCtaWarps = 4;
// Elements between rows of X (and so K) that the kernel can address: 16 rows, in units of 16 bytes,
// must fit 31 bits.
inline constexpr int64_t kMaxLscdStride = int64_t{1} << 29;
inline constexpr int kTileBytes = kTileElems * 2;

const std::vector<LscdConfig>& lscd_configs();

// Shared memory of one CTA: a decoded tile for each group of warps that share one.
constexpr int lscd_smem_bytes(const LscdConfig& config) {
  return kLscdCtaWarps / config.warps_per_tile * kTileBytes;
}

// Bytes of sums in the workspace: a CTA leaves at most two partial tile rows behind, its first and
// its last.
constexpr int64_t lscd_sums_bytes(const LscdConfig& config, int64_t ctas) {
  return 2 * ctas * kTileM * config.tile_n * static_cast<int64_t>(sizeof(float));
}

// Bytes of X in fragment order, which follow the sums.
constexpr int64_t lscd_packed_x_bytes(const LscdConfig& config, int64_t n, int64_t k) {
  const int64_t tokens = (n + config.tile_n - 1) / config.tile_n * config.tile_n;
  return config.packed_x ? tokens * num_tile_cols(k) * kTileK * 2 : 0;
}

// The same for the bitmap kernel, one CTA per SM:
//   name, columns of X per CTA, warps that multiply, strips of 16 rows per warp (2 is a whole
//   chunk; with 1 two warps share a chunk, which leaves registers for more columns), CTAs in a
//   cluster (which read X from L2 once for all of them), and stages of X that wait in shared
//   memory, of 64 or 128 columns of K
// clang-format off
#define FLASH_LLM_BITMAP_CONFIGS(row) \
  row(n8, 8, 16, 2, 1, 8)             \
  row(n16, 16, 16, 2, 1, 8)           \
  row(n32, 32, 16, 2, 1, 8)           \
  row(n64, 64, 16, 1, 2, 8)           \
  row(n128, 128, 16, 1, 2, 4)         \
  row(n256, 256, 8, 1, 2, 4)
// clang-format on

struct BitmapConfig {
  const char* name;
  int tile_n;
  int warps;
  int strips;
  int cluster;
  int x_stages;

  // A CTA works on so many chunks at a time, and a cluster on so many rows of W.
  constexpr int chunks() const { return warps * strips * kStripM / kChunkM; }
  constexpr int block_m() const { return cluster * chunks() * kChunkM; }
  // Chunks come through rings of bytes, at most 8 of a column through one.
  constexpr int rings() const { return chunks() > 8 ? chunks() / 8 : 1; }
};

const std::vector<BitmapConfig>& bitmap_configs();

// Whether all sums go through the workspace to the kernel that finishes them. For many tokens that
// is too much: the main kernel itself then stores what it has done alone, and because it has no
// registers left for the activation, a kernel of the caller's applies that to the rounded sums, as
// on the dense route.
constexpr bool bitmap_finishes_all(int tile_n) { return tile_n <= 64; }

// Bytes of sums in the workspace. A slot holds those of a row of blocks: where all sums are
// finished elsewhere, from one slot to the next either the cluster or the row is another; else a
// cluster leaves at most two rows behind, its first and its last.
constexpr int64_t bitmap_sums_bytes(const BitmapConfig& config, int64_t clusters, int64_t rows) {
  const int64_t slots = bitmap_finishes_all(config.tile_n) ? clusters + rows : 2 * clusters;
  return slots * config.block_m() * config.tile_n * static_cast<int64_t>(sizeof(float));
}

// Whether plain chunks are multiplied by wgmma or by mma.sync. A wgmma with its A in registers
// takes 30 cycles of the tensor cores however few the columns of B; at 8 that made 45 us of 57 us
// at 70 % zeros. (wgmma.sp, which takes twice the columns of A at once, costs no more than mma.sp.)
constexpr bool bitmap_uses_wgmma(int tile_n) { return tile_n > 16; }

// Fragments of a strip that are decoded before any is multiplied: two batches are in registers.
constexpr int bitmap_batch(int tile_n, int strips) {
  return tile_n == 128 || (tile_n == 32 && strips == 2) ? 1 : 2;
}

// Shared memory of one CTA of the bitmap kernel (cuda/bitmap_smem.cuh): fixed parts, and rings
// that take all the rest.
// Chunks of a column that are brought together, and whose place in the ring becomes free together,
// at most.
inline constexpr int kBitmapGroupChunks = 8;
constexpr int bitmap_group_chunks(int chunks) {
  return chunks < kBitmapGroupChunks ? chunks : kBitmapGroupChunks;
}
inline constexpr int kBitmapGroupStages = 8;  // columns of a group in the ring, at most
inline constexpr int kBitmapPairsAhead = 8;   // pairs of columns whose offsets are on their way
inline constexpr int kXBoxK = 64;  // columns of a box of X's tensor map: 128 bytes, a swizzle span
inline constexpr int kBitmapGuardBytes = 34 * kChunkRowBytes;  // after the ring
// Left free, so that CTAs of the finishing kernel are there before the main kernel's end.
inline constexpr int kBitmapSpareSmemBytes = 3 * 1024;

// Boxes of a stage of X. (With two, ptxas no longer follows which wgmma is still under way.)
constexpr int bitmap_x_boxes(int tile_n) { return bitmap_uses_wgmma(tile_n) ? 1 : 2; }
constexpr int bitmap_transposed_x_bytes(int tile_n) {
  return kTwoFourK * 2 * (tile_n < 64 ? tile_n : 64);
}
constexpr int bitmap_fixed_smem_bytes(int tile_n, int x_stages) {
  // 1024 for the alignment of what follows; then X, X transposed, an empty chunk, what is said of
  // the chunks in the ring, the offsets ahead, barriers, and the guard.
  return 1024 + x_stages * bitmap_x_boxes(tile_n) * tile_n * kXBoxK * 2 +
         bitmap_transposed_x_bytes(tile_n) + kTwoFourFixedBytes + 16 * kBitmapGroupStages * 8 +
         2 * kBitmapPairsAhead * 32 * 8 +
         8 * (2 * 16 / kBitmapGroupChunks * kBitmapGroupStages + 2 * x_stages + 2) + 128 +
         kBitmapGuardBytes;
}
constexpr int bitmap_smem_bytes(const BitmapConfig& config, int ring_bytes) {
  return bitmap_fixed_smem_bytes(config.tile_n, config.x_stages) + ring_bytes;
}
// Every ring must hold a group of the fullest chunks.
constexpr int bitmap_min_ring_bytes(const BitmapConfig& config) {
  return config.rings() * bitmap_group_chunks(config.chunks()) * kMaxChunkUnits * kChunkUnitBytes;
}

// The format that multiplies fastest on a device, and one sentence why.
struct FormatChoice {
  Format format = Format::kTiledCsl;
  std::string reason;
};

FormatChoice select_format(int64_t m, int64_t k, int64_t nnz, const DeviceInfo& device);

// Rows that the route kCpuBlocks decodes at a time.
int64_t cpu_block_rows(int64_t k);

struct SpmmPlan {
  SpmmRoute route = SpmmRoute::kCpuTiles;
  int config = -1;     // index into the route's configurations, or -1
  int64_t ctas = 0;    // kernels of ours: grid size; work is cut evenly between them (stream-K)
  int ring_bytes = 0;  // kBitmap: shared memory for chunks
  int unit_cols = 1;   // kBitmap: columns of chunks that are not divided between CTAs
  // Whether the kernel leaves the activation to the caller.
  bool rounds_before_activation = false;
  // Temporary memory: fp32 partial sums and then X in fragment order (kLscd), fp32 partial sums
  // (kBitmap), or the dense weight (kDense).
  int64_t workspace_bytes = 0;
  int64_t packed_x_bytes = 0;  // the second part of it
  std::string reason;          // one sentence, with the measurement behind it

  // "w1n8", "n8", "dense", "cpu_tiles", "cpu_rows", "cpu_blocks" or "cpu_reference": what `config`
  // of the operator takes.
  std::string name() const;
  std::string to_string() const;
};

// Refuses to run a kernel of `route`, which needs `workspace_bytes`, by a plan that was not made
// for it, or for arguments that the plan does not fit.
Status check_plan(const SpmmPlan& plan, SpmmRoute route, const SpmmArgs& args,
                  int64_t workspace_bytes);

// Names that the operator's `config` argument takes for a format on this kind of device, "auto"
// excepted.
std::vector<std::string> plan_names(Format format, bool cuda);

// config = "auto" chooses; any other name forces that kernel. ctas = 0 chooses the grid (the CPU
// and the dense route have none).
Status select_plan(const SpmmProblem& problem, const DeviceInfo& device, const std::string& config,
                   int64_t ctas, SpmmPlan* out);

}  // namespace flash_llm
