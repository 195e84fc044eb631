// Rows of a buffer on the CPU, whose batches are read and made as torch's tensors by DLPack's C functions: a call
// through Python for every address, dtype and shape takes longer than copying a small batch does.

#include "bind.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "dlpack.h"

namespace limpet {
namespace {

using Fields = std::vector<RowField>;

bool without_gaps(const dlpack::Tensor& tensor) {
  std::int64_t stride = 1;
  for (int k = tensor.ndim - 1; k >= 0; --k) {
    if (tensor.shape[k] == 0) return true;
    if (tensor.shape[k] != 1 && tensor.strides[k] != stride) return false;
    stride *= tensor.shape[k];
  }
  return true;
}

bool requires_grad(PyObject* tensor) {
  static PyObject* const name = PyUnicode_InternFromString("requires_grad");
  const auto value = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, name));
  if (!value) throw py::error_already_set();
  return value.ptr() != Py_False;
}

// Whether what lies in memory are a tensor's values with the other sign. Only the imaginary part of a conjugated tensor
// is like that, and it begins in the middle of a complex number: others need not be asked, which takes 0.1 us.
bool negated(PyObject* tensor, const dlpack::Tensor& rows) {
  const auto begin = reinterpret_cast<std::uintptr_t>(address(rows));
  if (rows.dtype.code != dlpack::kFloat || (begin & (rows.dtype.bits / 4u - 1u)) == 0) return false;
  static PyObject* const name = PyUnicode_InternFromString("is_neg");
  const auto value = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor, name));
  if (!value) throw py::error_already_set();
  return value.ptr() != Py_False;
}

class PlainRows {
 public:
  // Fields [capacity, *], the numbers of the items [capacity], and how many were seen [], all without gaps. A batch is
  // a tensor where `container` is that type, and otherwise a tuple or a list, which are taken for each other.
  PlainRows(const py::capsule& exchange, py::type tensor, py::type container, std::vector<py::object> stored)
      : api_(exchange.get_pointer<const dlpack::ExchangeApi>()),
        tensor_(std::move(tensor)),
        container_(std::move(container)),
        stored_(std::move(stored)) {
    if (api_->version.major != dlpack::kMajorVersion || api_->view == nullptr)
      throw py::value_error("exchange must be of DLPack 1, with views");
    for (const py::object& field : stored_) {
      const dlpack::Tensor rows = view(field);
      std::int64_t bytes = (rows.dtype.bits * rows.dtype.lanes + 7) / 8;
      for (int k = 1; k < rows.ndim; ++k) bytes *= rows.shape[k];
      types_.push_back({rows.dtype, {rows.shape + 1, rows.shape + rows.ndim}, bytes});
    }
  }

  // How many rows a batch has; -1 where it must be looked at more closely: its tensors are not of the stored rows'
  // dtypes and shapes, or are not plain tensors on the CPU, or have gaps, gradients or signs that are still to come.
  std::int64_t count(py::handle batch) const {
    Fields fields(stored_.size());
    return read(batch, true, fields);
  }

  // Inserts the next items of a stream into a reservoir, and says how many they are; -1, and nothing is done, as above
  // (but for gradients, which do not matter).
  std::int64_t insert(py::handle batch, py::handle items, py::handle seen, std::uint64_t seed, int threads) const {
    Fields fields(stored_.size());
    const std::int64_t count = read(batch, false, fields);
    if (count <= 0) return count;
    point_to_stored(fields);
    const dlpack::Tensor numbers = view(items);
    const ReservoirBatch rows{fields.data(),
                              static_cast<int>(fields.size()),
                              static_cast<std::int64_t*>(address(numbers)),
                              static_cast<std::int64_t*>(address(view(seen))),
                              numbers.shape[0],
                              count,
                              seed};
    const py::gil_scoped_release release;
    cpu::kernels().reservoir_insert(rows, threads);
    return count;
  }

