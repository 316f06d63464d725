// The table of kernel families, with one row for each kernel that multiplies: which weights it
// multiplies, which GPU features it needs, and how its work is planned. The choice of a format, the
// choice of a kernel, the valid names for `config` and Python's list of configurations all read
// this table. The CPU and CUDA layers dispatch by an exhaustive switch over the id.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "base/enum_set.h"
#include "base/status.h"
#include "format/packed_header.h"
#include "format/value_type.h"
#include "plan/device.h"
#include "plan/problem.h"

namespace flash_llm {

struct SpmmPlan;

enum class KernelFamily {
  kReference,             // the CPU oracle, in fp64
  kTiledCslCpu,           // Tiled-CSL on the CPU
  kRowBitmapInt8XCpu,     // int8 values in the row bitmap on the CPU: X is quantised too
  kRowBitmapCpu,          // row bitmap on the CPU
  kRowBitmapBlocks,       // row bitmap on the CPU: decodes blocks of rows for the dense GEMM
  kTiledCslSm80,          // Tiled-CSL on CUDA: load as sparse, compute as dense (LSCD)
  kBitmapRowsSm90,        // bitmap on GPUs with bulk copies, few tokens: whole rows in a CTA
  kBitmapSm90a,           // bitmap on Hopper
  kBitmapSm90,            // bitmap on GPUs with bulk copies: Hopper and newer
  kBitmapSm80,            // bitmap on every GPU from sm_80 on
  kGatherSm90,            // gather on GPUs with bulk copies
  kGatherSm80,            // gather on every GPU from sm_80 on
  kQuantizedBitmapSm90a,  // quantised bitmap on Hopper, many tokens
  kQuantizedBitmapSm90,   // quantised bitmap on GPUs with bulk copies
  kQuantizedBitmapSm80,   // quantised bitmap on every GPU from sm_80 on
  kDenseFp8X,             // fp8 values on Hopper: unpack, round X, then the vendor's FP8 GEMM
  kDense,                 // unpack, then the vendor's dense GEMM; CPU and CUDA
};
// A new family goes before kDense.
inline constexpr size_t kNumKernelFamilies = static_cast<size_t>(KernelFamily::kDense) + 1;

enum class Place { kCpu, kCuda, kBoth };

// The arguments of select_plan.
struct PlanRequest {
  const SpmmProblem& problem;
  const DeviceInfo& device;
  const std::string& config;  // "auto" or one of the family's configurations
  int64_t ctas;               // 0 lets the plan choose

  bool explain;  // whether the plan's reason is wanted, which costs time

  bool forced() const { return config != "auto"; }
};

// One configuration of a family: its name, and numbers that describe it to users.
struct KernelConfig {
  std::string name;
  std::vector<std::pair<const char*, int>> facts;
};

// Gives the reason why a family takes a problem or does not, if it is wanted: `reason` is not null.
inline void explain(std::string* reason, const char* text) {
  if (reason != nullptr) *reason = text;
}

struct KernelFamilyRow {
  KernelFamily id;
  Place place;
  EnumSet<Format> formats;
  EnumSet<ValueType> value_types;
  GpuFeatures needs;
  // Whether format="auto" may choose a format because this family multiplies it.
  bool chosen_by_format_auto;
  std::vector<KernelConfig> (*configs)();
  // Whether config="auto" chooses this family for the problem, and why or why not. The first family
  // in the table for which this is true is chosen.
  bool (*takes)(const PlanRequest& request, std::string* reason);
  // Fills in the plan, except for its family, problem and reason.
  Status (*plan)(const PlanRequest& request, SpmmPlan* out);

  bool runs_on(const DeviceInfo& device) const {
    return place == Place::kBoth || (place == Place::kCpu) == device.is_cpu();
  }
  bool multiplies(const SpmmProblem& problem) const {
    return formats.contains(problem.format) && value_types.contains(problem.value_type);
  }
};

const std::array<KernelFamilyRow, kNumKernelFamilies>& kernel_families();

// The row of a family.
const KernelFamilyRow& kernel_family(KernelFamily id);

// A description of the first feature that a family needs and a device lacks; "" if there is none.
std::string missing_feature(const KernelFamilyRow& family, const DeviceInfo& device);

}  // namespace flash_llm
