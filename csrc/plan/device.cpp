#include "plan/device.h"

#include <algorithm>
#include <cstddef>
#include <cstdlib>

namespace flash_llm {
namespace {

// One entry of a list of architectures: "8.0", "8.0+PTX", "9.0a" or "10.0f".
struct BuiltArch {
  int compute_capability = 0;
  bool ptx = false;       // the driver compiles it for any newer GPU
  bool specific = false;  // "a": runs on exactly this GPU, and may use all its features
  bool family = false;    // "f": runs on this and newer GPUs of the same major version

  explicit BuiltArch(const std::string& entry) {
    char* end = nullptr;
    const int64_t major = std::strtol(entry.c_str(), &end, 10);
    const int64_t minor = *end == '.' ? std::strtol(end + 1, &end, 10) : 0;
    compute_capability = static_cast<int>(10 * major + minor);
    const std::string suffix = end;
    ptx = suffix.find("+PTX") != std::string::npos;
    specific = !suffix.empty() && suffix[0] == 'a';
    family = !suffix.empty() && suffix[0] == 'f';
  }

  bool runs_on(int capability) const {
    if (specific) return capability == compute_capability;
    const bool same_major = capability / 10 == compute_capability / 10;
    return capability >= compute_capability && (same_major || (ptx && !family));
  }
};

// Shared memory of an SM. A GPU that is not listed may have more.
int known_smem_per_sm_bytes(int compute_capability) {
  switch (compute_capability) {
    case 80:
    case 87:
      return 164 * 1024;
    case 90:
    case 100:
    case 103:
    case 110:
      return 228 * 1024;
    default:  // 8.6, 8.9, 12.0, 12.1
      return 100 * 1024;
  }
}

}  // namespace

GpuFeatures gpu_features(int compute_capability, const std::string& archs) {
  GpuFeatures features;
  for (size_t begin = 0; begin < archs.size();) {
    const size_t end = std::min(archs.find(';', begin), archs.size());
    const BuiltArch arch(archs.substr(begin, end - begin));
    if (arch.runs_on(compute_capability)) {
      features.insert(GpuFeature::kMmaSync);
      if (arch.compute_capability >= 90) features.insert(GpuFeature::kBulkCopy);
      if (arch.specific && arch.compute_capability == 90) features.insert(GpuFeature::kWgmma);
    }
    begin = end + 1;
  }
  return features;
}

const char* describe(GpuFeature feature) {
  switch (feature) {
    case GpuFeature::kMmaSync:
      return "a build with code for this GPU (FLASH_LLM_CUDA_ARCHS)";
    case GpuFeature::kBulkCopy:
      return "a GPU of compute capability 9.0 or newer and code for it that was built for sm_90 or "
             "newer (FLASH_LLM_CUDA_ARCHS)";
    case GpuFeature::kWgmma:
      return "a Hopper GPU (compute capability 9.0) and a build for sm_90a";
  }
  return "";  // never: every feature has a line above
}

DeviceInfo gpu(int compute_capability, int num_sms, int smem_per_sm_bytes,
               const std::string& archs) {
  DeviceInfo device;
  device.compute_capability = compute_capability;
  device.num_sms = num_sms;
  device.smem_per_sm_bytes = smem_per_sm_bytes > 0 || compute_capability == 0
                                 ? smem_per_sm_bytes
                                 : known_smem_per_sm_bytes(compute_capability);
  device.features = gpu_features(compute_capability, archs);
  return device;
}

Status detect_cpu(DeviceInfo* device) {
  device->cpu_fast_dense_bf16 = has_fast_dense_bf16();
  device->cpu_fast_dense_fp16 = has_fast_dense_fp16();
  return select_cpu_isa(&device->cpu_isa);
}

}  // namespace flash_llm
