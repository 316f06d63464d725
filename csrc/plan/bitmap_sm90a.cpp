#include "plan/bitmap_sm90a.h"

#include <algorithm>
#include <cstddef>

#include "plan/config_table.h"

namespace flash_llm {
namespace {

// The bitmap kernel, in passes of 256 tokens, against unpacking and cuBLAS on an H200, fp16, in
// microseconds (2026-11-30):
//   28672x7168  N = 512   50 % 371 / 485   70 % 363 / 478   90 % 424 / 419
//               N = 1024  50 % 713 / 803
//               N = 2048  50 % 1497 / 1473
//   14336x4096  N = 512   50 % 113 / 151
//               N = 1024  50 % 236 / 234
//   7168x7168   N = 1024  50 % 197 / 215, N = 2048 413 / 360
//   4096x4096   N = 512   50 % 39 / 41     90 % 47 / 43
//               N = 1024  50 % 70 / 66, N = 2048 141 / 118
// (The kernel of the last two shapes, from 1024 tokens on, is a build that took 5 % longer.) At
// 90 %, 2:4 pairs are expanded (bitmap_expands_two_four); at N = 256 that took 199 / 295 for
// 28672x7168 and 26 / 36 for 4096x4096 (2026-11-29).
constexpr int64_t kMaxTokens = 1024;
constexpr int64_t kMaxTokensTwoFour = 256;

// At 90 % zeros, 28672x7168, on an H200, a pass of 64 tokens takes 66 us and one of 128 takes 141
// (2026-11-30). N = 256 takes 199 us in one pass, which expands 2:4 chunks, and four of 64 would
// take 264.
constexpr int64_t kTwoFourPassTokens = 64;

bool takes_narrow_passes(const SpmmProblem& problem) {
  return mostly_two_four(problem) && problem.n > kTwoFourPassTokens &&
         problem.n <= 2 * kTwoFourPassTokens;
}

// The index of the first configuration for as many tokens as a pass has.
int first_config(const SpmmProblem& problem) {
  return config_covering(bitmap_configs(),
                         takes_narrow_passes(problem) ? kTwoFourPassTokens : problem.n);
}

// Whether the configuration after `first` is for as many tokens and the faster one: its tiles are
// lower. Fewer CTAs share a low tile, so there are fewer partial sums to add, but each column of X
// serves fewer rows, which costs the more the fewer nonzeros these have. In the smallest weights a
// CTA has a single column of either. On an H200, fp16, N = 32, in us (2026-11-30), low tiles (with
// the parts of the finishing kernel that launch_finish chooses) / high tiles, at 50, 70 and 90 %:
//    2048x2048    9.3 /  8.0    9.0 /  7.8    6.5 /  8.2   (31K elements for each SM)
//    4096x4096   13.2 / 15.1   12.3 / 13.6   11.3 / 11.9   (124K)
//    6144x4096   15.5 / 17.5   14.6 / 16.3   13.3 / 14.6
//    5120x5120   16.8 / 17.8   15.5 / 17.1   13.7 / 14.9
//    7168x7168   22.6 / 26.1   21.7 / 22.4   18.8 / 19.1
//    4096x14336  24.1 / 28.3   23.3 / 24.7   20.1 / 23.0
//    14336x4096  24.0 / 28.1   22.8 / 24.8   20.1 / 21.4
//    3584x18944  27.2 / 31.6   26.3 / 27.5   22.3 / 24.7
//    18944x3584  26.8 / 29.7   26.1 / 27.7   22.1 / 23.7   (502K)
//    28672x4096  42.8 / 45.9   39.2 / 37.3   32.6 / 30.6   (869K)
//    28672x7168  74.9 / 72.8   65.7 / 57.5   49.8 / 44.9
bool takes_low_tiles(const PlanRequest& request, int first) {
  const SpmmProblem& problem = request.problem;
  const std::vector<BitmapConfig>& configs = bitmap_configs();
  const auto high = static_cast<size_t>(first), low = high + 1;
  if (low == configs.size() || configs[low].tile_n != configs[high].tile_n) return false;
  constexpr double kLeast = 64 * 1024;  // elements of a weight without 2:4 pairs, for each SM
  const double most = (density(problem) >= 0.4 ? 1024 : 640) * 1024;
  const double elems = num_elems(problem) / std::max(request.device.num_sms, 1);
  return elems <= most && (elems >= kLeast || mostly_two_four(problem));
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
  if (request.problem.n > (two_four ? kMaxTokensTwoFour : kMaxTokens)) {
    explain(reason, two_four
                        ? "N > 256 above 83 % zeros: unpacking and cuBLAS cost less (4096x4096, "
                          "90 %, N = 512, H200: 43 us, this kernel 47)"
                        : "N > 1024: unpacking and cuBLAS cost less (28672x7168, 50 %, "
                          "N = 2048, H200: 1473 us, this kernel 1497)");
    return false;
  }
  explain(reason, takes_narrow_passes(request.problem)
                      ? "above 83 % zeros passes of 64 tokens cost less than wider tiles "
                        "(28672x7168, 90 %, H200: 66 us each, one of 128 tokens 141)"
                  : takes_low_tiles(request, first_config(request.problem))
                      ? "a small layer: lower tiles leave fewer partial sums to add (4096x14336, "
                        "50 %, N = 32, H200: 24 us, with higher tiles 28)"
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
  out->workspace_bytes = bitmap_workspace_bytes(config, out->work);
  out->rounds_before_activation = !bitmap_finishes_all(config.tile_n);
  out->x_multiple = 8;
  return Status::success();
}

}  // namespace flash_llm
