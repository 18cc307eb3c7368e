#include "trainer/conversion/conversion_plan.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <string_view>
#include <utility>

#include <fmt/ranges.h>

#include "kernels/base/error.h"
#include "trainer/conversion/head_factors.h"
#include "trainer/conversion/head_grouping.h"

namespace regroup {
namespace {

constexpr std::array<std::pair<std::string_view, Pooling>, 5> kPoolings = {
    {{"mean", Pooling::kMean},
     {"first", Pooling::kFirst},
     {"random", Pooling::kRandom},
     {"spectral", Pooling::kSpectral},
     {"calibrated", Pooling::kCalibrated}}};

template <class T>
void check_same(std::string_view field, T parent, T target) {
  if (parent == target) return;
  throw UserError(
      "the checkpoint's model has {} = {}, but {} is configured; conversion changes only kv_groups", field,
      parent, target);
}

void check_groups(std::string_view field, index_t parent, index_t target) {
  if (target >= 1 && target <= parent && parent % target == 0) return;
  std::vector<index_t> legal;
  for (index_t groups = 1; groups <= parent; ++groups) {
    if (parent % groups == 0) legal.push_back(groups);
  }
  throw UserError("{} = {} is impossible from a checkpoint that has {} key/value groups; use one of {}",
                  field, target, parent, fmt::join(legal, ", "));
}

// Of every decoder attention: even models are told of the option, uneven ones of the attention.
void check_decoder_groups(const ModelConfig& parent, const ModelConfig& target) {
  if (!parent.uneven() && !target.uneven()) {
    check_groups("kv_groups", parent.kv_groups, target.kv_groups);
    return;
  }
  const std::vector<AttentionSite> from = attention_sites(parent), to = attention_sites(target);
  for (std::size_t i = 0; i < to.size(); ++i) {
    if (to[i].kind == AttentionKind::kEncoderSelf) continue;
    check_groups("kv_groups of " + describe(to[i]), from[i].kv_groups, to[i].kv_groups);
  }
}

bool merges(Pooling pooling) { return pooling == Pooling::kSpectral || pooling == Pooling::kCalibrated; }

// The attentions that change, as they are and as they will be.
std::vector<SiteConversion> changing_sites(const ModelConfig& parent, const ModelConfig& target) {
  const std::vector<AttentionSite> from = attention_sites(parent), to = attention_sites(target);
  check(from.size() == to.size(), "a conversion between {} and {} attentions", from.size(), to.size());
  std::vector<SiteConversion> sites;
  for (std::size_t i = 0; i < from.size(); ++i) {
    if (from[i].kv_groups == to[i].kv_groups) continue;
    SiteConversion site{.parent = from[i], .target = to[i], .query_heads = parent.num_heads};
    site.order.resize(static_cast<std::size_t>(from[i].kv_groups));
    std::iota(site.order.begin(), site.order.end(), index_t{0});
    sites.push_back(std::move(site));
  }
  return sites;
}

// One group's shared heads with what they lose, as they travel between ranks.
struct GroupResult {
  SharedHead keys, values;
  std::array<double, 4> sums{};  // lost and whole squares: of scores, of outputs
};

SharedHead shared_head(const HeadProducts& heads, Pooling pooling) {
  switch (pooling) {
    case Pooling::kMean:
      return mean_head(heads.heads(), heads.d_kv());
    case Pooling::kFirst:
      return first_head(heads.heads(), heads.d_kv());
    case Pooling::kRandom: {  // nothing of a fresh head is the parent's
      SharedHead none = mean_head(heads.heads(), heads.d_kv());
      std::fill(none.combine.values.begin(), none.combine.values.end(), 0.0);
      return none;
    }
    case Pooling::kSpectral:
    case Pooling::kCalibrated:
      return merge_heads(heads);
  }
  throw InternalError("unknown pooling {}", static_cast<int>(pooling));
}

GroupResult plan_group(const SiteFactors& factors, std::span<const index_t> heads, Pooling pooling) {
  GroupResult result;
  const HeadProducts scores = factors.scores(heads);
  const HeadProducts outputs = factors.outputs(heads);
  result.keys = shared_head(scores, pooling);
  result.values = shared_head(outputs, pooling);
  result.sums = {merging_loss(scores, result.keys), merging_energy(scores),
                 merging_loss(outputs, result.values), merging_energy(outputs)};
  if (merges(pooling)) {
    balance(scores, result.keys);
    balance(outputs, result.values);
  }
  return result;
}

void append(std::string& bytes, std::span<const double> values) {
  bytes.append(reinterpret_cast<const char*>(values.data()), values.size_bytes());
}

void take(const std::string& bytes, std::size_t& at, std::span<double> values) {
  std::memcpy(values.data(), bytes.data() + at, values.size_bytes());
  at += values.size_bytes();
}

void append(std::string& bytes, const SharedHead& head) {
  append(bytes, head.combine.values);
  for (const Matrix& mix : head.mix) append(bytes, mix.values);
}

SharedHead take_head(const std::string& bytes, std::size_t& at, index_t heads, index_t d_kv) {
  SharedHead result = mean_head(heads, d_kv);  // of the right shapes
  take(bytes, at, result.combine.values);
  for (Matrix& mix : result.mix) take(bytes, at, mix.values);
  return result;
}

// Plans the groups of some sites; group i of all of them is rank i % size's.
class GroupPlanner {
 public:
  GroupPlanner(const ProcessGroup& world, const CheckpointReader& reader, const ModelConfig& parent,
               const ConversionOptions& options)
      : world_(world), reader_(reader), parent_(parent), options_(options) {}

