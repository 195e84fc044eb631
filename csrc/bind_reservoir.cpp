#include "bind.h"
#include "cpu/isa.h"
#if defined(LIMPET_CUDA)
#include "cuda/reservoir.h"
#endif

namespace limpet {

void bind_reservoir(py::module_& m) {
  m.def("reservoir_slots", [](std::int64_t seen, std::int64_t count, std::int64_t capacity, std::uint64_t seed,
                              Address slots, int threads) {
    const py::gil_scoped_release release;
    cpu::kernels().reservoir_slots(seen, count, capacity, seed, pointer<std::int64_t>(slots), threads);
  });
  m.def("reservoir_insert",
        [](const Addresses& stored, const Addresses& batch, const Sizes& row_bytes, Address items, Address seen,
           std::int64_t capacity, std::int64_t count, std::uint64_t seed, int threads) {
          const auto fields = row_fields(stored, batch, row_bytes);
          const py::gil_scoped_release release;
          cpu::kernels().reservoir_insert({fields.data(), static_cast<int>(fields.size()), pointer<std::int64_t>(items),
                                           pointer<std::int64_t>(seen), capacity, count, seed},
                                          threads);
        });
  m.def("sample_without_replacement",
        [](std::int64_t population, std::int64_t count, std::uint64_t seed, std::uint64_t draw, Address sample) {
          const py::gil_scoped_release release;
          cpu::kernels().sample_without_replacement(population, count, seed, draw, pointer<std::int64_t>(sample));
        });
  m.def("gather_rows", [](const Addresses& stored, const Addresses& batch, const Sizes& row_bytes, std::int64_t rows,
                          Address index, std::int64_t count, int threads) {
    const auto fields = row_fields(stored, batch, row_bytes);
    const auto* places = pointer<const std::int64_t>(index);
    for (std::int64_t k = 0; k < count; ++k)
      if (places[k] < 0 || places[k] >= rows)
        throw py::index_error("index must be in [0, " + std::to_string(rows) + "), got " + std::to_string(places[k]));
    const py::gil_scoped_release release;
    cpu::kernels().gather_rows(fields.data(), static_cast<int>(fields.size()), 0, places, count, threads);
  });
#if defined(LIMPET_CUDA)
  m.def("cuda_reservoir_slots", [](std::int64_t seen, std::int64_t count, std::int64_t capacity, std::uint64_t seed,
                                   Address slots, int device, Address stream) {
    const py::gil_scoped_release release;
    cuda::reservoir_slots(seen, count, capacity, seed, pointer<std::int64_t>(slots), device, pointer<void>(stream));
  });
  m.def("cuda_reservoir_workspace", cuda::reservoir_workspace_bytes);
  m.def("cuda_reservoir_insert", [](const Addresses& stored, const Addresses& batch, const Sizes& row_bytes,
                                    Address items, Address seen, std::int64_t capacity, std::int64_t count,
                                    std::uint64_t seed, Address workspace, int device, Address stream) {
    const auto fields = row_fields(stored, batch, row_bytes);
    const py::gil_scoped_release release;
    cuda::reservoir_insert({fields.data(), static_cast<int>(fields.size()), pointer<std::int64_t>(items),
                            pointer<std::int64_t>(seen), capacity, count, seed},
                           pointer<void>(workspace), device, pointer<void>(stream));
  });
  m.def("cuda_sample_without_replacement",
        [](std::int64_t population, std::int64_t count, std::uint64_t seed, std::uint64_t draw, Address sample,
           Address workspace, int device, Address stream) {
          const py::gil_scoped_release release;
          cuda::sample_without_replacement(population, count, seed, draw, pointer<std::int64_t>(sample),
                                           pointer<void>(workspace), device, pointer<void>(stream));
        });
  m.def("cuda_gather_rows", [](const Addresses& stored, const Addresses& batch, const Sizes& row_bytes,
                               std::int64_t rows, Address index, std::int64_t count, int device, Address stream) {
    const auto fields = row_fields(stored, batch, row_bytes);
    const py::gil_scoped_release release;
    cuda::gather_rows(fields.data(), static_cast<int>(fields.size()), rows, pointer<const std::int64_t>(index), count,
                      device, pointer<void>(stream));
  });
#endif
}

}  // namespace limpet
