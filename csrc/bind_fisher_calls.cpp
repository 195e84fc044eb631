// A forward pass as limpet.fisher.recorder sees it, as far as that needs no Python: functions that nothing is recorded
// of, and calls that an earlier batch had, too. Between large products Python runs cold: with all of it in Python, each
// layer of a network whose pass takes six milliseconds cost 80 microseconds.

#include "bind.h"

#include <unordered_set>

namespace limpet {
namespace {

// What there is to do about a function; limpet.fisher.recorder says which it is.
enum class Kind { other = 0, question = 1, plain = 2, rule = 3 };

PyObject* checked(PyObject* object) {
  if (!object) throw py::error_already_set();
  return object;
}
py::object owned(PyObject* object) {
  return py::reinterpret_steal<py::object>(checked(object));
}
bool checked(int answer) {
  if (answer < 0) throw py::error_already_set();
  return answer != 0;
}

// A name that is looked up often.
PyObject* interned(const char* name) {
  return checked(PyUnicode_InternFromString(name));
}
py::object attribute(PyObject* object, PyObject* name) {
  return owned(PyObject_GetAttr(object, name));
}
bool requires_grad(PyObject* tensor) {
  static PyObject* const name = interned("requires_grad");
  return attribute(tensor, name).ptr() == Py_True;
}
py::object version(PyObject* tensor) {
  static PyObject* const name = interned("_version");
  return attribute(tensor, name);
}
py::object detached(PyObject* tensor) {
  static PyObject* const name = interned("detach");
  return tensor == Py_None ? py::none() : owned(PyObject_CallMethodNoArgs(tensor, name));
}

// What a function was given in an earlier batch, and the call that it became. Given the same again, it is the same
// call: no rule has to read it. Nothing of the batch is kept.
struct EarlierCall {
  py::object func;
  py::tuple args;  // behind the input
  py::dict kwargs;
  py::object shape, dtype;  // of the input
  bool requires_grad;
  py::tuple record;                  // key, call, lead
  py::object key, call;              // of the record
  py::object same, before;           // what calls are counted by, and how many came before
  py::object after;                  // before + 1
  py::object w, b;                   // the call's, which autocast replaces
  py::object running, weight, bias;  // of a linear layer: a mapping, asked each time, and in it the names of its sums

  EarlierCall(py::object func, py::tuple args, py::dict kwargs, const py::object& input, py::tuple record)
      : func(std::move(func)),
        args(std::move(args)),
        kwargs(std::move(kwargs)),
        shape(input.attr("shape")),
        dtype(input.attr("dtype")),
        requires_grad(limpet::requires_grad(input.ptr())),
        record(std::move(record)),
        key(this->record[0]),
        call(this->record[1]),
        same(owned(PyTuple_GetSlice(key.ptr(), 0, 3))),
        before(py::reinterpret_borrow<py::object>(checked(PyTuple_GetItem(key.ptr(), 4)))),
        after(before + py::int_(1)),
        w(call.attr("w")),
        b(call.attr("b")) {}

  // Let backward give the gradient at the output, once, and the layer's squares be added to these sums.
  void add_to(py::object sums, py::object weight_name, py::object bias_name) {
    running = std::move(sums);
    weight = std::move(weight_name);
    bias = std::move(bias_name);
  }

  // Whether a function is given the same objects, and an input of the same kind.
  bool again(PyObject* function, PyObject* given, PyObject* names, PyTypeObject* tensor) const {
    if (function != func.ptr()) return false;
    const Py_ssize_t count = PyTuple_GET_SIZE(args.ptr());
    if (PyTuple_GET_SIZE(given) != count + 1) return false;
    for (Py_ssize_t n = 0; n < count; ++n)
      if (PyTuple_GET_ITEM(given, n + 1) != PyTuple_GET_ITEM(args.ptr(), n)) return false;
    if ((names ? PyDict_GET_SIZE(names) : 0) != PyDict_GET_SIZE(kwargs.ptr())) return false;
    PyObject *name, *value;
    for (Py_ssize_t at = 0; PyDict_Next(kwargs.ptr(), &at, &name, &value);)
      if (PyDict_GetItem(names, name) != value) return false;
    PyObject* const input = PyTuple_GET_ITEM(given, 0);
    if (Py_TYPE(input) != tensor || limpet::requires_grad(input) != requires_grad) return false;
    static PyObject* const dtype_name = interned("dtype");
    static PyObject* const shape_name = interned("shape");
    return attribute(input, dtype_name).is(dtype) &&
           checked(PyObject_RichCompareBool(attribute(input, shape_name).ptr(), shape.ptr(), Py_EQ));
  }
};

// What all recorders have in common.
struct CallFilter {
  py::type tensor;
  py::object classify;   // a function's kind
  py::object apply;      // (input, anchor, (call, key, receiver)) -> output
  py::object autocasts;  // (device type) -> whether autocast is on
  py::object alias;      // (tensor, shape) -> the same memory as a tensor that is no view
  py::object edge;       // (node, output number) -> where autograd can give a gradient
  py::object add;        // (weight's sum, bias's sum or None, output gradient, input, threads) -> whether it could
  py::dict kinds{};      // of the functions seen so far

