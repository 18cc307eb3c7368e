// One description of an op's call feeds parity, gradient check, determinism and benchmark, on any backend.
//
// A case lists the arguments in the order in which `call` takes them. For the gradient check, name them by
// this convention: the backward case's argument "dy" is the gradient of the forward's "y"; an argument of the
// backward case that has the name of one of the forward's arguments takes its value.
#pragma once

#include <cstddef>
#include <cstring>
#include <functional>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/backend.h"
#include "tests/support/tolerances.h"

namespace regroup::test {

enum class Role {
  kInput,
  kOutput,      // written: its old content (NaN here) must not matter
  kAccumulated  // added to: starts with values, which must survive
};
enum class Element { kCompute, kStatistic, kFloat64, kInt32 };  // T, S(T), ...

// The value of element `index`, drawn from a generator of the argument's own.
using Values = std::function<double(const Philox&, index_t index)>;
inline Values normal(double deviation = 1, double mean = 0) {
  return [=](const Philox& random, index_t i) {
    return mean + deviation * random.normal(static_cast<std::uint64_t>(i));
  };
}
inline Values uniform(double low, double high) {
  return [=](const Philox& random, index_t i) {
    return low + (high - low) * random.uniform(static_cast<std::uint64_t>(i));
  };
}
// Integers of [low, high).
inline Values integers(index_t low, index_t high) {
  return [=](const Philox& random, index_t i) {
    return static_cast<double>(low + static_cast<index_t>(random.below(static_cast<std::uint64_t>(high - low),
                                                                       static_cast<std::uint64_t>(i))));
  };
}
inline Values constant(double value) {
  return [=](const Philox&, index_t) { return value; };
}

struct Argument {
  std::string name;
  Role role = Role::kInput;
  Element element = Element::kCompute;
  std::vector<index_t> shape;  // empty: the empty tensor ("none given")
  Values values = normal();    // of inputs and accumulated outputs
  // Elements between one row's end and the next row's begin, in tensors whose rows may be strided; a row is
  // the last `row_rank` dimensions.
  index_t padding = 0;
  int row_rank = 1;
  // Outputs: terms of the longest sum behind an element, and how large they may be together (0: as large as
  // the largest element).
  double reduction = 1;
  double magnitude = 0;
  // An output that is the same memory as this earlier argument (in-place use); -1: none.
  int same_as = -1;
};

// The numbers of one argument, dense, row-major, in double; exactly representable in its type.
using Numbers = std::vector<double>;

struct OpCase {
  std::string name;
  std::vector<Argument> arguments;
  std::function<void(Backend&, std::span<const Tensor>)> call;
  // Naive, in double, sharing no code with the library: computes the outputs numbers[i] from the inputs.
  // Outputs come in with their initial content.
  std::function<void(std::vector<Numbers>&)> reference;
};
// For gtest's messages.
inline void PrintTo(const OpCase& op, std::ostream* out) { *out << op.name; }

inline DType dtype_of(Element element, DType compute) {
  switch (element) {
    case Element::kCompute:
      return compute;
    case Element::kStatistic:
      return stat_dtype(compute);
    case Element::kFloat64:
      return DType::kFloat64;
    case Element::kInt32:
      break;
  }
  return DType::kInt32;
}

inline index_t count(const std::vector<index_t>& shape) {
  return shape.empty() ? 0 : std::accumulate(shape.begin(), shape.end(), index_t{1}, std::multiplies<>());
}

// Memory of one argument on a backend, written from and read into doubles.
class DeviceArgument {
 public:
  DeviceArgument(Backend& backend, const Argument& argument, DType compute);

  Tensor tensor() const { return tensor_; }
  bool is_output() const { return argument_.role != Role::kInput; }
  const Argument& argument() const { return argument_; }
  // What `values` become in the argument's type.
  Numbers rounded(const Numbers& values) const;
  void write(const Numbers& values);
  Numbers read() const;
  // The bytes between the rows are what write() left there.
  bool padding_untouched() const;
  std::vector<std::byte> bytes() const;

 private:
  static constexpr double kPadding = 1024;  // exactly representable everywhere
  index_t row() const;                      // elements of a row
  Numbers read_all() const;

  Backend& backend_;
  Argument argument_;
  Buffer buffer_;
  Tensor tensor_, memory_;  // the argument; the dense [rows, row + padding] around it
};

// A case's arguments on one backend.
class Instance {
 public:
  Instance(Backend& backend, const OpCase& op, DType compute, std::uint64_t seed = 1);

  void call();
  std::vector<Numbers> numbers() const;
  // What each argument began with.
  const std::vector<Numbers>& initial() const { return initial_; }
  std::vector<DeviceArgument>& arguments() { return arguments_; }
  // Writes argument `i` and remembers it as its initial value.
  void set(std::size_t i, const Numbers& values);
  // Puts every output back to what it was before call().
  void reset_outputs();

 private:
  Backend& backend_;
  OpCase op_;
  std::vector<DeviceArgument> arguments_;
  std::vector<Numbers> initial_;
};

// The outputs agree with the case's reference within tolerance() of tolerances.h.
void expect_parity(Backend& backend, const OpCase& op, DType compute);
// The bytes of every argument after the op has run.
std::vector<std::vector<std::byte>> bytes_after(Backend& backend, const OpCase& op, DType compute);

// All backends, given as a range of pointers, give the same bits.
template <class Backends>
void expect_same_bits(const Backends& backends, const OpCase& op, DType compute) {
  const auto first = bytes_after(*backends[0], op, compute);
  for (std::size_t n = 1; n < std::size(backends); ++n) {
    const auto other = bytes_after(*backends[n], op, compute);
    for (std::size_t i = 0; i < first.size(); ++i) {
      EXPECT_EQ(first[i], other[i]) << op.name << ' ' << name_of(compute) << ": " << op.arguments[i].name
                                    << " of backends 0 and " << n;
    }
  }
}

}  // namespace regroup::test
