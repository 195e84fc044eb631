// What the files that know Python (limpet._core) have in common. Pointers, sizes and strides come in as integers
// (limpet._launch makes them from tensors); the GIL is released while a kernel runs.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "reservoir_rows.h"

namespace limpet {

namespace py = pybind11;

using Address = std::uintptr_t;
using Addresses = std::vector<Address>;
using Codes = std::vector<int>;  // of dtypes and storages
using Sizes = std::vector<std::int64_t>;

template <std::size_t n>
using Fixed = std::array<std::int64_t, n>;

template <std::size_t n>
void copy(const Fixed<n>& from, std::int64_t* to) {
  std::copy(from.begin(), from.end(), to);
}

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// The fields of items: addresses of rows in the buffer and in the batch, bytes of a row.
inline std::vector<RowField> row_fields(const Addresses& stored, const Addresses& batch, const Sizes& row_bytes) {
  std::vector<RowField> fields(stored.size());
  for (std::size_t f = 0; f < fields.size(); ++f)
    fields[f] = {pointer<void>(stored[f]), pointer<void>(batch[f]), row_bytes[f]};
  return fields;
}

void bind_fisher(py::module_& m);
void bind_quadratic(py::module_& m);
void bind_path_integral(py::module_& m);
void bind_optim(py::module_& m);
void bind_reservoir(py::module_& m);
void bind_keyed(py::module_& m);
void bind_rows(py::module_& m);
void bind_fisher_plain(py::module_& m);
void bind_fisher_calls(py::module_& m);
void bind_gated_lateral(py::module_& m);

}  // namespace limpet
