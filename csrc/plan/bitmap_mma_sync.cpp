#include "plan/bitmap_mma_sync.h"

#include <algorithm>
#include <cstddef>
#include <iterator>

#include "plan/config_table.h"

namespace flash_llm {
namespace {

// Each pass reads the packed weight once; unpacking and the dense GEMM read it, write the dense
// weight and read that. Packed weights have between 0.2 (90 % zeros) and 0.57 (50 %) of the dense
// bytes, so four passes cost less. Not measured on the GPUs that take these families.
constexpr int kMaxPasses = 4;

using Configs = std::vector<MmaSyncPlanConfig>;

int least_smem_bytes(const MmaSyncPlanConfig& config) {
  return mma_sync_smem_bytes(config, mma_sync_min_ring_bytes(config));
}

// Whether a CTA of the configuration fits into a device's shared memory.
bool fits(const MmaSyncPlanConfig& config, const DeviceInfo& device) {
  return least_smem_bytes(config) <= smem_per_cta_bytes(device);
}

// The index of the narrowest configuration that fits a device and covers n tokens, or of the widest
// that fits if none does; -1 if none fits.
int best_config(const Configs& configs, const DeviceInfo& device, int64_t n) {
  const auto rank = [&](int tile_n) { return tile_n >= n ? tile_n : INT32_MAX - tile_n; };
  int best = -1, best_rank = INT32_MAX;
  for (size_t i = 0; i < configs.size(); ++i) {
    const MmaSyncPlanConfig& config = configs[i];
    if (!fits(config, device) || rank(config.tile_n) >= best_rank) continue;
    best = static_cast<int>(i);
    best_rank = rank(config.tile_n);
  }
  return best;
}

std::vector<KernelConfig> describe(const Configs& configs) {
  std::vector<KernelConfig> rows;
  for (const MmaSyncPlanConfig& config : configs) {
    rows.push_back({config.name,
                    {{"tile_n", config.tile_n},
                     {"warps", config.warps},
                     {"strips", 2},
                     {"cluster", 1},
                     {"rings", config.rings},
                     {"group_chunks", config.group_chunks},
                     {"x_stages", config.x_stages},
                     {"ctas_per_sm", 1},
                     {"smem_bytes", least_smem_bytes(config)}}});
  }
  return rows;
}

bool takes(const Configs& configs, const PlanRequest& request, const char* copies,
           std::string* reason) {
  const int widest = best_config(configs, request.device, INT64_MAX);
  if (widest < 0) {
    explain(reason, "the bitmap kernel needs more shared memory than this GPU has");
    return false;
  }
  const int64_t most = kMaxPasses * int64_t{configs[static_cast<size_t>(widest)].tile_n};
  if (request.problem.n > most) {
    if (reason != nullptr) {
      *reason = "N > " + std::to_string(most) + ": unpacking and the dense GEMM cost less";
    }
    return false;
  }
  if (reason != nullptr) {
    *reason = std::string("mma.sync, weights by ") + copies +
              "; the narrowest tile that covers N decodes each weight once; timed on a Hopper GPU "
              "only";
  }
  return true;
}

Status plan(const Configs& configs, const PlanRequest& request, SpmmPlan* out) {
  const SpmmProblem& problem = request.problem;
  const DeviceInfo& device = request.device;
  out->config = request.forced() ? config_named(configs, request.config)
                                 : best_config(configs, device, problem.n);
  const MmaSyncPlanConfig& config = configs[static_cast<size_t>(out->config)];
  if (Status fit = check_smem(config.name, least_smem_bytes(config), device); !fit.ok()) return fit;
  if (Status divided = divide_bitmap_work(problem, config.tile_n, config.block_m(), out);
      !divided.ok()) {
    return divided;
  }
  const int64_t ctas = request.ctas == 0 ? device.num_sms : request.ctas;
  out->ctas = std::clamp<int64_t>(ctas, 1, std::max<int64_t>(out->work.units(), 1));
  out->work.workers = out->ctas;
  const int room = smem_per_cta_bytes(device) - kBitmapSpareSmemBytes;
  const int step = kChunkUnitBytes * config.rings;
  out->ring_bytes =
      std::max(room - mma_sync_smem_bytes(config, 0), mma_sync_min_ring_bytes(config)) / step *
      step;
  out->workspace_bytes = mma_sync_sums_bytes(config, out->work);
  out->x_multiple = 8;
  return Status::success();
}

}  // namespace

const std::vector<MmaSyncPlanConfig>& mma_sync_configs(KernelFamily family) {
  static const Configs sm80(std::begin(kBitmapSm80Configs), std::end(kBitmapSm80Configs));
  static const Configs sm90(std::begin(kBitmapSm90Configs), std::end(kBitmapSm90Configs));
  return family == KernelFamily::kBitmapSm80 ? sm80 : sm90;
}

std::vector<KernelConfig> describe_bitmap_sm80_configs() {
  return describe(mma_sync_configs(KernelFamily::kBitmapSm80));
}

std::vector<KernelConfig> describe_bitmap_sm90_configs() {
  return describe(mma_sync_configs(KernelFamily::kBitmapSm90));
}

// Each family is for the GPUs that have no faster one, which gives the reason there.
bool takes_bitmap_sm80(const PlanRequest& request, std::string* reason) {
  return !request.device.features.contains(GpuFeature::kBulkCopy) &&
         takes(mma_sync_configs(KernelFamily::kBitmapSm80), request, "cp.async", reason);
}

bool takes_bitmap_sm90(const PlanRequest& request, std::string* reason) {
  return !request.device.features.contains(GpuFeature::kWgmma) &&
         takes(mma_sync_configs(KernelFamily::kBitmapSm90), request, "bulk copies", reason);
}

Status plan_bitmap_sm80(const PlanRequest& request, SpmmPlan* out) {
  return plan(mma_sync_configs(KernelFamily::kBitmapSm80), request, out);
}

Status plan_bitmap_sm90(const PlanRequest& request, SpmmPlan* out) {
  return plan(mma_sync_configs(KernelFamily::kBitmapSm90), request, out);
}

}  // namespace flash_llm