  Kind kind(PyObject* function) const {
    PyObject* const known = PyDict_GetItemWithError(kinds.ptr(), function);
    if (known) return static_cast<Kind>(PyLong_AsLong(known));
    if (PyErr_Occurred()) throw py::error_already_set();
    const py::object found = owned(PyObject_CallOneArg(classify.ptr(), function));
    checked(PyDict_SetItem(kinds.ptr(), function, found.ptr()));
    return static_cast<Kind>(PyLong_AsLong(found.ptr()));
  }
};

// A recorder's `__torch_function__` for one forward pass. Whatever it does not know itself goes to the recorder.
class CallTaker {
 public:
  CallTaker(const CallFilter& filter, py::handle recorder, py::object receiver, py::dict names, py::list computed,
            py::list calls, py::list given, py::dict seen, py::sequence earlier, py::object anchor, py::object threads)
      : filter_(filter),
        recorder_(recorder),
        receiver_(std::move(receiver)),
        names_(std::move(names)),
        computed_(std::move(computed)),
        calls_(std::move(calls)),
        given_(std::move(given)),
        seen_(std::move(seen)),
        earlier_(std::move(earlier)),
        anchor_(std::move(anchor)),
        threads_(std::move(threads)) {}

  py::object take(const py::object& func, const py::object& types, const py::tuple& args, const py::object& kwargs) {
    PyObject* const names = kwargs.is_none() || !PyDict_GET_SIZE(kwargs.ptr()) ? nullptr : kwargs.ptr();
    const Kind kind = filter_.kind(func.ptr());
    if (kind == Kind::question || (kind == Kind::plain && !has_operand(args.ptr()) && !has_operand(names)))
      return owned(PyObject_Call(func.ptr(), args.ptr(), names));
    if (kind == Kind::rule) {
      py::object y = again(func, args, names);
      if (y) return y;
    }
    return recorder_.attr("take")(func, types, args, kwargs);
  }

  // Where backward is to give the gradients that `add` takes.
  const py::list& outputs() const { return outputs_; }

  // Adds the squares of the layers of `outputs`, once; what the core cannot add goes the way of all others.
  void add(const py::sequence& output_grads) {
    for (std::size_t n = 0; n < inputs_.size(); ++n) {
      const py::object d = output_grads[n];
      const Input input = std::move(inputs_[n]);
      if (d.is_none()) continue;
      const auto& earlier = input.earlier.cast<const EarlierCall&>();
      if (!version(input.value.ptr()).equal(input.version))
        throw std::runtime_error(
            "one of the variables needed for gradient computation has been modified by an inplace operation: the "
            "input of the layer of " +
            earlier.weight.cast<std::string>());
      const py::object total = owned(PyObject_GetItem(earlier.running.ptr(), earlier.weight.ptr()));
      const py::object bias_total =
          earlier.bias.is_none() ? earlier.bias : owned(PyObject_GetItem(earlier.running.ptr(), earlier.bias.ptr()));
      PyObject* const args[] = {total.ptr(), bias_total.ptr(), d.ptr(), input.value.ptr(), threads_.ptr()};
      if (owned(PyObject_Vectorcall(filter_.add.ptr(), args, 5, nullptr)).ptr() != Py_True)
        receiver_.attr("on_backward")(earlier.key, earlier.call, d, py::make_tuple(input.value));
    }
    inputs_.clear();
    outputs_ = py::list();
  }

 private:
  // Whether a value may stand in a parameter's place; the recorder looks closer.
  bool is_operand(PyObject* value) const {
    if (!PyObject_TypeCheck(value, reinterpret_cast<PyTypeObject*>(filter_.tensor.ptr()))) return false;
    if (checked(PyDict_Contains(names_.ptr(), owned(PyLong_FromVoidPtr(value)).ptr()))) return true;
    if (!requires_grad(value)) return false;
    if (PyList_GET_SIZE(computed_.ptr()) > 0) return true;
    static PyObject* const name = interned("_base");
    const py::object base = attribute(value, name);
    return !base.is_none() && checked(PyDict_Contains(names_.ptr(), owned(PyLong_FromVoidPtr(base.ptr())).ptr()));
  }

