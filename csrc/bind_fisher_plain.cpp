// The Fisher family's sums for plain tensors on the CPU, read by DLPack's C functions: one call from Python per layer.
// Between two large products, which leave nothing of Python in the core's cache, the dispatcher and a check per
// argument took 50 to 70 microseconds for every layer.

#include "bind.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "cpu/isa.h"
#include "dlpack.h"

namespace limpet {
namespace {

constexpr std::int64_t kLine = 64;  // bytes

struct Free {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{kLine}); }
};
using Workspace = std::unique_ptr<void, Free>;

Workspace workspace(std::int64_t bytes) {
  return Workspace(::operator new(static_cast<std::size_t>(std::max(bytes, kLine)), std::align_val_t{kLine}));
}

bool is_float(const dlpack::DataType& dtype, std::uint8_t bits) {
  return dtype == dlpack::DataType{dlpack::kFloat, bits, 1};
}

// The code of a dtype that the kernels take; false for any other.
bool code_of(const dlpack::DataType& dtype, Dtype* code) {
  if (is_float(dtype, 32))
    *code = Dtype::f32;
  else if (is_float(dtype, 64))
    *code = Dtype::f64;
  else if (is_float(dtype, 16))
    *code = Dtype::f16;
  else if (dtype == dlpack::DataType{dlpack::kBfloat, 16, 1})
    *code = Dtype::bf16;
  else
    return false;
  return true;
}

// Dimensions [first, end) as one: its size and stride; false where they have no common stride.
bool merged(const dlpack::Tensor& tensor, int first, int end, std::int64_t* size, std::int64_t* stride) {
  *size = 1;
  *stride = 0;
  for (int k = end - 1; k >= first; --k) {
    if (tensor.shape[k] == 1) continue;
    if (*size == 1)
      *stride = tensor.strides[k];
    else if (tensor.strides[k] != *stride * *size)
      return false;
    *size *= tensor.shape[k];
  }
  return true;
}

bool same_sizes(const dlpack::Tensor& a, const dlpack::Tensor& b, int count) {
  return std::equal(a.shape, a.shape + count, b.shape);
}

bool same_shape(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  return a.ndim == b.ndim && same_sizes(a, b, a.ndim);
}

// Each function adds a sum of squares to the totals that are not None, and says whether it could: it does nothing where
// an argument is not a plain tensor on the CPU, of a dtype, a shape and strides that the kernels take.
class PlainSums {
 public:
  PlainSums(const py::capsule& exchange, py::type tensor)
      : api_(exchange.get_pointer<const dlpack::ExchangeApi>()), tensor_(std::move(tensor)) {
    if (api_->version.major != dlpack::kMajorVersion || api_->view == nullptr)
      throw py::value_error("exchange must be of DLPack 1, with views");
  }

  // total [O, I], bias_total [O] or None, output_grad [N, *, O], input [N, *, I]
  bool linear(py::handle total, py::handle bias_total, py::handle output_grad, py::handle input, int threads) const {
    dlpack::Tensor d, x;
    cpu::LinearArgs args{};
    if (!operand(output_grad, &d) || !operand(input, &x) || d.ndim < 2 || d.ndim != x.ndim ||
        !same_sizes(d, x, d.ndim - 1) || !(d.dtype == x.dtype) || !code_of(d.dtype, &args.dtype))
      return false;
    if (!by_places(d, &args.samples, &args.places, &args.rows, args.output_grad_strides) ||
        !by_places(x, &args.samples, &args.places, &args.columns, args.input_strides) ||
        args.columns == 0)  // without a tile the kernel does not see a bias
      return false;
    const std::int64_t sizes[] = {args.rows, args.columns};
    if (!sum(total, args.dtype, sizes, 2, &args.total) ||
        (!bias_total.is_none() && !sum(bias_total, args.dtype, sizes, 1, &args.bias_total)))
      return false;
    args.output_grad = address(d);
    args.input = address(x);
    args.threads = threads;
    const Workspace memory = workspace(cpu::kernels().linear_workspace(args));
    args.workspace = memory.get();
    const py::gil_scoped_release release;
    cpu::kernels().sum_grad_squared_linear(args);
    return true;
  }

  // total [C], output_grad [N, C, *] for channel_dim 1, else [N, *, C]
  bool bias(py::handle total, py::handle output_grad, int channel_dim, int threads) const {
    return channel(total, output_grad, nullptr, nullptr, channel_dim, threads);
  }

