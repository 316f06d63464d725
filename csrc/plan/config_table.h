// What the plans of all CUDA kernel families use.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "plan/problem.h"

namespace flash_llm {

// Shared memory that the driver reserves for each CTA.
inline constexpr int kReservedSmemBytes = 1024;

// "M=4096 N=8 K=4096", for error messages.
inline std::string shape_text(const SpmmProblem& problem) {
  return "M=" + std::to_string(problem.m) + " N=" + std::to_string(problem.n) +
         " K=" + std::to_string(problem.k);
}

// The index of the configuration of this name, which must exist.
template <typename Config>
int config_named(const std::vector<Config>& configs, const std::string& name) {
  size_t i = 0;
  while (i + 1 < configs.size() && name != configs[i].name) ++i;
  return static_cast<int>(i);
}

// The index of the narrowest configuration that covers n tokens, or of the widest if none does. The
// table must be sorted by tile_n.
template <typename Config>
int config_covering(const std::vector<Config>& configs, int64_t n) {
  size_t i = 0;
  while (i + 1 < configs.size() && n > configs[i].tile_n) ++i;
  return static_cast<int>(i);
}

}  // namespace flash_llm
