#include "bind.h"
#include "cpu/isa.h"
#if defined(LIMPET_CUDA)
#include "cuda/optim.h"
#endif

namespace limpet {
namespace {

// The tensors of a model as lists, one entry per parameter. A list is empty where the step does without; sgd_step has
// its momentum in `first`.
struct OptimLists {
  Addresses theta, grad, first, second, largest, anchor, importance, integral, step;
  Sizes numel;
  Codes dtype, anchor_dtype, importance_dtype;

  std::vector<OptimTensor> tensors() const {
    const auto at = [](const Addresses& list, std::size_t k) { return pointer<void>(list.empty() ? 0 : list[k]); };
    const auto dtype_of = [](const Codes& list, std::size_t k) {
      return static_cast<Dtype>(list.empty() ? 0 : list[k]);
    };
    std::vector<OptimTensor> all(theta.size());
    for (std::size_t k = 0; k < all.size(); ++k)
      all[k] = {at(theta, k),
                at(grad, k),
                at(first, k),
                at(second, k),
                at(largest, k),
                at(anchor, k),
                at(importance, k),
                at(integral, k),
                static_cast<float*>(at(step, k)),
                numel[k],
                dtype_of(dtype, k),
                dtype_of(anchor_dtype, k),
                dtype_of(importance_dtype, k)};
    return all;
  }
};

// shared: lr, weight decay, factor of the gradient, strength of the penalty.
AdamWOptions adamw_options(const std::array<double, 4>& shared, double beta1, double beta2, double eps) {
  return {{shared[0], shared[1], shared[2], shared[3]}, beta1, beta2, eps};
}

SgdOptions sgd_options(const std::array<double, 4>& shared, double momentum, double dampening, bool nesterov,
                       bool first_step) {
  return {{shared[0], shared[1], shared[2], shared[3]}, momentum, dampening, nesterov, first_step};
}

#if defined(LIMPET_CUDA)
cuda::DeviceScalars device_scalars(const std::array<Address, 3>& scalars) {
  return {pointer<const double>(scalars[0]), pointer<const float>(scalars[1]), pointer<const float>(scalars[2])};
}
#endif

}  // namespace

void bind_optim(py::module_& m) {
  py::class_<OptimLists>(m, "OptimLists")
      .def(py::init<Addresses, Addresses, Addresses, Addresses, Addresses, Addresses, Addresses, Addresses, Addresses,
                    Sizes, Codes, Codes, Codes>());
  m.def("adamw_step", [](const OptimLists& lists, const std::array<double, 4>& shared, double beta1, double beta2,
                         double eps, int threads) {
    const auto tensors = lists.tensors();
    const auto options = adamw_options(shared, beta1, beta2, eps);
    const py::gil_scoped_release release;
    cpu::kernels().adamw_step(tensors.data(), static_cast<std::int64_t>(tensors.size()), options, threads);
  });
  m.def("sgd_step", [](const OptimLists& lists, const std::array<double, 4>& shared, double momentum, double dampening,
                       bool nesterov, bool first_step, int threads) {
    const auto tensors = lists.tensors();
    const auto options = sgd_options(shared, momentum, dampening, nesterov, first_step);
    const py::gil_scoped_release release;
    cpu::kernels().sgd_step(tensors.data(), static_cast<std::int64_t>(tensors.size()), options, threads);
  });
#if defined(LIMPET_CUDA)
  // scalars: learning rate, scale of the gradients, and what was found infinite, each an address or 0.
  m.def("cuda_adamw_step", [](const OptimLists& lists, const std::array<double, 4>& shared, double beta1, double beta2,
                              double eps, const std::array<Address, 3>& scalars, int device, Address stream) {
    const auto tensors = lists.tensors();
    const auto options = adamw_options(shared, beta1, beta2, eps);
    const auto on_device = device_scalars(scalars);
    const py::gil_scoped_release release;
    cuda::adamw_step(tensors.data(), static_cast<int>(tensors.size()), options, on_device, device,
                     pointer<void>(stream));
  });
  m.def("cuda_sgd_step", [](const OptimLists& lists, const std::array<double, 4>& shared, double momentum,
                            double dampening, bool nesterov, bool first_step, const std::array<Address, 3>& scalars,
                            int device, Address stream) {
    const auto tensors = lists.tensors();
    const auto options = sgd_options(shared, momentum, dampening, nesterov, first_step);
    const auto on_device = device_scalars(scalars);
    const py::gil_scoped_release release;
    cuda::sgd_step(tensors.data(), static_cast<int>(tensors.size()), options, on_device, device, pointer<void>(stream));
  });
#endif
}

}  // namespace limpet
