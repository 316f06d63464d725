// The table of kernel families: one row for each kernel that multiplies, with what it takes, what
// it needs, and how its work is planned. Choosing a format, choosing a kernel, the names that
// `config` takes and Python's list of configurations all read this table; the CPU and CUDA layers
// run a family by an exhaustive switch over its id.
#pragma once

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
  kReference,        // the CPU oracle, in fp64
  kTiledCslCpu,      // Tiled-CSL on the CPU
  kRowBitmapCpu,     // row bitmap on the CPU
  kRowBitmapBlocks,  // row bitmap on the CPU: blocks of rows are decoded for the dense GEMM
  kTiledCslSm80,     // Tiled-CSL on CUDA: load as sparse, compute as dense (LSCD)
  kBitmapSm90a,      // bitmap on Hopper
  kDense,            // unpack, then the vendor's dense GEMM; CPU and CUDA
};

enum class Place { kCpu, kCuda, kBoth };

// What select_plan is asked.
struct PlanRequest {
  const SpmmProblem& problem;
  const DeviceInfo& device;
  const std::string& config;  // "auto", or one of the family's configurations
  int64_t ctas;               // 0 lets the plan choose

  bool forced() const { return config != "auto"; }
};

// One built configuration of a family: its name, and facts for people.
struct KernelConfig {
  std::string name;
  std::vector<std::pair<const char*, int>> facts;
};

struct KernelFamilyRow {
  KernelFamily id;
  Place place;
  EnumSet<Format> formats;
  EnumSet<ValueType> value_types;
  GpuFeatures needs;
  // Whether format="auto" may choose the family's format for the sake of this family.
  bool chosen_by_format_auto;
  std::vector<KernelConfig> (*configs)();
  // Whether config="auto" takes this family for the problem, and why or why not. The first family
  // in the table's order that takes it is planned.
  bool (*takes)(const PlanRequest& request, std::string* reason);
  // Fills in all but the id, the problem and the reason.
  Status (*plan)(const PlanRequest& request, SpmmPlan* out);

  bool runs_on(const DeviceInfo& device) const {
    return place == Place::kBoth || (place == Place::kCpu) == device.is_cpu();
  }
  bool multiplies(const SpmmProblem& problem) const {
    return formats.contains(problem.format) && value_types.contains(problem.value_type);
  }
};

const std::vector<KernelFamilyRow>& kernel_families();

// Of the table above.
const KernelFamilyRow& kernel_family(KernelFamily id);

// The first feature that a family needs and a device lacks, in words; "" if there is none.
std::string missing_feature(const KernelFamilyRow& family, const DeviceInfo& device);

}  // namespace flash_llm
