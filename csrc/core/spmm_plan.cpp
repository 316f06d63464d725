#include "core/spmm_plan.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

#include "core/row_bitmap.h"

namespace flash_llm {
namespace {

// Above this many tokens the CPU unpacks the weight and calls the dense GEMM.
constexpr int64_t kCpuTilesMaxTokens = 16;

// The row bitmap's own kernels against blocks of decoded rows and torch's product, and against
// torch's product of the dense weight, 4096x4096 at 50 % zeros, 2 cores, in milliseconds.
// An EPYC (Zen 4; 2026-11-24):
//   bf16  N = 16   2.1 / 3.8 / 2.5     64   6.2 / 6.8 / 5.9    128   11.5 / 11.7 / 10.5
//         N = 256  22.6 / 21.3 / 19.8  512  44.8 / 41.6 / 39.2
//   fp16  N = 16   3.5 / 12.6 / 11.7   32   5.7 / 24 / 23      512   89 / 406 / 726
// A Xeon (Emerald Rapids without AMX; 2026-11-26), which multiplies as fp32 (cpu_isa.cpp):
//   bf16  N = 16   2.5 / 6.2 / 4.8     64   8.3 / 16.0 / 13.8  128   17.7 / 28.5 / 26.6
//         N = 256  35.2 / 53.3 / 51.7  512  70.7 / 105 / 102
//   fp16  N = 32   4.6 / 6.8 / 5.3     64   8.9 / 12.3 / 8.3   128   18.7 / 18.3 / 15.0
//         N = 512  73 / 57 / 55
// For bf16 with AVX2, and for portable C++, blocks cost less from 17 tokens on. So they will where
// the dense product has matrix instructions (AMX), which has not been measured.
constexpr int64_t kCpuRowsMaxTokensDot = 128;
constexpr int64_t kCpuRowsMaxTokensFastDense = 128;
constexpr int64_t kCpuRowsMaxTokensSlow = 16;
constexpr int64_t kAnyTokens = std::numeric_limits<int64_t>::max();
// What is decoded at a time: a part of the last-level cache, and enough rows for torch's product.
constexpr int64_t kCpuBlockBytes = int64_t{8} << 20;
// The LSCD kernel against unpack + cuBLAS on an H200, 28672x7168, fp16, in microseconds
// (2026-11-23):
//   N = 64    50 % 200 / 352   70 % 170 / 339   80 % 127 / 314   90 % 119 / 295
//   N = 128   50 % 392 / 362   70 % 329 / 349   80 % 243 / 322   90 % 228 / 304
//   N = 256   50 % 741 / 405   70 % 624 / 383   80 % 469 / 354   90 % 440 / 333
constexpr int64_t kLscdMaxTokens = 128;
constexpr int64_t kLscdMaxTokensLowSparsity = 64;
constexpr double kLowSparsity = 0.65;

// The bitmap kernel, in passes of 256 tokens, against unpack + cuBLAS on an H200, 28672x7168, fp16,
// in microseconds (2026-11-23):
//   N = 512     50 % 446 / 555    70 % 423 / 525    90 % 371 / 469
//   N = 2048    50 % 1691 / 1438  70 % 1598 / 1375  90 % 1527 / 1275
// Where most pairs of columns are 2:4 the residual costs more, token by token: forced so at 80 %,
// it had 0.64 of cuBLAS's speed at N = 128 and 0.35 at 512, unpack + cuBLAS 0.38 and 0.68
// (2026-11-24).
constexpr int64_t kBitmapMaxTokens = 1024;
constexpr int64_t kBitmapMaxTokensTwoFour = 256;

// Below this density the bits of a bitmap weigh more than the places of Tiled-CSL.
constexpr double kBitmapMinDensity = 0.07;

// Below this density most pairs of chunk columns are 2:4 (bitmap.h: prefers_two_four).
constexpr double kTwoFourDensity = 0.17;

constexpr int kMinComputeCapability = 80;
// Shared memory that the driver takes from each CTA.
constexpr int kReservedSmemBytes = 1024;

template <typename Config>
int find_config(const std::vector<Config>& configs, const std::string& name) {
  for (size_t i = 0; i < configs.size(); ++i) {
    if (name == configs[i].name) return static_cast<int>(i);
  }
  return -1;
}

template <typename Config>
std::string name_of(const std::vector<Config>& configs, int idx) {
  const bool exists = idx >= 0 && idx < static_cast<int>(configs.size());
  return exists ? configs[static_cast<size_t>(idx)].name : "unknown";
}

// The narrowest configuration that covers n tokens, else the widest.
template <typename Config>
int config_for(const std::vector<Config>& configs, int64_t n) {
  for (size_t i = 0; i < configs.size(); ++i) {
    if (n <= configs[i].tile_n) return static_cast<int>(i);
  }
  return static_cast<int>(configs.size()) - 1;
}

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "\"" : ", \"") + name + "\"";
  return text;
}

