// The attention sub-blocks of T5: x + dropout(o(attention(norm(x)))), with grouped keys and values.
#pragma once

#include "trainer/model/rms_norm.h"

namespace regroup {

// What both kinds of attention are told about the model.
struct AttentionShape {
  index_t heads = 0;        // H, of this rank
  index_t groups = 0;       // G, of this rank
  index_t d_kv = 0;         // C
  index_t model_heads = 0;  // of all ranks
  index_t first_head = 0;
  index_t site = 0;  // of dropout: site and site + 1

  // The heads and groups that rank tp_rank of tp_size holds of a model with `kv_groups` groups.
  static AttentionShape of(const ModelConfig& config, index_t kv_groups, index_t site, int tp_rank,
                           int tp_size);
};

// The relative position bias of one stack, expanded for its lengths, and its gradient.
struct PositionBias {
  Tensor bias;      // S [H, 2 L - 1] or empty
  Tensor gradient;  // the same, summed over layers, or empty
};

// Self-attention. q|k|v is one column-parallel product, o a row-parallel one.
class SelfAttention {
 public:
  struct Saved {
    RmsNorm::Saved norm;
    Tensor normalised;   // T [N, D]
    Tensor qkv;          // T [N, (H + 2 G) C]
    Tensor out;          // T [N, H C]
    Tensor log_sum_exp;  // S [B, H, L]
  };

  // `prefix`: "encoder.block.0.layer.0." with SelfAttention.* and layer_norm.* below it.
  SelfAttention(const ParameterStore& store, const std::string& prefix, const AttentionShape& shape,
                bool causal);

  // y = x + dropout(...), T [N, D] with N = batch x length; key_mask int32 [B, L] or empty.
  void forward(Step& step, Tensor x, Tensor y, index_t batch, Tensor key_mask, const PositionBias& position,
               Saved& saved) const;
  // gradient: of y on entry, of x on return.
  void backward(Step& step, Tensor gradient, index_t batch, Tensor key_mask, const PositionBias& position,
                const Saved& saved) const;

 private:
  AttentionShape shape_;
  index_t site_;  // in attention_sites()
  bool causal_;
  RmsNorm norm_;
  Parameter qkv_, o_;
};

// Cross-attention of the decoder over the encoder's output. No position bias.
class CrossAttention {
 public:
  struct Saved {
    RmsNorm::Saved norm;
    Tensor normalised;   // T [B T, D]
    Tensor q;            // T [B T, H C]
    Tensor kv;           // T [B S, 2 G C]
    Tensor out;          // T [B T, H C]
    Tensor log_sum_exp;  // S [B, H, T]
  };

  CrossAttention(const ParameterStore& store, const std::string& prefix, const AttentionShape& shape);

  // memory T [B S, D]: the encoder's output; key_mask int32 [B, S].
  void forward(Step& step, Tensor x, Tensor memory, Tensor y, index_t batch, Tensor key_mask,
               Saved& saved) const;
  // memory_gradient S [B S, D] += this rank's share of the gradient of `memory`; the caller sums it over tp,
  // once for all layers.
  void backward(Step& step, Tensor gradient, Tensor memory, Tensor memory_gradient /* += */, index_t batch,
                Tensor key_mask, const Saved& saved) const;

 private:
  AttentionShape shape_;
  index_t site_;  // in attention_sites()
  RmsNorm norm_;
  Parameter q_, kv_, o_;
};

}  // namespace regroup
