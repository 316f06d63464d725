// Calls of flash_llm::spmm from Python for layers of few microseconds: torch.ops parses arguments
// by the operator's schema and boxes them, which takes longer than the call itself.
#include "torch/python_calls.h"

#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <vector>

#include "torch/operators.h"

namespace py = pybind11;

namespace flash_llm {
namespace {

at::Tensor spmm(const at::Tensor& x, const std::vector<int64_t>& header, const at::Tensor& offsets,
                const at::Tensor& payload, const std::optional<at::Tensor>& bias) {
  const py::gil_scoped_release no_gil;
  return call_spmm(x, header, offsets, payload, bias, "none", "auto", 0, true, std::nullopt);
}

}  // namespace

void define_python_calls(py::module_& m) {
  m.def("spmm", &spmm, py::arg("x"), py::arg("header"), py::arg("offsets"), py::arg("payload"),
        py::arg("bias"));
}

}  // namespace flash_llm
