// The encoder stack.
#pragma once

#include <vector>

#include "trainer/model/embedding.h"
#include "trainer/model/feed_forward.h"
#include "trainer/model/relative_position.h"

namespace regroup {

class EncoderLayer {
 public:
  struct Saved {
    SelfAttention::Saved attention;
    Tensor middle;  // T [N, D], between the two sub-blocks
    FeedForward::Saved feed_forward;
  };
  // What every layer is given: batch size, int32 [B, S] token ids (0: not attended), the shared bias.
  struct Context {
    index_t batch = 0;
    Tensor key_mask;
    PositionBias position;
  };

  EncoderLayer(const ParameterStore& store, index_t layer, int tp_rank, int tp_size);
  // x, y T [N, D]. y empty: only `saved`.
  void forward(Step& step, Tensor x, Tensor y, Saved& saved, const Context& context) const;
  void backward(Step& step, Tensor gradient, const Saved& saved, const Context& context) const;

 private:
  SelfAttention attention_;
  FeedForward feed_forward_;
};

class Encoder {
 public:
  struct Saved {
    EncoderLayer::Context context;
    std::vector<Tensor> inputs;  // of each layer, and of the final norm
    std::vector<EncoderLayer::Saved> layers;
    RmsNorm::Saved final_norm;
  };

  Encoder(const ParameterStore& store, int tp_rank, int tp_size);

  // ids int32 [B, S] to the normalised output T [B S, D], in the saved arena.
  Tensor forward(Step& step, Tensor ids, Saved& saved, bool training) const;
  // gradient T [B S, D], of the output; overwritten.
  void backward(Step& step, Tensor ids, Tensor gradient, const Saved& saved) const;

 private:
  TokenEmbedding embedding_;
  RelativePosition relative_position_;
  std::vector<EncoderLayer> layers_;
  RmsNorm final_norm_;
};

}  // namespace regroup
