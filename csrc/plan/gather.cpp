#include "plan/gather.h"

#include <cstddef>

#include "plan/config_table.h"

namespace flash_llm {
namespace {

using Configs = std::vector<GatherConfig>;

// A pass of 8 tokens against unpacking and cuBLAS (N = 8) on an H200, 28672x7168, fp16, in
// microseconds (2026-11-30): 70 % 65 / 240, 80 % 47 / 240, 90 % 29 / 240. So a pass costs
// 0.11 + 1.87 * density of the dense product, and unpacking and the dense product 2.4 of it.
constexpr double kPassCost = 0.11, kPassCostOfDensity = 1.87, kDenseCost = 2.4;

// The warps of a CTA; 0 if too few fit. Where two CTAs fit into an SM, that of the next kernel
// finds its slices and fills its rings while that of this kernel multiplies. One token, 90 % zeros,
// H200: 4096x4096 takes 4.4 us instead of 6.4, 28672x7168 21.4 instead of 22.8 (2026-11-30). On a
// GPU without bulk copies a kernel cannot begin before the previous one ends.
int warps_of(const GatherConfig& config, int64_t k, int batch, const DeviceInfo& device) {
  // With fewer warps a CTA loses more time in multiplying than it gains at its start.
  constexpr int kLeastPairWarps = 8;
  const auto bytes = [&](int warps) {
    return kGatherTableBytes + gather_smem_bytes(config, k, warps, batch);
  };
  if (device.features.contains(GpuFeature::kBulkCopy)) {
    const int half = device.smem_per_sm_bytes / 2 - kReservedSmemBytes;
    for (int warps = config.pair_warps; warps >= kLeastPairWarps; warps -= kGatherMinWarps) {
      if (bytes(warps) <= half) return warps;
    }
  }
  int warps = kGatherMaxWarps;
  while (warps > 0 && bytes(warps) > smem_per_cta_bytes(device)) warps -= kGatherMinWarps;
  return warps;
}

int least_smem_bytes(const GatherConfig& config, int64_t k) {
  return kGatherTableBytes + gather_smem_bytes(config, k, kGatherMinWarps, kGatherMaxBatch);
}

bool fits(const GatherConfig& config, const PlanRequest& request) {
  return least_smem_bytes(config, request.problem.k) <= smem_per_cta_bytes(request.device);
}

// The index of the narrowest configuration that fits the device and covers n tokens, or of the
// widest that fits if none does; -1 if none fits.
int best_config(const Configs& configs, const PlanRequest& request) {
  int best = -1;
  for (size_t i = 0; i < configs.size() && fits(configs[i], request); ++i) {
    best = static_cast<int>(i);
    if (configs[i].tile_n >= request.problem.n) break;
  }
  return best;
}

std::vector<KernelConfig> describe(const Configs& configs) {
  std::vector<KernelConfig> rows;
  for (const GatherConfig& config : configs) {
    rows.push_back({config.name,
                    {{"tile_n", config.tile_n},
                     {"stages", kGatherStages},
                     {"ctas_per_sm", 1},
                     {"smem_bytes", least_smem_bytes(config, kGatherTileK)}}});
  }
  return rows;
}

bool takes(const Configs& configs, const PlanRequest& request, std::string* reason) {
  const int best = best_config(configs, request);
  if (best < 0) {
    explain(reason, "the gather kernel needs more shared memory than this GPU has");
    return false;
  }
  const SpmmProblem& problem = request.problem;
  const GatherConfig& config = configs[static_cast<size_t>(best)];
  const double pass_cost = kPassCost + kPassCostOfDensity * density(problem);
  const int64_t most = static_cast<int64_t>(kDenseCost / pass_cost) * config.tile_n;
  if (problem.n > most) {
    if (reason != nullptr) {
      *reason = "N > " + std::to_string(most) + ": unpacking and the dense GEMM cost less than " +
                "passes of " + std::to_string(config.tile_n) + " tokens";
    }
    return false;
  }
  if (reason != nullptr) {
    *reason = "CUDA cores multiply nonzeros only, for at most " + std::to_string(config.tile_n) +
              " tokens a pass; timed on a Hopper GPU only";
  }
  return true;
}

Status plan(const Configs& configs, const PlanRequest& request, SpmmPlan* out) {
  const SpmmProblem& problem = request.problem;
  const DeviceInfo& device = request.device;
  out->config =
      request.forced() ? config_named(configs, request.config) : best_config(configs, request);
  const GatherConfig& config = configs[static_cast<size_t>(out->config)];
  if (Status fit = check_smem(config.name, least_smem_bytes(config, problem.k), device);
      !fit.ok()) {
    return fit;
  }
  const int64_t passes = gather_passes(config, problem.n);
  out->work.rows = gather_slices(problem.m);
  out->work.cols = gather_parts(problem.k);
  if (out->work.units() > INT32_MAX || passes > UINT16_MAX) {
    return Status::invalid_value(shape_text(problem) + " needs " +
                                 std::to_string(out->work.units()) + " units of work and " +
                                 std::to_string(passes) + " passes, more than a grid can have");
  }
  // All passes together have a CTA per SM.
  const int64_t ctas =
      request.ctas == 0 ? device.num_sms / std::max<int64_t>(passes, 1) : request.ctas;
  out->ctas = std::clamp(ctas, std::max<int64_t>(out->work.cols, 1),
                         std::max<int64_t>(out->work.units(), 1));
  out->work.workers = out->ctas;
  out->ring_bytes = gather_ring_bytes(warps_of(config, problem.k, gather_batch(out->work), device));
  out->workspace_bytes = gather_sums_bytes(problem.m, problem.n, problem.k);
  out->x_multiple = 8;
  return Status::success();
}

}  // namespace

const std::vector<GatherConfig>& gather_configs(KernelFamily family) {
  static const Configs sm80 = {
#define FLASH_LLM_ROW(name, tokens, pair_warps) {"sm80_" #name, tokens, pair_warps},
      FLASH_LLM_GATHER_CONFIGS(FLASH_LLM_ROW)
#undef FLASH_LLM_ROW
  };
  static const Configs sm90 = {
#define FLASH_LLM_ROW(name, tokens, pair_warps) {#name, tokens, pair_warps},
      FLASH_LLM_GATHER_CONFIGS(FLASH_LLM_ROW)
#undef FLASH_LLM_ROW
  };
  return family == KernelFamily::kGatherSm80 ? sm80 : sm90;
}

// Gather / the bitmap on an H200, fp16, in microseconds (2026-11-30), N = 1, 4 and 8:
//                     90 % zeros                            80 %
//   28672x7168   21.7 / 34.0  26.1 / 34.2  30.3 / 34.2   38.0 / 42.9  42.5 / 43.2  49.6 / 43.4
//   28672x4096   13.9 / 23.7  17.1 / 24.1  21.7 / 24.3   23.5 / 28.5  26.7 / 28.7  32.5 / 28.4
//   14336x4096    8.9 / 15.1  10.4 / 15.0  15.1 / 15.0   13.3 / 17.5  15.2 / 17.5  19.4 / 17.4
//    7168x7168    8.5 / 14.8  11.8 / 14.7  14.8 / 14.7   12.5 / 16.8  15.8 / 16.8  19.8 / 16.9
//    4096x4096    4.3 /  6.2   4.9 /  6.1   8.2 /  5.9    5.8 /  6.7   6.8 /  6.7  11.1 /  6.6
//    2048x2048    2.6 /  3.8   3.3 /  3.7   5.8 /  3.7
bool gather_suits_few_tokens(const DeviceInfo& device, int64_t m, int64_t k, double density,
                             int64_t expected_tokens, std::string* reason) {
  if (!device.features.contains(GpuFeature::kMmaSync) || expected_tokens < 1) return false;
  // Fewer take less time than a CTA needs to find its slices, unless it does so while the previous
  // kernel runs (warps_of).
  const bool ahead = expected_tokens <= 4 && device.features.contains(GpuFeature::kBulkCopy);
  const double least_elements = ahead ? 4e6 : 32e6;
  // Below 2 % fillers are most of the format.
  constexpr double kLeastDensity = 0.02;
  const double most = expected_tokens <= 4 ? 0.22 : expected_tokens <= 8 ? 0.15 : 0.0;
  if (static_cast<double>(m) * static_cast<double>(k) < least_elements || density < kLeastDensity ||
      density > most) {
    return false;
  }
  *reason = "at most " + std::to_string(expected_tokens) +
            " tokens are expected, for which work per nonzero costs less than work per element";
  return true;
}

std::vector<KernelConfig> describe_gather_sm80_configs() {
  return describe(gather_configs(KernelFamily::kGatherSm80));
}

std::vector<KernelConfig> describe_gather_sm90_configs() {
  return describe(gather_configs(KernelFamily::kGatherSm90));
}

// On GPUs that have bulk copies the other family is taken, which then gives the reason.
bool takes_gather_sm80(const PlanRequest& request, std::string* reason) {
  return !request.device.features.contains(GpuFeature::kBulkCopy) &&
         takes(gather_configs(KernelFamily::kGatherSm80), request, reason);
}

bool takes_gather_sm90(const PlanRequest& request, std::string* reason) {
  return takes(gather_configs(KernelFamily::kGatherSm90), request, reason);
}

Status plan_gather_sm80(const PlanRequest& request, SpmmPlan* out) {
  return plan(gather_configs(KernelFamily::kGatherSm80), request, out);
}

Status plan_gather_sm90(const PlanRequest& request, SpmmPlan* out) {
  return plan(gather_configs(KernelFamily::kGatherSm90), request, out);
}

}  // namespace flash_llm
