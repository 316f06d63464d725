#include "plan/kernel_family.h"

#include "format/packed_format.h"
#include "plan/bitmap_mma_sync.h"
#include "plan/bitmap_rows_sm90.h"
#include "plan/bitmap_sm90a.h"
#include "plan/cpu.h"
#include "plan/gather.h"
#include "plan/quantized_bitmap.h"
#include "plan/quantized_bitmap_sm90a.h"
#include "plan/spmm_plan.h"
#include "plan/tiled_csl_sm80.h"

namespace flash_llm {
namespace {

constexpr EnumSet<Format> every_format() {
  EnumSet<Format> all;
  for (int number = 1; number <= kNumFormats; ++number) all.insert(static_cast<Format>(number));
  return all;
}

// The configurations of a family that has only one.
template <const char* kName>
std::vector<KernelConfig> only_config() {
  return {{kName, {}}};
}

constexpr char kReferenceName[] = "cpu_reference", kTilesName[] = "cpu_tiles",
               kInt8XRowsName[] = "cpu_rows_int8x", kRowsName[] = "cpu_rows",
               kBlocksName[] = "cpu_blocks", kDenseFp8XName[] = "dense_fp8x",
               kDenseName[] = "dense";

bool never_chosen(const PlanRequest& /*request*/, std::string* /*reason*/) { return false; }

// The dense family takes any problem; its reason is why the family before it in the table did not.
bool takes_dense(const PlanRequest& request, std::string* reason) {
  if (reason != nullptr && reason->empty()) {
    *reason = "format \"" + std::string(packed_format(request.problem.format).name) + "\" has no " +
              (request.device.is_cpu() ? "CPU" : "GPU") +
              " kernel, so each call unpacks the weight: pack it again on this device";
  }
  return true;
}

Status plan_one_config(const PlanRequest& /*request*/, SpmmPlan* out) {
  out->config = 0;
  return Status::success();
}

Status plan_dense(const PlanRequest& request, SpmmPlan* out) {
  out->config = 0;
  out->workspace_bytes = request.problem.m * request.problem.k * 2;
  out->rounds_before_activation = true;
  return Status::success();
}

constexpr std::array<KernelFamilyRow, kNumKernelFamilies> kFamilies = {{
    {KernelFamily::kTiledCslCpu,
     Place::kCpu,
     Format::kTiledCsl,
     k16Bit,
     {},
     false,
     only_config<kTilesName>,
     takes_tiled_csl_cpu,
     plan_one_config},
    {KernelFamily::kRowBitmapInt8XCpu,
     Place::kCpu,
     Format::kRowBitmap,
     kInt8Types,
     {},
     false,
     only_config<kInt8XRowsName>,
     takes_row_bitmap_int8x,
     plan_row_bitmap_int8x},
    {KernelFamily::kRowBitmapCpu,
     Place::kCpu,
     Format::kRowBitmap,
     kEveryType,
     {},
     true,
     only_config<kRowsName>,
     takes_row_bitmap_cpu,
     plan_one_config},
    {KernelFamily::kRowBitmapBlocks,
     Place::kCpu,
     Format::kRowBitmap,
     kEveryType,
     {},
     false,
     only_config<kBlocksName>,
     takes_row_bitmap_blocks,
     plan_one_config},
    {KernelFamily::kReference,
     Place::kCpu,
     every_format(),
     kEveryType,
     {},
     false,
     only_config<kReferenceName>,
     never_chosen,
     plan_one_config},
    {KernelFamily::kTiledCslSm80, Place::kCuda, Format::kTiledCsl, k16Bit, GpuFeature::kMmaSync,
     true, describe_lscd_configs, takes_lscd, plan_lscd},
    {KernelFamily::kBitmapRowsSm90, Place::kCuda, Format::kBitmap, k16Bit, GpuFeature::kBulkCopy,
     true, describe_bitmap_rows_configs, takes_bitmap_rows, plan_bitmap_rows},
    {KernelFamily::kBitmapSm90a, Place::kCuda, Format::kBitmap, k16Bit, GpuFeature::kWgmma, true,
     describe_bitmap_configs, takes_bitmap, plan_bitmap},
    {KernelFamily::kBitmapSm90, Place::kCuda, Format::kBitmap, k16Bit, GpuFeature::kBulkCopy, true,
     describe_bitmap_sm90_configs, takes_bitmap_sm90, plan_bitmap_sm90},
    {KernelFamily::kBitmapSm80, Place::kCuda, Format::kBitmap, k16Bit, GpuFeature::kMmaSync, true,
     describe_bitmap_sm80_configs, takes_bitmap_sm80, plan_bitmap_sm80},
    {KernelFamily::kGatherSm90, Place::kCuda, Format::kGather, k16Bit, GpuFeature::kBulkCopy, false,
     describe_gather_sm90_configs, takes_gather_sm90, plan_gather_sm90},
    {KernelFamily::kGatherSm80, Place::kCuda, Format::kGather, k16Bit, GpuFeature::kMmaSync, false,
     describe_gather_sm80_configs, takes_gather_sm80, plan_gather_sm80},
    {KernelFamily::kDenseFp8X, Place::kCuda, Format::kQuantizedBitmap, kFp8Types,
     GpuFeature::kWgmma, false, only_config<kDenseFp8XName>, takes_dense_fp8x, plan_dense_fp8x},
    {KernelFamily::kQuantizedBitmapSm90a, Place::kCuda, Format::kQuantizedBitmap, kQuantizedTypes,
     GpuFeature::kWgmma, true, describe_quant_wgmma_configs, takes_quant_wgmma, plan_quant_wgmma},
    {KernelFamily::kQuantizedBitmapSm90, Place::kCuda, Format::kQuantizedBitmap, kQuantizedTypes,
     GpuFeature::kBulkCopy, true, describe_quantized_bitmap_sm90_configs,
     takes_quantized_bitmap_sm90, plan_quantized_bitmap_sm90},
    {KernelFamily::kQuantizedBitmapSm80, Place::kCuda, Format::kQuantizedBitmap, kQuantizedTypes,
     GpuFeature::kMmaSync, true, describe_quantized_bitmap_sm80_configs,
     takes_quantized_bitmap_sm80, plan_quantized_bitmap_sm80},
    {KernelFamily::kDense,
     Place::kBoth,
     every_format(),
     kEveryType,
     {},
     false,
     only_config<kDenseName>,
     takes_dense,
     plan_dense},
}};

constexpr bool every_family_has_a_row() {
  for (size_t id = 0; id < kNumKernelFamilies; ++id) {
    bool found = false;
    for (const KernelFamilyRow& row : kFamilies) found |= row.id == static_cast<KernelFamily>(id);
    if (!found) return false;
  }
  return true;
}
static_assert(every_family_has_a_row());
static_assert(kFamilies.back().id == KernelFamily::kDense, "takes what is left");

}  // namespace

const std::array<KernelFamilyRow, kNumKernelFamilies>& kernel_families() { return kFamilies; }

const KernelFamilyRow& kernel_family(KernelFamily id) {
  size_t i = 0;
  while (kFamilies[i].id != id) ++i;
  return kFamilies[i];
}

std::string missing_feature(const KernelFamilyRow& family, const DeviceInfo& device) {
  const GpuFeatures missing = family.needs.without(device.features);
  return missing.empty() ? "" : describe(missing.first());
}

}  // namespace flash_llm
