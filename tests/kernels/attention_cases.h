// Grouped-query attention.
#pragma once

#include <cmath>
#include <limits>

#include "tests/support/op_case.h"

namespace regroup::test {

enum class Mask { kNone, kTrailing, kScattered, kBlindSample };

struct AttentionCase {
  index_t samples = 2, queries = 1, keys = 1, heads = 1, groups = 1, size = 1;
  bool bias = false, causal = false;
  Mask mask = Mask::kNone;
  double dropout = 0;
  index_t padding = 0;  // q, k, v, out and their gradients are parts of rows wider by this many elements

  std::string name() const {
    constexpr const char* kMasks[] = {"unmasked", "trailing", "scattered", "blind"};
    return fmt::format("B{}_Q{}_K{}_H{}_G{}_C{}_{}_{}_{}{}{}", samples, queries, keys, heads, groups, size,
                       bias ? "bias" : "plain", causal ? "causal" : "full", kMasks[static_cast<int>(mask)],
                       dropout > 0 ? "_dropout" : "", padding > 0 ? "_strided" : "");
  }
  AttentionOptions options() const {
    return {.causal = causal,
            .dropout_rate = dropout,
            .dropout_key = Philox(17, RandomPurpose::kTest, 4),
            .first_sample = 5,
            .first_head = 2,
            .heads = heads + 3};
  }
};

// Rounding after each step: none for the exact result, to bfloat16 for what a naive implementation in that
// type (one that stores scores and probabilities) would get.
using Rounding = std::function<double(double)>;
inline double exact(double x) { return x; }
inline double to_bfloat16(double x) {
  return static_cast<double>(static_cast<float>(bfloat16(static_cast<float>(x))));
}

// Loops over definitions.
class NaiveAttention {
 public:
  NaiveAttention(const AttentionCase& shape, Rounding round) : c_(shape), round_(std::move(round)) {}

  // v: q, k, v, bias, key_mask, out, log_sum_exp
  void forward(std::vector<Numbers>& v) const {
    each_query([&](index_t b, index_t h, index_t i) {
      const Numbers s = scores(v[0], v[1], v[3], v[4], b, h, i);
      double top = -std::numeric_limits<double>::infinity(), sum = 0;
      for (const double x : s) top = std::max(top, x);
      for (const double x : s) sum += std::isinf(top) ? 0 : std::exp(x - top);
      v[6][at((b * c_.heads + h) * c_.queries + i)] =
          sum > 0 ? top + std::log(sum) : std::numeric_limits<double>::infinity();
      for (index_t n = 0; n < c_.size; ++n) {
        double out = 0;
        for (index_t j = 0; j < c_.keys && sum > 0; ++j) {
          out += round_(std::exp(s[at(j)] - top) / sum) * factor(b, h, i, j) * v[2][key(b, j, h, n)];
        }
        v[5][query(b, i, h, n)] = round_(out);
      }
    });
  }

  // v: dout, q, k, v, bias, key_mask, out, log_sum_exp, dq, dk, dv, dbias
  void backward(std::vector<Numbers>& v) const {
    for (const int output : {8, 9, 10}) std::fill(v[at(output)].begin(), v[at(output)].end(), 0.0);
    each_query([&](index_t b, index_t h, index_t i) {
      const Numbers s = scores(v[1], v[2], v[4], v[5], b, h, i);
      double delta = 0;
      for (index_t n = 0; n < c_.size; ++n) delta += v[0][query(b, i, h, n)] * v[6][query(b, i, h, n)];
      for (index_t j = 0; j < c_.keys; ++j) {
        if (std::isinf(s[at(j)])) continue;
        const double p = std::exp(s[at(j)] - v[7][at((b * c_.heads + h) * c_.queries + i)]);
        const double m = factor(b, h, i, j);
        double dp = 0;
        for (index_t n = 0; n < c_.size; ++n) dp += v[0][query(b, i, h, n)] * v[3][key(b, j, h, n)];
        const double ds = round_(p * (round_(dp) * m - delta)), kept = round_(p * m);
        for (index_t n = 0; n < c_.size; ++n) {
          v[8][query(b, i, h, n)] += ds * v[2][key(b, j, h, n)];
          v[9][key(b, j, h, n)] += ds * v[1][query(b, i, h, n)];
          v[10][key(b, j, h, n)] += kept * v[0][query(b, i, h, n)];
        }
        if (!v[11].empty()) v[11][diagonal(h, i, j)] += ds;
      }
    });
    for (const int output : {8, 9, 10}) {
      for (double& x : v[at(output)]) x = round_(x);
    }
  }

