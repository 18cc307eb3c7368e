// RMSNorm.
#pragma once

#include <cmath>

#include "tests/support/op_case.h"

namespace regroup::test {

inline OpCase rms_norm_case(index_t rows, index_t columns) {
  constexpr double kEpsilon = 1e-6;
  OpCase op;
  op.name = fmt::format("rms_norm/{}x{}", rows, columns);
  op.arguments = {{.name = "x", .shape = {rows, columns}},
                  {.name = "weight", .shape = {columns}, .values = normal(0.5, 1)},
                  {.name = "y",
                   .role = Role::kOutput,
                   .shape = {rows, columns},
                   .reduction = static_cast<double>(columns)},
                  {.name = "inverse_rms",
                   .role = Role::kOutput,
                   .element = Element::kStatistic,
                   .shape = {rows},
                   .reduction = static_cast<double>(columns)}};
  op.call = [](Backend& backend, std::span<const Tensor> t) {
    backend.rms_norm(t[0], t[1], t[2], t[3], kEpsilon);
  };
  op.reference = [columns](std::vector<Numbers>& v) {
    const auto d = static_cast<std::size_t>(columns);
    for (std::size_t n = 0; n < v[3].size(); ++n) {
      double squares = 0;
      for (std::size_t i = 0; i < d; ++i) squares += v[0][n * d + i] * v[0][n * d + i];
      v[3][n] = 1 / std::sqrt(squares / static_cast<double>(d) + kEpsilon);
      for (std::size_t i = 0; i < d; ++i) v[2][n * d + i] = v[1][i] * v[0][n * d + i] * v[3][n];
    }
  };
  return op;
}

enum class Residual { kNone, kApart, kInPlace };

inline OpCase rms_norm_backward_case(index_t rows, index_t columns, Residual residual = Residual::kNone) {
  const std::vector<index_t> matrix = {rows, columns};
  OpCase op;
  op.name = fmt::format("rms_norm_backward/{}x{}/{}", rows, columns,
                        residual == Residual::kNone      ? "no residual"
                        : residual == Residual::kInPlace ? "residual in place"
                                                         : "residual");
  op.arguments = {
      {.name = "dy", .shape = matrix},
      {.name = "x", .shape = matrix},
      {.name = "weight", .shape = {columns}, .values = normal(0.5, 1)},
      {.name = "inverse_rms", .element = Element::kStatistic, .shape = {rows}, .values = uniform(0.5, 1.5)},
      {.name = "residual_gradient", .shape = residual == Residual::kNone ? std::vector<index_t>{} : matrix},
      {.name = "dx",
       .role = Role::kOutput,
       .shape = matrix,
       .reduction = static_cast<double>(columns),
       .same_as = residual == Residual::kInPlace ? 4 : -1},
      {.name = "dweight",
       .role = Role::kAccumulated,
       .element = Element::kStatistic,
       .shape = {columns},
       .reduction = static_cast<double>(rows)}};
  op.call = [](Backend& backend, std::span<const Tensor> t) {
    backend.rms_norm_backward(t[0], t[1], t[2], t[3], t[4], t[5], t[6]);
  };
  op.reference = [columns](std::vector<Numbers>& v) {
    const auto d = static_cast<std::size_t>(columns);
    for (std::size_t n = 0; n < v[3].size(); ++n) {
      const double r = v[3][n];
      double dot = 0;
      for (std::size_t i = 0; i < d; ++i) dot += v[2][i] * v[0][n * d + i] * v[1][n * d + i];
      for (std::size_t i = 0; i < d; ++i) {
        const std::size_t at = n * d + i;
        const double from_norm = r * (v[2][i] * v[0][at] - v[1][at] * r * r * dot / static_cast<double>(d));
        v[5][at] = (v[4].empty() ? 0 : v[4][at]) + from_norm;
        v[6][i] += v[0][at] * v[1][at] * r;
      }
    }
  };
  return op;
}

inline std::vector<OpCase> norm_cases() {
  return {rms_norm_case(7, 20), rms_norm_case(301, 200), rms_norm_backward_case(7, 20),
          rms_norm_backward_case(7, 20, Residual::kApart),
          rms_norm_backward_case(301, 200, Residual::kInPlace)};
}

inline std::vector<std::pair<OpCase, OpCase>> norm_gradients() {
  return {{rms_norm_case(7, 20), rms_norm_backward_case(7, 20)}};
}

}  // namespace regroup::test
