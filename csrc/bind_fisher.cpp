#include "bind.h"
#include "cpu/isa.h"

namespace limpet {
namespace {

// What the sums of all kinds of layers take; the rest is zero.
template <class Args>
Args common_args(Address total, Address output_grad, int dtype, int threads) {
  Args args{};
  args.total = pointer<void>(total);
  args.output_grad = pointer<const void>(output_grad);
  args.dtype = static_cast<Dtype>(dtype);
  args.threads = threads;
  return args;
}

cpu::LinearArgs linear_args(Address total, Address output_grad, Address input, const Fixed<4>& sizes,
                            const Fixed<3>& output_grad_strides, const Fixed<3>& input_strides, int dtype,
                            Address workspace, int threads) {
  auto args = common_args<cpu::LinearArgs>(total, output_grad, dtype, threads);
  args.input = pointer<const void>(input);
  args.samples = sizes[0];
  args.places = sizes[1];
  args.rows = sizes[2];
  args.columns = sizes[3];
  copy(output_grad_strides, args.output_grad_strides);
  copy(input_strides, args.input_strides);
  args.workspace = pointer<void>(workspace);
  return args;
}

cpu::ConvArgs conv_args(Address total, Address output_grad, Address input, const Fixed<4>& channels,
                        const Fixed<3>& output_size, const Fixed<3>& input_size, const Fixed<3>& kernel,
                        const Fixed<3>& stride, const Fixed<3>& padding, const Fixed<3>& dilation,
                        const Fixed<5>& output_grad_strides, const Fixed<5>& input_strides, int dtype,
                        Address workspace, int threads) {
  auto args = common_args<cpu::ConvArgs>(total, output_grad, dtype, threads);
  args.input = pointer<const void>(input);
  args.samples = channels[0];
  args.out_channels = channels[1];
  args.in_channels = channels[2];
  args.groups = channels[3];
  copy(output_size, args.output_size);
  copy(input_size, args.input_size);
  copy(kernel, args.kernel);
  copy(stride, args.stride);
  copy(padding, args.padding);
  copy(dilation, args.dilation);
  copy(output_grad_strides, args.output_grad_strides);
  copy(input_strides, args.input_strides);
  args.workspace = pointer<void>(workspace);
  return args;
}

// Sizes: samples, output channels, input channels.
cpu::ConvInputGradArgs conv_input_grad_args(const Fixed<3>& sizes, const Fixed<2>& output_size,
                                            const Fixed<2>& input_size, const Fixed<2>& padding, std::int64_t stride,
                                            int dtype, int threads) {
  cpu::ConvInputGradArgs args{};
  args.samples = sizes[0];
  args.out_channels = sizes[1];
  args.in_channels = sizes[2];
  copy(output_size, args.output_size);
  copy(input_size, args.input_size);
  copy(padding, args.padding);
  args.stride = stride;
  args.dtype = static_cast<Dtype>(dtype);
  args.threads = threads;
  return args;
}

}  // namespace

void bind_fisher(py::module_& m) {
  m.def("linear_workspace", [](const Fixed<4>& sizes, int dtype, int threads) {
    return cpu::kernels().linear_workspace(linear_args(0, 0, 0, sizes, {}, {}, dtype, 0, threads));
  });
  m.def("sum_grad_squared_linear", [](Address total, Address output_grad, Address input, const Fixed<4>& sizes,
                                      const Fixed<3>& d_strides, const Fixed<3>& x_strides, int dtype,
                                      Address workspace, int threads) {
    const auto args = linear_args(total, output_grad, input, sizes, d_strides, x_strides, dtype, workspace, threads);
    const py::gil_scoped_release release;
    cpu::kernels().sum_grad_squared_linear(args);
  });

  m.def("conv_workspace",
        [](const Fixed<4>& channels, const Fixed<3>& output_size, const Fixed<3>& input_size, const Fixed<3>& kernel,
           const Fixed<3>& stride, const Fixed<3>& padding, const Fixed<3>& dilation, int dtype, int threads) {
          return cpu::kernels().conv_workspace(conv_args(0, 0, 0, channels, output_size, input_size, kernel, stride,
                                                         padding, dilation, {}, {}, dtype, 0, threads));
        });
  m.def("sum_grad_squared_conv",
        [](Address total, Address output_grad, Address input, const Fixed<4>& channels, const Fixed<3>& output_size,
           const Fixed<3>& input_size, const Fixed<3>& kernel, const Fixed<3>& stride, const Fixed<3>& padding,
           const Fixed<3>& dilation, const Fixed<5>& d_strides, const Fixed<5>& x_strides, int dtype, Address workspace,
           int threads) {
          const auto args = conv_args(total, output_grad, input, channels, output_size, input_size, kernel, stride,
                                      padding, dilation, d_strides, x_strides, dtype, workspace, threads);
          const py::gil_scoped_release release;
          cpu::kernels().sum_grad_squared_conv(args);
        });

  m.def("conv_input_grad_workspace", [](const Fixed<3>& sizes, const Fixed<2>& output_size, const Fixed<2>& input_size,
                                        const Fixed<2>& padding, std::int64_t stride, int dtype, int threads) {
    return cpu::kernels().conv_input_grad_workspace(
        conv_input_grad_args(sizes, output_size, input_size, padding, stride, dtype, threads));
  });
  m.def("conv_input_grad", [](Address input_grad, Address output_grad, Address weight, Address workspace,
                              const Fixed<3>& sizes, const Fixed<2>& output_size, const Fixed<2>& input_size,
                              const Fixed<2>& padding, std::int64_t stride, int dtype, int threads) {
    auto args = conv_input_grad_args(sizes, output_size, input_size, padding, stride, dtype, threads);
    args.input_grad = pointer<void>(input_grad);
    args.output_grad = pointer<const void>(output_grad);
    args.weight = pointer<const void>(weight);
    args.workspace = pointer<void>(workspace);
    const py::gil_scoped_release release;
    cpu::kernels().conv_input_grad(args);
  });

  m.def("batch_norm_grads",
        [](Address input_grad, Address weight_grads, Address bias_grads, Address output_grad, Address input,
           Address mean, Address factor, const Fixed<3>& sizes, int dtype, int threads) {
          cpu::BatchNormGradsArgs args{};
          args.input_grad = pointer<void>(input_grad);
          args.weight_grads = pointer<void>(weight_grads);
          args.bias_grads = pointer<void>(bias_grads);
          args.output_grad = pointer<const void>(output_grad);
          args.input = pointer<const void>(input);
          args.mean = pointer<const void>(mean);
          args.factor = pointer<const void>(factor);
          args.samples = sizes[0];
          args.channels = sizes[1];
          args.places = sizes[2];
          args.dtype = static_cast<Dtype>(dtype);
          args.threads = threads;
          const py::gil_scoped_release release;
          cpu::kernels().batch_norm_grads(args);
        });

  m.def("sum_grad_squared_channel",
        [](Address total, Address output_grad, Address input, Address shift, const Fixed<4>& sizes,
           const Fixed<4>& d_strides, const Fixed<4>& x_strides, int dtype, int threads) {
          auto args = common_args<cpu::ChannelArgs>(total, output_grad, dtype, threads);
          args.input = pointer<const void>(input);
          args.shift = pointer<const void>(shift);
          copy(sizes, args.sizes);
          copy(d_strides, args.output_grad_strides);
          copy(x_strides, args.input_strides);
          const py::gil_scoped_release release;
          cpu::kernels().sum_grad_squared_channel(args);
        });

  m.def("sum_grad_squared_embedding", [](Address total, Address output_grad, Address indices, const Fixed<4>& sizes,
                                         std::int64_t padding_idx, const Fixed<3>& d_strides, int dtype, int threads) {
    auto args = common_args<cpu::EmbeddingArgs>(total, output_grad, dtype, threads);
    args.indices = pointer<const std::int64_t>(indices);
    args.samples = sizes[0];
    args.places = sizes[1];
    args.num_embeddings = sizes[2];
    args.width = sizes[3];
    args.padding_idx = padding_idx;
    copy(d_strides, args.output_grad_strides);
    const py::gil_scoped_release release;
    cpu::kernels().sum_grad_squared_embedding(args);
  });
}

}  // namespace limpet
