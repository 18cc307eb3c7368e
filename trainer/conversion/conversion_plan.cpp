#include "trainer/conversion/conversion_plan.h"

#include <algorithm>
#include <array>
#include <map>
#include <numeric>
#include <set>
#include <string_view>
#include <utility>

#include <fmt/ranges.h>

#include "kernels/base/error.h"
#include "trainer/conversion/group_budget.h"
#include "trainer/conversion/group_planner.h"
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

SiteConversion conversion_of(const AttentionSite& parent, const AttentionSite& target, index_t query_heads) {
  SiteConversion site{.parent = parent, .target = target, .query_heads = query_heads};
  site.order.resize(static_cast<std::size_t>(parent.kv_groups));
  std::iota(site.order.begin(), site.order.end(), index_t{0});
  return site;
}

// The attentions that change, as they are and as they will be. `reorders`: and the self-attentions of a stack
// of which one changes.
std::vector<SiteConversion> changing_sites(const ModelConfig& parent, const ModelConfig& target,
                                           bool reorders) {
  const std::vector<AttentionSite> from = attention_sites(parent), to = attention_sites(target);
  check(from.size() == to.size(), "a conversion between {} and {} attentions", from.size(), to.size());
  std::set<AttentionKind> changing;
  for (std::size_t i = 0; i < from.size(); ++i) {
    if (from[i].kv_groups != to[i].kv_groups) changing.insert(from[i].kind);
  }
  changing.erase(AttentionKind::kCross);
  std::vector<SiteConversion> sites;
  for (std::size_t i = 0; i < from.size(); ++i) {
    if (from[i].kv_groups == to[i].kv_groups && !(reorders && changing.contains(from[i].kind))) continue;
    sites.push_back(conversion_of(from[i], to[i], parent.num_heads));
  }
  return sites;
}

// The moments of attentions, as many at once as may be held. What fits as a whole is measured once.
class MomentSource {
 public:
  MomentSource(const ModelConfig& parent, const Calibration& calibration)
      : all_(attention_sites(parent)), calibration_(calibration) {}

  // Calls work(sites, their moments) for some sites after the other; without calibration once, with none.
  template <class Work>
  void each(std::span<SiteConversion> sites, Work&& work) {
    if (!calibration_.measure) return work(sites, std::span<const SecondMoments>());
    const auto at_once = static_cast<std::size_t>(std::max<index_t>(1, calibration_.sites_at_once));
    for (std::size_t begin = 0; begin < sites.size(); begin += at_once) {
      const auto some = sites.subspan(begin, std::min(at_once, sites.size() - begin));
      const std::vector<index_t> places = places_of(some);
      if (places != held_places_) {
        held_.clear();  // their memory first
        held_ = calibration_.measure(places);
        held_places_ = places;
      }
      work(some, std::span<const SecondMoments>(held_));
    }
  }

 private:
  std::vector<index_t> places_of(std::span<const SiteConversion> sites) const {
    std::vector<index_t> places;
    for (const SiteConversion& site : sites) {
      const auto found = std::find_if(all_.begin(), all_.end(), [&site](const AttentionSite& other) {
        return other.prefix == site.parent.prefix;
      });
      places.push_back(found - all_.begin());
    }
    return places;
  }

  std::vector<AttentionSite> all_;
  const Calibration& calibration_;
  std::vector<index_t> held_places_;
  std::vector<SecondMoments> held_;
};

const SecondMoments* one_of(std::span<const SecondMoments> moments, std::size_t index) {
  return moments.empty() ? nullptr : &moments[index];
}

// The self-attentions of a stack share one order of heads, so they need equally many.
void require_equal_stacks(const ModelConfig& parent) {
  for (index_t layer = 1; layer < parent.num_decoder_layers; ++layer) {
    if (parent.self_groups(layer) == parent.self_groups(0)) continue;
    throw UserError(
        "grouping = similarity puts the heads of all decoder self-attentions in one order, but the "
        "checkpoint's layers 0 "
        "and {} have {} and {} key/value groups; use grouping = position",
        layer, parent.self_groups(0), parent.self_groups(layer));
  }
}

// Cross-attentions by their own losses, the self-attentions of a stack by the sum of theirs, in as many
// groups as the one with the fewest.
void order_by_similarity(const GroupPlanner& planner, MomentSource& moments, std::span<SiteConversion> all) {
  struct Stack {
    Matrix losses;
    index_t groups = 0;
  };
  std::map<AttentionKind, Stack> stacks;
  moments.each(all, [&](std::span<SiteConversion> sites, std::span<const SecondMoments> of_sites) {
    for (std::size_t s = 0; s < sites.size(); ++s) {
      SiteConversion& site = sites[s];
      if (site.heads_per_group() == 1) continue;  // it goes along
      Matrix losses = planner.pair_losses(site, one_of(of_sites, s));
      if (site.parent.kind == AttentionKind::kCross) {
        site.order = group_heads(losses, site.target.kv_groups);
        continue;
      }
      Stack& stack = stacks[site.parent.kind];
      stack.groups =
          stack.groups == 0 ? site.target.kv_groups : std::min(stack.groups, site.target.kv_groups);
      if (stack.losses.rows == 0) {
        stack.losses = std::move(losses);
        continue;
      }
      for (std::size_t i = 0; i < losses.values.size(); ++i) stack.losses.values[i] += losses.values[i];
    }
  });
  for (SiteConversion& site : all) {
    const auto stack = stacks.find(site.parent.kind);
    if (stack != stacks.end()) site.order = group_heads(stack->second.losses, stack->second.groups);
  }
}

