// flash_llm._C: what is not a tensor. It links to the library that holds the operators of ops.cpp,
// so loading the module registers them too.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <cstdint>
#include <string>
#include <vector>

#include "core/cpu_isa.h"
#include "core/packed_format.h"
#include "core/packed_header.h"
#include "core/spmm_plan.h"
#include "core/tiled_csl.h"

namespace py = pybind11;

namespace flash_llm {
namespace {

py::dict build_info() {
  py::dict info;
#ifdef FLASH_LLM_WITH_CUDA
  info["cuda"] = true;
  info["cuda_version"] = FLASH_LLM_NVCC_VERSION;
  info["cuda_archs"] = FLASH_LLM_CUDA_ARCHS;
  info["reason"] = "";
#else
  info["cuda"] = false;
  info["cuda_version"] = py::none();
  info["cuda_archs"] = "";
  info["reason"] = FLASH_LLM_NO_CUDA_REASON;
#endif
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
  return info;
}

py::list configs() {
  py::list list;
  for (const LscdConfig& config : lscd_configs()) {
    py::dict row;
    row["name"] = config.name;
    row["format"] = packed_format(Format::kTiledCsl).name;
    row["tile_n"] = config.tile_n;
    row["warps_per_tile"] = config.warps_per_tile;
    row["ctas_per_sm"] = config.ctas_per_sm;
    row["packed_x"] = config.packed_x;
    row["smem_bytes"] = lscd_smem_bytes(config);
    list.append(row);
  }
  for (const BitmapConfig& config : bitmap_configs()) {
    py::dict row;
    row["name"] = config.name;
    row["format"] = packed_format(Format::kBitmap).name;
    row["tile_n"] = config.tile_n;
    row["warps"] = config.warps;
    row["strips"] = config.strips;
    row["cluster"] = config.cluster;
    row["x_stages"] = config.x_stages;
    row["ctas_per_sm"] = 1;
    row["smem_bytes"] = bitmap_smem_bytes(config, bitmap_min_ring_bytes(config));
    list.append(row);
  }
  return list;
}

void raise_if_error(const char* what, const Status& status) {
  const std::string message = std::string("flash_llm::") + what + ": " + status.message;
  if (status.code == StatusCode::kUnsupported) {
    PyErr_SetString(PyExc_NotImplementedError, message.c_str());
    throw py::error_already_set();
  }
  if (!status.ok()) throw py::value_error(message);
}

std::vector<std::string> names_of_plans(const std::string& format, bool cuda) {
  Format id;
  raise_if_error("plan_names", parse_format(format, &id));
  return plan_names(id, cuda);
}

std::string explain_plan(int64_t m, int64_t n, int64_t k, int64_t nnz,
                         const std::string& value_type, const std::string& format,
                         int compute_capability, int num_sms, int smem_per_sm_bytes,
                         const std::string& config, int64_t ctas) {
  if (value_type != "float16" && value_type != "bfloat16") {
    throw py::type_error(
        "flash_llm::explain_plan: value_type must be \"float16\" or \"bfloat16\", got \"" +
        value_type + "\"");
  }
  // As a build with the default list of architectures would answer.
  DeviceInfo device{compute_capability, num_sms, smem_per_sm_bytes, compute_capability == 90};
  raise_if_error("explain_plan", detect_cpu(&device));
  SpmmProblem problem{m, n, k, nnz};
  problem.value_type = value_type == "float16" ? ValueType::kFloat16 : ValueType::kBfloat16;
  if (format == "auto") {
    problem.format = select_format(m, k, nnz, device).format;
  } else {
    raise_if_error("explain_plan", parse_format(format, &problem.format));
  }
  SpmmPlan plan;
  raise_if_error("explain_plan", select_plan(problem, device, config, ctas, &plan));
  return plan.to_string();
}

// The instruction set of the CPU kernels now, and all that this CPU has.
std::string current_cpu_isa() {
  CpuIsa isa{};
  raise_if_error("cpu_isa", select_cpu_isa(&isa));
  return cpu_isa_name(isa);
}

void set_cpu_isa(const std::string& name) { raise_if_error("set_cpu_isa", force_cpu_isa(name)); }

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const CpuIsa isa : kCpuIsas) {
    if (has_cpu_isa(isa)) names.emplace_back(cpu_isa_name(isa));
  }
  return names;
}

py::tuple explain_format(int64_t m, int64_t k, int64_t nnz, int compute_capability) {
  const DeviceInfo device{compute_capability, 0, 0, compute_capability == 90, CpuIsa::kPortable};
  const FormatChoice choice = select_format(m, k, nnz, device);
  return py::make_tuple(packed_format(choice.format).name, choice.reason);
}

}  // namespace
}  // namespace flash_llm

PYBIND11_MODULE(_C, m) {
  using namespace flash_llm;
  m.doc() = "Host-side facts about flash_llm's build, kernels and format.";
  m.def("build_info", &build_info);
  m.def("configs", &configs);
  m.def("plan_names", &names_of_plans, py::arg("format"), py::arg("cuda"));
  m.def("explain_plan", &explain_plan, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("nnz"),
        py::arg("value_type"), py::arg("format"), py::arg("compute_capability"), py::arg("num_sms"),
        py::arg("smem_per_sm_bytes"), py::arg("config") = "auto", py::arg("ctas") = 0);
  m.def("place_of", &place_of, py::arg("row"), py::arg("col"));
  m.def("row_of_place", &row_of_place, py::arg("place"));
  m.def("col_of_place", &col_of_place, py::arg("place"));
  m.def("explain_format", &explain_format, py::arg("m"), py::arg("k"), py::arg("nnz"),
        py::arg("compute_capability"));
  m.def("cpu_isa", &current_cpu_isa);
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("name"));
  m.def("cpu_isas", &cpu_isas);
  py::dict formats;
  for (const Format id : {Format::kTiledCsl, Format::kBitmap, Format::kRowBitmap}) {
    const PackedFormat& format = packed_format(id);
    py::dict row;
    row["version"] = packed_version(id);
    row["tile_m"] = format.tile_m;
    row["tile_k"] = format.tile_k;
    row["unit_words"] = format.unit_words;
    formats[format.name] = row;
  }
  m.attr("FORMATS") = formats;
  m.attr("PACKED_MAGIC") = kPackedMagic;
}
