// The shape of a T5 1.1 model.
#pragma once

#include <string>
#include <vector>

#include "kernels/dtype.h"

namespace regroup {

// T5 1.1 (t5x/examples/t5/t5_1_1): RMSNorm, gated GELU, relative position bias, untied lm_head, no biases.
struct ModelConfig {
  index_t vocab_size = 32128;
  index_t d_model = 512;
  index_t d_kv = 64;
  index_t d_ff = 1024;
  index_t num_heads = 6;
  index_t num_layers = 8;  // encoder
  index_t num_decoder_layers = 8;
  index_t kv_groups = 6;  // of decoder self- and cross-attention; num_heads: multi-head, 1: multi-query
  index_t encoder_kv_groups = 6;  // of encoder self-attention
  index_t relative_attention_num_buckets = 32;
  index_t relative_attention_max_distance = 128;
  double layer_norm_epsilon = 1e-6;
  double dropout_rate = 0;

  bool operator==(const ModelConfig&) const = default;
};

// The names "tiny", "small", "base", "large", "xl", "xxl" with their shapes; multi-head.
// UserError naming the nearest size for any other name.
ModelConfig t5_1_1(const std::string& size);
std::vector<std::string> model_sizes();

// Whether G = kv_groups | H and every count is positive; UserError naming the option and the values that
// would do.
void validate(const ModelConfig& config);

// config.json as transformers' T5Config reads it, plus num_key_value_heads, encoder_num_key_value_heads.
std::string to_json(const ModelConfig& config);
// From such a file's text; `where` names it in errors. UserError where a field is missing, of the wrong type,
// or asks for another architecture (tied embeddings, relu, another norm) than T5 1.1.
ModelConfig model_config_from_json(const std::string& text, const std::string& where);

// The number of parameters.
index_t parameter_count(const ModelConfig& config);

}  // namespace regroup
