#include "trainer/conversion/regroup.h"

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>

#include <fmt/ranges.h>

#include "kernels/base/error.h"
#include "kernels/base/random.h"
#include "trainer/model/parameters.h"

namespace regroup {
namespace {

constexpr std::array<std::pair<std::string_view, Pooling>, 3> kPoolings = {
    {{"mean", Pooling::kMean}, {"first", Pooling::kFirst}, {"random", Pooling::kRandom}}};

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

// The parameters whose number of heads differs between the two models, by name.
std::map<std::string, Regrouping> regroupings(const ModelConfig& parent, const ModelConfig& target) {
  const auto from = parameter_table(parent);
  const auto to = parameter_table(target);
  check(from.size() == to.size(), "a conversion between tables of {} and {} parameters", from.size(),
        to.size());
  std::map<std::string, Regrouping> result;
  for (std::size_t i = 0; i < to.size(); ++i) {
    if (from[i].shape == to[i].shape) continue;
    check(from[i].name == to[i].name && to[i].partition.kind == Partition::Kind::kKvGroups &&
              from[i].shape[0] % to[i].shape[0] == 0 && from[i].shape[1] == to[i].shape[1],
          "'{}' cannot be regrouped", to[i].name);
    result[to[i].name] = {.source_rows = from[i].shape[0],
                          .heads_per_group = from[i].shape[0] / to[i].shape[0],
                          .scale = to[i].scale};
  }
  return result;
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

void pool_heads(const Tensor& source, const Tensor& out, index_t heads_per_group, index_t d_kv,
                Pooling pooling) {
  check(pooling != Pooling::kRandom, "fresh heads are drawn, not pooled");
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
  check_groups("kv_groups", parent.kv_groups, target.kv_groups);
  check_groups("encoder_kv_groups", parent.encoder_kv_groups, target.encoder_kv_groups);
}

ConvertingReader::ConvertingReader(const CheckpointReader& reader, const ModelConfig& parent,
                                   const ModelConfig& target, const ConversionOptions& options)
    : reader_(reader), d_kv_(target.d_kv), d_model_(target.d_model), options_(options) {
  validate_conversion(parent, target);
  reader.require(parameter_table(parent));
  regroupings_ = regroupings(parent, target);
}

void ConvertingReader::read(const ShardedTensor& to) const {
  const auto at = regroupings_.find(to.name);
  if (at == regroupings_.end()) {
    reader_.read(to);
    return;
  }
  const auto& [source_rows, heads_per_group, scale] = at->second;
  const Slice& slice = to.slice;
  check(slice.dim == 0 && to.shape[0] * heads_per_group == source_rows && slice.begin % d_kv_ == 0 &&
            slice.end % d_kv_ == 0 && to.local.has_shape({slice.end - slice.begin, d_model_}),
        "the slice of '{}' that is to be filled is not of whole groups", to.name);
  if (options_.pooling == Pooling::kRandom) {
    draw_heads(to.local, to.name, slice.begin, scale, options_.seed);
    return;
  }
  // One group at a time: the heads of a group are all that is ever held beside the result.
  std::vector<float> heads(static_cast<std::size_t>(heads_per_group * d_kv_ * d_model_));
  const Tensor source(heads.data(), DType::kFloat32, {heads_per_group * d_kv_, d_model_});
  for (index_t row = slice.begin; row < slice.end; row += d_kv_) {
    reader_.read(to.name, 0, row * heads_per_group, (row + d_kv_) * heads_per_group, source);
    pool_heads(source, to.local.slice(0, row - slice.begin, row - slice.begin + d_kv_), heads_per_group,
               d_kv_, options_.pooling);
  }
}

}  // namespace regroup
