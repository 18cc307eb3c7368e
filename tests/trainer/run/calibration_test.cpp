// The second moments of attentions' inputs against a plain computation in float64, and in every layout.
#include "trainer/run/calibration.h"

#include <cmath>
#include <map>
#include <numeric>

#include <gtest/gtest.h>

#include "parallel/host_staged_communicator.h"
#include "tests/data/corpus_fixture.h"
#include "tests/support/devices.h"
#include "tests/trainer/checkpoint/shared_directory.h"

namespace regroup {
namespace {

constexpr index_t kSamples = 8, kInputs = 13, kTargets = 7, kVocabulary = 256;
constexpr index_t kSites = 6;
constexpr std::uint64_t kSeed = 23;

// d_kv does not divide d_model, and neither do 4 ranks.
ModelConfig tiny() {
  return {.vocab_size = kVocabulary,
          .d_model = 42,
          .d_kv = 16,
          .d_ff = 48,
          .num_heads = 4,
          .num_layers = 2,
          .num_decoder_layers = 2,
          .kv_groups = 2,
          .encoder_kv_groups = 4};
}

struct Lengths {
  index_t inputs = kInputs, targets = kTargets;
};

// The samples [first, first + count), none the length of another, padded with 0.
Batch batch_of(index_t first, index_t count, Lengths lengths = {}) {
  Batch batch{.first_sample = first,
              .size = count,
              .inputs_length = lengths.inputs,
              .targets_length = lengths.targets};
  for (index_t n = first; n < first + count; ++n) {
    const Philox philox(kSeed, RandomPurpose::kTest, static_cast<std::uint64_t>(n));
    const auto fill = [&](std::vector<std::int32_t>& ids, index_t real, index_t length,
                          std::uint64_t stream) {
      for (index_t i = 0; i < length; ++i) {
        const auto id = 2 + philox.below(kVocabulary - 2, stream + static_cast<std::uint64_t>(i));
        ids.push_back(i < real ? static_cast<std::int32_t>(id) : 0);
      }
    };
    fill(batch.input_ids, 3 + (n * 3) % 8, lengths.inputs, 0);
    fill(batch.targets, 1 + (n * 3) % 5, lengths.targets, 1000);
  }
  return batch;
}

std::vector<index_t> all_sites() {
  std::vector<index_t> sites(kSites);
  std::iota(sites.begin(), sites.end(), 0);
  return sites;
}

// A model on a mesh.
struct Rig {
  Rig(DeviceKind device, const ProcessGroup& ranks, Layout layout, DType compute = DType::kFloat32,
      Lengths lengths = {}, const ModelConfig& config = tiny())
      : group(ranks),
        backend(test::make_test_backend(device, 1)),
        mesh(group, layout, {config.kv_groups, config.encoder_kv_groups},
             [this](std::string name, const ProcessGroup& axis) {
               return make_host_staged_communicator(std::move(name), axis, *backend);
             }),
        runner(*backend, mesh, config,
               {.compute = compute,
                .micro_batch = 3,
                .inputs_length = lengths.inputs,
                .targets_length = lengths.targets}) {
    runner.parameters().initialise(kSeed);
  }

