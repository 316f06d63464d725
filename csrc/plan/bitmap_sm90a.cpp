#include "plan/bitmap_sm90a.h"

#include <algorithm>
#include <cstddef>

#include "plan/config_table.h"

namespace flash_llm {
namespace {

// The bitmap kernel, in passes of 256 tokens, against unpacking and cuBLAS on an H200, fp16, in
// microseconds (2026-11-29; cuBLAS in the same run as the kernel, unpacking in another):
//   28672x7168  N = 512   50 % 387 / 476    90 % 398 / 397
//               N = 1024  50 % 738 / 803    90 % 817 / 688
//               N = 2048  50 % 1454 / 1428  90 % 1648 / 1239
//   4096x4096   N = 512   50 % 38 / 42      90 % 43 / 43
//               N = 1024  50 % 87 / 70      90 % 74 / 62
// At 90 %, 2:4 pairs are expanded (bitmap_expands_two_four).
constexpr int64_t kMaxTokens = 1024;
constexpr int64_t kMaxTokensSmall = 512;  // for a weight of at most kSmallElems elements
constexpr int64_t kMaxTokensTwoFour = 512;
constexpr double kSmallElems = 1 << 25;

double num_elems(const SpmmProblem& problem) {
  return static_cast<double>(problem.m) * static_cast<double>(problem.k);
}

// At 90 % zeros, 28672x7168, N = 128 takes 135 us in two passes of 64 tokens and 159 in one of 128
// (H100, 2026-11-26). N = 256 takes 199 us in one pass, which expands 2:4 chunks (H200,
// 2026-11-29), and 269 in four passes of 64 (H100).
constexpr int64_t kTwoFourPassTokens = 64;

bool takes_narrow_passes(const SpmmProblem& problem) {
  return mostly_two_four(problem) && problem.n > kTwoFourPassTokens &&
         problem.n <= 2 * kTwoFourPassTokens;
}

}  // namespace

bool mostly_two_four(const SpmmProblem& problem) {
  constexpr double kTwoFourDensity = 0.17;
  return static_cast<double>(problem.nnz) < kTwoFourDensity * num_elems(problem);
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

std::vector<KernelConfig> describe_bitmap_configs() {
  std::vector<KernelConfig> rows;
  for (const BitmapConfig& config : bitmap_configs()) {
    rows.push_back({config.name,
                    {{"tile_n", config.tile_n},
                     {"warps", config.warps},
                     {"strips", config.strips},
                     {"cluster", config.cluster},
                     {"x_stages", config.x_stages},
                     {"ctas_per_sm", 1},
                     {"smem_bytes", bitmap_smem_bytes(config, bitmap_min_ring_bytes(config))}}});
  }
  return rows;
}

bool takes_bitmap(const PlanRequest& request, std::string* reason) {
  const bool two_four = mostly_two_four(request.problem);
  const bool small = num_elems(request.problem) <= kSmallElems;
  const int64_t most = two_four ? kMaxTokensTwoFour : small ? kMaxTokensSmall : kMaxTokens;
  if (request.problem.n > most) {
    explain(reason, two_four ? "N > 512 above 83 % zeros: unpacking and cuBLAS cost less"
                    : small  ? "N > 512 with at most 2^25 elements: unpacking and cuBLAS cost less"
                             : "N > 1024: unpacking and cuBLAS cost less");
    return false;
  }
  explain(reason, takes_narrow_passes(request.problem)
                      ? "above 83 % zeros passes of 64 tokens cost less than wider tiles"
                      : "the narrowest tile that covers N decodes each weight once");
  return true;
}

Status divide_bitmap_work(const SpmmProblem& problem, int tile_n, int block_m, SpmmPlan* out) {
  const int64_t columns = num_chunk_cols(problem.k);
  // A work range that ends between the two columns of a 2:4 pair would contain the work of both,
  // and the next one that of neither.
  out->unit_cols = mostly_two_four(problem) ? 2 : 1;
  out->work.rows = (problem.n + tile_n - 1) / tile_n * ((problem.m + block_m - 1) / block_m);
  out->work.cols = (columns + out->unit_cols - 1) / out->unit_cols;
  if (out->work.rows * columns > INT32_MAX) {
    return Status::invalid_value(shape_text(problem) + " needs " +
                                 std::to_string(out->work.rows * columns) +
                                 " units of work, more than 32-bit indices can count");
  }
  return Status::success();
}

Status plan_bitmap(const PlanRequest& request, SpmmPlan* out) {
  const SpmmProblem& problem = request.problem;
  const DeviceInfo& device = request.device;
  const int64_t tokens = takes_narrow_passes(problem) ? kTwoFourPassTokens : problem.n;
  out->config = request.forced() ? config_named(bitmap_configs(), request.config)
                                 : config_covering(bitmap_configs(), tokens);
  const BitmapConfig& config = bitmap_configs()[static_cast<size_t>(out->config)];
  if (Status divided = divide_bitmap_work(problem, config.tile_n, config.block_m(), out);
      !divided.ok()) {
    return divided;
  }
  // One CTA per SM, because it fills the SM's registers. The workers are clusters.
  const int64_t ctas = request.ctas == 0 ? device.num_sms : request.ctas;
  out->work.workers =
      std::clamp<int64_t>(ctas / config.cluster, 1, std::max<int64_t>(out->work.units(), 1));
  out->ctas = out->work.workers * config.cluster;
  const int room = smem_per_cta_bytes(device) - kBitmapSpareSmemBytes;
  const int step = kChunkUnitBytes * config.rings();
  out->ring_bytes =
      std::max(room - bitmap_smem_bytes(config, 0), bitmap_min_ring_bytes(config)) / step * step;
  out->workspace_bytes = bitmap_workspace_bytes(config, out->work);
  out->rounds_before_activation = !bitmap_finishes_all(config.tile_n);
  out->x_multiple = 8;
  return Status::success();
}

}  // namespace flash_llm
