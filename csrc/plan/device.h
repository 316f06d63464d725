// What a plan may depend on: the device as a set of features, and this build's code for it.
#pragma once

#include <string>

#include "base/cpu_isa.h"
#include "base/enum_set.h"
#include "base/status.h"

namespace flash_llm {

// What a kernel family may need of a GPU. A GPU has a feature only if this build has code for it.
enum class GpuFeature {
  kMmaSync,  // compute capability 8.0: mma.sync, cp.async
  kWgmma,    // compute capability 9.0, built for sm_90a: wgmma, bulk tensor copies
};

inline constexpr GpuFeature kGpuFeatures[] = {GpuFeature::kMmaSync, GpuFeature::kWgmma};
using GpuFeatures = EnumSet<GpuFeature>;

// The features of a GPU in a build for `archs`, which is spelled as FLASH_LLM_CUDA_ARCHS in
// setup.py: "8.0+PTX;9.0a". The only place that knows which code runs where.
GpuFeatures gpu_features(int compute_capability, const std::string& archs);

// What has to be there for a feature, for errors and reasons: "a Hopper GPU ... and a build ...".
const char* describe(GpuFeature feature);

struct DeviceInfo {
  int compute_capability = 0;  // 10 * major + minor; 0 means the CPU
  int num_sms = 0;
  int smem_per_sm_bytes = 0;
  GpuFeatures features;
  // Of the CPU's kernels.
  CpuIsa cpu_isa = CpuIsa::kPortable;
  // See cpu_isa.h.
  bool cpu_fast_dense_bf16 = false, cpu_fast_dense_fp16 = false;

  bool is_cpu() const { return compute_capability == 0; }
};

// A GPU as this build sees it.
DeviceInfo gpu(int compute_capability, int num_sms, int smem_per_sm_bytes,
               const std::string& archs);

// Fills in what concerns the CPU. Fails as select_cpu_isa does.
Status detect_cpu(DeviceInfo* device);

}  // namespace flash_llm
