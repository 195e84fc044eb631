#pragma once

#include <pybind11/pybind11.h>

namespace limpet {

void bind_rows(pybind11::module_& m);

}  // namespace limpet