  ProcessGroup group;
  std::unique_ptr<Backend> backend;
  Mesh mesh;
  ModelRunner runner;
};

ProcessGroup alone() {
  const ProcessGroup world = ProcessGroup::world();
  return world.split(world.rank(), 0);
}

// The moments of all samples, shared out over data-parallel ranks, in uneven micro-batches.
std::vector<SecondMoments> measure(Rig& rig, Lengths lengths = {}) {
  MomentProbe probe(rig.runner, rig.mesh, all_sites());
  const index_t end = kSamples * (rig.mesh.dp_rank() + 1) / rig.mesh.dp_size();
  for (index_t first = kSamples * rig.mesh.dp_rank() / rig.mesh.dp_size(); first < end; first += 3) {
    const Batch batch = batch_of(first, std::min<index_t>(3, end - first), lengths);
    probe.begin(batch);
    rig.runner.observe(batch, probe);
  }
  return probe.take(rig.group);
}

// |a - b| / |b|, Frobenius.
double distance(const std::vector<double>& a, const std::vector<double>& b) {
  EXPECT_EQ(a.size(), b.size());
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return std::sqrt(difference / norm);
}

void expect_near(const std::vector<SecondMoments>& moments, const std::vector<SecondMoments>& expected,
                 double tolerance, const std::string& where) {
  ASSERT_EQ(moments.size(), expected.size()) << where;
  for (std::size_t site = 0; site < moments.size(); ++site) {
    EXPECT_EQ(moments[site].width, expected[site].width);
    EXPECT_LT(distance(moments[site].query, expected[site].query), tolerance) << where << ", site " << site;
    EXPECT_LT(distance(moments[site].key, expected[site].key), tolerance) << where << ", site " << site;
    EXPECT_LT(distance(moments[site].attending, expected[site].attending), tolerance)
        << where << ", site " << site;
    EXPECT_LT(distance(moments[site].attended, expected[site].attended), tolerance)
        << where << ", site " << site;
  }
}

// A tensor's elements, dense, in double.
std::vector<double> host(Step& step, Tensor tensor) {
  if (!tensor) return {};
  const index_t size = tensor.numel();
  const Buffer dense = step.backend.allocate(tensor.bytes());
  const Buffer wide = step.backend.allocate(size * size_of(DType::kFloat64));
  const Tensor copy = dense.tensor(
      tensor.dtype, std::span<const index_t>(tensor.shape.data(), static_cast<std::size_t>(tensor.rank)));
  step.backend.copy(tensor, copy);
  step.backend.cast(copy.reshape({size}), wide.tensor(DType::kFloat64, {size}));
  std::vector<double> values(static_cast<std::size_t>(size));
  step.backend.copy_to_host(wide.tensor(DType::kFloat64, {size}), values.data());
  return values;
}

// Copies what attentions are given and computes, token by token, what calibration should find.
class NaiveProbe final : public AttentionProbe {
 public:
  explicit NaiveProbe(index_t width) : width_(width), moments_(kSites), queries_(kSites), keys_(kSites) {
    const auto size = static_cast<std::size_t>(width * width);
    for (SecondMoments& m : moments_) {
      m.width = width;
      for (auto* part : {&m.query, &m.key, &m.attending, &m.attended}) part->assign(size, 0.0);
    }
  }

  const Batch* batch = nullptr;  // the one that is observed
  // Of each site, z of every real query and head, the heads of a query one behind the other.
  std::map<index_t, std::vector<std::vector<double>>> passed_on;

  void observe(Step& step, const View& view) override {
    const bool encoder = view.site < 2, cross = view.site == 3 || view.site == 5;
    const std::vector<std::int32_t>& query_ids = encoder ? batch->input_ids : batch->targets;
    const std::vector<std::int32_t>& key_ids = encoder || cross ? batch->input_ids : batch->targets;
    const index_t queries = view.q[1], keys = view.k[1], heads = view.q[2], size = view.q[3];
    const std::vector<double> x = host(step, view.query_input), y = host(step, view.key_input);
    const std::vector<double> q = host(step, view.q), k = host(step, view.k), bias = host(step, view.bias);
    const auto at = static_cast<std::size_t>(view.site);
    for (index_t b = 0; b < view.batch; ++b) {
      for (index_t j = b * keys; j < (b + 1) * keys; ++j) {
        if (key_ids[static_cast<std::size_t>(j)] == 0) continue;
        keys_[at] += 1;
        add_square(moments_[at].key, &y[static_cast<std::size_t>(j * width_)], 1);
      }
      for (index_t i = 0; i < queries; ++i) {
        const index_t row = b * queries + i;
        if (query_ids[static_cast<std::size_t>(row)] == 0) continue;
        queries_[at] += 1;
        add_square(moments_[at].query, &x[static_cast<std::size_t>(row * width_)], 1);
        for (index_t h = 0; h < heads; ++h) {
          const double* const query = &q[static_cast<std::size_t>((row * heads + h) * size)];
          const index_t group = h / (heads / view.k[2]);
          std::vector<double> p(static_cast<std::size_t>(keys));
          double total = 0;
          for (index_t j = 0; j < keys; ++j) {
            const index_t key_row = b * keys + j;
            if (key_ids[static_cast<std::size_t>(key_row)] == 0 || (view.options.causal && j > i)) continue;
            const double* const key = &k[static_cast<std::size_t>((key_row * view.k[2] + group) * size)];
            double score = std::inner_product(query, query + size, key, 0.0);
            if (view.bias) score += bias[static_cast<std::size_t>(h * view.bias[1] + j - i + queries - 1)];
            total += p[static_cast<std::size_t>(j)] = std::exp(score);
          }
          std::vector<double> z(static_cast<std::size_t>(width_));
          for (index_t j = 0; j < keys; ++j) {
            const double share = p[static_cast<std::size_t>(j)] / total;
            const double* const value = &y[static_cast<std::size_t>((b * keys + j) * width_)];
            add_square(moments_[at].attending, value, share);
            for (std::size_t d = 0; d < z.size(); ++d) z[d] += share * value[d];
          }
          add_square(moments_[at].attended, z.data(), 1);
          passed_on[view.site].push_back(std::move(z));
        }
      }
    }
  }

