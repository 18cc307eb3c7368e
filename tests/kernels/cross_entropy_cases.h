// Cross-entropy over a vocabulary that lies on two ranks; what the ranks would exchange is done on the host.
#pragma once

#include <cmath>

#include "tests/support/op_case.h"

namespace regroup::test {

// logits[n, v] of both shards, as one row.
inline std::vector<double> logits_row(const std::vector<Numbers>& v, std::size_t n, std::size_t tokens) {
  std::vector<double> row;
  for (const std::size_t shard : {0U, 1U}) {
    const std::size_t width = v[shard].size() / tokens;
    row.insert(row.end(), v[shard].begin() + static_cast<std::ptrdiff_t>(n * width),
               v[shard].begin() + static_cast<std::ptrdiff_t>((n + 1) * width));
  }
  return row;
}

inline double log_sum_exp(const std::vector<double>& row) {
  const double largest_value = *std::max_element(row.begin(), row.end());
  double sum = 0;
  for (const double x : row) sum += std::exp(x - largest_value);
  return largest_value + std::log(sum);
}

// b = combine(a, b) elementwise, a = b: an all-reduce between two "ranks".
inline void all_reduce(Backend& backend, const Tensor& a, const Tensor& b, bool maximum) {
  dispatch(a.dtype, [&]<class T>() {
    using S = stat_t<T>;
    std::vector<S> host_a(static_cast<std::size_t>(a.numel())), host_b(host_a.size());
    backend.copy_to_host(a, host_a.data());
    backend.copy_to_host(b, host_b.data());
    for (std::size_t i = 0; i < host_a.size(); ++i) {
      host_a[i] = maximum ? std::max(host_a[i], host_b[i]) : host_a[i] + host_b[i];
    }
    backend.copy_from_host(host_a.data(), a);
    backend.copy_from_host(host_a.data(), b);
  });
}

// Arguments 0-6: logits_a, logits_b, targets, and row_max and sums of each rank; the same in both cases.
inline std::vector<Argument> cross_entropy_arguments(index_t tokens, index_t first, index_t second,
                                                     Role role) {
  const auto size = static_cast<double>(first + second);
  return {
      {.name = "logits_a", .element = Element::kStatistic, .shape = {tokens, first}, .values = normal(3)},
      {.name = "logits_b", .element = Element::kStatistic, .shape = {tokens, second}, .values = normal(3)},
      {.name = "targets",
       .element = Element::kInt32,
       .shape = {tokens},
       .values =
           [=](const Philox& random, index_t n) {
             return n % 4 == 3 ? 0.0 : integers(1, first + second)(random, n);  // every fourth is padding
           }},
      {.name = "row_max_a", .role = role, .element = Element::kStatistic, .shape = {tokens}},
      {.name = "row_max_b", .role = role, .element = Element::kStatistic, .shape = {tokens}},
      {.name = "sums_a",
       .role = role,
       .element = Element::kStatistic,
       .shape = {2, tokens},
       .reduction = size},
      {.name = "sums_b",
       .role = role,
       .element = Element::kStatistic,
       .shape = {2, tokens},
       .reduction = size}};
}

inline OpCase cross_entropy_case(index_t tokens, index_t first, index_t second, double z_loss) {
  OpCase op;
  op.name = fmt::format("cross_entropy/{}x({}+{})/z_loss {}", tokens, first, second, z_loss);
  op.arguments = cross_entropy_arguments(tokens, first, second, Role::kOutput);
  op.arguments.push_back({.name = "loss",
                          .role = Role::kAccumulated,
                          .element = Element::kFloat64,
                          .shape = {2},
                          .reduction = static_cast<double>(tokens + first + second)});
  op.call = [=](Backend& backend, std::span<const Tensor> t) {
    const CrossEntropyOptions a{.first_vocabulary_id = 0, .z_loss = z_loss};
    const CrossEntropyOptions b{.first_vocabulary_id = first, .z_loss = z_loss};
    backend.cross_entropy_max(t[0], t[3]);
    backend.cross_entropy_max(t[1], t[4]);
    all_reduce(backend, t[3], t[4], true);
    backend.cross_entropy_sums(t[0], t[3], t[2], t[5], a);
    backend.cross_entropy_sums(t[1], t[4], t[2], t[6], b);
    all_reduce(backend, t[5], t[6], false);
    backend.cross_entropy_loss(t[3], t[2], t[5], t[7], a);
  };
  op.reference = [=](std::vector<Numbers>& v) {
    const std::size_t count = v[2].size();
    for (std::size_t n = 0; n < count; ++n) {
      const std::vector<double> row = logits_row(v, n, count);
      const double largest_value = *std::max_element(row.begin(), row.end());
      const double log_z = log_sum_exp(row);
      const auto target = static_cast<std::size_t>(v[2][n]);
      v[3][n] = v[4][n] = largest_value;
      v[5][n] = v[6][n] = std::exp(log_z - largest_value);
      v[5][count + n] = v[6][count + n] = row[target] - largest_value;
      if (target == 0) continue;
      v[7][0] += log_z - row[target];
      v[7][1] += z_loss * log_z * log_z;
    }
  };
  return op;
}

inline OpCase cross_entropy_backward_case(index_t tokens, index_t first, index_t second, double z_loss) {
  constexpr double kFactor = 0.125;
  OpCase op;
  op.name = fmt::format("cross_entropy_backward/{}x({}+{})/z_loss {}", tokens, first, second, z_loss);
  op.arguments = cross_entropy_arguments(tokens, first, second, Role::kInput);
  op.arguments[5].values = op.arguments[6].values = uniform(5, 50);
  op.arguments[3].values = op.arguments[4].values = uniform(5, 9);
  const auto size = static_cast<double>(first + second);
  op.arguments.push_back(
      {.name = "dlogits_a", .role = Role::kOutput, .shape = {tokens, first}, .reduction = size});
  op.arguments.push_back(
      {.name = "dlogits_b", .role = Role::kOutput, .shape = {tokens, second}, .reduction = size});
  op.arguments.push_back(
      {.name = "dloss", .element = Element::kFloat64, .shape = {2}, .values = constant(kFactor)});
  op.call = [=](Backend& backend, std::span<const Tensor> t) {
    const CrossEntropyOptions a{.first_vocabulary_id = 0, .z_loss = z_loss};
    const CrossEntropyOptions b{.first_vocabulary_id = first, .z_loss = z_loss};
    backend.cross_entropy_backward(t[0], t[3], t[2], t[5], kFactor, t[7], a);
    backend.cross_entropy_backward(t[1], t[4], t[2], t[6], kFactor, t[8], b);
  };
  op.reference = [=](std::vector<Numbers>& v) {
    const std::size_t count = v[2].size();
    for (std::size_t n = 0; n < count; ++n) {
      const auto target = static_cast<std::size_t>(v[2][n]);
      for (const std::size_t shard : {0U, 1U}) {
        const std::size_t width = v[shard].size() / count;
        const double log_z = v[3 + shard][n] + std::log(v[5 + shard][n]);
        for (std::size_t i = 0; i < width; ++i) {
          const std::size_t at = n * width + i;
          const double probability = std::exp(v[shard][at] - log_z);
          const bool is_target = shard * static_cast<std::size_t>(first) + i == target;
          v[7 + shard][at] =
              target == 0 ? 0 : kFactor * ((1 + 2 * z_loss * log_z) * probability - (is_target ? 1 : 0));
        }
      }
    }
  };
  return op;
}

// The pieces alone, of a whole vocabulary.
inline OpCase cross_entropy_max_case(index_t tokens, index_t size) {
  OpCase op;
  op.name = fmt::format("cross_entropy_max/{}x{}", tokens, size);
  op.arguments = {
      {.name = "logits", .element = Element::kStatistic, .shape = {tokens, size}},
      {.name = "row_max", .role = Role::kOutput, .element = Element::kStatistic, .shape = {tokens}}};
  op.call = [](Backend& backend, std::span<const Tensor> t) { backend.cross_entropy_max(t[0], t[1]); };
  op.reference = [=](std::vector<Numbers>& v) {
    for (std::size_t n = 0; n < v[1].size(); ++n) {
      const auto row = v[0].begin() + static_cast<std::ptrdiff_t>(n) * size;
      v[1][n] = *std::max_element(row, row + size);
    }
  };
  return op;
}

inline OpCase cross_entropy_sums_case(index_t tokens, index_t size) {
  OpCase op;
  op.name = fmt::format("cross_entropy_sums/{}x{}", tokens, size);
  op.arguments = {
      {.name = "logits", .element = Element::kStatistic, .shape = {tokens, size}},
      {.name = "row_max", .element = Element::kStatistic, .shape = {tokens}, .values = uniform(3, 5)},
      {.name = "targets", .element = Element::kInt32, .shape = {tokens}, .values = integers(0, size)},
      {.name = "sums",
       .role = Role::kOutput,
       .element = Element::kStatistic,
       .shape = {2, tokens},
       .reduction = static_cast<double>(size)}};
  op.call = [](Backend& backend, std::span<const Tensor> t) {
    backend.cross_entropy_sums(t[0], t[1], t[2], t[3], {});
  };
  op.reference = [=](std::vector<Numbers>& v) {
    const std::size_t count = v[1].size(), width = static_cast<std::size_t>(size);
    for (std::size_t n = 0; n < count; ++n) {
      v[3][n] = 0;
      for (std::size_t i = 0; i < width; ++i) v[3][n] += std::exp(v[0][n * width + i] - v[1][n]);
      v[3][count + n] = v[0][n * width + static_cast<std::size_t>(v[2][n])] - v[1][n];
    }
  };
  return op;
}

inline std::vector<OpCase> cross_entropy_cases() {
  return {cross_entropy_max_case(7, 97),
          cross_entropy_sums_case(7, 97),
          cross_entropy_case(7, 50, 47, 0),
          cross_entropy_case(70, 1501, 1600, 1e-2),
          cross_entropy_backward_case(7, 50, 47, 0),
          cross_entropy_backward_case(70, 1501, 1600, 1e-2)};
}

inline std::vector<std::pair<OpCase, OpCase>> cross_entropy_gradients() {
  return {{cross_entropy_case(7, 50, 47, 0), cross_entropy_backward_case(7, 50, 47, 0)},
          {cross_entropy_case(7, 13, 20, 0.05), cross_entropy_backward_case(7, 13, 20, 0.05)}};
}

}  // namespace regroup::test
