#include "tests/support/gradient_check.h"

#include <cmath>

namespace regroup::test {
namespace {

constexpr std::size_t kNone = static_cast<std::size_t>(-1);

std::size_t find(const OpCase& op, const std::string& name) {
  for (std::size_t i = 0; i < op.arguments.size(); ++i) {
    if (op.arguments[i].name == name) return i;
  }
  return kNone;
}

// sum_y <P_y, y>, in long double so that the summation adds nothing to the error.
long double project(Instance& forward, const std::vector<Numbers>& projections) {
  forward.reset_outputs();
  forward.call();
  const std::vector<Numbers> numbers = forward.numbers();
  long double sum = 0;
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    for (std::size_t n = 0; n < projections[i].size(); ++n) {
      sum += static_cast<long double>(projections[i][n]) * numbers[i][n];
    }
  }
  return sum;
}

Numbers differences(Instance& forward, std::size_t input, const std::vector<Numbers>& projections) {
  const Numbers original = forward.initial()[input];
  Numbers gradient(original.size());
  Numbers moved = original;
  for (std::size_t n = 0; n < original.size(); ++n) {
    const double step = kDifferenceStep * std::max(1.0, std::abs(original[n]));
    moved[n] = original[n] + step;
    forward.set(input, moved);
    const long double above = project(forward, projections);
    const double up = moved[n];
    moved[n] = original[n] - step;
    forward.set(input, moved);
    gradient[n] = static_cast<double>((above - project(forward, projections)) / (up - moved[n]));
    moved[n] = original[n];
  }
  forward.set(input, original);
  return gradient;
}

}  // namespace

void expect_gradients(Backend& backend, const OpCase& forward_op, const OpCase& backward_op) {
  Instance forward(backend, forward_op, DType::kFloat64);
  Instance backward(backend, backward_op, DType::kFloat64);
  forward.call();
  const std::vector<Numbers> results = forward.numbers();
  std::vector<Numbers> projections(results.size());
  for (std::size_t i = 0; i < forward_op.arguments.size(); ++i) {
    const Argument& argument = forward_op.arguments[i];
    const std::size_t same = find(backward_op, argument.name);
    if (same != kNone) backward.set(same, results[i]);
    const std::size_t gradient = find(backward_op, "d" + argument.name);
    if (argument.role != Role::kInput && gradient != kNone) projections[i] = backward.initial()[gradient];
  }
  const std::vector<Numbers> before = backward.initial();
  backward.call();
  const std::vector<Numbers> after = backward.numbers();
  int checked = 0;
  for (std::size_t i = 0; i < forward_op.arguments.size(); ++i) {
    const Argument& argument = forward_op.arguments[i];
    const std::size_t output = find(backward_op, "d" + argument.name);
    if (argument.role != Role::kInput || output == kNone || argument.shape.empty()) continue;
    ++checked;
    const bool accumulated = backward_op.arguments[output].role == Role::kAccumulated;
    const Numbers want = differences(forward, i, projections);
    const double scale = std::max(1.0, largest(want));
    for (std::size_t n = 0; n < want.size(); ++n) {
      const double got = after[output][n] - (accumulated ? before[output][n] : 0);
      EXPECT_LE(std::abs(got - want[n]), kGradientTolerance * scale)
          << backward_op.name << ": d" << argument.name << '[' << n << "] is " << got << ", by differences "
          << want[n];
    }
  }
  EXPECT_GT(checked, 0) << backward_op.name << ": no gradient was checked";
}

}  // namespace regroup::test
