// Which kernel multiplies, and how its work is divided. A plan is a pure function of the problem
// and the device, so that it can be tested without a GPU, printed in a bug report and forced by a
// test.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "plan/device.h"
#include "plan/kernel_family.h"
#include "plan/problem.h"

namespace flash_llm {

// Work that is divided evenly between workers (cuda/schedule/stream_k.cuh): rows * cols work units.
struct WorkGrid {
  int64_t rows = 0;     // output tiles
  int64_t cols = 0;     // steps along K
  int64_t workers = 0;  // CTAs, or clusters of CTAs

  int64_t units() const { return rows * cols; }
};

struct SpmmPlan {
  KernelFamily family = KernelFamily::kDense;
  SpmmProblem problem;  // the problem that the plan was made for
  int config = -1;      // index into the family's configurations
  int64_t ctas = 0;     // our CUDA kernels: CTAs in the grid
  WorkGrid work;        // our CUDA kernels: how the work is divided
  int ring_bytes = 0;   // bitmap on CUDA: shared memory for the rings
  int warps = 0;        // quantised bitmap on CUDA: warps of a CTA
  int unit_cols = 1;    // bitmap on CUDA: columns of chunks in a work unit
  int x_multiple = 1;   // our CUDA kernels: the padded length of X's rows is a multiple of this
  // Whether the kernel leaves the activation to the caller.
  bool rounds_before_activation = false;
  // Temporary memory: fp32 partial sums and then X in fragment order (kTiledCslSm80), fp32 partial
  // sums (bitmap), or the dense weight (kDense).
  int64_t workspace_bytes = 0;
  int64_t packed_x_bytes = 0;  // the part of it for X in fragment order
  std::string reason;          // one sentence: why this kernel was chosen

  // The configuration's name, which is also a value of the operator's `config` argument.
  std::string name() const;
  std::string to_string() const;
};

// Fails if the plan was made for another family than `family` or for another problem than that of
// `args`, or if `args` has an activation although the kernel leaves it to the caller.
Status check_plan(const SpmmPlan& plan, KernelFamily family, const SpmmArgs& args);

// The values, other than "auto", of the operator's `config` argument for a format and values of a
// type on the CPU or on CUDA.
std::vector<std::string> plan_names(Format format, ValueType type, bool cuda);

// Plans a problem. config = "auto" chooses the kernel; any other name forces one, and the problem
// must not have rounds_x. ctas = 0 chooses the number of CTAs, which the CPU and the dense GEMM
// ignore. explain = false leaves the reason out.
Status select_plan(const SpmmProblem& problem, const DeviceInfo& device, const std::string& config,
                   int64_t ctas, SpmmPlan* out, bool explain = true);

// The format that format="auto" chooses for a value type and a device, and one sentence why.
struct FormatChoice {
  Format format = Format::kTiledCsl;
  std::string reason;
};

// Most calls will have at most `expected_tokens` tokens; 0 says nothing.
FormatChoice select_format(int64_t m, int64_t k, int64_t nnz, ValueType type,
                           const DeviceInfo& device, int64_t expected_tokens = 0);

// Whether the choice between formats on a device depends on nnz.
bool format_depends_on_density(ValueType type, const DeviceInfo& device);

}  // namespace flash_llm
