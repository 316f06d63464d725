// Plans that do not fit are refused before anything is launched, so these tests need no GPU.
#include <gtest/gtest.h>

#include <string>

#include "cuda/launch.h"
#include "plan/bitmap_mma_sync.h"
#include "plan/bitmap_rows_sm90.h"
#include "plan/bitmap_sm90a.h"
#include "plan/gather.h"
#include "plan/quantized_bitmap.h"
#include "plan/quantized_bitmap_sm90a.h"
#include "plan/spmm_plan.h"
#include "plan/tiled_csl_sm80.h"

namespace flash_llm {
namespace {

const DeviceInfo kH200 = gpu(90, 132, 228 * 1024, "8.0;9.0a");

struct Call {
  KernelFamily family;  // whose kernel is called, whatever the plan says
  SpmmPlan plan;
  SpmmArgs args;

  Status launch() const {
    switch (family) {
      case KernelFamily::kTiledCslSm80:
        return cuda::spmm_lscd(plan, args, nullptr, true, nullptr);
      case KernelFamily::kBitmapRowsSm90:
        return cuda::spmm_bitmap_rows(plan, args, true, nullptr);
      case KernelFamily::kBitmapSm90a:
        return cuda::spmm_bitmap(plan, args, nullptr, true, nullptr);
      case KernelFamily::kBitmapSm90:
        return cuda::spmm_bitmap_sm90(plan, args, nullptr, true, nullptr);
      case KernelFamily::kBitmapSm80:
        return cuda::spmm_bitmap_sm80(plan, args, nullptr, true, nullptr);
      case KernelFamily::kGatherSm90:
        return cuda::spmm_gather_sm90(plan, args, nullptr, true, nullptr);
      case KernelFamily::kGatherSm80:
        return cuda::spmm_gather_sm80(plan, args, nullptr, true, nullptr);
      case KernelFamily::kQuantizedBitmapSm90a:
        return cuda::spmm_quantized_bitmap_sm90a(plan, args, nullptr, true, nullptr);
      case KernelFamily::kQuantizedBitmapSm90:
        return cuda::spmm_quantized_bitmap_sm90(plan, args, nullptr, true, nullptr);
      case KernelFamily::kQuantizedBitmapSm80:
        return cuda::spmm_quantized_bitmap_sm80(plan, args, nullptr, true, nullptr);
      default:
        return Status::unsupported("not a family with a kernel");
    }
  }
};

// A call that would be launched, with values that the configuration multiplies: the pointers are
// null, because nothing here may get that far.
Call call_of(Format format, int64_t n, const std::string& config) {
  Call call;
  ValueType type = {};
  Status planned = Status::runtime("no values");
  for (const ValueType each : kValueTypes) {
    if (planned.ok() || !packed_format(format).value_types.contains(each)) continue;
    type = each;
    const SpmmProblem problem{4096, n, 4096, 4096 * 2048, format, type};
    planned = select_plan(problem, kH200, config, 0, &call.plan);
  }
  EXPECT_TRUE(planned.ok()) << planned.message;
  call.family = call.plan.family;
  call.args.format = format;
  call.args.weight.value_type = type;
  call.args.weight.m = call.args.weight.k = 4096;
  call.args.n = n;
  return call;
}

void expect_refused(const Call& call, const std::string& part) {
  const Status status = call.launch();
  EXPECT_EQ(status.code, StatusCode::kInvalidValue);
  EXPECT_NE(status.message.find(part), std::string::npos) << status.message;
}

struct Kernel {
  Format format;
  std::string config;
  int64_t n;
};

class EveryKernel : public testing::TestWithParam<Kernel> {
 protected:
  Call call() const { return call_of(GetParam().format, GetParam().n, GetParam().config); }
};

std::vector<Kernel> every_kernel() {
  std::vector<Kernel> kernels;
  for (const auto& config : lscd_configs()) {
    kernels.push_back({Format::kTiledCsl, config.name, config.tile_n});
  }
  for (const auto& config : bitmap_rows_configs()) {
    kernels.push_back({Format::kBitmap, config.name, config.tile_n});
  }
  for (const auto& config : bitmap_configs()) {
    kernels.push_back({Format::kBitmap, config.name, config.tile_n});
  }
  for (const KernelFamily family : {KernelFamily::kBitmapSm80, KernelFamily::kBitmapSm90}) {
    for (const auto& config : mma_sync_configs(family)) {
      kernels.push_back({Format::kBitmap, config.name, config.tile_n});
    }
  }
  for (const KernelFamily family : {KernelFamily::kGatherSm80, KernelFamily::kGatherSm90}) {
    for (const auto& config : gather_configs(family)) {
      kernels.push_back({Format::kGather, config.name, config.tile_n});
    }
  }
  for (const KernelFamily family :
       {KernelFamily::kQuantizedBitmapSm80, KernelFamily::kQuantizedBitmapSm90}) {
    for (const auto& config : quantized_bitmap_configs(family)) {
      kernels.push_back({Format::kQuantizedBitmap, config.name, config.tile_n});
    }
  }
  for (const auto& config : quant_wgmma_configs()) {
    kernels.push_back({Format::kQuantizedBitmap, config.name, config.tile_n});
  }
  return kernels;
}

INSTANTIATE_TEST_SUITE_P(Configurations, EveryKernel, testing::ValuesIn(every_kernel()),
                         [](const auto& kernel) { return kernel.param.config; });

TEST_P(EveryKernel, RefusesAWorkspaceThatIsTooSmall) {
  Call small = call();
  if (small.plan.workspace_bytes == 0) return;
  --small.plan.workspace_bytes;
  expect_refused(small, std::to_string(small.plan.workspace_bytes + 1));
}

TEST_P(EveryKernel, RefusesAPlanForMoreWorkThanThereIs) {
  Call few = call();
  few.args.weight.m = few.args.weight.k = 1;
  expect_refused(few, "M=1 N=");
}

TEST_P(EveryKernel, RefusesThePlanOfAnotherFamily) {
  for (const KernelFamily family :
       {KernelFamily::kDense, KernelFamily::kTiledCslCpu, KernelFamily::kReference,
        KernelFamily::kBitmapSm80, KernelFamily::kBitmapSm90}) {
    Call other = call();
    if (other.plan.family == family) continue;
    other.plan.family = family;
    other.plan.config = 0;
    expect_refused(other, other.plan.name());
  }
}

TEST_P(EveryKernel, RefusesAWeightOfAnotherFormat) {
  Call other = call();
  const bool tiled = other.args.format == Format::kTiledCsl;
  other.args.format = tiled ? Format::kBitmap : Format::kTiledCsl;
  for (const Format format : {other.args.format, other.plan.problem.format}) {
    expect_refused(other, packed_format(format).name);
  }
}

TEST_P(EveryKernel, RefusesConfigurationsThatDoNotExist) {
  for (const int config : {-1, 100}) {
    Call other = call();
    other.plan.config = config;
    expect_refused(other, std::to_string(config));
  }
}

TEST(BitmapLaunch, RefusesAnActivationThatItsKernelLeavesToTheCaller) {
  Call call = call_of(Format::kBitmap, 128, "n128");
  call.args.activation = Activation::kGelu;
  expect_refused(call, "activation");
}

TEST(BitmapLaunch, RefusesAPlanForFewerRowsWhereEachHasItsSums) {
  Call call = call_of(Format::kBitmap, 8, "n8");
  call.args.weight.m *= 2;
  expect_refused(call, "M=8192");
}

TEST(GatherLaunch, RefusesAPlanForOtherRowsOrPartsOrWithoutWarps) {
  for (const char* config : {"gather8", "sm80_gather1"}) {
    Call call = call_of(Format::kGather, 1, config);
    call.plan.work.rows += 1;
    expect_refused(call, "its configuration");
    call = call_of(Format::kGather, 1, config);
    call.plan.work.cols += 1;
    expect_refused(call, "its configuration");
    call = call_of(Format::kGather, 1, config);
    call.plan.ring_bytes = 64;
    expect_refused(call, "its configuration");
  }
}

TEST(QuantizedBitmapLaunch, RefusesWarpsAndRingsThatDoNotFit) {
  for (const char* config : {"quantized8", "sm80_quantized8"}) {
    for (const int warps : {0, 7, 17}) {
      Call call = call_of(Format::kQuantizedBitmap, 8, config);
      call.plan.warps = warps;
      expect_refused(call, "its configuration");
    }
    Call call = call_of(Format::kQuantizedBitmap, 8, config);
    call.plan.ring_bytes /= 2;
    expect_refused(call, "its configuration");
  }
}

TEST(QuantizedBitmapLaunch, RefusesWgmmaPlansThatDoNotFit) {
  for (const char* config : {"quantized64_wgmma", "quantized128_wgmma_int8x"}) {
    const Call call = call_of(Format::kQuantizedBitmap, 64, config);
    Call other = call;
    other.plan.warps -= 4;
    expect_refused(other, "its configuration");
    other = call;
    other.plan.ring_bytes = 64;
    expect_refused(other, "its configuration");
    other = call;
    other.plan.work.rows += 1;
    expect_refused(other, "its configuration");
    other = call;
    other.plan.ctas -= 1;
    expect_refused(other, "its configuration");
  }
}

TEST(BitmapLaunch, RefusesRingsThatHoldNoFullChunks) {
  for (const char* config : {"n8", "rows8", "sm80_n8", "sm90_n8"}) {
    Call call = call_of(Format::kBitmap, 8, config);
    call.plan.ring_bytes = 64;
    expect_refused(call, "its configuration");
  }
}

}  // namespace
}  // namespace flash_llm
