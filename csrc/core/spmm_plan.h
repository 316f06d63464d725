// Which kernel multiplies, and how its work is cut: a pure function of the problem and the device,
// so that it can be tested without a GPU, printed in a bug report, and forced from a test.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/bitmap.h"
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
};

enum class SpmmRoute {
  kCpuReference,  // spmm_cpu_reference
  kCpuTiles,      // spmm_cpu_tiles
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

// The same for the bitmap kernel, one CTA per SM:
//   name, columns of X per CTA, warps, strips of 16 rows per warp (2 is a whole chunk; with 1 two
//   warps share a chunk, which leaves registers for more columns), and stages of X (128 columns of
//   K each) that wait in shared memory
// clang-format off
#define FLASH_LLM_BITMAP_CONFIGS(row) \
  row(n8, 8, 16, 2, 8)                \
  row(n16, 16, 16, 2, 8)              \
  row(n32, 32, 16, 2, 4)              \
  row(n64, 64, 16, 2, 2)              \
  row(n128, 128, 16, 1, 2)            \
  row(n256, 256, 8, 1, 2)
// clang-format on

struct BitmapConfig {
  const char* name;
  int tile_n;
  int warps;
  int strips;
  int x_stages;

  // A CTA works on so many rows of W at a time, and so many chunks.
  constexpr int block_m() const { return warps * strips * kStripM; }
  constexpr int chunks() const { return block_m() / kChunkM; }
};

const std::vector<BitmapConfig>& bitmap_configs();

// Each chunk of a CTA comes through a ring of its own. A chunk that is larger than a slot takes the
// whole ring.
inline constexpr int kBitmapSlots = 2;
inline constexpr int kMinBitmapSlotBytes = 35 * kChunkRowBytes;
static_assert(kBitmapSlots * kMinBitmapSlotBytes >= chunk_units(kMaxChunkRows) * kChunkUnitBytes,
              "the fullest chunk must fit the ring");
// Whether the kernel itself stores the rows of blocks that one CTA does alone, so that the
// workspace stays small however many tokens there are. It then has no registers left for an
// activation, which a kernel of the caller's applies to the rounded sums, as on the dense route.
constexpr bool bitmap_stores_rows(int tile_n) { return tile_n > 64; }

constexpr int bitmap_x_stage_bytes(const BitmapConfig& config) {
  return config.tile_n * kChunkK * 2;
}
// Barriers and counters, and what aligning the rest to 1024 bytes may cost.
inline constexpr int kBitmapFixedSmemBytes = 2048;

// Shared memory of one CTA of the bitmap kernel.
constexpr int bitmap_smem_bytes(const BitmapConfig& config, int slot_bytes) {
  return kBitmapFixedSmemBytes + config.x_stages * bitmap_x_stage_bytes(config) +
         config.chunks() * kBitmapSlots * slot_bytes;
}

// The format that multiplies fastest on a device, and one sentence why.
struct FormatChoice {
  Format format = Format::kTiledCsl;
  std::string reason;
};

FormatChoice select_format(int64_t m, int64_t k, int64_t nnz, const DeviceInfo& device);

struct SpmmPlan {
  SpmmRoute route = SpmmRoute::kCpuTiles;
  int config = -1;     // index into the route's configurations, or -1
  int64_t ctas = 0;    // kernels of ours: grid size; work is cut evenly between them (stream-K)
  int slot_bytes = 0;  // kBitmap: shared memory for one chunk
  // Whether the kernel leaves the activation to the caller.
  bool rounds_before_activation = false;
  // Temporary memory: fp32 partial sums and then X in fragment order (kLscd), fp32 partial sums
  // (kBitmap), or the dense weight (kDense).
  int64_t workspace_bytes = 0;
  int64_t packed_x_bytes = 0;  // the second part of it
  std::string reason;          // one sentence, with the measurement behind it

  // "w1n8", "n8", "dense", "cpu_tiles" or "cpu_reference": what `config` of the operator takes.
  std::string name() const;
  std::string to_string() const;
};

// Names that the operator's `config` argument takes for a format on this kind of device, "auto"
// excepted.
std::vector<std::string> plan_names(Format format, bool cuda);

// config = "auto" chooses; any other name forces that kernel. ctas = 0 chooses the grid (the CPU
// and the dense route have none).
Status select_plan(const SpmmProblem& problem, const DeviceInfo& device, const std::string& config,
                   int64_t ctas, SpmmPlan* out);

}  // namespace flash_llm
