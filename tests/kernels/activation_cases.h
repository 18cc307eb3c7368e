// Gated GELU, ReLU, residual and dropout.
#pragma once

#include <algorithm>
#include <cmath>
#include <numbers>

#include "tests/support/op_case.h"

namespace regroup::test {

// A [rows, columns] part, somewhere inside a global matrix, of a layer with dropout.
inline Dropout dropout_of(index_t columns, double rate) {
  return {.rate = rate,
          .key = Philox(11, RandomPurpose::kDropout),
          .first_row = 5,
          .first_column = 3,
          .columns = columns + 10};
}

inline double dropout_factor(const Dropout& dropout, index_t row, index_t column) {
  if (dropout.rate == 0) return 1;
  const auto element =
      static_cast<std::uint64_t>((dropout.first_row + row) * dropout.columns + dropout.first_column + column);
  const double word = dropout.key(element / 4)[element % 4];
  return word >= dropout.rate * 0x1p32 ? 1 / (1 - dropout.rate) : 0;
}

// value and derivative of the tanh form
inline std::pair<double, double> naive_gelu(double x) {
  const double root = std::sqrt(2 / std::numbers::pi);
  const double u = root * (x + 0.044715 * x * x * x);
  const double t = std::tanh(u);
  const double slope = 1 / (std::cosh(u) * std::cosh(u));  // 1 - t^2, without the cancellation
  return {0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * slope * root * (1 + 3 * 0.044715 * x * x)};
}

inline OpCase gated_gelu_case(index_t rows, index_t columns, double rate) {
  const Dropout dropout = dropout_of(columns, rate);
  OpCase op;
  op.name = fmt::format("gated_gelu/{}x{}/dropout {}", rows, columns, rate);
  op.arguments = {{.name = "x", .shape = {rows, 2 * columns}, .values = normal(2)},
                  {.name = "y", .role = Role::kOutput, .shape = {rows, columns}}};
  op.call = [dropout](Backend& backend, std::span<const Tensor> t) {
    backend.gated_gelu(t[0], t[1], dropout);
  };
  op.reference = [=](std::vector<Numbers>& v) {
    for (index_t r = 0; r < rows; ++r) {
      for (index_t c = 0; c < columns; ++c) {
        const auto gate = static_cast<std::size_t>(r * 2 * columns + c);
        v[1][static_cast<std::size_t>(r * columns + c)] = naive_gelu(v[0][gate]).first *
                                                          v[0][gate + static_cast<std::size_t>(columns)] *
                                                          dropout_factor(dropout, r, c);
      }
    }
  };
  return op;
}

inline OpCase gated_gelu_backward_case(index_t rows, index_t columns, double rate) {
  const Dropout dropout = dropout_of(columns, rate);
  OpCase op;
  op.name = fmt::format("gated_gelu_backward/{}x{}/dropout {}", rows, columns, rate);
  op.arguments = {{.name = "dy", .shape = {rows, columns}},
                  {.name = "x", .shape = {rows, 2 * columns}, .values = normal(2)},
                  {.name = "dx", .role = Role::kOutput, .shape = {rows, 2 * columns}}};
  op.call = [dropout](Backend& backend, std::span<const Tensor> t) {
    backend.gated_gelu_backward(t[0], t[1], t[2], dropout);
  };
  op.reference = [=](std::vector<Numbers>& v) {
    for (index_t r = 0; r < rows; ++r) {
      for (index_t c = 0; c < columns; ++c) {
        const auto gate = static_cast<std::size_t>(r * 2 * columns + c);
        const auto value = gate + static_cast<std::size_t>(columns);
        const double g = v[0][static_cast<std::size_t>(r * columns + c)] * dropout_factor(dropout, r, c);
        const auto [gelu, derivative] = naive_gelu(v[1][gate]);
        v[2][gate] = g * v[1][value] * derivative;
        v[2][value] = g * gelu;
      }
    }
  };
  return op;
}

// Values of x with many exact zeros, where relu's derivative is defined as 0. Not for central differences.
inline Values with_zeros() { return integers(-2, 3); }

inline OpCase relu_case(index_t rows, index_t columns, double rate, const Values& values = normal(2)) {
  const Dropout dropout = dropout_of(columns, rate);
  OpCase op;
  op.name = fmt::format("relu/{}x{}/dropout {}", rows, columns, rate);
  op.arguments = {{.name = "x", .shape = {rows, columns}, .values = values},
                  {.name = "y", .role = Role::kOutput, .shape = {rows, columns}}};
  op.call = [dropout](Backend& backend, std::span<const Tensor> t) { backend.relu(t[0], t[1], dropout); };
  op.reference = [=](std::vector<Numbers>& v) {
    for (std::size_t i = 0; i < v[1].size(); ++i) {
      const auto n = static_cast<index_t>(i);
      v[1][i] = std::max(v[0][i], 0.0) * dropout_factor(dropout, n / columns, n % columns);
    }
  };
  return op;
}

inline OpCase relu_backward_case(index_t rows, index_t columns, double rate,
                                 const Values& values = normal(2)) {
  const Dropout dropout = dropout_of(columns, rate);
  OpCase op;
  op.name = fmt::format("relu_backward/{}x{}/dropout {}", rows, columns, rate);
  op.arguments = {{.name = "dy", .shape = {rows, columns}},
                  {.name = "x", .shape = {rows, columns}, .values = values},
                  {.name = "dx", .role = Role::kOutput, .shape = {rows, columns}}};
  op.call = [dropout](Backend& backend, std::span<const Tensor> t) {
    backend.relu_backward(t[0], t[1], t[2], dropout);
  };
  op.reference = [=](std::vector<Numbers>& v) {
    for (std::size_t i = 0; i < v[2].size(); ++i) {
      const auto n = static_cast<index_t>(i);
      v[2][i] = v[1][i] > 0 ? v[0][i] * dropout_factor(dropout, n / columns, n % columns) : 0;
    }
  };
  return op;
}

enum class DropoutUse { kPlain, kResidual, kIntoResidual, kIntoX };

inline OpCase dropout_add_case(index_t rows, index_t columns, double rate, DropoutUse use) {
  const Dropout dropout = dropout_of(columns, rate);
  const std::vector<index_t> matrix = {rows, columns};
  OpCase op;
  op.name = fmt::format("dropout_add/{}x{}/dropout {}/use {}", rows, columns, rate, static_cast<int>(use));
  op.arguments = {{.name = "residual", .shape = use == DropoutUse::kPlain ? std::vector<index_t>{} : matrix},
                  {.name = "x", .shape = matrix},
                  {.name = "y",
                   .role = Role::kOutput,
                   .shape = matrix,
                   .same_as = use == DropoutUse::kIntoResidual ? 0 : (use == DropoutUse::kIntoX ? 1 : -1)}};
  op.call = [dropout](Backend& backend, std::span<const Tensor> t) {
    backend.dropout_add(t[0], t[1], t[2], dropout);
  };
  op.reference = [=](std::vector<Numbers>& v) {
    for (std::size_t i = 0; i < v[2].size(); ++i) {
      const auto n = static_cast<index_t>(i);
      v[2][i] = (v[0].empty() ? 0 : v[0][i]) + v[1][i] * dropout_factor(dropout, n / columns, n % columns);
    }
  };
  return op;
}

inline OpCase dropout_backward_case(index_t rows, index_t columns, double rate, bool in_place) {
  const Dropout dropout = dropout_of(columns, rate);
  OpCase op;
  op.name =
      fmt::format("dropout_backward/{}x{}/dropout {}{}", rows, columns, rate, in_place ? "/in place" : "");
  op.arguments = {
      {.name = "dy", .shape = {rows, columns}},
      {.name = "dx", .role = Role::kOutput, .shape = {rows, columns}, .same_as = in_place ? 0 : -1}};
  op.call = [dropout](Backend& backend, std::span<const Tensor> t) {
    backend.dropout_backward(t[0], t[1], dropout);
  };
  op.reference = [=](std::vector<Numbers>& v) {
    for (std::size_t i = 0; i < v[1].size(); ++i) {
      const auto n = static_cast<index_t>(i);
      v[1][i] = v[0][i] * dropout_factor(dropout, n / columns, n % columns);
    }
  };
  return op;
}

inline std::vector<OpCase> activation_cases() {
  std::vector<OpCase> cases;
  for (const double rate : {0.0, 0.1, 0.5}) {
    for (const auto& [rows, columns] : {std::pair<index_t, index_t>{7, 37}, {131, 290}}) {
      cases.push_back(gated_gelu_case(rows, columns, rate));
      cases.push_back(gated_gelu_backward_case(rows, columns, rate));
      cases.push_back(relu_case(rows, columns, rate, with_zeros()));
      cases.push_back(relu_backward_case(rows, columns, rate, with_zeros()));
      cases.push_back(dropout_add_case(rows, columns, rate, DropoutUse::kResidual));
      cases.push_back(dropout_backward_case(rows, columns, rate, false));
    }
    cases.push_back(dropout_add_case(7, 37, rate, DropoutUse::kPlain));
    cases.push_back(dropout_add_case(7, 37, rate, DropoutUse::kIntoResidual));
    cases.push_back(dropout_add_case(7, 37, rate, DropoutUse::kIntoX));
    cases.push_back(dropout_backward_case(7, 37, rate, true));
  }
  return cases;
}

inline std::vector<std::pair<OpCase, OpCase>> activation_gradients() {
  return {{gated_gelu_case(7, 40, 0), gated_gelu_backward_case(7, 40, 0)},
          {gated_gelu_case(5, 37, 0.3), gated_gelu_backward_case(5, 37, 0.3)},
          {relu_case(7, 40, 0), relu_backward_case(7, 40, 0)},
          {relu_case(5, 37, 0.3), relu_backward_case(5, 37, 0.3)},
          {dropout_add_case(5, 37, 0.3, DropoutUse::kPlain), dropout_backward_case(5, 37, 0.3, false)}};
}

}  // namespace regroup::test
