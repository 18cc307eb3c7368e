// The decoder stack.
#pragma once

#include <vector>

#include "trainer/model/embedding.h"
#include "trainer/model/feed_forward.h"
#include "trainer/model/relative_position.h"

namespace regroup {

class DecoderLayer {
 public:
  struct Saved {
    SelfAttention::Saved self;
    Tensor after_self;  // T [N, D]
    CrossAttention::Saved cross;
    Tensor after_cross;  // T [N, D]
    FeedForward::Saved feed_forward;
  };
  // What every layer is given. Padding at the end of the targets needs no mask: no real target sees it.
  struct Context {
    index_t batch = 0;
    Tensor memory;           // T [B S, D], the encoder's output
    Tensor memory_mask;      // int32 [B, S]
    Tensor memory_gradient;  // S [B S, D], summed over layers; empty outside training
    PositionBias position;
  };

  DecoderLayer(const ParameterStore& store, index_t layer, int tp_rank, int tp_size);
  // x, y T [N, D]. y empty: only `saved`.
  void forward(Step& step, Tensor x, Tensor y, Saved& saved, const Context& context) const;
  void backward(Step& step, Tensor gradient, const Saved& saved, const Context& context) const;

 private:
  SelfAttention self_;
  CrossAttention cross_;
  FeedForward feed_forward_;
};

class Decoder {
 public:
  struct Saved {
    DecoderLayer::Context context;
    std::vector<Tensor> inputs;  // of each layer, and of the final norm
    std::vector<DecoderLayer::Saved> layers;
    RmsNorm::Saved final_norm;
  };

  Decoder(const ParameterStore& store, int tp_rank, int tp_size);

  // ids int32 [B, T], memory T [B S, D], memory_mask int32 [B, S] to the normalised output T [B T, D], in the
  // saved arena.
  Tensor forward(Step& step, Tensor ids, Tensor memory, Tensor memory_mask, Saved& saved,
                 bool training) const;
  // gradient T [B T, D], of the output; overwritten. memory_gradient S [B S, D] = the gradient of `memory`,
  // summed over tp.
  void backward(Step& step, Tensor ids, Tensor gradient, Tensor memory_gradient, const Saved& saved) const;

 private:
  TokenEmbedding embedding_;
  RelativePosition relative_position_;
  std::vector<DecoderLayer> layers_;
  RmsNorm final_norm_;
};

}  // namespace regroup
