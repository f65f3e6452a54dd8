#pragma once

#include <pybind11/pybind11.h>

namespace smart_fast {

void define_eager(pybind11::module_& module);

}  // namespace smart_fast
