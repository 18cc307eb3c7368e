// Adafactor as t5x/adafactor.py writes it (beta1 None, weight decay None), and AdamW; both naive, in double.
#pragma once

#include <cmath>

#include "tests/support/op_case.h"

namespace regroup::test {

inline double mean_of(const Numbers& values) {
  double sum = 0;
  for (const double v : values) sum += v;
  return sum / static_cast<double>(values.size());
}
inline double rms_of(const Numbers& values) {
  double sum = 0;
  for (const double v : values) sum += v * v;
  return std::sqrt(sum / static_cast<double>(values.size()));
}

// Updates w with the direction y: clipped by its root mean square, scaled by the weight's.
inline void naive_adafactor_step(Numbers& w, Numbers y, const AdafactorOptions& options) {
  const double clip = std::max(1.0, rms_of(y) / options.clipping_threshold);
  const double scale = options.learning_rate * std::max(options.epsilon_parameter, rms_of(w)) / clip;
  for (std::size_t i = 0; i < w.size(); ++i) w[i] -= scale * y[i];
}

constexpr AdafactorOptions kAdafactorOptions{.beta2 = 0.7, .learning_rate = 0.5};

// The three passes over a whole matrix.
inline void adafactor_pass(Backend& backend, const AdafactorSlot& slot, const AdafactorOptions& options) {
  const std::span<const AdafactorSlot> slots(&slot, 1);
  backend.adafactor_statistics(slots, options);
  backend.adafactor_moments(slots, options);
  backend.adafactor_update(slots, options);
}

inline OpCase adafactor_factored_case(index_t rows, index_t columns) {
  const Element s = Element::kStatistic;
  const auto reduction = static_cast<double>(rows + columns);
  OpCase op;
  op.name = fmt::format("adafactor/{}x{}/factored", rows, columns);
  op.arguments = {{.name = "weight",
                   .role = Role::kAccumulated,
                   .element = s,
                   .shape = {rows, columns},
                   .reduction = reduction},
                  {.name = "gradient", .element = s, .shape = {rows, columns}, .values = normal(0.01)},
                  {.name = "row",
                   .role = Role::kAccumulated,
                   .element = s,
                   .shape = {rows},
                   .values = uniform(1e-5, 1e-4),
                   .reduction = reduction},
                  {.name = "column",
                   .role = Role::kAccumulated,
                   .element = s,
                   .shape = {columns},
                   .values = uniform(1e-5, 1e-4),
                   .reduction = reduction},
                  {.name = "row_sums",
                   .role = Role::kOutput,
                   .element = Element::kFloat64,
                   .shape = {rows},
                   .reduction = reduction},
                  {.name = "column_sums",
                   .role = Role::kOutput,
                   .element = Element::kFloat64,
                   .shape = {columns},
                   .reduction = reduction},
                  {.name = "totals",
                   .role = Role::kOutput,
                   .element = Element::kFloat64,
                   .shape = {4},
                   .reduction = reduction}};
  op.call = [=](Backend& backend, std::span<const Tensor> t) {
    adafactor_pass(backend,
                   {.weight = t[0],
                    .gradient = t[1],
                    .row = t[2],
                    .column = t[3],
                    .row_sums = t[4],
                    .column_sums = t[5],
                    .totals = t[6],
                    .global_rows = rows,
                    .global_columns = columns},
                   kAdafactorOptions);
  };
  op.reference = [=](std::vector<Numbers>& v) {
    const auto c = static_cast<std::size_t>(columns);
    Numbers &w = v[0], &row = v[2], &column = v[3];
    const Numbers& g = v[1];
    v[4].assign(v[4].size(), 0);
    v[5].assign(v[5].size(), 0);
    v[6].assign(4, 0);
    for (std::size_t i = 0; i < g.size(); ++i) {
      const double square = g[i] * g[i] + kAdafactorOptions.epsilon_gradient;
      v[4][i / c] += square;
      v[5][i % c] += square;
      v[6][0] += w[i] * w[i];
      v[6][1] += g[i] * g[i];
    }
    const double b2 = kAdafactorOptions.beta2;
    for (std::size_t r = 0; r < row.size(); ++r) {
      row[r] = b2 * row[r] + (1 - b2) * v[4][r] / static_cast<double>(columns);
      v[6][3] += row[r];
    }
    for (std::size_t i = 0; i < c; ++i) {
      column[i] = b2 * column[i] + (1 - b2) * v[5][i] / static_cast<double>(rows);
    }
    Numbers y(g.size());
    for (std::size_t i = 0; i < g.size(); ++i) {
      y[i] = g[i] / std::sqrt(row[i / c] / mean_of(row)) / std::sqrt(column[i % c]);
      v[6][2] += g[i] * g[i] / (row[i / c] * column[i % c]);
    }
    naive_adafactor_step(w, y, kAdafactorOptions);
  };
  return op;
}

inline OpCase adafactor_full_case(index_t rows, index_t columns) {
  const Element s = Element::kStatistic;
  const double reduction = 512;  // float32 sums join a float64 sum after that many terms
  OpCase op;
  op.name = fmt::format("adafactor/{}x{}/full", rows, columns);
  op.arguments = {{.name = "weight",
                   .role = Role::kAccumulated,
                   .element = s,
                   .shape = {rows, columns},
                   .reduction = reduction},
                  {.name = "gradient", .element = s, .shape = {rows, columns}, .values = normal(0.01)},
                  {.name = "second_moment",
                   .role = Role::kAccumulated,
                   .element = s,
                   .shape = {rows, columns},
                   .values = uniform(1e-5, 1e-4)},
                  {.name = "totals",
                   .role = Role::kOutput,
                   .element = Element::kFloat64,
                   .shape = {4},
                   .reduction = reduction}};
  op.call = [=](Backend& backend, std::span<const Tensor> t) {
    adafactor_pass(backend,
                   {.weight = t[0],
                    .gradient = t[1],
                    .second_moment = t[2],
                    .totals = t[3],
                    .global_rows = rows,
                    .global_columns = columns},
                   kAdafactorOptions);
  };
  op.reference = [](std::vector<Numbers>& v) {
    const Numbers& g = v[1];
    const double b2 = kAdafactorOptions.beta2;
    v[3].assign(4, 0);
    Numbers y(g.size());
    for (std::size_t i = 0; i < g.size(); ++i) {
      v[2][i] = b2 * v[2][i] + (1 - b2) * (g[i] * g[i] + kAdafactorOptions.epsilon_gradient);
      y[i] = g[i] / std::sqrt(v[2][i]);
      v[3][0] += v[0][i] * v[0][i];
      v[3][1] += g[i] * g[i];
      v[3][2] += y[i] * y[i];
    }
    naive_adafactor_step(v[0], y, kAdafactorOptions);
  };
  return op;
}

inline OpCase adamw_case(index_t rows, index_t columns, bool decay, bool scale_by_rms) {
  const AdamWOptions options{
      .learning_rate = 0.1, .weight_decay = 0.2, .step = 3, .scale_by_rms = scale_by_rms};
  const Element s = Element::kStatistic;
  const double reduction = 512;
  OpCase op;
  op.name = fmt::format("adamw/{}x{}{}{}", rows, columns, decay ? "/decay" : "", scale_by_rms ? "/rms" : "");
  op.arguments = {{.name = "weight",
                   .role = Role::kAccumulated,
                   .element = s,
                   .shape = {rows, columns},
                   .reduction = reduction},
                  {.name = "gradient", .element = s, .shape = {rows, columns}, .values = normal(0.01)},
                  {.name = "first_moment",
                   .role = Role::kAccumulated,
                   .element = s,
                   .shape = {rows, columns},
                   .values = normal(0.01)},
                  {.name = "second_moment",
                   .role = Role::kAccumulated,
                   .element = s,
                   .shape = {rows, columns},
                   .values = uniform(1e-5, 1e-4)},
                  {.name = "totals",
                   .role = Role::kAccumulated,
                   .element = Element::kFloat64,
                   .shape = {4},
                   .values = constant(0),
                   .reduction = reduction}};
  op.call = [=](Backend& backend, std::span<const Tensor> t) {
    const AdamWSlot slot{.weight = t[0],
                         .gradient = t[1],
                         .first_moment = t[2],
                         .second_moment = t[3],
                         .totals = t[4],
                         .global_size = rows * columns,
                         .decay = decay};
    backend.adamw_statistics(std::span(&slot, 1));
    backend.adamw_update(std::span(&slot, 1), options);
  };
  op.reference = [=](std::vector<Numbers>& v) {
    const double scale = scale_by_rms ? std::max(options.epsilon_parameter, rms_of(v[0])) : 1;
    const double step = static_cast<double>(options.step);
    for (std::size_t i = 0; i < v[0].size(); ++i) {
      const double g = v[1][i], w = v[0][i];
      v[4][0] += w * w;
      v[4][1] += g * g;
      v[2][i] = options.beta1 * v[2][i] + (1 - options.beta1) * g;
      v[3][i] = options.beta2 * v[3][i] + (1 - options.beta2) * g * g;
      const double m = v[2][i] / (1 - std::pow(options.beta1, step));
      const double s2 = v[3][i] / (1 - std::pow(options.beta2, step));
      v[0][i] = w - options.learning_rate * scale * m / (std::sqrt(s2) + options.epsilon) -
                (decay ? options.learning_rate * options.weight_decay * w : 0);
    }
  };
  return op;
}

inline std::vector<OpCase> optimizer_cases() {
  return {adafactor_factored_case(7, 20),  adafactor_factored_case(300, 257), adafactor_full_case(7, 20),
          adafactor_full_case(1, 70001),   adamw_case(7, 20, true, false),    adamw_case(7, 20, false, true),
          adamw_case(300, 257, true, true)};
}

}  // namespace regroup::test
