// The configurations of the mma.sync kernel (mma_sync_kernel.cuh) as types, and its parameters.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/bitmap/smem.cuh"
#include "cuda/schedule/weight_copy.cuh"
#include "plan/bitmap_mma_sync.h"

namespace flash_llm {

struct MmaSyncParams : BitmapParams {
  const uint16_t* x;
  int64_t x_stride;
  int k;
};

// The two families: how they copy weights, and their configurations.
struct BitmapSm80 {
  static constexpr KernelFamily kFamily = KernelFamily::kBitmapSm80;
  using WeightCopy = AsyncCopy;
  static constexpr const auto& kConfigs = kBitmapSm80Configs;
};
struct BitmapSm90 {
  static constexpr KernelFamily kFamily = KernelFamily::kBitmapSm90;
  using WeightCopy = BulkCopy;
  static constexpr const auto& kConfigs = kBitmapSm90Configs;
};

// Configuration kIndex of a family. Each consumer warp has both strips of a chunk.
template <typename Family, ValueType kType, size_t kIndex>
struct MmaSyncConfig
    : BitmapKernelConfig<kType, Family::kConfigs[kIndex].tile_n, Family::kConfigs[kIndex].warps, 2,
                         1, Family::kConfigs[kIndex].x_stages> {
  using WeightCopy = typename Family::WeightCopy;

  static constexpr int kWarps = Family::kConfigs[kIndex].warps;
  static constexpr int kRings = Family::kConfigs[kIndex].rings;
  static constexpr int kGroupChunks = Family::kConfigs[kIndex].group_chunks;
  static constexpr int kGroups = kWarps / kGroupChunks;
  static constexpr int kGroupWarps = kGroupChunks;
  static constexpr int kRingGroups = kGroups / kRings;
  static constexpr int kAllWarps = kWarps + kRings + 1;  // the last one copies X
  static constexpr int kThreads = kAllWarps * 32;

  static_assert(kRingGroups * kRings == kGroups, "each ring has the same number of groups");
  static_assert(MmaSyncConfig::kFinishesAll, "every sum goes to the finishing kernel");
};

}  // namespace flash_llm