  // the same, input of output_grad's shape, shift [C] or None
  bool scale(py::handle total, py::handle output_grad, py::handle input, py::handle shift, int channel_dim,
             int threads) const {
    return channel(total, output_grad, &input, shift.is_none() ? nullptr : &shift, channel_dim, threads);
  }

  // total [C], bias_total [C] or None, output_grad and input [N, *, C], mean and rstd [N, *, 1]
  bool norm(py::handle total, py::handle bias_total, py::handle output_grad, py::handle input, py::handle mean,
            py::handle rstd, int threads) const {
    dlpack::Tensor d, x, m, r;
    cpu::NormArgs args{};
    if (!operand(output_grad, &d) || !operand(input, &x) || !operand(mean, &m) || !operand(rstd, &r) || d.ndim < 2 ||
        !same_shape(d, x) || !same_shape(m, r) || m.ndim != d.ndim || !same_sizes(d, m, d.ndim - 1) ||
        m.shape[d.ndim - 1] != 1 || !(d.dtype == x.dtype) || !code_of(d.dtype, &args.dtype) ||
        !is_float(m.dtype, args.dtype == Dtype::f64 ? 64 : 32) || !(m.dtype == r.dtype))
      return false;
    std::int64_t ds[3], xs[3], ms[3], rs[3], one;
    if (!by_places(d, &args.samples, &args.places, &args.channels, ds) ||
        !by_places(x, &args.samples, &args.places, &args.channels, xs) ||
        !by_places(m, &args.samples, &args.places, &one, ms) || !by_places(r, &args.samples, &args.places, &one, rs))
      return false;
    if ((args.channels > 1 && (ds[2] != 1 || xs[2] != 1)) || !std::equal(ms, ms + 2, rs)) return false;
    std::copy(ds, ds + 2, args.output_grad_strides);
    std::copy(xs, xs + 2, args.input_strides);
    std::copy(ms, ms + 2, args.mean_strides);
    if (!sum(total, args.dtype, &args.channels, 1, &args.total) ||
        (!bias_total.is_none() && !sum(bias_total, args.dtype, &args.channels, 1, &args.bias_total)))
      return false;
    args.output_grad = address(d);
    args.input = address(x);
    args.mean = address(m);
    args.rstd = address(r);
    args.threads = threads;
    const py::gil_scoped_release release;
    cpu::kernels().sum_grad_squared_norm(args);
    return true;
  }

  // Whether all elements are finite; false is no answer.
  bool finite(py::handle object) const {
    dlpack::Tensor tensor;
    std::int64_t size, stride;
    if (!operand(object, &tensor) || !merged(tensor, 0, tensor.ndim, &size, &stride) || (size > 1 && stride != 1))
      return false;
    if (is_float(tensor.dtype, 32)) return all_finite<std::uint32_t, 23>(address(tensor), size);
    if (is_float(tensor.dtype, 64)) return all_finite<std::uint64_t, 52>(address(tensor), size);
    return false;
  }

  // Whether two tensors hold the same bytes; false is no answer.
  bool same(py::handle object, py::handle other) const {
    dlpack::Tensor a, b;
    std::int64_t size, stride;
    if (!operand(object, &a) || !operand(other, &b) || !same_shape(a, b) || !(a.dtype == b.dtype)) return false;
    for (const dlpack::Tensor& tensor : {a, b})
      if (!merged(tensor, 0, tensor.ndim, &size, &stride) || (size > 1 && stride != 1)) return false;
    return std::memcmp(address(a), address(b), static_cast<std::size_t>(size) * a.dtype.bits / 8) == 0;
  }

 private:
  // An exponent of ones, of infinity and NaN, carries into the sign when one is added to it: vectors can do that.
  template <class Bits, int mantissa>
  static bool all_finite(const void* values, std::int64_t size) {
    constexpr Bits one = Bits{1} << mantissa, sign = Bits{1} << (8 * sizeof(Bits) - 1), exponent = sign - one;
    Bits carried = 0;
    for (std::int64_t i = 0; i < size; ++i) {
      Bits bits;
      std::memcpy(&bits, static_cast<const char*>(values) + i * sizeof(Bits), sizeof bits);
      carried |= (bits & exponent) + one;
    }
    return (carried & sign) == 0;
  }

