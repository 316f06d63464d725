// Which kernel multiplies, and how its work is cut: a pure function of the problem and the device,
// so that it can be tested without a GPU, printed in a bug report, and forced from a test.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "plan/device.h"
#include "plan/kernel_family.h"
#include "plan/problem.h"

namespace flash_llm {

// Work that is divided evenly between workers (cuda/schedule/stream_k.cuh): rows * cols units.
struct WorkGrid {
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t workers = 0;  // CTAs, or clusters of CTAs

  int64_t units() const { return rows * cols; }
};

struct SpmmPlan {
  KernelFamily family = KernelFamily::kDense;
  SpmmProblem problem;  // that it was made for
  int config = -1;      // index into the family's configurations
  int64_t ctas = 0;     // kernels of ours on CUDA: grid size
  WorkGrid work;        // the same kernels: how the work is divided
  int ring_bytes = 0;   // kBitmapSm90a: shared memory for chunks
  int unit_cols = 1;    // kBitmapSm90a: columns of chunks that are not divided between CTAs
  int x_multiple = 1;   // kernels of ours on CUDA: rows of X must be padded to a multiple of this
  // Whether the kernel leaves the activation to the caller.
  bool rounds_before_activation = false;
  // Temporary memory: fp32 partial sums and then X in fragment order (kTiledCslSm80), fp32 partial
  // sums (kBitmapSm90a), or the dense weight (kDense).
  int64_t workspace_bytes = 0;
  int64_t packed_x_bytes = 0;  // the second part of it
  std::string reason;          // one sentence, with the measurement behind it

  // The configuration's name: what `config` of the operator takes.
  std::string name() const;
  std::string to_string() const;
};

// Refuses to run a kernel of `family` by a plan that was made for another family, for another
// problem than that of `args`, or for an activation that the kernel leaves to the caller.
Status check_plan(const SpmmPlan& plan, KernelFamily family, const SpmmArgs& args);

// Names that the operator's `config` argument takes for a format on this kind of device, "auto"
// excepted.
std::vector<std::string> plan_names(Format format, bool cuda);

// config = "auto" chooses; any other name forces that kernel. ctas = 0 chooses the grid (the CPU
// and the dense GEMM have none).
Status select_plan(const SpmmProblem& problem, const DeviceInfo& device, const std::string& config,
                   int64_t ctas, SpmmPlan* out);

// The format that multiplies fastest on a device, and one sentence why.
struct FormatChoice {
  Format format = Format::kTiledCsl;
  std::string reason;
};

FormatChoice select_format(int64_t m, int64_t k, int64_t nnz, const DeviceInfo& device);

// Whether the choice between formats on a device depends on nnz.
bool format_depends_on_density(const DeviceInfo& device);

}  // namespace flash_llm