std::string shape_text(const SpmmProblem& problem) {
  return "M=" + std::to_string(problem.m) + " N=" + std::to_string(problem.n) +
         " K=" + std::to_string(problem.k);
}

bool mostly_two_four(const SpmmProblem& problem) {
  const double elems = static_cast<double>(problem.m) * static_cast<double>(problem.k);
  return static_cast<double>(problem.nnz) < kTwoFourDensity * elems;
}

Status plan_dense(const SpmmProblem& problem, std::string reason, SpmmPlan* out) {
  out->route = SpmmRoute::kDense;
  out->workspace_bytes = problem.m * problem.k * 2;
  out->rounds_before_activation = true;
  out->reason = std::move(reason);
  return Status::success();
}

Status plan_lscd(const SpmmProblem& problem, const DeviceInfo& device, int config_idx, int64_t ctas,
                 std::string reason, SpmmPlan* out) {
  const LscdConfig& config = lscd_configs()[static_cast<size_t>(config_idx)];
  const int64_t col_blocks = (problem.n + config.tile_n - 1) / config.tile_n;
  if (problem.k > kMaxLscdStride) {
    return Status::invalid_value(shape_text(problem) + " exceeds the kernel's limit K <= 2^29");
  }
  const int64_t rows = col_blocks * num_tile_rows(problem.m);
  const int64_t units = rows * num_tile_cols(problem.k);
  if (units > INT32_MAX) {
    return Status::invalid_value(shape_text(problem) + " needs " + std::to_string(units) +
                                 " tiles of work, more than 32-bit indices can count");
  }
  if (ctas == 0) {
    const int smem_ctas = device.smem_per_sm_bytes / (lscd_smem_bytes(config) + kReservedSmemBytes);
    const int ctas_per_sm = std::max(1, std::min(config.ctas_per_sm, smem_ctas));
    ctas = int64_t{device.num_sms} * ctas_per_sm;
  }
  ctas = std::clamp<int64_t>(ctas, 1, std::max<int64_t>(units, 1));
  out->route = SpmmRoute::kLscd;
  out->config = config_idx;
  out->ctas = ctas;
  out->packed_x_bytes = lscd_packed_x_bytes(config, problem.n, problem.k);
  out->workspace_bytes = lscd_sums_bytes(config, ctas) + out->packed_x_bytes;
  out->reason = std::move(reason);
  return Status::success();
}

Status plan_bitmap(const SpmmProblem& problem, const DeviceInfo& device, int config_idx,
                   int64_t ctas, std::string reason, SpmmPlan* out) {
  const BitmapConfig& config = bitmap_configs()[static_cast<size_t>(config_idx)];
  if (!device.has_sm90a) {
    return Status::unsupported(
        "config \"" + std::string(config.name) +
        "\" needs a Hopper GPU (compute capability 9.0) and a build for sm_90a; this GPU has " +
        std::to_string(device.compute_capability / 10) + "." +
        std::to_string(device.compute_capability % 10) + ", use \"dense\"");
  }
  const int64_t token_blocks = (problem.n + config.tile_n - 1) / config.tile_n;
  const int64_t row_blocks = (problem.m + config.block_m() - 1) / config.block_m();
  const int64_t rows = token_blocks * row_blocks;
  // Cutting between the two columns of a 2:4 pair would give one CTA both and the other none.
  out->unit_cols = mostly_two_four(problem) ? 2 : 1;
  const int64_t columns = num_chunk_cols(problem.k), chunks = rows * columns;
  if (chunks > INT32_MAX) {
    return Status::invalid_value(shape_text(problem) + " needs " + std::to_string(chunks) +
                                 " units of work, more than 32-bit indices can count");
  }
  // One CTA fills an SM's registers. Work is divided between clusters.
  if (ctas == 0) ctas = device.num_sms;
  const int64_t units = rows * ((columns + out->unit_cols - 1) / out->unit_cols);
  const int64_t clusters =
      std::clamp<int64_t>(ctas / config.cluster, 1, std::max<int64_t>(units, 1));
  out->route = SpmmRoute::kBitmap;
  out->config = config_idx;
  out->ctas = clusters * config.cluster;
  const int room = device.smem_per_sm_bytes - kReservedSmemBytes - kBitmapSpareSmemBytes;
  const int step = kChunkUnitBytes * config.rings();
  out->ring_bytes =
      std::max(room - bitmap_smem_bytes(config, 0), bitmap_min_ring_bytes(config)) / step * step;
  out->workspace_bytes = bitmap_sums_bytes(config, clusters, rows);
  out->rounds_before_activation = !bitmap_finishes_all(config.tile_n);
  out->reason = std::move(reason);
  return Status::success();
}