 private:
  static std::size_t at(index_t i) { return static_cast<std::size_t>(i); }
  std::size_t query(index_t b, index_t i, index_t h, index_t n) const {
    return at(((b * c_.queries + i) * c_.heads + h) * c_.size + n);
  }
  std::size_t key(index_t b, index_t j, index_t h, index_t n) const {
    const index_t group = h / (c_.heads / c_.groups);
    return at(((b * c_.keys + j) * c_.groups + group) * c_.size + n);
  }
  std::size_t diagonal(index_t h, index_t i, index_t j) const {
    return at(h * (c_.queries + c_.keys - 1) + j - i + c_.queries - 1);
  }
  template <class F>
  void each_query(F f) const {
    for (index_t b = 0; b < c_.samples; ++b) {
      for (index_t h = 0; h < c_.heads; ++h) {
        for (index_t i = 0; i < c_.queries; ++i) f(b, h, i);
      }
    }
  }
  Numbers scores(const Numbers& q, const Numbers& k, const Numbers& bias, const Numbers& mask, index_t b,
                 index_t h, index_t i) const {
    Numbers s(at(c_.keys));
    for (index_t j = 0; j < c_.keys; ++j) {
      double sum = 0;
      for (index_t n = 0; n < c_.size; ++n) sum += q[query(b, i, h, n)] * k[key(b, j, h, n)];
      s[at(j)] = bias.empty() ? round_(sum) : round_(round_(sum) + bias[diagonal(h, i, j)]);
      if ((c_.causal && j > i) || (!mask.empty() && mask[at(b * c_.keys + j)] == 0)) {
        s[at(j)] = -std::numeric_limits<double>::infinity();
      }
    }
    return s;
  }
  double factor(index_t b, index_t h, index_t i, index_t j) const {
    if (c_.dropout == 0) return 1;
    const AttentionOptions o = c_.options();
    const auto e = static_cast<std::uint64_t>(
        (((o.first_sample + b) * o.heads + o.first_head + h) * c_.queries + i) * c_.keys + j);
    return o.dropout_key(e / 4)[e % 4] >= c_.dropout * 0x1p32 ? 1 / (1 - c_.dropout) : 0;
  }

