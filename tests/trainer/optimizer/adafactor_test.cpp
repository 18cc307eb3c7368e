// Whole updates of a whole parameter store against a second writing of t5x/adafactor.py in float64.
#include "trainer/optimizer/adafactor.h"

#include <cmath>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/make_backend.h"
#include "trainer/optimizer/adamw.h"

namespace regroup {
namespace {

// d_kv 64: multi-query k and v [64, 136] are not factored, q [128, 136] is.
ModelConfig config() {
  return {.vocab_size = 160,
          .d_model = 136,
          .d_kv = 64,
          .d_ff = 144,
          .num_heads = 2,
          .num_layers = 1,
          .num_decoder_layers = 1,
          .kv_groups = 1,
          .encoder_kv_groups = 2};
}

double root_mean_square(const std::vector<double>& values) {
  double sum = 0;
  for (const double v : values) sum += v * v;
  return std::sqrt(sum / static_cast<double>(values.size()));
}

// One parameter as T5X holds it: v_row is the mean over the larger dimension, v_col over the smaller.
class Reference {
 public:
  Reference(std::vector<index_t> shape, std::vector<double> weight)
      : shape_(std::move(shape)), weight_(std::move(weight)) {
    factored_ = shape_.size() == 2 && std::min(shape_[0], shape_[1]) >= 128;
    v_.assign(weight_.size(), 0);
    if (!factored_) return;
    // numpy's argsort()[-1]: of equal dimensions the later one.
    larger_ = shape_[1] >= shape_[0] ? 1 : 0;
    row_.assign(static_cast<std::size_t>(shape_[static_cast<std::size_t>(1 - larger_)]), 0);
    column_.assign(static_cast<std::size_t>(shape_[static_cast<std::size_t>(larger_)]), 0);
  }

  void update(const std::vector<double>& g, double step, double rate) {
    const double beta2 = 1 - std::pow(step + 1, -0.8);
    std::vector<double> y(g.size());
    if (factored_) {
      std::vector<double> row_mean(row_.size()), column_mean(column_.size());
      each([&](std::size_t i, std::size_t r, std::size_t c) {
        const double square = g[i] * g[i] + 1e-30;
        row_mean[r] += square / static_cast<double>(column_.size());
        column_mean[c] += square / static_cast<double>(row_.size());
      });
      double mean = 0;
      for (std::size_t r = 0; r < row_.size(); ++r) {
        row_[r] = beta2 * row_[r] + (1 - beta2) * row_mean[r];
        mean += row_[r] / static_cast<double>(row_.size());
      }
      for (std::size_t c = 0; c < column_.size(); ++c)
        column_[c] = beta2 * column_[c] + (1 - beta2) * column_mean[c];
      each([&](std::size_t i, std::size_t r, std::size_t c) {
        y[i] = g[i] / std::sqrt(row_[r] / mean) / std::sqrt(column_[c]);
      });
    } else {
      for (std::size_t i = 0; i < g.size(); ++i) {
        v_[i] = beta2 * v_[i] + (1 - beta2) * (g[i] * g[i] + 1e-30);
        y[i] = g[i] / std::sqrt(v_[i]);
      }
    }
    const double clip = std::max(1.0, root_mean_square(y));
    const double scale = std::max(1e-3, root_mean_square(weight_));
    for (std::size_t i = 0; i < g.size(); ++i) weight_[i] -= rate * scale * y[i] / clip;
  }

  const std::vector<double>& weight() const { return weight_; }

 private:
  template <class F>
  void each(F&& f) const {
    for (index_t a = 0; a < shape_[0]; ++a) {
      for (index_t b = 0; b < shape_[1]; ++b) {
        const auto r = static_cast<std::size_t>(larger_ == 1 ? a : b);
        const auto c = static_cast<std::size_t>(larger_ == 1 ? b : a);
        f(static_cast<std::size_t>(a * shape_[1] + b), r, c);
      }
    }
  }

