// The Python module limpet._core: the only file that knows Python. Pointers, sizes and strides come in as integers
// (limpet._launch makes them from tensors); the GIL is released while a kernel runs.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <array>
#include <cstdlib>
#include <vector>

#include "bind_plain_sums.h"
#include "bind_rows.h"
#include "check.h"
#include "cpu/isa.h"
#include "cpu/keyed_index.h"
#if defined(LIMPET_CUDA)
#include "cuda/optim.h"
#include "cuda/path_integral.h"
#include "cuda/quadratic.h"
#include "cuda/reservoir.h"
#endif

namespace py = pybind11;
using namespace limpet;

namespace {

using Address = std::uintptr_t;
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

// The tensors of a model as lists, one entry per parameter: addresses, element counts, codes of dtypes and storages.
struct QuadraticLists {
  std::vector<Address> theta, grad, anchor, importance;  // grad is empty where only the value is wanted
  Sizes numel;
  std::vector<int> theta_dtype, anchor_storage, importance_storage;

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

double quadratic(const QuadraticLists& lists, int mode, double factor, int threads) {
  const auto tensors = lists.tensors();
  const py::gil_scoped_release release;
  return cpu::kernels().quadratic(tensors.data(), static_cast<std::int64_t>(tensors.size()),
                                  static_cast<QuadraticGrad>(mode), factor, threads);
}

// As QuadraticLists; a list is empty where the step does without, and sgd_step has its momentum in `first`.
struct OptimLists {
  std::vector<Address> theta, grad, first, second, largest, anchor, importance, integral, step;
  Sizes numel;
  std::vector<int> dtype, anchor_dtype, importance_dtype;