Status plan_lscd_auto(const SpmmProblem& problem, const DeviceInfo& device, int64_t ctas,
                      SpmmPlan* out) {
  const bool low_sparsity =
      static_cast<double>(problem.nnz) >
      (1.0 - kLowSparsity) * static_cast<double>(problem.m) * static_cast<double>(problem.k);
  if (problem.n > (low_sparsity ? kLscdMaxTokensLowSparsity : kLscdMaxTokens)) {
    return plan_dense(problem,
                      low_sparsity ? "N > 64 below 65 % zeros: unpacking and cuBLAS cost less"
                                   : "N > 128: unpacking and cuBLAS cost less",
                      out);
  }
  return plan_lscd(problem, device, config_for(lscd_configs(), problem.n), ctas,
                   "the narrowest tile that covers N decodes each weight once", out);
}

Status plan_bitmap_auto(const SpmmProblem& problem, const DeviceInfo& device, int64_t ctas,
                        SpmmPlan* out) {
  if (!device.has_sm90a) {
    return plan_dense(problem, "the bitmap kernel needs a Hopper GPU and a build for sm_90a", out);
  }
  const bool two_four = mostly_two_four(problem);
  if (problem.n > (two_four ? kBitmapMaxTokensTwoFour : kBitmapMaxTokens)) {
    return plan_dense(problem,
                      two_four ? "N > 256 above 83 % zeros: unpacking and cuBLAS cost less"
                               : "N > 1024: unpacking and cuBLAS cost less",
                      out);
  }
  // At 90 % zeros, 28672x7168 on an H100: N = 128 in 135 us by two passes of 64 tokens, 159 by one
  // of 128; N = 256 269 by four, 301 by one (2026-11-26).
  constexpr int64_t kPassTokens = 64;
  if (two_four && problem.n > kPassTokens) {
    return plan_bitmap(problem, device, config_for(bitmap_configs(), kPassTokens), ctas,
                       "above 83 % zeros passes of 64 tokens cost less than wider tiles", out);
  }
  return plan_bitmap(problem, device, config_for(bitmap_configs(), problem.n), ctas,
                     "the narrowest tile that covers N decodes each weight once", out);
}

// Tokens up to which the row bitmap's own kernels are taken.
int64_t most_tokens_of_rows(ValueType type, const DeviceInfo& device) {
  const bool avx512 = device.cpu_isa == CpuIsa::kAvx512 || device.cpu_isa == CpuIsa::kAvx512Bf16;
  if (type == ValueType::kFloat16) {
    if (device.cpu_isa == CpuIsa::kPortable) return kCpuRowsMaxTokensSlow;
    if (!device.cpu_fast_dense_fp16) return kAnyTokens;
    return avx512 ? kCpuRowsMaxTokensFastDense : kCpuRowsMaxTokensSlow;
  }
  if (!avx512 || device.cpu_fast_dense_bf16) return kCpuRowsMaxTokensSlow;
  return device.cpu_isa == CpuIsa::kAvx512Bf16 ? kCpuRowsMaxTokensDot : kAnyTokens;
}

Status plan_cpu_rows(const SpmmProblem& problem, const DeviceInfo& device,
                     const std::string& config, SpmmPlan* out) {
  if (config != "auto") {
    out->route = config == "cpu_rows" ? SpmmRoute::kCpuRows : SpmmRoute::kCpuBlocks;
    out->reason = "forced";
    return Status::success();
  }
  const int64_t most = most_tokens_of_rows(problem.value_type, device);
  if (most == kAnyTokens) {
    out->route = SpmmRoute::kCpuRows;
    out->reason = "each weight is decoded once, and torch's dense product takes longer at any N";
  } else if (problem.n <= most) {
    out->route = SpmmRoute::kCpuRows;
    out->reason =
        "N <= " + std::to_string(most) + ": each weight is decoded once for several tokens";
  } else {
    out->route = SpmmRoute::kCpuBlocks;
    out->reason =
        "N > " + std::to_string(most) + ": decoding blocks and the dense product cost less";
  }
  return Status::success();
}

}  // namespace

