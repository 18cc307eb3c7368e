#include "tests/support/op_case.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace regroup::test {
namespace {

// Calls f.operator()<T>(), int32 included.
template <class F>
void dispatch_any(DType dtype, F&& f) {
  if (dtype == DType::kInt32) {
    f.template operator()<std::int32_t>();
  } else {
    dispatch(dtype, std::forward<F>(f));
  }
}

template <class T>
T from_double(double value) {
  if constexpr (std::is_same_v<T, bfloat16>) return bfloat16(static_cast<float>(value));
  if constexpr (!std::is_same_v<T, bfloat16>) return static_cast<T>(value);
}
template <class T>
double to_double(T value) {
  if constexpr (std::is_same_v<T, bfloat16>) return static_cast<double>(static_cast<float>(value));
  if constexpr (!std::is_same_v<T, bfloat16>) return static_cast<double>(value);
}

}  // namespace

index_t DeviceArgument::row() const {
  const std::size_t leading =
      argument_.shape.size() - std::min(argument_.shape.size(), static_cast<std::size_t>(argument_.row_rank));
  return std::accumulate(argument_.shape.begin() + static_cast<std::ptrdiff_t>(leading),
                         argument_.shape.end(), index_t{1}, std::multiplies<>());
}

DeviceArgument::DeviceArgument(Backend& backend, const Argument& argument, DType compute)
    : backend_(backend), argument_(argument) {
  if (argument.shape.empty()) return;
  const DType dtype = dtype_of(argument.element, compute);
  const index_t rows = count(argument.shape) / row();
  buffer_ = backend.allocate(rows * (row() + argument.padding) * size_of(dtype));
  memory_ = buffer_.tensor(dtype, {rows, row() + argument.padding});
  tensor_ = Tensor(buffer_.data(), dtype, argument.shape);
  const int leading = tensor_.rank - argument.row_rank;
  index_t stride = row() + argument.padding;
  for (int dim = leading - 1; dim >= 0; --dim) {
    tensor_.stride[static_cast<std::size_t>(dim)] = stride;
    stride *= tensor_[dim];
  }
}

Numbers DeviceArgument::rounded(const Numbers& values) const {
  Numbers result(values.size());
  dispatch_any(tensor_.dtype, [&]<class T>() {
    std::transform(values.begin(), values.end(), result.begin(),
                   [](double v) { return to_double(from_double<T>(v)); });
  });
  return result;
}

void DeviceArgument::write(const Numbers& values) {
  if (!tensor_) return;
  dispatch_any(tensor_.dtype, [&]<class T>() {
    const index_t width = row();
    const index_t stride = width + argument_.padding;
    std::vector<T> host(static_cast<std::size_t>(memory_.numel()), from_double<T>(kPadding));
    for (std::size_t i = 0; i < values.size(); ++i) {
      const auto n = static_cast<index_t>(i);
      host[static_cast<std::size_t>(n / width * stride + n % width)] = from_double<T>(values[i]);
    }
    backend_.copy_from_host(host.data(), memory_);
  });
}

Numbers DeviceArgument::read_all() const {
  Numbers result(static_cast<std::size_t>(memory_.numel()));
  dispatch_any(tensor_.dtype, [&]<class T>() {
    std::vector<T> host(result.size());
    backend_.copy_to_host(memory_, host.data());
    std::transform(host.begin(), host.end(), result.begin(), to_double<T>);
  });
  return result;
}

Numbers DeviceArgument::read() const {
  Numbers result;
  if (!tensor_) return result;
  const Numbers all = read_all();
  const auto width = static_cast<std::size_t>(row());
  const auto stride = width + static_cast<std::size_t>(argument_.padding);
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (i % stride < width) result.push_back(all[i]);
  }
  return result;
}

bool DeviceArgument::padding_untouched() const {
  if (!tensor_) return true;
  const Numbers all = read_all();
  const auto width = static_cast<std::size_t>(row());
  const auto stride = width + static_cast<std::size_t>(argument_.padding);
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (i % stride >= width && all[i] != kPadding) return false;
  }
  return true;
}

