#include "plans.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/sum.h>

#include <algorithm>

namespace smart_fast {
namespace plans {

namespace py = pybind11;

namespace {

constexpr uintptr_t alignment = 16;  // what Triton's specialization asks about a pointer
constexpr size_t nowhere = size_t(-1);

}  // namespace

void Arguments::add(const Tensor& tensor) {
  if (tensor.key_set().has(c10::DispatchKey::Python) || !tensor.has_storage()) {
    known = false;
    pointers.push_back(0);
    return;
  }
  const auto pointer = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  known = known && (pointer == 0 || std::find(pointers.begin(), pointers.end(), pointer) == pointers.end());
  pointers.push_back(pointer);
  const at::Device device = tensor.device();
  key.push_back(uint64_t(tensor.scalar_type()) | uint64_t(pointer % alignment) << 8 | uint64_t(uint8_t(device.type())) << 16 |
                uint64_t(uint8_t(device.index())) << 24 | uint64_t(tensor.dim() + 1) << 32);
  key.insert(key.end(), tensor.sizes().begin(), tensor.sizes().end());
  key.insert(key.end(), tensor.strides().begin(), tensor.strides().end());
}

void Arguments::add(const optional<Tensor>& tensor) {
  if (tensor) return add(*tensor);
  pointers.push_back(0);
  key.push_back(0);
}

void Arguments::add(string_view text) {
  key.push_back(text.size());
  for (size_t begin = 0; begin < text.size(); begin += sizeof(uint64_t)) {
    uint64_t word = 0;
    std::memcpy(&word, text.data() + begin, std::min(sizeof word, text.size() - begin));
    key.push_back(word);
  }
}

void Arguments::add(Keyed number) {
  uint64_t word;
  std::memcpy(&word, &number.value, sizeof word);
  key.push_back(word);
}

size_t Planned::Hash::operator()(const Key& key) const {
  uint64_t hash = key.size();
  for (const uint64_t word : key) {
    hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 32;
  }
  return size_t(hash);
}

// ---- plans ---------------------------------------------------------------------------------------------------------

void Plan::Row::add(py::handle argument) {
  if (py::hasattr(argument, "place")) {
    sources.push_back({constants.size(), argument.attr("place").cast<size_t>(), argument.attr("factor").cast<double>()});
    constants.emplace_back();
  } else {
    constants.push_back(py::reinterpret_borrow<py::object>(argument));
  }
}

Plan::Plan(py::handle recorded, size_t tensors, size_t numbers) : tensors_(tensors), numbers_(numbers) {
  const auto device = recorded.attr("device").cast<at::Device>();
  device_ = py::int_(device.has_index() ? int(device.index()) : 0);
  current_stream_ = recorded.attr("current_stream");
  for (const py::handle each : recorded.attr("outputs")) {
    if (!py::isinstance<py::tuple>(each)) {
      outputs_.push_back({{}, {}, {}, each.cast<Tensor>()});
      continue;
    }
    const auto [sizes, strides, dtype] = each.cast<std::tuple<std::vector<int64_t>, std::vector<int64_t>, at::ScalarType>>();
    outputs_.push_back({sizes, strides, at::TensorOptions(device).dtype(dtype), {}});
  }
  for (const py::handle each : recorded.attr("calls")(tensors + numbers + outputs_.size())) {
    const auto [function, arguments] = each.cast<std::tuple<py::object, py::tuple>>();
    Launch launch = {function, {}, nowhere, {}};
    for (const py::handle argument : arguments) {
      for (const py::handle item : PyTuple_CheckExact(argument.ptr()) ? argument.cast<py::tuple>() : py::tuple())
        if (py::hasattr(item, "place")) launch.packed = launch.row.constants.size();
      if (launch.packed != launch.row.constants.size()) {
        launch.row.add(argument);
        continue;
      }
      for (const py::handle item : argument.cast<py::tuple>()) launch.of_tuple.add(item);
      launch.row.constants.emplace_back();
    }
    launches_.push_back(std::move(launch));
  }
  results_ = recorded.attr("results").cast<std::vector<size_t>>();
  totals_ = recorded.attr("totals").cast<std::vector<size_t>>();
}

std::vector<Tensor> Plan::run(const Arguments& arguments) const {
  const at::AutoDispatchBelowADInplaceOrView below;
  std::vector<Tensor> outputs;
  outputs.reserve(outputs_.size());
  {
    const py::gil_scoped_release no_gil;  // an allocator may wait for the device
    for (const Output& each : outputs_)
      outputs.push_back(each.shared.defined() ? each.shared : at::empty_strided(each.sizes, each.strides, each.options));
  }
  const py::object stream = current_stream_(device_);
  for (const Launch& each : launches_) launch(each, arguments, outputs, stream.ptr());
  if (!totals_.empty()) {
    const py::gil_scoped_release no_gil;
    for (const size_t place : totals_) outputs[place] = outputs[place].sum();
  }
  std::vector<Tensor> results;
  results.reserve(results_.size());
  for (const size_t place : results_) results.push_back(outputs[place]);
  return results;
}

// Fills in `references`, owned by the caller; false if Python has raised.
bool Plan::fill(const Row& row, const Arguments& arguments, const std::vector<Tensor>& outputs, PyObject* stream,
                PyObject** references) const {
  for (size_t k = 0; k < row.constants.size(); ++k) Py_XINCREF(references[k] = row.constants[k].ptr());
  bool done = true;
  for (const auto& [argument, place, factor] : row.sources) {
    PyObject*& made = references[argument];
    if (place < tensors_)
      made = PyLong_FromSize_t(arguments.pointers[place]);
    else if (place < tensors_ + numbers_)
      made = PyFloat_FromDouble(arguments.numbers[place - tensors_] * factor);
    else if (place < tensors_ + numbers_ + outputs.size())
      made = PyLong_FromSize_t(reinterpret_cast<uintptr_t>(outputs[place - tensors_ - numbers_].const_data_ptr()));
    else
      Py_INCREF(made = stream);
    done = done && made != nullptr;
  }
  return done;
}

void Plan::launch(const Launch& launch, const Arguments& arguments, const std::vector<Tensor>& outputs,
                  PyObject* stream) const {
  const size_t count = launch.row.constants.size();
  c10::SmallVector<PyObject*, 80> references(count + 1, nullptr);  // the first is for whom we call
  PyObject** const given = references.data() + 1;
  bool filled = fill(launch.row, arguments, outputs, stream, given);
  if (launch.packed != nowhere) {
    PyObject* const tuple = given[launch.packed] = PyTuple_New(Py_ssize_t(launch.of_tuple.constants.size()));
    filled = filled && tuple != nullptr && fill(launch.of_tuple, arguments, outputs, stream, &PyTuple_GET_ITEM(tuple, 0));
  }
  PyObject* done = nullptr;
  if (filled) done = PyObject_Vectorcall(launch.function.ptr(), given, count | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
  for (size_t k = 0; k < count; ++k) Py_XDECREF(given[k]);
  if (done == nullptr) throw py::error_already_set();
  Py_DECREF(done);
}

// ---- what only Python can do ---------------------------------------------------------------------------------------

Runtime::Runtime(py::object overriding, py::object knobs)
    : overriding_(std::move(overriding)),
      knobs_(std::move(knobs)),
      hooks_{interned("launch_enter_hook"), interned("launch_exit_hook")},
      calls_(interned("calls")) {}

py::object Runtime::interned(const char* name) {
  return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name));
}

bool Runtime::intervenes() const {
  if (PyDict_GET_SIZE(overriding_.ptr()) != 0) return true;
  for (const py::object& name : hooks_) {
    const py::object hook = knobs_.attr(name);
    if (hook.is_none()) continue;
    const py::object calls = py::getattr(hook, calls_, py::none());  // none where it is no chain of hooks but one
    if (!PyList_CheckExact(calls.ptr()) || PyList_GET_SIZE(calls.ptr()) != 0) return true;
  }
  return false;
}

std::vector<Tensor> Planned::called(const py::object& function, const py::tuple& given) {
  const at::NoGradGuard no_grad;
  const py::object result = function(*given);
  if (py::isinstance<py::tuple>(result)) return result.cast<std::vector<Tensor>>();
  return {result.cast<Tensor>()};
}

std::vector<Tensor> Planned::recorded(const Arguments& arguments, const py::tuple& given) {
  const at::NoGradGuard no_grad;
  const auto [results, plan] = record_(*given).cast<std::tuple<std::vector<Tensor>, py::object>>();
  std::shared_ptr<const Plan> made;
  if (!plan.is_none()) made = std::make_shared<const Plan>(plan, arguments.pointers.size(), arguments.numbers.size());
  decltype(plans_) dropped;  // ends outside of the table: what plans hold may run Python, and so other threads, as it ends
  if (plans_.size() >= most_) plans_.swap(dropped);
  plans_[arguments.key].swap(made);
  return results;
}

}  // namespace plans
}  // namespace smart_fast
