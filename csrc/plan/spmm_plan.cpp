#include "plan/spmm_plan.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <utility>

#include "format/packed_format.h"
#include "plan/config_table.h"
#include "plan/gather.h"

namespace flash_llm {
namespace {

constexpr int kMinComputeCapability = 80;

std::string capability_text(const DeviceInfo& device) {
  return std::to_string(device.compute_capability / 10) + "." +
         std::to_string(device.compute_capability % 10);
}

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "\"" : ", \"") + name + "\"";
  return text;
}

Status check_problem(const SpmmProblem& problem) {
  if (problem.m < 0 || problem.n < 0 || problem.k < 0 || problem.nnz < 0) {
    return Status::invalid_value(shape_text(problem) + " nnz=" + std::to_string(problem.nnz) +
                                 " must not be negative");
  }
  if (problem.n > INT32_MAX || problem.m > INT32_MAX || problem.k > INT32_MAX) {
    return Status::invalid_value(shape_text(problem) + " must each fit 31 bits");
  }
  if (problem.nnz > problem.m * problem.k) {
    return Status::invalid_value(shape_text(problem) +
                                 " cannot hold nnz=" + std::to_string(problem.nnz));
  }
  // Byte offsets must not overflow, not even those of fp32 elements.
  constexpr int64_t kMaxElems = std::numeric_limits<int64_t>::max() / 16;
  if (problem.n > 0 && std::max(problem.m, problem.k) > kMaxElems / problem.n) {
    return Status::invalid_value(shape_text(problem) + " is too large to address");
  }
  return Status::success();
}

// Plans a problem by a family. The caller has set the reason.
Status plan_family(const KernelFamilyRow& family, const PlanRequest& request, SpmmPlan* out) {
  out->family = family.id;
  out->problem = request.problem;
  return family.plan(request, out);
}

Status plan_forced(const PlanRequest& request, SpmmPlan* out) {
  const DeviceInfo& device = request.device;
  if (request.problem.rounds_x) {
    return Status::invalid_value("config must be \"auto\" with x_quantization, got \"" +
                                 request.config + "\"");
  }
  for (const KernelFamilyRow& family : kernel_families()) {
    if (!family.runs_on(device) || !family.multiplies(request.problem)) continue;
    for (const KernelConfig& config : family.configs()) {
      if (config.name != request.config) continue;
      if (const std::string missing = missing_feature(family, device); !missing.empty()) {
        return Status::unsupported("config \"" + config.name + "\" needs " + missing +
                                   "; this GPU has " + capability_text(device) + ", use \"dense\"");
      }
      out->reason = "forced";
      return plan_family(family, request, out);
    }
  }
  return Status::invalid_value(
      "config must be \"auto\" or one of " +
      join(plan_names(request.problem.format, request.problem.value_type, !device.is_cpu())) +
      " for format \"" + packed_format(request.problem.format).name + "\" on " +
      (device.is_cpu() ? "the CPU" : "CUDA") + ", got \"" + request.config + "\"");
}

Status plan_auto(const PlanRequest& request, SpmmPlan* out) {
  for (const KernelFamilyRow& family : kernel_families()) {
    if (!family.runs_on(request.device) || !family.multiplies(request.problem)) continue;
    if (!request.device.features.contains(family.needs)) {
      if (request.explain) {
        out->reason = "the kernel for this format needs " + missing_feature(family, request.device);
      }
    } else if (family.takes(request, request.explain ? &out->reason : nullptr)) {
      return plan_family(family, request, out);
    }
  }
  return Status::unsupported("no kernel multiplies values of type " +
                             std::string(value_traits(request.problem.value_type).name) +
                             " in format \"" + packed_format(request.problem.format).name +
                             "\" here");
}

// The formats that format="auto" may choose for a value type on a device. Those that it could
// choose if the device had a feature are added to `reason`, if it is not null.
std::vector<const PackedFormat*> candidates(ValueType type, const DeviceInfo& device,
                                            std::string* reason) {
  std::vector<const PackedFormat*> found;
  for (const PackedFormat& format : all_formats()) {
    bool has_kernel = false;
    std::string missing;
    for (const KernelFamilyRow& family : kernel_families()) {
      if (!family.chosen_by_format_auto || !family.runs_on(device) ||
          !family.formats.contains(format.id) || !family.value_types.contains(type)) {
        continue;
      }
      // The last family in the table needs least.
      missing = missing_feature(family, device);
      has_kernel |= missing.empty();
    }
    if (has_kernel) {
      found.push_back(&format);
    } else if (reason != nullptr && !missing.empty()) {
      *reason += "; " + std::string(format.name) + " needs " + missing;
    }
  }
  return found;
}

// The format for a device that lacks what its kernels need: one that is multiplied on such devices,
// so that they can at least unpack it.
Format format_without_kernel(ValueType type, const DeviceInfo& device) {
  const auto& families = kernel_families();
  const auto* family =
      std::find_if(families.begin(), families.end(), [&](const KernelFamilyRow& row) {
        return row.chosen_by_format_auto && row.runs_on(device) && row.value_types.contains(type);
      });
  if (family == families.end()) return Format::kQuantizedBitmap;  // no device has a kernel for it
  return family->formats.first();
}

}  // namespace