Status detect_cpu(DeviceInfo* device) {
  device->cpu_fast_dense_bf16 = has_fast_dense_bf16();
  device->cpu_fast_dense_fp16 = has_fast_dense_fp16();
  return select_cpu_isa(&device->cpu_isa);
}

const std::vector<LscdConfig>& lscd_configs() {
  static const std::vector<LscdConfig> configs = {
#define FLASH_LLM_ROW(name, warps_per_tile, tile_n, ctas_per_sm, packed_x) \
  {#name, warps_per_tile, tile_n, ctas_per_sm, packed_x},
      FLASH_LLM_LSCD_CONFIGS(FLASH_LLM_ROW)
#undef FLASH_LLM_ROW
  };
  return configs;
}

const std::vector<BitmapConfig>& bitmap_configs() {
  static const std::vector<BitmapConfig> configs = {
#define FLASH_LLM_ROW(name, tile_n, warps, strips, cluster, x_stages) \
  {#name, tile_n, warps, strips, cluster, x_stages},
      FLASH_LLM_BITMAP_CONFIGS(FLASH_LLM_ROW)
#undef FLASH_LLM_ROW
  };
  return configs;
}

FormatChoice select_format(int64_t m, int64_t k, int64_t nnz, const DeviceInfo& device) {
  if (device.compute_capability == 0) {
    return {Format::kRowBitmap, "a CPU decodes it as fast as memory brings it"};
  }
  if (!device.has_sm90a) {
    return {Format::kTiledCsl, "the bitmap kernel needs a Hopper GPU and a build for sm_90a"};
  }
  const double elems = static_cast<double>(m) * static_cast<double>(k);
  if (static_cast<double>(nnz) < kBitmapMinDensity * elems) {
    return {Format::kTiledCsl, "above 93 % zeros 4 bytes per nonzero are fewer than a bitmap"};
  }
  return {Format::kBitmap, "fewer bytes, and decoded straight into tensor-core registers"};
}

int64_t cpu_block_rows(int64_t k) {
  const int64_t rows = kCpuBlockBytes / (2 * std::max<int64_t>(k, 1)) / kBlockRows * kBlockRows;
  return std::max<int64_t>(rows, kBlockRows);
}

std::string SpmmPlan::name() const {
  switch (route) {
    case SpmmRoute::kCpuReference:
      return "cpu_reference";
    case SpmmRoute::kCpuTiles:
      return "cpu_tiles";
    case SpmmRoute::kCpuRows:
      return "cpu_rows";
    case SpmmRoute::kCpuBlocks:
      return "cpu_blocks";
    case SpmmRoute::kDense:
      return "dense";
    case SpmmRoute::kLscd:
      return name_of(lscd_configs(), config);
    case SpmmRoute::kBitmap:
      return name_of(bitmap_configs(), config);
  }
  return "unknown";
}

std::string SpmmPlan::to_string() const {
  std::string text = name();
  if (ctas > 0) text += " ctas=" + std::to_string(ctas);
  if (ring_bytes > 0) {
    text += " unit_cols=" + std::to_string(unit_cols) + " ring_bytes=" + std::to_string(ring_bytes);
  }
  if (workspace_bytes > 0) text += " workspace_bytes=" + std::to_string(workspace_bytes);
  return text + " (" + reason + ")";
}

Status check_plan(const SpmmPlan& plan, SpmmRoute route, const SpmmArgs& args,
                  int64_t workspace_bytes) {
  const Format format = route == SpmmRoute::kLscd ? Format::kTiledCsl : Format::kBitmap;
  if (plan.route != route || args.format != format) {
    return Status::invalid_value("plan " + plan.to_string() + " and a weight in format \"" +
                                 packed_format(args.format).name + "\" came to a kernel for \"" +
                                 packed_format(format).name + "\"");
  }
  if (plan.workspace_bytes < workspace_bytes) {
    return Status::invalid_value("plan " + plan.to_string() + " has a workspace of " +
                                 std::to_string(plan.workspace_bytes) + " bytes, needed are " +
                                 std::to_string(workspace_bytes));
  }
  if (plan.rounds_before_activation && args.activation != Activation::kNone) {
    return Status::invalid_value("plan " + plan.to_string() +
                                 " leaves the activation to the caller, but one was given");
  }
  return Status::success();
}

std::vector<std::string> plan_names(Format format, bool cuda) {
  std::vector<std::string> names;
  if (!cuda) {
    if (format == Format::kTiledCsl) names.emplace_back("cpu_tiles");
    if (format == Format::kRowBitmap) names.insert(names.end(), {"cpu_rows", "cpu_blocks"});
    names.emplace_back("cpu_reference");
  } else if (format == Format::kTiledCsl) {
    for (const auto& config : lscd_configs()) names.emplace_back(config.name);
  } else if (format == Format::kBitmap) {
    for (const auto& config : bitmap_configs()) names.emplace_back(config.name);
  }
  names.emplace_back("dense");
  return names;
}

Status select_plan(const SpmmProblem& problem, const DeviceInfo& device, const std::string& config,
                   int64_t ctas, SpmmPlan* out) {
  const bool cuda = device.compute_capability > 0;
  *out = SpmmPlan{};
  if (problem.m < 0 || problem.n < 0 || problem.k < 0 || problem.nnz < 0) {
    return Status::invalid_value(shape_text(problem) + " nnz=" + std::to_string(problem.nnz) +
                                 " must not be negative");
  }
  if (problem.n > INT32_MAX || problem.m > INT32_MAX || problem.k > INT32_MAX) {
    return Status::invalid_value(shape_text(problem) + " must each fit 31 bits");
  }
  if (problem.nnz > problem.m * problem.k) {
    return Status::invalid_value(shape_text(problem) +
                                 " cannot hold nnz=" + std::to_string(problem.nnz));
  }
  // 2 bytes per element must stay addressable, with room to spare for fp32.
  constexpr int64_t kMaxElems = std::numeric_limits<int64_t>::max() / 16;
  if (problem.n > 0 && std::max(problem.m, problem.k) > kMaxElems / problem.n) {
    return Status::invalid_value(shape_text(problem) + " is too large to address");
  }
  if (ctas < 0 || ctas > 65535) {
    return Status::invalid_value("ctas must lie in [0, 65535], got " + std::to_string(ctas));
  }
  if (cuda && device.compute_capability < kMinComputeCapability) {
    return Status::unsupported("needs a GPU of compute capability 8.0 or newer, this one has " +
                               std::to_string(device.compute_capability / 10) + "." +
                               std::to_string(device.compute_capability % 10));
  }
  const bool forced = config != "auto";
  if (forced) {
    const std::vector<std::string> names = plan_names(problem.format, cuda);
    if (std::find(names.begin(), names.end(), config) == names.end()) {
      return Status::invalid_value("config must be \"auto\" or one of " + join(names) +
                                   " for format \"" + packed_format(problem.format).name +
                                   "\" on " + (cuda ? "CUDA" : "the CPU") + ", got \"" + config +
                                   "\"");
    }
  }

  if (config == "dense") return plan_dense(problem, "forced", out);
  if (cuda && problem.format == Format::kRowBitmap) {
    return plan_dense(problem,
                      "a row bitmap is for CPUs, and unpacked by the CPU at each call: pack the "
                      "weight again on this GPU",
                      out);
  }
  if (cuda && problem.format == Format::kTiledCsl) {
    if (!forced) return plan_lscd_auto(problem, device, ctas, out);
    return plan_lscd(problem, device, find_config(lscd_configs(), config), ctas, "forced", out);
  }
  if (cuda) {
    if (!forced) return plan_bitmap_auto(problem, device, ctas, out);
    return plan_bitmap(problem, device, find_config(bitmap_configs(), config), ctas, "forced", out);
  }
  if (config == "cpu_reference") {
    out->route = SpmmRoute::kCpuReference;
    out->reason = "forced";
    return Status::success();
  }
  if (problem.format == Format::kRowBitmap) {
    return plan_cpu_rows(problem, device, config, out);
  }
  if (problem.format == Format::kBitmap) {
    return plan_dense(problem, "the bitmap format has no CPU kernel yet", out);
  }
  if (!forced && problem.n > kCpuTilesMaxTokens) {
    return plan_dense(problem, "N > 16: the dense GEMM is compute-bound, unpacking costs less",
                      out);
  }
  out->route = SpmmRoute::kCpuTiles;
  out->reason = forced ? "forced" : "N <= 16: each tile is decoded once per 8 tokens";
  return Status::success();
}

}  // namespace flash_llm