  std::vector<SecondMoments> take(index_t heads) {
    for (std::size_t site = 0; site < moments_.size(); ++site) {
      const double attentions = queries_[site] * static_cast<double>(heads);
      for (double& e : moments_[site].query) e /= queries_[site];
      for (double& e : moments_[site].key) e /= keys_[site];
      for (double& e : moments_[site].attending) e /= attentions;
      for (double& e : moments_[site].attended) e /= attentions;
    }
    return moments_;
  }

 private:
  void add_square(std::vector<double>& sum, const double* v, double factor) const {
    for (index_t i = 0; i < width_; ++i) {
      for (index_t j = 0; j < width_; ++j)
        sum[static_cast<std::size_t>(i * width_ + j)] += factor * v[i] * v[j];
    }
  }

  index_t width_;
  std::vector<SecondMoments> moments_;
  std::vector<double> queries_, keys_;
};

NaiveProbe look(Rig& rig) {
  NaiveProbe probe(rig.runner.parameters().config().d_model);
  for (index_t first = 0; first < kSamples; first += 3) {
    const Batch batch = batch_of(first, std::min<index_t>(3, kSamples - first));
    probe.batch = &batch;
    rig.runner.observe(batch, probe);
  }
  return probe;
}

std::vector<SecondMoments> naive(Rig& rig) {
  return look(rig).take(rig.runner.parameters().config().num_heads);
}

// Conversions of an encoder's, a decoder's self- and a cross-attention of tiny(), with heads out of order,
// and shared heads that nobody computed.
struct SomePlan {
  SomePlan() {
    const std::vector<AttentionSite> all = attention_sites(tiny());
    const std::vector<std::pair<std::size_t, std::vector<index_t>>> orders = {
        {0, {2, 0, 3, 1}}, {3, {1, 0}}, {4, {0, 1}}};
    for (const auto& [place, order] : orders) {
      SiteConversion site{.parent = all[place], .target = all[place], .query_heads = 4, .order = order};
      site.target.kv_groups /= 2;
      std::vector<Matrix>& heads = shared.emplace_back();
      for (index_t g = 0; g < site.target.kv_groups; ++g) {
        Matrix& head = heads.emplace_back(tiny().d_kv, tiny().d_model);
        const Philox philox(kSeed, RandomPurpose::kTest, 100 * place + static_cast<std::uint64_t>(g));
        for (std::size_t i = 0; i < head.values.size(); ++i) head.values[i] = philox.normal(i);
      }
      sites.push_back(std::move(site));
      places.push_back(static_cast<index_t>(place));
    }
  }
  std::vector<SiteConversion> sites;
  std::vector<std::vector<Matrix>> shared;
  std::vector<index_t> places;
};

std::vector<OutputMoments> measure_outputs(Rig& rig, const SomePlan& plan) {
  OutputProbe probe(rig.runner, rig.mesh, plan.sites, plan.shared);
  const index_t end = kSamples * (rig.mesh.dp_rank() + 1) / rig.mesh.dp_size();
  for (index_t first = kSamples * rig.mesh.dp_rank() / rig.mesh.dp_size(); first < end; first += 3) {
    const Batch batch = batch_of(first, std::min<index_t>(3, end - first));
    probe.begin(batch);
    rig.runner.observe(batch, probe);
  }
  return probe.take(rig.group);
}

// The definition, query by query, from what the heads attend to and the values' weights.
std::vector<OutputMoments> naive_outputs(Rig& rig, const SomePlan& plan) {
  const NaiveProbe probe = look(rig);
  const index_t d = tiny().d_kv, width = tiny().d_model;
  std::vector<OutputMoments> result;
  for (std::size_t s = 0; s < plan.sites.size(); ++s) {
    const SiteConversion& site = plan.sites[s];
    const Tensor weight = rig.runner.parameters().parameter(site.parent.prefix + "v.weight").weight;
    std::vector<float> floats(static_cast<std::size_t>(weight.numel()));
    rig.backend->copy_to_host(weight, floats.data());
    Matrix values(weight[0], width);
    std::copy(floats.begin(), floats.end(), values.values.begin());
    const auto& z = probe.passed_on.at(plan.places[s]);
    const index_t heads = site.query_heads / site.target.kv_groups,
                  queries = static_cast<index_t>(z.size()) / 4;
    OutputMoments& moments = result.emplace_back();
    for (index_t g = 0; g < site.target.kv_groups; ++g) {
      Matrix a(queries, heads * d), b(queries, heads * d);
      for (index_t slot = 0; slot < heads; ++slot) {
        const index_t head = site.query_head_in(g * heads + slot), kept = head / site.queries_per_head();
        const Matrix own = values.row_block(kept * d, (kept + 1) * d);
        for (index_t i = 0; i < queries; ++i) {
          Matrix x(width, 1);
          x.values = z[static_cast<std::size_t>(i * 4 + head)];
          const Matrix before = product(own, x),
                       after = product(plan.shared[s][static_cast<std::size_t>(g)], x);
          std::copy(before.values.begin(), before.values.end(), a.row(i) + slot * d);
          std::copy(after.values.begin(), after.values.end(), b.row(i) + slot * d);
        }
      }
      const auto moment = [&](const Matrix& left, const Matrix& right) {
        Matrix sum = product(left, right, Transpose::kYes);
        for (double& value : sum.values) value /= static_cast<double>(queries);
        return sum;
      };
      moments.before.push_back(moment(a, a));
      moments.across.push_back(moment(a, b));
      moments.after.push_back(moment(b, b));
    }
  }
  return result;
}

void expect_near(const std::vector<OutputMoments>& moments, const std::vector<OutputMoments>& expected,
                 double tolerance, const std::string& where) {
  ASSERT_EQ(moments.size(), expected.size()) << where;
  for (std::size_t s = 0; s < moments.size(); ++s) {
    ASSERT_EQ(moments[s].before.size(), expected[s].before.size()) << where;
    for (std::size_t g = 0; g < moments[s].before.size(); ++g) {
      EXPECT_LT(distance(moments[s].before[g].values, expected[s].before[g].values), tolerance) << where << s;
      EXPECT_LT(distance(moments[s].across[g].values, expected[s].across[g].values), tolerance) << where << s;
      EXPECT_LT(distance(moments[s].after[g].values, expected[s].after[g].values), tolerance) << where << s;
    }
  }
}

class Calibration : public testing::TestWithParam<DeviceKind> {};

TEST_P(Calibration, MomentsAreWhatTheySayTheyAre) {
  Rig rig(GetParam(), alone(), {});
  expect_near(measure(rig), naive(rig), 1e-5, "float32");
  Rig coarse(GetParam(), alone(), {}, DType::kBFloat16);
  expect_near(measure(coarse), naive(coarse), 1e-2, "bfloat16");
}

TEST_P(Calibration, MomentsAreSymmetricAndDiffer) {
  Rig rig(GetParam(), alone(), {});
  for (const SecondMoments& m : measure(rig)) {
    for (const auto* part : {&m.query, &m.key, &m.attending, &m.attended}) {
      for (index_t i = 0; i < m.width * m.width; ++i) {
        const index_t transposed = i % m.width * m.width + i / m.width;
        EXPECT_EQ((*part)[static_cast<std::size_t>(i)], (*part)[static_cast<std::size_t>(transposed)]);
      }
    }
    // The comparisons of the other tests would pass among four equal moments.
    EXPECT_GT(distance(m.attending, m.key), 1e-2);
    EXPECT_GT(distance(m.attended, m.attending), 1e-2);
  }
}

TEST_P(Calibration, EveryLayoutGivesTheSame) {
  const ProcessGroup world = ProcessGroup::world();
  Rig reference(GetParam(), alone(), {});
  const std::vector<SecondMoments> expected = measure(reference);
  for (int tp = 1; tp <= world.size(); tp *= 2) {
    Rig rig(GetParam(), world, {.data_parallel = world.size() / tp, .tensor_parallel = tp});
    expect_near(measure(rig), expected, 1e-5, fmt::format("tp {}", tp));
  }
}

TEST_P(Calibration, OutputsAreWhatTheySayTheyAre) {
  const SomePlan plan;
  Rig rig(GetParam(), alone(), {});
  const std::vector<OutputMoments> expected = naive_outputs(rig, plan);
  expect_near(measure_outputs(rig, plan), expected, 1e-5, "one rank, site ");
  const ProcessGroup world = ProcessGroup::world();
  for (int tp = 2; tp <= world.size(); tp *= 2) {
    Rig other(GetParam(), world, {.data_parallel = world.size() / tp, .tensor_parallel = tp});
    expect_near(measure_outputs(other, plan), expected, 1e-5, fmt::format("tp {}, site ", tp));
  }
}

TEST_P(Calibration, PaddingIsLeftOut) {
  // The longest of the samples has 10 inputs and 5 targets.
  constexpr Lengths kTight{.inputs = 10, .targets = 5}, kLoose{.inputs = 21, .targets = 12};
  Rig tight(GetParam(), alone(), {}, DType::kFloat32, kTight);
  Rig loose(GetParam(), alone(), {}, DType::kFloat32, kLoose);
  expect_near(measure(loose, kLoose), measure(tight, kTight), 1e-5, "21 x 12 against 10 x 5");
}

TEST_P(Calibration, TakesTheFirstSamplesOfTrainingForTheSitesAsked) {
  const ProcessGroup world = ProcessGroup::world();
  const test::SharedDirectory directory(world);
  world.run_on(0, [&] {
    std::filesystem::create_directory(directory / "corpus");
    test::write_corpus(directory / "corpus", {test::random_tokens(4000, 1, 100)},
                       {test::random_tokens(200, 2, 100)}, /*pieces=*/100);
  });
  const Corpus corpus(directory / "corpus");
  ASSERT_EQ(corpus.vocab_size(), kVocabulary);
  const Samples samples(corpus, Split::kTrain, {.corruption = {.inputs_length = kInputs}, .seed = 5});
  const Lengths lengths{.inputs = kInputs, .targets = samples.lengths().targets};

  Rig reference(GetParam(), alone(), {}, DType::kFloat32, lengths);
  MomentProbe probe(reference.runner, reference.mesh, all_sites());
  for (index_t n = 0; n < 7; ++n) {
    Batch batch;
    make_batch(samples, {.first_sample = n, .count = 1}, batch);
    probe.begin(batch);
    reference.runner.observe(batch, probe);
  }
  const std::vector<SecondMoments> expected = probe.take(reference.group);

  Rig rig(GetParam(), world, {.data_parallel = world.size(), .tensor_parallel = 1}, DType::kFloat32, lengths);
  const auto run = [&](std::vector<index_t> sites) {
    return calibrate(rig.runner, rig.mesh, world, samples, {.samples = 7, .sites = std::move(sites)});
  };
  expect_near(run(all_sites()), expected, 1e-5, "all sites");
  expect_near(run({4, 1, 3}), {expected[4], expected[1], expected[3]}, 1e-5, "some sites");
  expect_near(run({0, 2, 5}), {expected[0], expected[2], expected[5]}, 1e-5, "the other sites");
}

TEST_P(Calibration, LossesDoNotNotice) {
  Rig rig(GetParam(), alone(), {});
  const Batch batch = batch_of(0, 3), other = batch_of(3, 3);
  rig.runner.evaluate(batch);
  const LossSums expected = rig.runner.take_losses();
  MomentProbe probe(rig.runner, rig.mesh, all_sites());
  rig.runner.evaluate(batch);
  probe.begin(other);
  rig.runner.observe(other, probe);
  const LossSums sums = rig.runner.take_losses();
  EXPECT_EQ(sums.cross_entropy, expected.cross_entropy);
  EXPECT_EQ(sums.targets, expected.targets);
  rig.runner.evaluate(batch);
  EXPECT_EQ(rig.runner.take_losses().cross_entropy, expected.cross_entropy);
}

TEST_P(Calibration, RefusesHeadsWiderThanTheModel) {
  ModelConfig config = tiny();
  config.d_kv = 64;
  Rig rig(GetParam(), alone(), {}, DType::kFloat32, {}, config);
  EXPECT_THROW(MomentProbe(rig.runner, rig.mesh, {0}), UserError);
}

INSTANTIATE_TEST_SUITE_P(All, Calibration, testing::ValuesIn(test::test_devices()),
                         [](const auto& param) { return std::string(test::name_of(param.param)); });

}  // namespace
}  // namespace regroup
