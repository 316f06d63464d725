// Calls flash_llm::spmm from Python without boxing its arguments: torch.ops parses them by the
// operator's schema, which takes longer than a small layer's call itself.
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
  return call_spmm(x, header, offsets, payload, bias, "none", "auto", 0, true, "none");
}

}  // namespace

void define_python_calls(py::module_& m) {
  m.def("spmm", &spmm, py::arg("x"), py::arg("header"), py::arg("offsets"), py::arg("payload"),
        py::arg("bias"));
}

}  // namespace flash_llm
