// The shape of a T5 model.
#pragma once

#include <string>
#include <vector>

#include "kernels/dtype.h"

namespace regroup {

// What a feed-forward sub-block gives wo: dropout(gelu(wi_0 n) * (wi_1 n)) in T5 1.1, dropout(max(wi n, 0))
// in T5 1.0.
enum class FeedForwardKind { kGatedGelu, kRelu };

// T5 1.1 (t5x/examples/t5/t5_1_1): RMSNorm, gated GELU, relative position bias, untied lm_head, no biases.
// mT5 is the same with another vocabulary; T5 1.0 (t5x/examples/t5/t5_1_0) has relu and a tied lm_head.
struct ModelConfig {
  index_t vocab_size = 32128;
  index_t d_model = 512;
  index_t d_kv = 64;
  index_t d_ff = 1024;
  index_t num_heads = 6;
  index_t num_layers = 8;  // encoder
  index_t num_decoder_layers = 8;
  index_t kv_groups = 6;  // of decoder self- and cross-attention; num_heads: multi-head, 1: multi-query
  // Empty: every decoder attention has kv_groups. Otherwise one number for each, in the order self, cross of
  // layer 0, self, cross of layer 1, ...; kv_groups is then the budget they were chosen for, their average.
  std::vector<index_t> site_kv_groups = {};
  index_t encoder_kv_groups = 6;  // of encoder self-attention
  index_t relative_attention_num_buckets = 32;
  index_t relative_attention_max_distance = 128;
  double layer_norm_epsilon = 1e-6;
  double dropout_rate = 0;
  FeedForwardKind feed_forward = FeedForwardKind::kGatedGelu;
  // There is no lm_head.weight: logits = (d_model^-1/2 hidden) shared.weight^T.
  bool tie_word_embeddings = false;

  // The groups of a decoder layer's self- and of its cross-attention.
  index_t self_groups(index_t layer) const;
  index_t cross_groups(index_t layer) const;
  // Whether some decoder attention has another number of groups than kv_groups.
  bool uneven() const;
  // Every number of groups that some attention has, the encoder's included: distinct, ascending. What a Mesh
  // is made for.
  std::vector<index_t> all_kv_groups() const;

  bool operator==(const ModelConfig&) const = default;
};

// The names "tiny", "small", "base", "large", "xl", "xxl" with their shapes; multi-head.
// UserError naming the nearest size for any other name.
ModelConfig t5_1_1(const std::string& size);
std::vector<std::string> model_sizes();

// Whether every count is positive, G | H for kv_groups and every attention, and site_kv_groups empty or of
// the right length; UserError naming the option, or layer and attention, and the values that would do.
void validate(const ModelConfig& config);

// config.json as transformers' T5Config reads it, plus num_key_value_heads, encoder_num_key_value_heads and,
// of an uneven model only, decoder_num_key_value_heads: {"self": [of each layer], "cross": [of each layer]}.
// model_type is always "t5": an mT5 is a T5 1.1 once its vocabulary is said.
std::string to_json(const ModelConfig& config);
// From such a file's text, or that of another T5 ("t5") or mT5 ("mt5") of transformers 4 or 5, whose defaults
// count where feed_forward_proj or tie_word_embeddings is absent: a "t5" then has relu and is tied, as the
// public t5-small. scale_decoder_outputs, where present, decides what is tied; an mT5 without it never is.
// `where` names the file in errors. UserError where a field is missing, of the wrong type, or asks for
// another architecture (umt5, longt5, ...) or activation (gated-silu, ...).
ModelConfig model_config_from_json(const std::string& text, const std::string& where);

// The number of parameters.
index_t parameter_count(const ModelConfig& config);

}  // namespace regroup