  bool has_operand(PyObject* values) const {
    if (!values) return false;
    if (PyDict_Check(values)) {
      PyObject *name, *value;
      for (Py_ssize_t at = 0; PyDict_Next(values, &at, &name, &value);)
        if (may_hold_operand(value)) return true;
      return false;
    }
    const py::object sequence = owned(PySequence_Fast(values, "a sequence"));
    for (Py_ssize_t n = 0; n < PySequence_Fast_GET_SIZE(sequence.ptr()); ++n)
      if (may_hold_operand(PySequence_Fast_GET_ITEM(sequence.ptr(), n))) return true;
    return false;
  }

  bool may_hold_operand(PyObject* value) const {
    return PyTuple_Check(value) || PyList_Check(value) || PyDict_Check(value) ? has_operand(value) : is_operand(value);
  }

  // The value of the call that an earlier batch had at this place; null if this is another one.
  py::object again(const py::object& func, const py::tuple& args, PyObject* names) {
    const Py_ssize_t at = PyList_GET_SIZE(calls_.ptr());
    if (at >= PySequence_Size(earlier_.ptr())) return {};
    const py::object object = owned(PySequence_GetItem(earlier_.ptr(), at));
    if (object.is_none()) return {};
    const auto& earlier = object.cast<const EarlierCall&>();
    if (!earlier.again(func.ptr(), args.ptr(), names, reinterpret_cast<PyTypeObject*>(filter_.tensor.ptr())) ||
        is_operand(PyTuple_GET_ITEM(args.ptr(), 0)))
      return {};
    PyObject* const count = PyDict_GetItemWithError(seen_.ptr(), earlier.same.ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    if (!(count ? py::handle(count).equal(earlier.before) : earlier.before.equal(py::int_(0)))) return {};
    seen_[earlier.same] = earlier.after;
    calls_.append(earlier.record);
    given_.append(object);
    const py::object input = args[0];
    if (earlier.running && !autocasts(input.ptr())) return with_later_sums(object, earlier, input);
    earlier.call.attr("w") = earlier.w;
    earlier.call.attr("b") = earlier.b;
    return filter_.apply(input, anchor_, py::make_tuple(earlier.call, earlier.key, receiver_));
  }

  bool autocasts(PyObject* input) const {
    static PyObject* const device = interned("device");
    static PyObject* const type = interned("type");
    const py::object on = attribute(attribute(input, device).ptr(), type);
    return owned(PyObject_CallOneArg(filter_.autocasts.ptr(), on.ptr())).ptr() != Py_False;
  }

  // A linear layer's value by torch's own function, of which no gradient at weight and bias is asked.
  py::object with_later_sums(const py::object& object, const EarlierCall& earlier, const py::object& input) {
    static PyObject* const require = interned("requires_grad_");
    static PyObject* const grad_fn = interned("grad_fn");
    static PyObject* const is_view = interned("_is_view");
    py::object x = input;
    if (!earlier.requires_grad) {  // a leaf of its own: the layer's node is there all the same, and never runs
      x = detached(input.ptr());
      owned(PyObject_CallMethodNoArgs(x.ptr(), require));
    }
    const py::object w = detached(earlier.w.ptr()), b = detached(earlier.b.ptr());
    PyObject* const args[] = {x.ptr(), w.ptr(), b.ptr()};
    py::object y = owned(PyObject_Vectorcall(earlier.func.ptr(), args, 3, nullptr));
    const py::object node = attribute(y.ptr(), grad_fn);
    if (node.is_none()) return y;  // under no_grad: no gradient goes further
    outputs_.append(filter_.edge(node, 0));
    inputs_.push_back({object, input, version(input.ptr())});
    // The model may change the value in place, which would lead a view past the edge.
    if (owned(PyObject_CallMethodNoArgs(y.ptr(), is_view)).ptr() != Py_False) return filter_.alias(y, y.attr("shape"));
    return y;
  }

  const CallFilter& filter_;
  const py::handle recorder_;  // it owns this taker
  py::object receiver_;        // of the gradients at the outputs of calls: the graph keeps it, so it knows no recorder
  py::dict names_;
  py::list computed_, calls_, given_;
  py::dict seen_;
  py::sequence earlier_;
  py::object anchor_, threads_;

  struct Input {
    py::object earlier, value, version;
  };
  std::vector<Input> inputs_;  // of the layers of:
  py::list outputs_;
};

// The `id` of every tensor that an ordinary backward from a node would give a gradient.
std::vector<Address> leaves(const py::object& root) {
  static PyObject* const next_functions = interned("next_functions");
  static PyObject* const variable = interned("variable");
  std::vector<Address> found;
  std::vector<py::object> nodes;  // of which Python's objects are kept, so that each node has one
  std::unordered_set<PyObject*> seen;
  const auto visit = [&](const py::handle& node) {
    if (!node.is_none() && seen.insert(node.ptr()).second) nodes.push_back(py::reinterpret_borrow<py::object>(node));
  };
  visit(root);
  for (std::size_t n = 0; n < nodes.size(); ++n) {
    const py::tuple following = attribute(nodes[n].ptr(), next_functions);
    for (const py::handle& edge : following) visit(py::handle(PyTuple_GetItem(edge.ptr(), 0)));
    if (following.empty() && PyObject_HasAttr(nodes[n].ptr(), variable))
      found.push_back(reinterpret_cast<Address>(attribute(nodes[n].ptr(), variable).ptr()));
  }
  return found;
}

// Puts the address of an object, its `id`, into a list.
void append_id(py::list& list, PyObject* object) {
  list.append(owned(PyLong_FromVoidPtr(object)));
}

// What limpet.fisher.checks says of a model's modules and parameters, in the order of `model.modules()`.
py::list standing(const py::object& model, const py::tuple& may_be_refused) {
  static PyObject* const training = interned("training");
  static PyObject* const modules_name = interned("_modules");
  static PyObject* const parameters = interned("_parameters");
  static PyObject* const of_refused[] = {interned("p"), interned("max_norm")};
  static PyObject* const of_parameter[] = {interned("requires_grad"), interned("dtype"), interned("device"),
                                           interned("shape")};
  const auto values = [](PyObject* module, PyObject* name) {
    static PyObject* const method = interned("values");
    return py::list(owned(PyObject_CallMethodNoArgs(attribute(module, name).ptr(), method)));
  };
  py::list found;
  std::vector<py::object> modules{model};
  std::unordered_set<PyObject*> seen{model.ptr()};
  for (std::size_t n = 0; n < modules.size(); ++n) {
    PyObject* const module = modules[n].ptr();
    append_id(found, module);
    found.append(attribute(module, training));
    if (checked(PyObject_IsInstance(module, may_be_refused.ptr()))) {
      for (PyObject* const name : of_refused) found.append(py::getattr(module, name, py::none()));
      const py::object mean = modules[n].attr("_buffers").attr("get")("running_mean");
      append_id(found, mean.ptr());
    }
    for (const py::handle& p : values(module, parameters)) {
      if (p.is_none()) continue;
      append_id(found, p.ptr());
      for (PyObject* const asked : of_parameter) found.append(attribute(p.ptr(), asked));
    }
    for (const py::handle& inner : values(module, modules_name))
      if (!inner.is_none() && seen.insert(inner.ptr()).second)
        modules.push_back(py::reinterpret_borrow<py::object>(inner));
  }
  return found;
}

// A recorder's method.
py::object take_call(const py::object& recorder, const py::object& func, const py::object& types, const py::tuple& args,
                     const py::object& kwargs) {
  static PyObject* const name = interned("taker");
  return attribute(recorder.ptr(), name).cast<CallTaker&>().take(func, types, args, kwargs);
}

}  // namespace

void bind_fisher_calls(py::module_& m) {
  py::class_<EarlierCall>(m, "EarlierCall")
      .def(py::init<py::object, py::tuple, py::dict, const py::object&, py::tuple>())
      .def("add_to", &EarlierCall::add_to);
  py::class_<CallFilter>(m, "CallFilter")
      .def(py::init([](py::type tensor, py::object classify, py::object apply, py::object autocasts, py::object alias,
                       py::object edge, py::object add) {
        return CallFilter{std::move(tensor), std::move(classify), std::move(apply), std::move(autocasts),
                          std::move(alias),  std::move(edge),     std::move(add)};
      }));
  py::class_<CallTaker>(m, "CallTaker")
      .def(py::init<const CallFilter&, py::handle, py::object, py::dict, py::list, py::list, py::list, py::dict,
                    py::sequence, py::object, py::object>(),
           py::keep_alive<1, 2>())
      .def_property_readonly("outputs", &CallTaker::outputs)
      .def("add", &CallTaker::add);

  m.def("leaves", leaves);
  m.def("standing", standing);

  // For a class to take as its method; torch asks that it be bound to the mode that it has.
  const py::cpp_function take(take_call, py::arg("recorder"), py::arg("func"), py::arg("types"),
                              py::arg("args") = py::tuple(), py::arg("kwargs") = py::none());
  m.attr("take_call") = owned(PyInstanceMethod_New(take.ptr()));
}

}  // namespace limpet
