#include "trainer/conversion/regroup.h"

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>

#include "kernels/base/error.h"
#include "kernels/base/random.h"
#include "trainer/conversion/group_planner.h"
#include "trainer/conversion/head_factors.h"
#include "trainer/model/parameters.h"

namespace regroup {
namespace {

void store(const Matrix& from, const Tensor& to) {
  check(to.rank == 2 && to.is_contiguous() && to.has_shape({from.rows, from.columns}), "[{}, {}] into {}",
        from.rows, from.columns, to.describe());
  std::transform(from.values.begin(), from.values.end(), to.as<float>(),
                 [](double value) { return static_cast<float>(value); });
}

// Of a slot; null where left factors stay.
const Matrix* mix_of(const SiteConversion& site, const std::vector<SharedHead>& groups, index_t slot) {
  if (groups.empty()) return nullptr;
  const index_t shared = slot / site.queries_per_head();  // the slot's key/value head, in the plan's order
  const SharedHead& group = groups[static_cast<std::size_t>(shared / site.heads_per_group())];
  return &group.mix[static_cast<std::size_t>(shared % site.heads_per_group())];
}

}  // namespace

void pool_heads(const Tensor& source, const Tensor& out, index_t heads_per_group, index_t d_kv,
                Pooling pooling) {
  check(pooling == Pooling::kMean || pooling == Pooling::kFirst, "heads are not pooled by {}",
        to_string(pooling));
  check(source.rank == 2 && out.rank == 2 && source.is_contiguous() && out.is_contiguous() &&
            heads_per_group >= 1 && d_kv >= 1 && out[0] % d_kv == 0 &&
            source[0] == out[0] * heads_per_group && source[1] == out[1],
        "{} cannot be pooled into {} with {} heads of {} a group", source.describe(), out.describe(),
        heads_per_group, d_kv);
  const auto* from = source.as<float>();
  auto* to = out.as<float>();
  const index_t head = d_kv * source[1];
  const index_t groups = out[0] / d_kv;
  const index_t pooled = pooling == Pooling::kFirst ? 1 : heads_per_group;
  for (index_t g = 0; g < groups; ++g) {
    const float* group = from + g * heads_per_group * head;
    for (index_t i = 0; i < head; ++i) {
      double sum = 0;
      for (index_t k = 0; k < pooled; ++k) sum += static_cast<double>(group[k * head + i]);
      to[g * head + i] = static_cast<float>(sum / static_cast<double>(pooled));
    }
  }
}

void draw_heads(const Tensor& out, const std::string& name, index_t row_begin, double scale,
                std::uint64_t seed) {
  check(out.rank == 2 && out.is_contiguous(), "heads are drawn into {}", out.describe());
  const Philox philox(seed, RandomPurpose::kHeadChoice, key_of(name));
  auto* to = out.as<float>();
  for (index_t i = 0; i < out.numel(); ++i) {
    to[i] = static_cast<float>(scale * philox.normal(static_cast<std::uint64_t>(row_begin * out[1] + i)));
  }
}

std::map<std::string, ConvertingReader::Change> ConvertingReader::changes_of(const ConversionPlan& plan) {
  using Role = Change::Role;
  constexpr std::array<std::pair<std::string_view, Role>, 5> kRoles = {
      {{"q.weight", Role::kQuery},
       {"k.weight", Role::kKey},
       {"v.weight", Role::kValue},
       {"o.weight", Role::kOutput},
       {"relative_attention_bias.weight", Role::kBias}}};
  std::map<std::string, Change> changes;
  for (const SiteConversion& site : plan.sites) {
    const bool in_order = std::is_sorted(site.order.begin(), site.order.end());
    for (const auto& [weight, role] : kRoles) {
      const bool left = role == Role::kQuery || role == Role::kOutput;
      if (left && !merges_products(plan.options.pooling) && in_order) continue;
      if (role == Role::kBias && in_order) continue;
      changes[site.parent.prefix + std::string(weight)] = {.role = role, .site = &site};
    }
  }
  return changes;
}

std::set<std::string> ConvertingReader::changed_parameters(const ConversionPlan& plan) {
  std::set<std::string> names;
  for (const auto& [name, change] : changes_of(plan)) names.insert(name);
  return names;
}

ConvertingReader::ConvertingReader(const CheckpointReader& reader, const ModelConfig& parent,
                                   const ModelConfig& target, const ConversionPlan& plan)
    : reader_(reader),
      d_kv_(target.d_kv),
      d_model_(target.d_model),
      plan_(plan),
      changes_(changes_of(plan_)) {
  validate_conversion(parent, target);
  reader.require(parameter_table(parent));
  const auto from = parameter_table(parent);
  const auto to = parameter_table(target);
  check(from.size() == to.size(), "a conversion between tables of {} and {} parameters", from.size(),
        to.size());
  for (std::size_t i = 0; i < to.size(); ++i) {
    const auto change = changes_.find(to[i].name);
    if (change != changes_.end()) change->second.scale = to[i].scale;
    check(from[i].shape == to[i].shape || change != changes_.end(), "'{}' is not in the conversion's plan",
          to[i].name);
  }
}

void ConvertingReader::read(const ShardedTensor& to) const {
  const auto at = changes_.find(to.name);
  if (at == changes_.end()) {
    reader_.read(to);
    return;
  }
  using Role = Change::Role;
  const Change& change = at->second;
  if (change.role == Role::kBias) {
    read_bias(to, change);
  } else if (change.role == Role::kQuery) {
    read_queries(to, *change.site);
  } else if (change.role == Role::kOutput) {
    read_outputs(to, *change.site);
  } else {
    read_shared(to, change);
  }
}

// Of each slot the parent's query head, multiplied by its mix.
void ConvertingReader::read_queries(const ShardedTensor& to, const SiteConversion& site) const {
  const Slice& slice = to.slice;
  check(slice.dim == 0 && slice.begin % d_kv_ == 0 && slice.end % d_kv_ == 0,
        "the slice of '{}' that is to be filled is not of whole heads", to.name);
  for (index_t slot = slice.begin / d_kv_; slot < slice.end / d_kv_; ++slot) {
    const Matrix weight = read_head(reader_, to.name, site.query_head_in(slot), d_kv_, d_model_);
    const Matrix* const mix = mix_of(site, site.keys, slot);
    const index_t at = slot * d_kv_ - slice.begin;
    store(mix == nullptr ? weight : product(*mix, weight, Transpose::kYes),
          to.local.slice(0, at, at + d_kv_));
  }
}

// Of each slot the columns of the parent's head, multiplied by its mix; or of whole groups, where outputs are
// fitted.
void ConvertingReader::read_outputs(const ShardedTensor& to, const SiteConversion& site) const {
  const Slice& slice = to.slice;
  check(slice.dim == 1 && slice.begin % d_kv_ == 0 && slice.end % d_kv_ == 0,
        "the slice of '{}' that is to be filled is not of whole heads", to.name);
  const index_t width = site.query_heads / site.target.kv_groups * d_kv_;
  std::vector<Matrix> parts;
  for (index_t group = slice.begin / width; group * width < slice.end; ++group) {
    const index_t begin = std::max(slice.begin, group * width),
                  end = std::min(slice.end, (group + 1) * width);
    if (!site.outputs.empty()) {
      const Matrix whole =
          side_by_side(read_output_heads(reader_, to.name, site.query_heads_of(group), d_kv_, d_model_));
      const Matrix& fitted = site.outputs[static_cast<std::size_t>(group)];
      parts.push_back(product(whole, fitted.column_block(begin - group * width, end - group * width)));
      continue;
    }
    std::vector<index_t> heads;
    for (index_t slot = begin / d_kv_; slot < end / d_kv_; ++slot) heads.push_back(site.query_head_in(slot));
    std::vector<Matrix> weights = read_output_heads(reader_, to.name, heads, d_kv_, d_model_);
    for (std::size_t i = 0; i < weights.size(); ++i) {
      const Matrix* const mix = mix_of(site, site.values, begin / d_kv_ + static_cast<index_t>(i));
      parts.push_back(mix == nullptr ? std::move(weights[i]) : product(weights[i], *mix));
    }
  }
  store(side_by_side(parts), to.local);
}

// One group at a time: the heads of a group are all that is ever held beside the result.
void ConvertingReader::read_shared(const ShardedTensor& to, const Change& change) const {
  const SiteConversion& site = *change.site;
  const Slice& slice = to.slice;
  const index_t heads = site.heads_per_group();
  check(slice.dim == 0 && to.shape[0] == site.target.kv_groups * d_kv_ && slice.begin % d_kv_ == 0 &&
            slice.end % d_kv_ == 0 && to.local.has_shape({slice.end - slice.begin, d_model_}),
        "the slice of '{}' that is to be filled is not of whole groups", to.name);
  if (plan_.options.pooling == Pooling::kRandom) {
    draw_heads(to.local, to.name, slice.begin, change.scale, plan_.options.seed);
    return;
  }
  const bool merged = merges_products(plan_.options.pooling);
  const std::vector<SharedHead>& groups = change.role == Change::Role::kKey ? site.keys : site.values;
  std::vector<float> floats(static_cast<std::size_t>(merged ? 0 : heads * d_kv_ * d_model_));
  for (index_t row = slice.begin; row < slice.end; row += d_kv_) {
    const index_t group = row / d_kv_;
    const Tensor out = to.local.slice(0, row - slice.begin, row - slice.begin + d_kv_);
    std::vector<Matrix> members;
    for (index_t i = 0; i < heads; ++i) {
      const index_t head = site.order[static_cast<std::size_t>(group * heads + i)];
      if (merged) {
        members.push_back(read_head(reader_, to.name, head, d_kv_, d_model_));
        continue;
      }
      reader_.read(to.name, 0, head * d_kv_, (head + 1) * d_kv_,
                   Tensor(floats.data() + i * d_kv_ * d_model_, DType::kFloat32, {d_kv_, d_model_}));
    }
    if (merged) {
      store(product(groups[static_cast<std::size_t>(group)].combine, stack(members)), out);
    } else {
      pool_heads(Tensor(floats.data(), DType::kFloat32, {heads * d_kv_, d_model_}), out, heads, d_kv_,
                 plan_.options.pooling);
    }
  }
}

// The columns of the position bias follow their heads.
void ConvertingReader::read_bias(const ShardedTensor& to, const Change& change) const {
  const SiteConversion& site = *change.site;
  check(to.slice.dim == 1, "the slice of '{}' that is to be filled is not of columns", to.name);
  const index_t buckets = to.shape[0];
  Matrix columns(buckets, to.slice.end - to.slice.begin);
  Matrix column(buckets, 1);
  for (index_t slot = to.slice.begin; slot < to.slice.end; ++slot) {
    const index_t head = site.query_head_in(slot);
    reader_.read(to.name, 1, head, head + 1, Tensor(column.values.data(), DType::kFloat64, {buckets, 1}));
    for (index_t i = 0; i < buckets; ++i) columns(i, slot - to.slice.begin) = column(i, 0);
  }
  store(columns, to.local);
}

}  // namespace regroup
