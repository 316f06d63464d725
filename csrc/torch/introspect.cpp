// flash_llm._C: functions of the build, plans and formats that take no tensors. The module links to
// the library that has the operators, so loading it registers them too (schemas.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/cpu_isa.h"
#include "format/packed_format.h"
#include "format/packed_header.h"
#include "format/tiled_csl.h"
#include "plan/spmm_plan.h"
#include "torch/python_calls.h"

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
  for (const KernelFamilyRow& family : kernel_families()) {
    if (family.place != Place::kCuda) continue;
    for (const KernelConfig& config : family.configs()) {
      if (config.facts.empty()) continue;  // the vendor's kernel
      py::dict row;
      row["name"] = config.name;
      for (const PackedFormat& format : all_formats()) {
        if (family.formats.contains(format.id)) row["format"] = format.name;
      }
      for (const auto& [fact, value] : config.facts) row[fact] = value;
      list.append(row);
    }
  }
  return list;
}

// `where` begins the message.
void raise_if_error(const std::string& where, const Status& status) {
  const std::string message = where + ": " + status.message;
  if (status.code == StatusCode::kUnsupported) {
    PyErr_SetString(PyExc_NotImplementedError, message.c_str());
    throw py::error_already_set();
  }
  if (status.code == StatusCode::kInvalidType) throw py::type_error(message);
  if (!status.ok()) throw py::value_error(message);
}

// value_type = "" stands for the first of the format's types: 16-bit values, where it holds them.
std::vector<std::string> names_of_plans(const std::string& format, bool cuda,
                                        const std::string& value_type) {
  const std::string where = "flash_llm::plan_names";
  Format id;
  raise_if_error(where, parse_format(format, &id));
  ValueType type = packed_format(id).value_types.first();
  if (!value_type.empty()) raise_if_error(where, parse_value_type(value_type, &type));
  return plan_names(id, type, cuda);
}

std::string explain_plan(int64_t m, int64_t n, int64_t k, int64_t nnz,
                         const std::string& value_type, const std::string& format,
                         int compute_capability, int num_sms, int smem_per_sm_bytes,
                         const std::string& config, int64_t ctas,
                         const std::string& x_quantization) {
  SpmmProblem problem{m, n, k, nnz};
  const std::string where = "flash_llm::explain_plan";
  raise_if_error(where, parse_value_type(value_type, &problem.value_type));
  raise_if_error(where, parse_x_quantization(x_quantization, &problem.rounds_x));
  DeviceInfo device = gpu(compute_capability, num_sms, smem_per_sm_bytes, FLASH_LLM_CUDA_ARCHS);
  raise_if_error(where, detect_cpu(&device));
  if (format == "auto") {
    problem.format = select_format(m, k, nnz, problem.value_type, device).format;
  } else {
    raise_if_error(where, parse_format(format, &problem.format));
    raise_if_error(where, check_holds(packed_format(problem.format), problem.value_type));
  }
  SpmmPlan plan;
  raise_if_error(where, select_plan(problem, device, config, ctas, &plan));
  return plan.to_string();
}

// The instruction set that the CPU kernels use now.
std::string current_cpu_isa() {
  CpuIsa isa{};
  raise_if_error("flash_llm::cpu_isa", select_cpu_isa(&isa));
  return cpu_isa_name(isa);
}

void set_cpu_isa(const std::string& name) {
  raise_if_error("flash_llm::set_cpu_isa", force_cpu_isa(name));
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const CpuIsa isa : kCpuIsas) {
    if (has_cpu_isa(isa)) names.emplace_back(cpu_isa_name(isa));
  }
  return names;
}

// Refuses a malformed header, and buffers of other lengths than a weight with this header has. A
// length that is not given is not compared.
void check_header(const std::string& where, const std::vector<int64_t>& ints,
                  std::optional<int64_t> num_offsets, std::optional<int64_t> payload_words) {
  PackedHeader header;
  raise_if_error(where,
                 PackedHeader::from_ints(ints.data(), static_cast<int64_t>(ints.size()), &header));
  const PackedFormat& format = packed_format(header.format);
  raise_if_error(
      where,
      format.check_sizes(
          header, num_offsets.value_or(format.tiles(header.value_type, header.m, header.k) + 1),
          payload_words.value_or(header.payload_words)));
}

// Refuses a format by name, except "auto", that cannot hold values of the type.
void check_format_holds(const std::string& where, const std::string& format, int64_t value_type) {
  ValueType type{};
  raise_if_error(where, value_type_of(value_type, &type));
  if (format == "auto") return;
  Format id;
  raise_if_error(where, parse_format(format, &id));
  raise_if_error(where, check_holds(packed_format(id), type));
}

py::tuple explain_format(int64_t m, int64_t k, int64_t nnz, int compute_capability,
                         int64_t value_type, int64_t expected_tokens) {
  ValueType type{};
  raise_if_error("flash_llm::explain_format", value_type_of(value_type, &type));
  const DeviceInfo device = gpu(compute_capability, 0, 0, FLASH_LLM_CUDA_ARCHS);
  const FormatChoice choice = select_format(m, k, nnz, type, device, expected_tokens);
  return py::make_tuple(packed_format(choice.format).name, choice.reason);
}

}  // namespace
}  // namespace flash_llm

PYBIND11_MODULE(_C, m) {
  using namespace flash_llm;
  m.doc() = "Host-side facts about flash_llm's build, kernels and format.";
  m.def("build_info", &build_info);
  m.def("configs", &configs);
  m.def("plan_names", &names_of_plans, py::arg("format"), py::arg("cuda"),
        py::arg("value_type") = "");
  m.def("explain_plan", &explain_plan, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("nnz"),
        py::arg("value_type"), py::arg("format"), py::arg("compute_capability"), py::arg("num_sms"),
        py::arg("smem_per_sm_bytes"), py::arg("config") = "auto", py::arg("ctas") = 0,
        py::arg("x_quantization") = "none");
  m.def("position_of", &position_of, py::arg("row"), py::arg("col"));
  m.def("row_of_position", &row_of_position, py::arg("position"));
  m.def("col_of_position", &col_of_position, py::arg("position"));
  m.def("explain_format", &explain_format, py::arg("m"), py::arg("k"), py::arg("nnz"),
        py::arg("compute_capability"), py::arg("value_type"), py::arg("expected_tokens") = 0);
  m.def("check_header", &check_header, py::arg("where"), py::arg("ints"),
        py::arg("num_offsets") = py::none(), py::arg("payload_words") = py::none());
  m.def("check_holds", &check_format_holds, py::arg("where"), py::arg("format"),
        py::arg("value_type"));
  m.def("cpu_isa", &current_cpu_isa);
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("name"));
  m.def("cpu_isas", &cpu_isas);
  define_python_calls(m);
  py::dict formats;
  for (const PackedFormat& format : all_formats()) {
    py::dict row;
    row["version"] = format.version;
    row["tile_m"] = format.tile_m;
    row["unit_words"] = format.unit_words;
    py::dict tile_k;  // for each value type that the format holds
    for (const ValueType type : kValueTypes) {
      if (!format.value_types.contains(type)) continue;
      tile_k[py::int_(static_cast<int64_t>(type))] = format.tile_k(type);
    }
    row["tile_k"] = tile_k;
    formats[format.name] = row;
  }
  m.attr("FORMATS") = formats;
  m.attr("PACKED_MAGIC") = kPackedMagic;
}
