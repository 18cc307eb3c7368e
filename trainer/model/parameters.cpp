#include "trainer/model/parameters.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include <fmt/ranges.h>

namespace regroup {
namespace {

class TableBuilder {
 public:
  explicit TableBuilder(const ModelConfig& config) : c_(config) {}

  std::vector<ParameterSpec> build() {
    add("shared.weight", {c_.vocab_size, c_.d_model}, Partition::split(0), Initializer::kNormal, 1.0);
    for (index_t layer = 0; layer < c_.num_layers; ++layer) {
      const std::string block = fmt::format("encoder.block.{}.layer.", layer);
      attention(block + "0.SelfAttention.", c_.encoder_kv_groups);
      if (layer == 0) relative_bias(block + "0.SelfAttention.");
      norm(block + "0.layer_norm.weight");
      feed_forward(block + "1.DenseReluDense.");
      norm(block + "1.layer_norm.weight");
    }
    norm("encoder.final_layer_norm.weight");
    for (index_t layer = 0; layer < c_.num_decoder_layers; ++layer) {
      const std::string block = fmt::format("decoder.block.{}.layer.", layer);
      attention(block + "0.SelfAttention.", c_.self_groups(layer));
      if (layer == 0) relative_bias(block + "0.SelfAttention.");
      norm(block + "0.layer_norm.weight");
      attention(block + "1.EncDecAttention.", c_.cross_groups(layer));
      norm(block + "1.layer_norm.weight");
      feed_forward(block + "2.DenseReluDense.");
      norm(block + "2.layer_norm.weight");
    }
    norm("decoder.final_layer_norm.weight");
    if (!c_.tie_word_embeddings) {
      add("lm_head.weight", {c_.vocab_size, c_.d_model}, Partition::split(0), Initializer::kTruncatedNormal,
          inverse_root(c_.d_model));
    }
    return std::move(table_);
  }

 private:
  static double inverse_root(index_t x) { return 1.0 / std::sqrt(static_cast<double>(x)); }

  void add(std::string name, std::vector<index_t> shape, Partition partition, Initializer initializer,
           double scale, bool begins_pack = true) {
    table_.push_back({std::move(name), std::move(shape), partition, initializer, scale, begins_pack});
  }
  void norm(std::string name) {
    add(std::move(name), {c_.d_model}, Partition::replicated(), Initializer::kOnes, 1.0);
  }
  void attention(const std::string& prefix, index_t groups) {
    const index_t inner = c_.num_heads * c_.d_kv;
    const double kv_scale = inverse_root(c_.d_model);
    add(prefix + "q.weight", {inner, c_.d_model}, Partition::split(0), Initializer::kNormal,
        inverse_root(c_.d_model * c_.d_kv));
    add(prefix + "k.weight", {groups * c_.d_kv, c_.d_model}, Partition::kv(groups), Initializer::kNormal,
        kv_scale,
        /*begins_pack=*/false);
    add(prefix + "v.weight", {groups * c_.d_kv, c_.d_model}, Partition::kv(groups), Initializer::kNormal,
        kv_scale,
        /*begins_pack=*/false);
    add(prefix + "o.weight", {c_.d_model, inner}, Partition::split(1), Initializer::kNormal,
        inverse_root(inner));
  }
  void relative_bias(const std::string& prefix) {
    add(prefix + "relative_attention_bias.weight", {c_.relative_attention_num_buckets, c_.num_heads},
        Partition::split(1), Initializer::kUniform,
        std::sqrt(6.0 / static_cast<double>(c_.num_heads + c_.relative_attention_num_buckets)));
  }
  void feed_forward(const std::string& prefix) {
    const auto inner = [&](const char* name, bool begins_pack) {
      add(prefix + name, {c_.d_ff, c_.d_model}, Partition::split(0), Initializer::kTruncatedNormal,
          inverse_root(c_.d_model), begins_pack);
    };
    if (c_.feed_forward == FeedForwardKind::kRelu) {
      inner("wi.weight", /*begins_pack=*/true);
    } else {
      inner("wi_0.weight", /*begins_pack=*/true);
      inner("wi_1.weight", /*begins_pack=*/false);
    }
    add(prefix + "wo.weight", {c_.d_model, c_.d_ff}, Partition::split(1), Initializer::kTruncatedNormal,
        inverse_root(c_.d_ff));
  }

  const ModelConfig& c_;
  std::vector<ParameterSpec> table_;
};

bool fits(index_t groups, index_t tp) { return groups % tp == 0 || tp % groups == 0; }

// The first attention with so many groups; there must be one.
AttentionSite first_of(const ModelConfig& config, index_t groups) {
  const std::vector<AttentionSite> sites = attention_sites(config);
  const auto has = [groups](const AttentionSite& site) { return site.kv_groups == groups; };
  return *std::find_if(sites.begin(), sites.end(), has);
}

}  // namespace

std::vector<ParameterSpec> parameter_table(const ModelConfig& config) { return TableBuilder(config).build(); }

std::string describe(const AttentionSite& site) {
  return fmt::format("{} layer {} {}-attention",
                     site.kind == AttentionKind::kEncoderSelf ? "encoder" : "decoder", site.layer,
                     site.kind == AttentionKind::kCross ? "cross" : "self");
}

std::vector<AttentionSite> attention_sites(const ModelConfig& config) {
  std::vector<AttentionSite> sites;
  for (index_t layer = 0; layer < config.num_layers; ++layer) {
    sites.push_back({.kind = AttentionKind::kEncoderSelf,
                     .layer = layer,
                     .prefix = fmt::format("encoder.block.{}.layer.0.SelfAttention.", layer),
                     .kv_groups = config.encoder_kv_groups});
  }
  for (index_t layer = 0; layer < config.num_decoder_layers; ++layer) {
    sites.push_back({.kind = AttentionKind::kDecoderSelf,
                     .layer = layer,
                     .prefix = fmt::format("decoder.block.{}.layer.0.SelfAttention.", layer),
                     .kv_groups = config.self_groups(layer)});
    sites.push_back({.kind = AttentionKind::kCross,
                     .layer = layer,
                     .prefix = fmt::format("decoder.block.{}.layer.1.EncDecAttention.", layer),
                     .kv_groups = config.cross_groups(layer)});
  }
  return sites;
}

void validate_tensor_parallel(const ModelConfig& config, int tensor_parallel) {
  const auto fault = [&config](index_t tp) -> std::string {
    const std::map<const char*, index_t> divided = {
        {"attention heads", config.num_heads}, {"d_ff", config.d_ff}, {"vocabulary", config.vocab_size}};
    for (const auto& [name, extent] : divided) {
      if (extent % tp != 0) return fmt::format("it does not divide the {} of {}", name, extent);
    }
    for (const index_t groups : config.all_kv_groups()) {
      if (fits(groups, tp)) continue;
      return fmt::format("{} key/value groups{} can be split over it only if one divides the other", groups,
                         config.uneven() ? fmt::format(" ({})", describe(first_of(config, groups))) : "");
    }
    return "";
  };
  const std::string why = tensor_parallel < 1 ? "it must be positive" : fault(tensor_parallel);
  if (why.empty()) return;
  std::vector<index_t> legal;
  for (index_t tp = 1; tp <= config.num_heads; ++tp) {
    if (fault(tp).empty()) legal.push_back(tp);
  }
  throw UserError("tensor-parallel = {} is impossible for this model: {}; use one of {}", tensor_parallel,
                  why, fmt::join(legal, ", "));
}

}  // namespace regroup