  bool channel(py::handle total, py::handle output_grad, const py::handle* input, const py::handle* shift,
               int channel_dim, int threads) const {
    dlpack::Tensor d;
    cpu::ChannelArgs args{};
    if (!operand(output_grad, &d) || d.ndim < 2 || !code_of(d.dtype, &args.dtype)) return false;
    const int channels = channel_dim == 1 ? 1 : d.ndim - 1;
    if (!canonical(d, channels, args.sizes, args.output_grad_strides)) return false;
    if (input) {
      dlpack::Tensor x;
      std::int64_t sizes[4];
      if (!operand(*input, &x) || !same_shape(d, x) || !(d.dtype == x.dtype) ||
          !canonical(x, channels, sizes, args.input_strides))
        return false;
      args.input = address(x);
    }
    void* shifts = nullptr;
    if (!sum(total, args.dtype, args.sizes + 2, 1, &args.total) ||
        (shift && !sum(*shift, args.dtype, args.sizes + 2, 1, &shifts)))
      return false;
    args.output_grad = address(d);
    args.shift = shifts;
    args.threads = threads;
    const py::gil_scoped_release release;
    cpu::kernels().sum_grad_squared_channel(args);
    return true;
  }

  // A plain tensor on the CPU, of which the caller keeps hold.
  bool operand(py::handle object, dlpack::Tensor* tensor) const {
    if (Py_TYPE(object.ptr()) != reinterpret_cast<PyTypeObject*>(tensor_.ptr())) return false;
    if (api_->view(object.ptr(), tensor) != 0) {  // a tensor without memory of its own
      PyErr_Clear();
      return false;
    }
    return tensor->device.type == dlpack::kCpu && !is_negative(object);
  }

  // A tensor of the sums' dtype and of this shape, without gaps: where it lies.
  bool sum(py::handle object, Dtype dtype, const std::int64_t* sizes, int dims, void** out) const {
    dlpack::Tensor tensor;
    if (!operand(object, &tensor) || tensor.ndim != dims || !std::equal(sizes, sizes + dims, tensor.shape) ||
        !is_float(tensor.dtype, dtype == Dtype::f64 ? 64 : 32))
      return false;
    std::int64_t size, stride;
    if (!merged(tensor, 0, dims, &size, &stride) || (size > 1 && stride != 1)) return false;
    *out = address(tensor);
    return true;
  }

  // [N, *, C] as [N, T, C].
  static bool by_places(const dlpack::Tensor& tensor, std::int64_t* samples, std::int64_t* places,
                        std::int64_t* channels, std::int64_t* strides) {
    const int last = tensor.ndim - 1;
    *samples = tensor.shape[0];
    *channels = tensor.shape[last];
    strides[0] = tensor.strides[0];
    strides[2] = tensor.strides[last];
    return merged(tensor, 1, last, places, &strides[1]);
  }

  // As [N, A, C, B].
  static bool canonical(const dlpack::Tensor& tensor, int channels, std::int64_t* sizes, std::int64_t* strides) {
    sizes[0] = tensor.shape[0];
    strides[0] = tensor.strides[0];
    sizes[2] = tensor.shape[channels];
    strides[2] = tensor.strides[channels];
    return merged(tensor, 1, channels, &sizes[1], &strides[1]) &&
           merged(tensor, channels + 1, tensor.ndim, &sizes[3], &strides[3]);
  }

  // A view whose values are those in memory with the other sign, as of a conjugate's imaginary part.
  static bool is_negative(py::handle tensor) {
    static PyObject* const name = PyUnicode_InternFromString("is_neg");
    const auto answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), name));
    if (!answer) throw py::error_already_set();
    return answer.ptr() != Py_False;
  }

  const dlpack::ExchangeApi* api_;
  py::type tensor_;
};

}  // namespace

void bind_fisher_plain(py::module_& m) {
  py::class_<PlainSums>(m, "PlainSums")
      .def(py::init<const py::capsule&, py::type>())
      .def("finite", &PlainSums::finite)
      .def("same", &PlainSums::same)
      .def("linear", &PlainSums::linear)
      .def("norm", &PlainSums::norm)
      .def("bias", &PlainSums::bias)
      .def("scale", &PlainSums::scale);
}

}  // namespace limpet
