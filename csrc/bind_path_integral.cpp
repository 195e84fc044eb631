#include "bind.h"
#include "cpu/isa.h"
#if defined(LIMPET_CUDA)
#include "cuda/path_integral.h"
#endif

namespace limpet {
namespace {

// The tensors of a model as lists, one entry per parameter; no anchors and importances where gradients hold no penalty.
struct PathIntegralLists {
  Addresses integral, previous, theta, grad, anchor, importance;
  Sizes numel;
  Codes theta_dtype, anchor_dtype, importance_dtype;

  std::vector<PathIntegralTensor> tensors() const {
    std::vector<PathIntegralTensor> all(theta.size());
    const bool penalty = !anchor.empty();
    for (std::size_t k = 0; k < all.size(); ++k)
      all[k] = {pointer<void>(integral[k]),
                pointer<void>(previous[k]),
                pointer<const void>(theta[k]),
                pointer<const void>(grad[k]),
                penalty ? pointer<const void>(anchor[k]) : nullptr,
                penalty ? pointer<const void>(importance[k]) : nullptr,
                numel[k],
                static_cast<Dtype>(theta_dtype[k]),
                static_cast<Dtype>(penalty ? anchor_dtype[k] : theta_dtype[k]),
                static_cast<Dtype>(penalty ? importance_dtype[k] : theta_dtype[k])};
    return all;
  }
};

}  // namespace

void bind_path_integral(py::module_& m) {
  py::class_<PathIntegralLists>(m, "PathIntegralLists")
      .def(py::init<Addresses, Addresses, Addresses, Addresses, Addresses, Addresses, Sizes, Codes, Codes, Codes>());
  m.def("path_integral", [](const PathIntegralLists& lists, double strength, int threads) {
    const auto tensors = lists.tensors();
    const py::gil_scoped_release release;
    cpu::kernels().path_integral(tensors.data(), static_cast<std::int64_t>(tensors.size()), strength, threads);
  });
#if defined(LIMPET_CUDA)
  m.def("cuda_path_integral", [](const PathIntegralLists& lists, double strength, int device, Address stream) {
    const auto tensors = lists.tensors();
    const py::gil_scoped_release release;
    cuda::path_integral(tensors.data(), static_cast<int>(tensors.size()), strength, device, pointer<void>(stream));
  });
#endif
}

}  // namespace limpet
