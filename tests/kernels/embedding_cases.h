// Embedding and relative position bias.
#pragma once

#include "tests/support/op_case.h"

namespace regroup::test {

// A table of `rows` ids from `first_id` on; ids reach below and above it.
inline OpCase embedding_case(index_t tokens, index_t rows, index_t columns, index_t first_id) {
  OpCase op;
  op.name = fmt::format("embedding/{} of {}x{} from {}", tokens, rows, columns, first_id);
  op.arguments = {{.name = "ids",
                   .element = Element::kInt32,
                   .shape = {tokens},
                   .values = integers(0, first_id + rows + 9)},
                  {.name = "table", .shape = {rows, columns}},
                  {.name = "y", .role = Role::kOutput, .shape = {tokens, columns}}};
  op.call = [=](Backend& backend, std::span<const Tensor> t) {
    backend.embedding(t[0], t[1], first_id, t[2]);
  };
  op.reference = [=](std::vector<Numbers>& v) {
    for (std::size_t i = 0; i < v[2].size(); ++i) {
      const auto n = static_cast<index_t>(i);
      const index_t row = static_cast<index_t>(v[0][static_cast<std::size_t>(n / columns)]) - first_id;
      const bool here = row >= 0 && row < rows;
      v[2][i] = here ? v[1][static_cast<std::size_t>(row * columns + n % columns)] : 0;
    }
  };
  return op;
}

inline OpCase embedding_backward_case(index_t tokens, index_t rows, index_t columns, index_t first_id) {
  OpCase op;
  op.name = fmt::format("embedding_backward/{} of {}x{} from {}", tokens, rows, columns, first_id);
  op.arguments = {{.name = "ids",
                   .element = Element::kInt32,
                   .shape = {tokens},
                   .values = integers(0, first_id + rows + 9)},
                  {.name = "dy", .shape = {tokens, columns}},
                  {.name = "dtable",
                   .role = Role::kAccumulated,
                   .element = Element::kStatistic,
                   .shape = {rows, columns},
                   .reduction = static_cast<double>(tokens)}};
  op.call = [=](Backend& backend, std::span<const Tensor> t) {
    backend.embedding_backward(t[0], t[1], first_id, t[2]);
  };
  op.reference = [=](std::vector<Numbers>& v) {
    for (std::size_t i = 0; i < v[1].size(); ++i) {
      const auto n = static_cast<index_t>(i);
      const index_t row = static_cast<index_t>(v[0][static_cast<std::size_t>(n / columns)]) - first_id;
      if (row >= 0 && row < rows) v[2][static_cast<std::size_t>(row * columns + n % columns)] += v[1][i];
    }
  };
  return op;
}

// The bucket by T5's published thresholds for 32 buckets and distance 128 (no logarithm).
inline index_t golden_bucket(index_t distance, bool bidirectional) {
  constexpr index_t kCausal[] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                 16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113};
  constexpr index_t kBidirectional[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91};
  const std::span<const index_t> starts =
      bidirectional ? std::span<const index_t>(kBidirectional) : std::span<const index_t>(kCausal);
  const index_t past = bidirectional && distance > 0 ? distance : -distance;
  index_t bucket = 0;
  while (bucket + 1 < static_cast<index_t>(starts.size()) &&
         starts[static_cast<std::size_t>(bucket + 1)] <= past) {
    ++bucket;
  }
  return bucket + (bidirectional && distance > 0 ? 16 : 0);
}

inline OpCase relative_bias_case(index_t queries, index_t keys, index_t heads, bool bidirectional) {
  const index_t offsets = queries + keys - 1;
  OpCase op;
  op.name = fmt::format("relative_bias/{}x{}x{}{}", heads, queries, keys, bidirectional ? "/both ways" : "");
  op.arguments = {
      {.name = "table", .shape = {32, heads}},
      {.name = "bias", .role = Role::kOutput, .element = Element::kStatistic, .shape = {heads, offsets}}};
  op.call = [=](Backend& backend, std::span<const Tensor> t) {
    backend.relative_bias(t[0], queries, t[1], {.bidirectional = bidirectional});
  };
  op.reference = [=](std::vector<Numbers>& v) {
    for (index_t h = 0; h < heads; ++h) {
      for (index_t o = 0; o < offsets; ++o) {
        const index_t bucket = golden_bucket(o - queries + 1, bidirectional);
        v[1][static_cast<std::size_t>(h * offsets + o)] = v[0][static_cast<std::size_t>(bucket * heads + h)];
      }
    }
  };
  return op;
}

inline OpCase relative_bias_backward_case(index_t queries, index_t keys, index_t heads, bool bidirectional) {
  const index_t offsets = queries + keys - 1;
  OpCase op;
  op.name = fmt::format("relative_bias_backward/{}x{}x{}{}", heads, queries, keys,
                        bidirectional ? "/both ways" : "");
  op.arguments = {{.name = "dbias", .element = Element::kStatistic, .shape = {heads, offsets}},
                  {.name = "dtable",
                   .role = Role::kAccumulated,
                   .element = Element::kStatistic,
                   .shape = {32, heads},
                   .reduction = static_cast<double>(offsets)}};
  op.call = [=](Backend& backend, std::span<const Tensor> t) {
    backend.relative_bias_backward(t[0], queries, t[1], {.bidirectional = bidirectional});
  };
  op.reference = [=](std::vector<Numbers>& v) {
    for (index_t h = 0; h < heads; ++h) {
      for (index_t o = 0; o < offsets; ++o) {
        const index_t bucket = golden_bucket(o - queries + 1, bidirectional);
        v[1][static_cast<std::size_t>(bucket * heads + h)] += v[0][static_cast<std::size_t>(h * offsets + o)];
      }
    }
  };
  return op;
}

inline std::vector<OpCase> embedding_cases() {
  return {embedding_case(7, 97, 20, 0),
          embedding_case(203, 50, 131, 13),
          embedding_backward_case(7, 97, 20, 0),
          embedding_backward_case(203, 50, 131, 13),
          relative_bias_case(7, 11, 3, true),
          relative_bias_case(300, 160, 5, false),
          relative_bias_backward_case(7, 11, 3, false),
          relative_bias_backward_case(300, 160, 5, true)};
}

inline std::vector<std::pair<OpCase, OpCase>> embedding_gradients() {
  return {{embedding_case(17, 9, 5, 2), embedding_backward_case(17, 9, 5, 2)},
          {relative_bias_case(19, 23, 3, true), relative_bias_backward_case(19, 23, 3, true)},
          {relative_bias_case(23, 19, 3, false), relative_bias_backward_case(23, 19, 3, false)}};
}

}  // namespace regroup::test
