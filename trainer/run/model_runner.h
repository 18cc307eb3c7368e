// A model with its memory, running micro-batches of one shape.
#pragma once

#include <cstdint>
#include <memory>

#include "data/batch_stream.h"
#include "parallel/gradient_sync.h"
#include "trainer/model/attention_probe.h"
#include "trainer/model/t5.h"

namespace regroup {

// Losses summed over targets that are not padding.
struct LossSums {
  double cross_entropy = 0;  // nats
  double z_loss = 0;
  double targets = 0;

  double mean() const { return cross_entropy / targets; }
};

class ModelRunner {
 public:
  struct Options {
    DType compute = DType::kFloat32;
    index_t micro_batch = 1;  // the most sequences of one call
    index_t inputs_length = 0, targets_length = 0;
    bool train = false;       // room for gradients and what backward needs
    double dropout_rate = 0;  // in training
    bool recompute = false;
    double z_loss = 0;
  };

  // Plans the memory of a step by running the model on a PlanBackend, and allocates it. UserError where
  // there is not enough. `backend` and `mesh` outlive the runner.
  ModelRunner(Backend& backend, const Mesh& mesh, const ModelConfig& config, const Options& options);

  ParameterStore& parameters() { return store_; }
  const ParameterStore& parameters() const { return store_; }
  Backend& backend() { return backend_; }
  const Options& options() const { return options_; }

  // Where a micro-batch stands in the run: its dropout and nothing else depends on it.
  struct Position {
    std::uint64_t seed = 0;
    index_t step = 0;
    index_t first_sample = 0;  // within the step's global batch
  };
  // Gradients += those of `factor` x the sum of the losses. The `last` micro-batch of a step begins to sum
  // the gradients over ranks while its backward goes on; synchronise_gradients() then has less to wait for.
  // Collective where `last`.
  void train(const Batch& batch, const Position& position, double factor, bool last = false);
  void evaluate(const Batch& batch);
  // Forward through encoder and decoder, where `probe` looks on at every attention. Of take_losses()'s sums
  // it is no part.
  void observe(const Batch& batch, AttentionProbe& probe);
  // The sums of everything trained or evaluated since the last call, over all data-parallel ranks. Collective
  // over dp.
  LossSums take_losses();
  // This rank's columns of the logits, S [B T, V].
  void logits(const Batch& batch, Tensor logits);

  // Sums what is not summed yet of the gradients over KV replicas and data-parallel ranks. Collective.
  void synchronise_gradients();
  // Sets them to zero.
  void clear_gradients() { backend_.fill_zero(store_.all_gradients()); }

  // Of one micro-batch of the full size on this rank; forward and backward, without recomputation.
  double flops() const { return flops_; }
  index_t arena_bytes() const { return saved_.capacity() + scratch_.capacity(); }

 private:
  struct Plan {
    index_t saved = 0, scratch = 0;
    double flops = 0;
  };
  static Plan plan(const Backend& device, const Mesh& mesh, const ModelConfig& config,
                   const Options& options);
  static index_t token_bytes(const Options& options);
  static T5::Input input_of(const Buffer& tokens, index_t batch, const Options& options);
  Step step(bool training);
  T5::Input load(const Batch& batch);
  void count_targets(const Batch& batch);

  Backend& backend_;
  const Mesh& mesh_;
  Options options_;
  ParameterStore store_;
  T5 model_;
  Arena saved_, scratch_;
  Buffer tokens_;                                // int32: inputs, decoder inputs, targets
  Buffer losses_;                                // float64 [3]
  std::vector<std::int32_t> host_tokens_;        // as they lie in tokens_
  std::unique_ptr<GradientSync> gradient_sync_;  // in training
  bool decoder_started_ = false;                 // the decoder's sums are on their way
  double targets_ = 0;
  double flops_ = 0;
};

}  // namespace regroup
