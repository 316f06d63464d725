// flash_llm._C: what is not a tensor. Loading the module also registers the operators of ops.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <cstdint>
#include <string>

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
    row["warps_per_tile"] = config.warps_per_tile;
    row["tile_n"] = config.tile_n;
    row["ctas_per_sm"] = config.ctas_per_sm;
    row["packed_x"] = config.packed_x;
    row["smem_bytes"] = lscd_smem_bytes(config);
    list.append(row);
  }
  return list;
}

std::string explain_plan(int64_t m, int64_t n, int64_t k, int64_t nnz,
                         const std::string& value_type, int compute_capability, int num_sms,
                         int smem_per_sm_bytes, const std::string& config, int64_t ctas) {
  if (value_type != "float16" && value_type != "bfloat16") {
    throw py::type_error(
        "flash_llm::explain_plan: value_type must be \"float16\" or \"bfloat16\", got \"" +
        value_type + "\"");
  }
  SpmmProblem problem{m,
                      n,
                      k,
                      nnz,
                      Format::kTiledCsl,
                      value_type == "float16" ? ValueType::kFloat16 : ValueType::kBfloat16};
  SpmmPlan plan;
  const Status status =
      select_plan(problem, {compute_capability, num_sms, smem_per_sm_bytes}, config, ctas, &plan);
  const std::string message = "flash_llm::explain_plan: " + status.message;
  if (status.code == StatusCode::kUnsupported) {
    PyErr_SetString(PyExc_NotImplementedError, message.c_str());
    throw py::error_already_set();
  }
  if (!status.ok()) throw py::value_error(message);
  return plan.to_string();
}

}  // namespace
}  // namespace flash_llm

PYBIND11_MODULE(_C, m) {
  using namespace flash_llm;
  m.doc() = "Host-side facts about flash_llm's build, kernels and format.";
  m.def("build_info", &build_info);
  m.def("configs", &configs);
  m.def("plan_names", &plan_names, py::arg("cuda"));
  m.def("explain_plan", &explain_plan, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("nnz"),
        py::arg("value_type"), py::arg("compute_capability"), py::arg("num_sms"),
        py::arg("smem_per_sm_bytes"), py::arg("config") = "auto", py::arg("ctas") = 0);
  m.def("place_of", &place_of, py::arg("row"), py::arg("col"));
  m.def("row_of_place", &row_of_place, py::arg("place"));
  m.def("col_of_place", &col_of_place, py::arg("place"));
  m.attr("TILE_M") = kTileM;
  m.attr("TILE_K") = kTileK;
  m.attr("VECTOR_ENTRIES") = kVectorEntries;
  m.attr("PACKED_MAGIC") = kPackedMagic;
  m.attr("PACKED_VERSION") = kPackedVersion;
}
