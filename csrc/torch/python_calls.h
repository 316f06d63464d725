// Functions of flash_llm._C that take tensors.
#pragma once

#include <pybind11/pybind11.h>

namespace flash_llm {

void define_python_calls(pybind11::module_& m);

}  // namespace flash_llm
