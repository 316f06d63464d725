// The choice of a kernel is a pure function. These tests specify it and need no GPU.
#include <gtest/gtest.h>

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "plan/bitmap_mma_sync.h"
#include "plan/bitmap_rows_sm90.h"
#include "plan/bitmap_sm90a.h"
#include "plan/cpu.h"
#include "plan/gather.h"
#include "plan/quantized_bitmap.h"
#include "plan/quantized_bitmap_sm90a.h"
#include "plan/spmm_plan.h"
#include "plan/tiled_csl_sm80.h"
#include "testing.h"

namespace flash_llm {
namespace {

using testing::mentions;

const DeviceInfo kCpu{};
// A100: 108 SMs of 164 KB; L40S: 142 of 100 KB; H200: 132 of 228 KB; B200: 148 of 228 KB; RTX 5090:
// 170 of 100 KB.
const std::string kArchs = "8.0;9.0a;10.0+PTX;12.0";
const DeviceInfo kA100 = gpu(80, 108, 164 * 1024, kArchs);
const DeviceInfo kL40S = gpu(89, 142, 100 * 1024, kArchs);
const DeviceInfo kH200 = gpu(90, 132, 228 * 1024, kArchs);
const DeviceInfo kB200 = gpu(100, 148, 228 * 1024, kArchs);
const DeviceInfo kRtx5090 = gpu(120, 170, 100 * 1024, kArchs);

SpmmProblem problem(int64_t m, int64_t n, int64_t k, double sparsity = 0.8) {
  SpmmProblem out;
  out.m = m;
  out.n = n;
  out.k = k;
  out.nnz =
      static_cast<int64_t>(static_cast<double>(m) * static_cast<double>(k) * (1.0 - sparsity));
  return out;
}

SpmmPlan plan_of(const SpmmProblem& problem, const DeviceInfo& device,
                 const std::string& config = "auto", int64_t ctas = 0) {
  SpmmPlan plan;
  const Status status = select_plan(problem, device, config, ctas, &plan);
  EXPECT_TRUE(status.ok()) << status.message;
  return plan;
}

Status failure_of(const SpmmProblem& problem, const DeviceInfo& device,
                  const std::string& config = "auto", int64_t ctas = 0) {
  SpmmPlan plan;
  Status status = select_plan(problem, device, config, ctas, &plan);
  EXPECT_FALSE(status.ok()) << plan.to_string();
  return status;
}

TEST(Configs, RowsAreDistinctOrderedAndFitTheSmallestGpu) {
  std::set<std::string> names;
  int last_tile_n = 0;
  for (const LscdConfig& config : lscd_configs()) {
    EXPECT_TRUE(names.insert(config.name).second) << config.name;
    EXPECT_GE(config.tile_n, last_tile_n) << "choosing the narrowest relies on rising tile_n";
    last_tile_n = config.tile_n;
    EXPECT_EQ(config.tile_n % 8, 0) << "mma.m16n8k16";
    EXPECT_EQ(kLscdCtaWarps % config.warps_per_tile, 0) << config.name;
    const std::string stem =
        "w" + std::to_string(config.warps_per_tile) + "n" + std::to_string(config.tile_n);
    EXPECT_EQ(std::string(config.name).substr(0, stem.size()), stem);
    // sm_86 and sm_89 have the least shared memory: 99 KB for one CTA.
    EXPECT_LE(lscd_smem_bytes(config), 99 * 1024) << config.name;
  }
}

TEST(SelectPlan, TheNarrowestTileThatCoversN) {
  for (const DeviceInfo& device : {kA100, kH200}) {
    for (int64_t n = 1; n <= lscd_configs().back().tile_n; ++n) {
      const SpmmPlan plan = plan_of(problem(28672, n, 7168), device);
      ASSERT_EQ(plan.family, KernelFamily::kTiledCslSm80) << "N=" << n;
      const int chosen = lscd_configs()[static_cast<size_t>(plan.config)].tile_n;
      EXPECT_GE(chosen, n);
      for (const LscdConfig& config : lscd_configs()) {
        EXPECT_FALSE(config.tile_n >= n && config.tile_n < chosen)
            << "N=" << n << " took " << plan.name() << " though " << config.name << " covers it";
      }
    }
    EXPECT_EQ(plan_of(problem(28672, 0, 7168), device).family, KernelFamily::kTiledCslSm80);
  }
}

TEST(SelectPlan, PrefillGoesToTheDenseGemm) {
  const SpmmPlan plan = plan_of(problem(28672, 2048, 7168), kH200);
  EXPECT_EQ(plan.family, KernelFamily::kDense);
  EXPECT_EQ(plan.name(), "dense");
  EXPECT_EQ(plan.workspace_bytes, int64_t{28672} * 7168 * 2);
  EXPECT_FALSE(plan.reason.empty());
}

TEST(SelectPlan, OneSwitchBetweenSparseAndDenseAsNGrows) {
  for (const DeviceInfo& device : {kCpu, kA100, kH200}) {
    bool dense_before = false;
    for (int64_t n = 0; n <= 4096; ++n) {
      const bool dense = plan_of(problem(4096, n, 4096), device).family == KernelFamily::kDense;
      EXPECT_FALSE(dense_before && !dense) << "N=" << n << " went back to sparse";
      dense_before = dense;
    }
    EXPECT_TRUE(dense_before);
  }
}

TEST(SelectPlan, TheCpuTakesItsOwnKernels) {
  EXPECT_EQ(plan_of(problem(576, 1, 1536), kCpu).family, KernelFamily::kTiledCslCpu);
  EXPECT_EQ(plan_of(problem(576, 512, 1536), kCpu).family, KernelFamily::kDense);
  EXPECT_EQ(plan_of(problem(576, 1, 1536), kCpu, "cpu_reference").family, KernelFamily::kReference);
  EXPECT_EQ(plan_of(problem(576, 512, 1536), kCpu, "cpu_tiles").family, KernelFamily::kTiledCslCpu);
}

TEST(SelectPlan, EveryNameCanBeForcedOnEveryShape) {
  for (const DeviceInfo& device : {kCpu, kA100, kH200}) {
    for (const std::string& name :
         plan_names(Format::kTiledCsl, ValueType::kFloat16, device.compute_capability > 0)) {
      for (const SpmmProblem& shape :
           {problem(0, 0, 0), problem(1, 1, 1), problem(128, 0, 64), problem(0, 8, 64),
            problem(128, 8, 0), problem(129, 65, 65), problem(28672, 4096, 7168)}) {
        const SpmmPlan plan = plan_of(shape, device, name);
        EXPECT_EQ(plan.name(), name);
        EXPECT_EQ(plan.reason, "forced");
        if (plan.family == KernelFamily::kTiledCslSm80) {
          EXPECT_GE(plan.ctas, 1);
        }
        EXPECT_GE(plan.workspace_bytes, 0);
      }
    }
  }
}

TEST(SelectPlan, IsPure) {
  const SpmmPlan first = plan_of(problem(28672, 16, 7168), kH200);
  plan_of(problem(1, 1, 1), kA100);
  const SpmmPlan again = plan_of(problem(28672, 16, 7168), kH200);
  EXPECT_EQ(first.to_string(), again.to_string());
}

TEST(SelectPlan, TheGridFillsTheGpuAndNeverOutgrowsTheWork) {
  for (const LscdConfig& config : lscd_configs()) {
    const SpmmPlan big = plan_of(problem(28672, config.tile_n, 7168), kH200, config.name);
    EXPECT_EQ(big.ctas % kH200.num_sms, 0) << config.name;
    EXPECT_LE(big.ctas, int64_t{kH200.num_sms} * config.ctas_per_sm);
    EXPECT_LE(big.ctas / kH200.num_sms * lscd_smem_bytes(config), kH200.smem_per_sm_bytes);

    // Two tile rows of three tiles: six units of work.
    const SpmmPlan small = plan_of(problem(130, 1, 150), kH200, config.name);
    EXPECT_EQ(small.ctas, 6) << config.name;
  }
}

TEST(SelectPlan, AForcedGridIsTaken) {
  for (const int64_t ctas : {1, 2, 7, 1000, 224 * 112}) {
    const SpmmPlan plan = plan_of(problem(28672, 8, 7168), kH200, "w1n8", ctas);
    EXPECT_EQ(plan.ctas, ctas);
    // Two partial tile rows of fp32 per CTA.
    EXPECT_EQ(plan.workspace_bytes, 2 * ctas * kTileM * 8 * 4);
  }
}

TEST(SelectPlan, AForcedGridIsCutToTheWork) {
  EXPECT_EQ(plan_of(problem(130, 1, 150), kH200, "w1n8", 65535).ctas, 6);
  EXPECT_EQ(plan_of(problem(0, 1, 150), kH200, "w1n8", 65535).ctas, 1);
}

TEST(SelectPlan, PrintsWhatItChose) {
  const std::string text = plan_of(problem(28672, 8, 7168), kH200, "w1n8", 396).to_string();
  EXPECT_NE(text.find("w1n8"), std::string::npos) << text;
  EXPECT_NE(text.find("ctas=396"), std::string::npos) << text;
  EXPECT_NE(text.find("workspace_bytes="), std::string::npos) << text;
  EXPECT_NE(text.find("forced"), std::string::npos) << text;
}

TEST(SelectPlan, RefusesOldGpus) {
  for (const int capability : {50, 70, 75}) {
    const Status status = failure_of(problem(128, 8, 64), gpu(capability, 80, 64 * 1024, kArchs));
    EXPECT_EQ(status.code, StatusCode::kUnsupported);
    const std::string named =
        std::to_string(capability / 10) + "." + std::to_string(capability % 10);
    EXPECT_TRUE(mentions(status.message, {"8.0", named})) << status.message;
  }
}

TEST(SelectPlan, RefusesNamesOfTheOtherDevice) {
  for (const std::string& name : plan_names(Format::kTiledCsl, ValueType::kFloat16, true)) {
    if (name == "dense") continue;
    const Status status = failure_of(problem(128, 8, 64), kCpu, name);
    EXPECT_EQ(status.code, StatusCode::kInvalidValue);
    EXPECT_TRUE(mentions(status.message, {"\"cpu_tiles\"", "\"" + name + "\""})) << status.message;
  }
  for (const char* name : {"cpu_tiles", "cpu_reference", "", "AUTO", "w1n8 ", "fast"}) {
    EXPECT_EQ(failure_of(problem(128, 8, 64), kH200, name).code, StatusCode::kInvalidValue);
  }
}

TEST(SelectPlan, RefusesWhatThirtyTwoBitsCannotIndex) {
  const int64_t too_large = int64_t{1} << 31;
  for (const DeviceInfo& device : {kCpu, kH200}) {
    EXPECT_EQ(failure_of(problem(too_large, 1, 1), device).code, StatusCode::kInvalidValue);
    EXPECT_EQ(failure_of(problem(1, too_large, 1), device).code, StatusCode::kInvalidValue);
    EXPECT_EQ(failure_of(problem(1, 1, too_large), device).code, StatusCode::kInvalidValue);
  }
  for (const int64_t negative : {int64_t{-1}, INT64_MIN}) {
    EXPECT_EQ(failure_of(problem(negative, 1, 1, 1.0), kH200).code, StatusCode::kInvalidValue);
    EXPECT_EQ(failure_of(problem(1, negative, 1, 1.0), kH200).code, StatusCode::kInvalidValue);
    EXPECT_EQ(failure_of(problem(1, 1, negative, 1.0), kH200).code, StatusCode::kInvalidValue);
  }
  // M and K fit, the number of tiles does not: 2^24 tile rows x 2^10 tile columns.
  const Status status = failure_of(problem(INT32_MAX, 8, 65536, 1.0), kH200, "w1n8");
  EXPECT_EQ(status.code, StatusCode::kInvalidValue);
  EXPECT_TRUE(mentions(status.message, {"M=2147483647"})) << status.message;
}

TEST(SelectPlan, RefusesGridsThatCannotBeLaunched) {
  for (const int64_t ctas : {int64_t{-1}, int64_t{65536}, INT64_MAX, INT64_MIN}) {
    const Status status = failure_of(problem(128, 8, 64), kH200, "w1n8", ctas);
    EXPECT_EQ(status.code, StatusCode::kInvalidValue);
    EXPECT_TRUE(mentions(status.message, {"ctas ", "[0, 65535]", std::to_string(ctas)}))
        << status.message;
  }
}

SpmmProblem bitmap_problem(int64_t m, int64_t n, int64_t k, double sparsity = 0.5) {
  SpmmProblem out = problem(m, n, k, sparsity);
  out.format = Format::kBitmap;
  return out;
}

TEST(SelectPlanBitmap, TheNarrowestTileThatCoversNAndOneCtaPerSm) {
  for (int64_t n = 1; n <= bitmap_configs().back().tile_n; ++n) {
    const SpmmPlan plan = plan_of(bitmap_problem(28672, n, 7168, 0.7), kH200);
    ASSERT_EQ(plan.family, KernelFamily::kBitmapSm90a) << "N=" << n;
    const int chosen = bitmap_configs()[static_cast<size_t>(plan.config)].tile_n;
    EXPECT_GE(chosen, n);
    EXPECT_TRUE(chosen == 8 || chosen < 2 * n) << "N=" << n;
    EXPECT_EQ(plan.ctas, kH200.num_sms);
  }
  EXPECT_EQ(plan_of(bitmap_problem(28672, 4096, 7168), kH200).family, KernelFamily::kDense);
}

TEST(SelectPlanBitmap, SmallLayersTakeLowTiles) {
  const auto name = [](int64_t m, int64_t n, int64_t k, double sparsity) {
    return plan_of(bitmap_problem(m, n, k, sparsity), kH200).name();
  };
  EXPECT_EQ(name(6144, 17, 4096, 0.7), "n32_low");
  EXPECT_EQ(name(18944, 32, 3584, 0.9), "n32_low");
  EXPECT_EQ(name(28672, 32, 4096, 0.5), "n32_low");  // enough nonzeros for a column of X
  EXPECT_EQ(name(28672, 32, 4096, 0.7), "n32");
  EXPECT_EQ(name(7168, 32, 28672, 0.5), "n32");
  EXPECT_EQ(name(2048, 32, 2048, 0.7), "n32");
  EXPECT_EQ(name(2048, 32, 2048, 0.9), "n32_low");
  EXPECT_EQ(name(4096, 33, 4096, 0.7), "n64");
}

TEST(SelectPlanBitmap, ManyTokensTakeTheDenseRouteEarlierWhereMostPairsAreTwoFour) {
  const auto name = [](int64_t n, double sparsity) {
    return plan_of(bitmap_problem(28672, n, 7168, sparsity), kH200).name();
  };
  EXPECT_EQ(name(1024, 0.5), "n256");
  EXPECT_EQ(name(1025, 0.5), "dense");
  EXPECT_EQ(name(256, 0.9), "n256");
  EXPECT_EQ(name(257, 0.9), "dense");
}

TEST(SelectPlanBitmap, TwoFourPairsTakePassesOf64TokensUpToTwoOfThem) {
  EXPECT_EQ(plan_of(bitmap_problem(28672, 65, 7168, 0.9), kH200).name(), "n64");
  EXPECT_EQ(plan_of(bitmap_problem(28672, 128, 7168, 0.9), kH200).name(), "n64");
  EXPECT_EQ(plan_of(bitmap_problem(28672, 129, 7168, 0.9), kH200).name(), "n256");
}

TEST(SelectPlanBitmap, SharedMemoryFitsBesideTheFinishingKernelAndHoldsTheFullestChunks) {
  for (const BitmapConfig& config : bitmap_configs()) {
    for (const double sparsity : {0.0, 0.3, 0.5, 0.6, 0.9, 1.0}) {
      const SpmmPlan plan =
          plan_of(bitmap_problem(4096, config.tile_n, 4096, sparsity), kH200, config.name);
      EXPECT_LE(bitmap_smem_bytes(config, plan.ring_bytes), (228 - 4) * 1024) << config.name;
      EXPECT_GE(plan.ring_bytes, bitmap_min_ring_bytes(config)) << config.name;
      EXPECT_EQ(plan.ring_bytes % kChunkUnitBytes, 0);
    }
  }
}

TEST(SelectPlanBitmapRows, FewTokensAndFewRowsTakeWholeRowsInACta) {
  const auto family = [](int64_t m, int64_t n, int64_t k, double sparsity) {
    return plan_of(bitmap_problem(m, n, k, sparsity), kH200).family;
  };
  constexpr KernelFamily kRows = KernelFamily::kBitmapRowsSm90;
  constexpr KernelFamily kBlocks = KernelFamily::kBitmapSm90a;
  EXPECT_EQ(family(4096, 1, 4096, 0.9), kRows);
  EXPECT_EQ(family(14336, 8, 4096, 0.9), kRows);  // 128 chunks in a CTA
  EXPECT_EQ(family(28672, 8, 4096, 0.5), kRows);
  EXPECT_EQ(family(28672, 8, 4096, 0.7), kBlocks);
  EXPECT_EQ(family(9216, 8, 9216, 0.5), kBlocks);  // three chunk rows in some CTAs, 2.2 on average
  EXPECT_EQ(family(28672, 8, 7168, 0.5), kRows);
  EXPECT_EQ(family(28672, 8, 7168, 0.6), kBlocks);
  EXPECT_EQ(family(36864, 8, 9216, 0.5), kBlocks);  // 648 chunks in a CTA
  EXPECT_EQ(family(4096, 16, 14336, 0.9), kRows);
  EXPECT_EQ(family(6144, 9, 4096, 0.7), kRows);
  EXPECT_EQ(family(6144, 9, 4096, 0.9), kBlocks);
  EXPECT_EQ(family(14336, 16, 4096, 0.5), kBlocks);
  EXPECT_EQ(family(4096, 17, 4096, 0.5), kBlocks);
  // On every GPU that has bulk copies and the shared memory.
  EXPECT_EQ(plan_of(bitmap_problem(4096, 8, 4096), kB200).family, kRows);
  for (const DeviceInfo& device : {kA100, kRtx5090}) {
    EXPECT_NE(plan_of(bitmap_problem(4096, 8, 4096), device).family, kRows);
    EXPECT_EQ(failure_of(bitmap_problem(4096, 8, 4096), device, "rows8").code,
              StatusCode::kUnsupported);
  }
  EXPECT_EQ(plan_of(bitmap_problem(4096, 8, 4096), kH200).workspace_bytes, 0);
  EXPECT_EQ(plan_of(bitmap_problem(33, 1, 64), kH200).ctas, 2);  // no more than chunk rows
}

TEST(SelectPlanBitmapRows, SharedMemoryHoldsTheFullestChunks) {
  for (const BitmapRowsConfig& config : bitmap_rows_configs()) {
    const SpmmPlan plan = plan_of(bitmap_problem(4096, 1, 4096), kH200, config.name);
    EXPECT_GE(plan.ring_bytes, kBitmapRowsMinRingBytes) << config.name;
    EXPECT_LE(bitmap_rows_fixed_smem_bytes(config.tile_n, config.teams) + plan.ring_bytes,
              227 * 1024)
        << config.name;
  }
}

TEST(SelectPlanBitmap, PairsOfColumnsStayTogetherWhereTheyAreMostlyTwoFour) {
  EXPECT_EQ(plan_of(bitmap_problem(4096, 8, 4096, 0.5), kH200, "n8").unit_cols, 1);
  EXPECT_EQ(plan_of(bitmap_problem(4096, 8, 4096, 0.9), kH200, "n8").unit_cols, 2);
  // 8 blocks of 512 rows, 16 pairs of 128 columns.
  EXPECT_EQ(plan_of(bitmap_problem(4096, 8, 4096, 0.9), kH200, "n8").ctas, 8 * 16);
}

TEST(SelectPlanBitmap, WorkspaceHoldsASlotForEveryCtaAndRowOfBlocks) {
  // 28672 rows are 56 blocks of 512; each sum is 4 bytes.
  const SpmmPlan plan = plan_of(bitmap_problem(28672, 8, 7168), kH200, "n8");
  EXPECT_EQ(plan.workspace_bytes, int64_t{132 + 56} * 512 * 8 * 4);
  const SpmmPlan two_blocks = plan_of(bitmap_problem(28672, 128, 7168), kH200, "n64");
  EXPECT_EQ(two_blocks.workspace_bytes, int64_t{132 + 2 * 112} * 256 * 64 * 4);
  // A kernel that stores complete output tiles itself needs two slots per cluster for any number of
  // tokens, and a word for each of a CTA's 8 consumer warps if clusters add each other's sums:
  // where there are at most 1.5 for each tile.
  constexpr int64_t kSlots = int64_t{2 * 132 / 2} * 256 * 256 * 4;
  for (const int64_t n : {129, 1024, 1 << 20}) {
    const SpmmPlan wide = plan_of(bitmap_problem(28672, n, 7168), kH200, "n256");
    EXPECT_EQ(wide.workspace_bytes, kSlots + 132 * 8 * 4);
    EXPECT_TRUE(wide.rounds_before_activation);
  }
  const auto bytes = [](int64_t m) {
    return plan_of(bitmap_problem(m, 256, 4096), kH200, "n256").workspace_bytes;
  };
  EXPECT_EQ(bytes(43 * 256), kSlots);  // 66 clusters for 43 and 44 tiles
  EXPECT_EQ(bytes(44 * 256), kSlots + 132 * 8 * 4);
}

TEST(SelectPlanBitmap, EveryGpuTakesTheFastestFamilyThatItHasCodeFor) {
  const auto family = [](const DeviceInfo& device) {
    return plan_of(bitmap_problem(28672, 1, 7168, 0.7), device).family;
  };
  EXPECT_EQ(family(kA100), KernelFamily::kBitmapSm80);
  EXPECT_EQ(family(kL40S), KernelFamily::kBitmapSm80);
  EXPECT_EQ(family(kH200), KernelFamily::kBitmapSm90a);
  EXPECT_EQ(family(kB200), KernelFamily::kBitmapSm90);
  EXPECT_EQ(family(kRtx5090), KernelFamily::kBitmapSm90);
  EXPECT_EQ(family(kCpu), KernelFamily::kDense);
  const DeviceInfo hopper_with_ptx_80 = gpu(90, 132, 228 * 1024, "8.0+PTX");
  const DeviceInfo hopper_without_a = gpu(90, 132, 228 * 1024, "8.0;9.0");
  EXPECT_EQ(family(hopper_with_ptx_80), KernelFamily::kBitmapSm80);
  EXPECT_EQ(family(hopper_without_a), KernelFamily::kBitmapSm90);
  EXPECT_EQ(family(gpu(80, 108, 164 * 1024, "9.0a")), KernelFamily::kDense);
  for (const DeviceInfo& device : {kA100, hopper_with_ptx_80, hopper_without_a, kB200}) {
    const Status status = failure_of(bitmap_problem(4096, 1, 4096), device, "n8");
    EXPECT_EQ(status.code, StatusCode::kUnsupported);
    EXPECT_NE(status.message.find("sm_90a"), std::string::npos) << status.message;
  }
  EXPECT_EQ(failure_of(bitmap_problem(4096, 1, 4096), kA100, "sm90_n8").code,
            StatusCode::kUnsupported);
}

TEST(SelectPlanBitmap, TheNarrowestMmaSyncTileThatFitsTheGpu) {
  const auto name = [](int64_t n, const DeviceInfo& device) {
    return plan_of(bitmap_problem(28672, n, 7168, 0.7), device).name();
  };
  for (const int64_t n : {1, 8, 9, 16, 17, 32, 33, 64, 256}) {
    const std::string wide = n <= 8 ? "n8" : n <= 16 ? "n16" : n <= 32 ? "n32" : "n64";
    EXPECT_EQ(name(n, kA100), "sm80_" + wide) << n;
    EXPECT_EQ(name(n, kB200), "sm90_" + wide) << n;
  }
  for (const int64_t n : {1, 16, 17, 128}) {
    const std::string small = n <= 16 ? "n16_99k" : "n32_99k";
    EXPECT_EQ(name(n, kL40S), "sm80_" + small) << n;
    EXPECT_EQ(name(n, kRtx5090), "sm90_" + small) << n;
  }
  EXPECT_EQ(name(257, kA100), "dense");
  EXPECT_EQ(name(129, kL40S), "dense");
}

TEST(SelectPlanBitmap, MmaSyncConfigurationsFitWhereTheyAreOffered) {
  for (const DeviceInfo& device : {kA100, kL40S, kB200, kRtx5090}) {
    const KernelFamily family =
        device.compute_capability < 90 ? KernelFamily::kBitmapSm80 : KernelFamily::kBitmapSm90;
    for (const MmaSyncPlanConfig& config : mma_sync_configs(family)) {
      SpmmPlan plan;
      const Status status =
          select_plan(bitmap_problem(4096, config.tile_n, 4096), device, config.name, 0, &plan);
      const int room = device.smem_per_sm_bytes - 1024;
      if (mma_sync_smem_bytes(config, mma_sync_min_ring_bytes(config)) <= room) {
        ASSERT_TRUE(status.ok()) << status.message;
        EXPECT_LE(mma_sync_smem_bytes(config, plan.ring_bytes), room) << config.name;
        EXPECT_GE(plan.ring_bytes, mma_sync_min_ring_bytes(config)) << config.name;
        EXPECT_EQ(plan.ring_bytes % (config.rings * kChunkUnitBytes), 0);
      } else {
        EXPECT_EQ(status.code, StatusCode::kUnsupported);
        EXPECT_TRUE(mentions(status.message, {config.name, std::to_string(room)}))
            << status.message;
      }
    }
  }
}

TEST(SelectPlanBitmap, AGpuOfUnknownSharedMemoryHasThatOfItsComputeCapability) {
  for (const DeviceInfo& device : {kA100, kL40S, kH200, kB200, kRtx5090}) {
    const int capability = device.compute_capability;
    EXPECT_EQ(gpu(capability, 1, 0, kArchs).smem_per_sm_bytes, device.smem_per_sm_bytes)
        << capability;
  }
}

TEST(SelectPlanBitmap, AKernelOfTheOtherFormatIsRefusedByName) {
  EXPECT_NE(failure_of(bitmap_problem(64, 1, 64), kH200, "w1n8").message.find("\"bitmap\""),
            std::string::npos);
  EXPECT_NE(failure_of(problem(64, 1, 64), kH200, "n8").message.find("\"tiled_csl\""),
            std::string::npos);
  EXPECT_EQ(failure_of(bitmap_problem(64, 1, 64), kCpu, "cpu_tiles").code,
            StatusCode::kInvalidValue);
}

TEST(SelectPlanRows, XIsQuantisedOnlyWhereAskedFor) {
  const auto chosen = [](ValueType type, int64_t n, int64_t k, bool asked, bool fast_dense = false,
                         CpuIsa isa = CpuIsa::kAvx2) {
    DeviceInfo device;
    device.cpu_isa = isa;
    device.cpu_fast_dense_bf16 = device.cpu_fast_dense_fp16 = fast_dense;
    SpmmProblem p = problem(64, n, k, 0.5);
    p.format = Format::kRowBitmap;
    p.value_type = type;
    p.rounds_x = asked;
    SpmmPlan plan;
    EXPECT_TRUE(select_plan(p, device, "auto", 0, &plan).ok());
    EXPECT_FALSE(plan.reason.empty());
    return plan.name();
  };
  EXPECT_EQ(chosen(ValueType::kInt8Float16, 1, 64, false), "cpu_rows");
  EXPECT_EQ(chosen(ValueType::kFloat16, 1, 64, true), "cpu_rows");
  EXPECT_EQ(chosen(ValueType::kInt8Float16, 1, 64, true), "cpu_rows_int8x");
  EXPECT_EQ(chosen(ValueType::kInt8Float16, 4096, kCpuMaxInt8K, true), "cpu_rows_int8x");
  EXPECT_EQ(chosen(ValueType::kInt8Float16, 1, kCpuMaxInt8K + 1, true), "cpu_rows");
  EXPECT_EQ(chosen(ValueType::kInt8Bfloat16, 129, 64, true), "cpu_rows_int8x");
  EXPECT_EQ(chosen(ValueType::kInt8Bfloat16, 129, 64, true, true), "cpu_blocks");
  EXPECT_EQ(chosen(ValueType::kInt8Bfloat16, 17, 64, true, false, CpuIsa::kPortable), "cpu_blocks");
  SpmmProblem p = problem(64, 1, kCpuMaxInt8K + 1, 0.5);
  p.format = Format::kRowBitmap;
  p.value_type = ValueType::kInt8Float16;
  EXPECT_TRUE(mentions(failure_of(p, kCpu, "cpu_rows_int8x").message,
                       {"cpu_rows_int8x", std::to_string(kCpuMaxInt8K)}));
  p.rounds_x = true;
  EXPECT_TRUE(mentions(failure_of(p, kCpu, "cpu_rows").message, {"x_quantization", "cpu_rows"}));
}

TEST(SelectPlanRows, KernelOrBlocksByTokensTypeAndInstructionSet) {
  const auto most_tokens = [](ValueType type, CpuIsa isa, bool fast_dense = false) {
    DeviceInfo device;
    device.cpu_isa = isa;
    device.cpu_fast_dense_bf16 = device.cpu_fast_dense_fp16 = fast_dense;
    int64_t most = 0;
    for (int64_t n = 1; n <= 4096; n *= 2) {
      SpmmProblem p = problem(4096, n, 4096, 0.5);
      p.format = Format::kRowBitmap;
      p.value_type = type;
      SpmmPlan plan;
      EXPECT_TRUE(select_plan(p, device, "auto", 0, &plan).ok());
      EXPECT_FALSE(plan.reason.empty());
      EXPECT_EQ(plan.name(),
                plan.family == KernelFamily::kRowBitmapCpu ? "cpu_rows" : "cpu_blocks");
      if (plan.family == KernelFamily::kRowBitmapCpu) most = n;
    }
    return most;
  };
  EXPECT_EQ(most_tokens(ValueType::kBfloat16, CpuIsa::kAvx512Bf16), 128);
  EXPECT_EQ(most_tokens(ValueType::kBfloat16, CpuIsa::kAvx512), 4096);
  EXPECT_EQ(most_tokens(ValueType::kBfloat16, CpuIsa::kAvx512, true), 16);
  EXPECT_EQ(most_tokens(ValueType::kBfloat16, CpuIsa::kAvx512Bf16, true), 16);
  EXPECT_EQ(most_tokens(ValueType::kBfloat16, CpuIsa::kAvx2), 4096);
  EXPECT_EQ(most_tokens(ValueType::kBfloat16, CpuIsa::kAvx2, true), 16);
  EXPECT_EQ(most_tokens(ValueType::kBfloat16, CpuIsa::kPortable), 16);
  EXPECT_EQ(most_tokens(ValueType::kFloat16, CpuIsa::kAvx512Bf16), 4096);
  EXPECT_EQ(most_tokens(ValueType::kFloat16, CpuIsa::kAvx512, true), 128);
  EXPECT_EQ(most_tokens(ValueType::kFloat16, CpuIsa::kAvx2), 4096);
  EXPECT_EQ(most_tokens(ValueType::kFloat16, CpuIsa::kAvx2, true), 16);
  EXPECT_EQ(most_tokens(ValueType::kFloat16, CpuIsa::kPortable), 16);
  EXPECT_EQ(most_tokens(ValueType::kInt8Bfloat16, CpuIsa::kAvx2), 4096);
  EXPECT_EQ(most_tokens(ValueType::kInt8Float16, CpuIsa::kAvx2, true), 16);
  EXPECT_EQ(most_tokens(ValueType::kFloat16, CpuIsa::kNeon), 16);
  EXPECT_EQ(most_tokens(ValueType::kBfloat16, CpuIsa::kNeon), 16);
}

TEST(CpuBlockRows, AreWholeBlocksOfAtLeastOne) {
  for (const int64_t k : {0, 1, 31, 4096, 28672, INT32_MAX}) {
    EXPECT_GE(cpu_block_rows(k), 4) << k;
    EXPECT_EQ(cpu_block_rows(k) % 4, 0) << k;
  }
  EXPECT_EQ(cpu_block_rows(4096), 1024);
}

SpmmProblem gather_problem(int64_t m, int64_t n, int64_t k, double sparsity = 0.9) {
  SpmmProblem out = problem(m, n, k, sparsity);
  out.format = Format::kGather;
  return out;
}

TEST(SelectPlanGather, TheNarrowestConfigurationThatFitsTheGpu) {
  const auto name = [](int64_t n, int64_t k, const DeviceInfo& device) {
    return plan_of(gather_problem(28672, n, k), device).name();
  };
  for (const auto& [n, config] :
       {std::pair{1, "gather1"}, std::pair{2, "gather2"}, std::pair{3, "gather4"},
        std::pair{8, "gather8"}, std::pair{9, "gather8"}}) {
    for (const int64_t k : {64, 7168, 8192, 28672}) {
      EXPECT_EQ(name(n, k, kH200), config) << k;
      EXPECT_EQ(name(n, k, kB200), config) << k;
    }
    EXPECT_EQ(name(n, 4096, kA100), std::string("sm80_") + config);
  }
  // X of 8 tokens does not fit into 100 KB, that of 4 does up to 4096 columns.
  EXPECT_EQ(name(8, 4096, kL40S), "sm80_gather4");
  EXPECT_EQ(name(8, 8192, kRtx5090), "gather2");
  EXPECT_EQ(plan_of(gather_problem(28672, 1, 7168), kCpu).family, KernelFamily::kDense);
  EXPECT_EQ(failure_of(gather_problem(4096, 1, 4096), kA100, "gather1").code,
            StatusCode::kUnsupported);
  EXPECT_EQ(failure_of(gather_problem(4096, 8, 8192), kL40S, "sm80_gather8").code,
            StatusCode::kUnsupported);
}

TEST(SelectPlanGather, EachConfigurationFitsTheSharedMemoryWhereItIsTaken) {
  for (const DeviceInfo& device : {kA100, kL40S, kH200, kRtx5090}) {
    for (const int64_t k : {1, 4096, 7168, 8192, 28672}) {
      for (const int64_t n : {1, 2, 4, 8}) {
        const SpmmPlan plan = plan_of(gather_problem(28672, n, k), device);
        const GatherConfig& config = gather_configs(plan.family)[static_cast<size_t>(plan.config)];
        const int warps = plan.ring_bytes / gather_ring_bytes(1);
        EXPECT_GE(warps, kGatherMinWarps);
        EXPECT_LE(gather_smem_bytes(config, k, warps, gather_batch(plan.work)) + kGatherTableBytes,
                  device.smem_per_sm_bytes - 1024)
            << plan.to_string();
      }
    }
  }
}

TEST(SelectPlanGather, AnSmHasRoomForTheNextKernelsCtaWhereXIsSmall) {
  const auto warps = [](int64_t n, int64_t k, const DeviceInfo& device) {
    return plan_of(gather_problem(28672, n, k), device).ring_bytes / gather_ring_bytes(1);
  };
  EXPECT_EQ(warps(1, 7168, kH200), 12);
  EXPECT_EQ(warps(2, 8192, kH200), 12);
  EXPECT_EQ(warps(4, 7168, kH200), 8);
  EXPECT_EQ(warps(4, 8192, kH200), 16);  // X leaves room for one CTA
  EXPECT_EQ(warps(8, 7168, kH200), 16);
  EXPECT_EQ(plan_of(gather_problem(28672, 8, 7168), kH200).ring_bytes, 16 * 2 * 3136);
  EXPECT_EQ(warps(1, 7168, kA100), 16);  // no kernel begins before the end of the previous one
}

TEST(SelectPlanGather, PassesShareTheGpuUntilUnpackingCostsLess) {
  EXPECT_EQ(plan_of(gather_problem(28672, 8, 7168), kH200).ctas, 132);
  EXPECT_EQ(plan_of(gather_problem(28672, 9, 7168), kH200).ctas, 66);
  EXPECT_EQ(plan_of(gather_problem(28672, 64, 7168), kH200).ctas, 16);
  const SpmmPlan dense = plan_of(gather_problem(28672, 65, 7168), kH200);
  EXPECT_EQ(dense.family, KernelFamily::kDense);
  EXPECT_TRUE(mentions(dense.reason, {"N > 64"})) << dense.reason;
  EXPECT_EQ(plan_of(gather_problem(28672, 17, 7168, 0.5), kH200).family, KernelFamily::kDense);
  // A weight of one slice.
  EXPECT_EQ(plan_of(gather_problem(8, 8, 7168), kH200).ctas, 1);
}

TEST(SelectPlanGather, EachPartOf8192ColumnsHasCtasAndSums) {
  const SpmmPlan plan = plan_of(gather_problem(7168, 8, 28672), kH200);
  EXPECT_EQ(plan.workspace_bytes, int64_t{4} * 8 * 7168 * 4);
  EXPECT_EQ(plan_of(gather_problem(7168, 8, 8192), kH200).workspace_bytes, 0);
  EXPECT_EQ(plan_of(gather_problem(7168, 1, 28672), kH200, "auto", 1).ctas, 4);
  for (const int64_t k : {8193, 16384, 28672, 1 << 20}) {
    const int parts = gather_parts(k);
    for (const int ctas : {parts, parts + 1, 132, 1000}) {
      if (ctas < parts) continue;
      EXPECT_EQ(gather_first_cta(0, parts, ctas, k), 0);
      EXPECT_EQ(gather_first_cta(parts, parts, ctas, k), ctas);
      for (int part = 0; part < parts; ++part) {
        EXPECT_LT(gather_first_cta(part, parts, ctas, k),
                  gather_first_cta(part + 1, parts, ctas, k))
            << part << " of " << parts << ", " << ctas;
      }
    }
  }
  // The last part has half of the columns of each other one.
  EXPECT_EQ(gather_first_cta(3, 4, 132, 28672), 113);
}

TEST(SelectFormat, TakesGatherOnlyOnAGpuWhereFewTokensAreExpected) {
  const auto format = [](double sparsity, const DeviceInfo& device, int64_t tokens,
                         int64_t m = 28672, ValueType type = ValueType::kFloat16) {
    const SpmmProblem p = problem(m, 1, 7168, sparsity);
    return select_format(p.m, p.k, p.nnz, type, device, tokens).format;
  };
  for (const DeviceInfo& device : {kA100, kL40S, kH200, kB200, kRtx5090}) {
    EXPECT_EQ(format(0.9, device, 0), Format::kBitmap);
    EXPECT_EQ(format(0.9, device, 1), Format::kGather);
    EXPECT_EQ(format(0.9, device, 9), Format::kBitmap);
    EXPECT_EQ(format(0.8, device, 4), Format::kGather);
    EXPECT_EQ(format(0.7, device, 1), Format::kBitmap);
    EXPECT_EQ(format(0.99, device, 1), Format::kTiledCsl);
    EXPECT_EQ(format(0.9, device, 1, 512), Format::kBitmap);
    EXPECT_EQ(format(0.9, device, 8, 2048), Format::kBitmap);
  }
  EXPECT_EQ(format(0.9, kH200, 4, 2048), Format::kGather);
  EXPECT_EQ(format(0.9, kA100, 4, 2048), Format::kBitmap);
  EXPECT_EQ(format(0.9, kCpu, 1), Format::kRowBitmap);
  EXPECT_EQ(format(0.9, kH200, 1, 28672, ValueType::kInt8Float16), Format::kQuantizedBitmap);
  EXPECT_EQ(format(0.9, gpu(100, 148, 228 * 1024, "9.0a"), 1),
            format(0.9, gpu(100, 148, 228 * 1024, "9.0a"), 0));
}

TEST(SelectFormat, FollowsTheDeviceAndTheDensity) {
  const auto name = [](double sparsity, const DeviceInfo& device,
                       ValueType type = ValueType::kFloat16) {
    const SpmmProblem p = problem(4096, 1, 4096, sparsity);
    const FormatChoice choice = select_format(p.m, p.k, p.nnz, type, device);
    EXPECT_FALSE(choice.reason.empty());
    return choice.format;
  };
  EXPECT_EQ(name(0.5, kH200), Format::kBitmap);
  EXPECT_EQ(name(0.9, kH200), Format::kBitmap);
  EXPECT_EQ(name(0.99, kH200), Format::kTiledCsl);
  for (const DeviceInfo& device : {kA100, kL40S, kB200, kRtx5090}) {
    EXPECT_EQ(name(0.5, device), Format::kBitmap);
    EXPECT_EQ(name(0.99, device), Format::kTiledCsl);
  }
  EXPECT_EQ(name(0.5, gpu(80, 108, 164 * 1024, "9.0a")), Format::kTiledCsl);
  EXPECT_EQ(name(0.5, kCpu), Format::kRowBitmap);
  EXPECT_EQ(name(0.99, kCpu), Format::kRowBitmap);
  EXPECT_EQ(name(0.99, kCpu, ValueType::kInt8Bfloat16), Format::kRowBitmap);
  for (const DeviceInfo& device : {kA100, kL40S, kH200, kB200, kRtx5090}) {
    EXPECT_EQ(name(0.99, device, ValueType::kInt8Bfloat16), Format::kQuantizedBitmap);
  }
  const DeviceInfo too_old = gpu(75, 40, 64 * 1024, kArchs);
  EXPECT_EQ(name(0.5, too_old), Format::kTiledCsl);
  EXPECT_EQ(name(0.5, too_old, ValueType::kInt8Float16), Format::kQuantizedBitmap);
}

TEST(SelectFormat, ComparesBytesThatAreNoWholeNumber) {
  for (const PackedFormat& format : all_formats()) {
    const double wide = format.bytes_per_element(0.5, 8), narrow = format.bytes_per_element(0.5, 4);
    if (format.value_types.contains(ValueType::kInt8Float16)) {
      EXPECT_LT(narrow, wide - 0.2);
    }
  }
}

SpmmProblem quantized_problem(int64_t m, int64_t n, int64_t k,
                              ValueType type = ValueType::kInt8Float16) {
  SpmmProblem p = problem(m, n, k, 0.5);
  p.value_type = type;
  p.format = Format::kQuantizedBitmap;
  return p;
}

TEST(SelectPlanQuantized, EachGpuTakesTheFamilyWhoseCopiesItHas) {
  SpmmProblem p = quantized_problem(28672, 8, 7168);
  for (const bool rounds_x : {false, true}) {
    p.rounds_x = rounds_x;
    const std::string name = rounds_x ? "quantized8_int8x" : "quantized8";
    for (const DeviceInfo& device : {kH200, kB200, kRtx5090}) {
      EXPECT_EQ(plan_of(p, device).name(), name);
    }
    for (const DeviceInfo& device : {kA100, kL40S}) {
      EXPECT_EQ(plan_of(p, device).name(), "sm80_" + name);
    }
  }
  p = quantized_problem(4096, 8, 4096);
  EXPECT_EQ(failure_of(p, kA100, "quantized8").code, StatusCode::kUnsupported);
  EXPECT_EQ(plan_of(p, kH200, "sm80_quantized8").name(), "sm80_quantized8");
  EXPECT_EQ(plan_of(p, gpu(80, 108, 164 * 1024, "9.0a")).name(), "dense");
  EXPECT_EQ(plan_of(quantized_problem(4096, 65, 4096), kA100).name(), "dense");
}

TEST(SelectPlanQuantized, TwoCtasShareAnSmWhereThatDividesTheStripsAsEvenly) {
  const auto warps = [](int64_t m, int64_t n, int64_t k, bool rounds_x,
                        const DeviceInfo& device = kH200) {
    SpmmProblem p = quantized_problem(m, n, k);
    p.rounds_x = rounds_x;
    const SpmmPlan plan = plan_of(p, device);
    EXPECT_EQ(plan.ctas, std::min<int64_t>(num_quant_strips(m), plan.warps < 16 ? 264 : 132));
    return plan.warps;
  };
  EXPECT_EQ(warps(14336, 8, 4096, true), 8);
  EXPECT_EQ(warps(14336, 16, 3072, true), 6);
  EXPECT_EQ(warps(14336, 1, 4096, false), 8);
  EXPECT_EQ(warps(14336, 8, 4096, false), 16);  // each CTA would load X in 16 bits
  EXPECT_EQ(warps(14336, 8, 4352, true), 16);   // some warps have two columns already
  EXPECT_EQ(warps(5120, 8, 4096, true), 16);    // 2 x 2 strips for each SM instead of 3
  EXPECT_EQ(warps(2048, 8, 4096, true), 16);    // one strip for each SM
}

TEST(SelectPlanQuantized, TheWorkspaceHoldsRoundedXUnlessEachCtaRoundsOneToken) {
  const auto bytes = [](int64_t n, int64_t k) {
    SpmmProblem p = quantized_problem(4096, n, k);
    p.rounds_x = true;
    return plan_of(p, kH200).workspace_bytes;
  };
  EXPECT_EQ(bytes(1, 4096), 0);
  EXPECT_EQ(bytes(2, 4095), 8 * 4096 + 8 * 4 + 8 * 4);
  EXPECT_EQ(bytes(9, 4096), 16 * 4096 + 16 * 4 + 16 * 4);
  // Two sections of K have sums of their own.
  EXPECT_EQ(bytes(1, 8448), 2 * 4096 * 8 * 4 + 8 * 8448 + 8 * 4 + 2 * 8 * 4);
}

// X is rounded to fp8 for fp8 values, by Hopper's kernel only, and a warp takes both planes of
// int4's chunks.
TEST(SelectPlanQuantized, TakesAConfigurationThatMultipliesTheValues) {
  const auto chosen = [](ValueType type, int64_t n) {
    SpmmProblem p = quantized_problem(28672, n, 7168, type);
    p.rounds_x = true;
    return plan_of(p, kH200).name();
  };
  EXPECT_EQ(chosen(ValueType::kFp8Float16, 4), "quantized8");
  EXPECT_EQ(chosen(ValueType::kFp8Float16, 5), "quantized16_wgmma_fp8x");
  EXPECT_EQ(chosen(ValueType::kFp8Bfloat16, 16), "quantized16_wgmma_fp8x");
  EXPECT_EQ(chosen(ValueType::kFp8Float16, 512), "quantized128_wgmma_fp8x");
  EXPECT_EQ(chosen(ValueType::kFp8Float16, 513), "dense_fp8x");
  EXPECT_EQ(chosen(ValueType::kInt4Float16, 16), "quantized16_int8x");
  EXPECT_EQ(chosen(ValueType::kInt4Float16, 17), "quantized32_wgmma");
  const auto unquantised = [](int64_t n) {
    return plan_of(quantized_problem(28672, n, 7168, ValueType::kInt4Bfloat16), kB200).name();
  };
  EXPECT_EQ(unquantised(16), "quantized8");
  EXPECT_EQ(unquantised(48), "quantized8");
  EXPECT_EQ(unquantised(49), "dense");  // each pass of 8 tokens decodes the weight
}

TEST(SelectPlanQuantized, ManyTokensOfFp8ValuesAreMultipliedByTheDenseFp8Gemm) {
  const auto plan = [](int64_t m, int64_t n, int64_t k, bool rounds_x = true,
                       const DeviceInfo& device = kH200) {
    SpmmProblem p = quantized_problem(m, n, k, ValueType::kFp8Bfloat16);
    p.rounds_x = rounds_x;
    return plan_of(p, device);
  };
  EXPECT_EQ(plan(7168, 512, 7168).name(), "quantized128_wgmma_fp8x");
  EXPECT_EQ(plan(7168, 513, 7168).name(), "dense_fp8x");
  EXPECT_EQ(plan(16, 513, 32).name(), "dense_fp8x");
  EXPECT_EQ(plan(7168, 513, 7168).workspace_bytes, (7168 + 513) * (7168 + 4));
  EXPECT_TRUE(mentions(plan(7168, 513, 7168).reason, {"512"}));
  // Not asked for, sizes that it does not take, and another GPU.
  EXPECT_EQ(plan(7168, 513, 7168, false).name(), "dense");
  EXPECT_EQ(plan(7168, 513, 7176).name(), "quantized128_wgmma_fp8x");
  EXPECT_EQ(plan(7160, 8193, 7168).name(), "dense");
  EXPECT_EQ(plan(7168, 513, 7168, true, kB200).name(), "dense");
  const SpmmProblem p = quantized_problem(24, 513, 32, ValueType::kFp8Bfloat16);
  EXPECT_TRUE(mentions(failure_of(p, kH200, "dense_fp8x").message, {"dense_fp8x", "16", "M=24"}));
}

TEST(SelectPlanQuantized, OneDecodingServesUpTo128TokensOnHopper) {
  const auto chosen = [](int64_t n, bool rounds_x, const DeviceInfo& device = kH200,
                         int64_t k = 7168) {
    SpmmProblem p = quantized_problem(28672, n, k);
    p.rounds_x = rounds_x;
    return plan_of(p, device).name();
  };
  EXPECT_EQ(chosen(8, true), "quantized8_int8x");
  EXPECT_EQ(chosen(9, true), "quantized16_int8x");
  EXPECT_EQ(chosen(17, true), "quantized32_wgmma_int8x");
  EXPECT_EQ(chosen(64, true), "quantized64_wgmma_int8x");
  EXPECT_EQ(chosen(65, true), "quantized128_wgmma_int8x");
  EXPECT_EQ(chosen(512, false), "quantized128_wgmma");
  EXPECT_EQ(chosen(513, false), "dense");
  EXPECT_EQ(chosen(8192, true), "quantized128_wgmma_int8x");
  EXPECT_EQ(chosen(8193, true), "dense");
  // The reason names the border of the kernel that takes most tokens.
  EXPECT_TRUE(mentions(plan_of(quantized_problem(28672, 513, 7168), kH200).reason, {"512"}));
  EXPECT_TRUE(mentions(plan_of(quantized_problem(2048, 257, 4096), kH200).reason, {"64"}));
  EXPECT_EQ(chosen(64, true, kH200, kQuantMaxInt8K + 1), "quantized64_wgmma");
  EXPECT_EQ(chosen(8, false), "quantized8");
  EXPECT_EQ(chosen(9, false), "quantized16_wgmma");
  EXPECT_EQ(chosen(33, false), "quantized64_wgmma");
  EXPECT_EQ(chosen(9, true, kB200), "quantized16_int8x");
  // Small weights.
  EXPECT_EQ(chosen(64, false, kH200, 512), "quantized16");
  EXPECT_EQ(chosen(16, false, kH200, 1024), "quantized16");
  EXPECT_EQ(chosen(17, false, kH200, 1024), "quantized32_wgmma");
  EXPECT_EQ(chosen(128, false, kH200, 1024), "quantized128_wgmma");
  EXPECT_EQ(chosen(128, true, kH200, 1024), "quantized128_wgmma_int8x");
  EXPECT_EQ(chosen(256, true, kH200, 4096), "quantized128_wgmma_int8x");
  EXPECT_EQ(chosen(256, false, kH200, 4096), "quantized128_wgmma");
  EXPECT_EQ(chosen(257, true, kH200, 4096), "quantized128_wgmma_int8x");
  EXPECT_EQ(chosen(513, false, kH200, 4096), "dense");
  EXPECT_EQ(chosen(385, false, kH200, 1024), "dense");
}

TEST(SelectPlanQuantized, OutputTilesAreWholeOrSharedByClustersWhereThatIsFaster) {
  struct Expected {
    int64_t m, n, k;
    bool rounds_x;
    int tile_n;
    int64_t ctas;
    int unit_cols, cluster;
  };
  for (const Expected& e : {
           Expected{28672, 32, 7168, true, 32, 132, 1, 1},  // even work
           {28672, 128, 7168, true, 128, 112, 28, 1},       // an output tile each
           {28672, 384, 7168, true, 128, 44, 28, 1},        // two or three
           {28672, 8192, 7168, true, 128, 2, 28, 1},
           {14336, 64, 4096, true, 64, 112, 8, 2},
           {14336, 128, 4096, true, 128, 112, 8, 2},
           {7168, 32, 7168, true, 32, 112, 7, 4},
           {7168, 128, 7168, true, 128, 112, 7, 4},
           {7168, 256, 7168, true, 128, 56, 14, 2},
           {4096, 32, 4096, true, 32, 132, 1, 1},
           {4096, 256, 4096, true, 64, 32, 8, 2},
           {28672, 16, 7168, false, 16, 132, 1, 1},
           {28672, 128, 7168, false, 128, 132, 1, 1},
           {4096, 128, 4096, false, 128, 88, 4, 4},
       }) {
    SpmmProblem p = quantized_problem(e.m, e.n, e.k);
    p.rounds_x = e.rounds_x;
    const SpmmPlan found = plan_of(p, kH200);
    SCOPED_TRACE(found.to_string());
    const QuantWgmmaConfig& config = quant_wgmma_configs()[static_cast<size_t>(found.config)];
    EXPECT_EQ(found.family, KernelFamily::kQuantizedBitmapSm90a);
    EXPECT_EQ(config.tile_n, e.tile_n);
    EXPECT_EQ(config.x, e.rounds_x ? XValues::kInt8 : XValues::kUnrounded);
    EXPECT_EQ(found.ctas, e.ctas);
    EXPECT_EQ(found.unit_cols, e.unit_cols);
    EXPECT_EQ(quant_wgmma_cluster(found.work), e.cluster);
    EXPECT_EQ(found.work.cols * found.unit_cols, e.k / 256);
    const QuantWgmmaWorkspace parts(config, found);
    const int64_t tokens = (e.n + e.tile_n - 1) / e.tile_n * e.tile_n;
    EXPECT_EQ(parts.x_bytes, tokens * e.k * (e.rounds_x ? 1 : 2));
    EXPECT_EQ(parts.counts_bytes == 0, e.cluster > 1);
  }
}

TEST(SelectPlanQuantized, WgmmaPlansFitTheirDeviceAndShareTheWork) {
  for (const QuantWgmmaConfig& config : quant_wgmma_configs()) {
    const ValueType own =
        config.x == XValues::kFp8E4m3 ? ValueType::kFp8Bfloat16 : ValueType::kInt8Float16;
    for (const auto& [m, k] :
         {std::pair<int64_t, int64_t>{1, 1}, {28672, 7168}, {100, 65536}, {0, 0}}) {
      for (const int64_t ctas : {0, 1, 1000}) {
        const SpmmPlan plan = plan_of(quantized_problem(m, 64, k, own), kH200, config.name, ctas);
        SCOPED_TRACE(plan.to_string());
        EXPECT_LE(plan.work.workers, plan.work.units());
        EXPECT_GE(plan.ring_bytes, quant_wgmma_min_ring_bytes(config, own));
        EXPECT_LE(quant_wgmma_smem_bytes(config, plan.ring_bytes) + kQuantWgmmaSpareSmemBytes,
                  227 * 1024);
        const int64_t units = plan.work.units();
        const int64_t most = ctas == 0 ? 132 / config.passes(64) : ctas;
        EXPECT_LE(plan.ctas, most);
        // The CTA with most work has no more than it must, of a given number of CTAs; otherwise no
        // more than if all had whole output tiles.
        const int64_t most_units = (units + plan.ctas - 1) / plan.ctas;
        if (ctas != 0) {
          const int64_t all = std::min(most, units);
          EXPECT_EQ(most_units, (units + all - 1) / all);
        } else {
          const int64_t tiles = plan.work.rows, owners = std::min(most, tiles);
          EXPECT_LE(most_units, (tiles + owners - 1) / owners * plan.work.cols);
        }
        EXPECT_EQ(plan.work.cols * plan.unit_cols,
                  std::max<int64_t>(num_quant_chunks(ValueType::kInt8Float16, k), 1));
      }
    }
    for (const ValueType type :
         {ValueType::kInt8Bfloat16, ValueType::kFp8Float16, ValueType::kInt4Bfloat16}) {
      const SpmmProblem p = quantized_problem(28672, 16, 7168, type);
      if (!config.multiplies(type)) {
        EXPECT_EQ(failure_of(p, kH200, config.name).code, StatusCode::kInvalidValue);
        continue;
      }
      const SpmmPlan plan = plan_of(p, kH200, config.name);
      EXPECT_GE(plan.ring_bytes, quant_wgmma_min_ring_bytes(config, type));
      EXPECT_EQ(plan.work.cols * plan.unit_cols, num_quant_chunks(type, 7168));
    }
  }
}

TEST(SelectPlanQuantized, EachConfigurationFitsTheSharedMemoryAndHoldsX) {
  for (const DeviceInfo& device : {kA100, kL40S, kH200, kB200, kRtx5090}) {
    for (const KernelFamily family :
         {KernelFamily::kQuantizedBitmapSm80, KernelFamily::kQuantizedBitmapSm90}) {
      if (!device.features.contains(kernel_family(family).needs)) continue;
      for (const QuantizedBitmapConfig& config : quantized_bitmap_configs(family)) {
        for (const ValueType type :
             {ValueType::kInt8Float16, ValueType::kFp8Float16, ValueType::kInt4Bfloat16}) {
          for (const int64_t k : {1, 4096, 7168, 8192, 28672}) {
            const SpmmProblem p = quantized_problem(28672, 8, k, type);
            if (!config.multiplies(type)) {
              EXPECT_EQ(failure_of(p, device, config.name).code, StatusCode::kInvalidValue);
              continue;
            }
            const SpmmPlan plan = plan_of(p, device, config.name);
            SCOPED_TRACE(plan.to_string());
            EXPECT_LE(quant_smem_bytes(config, type, plan.warps, plan.ring_bytes / plan.warps),
                      device.smem_per_sm_bytes - 1024);
            EXPECT_GE(plan.ring_bytes, plan.warps * quant_min_ring_bytes(type));
            EXPECT_LE(plan.unit_cols, plan.warps * config.warp_chunks(type));
          }
        }
      }
    }
  }
  // An SM's four schedulers have the same work, if need be by splitting chunks of int4 values.
  for (const int64_t k : {7168, 4609, 4096}) {
    const SpmmPlan plan = plan_of(quantized_problem(28672, 8, k, ValueType::kInt4Float16), kH200);
    EXPECT_EQ(plan.unit_cols, (k + 511) / 512);
    EXPECT_EQ(plan.warps, k > 4096 ? 16 : 8);
  }
  EXPECT_EQ(plan_of(quantized_problem(28672, 8, 8192), kA100, "sm80_quantized8").warps, 12);
}

TEST(KernelFamilies, HaveNamesThatAreTheirOwn) {
  std::set<std::string> names;
  for (const KernelFamilyRow& family : kernel_families()) {
    EXPECT_EQ(&kernel_family(family.id), &family);
    for (const KernelConfig& config : family.configs()) {
      EXPECT_TRUE(names.insert(config.name).second) << config.name;
    }
  }
}

TEST(GpuFeatures, FollowTheGpuAndTheListOfArchitectures) {
  const auto has = [](int capability, const std::string& archs, GpuFeature feature) {
    return gpu_features(capability, archs).contains(feature);
  };
  // PTX runs on newer GPUs too, machine code only on GPUs of its major version, an "a" architecture
  // on exactly one.
  EXPECT_TRUE(has(80, "8.0", GpuFeature::kMmaSync));
  EXPECT_TRUE(has(86, "8.0", GpuFeature::kMmaSync));
  EXPECT_FALSE(has(80, "8.6", GpuFeature::kMmaSync));
  EXPECT_FALSE(has(90, "8.0", GpuFeature::kMmaSync));
  EXPECT_TRUE(has(90, "8.0+PTX", GpuFeature::kMmaSync));
  EXPECT_TRUE(has(120, "8.0+PTX;9.0a", GpuFeature::kMmaSync));
  EXPECT_TRUE(has(90, "9.0a", GpuFeature::kMmaSync));
  EXPECT_FALSE(has(80, "9.0a", GpuFeature::kMmaSync));
  EXPECT_FALSE(has(100, "9.0a", GpuFeature::kMmaSync));
  EXPECT_TRUE(has(103, "10.0f", GpuFeature::kMmaSync));
  EXPECT_FALSE(has(120, "10.0f", GpuFeature::kMmaSync));
  for (const char* archs : {"8.0+PTX", "9.0", "9.0+PTX", "10.0a", ""}) {
    EXPECT_FALSE(has(90, archs, GpuFeature::kWgmma)) << archs;
  }
  for (const char* archs : {"9.0", "8.0;9.0a", "9.0+PTX"}) {
    EXPECT_TRUE(has(90, archs, GpuFeature::kBulkCopy)) << archs;
  }
  EXPECT_TRUE(has(120, "9.0+PTX", GpuFeature::kBulkCopy));
  EXPECT_FALSE(has(120, "8.0+PTX;9.0a", GpuFeature::kBulkCopy));
  EXPECT_FALSE(has(80, "8.0;9.0+PTX", GpuFeature::kBulkCopy));
  EXPECT_TRUE(has(90, "8.0+PTX;9.0a", GpuFeature::kWgmma));
  EXPECT_FALSE(has(100, "8.0+PTX;9.0a", GpuFeature::kWgmma));
}

TEST(GpuFeatures, OfEveryGpuAreThoseOfTheCodeThatItRunsByDefault) {
  struct Gpu {
    int capability;
    std::string arch;  // machine code of the same major version if there is any, else PTX
    KernelFamily family;
  };
  const Gpu gpus[] = {
      {80, "8.0", KernelFamily::kBitmapSm80},       {86, "8.0", KernelFamily::kBitmapSm80},
      {87, "8.0", KernelFamily::kBitmapSm80},       {89, "8.0", KernelFamily::kBitmapSm80},
      {90, "9.0a", KernelFamily::kBitmapSm90a},     {100, "10.0+PTX", KernelFamily::kBitmapSm90},
      {103, "10.0+PTX", KernelFamily::kBitmapSm90}, {110, "10.0+PTX", KernelFamily::kBitmapSm90},
      {120, "12.0", KernelFamily::kBitmapSm90},     {121, "12.0", KernelFamily::kBitmapSm90}};
  for (const Gpu& it : gpus) {
    EXPECT_TRUE(gpu_features(it.capability, it.arch).contains(GpuFeature::kMmaSync))
        << it.capability;
    const DeviceInfo device = gpu(it.capability, 100, 0, kArchs);
    const KernelFamilyRow& family = kernel_family(it.family);
    EXPECT_TRUE(gpu_features(it.capability, it.arch).contains(family.needs)) << it.capability;
    // Plain chunks and 2:4 chunks, few and many tokens: packed once, a weight runs everywhere.
    for (const double sparsity : {0.5, 0.9}) {
      for (const int64_t n : {1, 64, 128}) {
        EXPECT_EQ(plan_of(bitmap_problem(28672, n, 7168, sparsity), device).family, it.family)
            << it.capability << " N=" << n;
      }
      EXPECT_EQ(plan_of(bitmap_problem(28672, 4096, 7168, sparsity), device).family,
                KernelFamily::kDense);
      const SpmmProblem problem = bitmap_problem(4096, 1, 4096, sparsity);
      EXPECT_EQ(select_format(4096, 4096, problem.nnz, ValueType::kFloat16, device).format,
                Format::kBitmap)
          << it.capability;
    }
  }
}

TEST(SelectPlan, AGpuThatThisBuildHasNoCodeForTakesTheDenseGemm) {
  const DeviceInfo blackwell = gpu(100, 148, 228 * 1024, "9.0a");
  EXPECT_EQ(plan_of(problem(4096, 1, 4096), blackwell).family, KernelFamily::kDense);
  EXPECT_EQ(failure_of(problem(4096, 1, 4096), blackwell, "w1n8").code, StatusCode::kUnsupported);
}

}  // namespace
}  // namespace flash_llm
