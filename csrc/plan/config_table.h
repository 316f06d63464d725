// What the plans of all CUDA kernel families use.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "plan/device.h"
#include "plan/problem.h"

namespace flash_llm {

// Shared memory that the driver reserves for each CTA.
inline constexpr int kReservedSmemBytes = 1024;

// "M=4096 N=8 K=4096", for error messages.
inline std::string shape_text(const SpmmProblem& problem) {
  return "M=" + std::to_string(problem.m) + " N=" + std::to_string(problem.n) +
         " K=" + std::to_string(problem.k);
}

// The shared memory that a CTA can have. It is too little for some configurations of some kernels.
inline int smem_per_cta_bytes(const DeviceInfo& device) {
  return device.smem_per_sm_bytes - kReservedSmemBytes;
}

// Refuses a configuration that needs more shared memory per CTA than a device has.
inline Status check_smem(const char* config, int needed_bytes, const DeviceInfo& device) {
  if (needed_bytes <= smem_per_cta_bytes(device)) return Status::success();
  return Status::unsupported(
      "config \"" + std::string(config) + "\" needs " + std::to_string(needed_bytes) +
      " bytes of shared memory per CTA; this GPU has " +
      std::to_string(std::max(smem_per_cta_bytes(device), 0)) + ", use \"auto\"");
}

// The index of the configuration of this name, which must exist.
template <typename Config>
int config_named(const std::vector<Config>& configs, const std::string& name) {
  size_t i = 0;
  while (i + 1 < configs.size() && name != configs[i].name) ++i;
  return static_cast<int>(i);
}

// The index of the narrowest configuration that covers n tokens, or of the widest if none does, of
// those for which `suits` is true. They must be sorted by tile_n; one must exist.
template <typename Config, typename Suits>
int config_covering(const std::vector<Config>& configs, int64_t n, const Suits& suits) {
  int found = -1;
  for (size_t i = 0; i < configs.size(); ++i) {
    if (!suits(configs[i])) continue;
    found = static_cast<int>(i);
    if (n <= configs[i].tile_n) break;
  }
  return found;
}

// The same for a table that is sorted by tile_n.
template <typename Config>
int config_covering(const std::vector<Config>& configs, int64_t n) {
  return config_covering(configs, n, [](const Config&) { return true; });
}

}  // namespace flash_llm
