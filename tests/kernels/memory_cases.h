// Zeroing, copying, conversion, sums and products with a number.
#pragma once

#include "tests/support/op_case.h"

namespace regroup::test {

inline OpCase copy_case(std::vector<index_t> shape, index_t x_padding, index_t y_padding) {
  OpCase op;
  op.name = fmt::format("copy/{} elements/{} to {} between rows", count(shape), x_padding, y_padding);
  op.arguments = {{.name = "x", .shape = shape, .padding = x_padding},
                  {.name = "y", .role = Role::kOutput, .shape = shape, .padding = y_padding}};
  op.call = [](Backend& backend, std::span<const Tensor> t) { backend.copy(t[0], t[1]); };
  op.reference = [](std::vector<Numbers>& v) { v[1] = v[0]; };
  return op;
}

inline OpCase cast_case(index_t size, Element from, Element to) {
  OpCase op;
  op.name = fmt::format("cast/{}/{} to {}", size, static_cast<int>(from), static_cast<int>(to));
  op.arguments = {{.name = "x", .element = from, .shape = {size}},
                  {.name = "y", .role = Role::kOutput, .element = to, .shape = {size}}};
  op.call = [](Backend& backend, std::span<const Tensor> t) { backend.cast(t[0], t[1]); };
  op.reference = [](std::vector<Numbers>& v) { v[1] = v[0]; };
  return op;
}

// same_as: -1, 0 or 1
inline OpCase add_case(index_t rows, index_t columns, int same_as) {
  OpCase op;
  op.name = fmt::format("add/{}x{}/result {}", rows, columns, same_as);
  op.arguments = {{.name = "a", .shape = {rows, columns}},
                  {.name = "b", .shape = {rows, columns}},
                  {.name = "y", .role = Role::kOutput, .shape = {rows, columns}, .same_as = same_as}};
  op.call = [](Backend& backend, std::span<const Tensor> t) { backend.add(t[0], t[1], t[2]); };
  op.reference = [](std::vector<Numbers>& v) {
    for (std::size_t i = 0; i < v[2].size(); ++i) v[2][i] = v[0][i] + v[1][i];
  };
  return op;
}

inline OpCase scale_case(index_t size) {
  OpCase op;
  op.name = fmt::format("scale/{}", size);
  op.arguments = {{.name = "x", .role = Role::kAccumulated, .shape = {size}}};
  op.call = [](Backend& backend, std::span<const Tensor> t) { backend.scale(t[0], 0.375); };
  op.reference = [](std::vector<Numbers>& v) {
    for (double& x : v[0]) x *= 0.375;
  };
  return op;
}

inline OpCase fill_zero_case(index_t size) {
  OpCase op;
  op.name = fmt::format("fill_zero/{}", size);
  op.arguments = {{.name = "x", .role = Role::kOutput, .shape = {size}}};
  op.call = [](Backend& backend, std::span<const Tensor> t) { backend.fill_zero(t[0]); };
  op.reference = [](std::vector<Numbers>& v) { v[0].assign(v[0].size(), 0); };
  return op;
}

inline std::vector<OpCase> memory_cases() {
  return {copy_case({7, 20}, 0, 0),
          copy_case({7, 20}, 3, 0),
          copy_case({2, 3, 5, 4}, 0, 6),
          copy_case({300, 257}, 0, 0),
          cast_case(70001, Element::kCompute, Element::kStatistic),
          cast_case(70001, Element::kStatistic, Element::kCompute),
          cast_case(33, Element::kFloat64, Element::kStatistic),
          cast_case(33, Element::kCompute, Element::kFloat64),
          add_case(7, 20, -1),
          add_case(300, 257, 0),
          add_case(7, 20, 1),
          scale_case(70001),
          fill_zero_case(70001)};
}

}  // namespace regroup::test
