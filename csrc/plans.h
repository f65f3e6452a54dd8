// Launch plans of Triton's kernels: smart_fast/backends/triton_plan.py records them and says what they are; here they are
// found and run. Everything in this file is called with Python's lock held.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/SmallVector.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace smart_fast {
namespace __attribute__((visibility("hidden"))) plans {  // as pybind11's objects are

using at::Tensor;
using std::optional;
using std::string_view;

// A number that decides what is compiled, and so counts among what a plan is found by.
struct Keyed {
  double value;
};

using Key = std::vector<uint64_t>;

// The arguments of a launcher as a plan sees them: what it is found by, and what each call passes on.
class Arguments {
 public:
  template <class... Each>
  explicit Arguments(const Each&... each) {
    key.reserve(64);
    (add(each), ...);
  }

  Key key;
  c10::SmallVector<uintptr_t, 8> pointers;  // of each tensor; 0 where there is none
  c10::SmallVector<double, 4> numbers;
  bool known = true;  // whether plans can tell: the tensors have memory, each its own

 private:
  void add(const Tensor& tensor);
  void add(const optional<Tensor>& tensor);
  void add(string_view text);
  void add(double number) { numbers.push_back(number); }
  void add(bool flag) { key.push_back(flag); }
  void add(Keyed number);
};

// What a launcher did for one call, to be done again for calls that are like it.
class Plan {
 public:
  // From a plan in Python, for calls with so many tensors and numbers.
  Plan(pybind11::handle recorded, size_t tensors, size_t numbers);

  std::vector<Tensor> run(const Arguments& arguments) const;

 private:
  struct Output {
    std::vector<int64_t> sizes, strides;
    at::TensorOptions options;
    Tensor shared;  // an empty one, which every call shares
  };
  // Where an argument comes from: a place in the row of pointers, numbers, outputs and the stream.
  struct Source {
    size_t argument, place;
    double factor;
  };
  // Arguments of a call: nothing is where one differs from call to call.
  struct Row {
    std::vector<pybind11::object> constants;
    std::vector<Source> sources;

    void add(pybind11::handle argument);
  };
  struct Launch {
    pybind11::object function;
    Row row;
    size_t packed;  // the argument of `function` that is a tuple of this, if any is
    Row of_tuple;
  };

  bool fill(const Row& row, const Arguments& arguments, const std::vector<Tensor>& outputs, PyObject* stream,
            PyObject** references) const;
  void launch(const Launch& launch, const Arguments& arguments, const std::vector<Tensor>& outputs,
              PyObject* stream) const;

  pybind11::object device_, current_stream_;  // the index of one, and what tells its stream
  size_t tensors_, numbers_;
  std::vector<Output> outputs_;
  std::vector<Launch> launches_;
  std::vector<size_t> results_, totals_;
};

// What is asked anew at each launch, since anyone in Python may change it.
class Runtime {
 public:
  // `tuning.overriding` and `triton.knobs.runtime`.
  Runtime(pybind11::object overriding, pybind11::object knobs);

  // Whether launches are chosen, or looked at, by someone.
  bool intervenes() const;

 private:
  static pybind11::object interned(const char* name);

  pybind11::object overriding_, knobs_, hooks_[2], calls_;
};

// A launcher of triton_launch.py and its plans.
class Planned {
 public:
  Planned() = default;
  // `record` launches as `launcher` does and gives what it returned and a plan, or None where there can be none.
  Planned(pybind11::object launcher, pybind11::object record, std::shared_ptr<const Runtime> runtime, size_t most)
      : launcher_(std::move(launcher)), record_(std::move(record)), runtime_(std::move(runtime)), most_(most) {}

  size_t size() const { return plans_.size(); }

  template <class... Each>
  bool knows(const Each&... each) const {
    const Arguments arguments(each...);
    const auto found = arguments.known ? plans_.find(arguments.key) : plans_.end();
    return found != plans_.end() && found->second != nullptr;
  }

  // Calls the launcher, or does what it would do.
  template <class... Each>
  std::vector<Tensor> operator()(const Tensor& anchor, const Each&... each) {
    const c10::DeviceGuard guard(anchor.device());  // which is where Triton launches
    Arguments arguments(each...);
    const auto given = [&] { return pybind11::make_tuple(python(each)...); };
    if (!arguments.known || runtime_->intervenes()) return called(launcher_, given());
    const auto found = plans_.find(arguments.key);
    if (found == plans_.end()) return recorded(arguments, given());
    const std::shared_ptr<const Plan> plan = found->second;  // other threads may drop it meanwhile
    return plan == nullptr ? called(launcher_, given()) : plan->run(arguments);
  }

 private:
  static pybind11::object python(const Tensor& tensor) { return pybind11::cast(tensor); }
  static pybind11::object python(const optional<Tensor>& tensor) { return pybind11::cast(tensor); }
  static pybind11::object python(string_view text) { return pybind11::str(text.data(), text.size()); }
  static pybind11::object python(double number) { return pybind11::float_(number); }
  static pybind11::object python(bool flag) { return pybind11::bool_(flag); }
  static pybind11::object python(Keyed number) { return pybind11::float_(number.value); }

  static std::vector<Tensor> called(const pybind11::object& function, const pybind11::tuple& given);
  std::vector<Tensor> recorded(const Arguments& arguments, const pybind11::tuple& given);

  struct Hash {
    size_t operator()(const Key& key) const;
  };

  pybind11::object launcher_, record_;
  std::shared_ptr<const Runtime> runtime_;
  size_t most_ = 0;
  std::unordered_map<Key, std::shared_ptr<const Plan>, Hash> plans_;  // null: there can be none
};

}  // namespace plans
}  // namespace smart_fast