  std::vector<OptimTensor> tensors() const {
    const auto at = [](const std::vector<Address>& list, std::size_t k) {
      return pointer<void>(list.empty() ? 0 : list[k]);
    };
    const auto dtype_of = [](const std::vector<int>& list, std::size_t k) {
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

void bind_cuda(py::module_& m) {
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
}
#endif

cpu::LinearArgs linear_args(Address total, Address output_grad, Address input, const Fixed<4>& sizes,
                            const Fixed<3>& output_grad_strides, const Fixed<3>& input_strides, int dtype,
                            Address workspace, int threads) {
  cpu::LinearArgs args{};
  args.total = pointer<void>(total);
  args.output_grad = pointer<const void>(output_grad);
  args.input = pointer<const void>(input);
  args.samples = sizes[0];
  args.places = sizes[1];
  args.rows = sizes[2];
  args.columns = sizes[3];
  copy(output_grad_strides, args.output_grad_strides);
  copy(input_strides, args.input_strides);
  args.dtype = static_cast<Dtype>(dtype);
  args.workspace = pointer<void>(workspace);
  args.threads = threads;
  return args;
}

cpu::ConvArgs conv_args(Address total, Address output_grad, Address input, const Fixed<4>& channels,
                        const Fixed<3>& output_size, const Fixed<3>& input_size, const Fixed<3>& kernel,
                        const Fixed<3>& stride, const Fixed<3>& padding, const Fixed<3>& dilation,
                        const Fixed<5>& output_grad_strides, const Fixed<5>& input_strides, int dtype,
                        Address workspace, int threads) {
  cpu::ConvArgs args{};
  args.total = pointer<void>(total);
  args.output_grad = pointer<const void>(output_grad);
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
  args.dtype = static_cast<Dtype>(dtype);
  args.workspace = pointer<void>(workspace);
  args.threads = threads;
  return args;
}

// The tensors of a model as lists, one entry per parameter; no anchors and importances where gradients hold no penalty.
struct PathIntegralLists {
  std::vector<Address> integral, previous, theta, grad, anchor, importance;
  Sizes numel;
  std::vector<int> theta_dtype, anchor_dtype, importance_dtype;

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

void bind_path_integral(py::module_& m) {
  using Addresses = std::vector<Address>;
  py::class_<PathIntegralLists>(m, "PathIntegralLists")
      .def(py::init<Addresses, Addresses, Addresses, Addresses, Addresses, Addresses, Sizes, std::vector<int>,
                    std::vector<int>, std::vector<int>>());
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

// The fields of items: addresses of rows in the buffer and in the batch, bytes of a row.
std::vector<RowField> row_fields(const std::vector<Address>& stored, const std::vector<Address>& batch,
                                 const Sizes& row_bytes) {
  std::vector<RowField> fields(stored.size());
  for (std::size_t f = 0; f < fields.size(); ++f)
    fields[f] = {pointer<void>(stored[f]), pointer<void>(batch[f]), row_bytes[f]};
  return fields;
}

void bind_reservoir(py::module_& m) {
  using Addresses = std::vector<Address>;
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

// Only a wish: a system without huge pages keeps its own.
void prefer_huge_pages([[maybe_unused]] Address address, [[maybe_unused]] std::int64_t bytes) {
#if defined(__linux__)
  const Address page = static_cast<Address>(sysconf(_SC_PAGESIZE)), begin = address / page * page;
  madvise(pointer<void>(begin), static_cast<std::size_t>(address - begin) + static_cast<std::size_t>(bytes),
          MADV_HUGEPAGE);
#endif
}

// glibc raises its limits by itself when a mapped block of at most 32 MB is freed (mallopt(3), M_MMAP_THRESHOLD). The
// block is never written to; volatile, or the compiler would leave both calls out.
void keep_freed_memory() {
  void* volatile block = std::malloc((32 << 20) - (64 << 10));
  std::free(block);
}

py::dict build_info() {
  py::dict info;
  info["version"] = LIMPET_VERSION;
  info["compiler"] = __VERSION__;
  info["instruction_sets"] = cpu::instruction_sets();
  info["instruction_set"] = cpu::instruction_set();
#if defined(LIMPET_CUDA)
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
#if defined(LIMPET_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

void bind_keyed(py::module_& m) {
  using Addresses = std::vector<Address>;
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

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "limpet's compiled core: kernels on raw pointers. Use limpet.ops.";
  cpu::kernels();  // a wrong LIMPET_CPU is an error of the import

  m.def("build_info", build_info);
  m.def("prefer_huge_pages", prefer_huge_pages);
  m.def("keep_freed_memory", keep_freed_memory);
  py::class_<QuadraticLists>(m, "QuadraticLists")
      .def(py::init<std::vector<Address>, std::vector<Address>, std::vector<Address>, std::vector<Address>, Sizes,
                    std::vector<int>, std::vector<int>, std::vector<int>>());
  m.def("quadratic", quadratic);
#if defined(LIMPET_CUDA)
  bind_cuda(m);
#endif

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

  m.def("sum_grad_squared_channel",
        [](Address total, Address output_grad, Address input, Address shift, const Fixed<4>& sizes,
           const Fixed<4>& d_strides, const Fixed<4>& x_strides, int dtype, int threads) {
          cpu::ChannelArgs args{};
          args.total = pointer<void>(total);
          args.output_grad = pointer<const void>(output_grad);
          args.input = pointer<const void>(input);
          args.shift = pointer<const void>(shift);
          copy(sizes, args.sizes);
          copy(d_strides, args.output_grad_strides);
          copy(x_strides, args.input_strides);
          args.dtype = static_cast<Dtype>(dtype);
          args.threads = threads;
          const py::gil_scoped_release release;
          cpu::kernels().sum_grad_squared_channel(args);
        });

  m.def("sum_grad_squared_embedding", [](Address total, Address output_grad, Address indices, const Fixed<4>& sizes,
                                         std::int64_t padding_idx, const Fixed<3>& d_strides, int dtype, int threads) {
    cpu::EmbeddingArgs args{};
    args.total = pointer<void>(total);
    args.output_grad = pointer<const void>(output_grad);
    args.indices = pointer<const std::int64_t>(indices);
    args.samples = sizes[0];
    args.places = sizes[1];
    args.num_embeddings = sizes[2];
    args.width = sizes[3];
    args.padding_idx = padding_idx;
    copy(d_strides, args.output_grad_strides);
    args.dtype = static_cast<Dtype>(dtype);
    args.threads = threads;
    const py::gil_scoped_release release;
    cpu::kernels().sum_grad_squared_embedding(args);
  });

  py::class_<OptimLists>(m, "OptimLists")
      .def(py::init<std::vector<Address>, std::vector<Address>, std::vector<Address>, std::vector<Address>,
                    std::vector<Address>, std::vector<Address>, std::vector<Address>, std::vector<Address>,
                    std::vector<Address>, Sizes, std::vector<int>, std::vector<int>, std::vector<int>>());
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

  bind_path_integral(m);
  bind_reservoir(m);
  bind_plain_sums(m);
  bind_rows(m);
  bind_keyed(m);
  bind_gated_lateral(m);
}
