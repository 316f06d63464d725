// The device as far as plans depend on it: sizes, and a set of features that includes what this
// build has code for.
#pragma once

#include <string>

#include "base/cpu_isa.h"
#include "base/enum_set.h"
#include "base/status.h"

namespace flash_llm {

// Features that kernel families need. A GPU has a feature only if this build has code for it.
enum class GpuFeature {
  kMmaSync,   // compute capability 8.0: mma.sync, cp.async, mbarriers
  kBulkCopy,  // compute capability 9.0: bulk copies to shared memory
  kWgmma,     // compute capability 9.0, built for sm_90a: wgmma
};

using GpuFeatures = EnumSet<GpuFeature>;

// The features of a GPU in a build for `archs`, which is spelled as FLASH_LLM_CUDA_ARCHS in
// setup.py: "8.0;9.0a;10.0+PTX". Only this function knows which code runs on which GPU.
GpuFeatures gpu_features(int compute_capability, const std::string& archs);

// What a feature requires, for error messages and reasons: "a Hopper GPU ... and a build ...".
const char* describe(GpuFeature feature);

struct DeviceInfo {
  int compute_capability = 0;  // 10 * major + minor; 0 means the CPU
  int num_sms = 0;
  int smem_per_sm_bytes = 0;
  GpuFeatures features;
  CpuIsa cpu_isa = CpuIsa::kPortable;  // the instruction set that the CPU kernels use
  // See base/cpu_isa.h.
  bool cpu_fast_dense_bf16 = false, cpu_fast_dense_fp16 = false;

  bool is_cpu() const { return compute_capability == 0; }
};

// A GPU with the features that it has in a build for `archs`. smem_per_sm_bytes = 0 stands for what
// GPUs of this compute capability have.
DeviceInfo gpu(int compute_capability, int num_sms, int smem_per_sm_bytes,
               const std::string& archs);

// Fills in the fields that describe the CPU. Fails if select_cpu_isa does.
Status detect_cpu(DeviceInfo* device);

}  // namespace flash_llm