  // Copies rows of a batch that was counted, from `begin` on, into the slots from `slot` on.
  void put(py::handle batch, std::int64_t begin, std::int64_t count, std::int64_t slot, int threads) const {
    std::int64_t all;
    Fields fields = counted(batch, &all);
    point_to_stored(fields);
    for (RowField& field : fields) {
      field.ahead = static_cast<char*>(field.batch) + begin * field.row_bytes;
      field.batch = static_cast<char*>(field.stored) + slot * field.row_bytes;
    }
    const py::gil_scoped_release release;
    cpu::kernels().gather_rows(fields.data(), static_cast<int>(fields.size()), count, nullptr, 0, threads);
  }

  // Rows of `count` of the first `population` slots, drawn without replacement.
  py::object sampled(std::int64_t population, std::int64_t count, std::uint64_t seed, std::uint64_t draw,
                     int threads) const {
    return drawn(Fields(stored_.size()), 0, population, count, seed, draw, threads);
  }

  // A batch, and behind it such rows, as many as make up `fraction` of the whole, or all there are; None as for
  // count().
  py::object mixed(py::handle batch, double fraction, std::int64_t population, std::uint64_t seed, std::uint64_t draw,
                   int threads) const {
    Fields fields(stored_.size());
    const std::int64_t ahead = read(batch, true, fields);
    if (ahead < 0) return py::none();
    const double share = std::nearbyint(static_cast<double>(ahead) * fraction / (1.0 - fraction));  // as Python rounds
    const std::int64_t count = share < static_cast<double>(population) ? static_cast<std::int64_t>(share) : population;
    return drawn(std::move(fields), ahead, population, count, seed, draw, threads);
  }

  // A batch that was counted (or none), and behind it the rows of given slots, int64 [count].
  py::object gathered(py::handle batch, py::handle slots, int threads) const {
    const dlpack::Tensor places = view(slots);
    std::int64_t ahead = 0;
    Fields fields = batch.is_none() ? Fields(stored_.size()) : counted(batch, &ahead);
    return joined(std::move(fields), ahead, static_cast<const std::int64_t*>(address(places)), places.shape[0],
                  threads);
  }

 private:
  struct RowType {
    dlpack::DataType dtype;
    std::vector<std::int64_t> shape;
    std::int64_t bytes;
  };

  dlpack::Tensor view(py::handle tensor) const {
    dlpack::Tensor result;
    if (api_->view(tensor.ptr(), &result) != 0) throw py::error_already_set();
    return result;
  }

  // The k-th of so many tensors of a batch; null where it is no such batch.
  PyObject* item(py::handle batch, std::size_t k) const {
    PyObject* const all = batch.ptr();
    const auto size = static_cast<Py_ssize_t>(stored_.size()), index = static_cast<Py_ssize_t>(k);
    PyObject* one = nullptr;
    if (container_.is(tensor_))
      one = all;
    else if (PyTuple_CheckExact(all) && PyTuple_GET_SIZE(all) == size)
      one = PyTuple_GET_ITEM(all, index);
    else if (PyList_CheckExact(all) && PyList_GET_SIZE(all) == size)
      one = PyList_GET_ITEM(all, index);
    return one != nullptr && Py_TYPE(one) == reinterpret_cast<PyTypeObject*>(tensor_.ptr()) ? one : nullptr;
  }

  // Fills in the addresses of a batch's rows, and says how many there are; -1 as for count().
  std::int64_t read(py::handle batch, bool gradients, Fields& fields) const {
    std::int64_t count = -1;
    for (std::size_t k = 0; k < fields.size(); ++k) {
      PyObject* const tensor = item(batch, k);
      dlpack::Tensor rows;
      if (tensor == nullptr) return -1;
      if (api_->view(tensor, &rows) != 0) {  // a tensor without memory of its own
        PyErr_Clear();
        return -1;
      }
      const RowType& type = types_[k];
      if (rows.device.type != dlpack::kCpu || rows.ndim != static_cast<int>(type.shape.size()) + 1 ||
          !(rows.dtype == type.dtype) || !std::equal(type.shape.begin(), type.shape.end(), rows.shape + 1) ||
          !without_gaps(rows) || (k > 0 && rows.shape[0] != count) || negated(tensor, rows) ||
          (gradients && requires_grad(tensor)))
        return -1;
      count = rows.shape[0];
      fields[k].batch = address(rows);
      fields[k].row_bytes = type.bytes;
    }
    return count;
  }