std::string SpmmPlan::name() const {
  const std::vector<KernelConfig> configs = kernel_family(family).configs();
  const bool exists = config >= 0 && config < static_cast<int>(configs.size());
  return exists ? configs[static_cast<size_t>(config)].name : "unknown";
}

std::string SpmmPlan::to_string() const {
  std::string text = name();
  if (ctas > 0) text += " ctas=" + std::to_string(ctas);
  if (ring_bytes > 0) {
    text += " unit_cols=" + std::to_string(unit_cols) + " ring_bytes=" + std::to_string(ring_bytes);
  }
  if (workspace_bytes > 0) text += " workspace_bytes=" + std::to_string(workspace_bytes);
  return text + " (" + reason + ")";
}

Status check_plan(const SpmmPlan& plan, KernelFamily family, const SpmmArgs& args) {
  if (plan.family != family) {
    return Status::invalid_value("plan " + plan.to_string() +
                                 " was given to a kernel of another family");
  }
  if (args.format != plan.problem.format || args.weight.value_type != plan.problem.value_type) {
    return Status::invalid_value(
        "plan " + plan.to_string() + " is for format \"" + packed_format(plan.problem.format).name +
        "\" and " + value_traits(plan.problem.value_type).name + ", the weight has format \"" +
        packed_format(args.format).name + "\" and " + value_traits(args.weight.value_type).name);
  }
  if (args.weight.m != plan.problem.m || args.weight.k != plan.problem.k ||
      args.n != plan.problem.n) {
    return Status::invalid_value(
        "plan " + plan.to_string() + " is for " + shape_text(plan.problem) +
        ", the call has M=" + std::to_string(args.weight.m) + " N=" + std::to_string(args.n) +
        " K=" + std::to_string(args.weight.k));
  }
  if (plan.rounds_before_activation && args.activation != Activation::kNone) {
    return Status::invalid_value("plan " + plan.to_string() +
                                 " leaves the activation to the caller, but one was given");
  }
  return Status::success();
}

std::vector<std::string> plan_names(Format format, ValueType type, bool cuda) {
  std::vector<std::string> names;
  for (const KernelFamilyRow& family : kernel_families()) {
    const bool here = family.place == Place::kBoth || (family.place == Place::kCuda) == cuda;
    if (!here || !family.formats.contains(format) || !family.value_types.contains(type)) continue;
    for (KernelConfig& config : family.configs()) names.push_back(std::move(config.name));
  }
  return names;
}

Status select_plan(const SpmmProblem& problem, const DeviceInfo& device, const std::string& config,
                   int64_t ctas, SpmmPlan* out, bool explain) {
  *out = SpmmPlan{};
  if (Status status = check_problem(problem); !status.ok()) return status;
  if (ctas < 0 || ctas > 65535) {
    return Status::invalid_value("ctas must lie in [0, 65535], got " + std::to_string(ctas));
  }
  if (!device.is_cpu() && device.compute_capability < kMinComputeCapability) {
    return Status::unsupported("needs a GPU of compute capability 8.0 or newer, this one has " +
                               capability_text(device));
  }
  const PlanRequest request{problem, device, config, ctas, explain};
  return request.forced() ? plan_forced(request, out) : plan_auto(request, out);
}

FormatChoice select_format(int64_t m, int64_t k, int64_t nnz, ValueType type,
                           const DeviceInfo& device, int64_t expected_tokens) {
  const double elems = static_cast<double>(m) * static_cast<double>(k);
  const double density = elems > 0 ? static_cast<double>(nnz) / elems : 1.0;
  FormatChoice choice;
  choice.format = format_without_kernel(type, device);
  double fewest = std::numeric_limits<double>::infinity();
  std::string sizes, others;
  for (const PackedFormat* format : candidates(type, device, &others)) {
    const double bytes = format->bytes_per_element(density, value_traits(type).bits);
    if (bytes < fewest) choice.format = format->id;
    fewest = std::min(fewest, bytes);
    sizes += (sizes.empty() ? "" : ", ") + std::string(format->name) + " " +
             std::to_string(std::lround(100 * bytes / 2)) + " %";
  }
  choice.reason = sizes.empty() ? "no kernel of this build runs here"
                                : "the fewest bytes of the formats that have kernels here (" +
                                      sizes + " of the dense weight)";
  choice.reason += others;
  if (packed_format(Format::kGather).value_types.contains(type) &&
      gather_suits_few_tokens(device, m, k, density, expected_tokens, &choice.reason)) {
    choice.format = Format::kGather;
  }
  return choice;
}

bool format_depends_on_density(ValueType type, const DeviceInfo& device) {
  return candidates(type, device, nullptr).size() > 1;
}

}  // namespace flash_llm