  AttentionCase c_;
  Rounding round_;
};

inline Values mask_values(const AttentionCase& c) {
  return [c](const Philox& random, index_t i) -> double {
    const index_t sample = i / c.keys, key = i % c.keys;
    switch (c.mask) {
      case Mask::kTrailing:
        return key < c.keys - (sample + 1) * c.keys / (2 * c.samples);
      case Mask::kScattered:
        return random.below(3, static_cast<std::uint64_t>(i)) > 0;
      case Mask::kBlindSample:
        return sample > 0;
      case Mask::kNone:
        break;
    }
    return 1;
  };
}

inline OpCase attention_case(const AttentionCase& c) {
  const std::vector<index_t> query = {c.samples, c.queries, c.heads, c.size},
                             key = {c.samples, c.keys, c.groups, c.size};
  const auto terms = static_cast<double>(c.keys + c.size);
  OpCase op;
  op.name = "attention/" + c.name();
  op.arguments = {
      {.name = "q", .shape = query, .values = normal(0.4), .padding = c.padding, .row_rank = 2},
      {.name = "k", .shape = key, .values = normal(0.6), .padding = c.padding, .row_rank = 2},
      {.name = "v", .shape = key, .padding = c.padding, .row_rank = 2},
      {.name = "bias",
       .element = Element::kStatistic,
       .shape = c.bias ? std::vector<index_t>{c.heads, c.queries + c.keys - 1} : std::vector<index_t>{}},
      {.name = "key_mask",
       .element = Element::kInt32,
       .shape = c.mask == Mask::kNone ? std::vector<index_t>{} : std::vector<index_t>{c.samples, c.keys},
       .values = mask_values(c)},
      {.name = "out",
       .role = Role::kOutput,
       .shape = query,
       .padding = c.padding,
       .row_rank = 2,
       .reduction = terms},
      {.name = "log_sum_exp",
       .role = Role::kOutput,
       .element = Element::kStatistic,
       .shape = {c.samples, c.heads, c.queries},
       .reduction = terms,
       .magnitude = 1}};
  op.call = [c](Backend& backend, std::span<const Tensor> t) {
    backend.attention(t[0], t[1], t[2], t[3], t[4], t[5], t[6], c.options());
  };
  op.reference = [c](std::vector<Numbers>& v) {
    NaiveAttention(c, exact).forward(v);
    if (c.mask == Mask::kNone) return;
    for (double& x : v[6]) x = std::isinf(x) ? std::numeric_limits<double>::infinity() : x;
  };
  return op;
}

// `out` and `log_sum_exp` are what the formula takes them to be: here numbers of their usual size.
inline OpCase attention_backward_case(const AttentionCase& c) {
  const OpCase forward = attention_case(c);
  const auto input = [&](std::size_t i) {
    Argument argument = forward.arguments[i];
    argument.role = Role::kInput;
    return argument;
  };
  // |ds| <= p (|dp| + |delta|), which cancel; dp has `size` terms of products of normal numbers.
  const auto cancelled = static_cast<double>(c.size);
  const auto gradient = [&](std::size_t i, double sums, double magnitude) {
    Argument argument = forward.arguments[i];
    argument.name = "d" + argument.name;
    argument.role = Role::kOutput;
    argument.reduction = static_cast<double>(c.size) + sums;
    argument.magnitude = magnitude;
    return argument;
  };
  const auto over_queries = static_cast<double>(c.queries * (c.heads / c.groups));
  OpCase op;
  op.name = "attention_backward/" + c.name();
  op.arguments = {gradient(5, 0, 0),
                  input(0),
                  input(1),
                  input(2),
                  input(3),
                  input(4),
                  input(5),
                  input(6),
                  gradient(0, static_cast<double>(c.keys), cancelled),
                  gradient(1, over_queries, cancelled),
                  gradient(2, over_queries, cancelled),
                  gradient(3, static_cast<double>(c.samples * c.queries), cancelled)};
  op.arguments[0].role = Role::kInput;
  op.arguments[6].values = normal(0.3);
  const double usual = std::log(static_cast<double>(c.keys)) + 1;
  op.arguments[7].values = uniform(usual, usual + 1);
  op.arguments[11].role = Role::kAccumulated;
  op.call = [c](Backend& backend, std::span<const Tensor> t) {
    backend.attention_backward(t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9], t[10], t[11],
                               c.options());
  };
  op.reference = [c](std::vector<Numbers>& v) { NaiveAttention(c, exact).backward(v); };
  return op;
}

struct Errors {
  double naive = 0, own = 0, scale = 0;
};

// Largest errors against `want`.
inline Errors errors_of(const Numbers& want, const Numbers& naive, const Numbers& own) {
  Errors errors{.scale = largest(want)};
  for (std::size_t n = 0; n < want.size(); ++n) {
    if (std::isinf(want[n])) {
      EXPECT_EQ(own[n], want[n]);
      continue;
    }
    EXPECT_FALSE(std::isnan(own[n]));
    errors.naive = std::max(errors.naive, std::abs(naive[n] - want[n]));
    errors.own = std::max(errors.own, std::abs(own[n] - want[n]));
  }
  return errors;
}

// The rule of FlashAttention's tests: an error of at most twice the naive implementation's, plus one
// rounding.
inline void expect_no_worse_than_naive(const OpCase& op, const std::vector<Numbers>& want,
                                       const std::vector<Numbers>& naive, const std::vector<Numbers>& own) {
  for (std::size_t i = 0; i < op.arguments.size(); ++i) {
    const Argument& argument = op.arguments[i];
    if (argument.role == Role::kInput || argument.shape.empty()) continue;
    const Errors errors = errors_of(want[i], naive[i], own[i]);
    EXPECT_LE(errors.own, 2 * errors.naive + unit_roundoff(DType::kBFloat16) * errors.scale)
        << op.name << ": " << argument.name << ", of at most " << errors.scale;
  }
}

