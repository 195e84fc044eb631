#pragma once

#include <pybind11/pybind11.h>

namespace limpet {

void bind_plain_sums(pybind11::module_& m);

}  // namespace limpet
