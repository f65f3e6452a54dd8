#pragma once

#include <pybind11/pybind11.h>

namespace smart_fast {

void define_triton(pybind11::module_& module);

}  // namespace smart_fast
