#include "bind.h"
#include "cpu/isa.h"
#include "cpu/keyed_index.h"

namespace limpet {

void bind_keyed(py::module_& m) {
  const auto notes = [](const Fixed<3>& addresses) {
    return cpu::KeyedNotes{pointer<std::int64_t>(addresses[0]), pointer<std::int64_t>(addresses[1]),
                           pointer<std::int64_t>(addresses[2])};
  };
  py::class_<cpu::KeyedIndex>(m, "KeyedIndex")
      .def(py::init([notes](const Fixed<3>& addresses, std::int64_t capacity) {
        return cpu::KeyedIndex(notes(addresses), capacity);
      }))
      .def("insert",
           [notes](cpu::KeyedIndex& index, const Addresses& stored, const Addresses& batch, const Sizes& row_bytes,
                   const Fixed<3>& addresses, Address group, Address weight, Address seen, std::int64_t count,
                   std::uint64_t seed, int threads) {
             const auto fields = row_fields(stored, batch, row_bytes);
             auto* const number = pointer<std::int64_t>(seen);
             const py::gil_scoped_release release;
             index.insert({fields.data(),
                           static_cast<int>(fields.size()),
                           notes(addresses),
                           {pointer<const std::int64_t>(group), pointer<const double>(weight), *number, count, seed}},
                          threads);
             *number += count;
           })
      // Places, slots, keys and groups of the items that get a slot, in their order.
      .def("choose",
           [](cpu::KeyedIndex& index, Address group, Address weight, std::int64_t seen, std::int64_t count,
              std::uint64_t seed, int threads) {
             std::vector<cpu::KeyedIndex::Placed> placed;
             {
               const py::gil_scoped_release release;
               placed = index.choose(
                   {pointer<const std::int64_t>(group), pointer<const double>(weight), seen, count, seed}, threads);
             }
             std::array<Sizes, 4> columns;
             for (const auto& row : placed) {
               const std::int64_t values[] = {row.place, row.slot, row.key, row.group};
               for (std::size_t k = 0; k < columns.size(); ++k) columns[k].push_back(values[k]);
             }
             return columns;
           })
      .def("select", [](const cpu::KeyedIndex& index, Address places, std::int64_t count, Address slots) {
        index.select(pointer<const std::int64_t>(places), count, pointer<std::int64_t>(slots));
      });
}

}  // namespace limpet
