// THE parameter table: every fact on a parameter, once. Read by initialisation, HF names, tensor-parallel
// slices, replica sums, the optimizer, the gradient norm, checkpoints and conversion.
#pragma once

#include <string>
#include <vector>

#include "parallel/partition.h"
#include "trainer/model/config.h"

namespace regroup {

enum class Initializer { kNormal, kTruncatedNormal, kUniform, kOnes };

struct ParameterSpec {
  std::string name;            // transformers' T5 name
  std::vector<index_t> shape;  // global
  Partition partition;
  Initializer initializer = Initializer::kNormal;
  double scale = 1;  // standard deviation, or half-width of the uniform
  bool begins_pack =
      true;  // false: lies in memory right behind the one before (q|k|v, wi_0|wi_1: one product)
};

// All parameters in memory order: shared embedding, encoder, decoder, lm_head (of an untied model). Initial
// values as T5X draws them (references: t5x layers.py): normal embedding 1, q (d_model d_kv)^-1/2, k v
// d_model^-1/2, o (H d_kv)^-1/2; truncated normal wi and lm_head d_model^-1/2, wo d_ff^-1/2; bias table
// uniform +-sqrt(6 / (H + 32)); norms 1.
std::vector<ParameterSpec> parameter_table(const ModelConfig& config);

// One attention of the model: a site, as conversion and calibration count them.
enum class AttentionKind { kEncoderSelf, kDecoderSelf, kCross };
struct AttentionSite {
  AttentionKind kind = AttentionKind::kEncoderSelf;
  index_t layer = 0;   // of its stack
  std::string prefix;  // "decoder.block.3.layer.1.EncDecAttention."; q.weight and so on follow
  index_t kv_groups = 0;
};

// "decoder layer 3 cross-attention", for messages.
std::string describe(const AttentionSite& site);

// All attentions in the order of the parameter table: the encoder's, then self- and cross-attention of each
// decoder layer.
std::vector<AttentionSite> attention_sites(const ModelConfig& config);

// Refuses a tensor_parallel that does not divide num_heads, d_ff and vocab_size, or that some attention's
// number of groups neither divides nor is divided by. UserError naming the values that would do.
void validate_tensor_parallel(const ModelConfig& config, int tensor_parallel);

}  // namespace regroup