  Fields counted(py::handle batch, std::int64_t* count) const {
    Fields fields(stored_.size());
    *count = read(batch, false, fields);
    if (*count < 0) throw py::value_error("batch must be one that was counted");
    return fields;
  }

  // Looked up each time: tensors that are sent to another process move into shared memory.
  void point_to_stored(Fields& fields) const {
    for (std::size_t k = 0; k < fields.size(); ++k) fields[k].stored = address(view(stored_[k]));
  }

  py::object drawn(Fields fields, std::int64_t ahead, std::int64_t population, std::int64_t count, std::uint64_t seed,
                   std::uint64_t draw, int threads) const {
    std::vector<std::int64_t> places(static_cast<std::size_t>(count));
    cpu::kernels().sample_without_replacement(population, count, seed, draw, places.data());
    return joined(std::move(fields), ahead, places.data(), count, threads);
  }

  // Rows of a batch, whose addresses are in `fields`, and behind them those of `places`.
  py::object joined(Fields fields, std::int64_t ahead, const std::int64_t* places, std::int64_t replayed,
                    int threads) const {
    point_to_stored(fields);
    std::vector<py::object> rows;
    rows.reserve(fields.size());
    for (std::size_t k = 0; k < fields.size(); ++k) {
      rows.push_back(empty(types_[k], ahead + replayed));
      fields[k].row_bytes = types_[k].bytes;
      fields[k].ahead = std::exchange(fields[k].batch, address(view(rows[k])));
    }
    {
      const py::gil_scoped_release release;
      cpu::kernels().gather_rows(fields.data(), static_cast<int>(fields.size()), ahead, places, replayed, threads);
    }
    if (container_.is(tensor_)) return rows[0];
    if (container_.ptr() == reinterpret_cast<PyObject*>(&PyList_Type)) return py::cast(rows);
    py::tuple result(rows.size());
    for (std::size_t k = 0; k < rows.size(); ++k) result[k] = std::move(rows[k]);
    return result;
  }

  py::object empty(const RowType& type, std::int64_t count) const {
    std::vector<std::int64_t> shape{count};
    shape.insert(shape.end(), type.shape.begin(), type.shape.end());
    dlpack::Tensor like{
        nullptr, {dlpack::kCpu, 0}, static_cast<std::int32_t>(shape.size()), type.dtype, shape.data(), nullptr, 0};
    dlpack::ManagedTensor* managed = nullptr;
    void* object = nullptr;
    const auto failed = [](void*, const char*, const char* message) { PyErr_SetString(PyExc_RuntimeError, message); };
    if (api_->allocate(&like, &managed, nullptr, failed) != 0 || api_->to_object(managed, &object) != 0)
      throw py::error_already_set();
    return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
  }

  const dlpack::ExchangeApi* api_;
  py::type tensor_, container_;
  std::vector<py::object> stored_;
  std::vector<RowType> types_;
};

}  // namespace

void bind_rows(py::module_& m) {
  py::class_<PlainRows>(m, "PlainRows")
      .def(py::init<const py::capsule&, py::type, py::type, std::vector<py::object>>())
      .def("count", &PlainRows::count)
      .def("insert", &PlainRows::insert)
      .def("put", &PlainRows::put)
      .def("sampled", &PlainRows::sampled)
      .def("mixed", &PlainRows::mixed)
      .def("gathered", &PlainRows::gathered);
}

}  // namespace limpet
