// What the plans of the CUDA kernel families share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "plan/problem.h"

namespace flash_llm {

// Shared memory that the driver takes from each CTA.
inline constexpr int kReservedSmemBytes = 1024;

// "M=4096 N=8 K=4096", for errors.
inline std::string shape_text(const SpmmProblem& problem) {
  return "M=" + std::to_string(problem.m) + " N=" + std::to_string(problem.n) +
         " K=" + std::to_string(problem.k);
}

// The index of a configuration that the table is known to hold.
template <typename Config>
int config_named(const std::vector<Config>& configs, const std::string& name) {
  size_t i = 0;
  while (i + 1 < configs.size() && name != configs[i].name) ++i;
  return static_cast<int>(i);
}

// The narrowest configuration that covers n tokens, else the widest. tile_n rises in the table.
template <typename Config>
int config_covering(const std::vector<Config>& configs, int64_t n) {
  size_t i = 0;
  while (i + 1 < configs.size() && n > configs[i].tile_n) ++i;
  return static_cast<int>(i);
}

}  // namespace flash_llm
