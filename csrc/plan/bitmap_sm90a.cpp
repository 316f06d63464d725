#include "plan/bitmap_sm90a.h"

#include <algorithm>
#include <cstddef>

#include "plan/config_table.h"

namespace flash_llm {
namespace {

// The bitmap kernel, in passes of 256 tokens, against unpacking and cuBLAS on an H200, 28672x7168,
// fp16, in microseconds (2026-11-23):
//   N = 512     50 % 446 / 555    70 % 423 / 525    90 % 371 / 469
//   N = 2048    50 % 1691 / 1438  70 % 1598 / 1375  90 % 1527 / 1275
// If most pairs of columns are 2:4, the residual costs more with each token. With such pairs forced
// at 80 %, the kernel had 0.64 of cuBLAS's speed at N = 128 and 0.35 at N = 512, and unpacking and
// cuBLAS had 0.38 and 0.68 (2026-11-24).
constexpr int64_t kMaxTokens = 1024;
constexpr int64_t kMaxTokensTwoFour = 256;

// At 90 % zeros, 28672x7168, on an H100 (2026-11-26): N = 128 takes 135 us in two passes of 64
// tokens and 159 in one of 128; N = 256 takes 269 us in four passes of 64 and 301 in one of 256.
constexpr int64_t kTwoFourPassTokens = 64;

bool takes_narrow_passes(const SpmmProblem& problem) {
  return mostly_two_four(problem) && problem.n > kTwoFourPassTokens;
}

// The index of the first configuration for as many tokens as a pass has.
int first_config(const SpmmProblem& problem) {
  return config_covering(bitmap_configs(),
                         takes_narrow_passes(problem) ? kTwoFourPassTokens : problem.n);
}

// Whether the configuration after `first` is for as many tokens and the faster one: its tiles are
// lower. Fewer CTAs share a low tile, so there are fewer partial sums to add, but each column of X
// serves fewer rows. On an H200, fp16, N = 32, low tiles / high tiles in us (2026-11-30):
//    6144x4096    50 % 16.3 / 17.0   70 % 15.3 / 16.1   90 % 14.1 / 14.8
//    4096x14336   50 % 24.2 / 27.7   70 % 23.8 / 24.2   90 % 20.5 / 23.1
//    7168x28672   50 % 70.5 / 70.3   70 % 68.2 / 57.6   90 % 51.8 / 46.4
constexpr int64_t kLowTileElems = 448 * 1024;  // of W, for each SM, at most

bool takes_low_tiles(const PlanRequest& request, int first) {
  const std::vector<BitmapConfig>& configs = bitmap_configs();
  const auto high = static_cast<size_t>(first), low = high + 1;
  const int64_t sms = std::max(request.device.num_sms, 1);
  return low < configs.size() && configs[low].tile_n == configs[high].tile_n &&
         request.problem.m * request.problem.k <= kLowTileElems * sms;
}

}  // namespace

bool mostly_two_four(const SpmmProblem& problem) {
  constexpr double kTwoFourDensity = 0.17;
  const double elems = static_cast<double>(problem.m) * static_cast<double>(problem.k);
  return static_cast<double>(problem.nnz) < kTwoFourDensity * elems;
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
  if (request.problem.n > (two_four ? kMaxTokensTwoFour : kMaxTokens)) {
    explain(reason, two_four ? "N > 256 above 83 % zeros: unpacking and cuBLAS cost less"
                             : "N > 1024: unpacking and cuBLAS cost less");
    return false;
  }
  explain(reason, takes_narrow_passes(request.problem)
                      ? "above 83 % zeros passes of 64 tokens cost less than wider tiles"
                  : takes_low_tiles(request, first_config(request.problem))
                      ? "a small layer: lower tiles leave fewer partial sums to add"
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
  if (request.forced()) {
    out->config = config_named(bitmap_configs(), request.config);
  } else {
    const int first = first_config(problem);
    out->config = takes_low_tiles(request, first) ? first + 1 : first;
  }
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
  out->workspace_bytes = bitmap_sums_bytes(config, out->work);
  out->rounds_before_activation = !bitmap_finishes_all(config.tile_n);
  out->x_multiple = 8;
  return Status::success();
}

}  // namespace flash_llm
