#include "plan/bitmap_rows_sm90.h"

#include <algorithm>
#include <cstdint>

#include "plan/config_table.h"

namespace flash_llm {
namespace {

int least_smem_bytes(const BitmapRowsConfig& config) {
  return bitmap_rows_fixed_smem_bytes(config.tile_n, config.teams) + kBitmapRowsMinRingBytes;
}

}  // namespace

const std::vector<BitmapRowsConfig>& bitmap_rows_configs() {
  static const std::vector<BitmapRowsConfig> configs = {
#define FLASH_LLM_ROW(name, tokens, teams) {#name, tokens, teams},
      FLASH_LLM_BITMAP_ROWS_CONFIGS(FLASH_LLM_ROW)
#undef FLASH_LLM_ROW
  };
  return configs;
}

std::vector<KernelConfig> describe_bitmap_rows_configs() {
  std::vector<KernelConfig> rows;
  for (const BitmapRowsConfig& config : bitmap_rows_configs()) {
    rows.push_back({config.name,
                    {{"tile_n", config.tile_n},
                     {"warps", config.warps()},
                     {"ctas_per_sm", 1},
                     {"smem_bytes", least_smem_bytes(config)}}});
  }
  return rows;
}

// Measured on an H200, fp16, in us (2026-11-29): this kernel / the other bitmap kernel for Hopper.
// Other GPUs, of which only some have enough shared memory, were not measured. Up to 8 tokens, at
// 50, 70 and 90 %:
//    4096x4096    7.6 / 10.4    6.6 /  9.1    5.8 /  8.5   (32 chunks in a CTA)
//    6144x4096   10.7 / 14.3    9.3 / 12.8    7.9 / 10.4   (64)
//    5120x5120   14.5 / 15.5   11.6 / 14.3   11.3 / 10.9   (80)
//    4096x14336  19.9 / 23.1   17.5 / 18.0   14.7 / 16.7   (112)
//    7168x7168   18.5 / 21.4   16.6 / 16.6   14.0 / 14.4   (112)
//   14336x4096   21.7 / 24.7   18.0 / 20.4   14.7 / 16.9   (128)
//   18944x3584   23.0 / 26.0   21.3 / 20.8   18.3 / 18.0   (140)
//   28672x4096   35.8 / 39.1   31.8 / 29.1   26.8 / 24.0   (224)
//    9216x9216   34.2 / 31.0   29.9 / 24.4   25.4 / 20.1   (216, 157 on average)
//   28672x7168   63.7 / 63.5   56.6 / 45.5   47.4 / 35.2   (392)
// 9 to 16 tokens:
//    4096x4096    8.9 / 12.7    7.6 / 11.3    7.2 / 11.0
//    6144x4096   14.2 / 15.4   11.6 / 14.2   12.4 / 11.7
//    7168x7168   22.0 / 24.1   18.9 / 19.4   17.7 / 16.8
//    4096x14336  21.9 / 24.3   18.7 / 20.0   16.9 / 18.4
bool takes_bitmap_rows(const PlanRequest& request, std::string* reason) {
  const SpmmProblem& problem = request.problem;
  const int config = config_covering(bitmap_rows_configs(), problem.n);
  if (least_smem_bytes(bitmap_rows_configs()[static_cast<size_t>(config)]) >
      smem_per_cta_bytes(request.device)) {
    return false;
  }
  const int64_t sms = std::max(request.device.num_sms, 1), columns = num_chunk_cols(problem.k);
  const int64_t chunk_rows = num_chunk_rows(problem.m), rounds = (chunk_rows + sms - 1) / sms;
  const int64_t chunks = rounds * columns;  // of the CTA that has most
  bool takes = false;
  if (problem.n <= bitmap_rows_configs().front().tile_n) {
    const bool even = 5 * chunks * sms <= 6 * chunk_rows * columns;  // 20 % above the mean at most
    const int64_t most = density(problem) >= 0.48 ? 400 : density(problem) >= 0.4 ? 256 : 128;
    takes = chunks <= 128 || (chunks <= most && even);
  } else if (problem.n <= bitmap_rows_configs().back().tile_n) {
    takes = chunks <= 128 && (rounds == 1 || (rounds == 2 && density(problem) >= 0.25));
  }
  if (takes)
    explain(reason,
            "few tokens and few rows: a CTA for whole rows needs no second kernel (4096x4096, "
            "50 %, N = 8, H200: 8 us, with one 10)");
  return takes;
}

Status plan_bitmap_rows(const PlanRequest& request, SpmmPlan* out) {
  const SpmmProblem& problem = request.problem;
  out->config = request.forced() ? config_named(bitmap_rows_configs(), request.config)
                                 : config_covering(bitmap_rows_configs(), problem.n);
  const BitmapRowsConfig& config = bitmap_rows_configs()[static_cast<size_t>(out->config)];
  if (Status fit = check_smem(config.name, least_smem_bytes(config), request.device); !fit.ok()) {
    return fit;
  }
  const int64_t ctas = request.ctas == 0 ? request.device.num_sms : request.ctas;
  out->ctas = std::clamp<int64_t>(ctas, 1, std::max<int64_t>(num_chunk_rows(problem.m), 1));
  const int room = smem_per_cta_bytes(request.device) -
                   bitmap_rows_fixed_smem_bytes(config.tile_n, config.teams);
  out->ring_bytes = std::max(room, kBitmapRowsMinRingBytes) / kChunkUnitBytes * kChunkUnitBytes;
  out->x_multiple = 8;
  return Status::success();
}

}  // namespace flash_llm
