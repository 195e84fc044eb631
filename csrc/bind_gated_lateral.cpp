#include "bind.h"
#include "cpu/isa.h"

namespace limpet {
namespace {

// Sizes: samples, channels, places.
cpu::GatedLateralArgs gated_lateral_args(Address x, Address h, Address product, Address bias, const Fixed<3>& sizes,
                                         int dtype, int threads) {
  cpu::GatedLateralArgs args{};
  args.x = pointer<const void>(x);
  args.h = pointer<const void>(h);
  args.product = pointer<const void>(product);
  args.bias = pointer<const void>(bias);
  args.samples = sizes[0];
  args.channels = sizes[1];
  args.places = sizes[2];
  args.dtype = static_cast<Dtype>(dtype);
  args.threads = threads;
  return args;
}

}  // namespace

void bind_gated_lateral(py::module_& m) {
  m.def("gated_lateral", [](Address y, Address x, Address h, Address product, Address bias, const Fixed<3>& sizes,
                            int dtype, int threads) {
    auto args = gated_lateral_args(x, h, product, bias, sizes, dtype, threads);
    args.y = pointer<void>(y);
    const py::gil_scoped_release release;
    cpu::kernels().gated_lateral(args);
  });
  m.def("gated_lateral_workspace", [](const Fixed<3>& sizes) {
    return cpu::kernels().gated_lateral_workspace(gated_lateral_args(0, 0, 0, 0, sizes, 0, 0));
  });
  m.def("gated_lateral_backward",
        [](Address grad, Address x, Address h, Address product, Address bias, const Fixed<3>& sizes, int dtype,
           Address x_grad, Address h_grad, Address logit_grad, Address bias_grad, Address workspace, int threads) {
          auto args = gated_lateral_args(x, h, product, bias, sizes, dtype, threads);
          args.grad = pointer<const void>(grad);
          args.x_grad = pointer<void>(x_grad);
          args.h_grad = pointer<void>(h_grad);
          args.logit_grad = pointer<void>(logit_grad);
          args.bias_grad = pointer<void>(bias_grad);
          args.workspace = pointer<void>(workspace);
          const py::gil_scoped_release release;
          cpu::kernels().gated_lateral_backward(args);
        });
}

}  // namespace limpet
