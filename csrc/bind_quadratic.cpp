#include "bind.h"
#include "cpu/isa.h"
#if defined(LIMPET_CUDA)
#include "cuda/quadratic.h"
#endif

namespace limpet {
namespace {

// The tensors of a model as lists, one entry per parameter: addresses, element counts, codes of dtypes and storages.
struct QuadraticLists {
  Addresses theta, grad, anchor, importance;  // grad is empty where only the value is wanted
  Sizes numel;
  Codes theta_dtype, anchor_storage, importance_storage;

  std::vector<QuadraticTensor> tensors() const {
    std::vector<QuadraticTensor> all(theta.size());
    for (std::size_t k = 0; k < all.size(); ++k)
      all[k] = {pointer<const void>(theta[k]),
                grad.empty() ? nullptr : pointer<void>(grad[k]),
                pointer<const void>(anchor[k]),
                pointer<const void>(importance[k]),
                numel[k],
                static_cast<Dtype>(theta_dtype[k]),
                static_cast<Storage>(anchor_storage[k]),
                static_cast<Storage>(importance_storage[k])};
    return all;
  }
};

}  // namespace

void bind_quadratic(py::module_& m) {
  py::class_<QuadraticLists>(m, "QuadraticLists")
      .def(py::init<Addresses, Addresses, Addresses, Addresses, Sizes, Codes, Codes, Codes>());
  m.def("quadratic", [](const QuadraticLists& lists, int mode, double factor, int threads) {
    const auto tensors = lists.tensors();
    const py::gil_scoped_release release;
    return cpu::kernels().quadratic(tensors.data(), static_cast<std::int64_t>(tensors.size()),
                                    static_cast<QuadraticGrad>(mode), factor, threads);
  });
#if defined(LIMPET_CUDA)
  m.def("cuda_quadratic_workspace", [](const QuadraticLists& lists) {
    const auto tensors = lists.tensors();
    return cuda::quadratic_workspace_bytes(tensors.data(), static_cast<int>(tensors.size()));
  });
  // `scalar` is the value that the modes none and add write, and the scale that the mode write reads.
  m.def("cuda_quadratic", [](const QuadraticLists& lists, int mode, double strength, Address scalar, int scalar_dtype,
                             Address workspace, int device, Address stream) {
    const auto tensors = lists.tensors();
    const int count = static_cast<int>(tensors.size());
    const auto dtype = static_cast<Dtype>(scalar_dtype);
    const py::gil_scoped_release release;
    switch (static_cast<QuadraticGrad>(mode)) {
      case QuadraticGrad::none:
        return cuda::quadratic_value(tensors.data(), count, strength, pointer<void>(scalar), dtype,
                                     pointer<void>(workspace), device, pointer<void>(stream));
      case QuadraticGrad::add:
        return cuda::quadratic_add_grad(tensors.data(), count, strength, pointer<void>(scalar), dtype,
                                        pointer<void>(workspace), device, pointer<void>(stream));
      case QuadraticGrad::write:
        return cuda::quadratic_grad(tensors.data(), count, strength, pointer<const void>(scalar), dtype, device,
                                    pointer<void>(stream));
    }
  });
#endif
}

}  // namespace limpet