  // `moments`: of each site, or empty.
  void plan(std::span<SiteConversion> sites, std::span<const SecondMoments> moments) {
    std::string mine;
    world_.run_together([&] {
      index_t turn = 0;
      for (std::size_t s = 0; s < sites.size(); ++s) {
        std::optional<SiteFactors> factors;
        for (index_t g = 0; g < sites[s].target.kv_groups; ++g) {
          if (turn++ % world_.size() != world_.rank()) continue;
          if (!factors)
            factors.emplace(reader_, parent_, sites[s].parent, moments.empty() ? nullptr : &moments[s]);
          world_.heartbeat().beat("merging heads");
          const index_t n = sites[s].heads_per_group();
          const GroupResult result = plan_group(
              *factors,
              std::span(sites[s].order).subspan(static_cast<std::size_t>(g * n), static_cast<std::size_t>(n)),
              options_.pooling);
          append(mine, result.sums);
          if (!merges(options_.pooling)) continue;
          append(mine, result.keys);
          append(mine, result.values);
        }
      }
    });
    collect(sites, world_.all_gather(mine));
  }

 private:
  void collect(std::span<SiteConversion> sites, const std::vector<std::string>& bytes) const {
    std::vector<std::size_t> at(bytes.size());
    std::size_t turn = 0;
    for (SiteConversion& site : sites) {
      std::array<double, 4> sums{};
      for (index_t g = 0; g < site.target.kv_groups; ++g) {
        const std::size_t rank = turn++ % bytes.size();
        std::array<double, 4> of_group{};
        take(bytes[rank], at[rank], of_group);
        for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += of_group[i];
        if (!merges(options_.pooling)) continue;
        site.keys.push_back(take_head(bytes[rank], at[rank], site.heads_per_group(), parent_.d_kv));
        site.values.push_back(take_head(bytes[rank], at[rank], site.heads_per_group(), parent_.d_kv));
      }
      site.score_loss = sums[1] > 0 ? sums[0] / sums[1] : 0;
      site.output_loss = sums[3] > 0 ? sums[2] / sums[3] : 0;
    }
  }

  const ProcessGroup& world_;
  const CheckpointReader& reader_;
  const ModelConfig& parent_;
  ConversionOptions options_;
};

// The position in attention_sites() of each conversion.
std::vector<index_t> positions_of(std::span<const SiteConversion> sites, const ModelConfig& parent) {
  const std::vector<AttentionSite> all = attention_sites(parent);
  std::vector<index_t> positions;
  for (const SiteConversion& site : sites) {
    const auto found = std::find_if(all.begin(), all.end(), [&site](const AttentionSite& other) {
      return other.prefix == site.parent.prefix;
    });
    positions.push_back(found - all.begin());
  }
  return positions;
}

}  // namespace

Pooling pooling_from_string(const std::string& name) {
  for (const auto& [text, pooling] : kPoolings) {
    if (text == name) return pooling;
  }
  throw UserError("pooling = {} is unknown{}; use one of {}", name, did_you_mean(name, pooling_names()),
                  fmt::join(pooling_names(), ", "));
}

std::string to_string(Pooling pooling) {
  for (const auto& [text, value] : kPoolings) {
    if (value == pooling) return std::string(text);
  }
  throw InternalError("unknown pooling {}", static_cast<int>(pooling));
}

std::vector<std::string> pooling_names() {
  std::vector<std::string> names;
  names.reserve(std::size(kPoolings));
  for (const auto& [text, value] : kPoolings) names.emplace_back(text);
  return names;
}

void validate_conversion(const ModelConfig& parent, const ModelConfig& target) {
  check_same("vocab_size", parent.vocab_size, target.vocab_size);
  check_same("d_model", parent.d_model, target.d_model);
  check_same("d_kv", parent.d_kv, target.d_kv);
  check_same("d_ff", parent.d_ff, target.d_ff);
  check_same("num_heads", parent.num_heads, target.num_heads);
  check_same("num_layers", parent.num_layers, target.num_layers);
  check_same("num_decoder_layers", parent.num_decoder_layers, target.num_decoder_layers);
  check_same("relative_attention_num_buckets", parent.relative_attention_num_buckets,
             target.relative_attention_num_buckets);
  check_same("relative_attention_max_distance", parent.relative_attention_max_distance,
             target.relative_attention_max_distance);
  check_same("layer_norm_epsilon", parent.layer_norm_epsilon, target.layer_norm_epsilon);
  check_decoder_groups(parent, target);
  check_groups("encoder_kv_groups", parent.encoder_kv_groups, target.encoder_kv_groups);
}

ConversionPlan plan_conversion(const ProcessGroup& world, const CheckpointReader& reader,
                               const ModelConfig& parent, const ModelConfig& target,
                               const ConversionOptions& options, const Calibration& calibration) {
  world.run_together([&] { validate_conversion(parent, target); });
  check(options.pooling != Pooling::kCalibrated || calibration.measure,
        "calibrated conversion without calibration");
  ConversionPlan plan{.options = options, .sites = changing_sites(parent, target)};
  GroupPlanner planner(world, reader, parent, options);
  const std::size_t at_once = calibration.measure
                                  ? static_cast<std::size_t>(std::max<index_t>(1, calibration.sites_at_once))
                                  : plan.sites.size();
  for (std::size_t begin = 0; begin < plan.sites.size(); begin += at_once) {
    const auto sites = std::span(plan.sites).subspan(begin, std::min(at_once, plan.sites.size() - begin));
    std::vector<SecondMoments> moments;
    if (calibration.measure) moments = calibration.measure(positions_of(sites, parent));
    planner.plan(sites, moments);
  }
  return plan;
}

}  // namespace regroup