// Every combination of options, at lengths that fill no tile.
inline std::vector<AttentionCase> attention_combinations(index_t queries, index_t keys, index_t size) {
  std::vector<AttentionCase> all;
  for (const auto& [heads, groups] : {std::pair<index_t, index_t>{4, 4}, {4, 1}, {6, 2}, {6, 3}}) {
    for (const bool bias : {false, true}) {
      for (const bool causal : {false, true}) {
        for (const Mask mask : {Mask::kNone, Mask::kTrailing, Mask::kScattered, Mask::kBlindSample}) {
          all.push_back({.queries = queries,
                         .keys = keys,
                         .heads = heads,
                         .groups = groups,
                         .size = size,
                         .bias = bias,
                         .causal = causal,
                         .mask = mask});
        }
      }
    }
  }
  return all;
}

// Lengths around and beyond tiles, packed rows, dropout.
inline std::vector<AttentionCase> attention_shapes() {
  return {
      {.queries = 114, .keys = 114, .heads = 6, .groups = 2, .size = 64, .bias = true, .causal = true},
      {.queries = 114, .keys = 150, .heads = 3, .groups = 1, .size = 64, .mask = Mask::kTrailing},
      {.queries = 77, .keys = 300, .heads = 2, .groups = 2, .size = 64, .bias = true, .padding = 128},
      {.queries = 130, .keys = 77, .heads = 2, .groups = 1, .size = 20, .bias = true, .causal = true},
      {.queries = 77, .keys = 130, .heads = 2, .groups = 1, .size = 20, .causal = true, .padding = 4},
      {.queries = 1, .keys = 131, .heads = 2, .groups = 1, .size = 64, .mask = Mask::kScattered},
      {.queries = 13, .keys = 1, .heads = 2, .groups = 1, .size = 17},
      {.queries = 1, .keys = 1, .heads = 1, .groups = 1, .size = 1, .bias = true},
      {.queries = 3, .keys = 700, .heads = 1, .groups = 1, .size = 80},
      {.queries = 70, .keys = 133, .heads = 4, .groups = 2, .size = 12, .bias = true, .dropout = 0.1},
      {.samples = 3,
       .queries = 70,
       .keys = 70,
       .heads = 4,
       .groups = 1,
       .size = 33,
       .bias = true,
       .causal = true,
       .mask = Mask::kScattered,
       .dropout = 0.1,
       .padding = 7},
      // Of head sizes that tensor cores take: several tiles of queries and keys, hidden tiles, dropout whose
      // counters begin anywhere.
      {.queries = 150,
       .keys = 133,
       .heads = 4,
       .groups = 2,
       .size = 64,
       .bias = true,
       .mask = Mask::kScattered,
       .dropout = 0.1},
      {.queries = 131, .keys = 131, .heads = 2, .groups = 1, .size = 64, .causal = true, .dropout = 0.2},
      {.queries = 140,
       .keys = 200,
       .heads = 2,
       .groups = 1,
       .size = 128,
       .bias = true,
       .mask = Mask::kTrailing},
      {.samples = 1,
       .queries = 200,
       .keys = 90,
       .heads = 2,
       .groups = 2,
       .size = 128,
       .causal = true,
       .dropout = 0.1},
      {.queries = 33, .keys = 140, .heads = 3, .groups = 1, .size = 8, .mask = Mask::kBlindSample},
      {.queries = 129,
       .keys = 70,
       .heads = 2,
       .groups = 1,
       .size = 24,
       .bias = true,
       .causal = true,
       .padding = 8},
      {.samples = 1,
       .queries = 90,
       .keys = 100,
       .heads = 1,
       .groups = 1,
       .size = 72,
       .bias = true,
       .dropout = 0.1},
  };
}

}  // namespace regroup::test