// The numbers of groups of the decoder's attentions that lose least, target.kv_groups on average.
std::vector<index_t> uneven_groups(const GroupPlanner& planner, MomentSource& moments,
                                   const ModelConfig& parent, const ModelConfig& target,
                                   const ProcessGroup& world) {
  std::vector<SiteConversion> decoder;
  for (const AttentionSite& site : attention_sites(parent)) {
    if (site.kind == AttentionKind::kEncoderSelf) continue;
    decoder.push_back(conversion_of(site, site, parent.num_heads));
  }
  std::vector<GroupCosts> costs;
  moments.each(decoder, [&](std::span<SiteConversion> sites, std::span<const SecondMoments> of_sites) {
    for (std::size_t s = 0; s < sites.size(); ++s) {
      GroupCosts& of_site = costs.emplace_back();
      for (const index_t groups : group_choices(sites[s].parent)) {
        sites[s].target.kv_groups = groups;
        planner.plan(sites.subspan(s, 1), of_sites.empty() ? of_sites : of_sites.subspan(s, 1));
        of_site[groups] =
            (of_sites.empty() ? sites[s].score_loss : sites[s].score_error) + sites[s].output_loss;
      }
    }
  });
  std::vector<index_t> chosen;
  world.run_together(
      [&] { chosen = choose_groups(costs, target.kv_groups * static_cast<index_t>(decoder.size())); });
  return chosen;
}

}  // namespace

std::vector<index_t> SiteConversion::query_heads_of(index_t group) const {
  std::vector<index_t> heads;
  const index_t count = query_heads / target.kv_groups;
  for (index_t slot = group * count; slot < (group + 1) * count; ++slot) heads.push_back(query_head_in(slot));
  return heads;
}

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
  check_same("relu", parent.feed_forward == FeedForwardKind::kRelu,
             target.feed_forward == FeedForwardKind::kRelu);
  check_same("tie_word_embeddings", parent.tie_word_embeddings, target.tie_word_embeddings);
  check_decoder_groups(parent, target);
  check_groups("encoder_kv_groups", parent.encoder_kv_groups, target.encoder_kv_groups);
}

std::vector<index_t> group_choices(const AttentionSite& parent) {
  std::vector<index_t> choices;
  for (index_t groups = 1; groups <= parent.kv_groups; groups *= 2) {
    if (parent.kv_groups % groups == 0) choices.push_back(groups);
  }
  if (choices.back() != parent.kv_groups) choices.push_back(parent.kv_groups);
  return choices;
}

ConversionPlan plan_conversion(const ProcessGroup& world, const CheckpointReader& reader,
                               const ModelConfig& parent, const ModelConfig& target,
                               const ConversionOptions& options, const Calibration& calibration) {
  const bool similarity = options.grouping == Grouping::kSimilarity && options.pooling != Pooling::kRandom;
  world.run_together([&] {
    validate_conversion(parent, target);
    if (similarity) require_equal_stacks(parent);
    reader.require(parameter_table(parent));
  });
  check(options.pooling != Pooling::kCalibrated || calibration.measure,
        "calibrated conversion without calibration");
  ConversionPlan plan{.options = options, .target = target, .sites = {}};
  const GroupPlanner planner(world, reader, parent, options);
  MomentSource moments(parent, calibration);
  // What is chosen is a function of the options, not of whether somebody looks on.
  const Calibration none;
  MomentSource no_moments(parent, none);
  MomentSource& decides = options.pooling == Pooling::kCalibrated ? moments : no_moments;
  if (options.budget == Budget::kUneven) {
    plan.target.site_kv_groups = uneven_groups(planner, decides, parent, target, world);
  }
  plan.sites = changing_sites(parent, plan.target, similarity);
  if (similarity) order_by_similarity(planner, decides, plan.sites);
  moments.each(plan.sites, [&](std::span<SiteConversion> sites, std::span<const SecondMoments> of_sites) {
    planner.plan(sites, of_sites);
    if (options.pooling != Pooling::kCalibrated || !calibration.outputs) return;
    planner.fit_outputs(sites, calibration.outputs(sites, planner.shared_values(sites)));
  });
  return plan;
}

}  // namespace regroup