  std::vector<index_t> shape_;
  std::vector<double> weight_, v_, row_, column_;
  bool factored_ = false;
  int larger_ = 1;
};

std::vector<double> values_of(Tensor tensor) {
  return {tensor.as<double>(), tensor.as<double>() + tensor.numel()};
}

void draw_gradients(ParameterStore& store, std::uint64_t step) {
  for (std::size_t i = 0; i < store.size(); ++i) {
    const Philox philox(step, RandomPurpose::kTest, i);
    double* const gradient = store.gradient(i).as<double>();
    // Sizes that differ by parameter and element, as real ones do.
    for (index_t k = 0; k < store.gradient(i).numel(); ++k) {
      gradient[k] = philox.normal(static_cast<std::uint64_t>(k)) *
                    std::pow(10.0, static_cast<double>((k + static_cast<index_t>(i)) % 5) - 6);
    }
  }
}

TEST(Adafactor, IsThatOfT5X) {
  const auto owned = make_backend({.threads = 2});
  Backend& backend = *owned;
  const Mesh mesh = Mesh::plan({.data_parallel = 1, .tensor_parallel = 1}, 0, {1, 2});
  ParameterStore store(backend, config(), {.compute = DType::kFloat64});
  store.initialise(3);
  Adafactor optimizer(backend, store, mesh, {});
  std::vector<Reference> references;
  for (std::size_t i = 0; i < store.size(); ++i)
    references.emplace_back(store.table()[i].shape, values_of(store.master(i)));
  for (index_t step = 0; step < 4; ++step) {
    draw_gradients(store, static_cast<std::uint64_t>(step));
    double squares = 0;
    for (std::size_t i = 0; i < store.size(); ++i) {
      const std::vector<double> gradient = values_of(store.gradient(i));
      for (const double g : gradient) squares += g * g;
      references[i].update(gradient, static_cast<double>(step), 0.01);
    }
    EXPECT_NEAR(optimizer.update(step, 0.01), std::sqrt(squares), 1e-12 * std::sqrt(squares));
    for (std::size_t i = 0; i < store.size(); ++i) {
      const std::vector<double> weight = values_of(store.master(i));
      for (std::size_t k = 0; k < weight.size(); ++k) {
        ASSERT_NEAR(weight[k], references[i].weight()[k], 1e-11)
            << store.table()[i].name << " at step " << step;
      }
    }
  }
}

TEST(Adafactor, FactorsOnlyWhatIsLargeBothWays) {
  const auto owned = make_backend({.threads = 1});
  Backend& backend = *owned;
  const Mesh mesh = Mesh::plan({.data_parallel = 1, .tensor_parallel = 1}, 0, {1, 2});
  ParameterStore store(backend, config(), {});
  const Adafactor optimizer(backend, store, mesh, {});
  std::map<std::string, std::vector<index_t>> shapes;
  for (const ShardedTensor& tensor : optimizer.state()) shapes[tensor.name] = tensor.shape;
  const std::string decoder = "decoder.block.0.layer.0.SelfAttention.";
  EXPECT_EQ(shapes.at(decoder + "k.weight.second_moment"), (std::vector<index_t>{64, 136}));
  EXPECT_EQ(shapes.at(decoder + "q.weight.second_moment_row"), (std::vector<index_t>{128}));
  EXPECT_EQ(shapes.at(decoder + "q.weight.second_moment_column"), (std::vector<index_t>{136}));
  EXPECT_EQ(shapes.at("shared.weight.second_moment_row"), (std::vector<index_t>{160}));
  EXPECT_EQ(shapes.at("decoder.final_layer_norm.weight.second_moment"), (std::vector<index_t>{136}));
}

// Moments that start fresh at the parent's step move weights as at step 0; without the offset the first
// update is clipped and later ones hardly move.
TEST(Adafactor, StepOffsetStartsAfresh) {
  const auto owned = make_backend({.threads = 1});
  Backend& backend = *owned;
  const Mesh mesh = Mesh::plan({.data_parallel = 1, .tensor_parallel = 1}, 0, {1, 2});
  const auto weights_after = [&](index_t first_step) {
    ParameterStore store(backend, config(), {.compute = DType::kFloat64});
    store.initialise(3);
    Adafactor optimizer(backend, store, mesh, {.step_offset = first_step});
    for (index_t step = first_step; step < first_step + 3; ++step) {
      draw_gradients(store, static_cast<std::uint64_t>(step - first_step));
      optimizer.update(step, 0.01);
    }
    return values_of(store.all_masters());
  };
  EXPECT_EQ(weights_after(0), weights_after(1000000));
}

// Each parameter moves as in a run in which all have its offset.
template <class AnOptimizer>
void expect_offsets_of_their_own(const typename AnOptimizer::Options& base) {
  const auto owned = make_backend({.threads = 1});
  Backend& backend = *owned;
  const Mesh mesh = Mesh::plan({.data_parallel = 1, .tensor_parallel = 1}, 0, {1, 2});
  constexpr index_t kFirst = 7;
  const auto weights_after = [&](index_t offset, const MomentOffsets& others) {
    ParameterStore store(backend, config(), {.compute = DType::kFloat64});
    store.initialise(3);
    typename AnOptimizer::Options options = base;
    options.step_offset = offset;
    options.step_offsets = others;
    AnOptimizer optimizer(backend, store, mesh, options);
    for (index_t step = kFirst; step < kFirst + 3; ++step) {
      draw_gradients(store, static_cast<std::uint64_t>(step));
      optimizer.update(step, 0.01);
    }
    std::vector<std::vector<double>> weights;
    for (std::size_t i = 0; i < store.size(); ++i) weights.push_back(values_of(store.master(i)));
    return weights;
  };
  MomentOffsets others;
  std::vector<bool> is_other;
  for (const ParameterSpec& spec : parameter_table(config())) {
    is_other.push_back(spec.name.find("SelfAttention") == std::string::npos);
    if (is_other.back()) others[spec.name] = 2;
  }
  const auto mixed = weights_after(kFirst, others), fresh = weights_after(kFirst, {}),
             old = weights_after(2, {});
  for (std::size_t i = 0; i < mixed.size(); ++i) {
    EXPECT_EQ(mixed[i], is_other[i] ? old[i] : fresh[i]) << i;
    EXPECT_NE(old[i], fresh[i]) << i;
  }
}

TEST(Adafactor, OffsetsOfTheirOwn) { expect_offsets_of_their_own<Adafactor>({}); }
TEST(AdamW, OffsetsOfTheirOwn) { expect_offsets_of_their_own<AdamW>({}); }

// A gradient above the largest norm that is asked for, or not finite, leaves weights and state as they were.
template <class AnOptimizer>
void expect_bad_gradients_change_nothing(const typename AnOptimizer::Options& options) {
  const auto owned = make_backend({.threads = 1});
  Backend& backend = *owned;
  const Mesh mesh = Mesh::plan({.data_parallel = 1, .tensor_parallel = 1}, 0, {1, 2});
  ParameterStore store(backend, config(), {.compute = DType::kFloat64});
  store.initialise(3);
  AnOptimizer optimizer(backend, store, mesh, options);
  const auto everything = [&] {
    std::vector<std::vector<double>> all = {values_of(store.all_masters())};
    for (const ShardedTensor& tensor : optimizer.state()) all.push_back(values_of(tensor.local));
    return all;
  };
  draw_gradients(store, 0);
  const double norm = optimizer.update(0, 0.01);
  const auto before = everything();
  draw_gradients(store, 0);
  EXPECT_EQ(optimizer.update(1, 0.01, [](double) { return false; }), norm);
  EXPECT_EQ(everything(), before);
  for (const double bad :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    draw_gradients(store, 0);
    store.gradient(2).as<double>()[5] = bad;
    EXPECT_FALSE(std::isfinite(optimizer.update(1, 0.01)));
    EXPECT_EQ(everything(), before);
  }
  draw_gradients(store, 0);
  EXPECT_EQ(optimizer.update(1, 0.01, [](double) { return true; }), norm);
  EXPECT_NE(everything(), before);
}

TEST(Adafactor, BadGradientsChangeNothing) {
  expect_bad_gradients_change_nothing<Adafactor>({});
  expect_bad_gradients_change_nothing<Adafactor>({.max_gradient_norm = 1e-3});
}

TEST(AdamW, BadGradientsChangeNothing) {
  expect_bad_gradients_change_nothing<AdamW>({});
  expect_bad_gradients_change_nothing<AdamW>({.max_gradient_norm = 1e-3});
}

TEST(AdamW, IsTheUsualOne) {
  const auto owned = make_backend({.threads = 1});
  Backend& backend = *owned;
  const Mesh mesh = Mesh::plan({.data_parallel = 1, .tensor_parallel = 1}, 0, {1, 2});
  ParameterStore store(backend, config(), {.compute = DType::kFloat64});
  store.initialise(3);
  AdamW optimizer(backend, store, mesh, {.weight_decay = 0.1});
  const std::size_t index = 1;
  std::vector<double> w = values_of(store.master(index)), m(w.size()), v(w.size());
  for (index_t step = 0; step < 3; ++step) {
    draw_gradients(store, static_cast<std::uint64_t>(step));
    const std::vector<double> g = values_of(store.gradient(index));
    optimizer.update(step, 0.01);
    const auto t = static_cast<double>(step + 1);
    for (std::size_t i = 0; i < w.size(); ++i) {
      m[i] = 0.9 * m[i] + 0.1 * g[i];
      v[i] = 0.999 * v[i] + 0.001 * g[i] * g[i];
      const double corrected =
          m[i] / (1 - std::pow(0.9, t)) / (std::sqrt(v[i] / (1 - std::pow(0.999, t))) + 1e-8);
      w[i] -= 0.01 * corrected + 0.01 * 0.1 * w[i];
      ASSERT_NEAR(store.master(index).as<double>()[i], w[i], 1e-12);
    }
  }
}

}  // namespace
}  // namespace regroup