std::vector<std::byte> DeviceArgument::bytes() const {
  std::vector<std::byte> host(static_cast<std::size_t>(tensor_ ? memory_.bytes() : 0));
  if (tensor_) backend_.copy_to_host(memory_, host.data());
  return host;
}

Instance::Instance(Backend& backend, const OpCase& op, DType compute, std::uint64_t seed)
    : backend_(backend), op_(op), initial_(op.arguments.size()) {
  for (std::size_t i = 0; i < op.arguments.size(); ++i) {
    const Argument& argument = op.arguments[i];
    arguments_.emplace_back(backend, argument, compute);
    Numbers values(static_cast<std::size_t>(count(argument.shape)), std::numeric_limits<double>::quiet_NaN());
    const Philox random(seed, RandomPurpose::kTest, key_of(argument.name));
    if (argument.role != Role::kOutput) {
      for (std::size_t n = 0; n < values.size(); ++n) {
        values[n] = argument.values(random, static_cast<index_t>(n));
      }
    }
    if (argument.role != Role::kOutput || argument.element != Element::kInt32) {
      set(i, argument.shape.empty() ? values : arguments_[i].rounded(values));
    }
  }
}

void Instance::set(std::size_t i, const Numbers& values) {
  initial_[i] = values;
  arguments_[i].write(values);
}

void Instance::reset_outputs() {
  for (std::size_t i = 0; i < arguments_.size(); ++i) {
    const int source = arguments_[i].argument().same_as;
    if (source >= 0)
      arguments_[static_cast<std::size_t>(source)].write(initial_[static_cast<std::size_t>(source)]);
    if (arguments_[i].is_output() && source < 0) arguments_[i].write(initial_[i]);
  }
}

void Instance::call() {
  std::vector<Tensor> tensors;
  for (const DeviceArgument& argument : arguments_) {
    const int source = argument.argument().same_as;
    tensors.push_back(source >= 0 ? tensors[static_cast<std::size_t>(source)] : argument.tensor());
  }
  op_.call(backend_, tensors);
  backend_.synchronize();
}

std::vector<Numbers> Instance::numbers() const {
  std::vector<Numbers> result;
  for (const DeviceArgument& argument : arguments_) {
    const int source = argument.argument().same_as;
    result.push_back(source >= 0 ? arguments_[static_cast<std::size_t>(source)].read() : argument.read());
  }
  return result;
}

void expect_parity(Backend& backend, const OpCase& op, DType compute) {
  Instance instance(backend, op, compute);
  std::vector<Numbers> want = instance.initial();
  instance.call();
  op.reference(want);
  const std::vector<Numbers> got = instance.numbers();
  for (std::size_t i = 0; i < got.size(); ++i) {
    const Argument& argument = op.arguments[i];
    EXPECT_TRUE(instance.arguments()[i].padding_untouched())
        << op.name << ": between the rows of " << argument.name;
    if (argument.role == Role::kInput || argument.shape.empty()) continue;
    ASSERT_EQ(got[i].size(), want[i].size());
    const DType stored = dtype_of(argument.element, compute);
    const double magnitude = std::max(argument.magnitude, largest(want[i]));
    int reported = 0;
    for (std::size_t n = 0; n < got[i].size() && reported < 5; ++n) {
      const double allowed =
          tolerance(stored, stat_dtype(compute), argument.reduction, want[i][n], magnitude);
      const bool near = got[i][n] == want[i][n] || std::abs(got[i][n] - want[i][n]) <= allowed;
      reported += near ? 0 : 1;
      EXPECT_TRUE(near) << op.name << ' ' << name_of(compute) << ": " << argument.name << '[' << n << "] is "
                        << got[i][n] << ", exact " << want[i][n] << ", allowed error " << allowed;
    }
  }
}

std::vector<std::vector<std::byte>> bytes_after(Backend& backend, const OpCase& op, DType compute) {
  Instance instance(backend, op, compute);
  instance.call();
  std::vector<std::vector<std::byte>> result;
  for (const DeviceArgument& argument : instance.arguments()) result.push_back(argument.bytes());
  return result;
}

}  // namespace regroup::test
