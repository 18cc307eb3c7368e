// What --recompute costs, counted: each layer's forward once more but for its last product and the sum over
// ranks behind it, of which backward needs nothing.
#include <gtest/gtest.h>

#include "kernels/plan_backend.h"
#include "trainer/run/model_runner.h"

namespace regroup {
namespace {

constexpr index_t kBatch = 3, kInputs = 16, kTargets = 8, kModel = 64;
constexpr index_t kEncoderLayers = 2, kDecoderLayers = 3;

struct Cost {
  double flops = 0, summed_bytes = 0;
  Cost operator-(const Cost& other) const {
    return {.flops = flops - other.flops, .summed_bytes = summed_bytes - other.summed_bytes};
  }
};

// Of one micro-batch on one of two tensor-parallel ranks.
Cost cost_of(bool recompute, index_t d_ff) {
  const ModelConfig config{.vocab_size = 128,
                           .d_model = kModel,
                           .d_kv = 16,
                           .d_ff = d_ff,
                           .num_heads = 4,
                           .num_layers = kEncoderLayers,
                           .num_decoder_layers = kDecoderLayers,
                           .kv_groups = 2,
                           .encoder_kv_groups = 4};
  PlanBackend backend;
  const Mesh mesh = Mesh::plan({.data_parallel = 1, .tensor_parallel = 2}, 0, config.all_kv_groups());
  ModelRunner runner(backend, mesh, config,
                     {.compute = DType::kBFloat16,
                      .micro_batch = kBatch,
                      .inputs_length = kInputs,
                      .targets_length = kTargets,
                      .train = true,
                      .recompute = recompute});
  Batch batch{.size = kBatch, .inputs_length = kInputs, .targets_length = kTargets};
  batch.input_ids.assign(kBatch * kInputs, 2);
  batch.targets.assign(kBatch * kTargets, 2);
  const Cost before{.flops = backend.flops(), .summed_bytes = mesh.tp().bytes_moved()};
  runner.train(batch, {}, 1);
  return Cost{.flops = backend.flops(), .summed_bytes = mesh.tp().bytes_moved()} - before;
}

TEST(Recompute, SumsAgainWhatBackwardNeedsOnly) {
  const Cost extra = cost_of(true, 256) - cost_of(false, 256);
  // Attentions' sums: one of an encoder layer, two of a decoder layer.
  const index_t rows = kBatch * (kEncoderLayers * kInputs + 2 * kDecoderLayers * kTargets);
  EXPECT_EQ(extra.summed_bytes, static_cast<double>(rows * kModel * size_of(DType::kBFloat16)));
}

TEST(Recompute, MultipliesAgainWhatBackwardNeedsOnly) {
  const auto extra = [](index_t d_ff) { return (cost_of(true, d_ff) - cost_of(false, d_ff)).flops; };
  // Of the feed-forward's three products, the columns of two ranks: wi_0 and wi_1.
  const index_t rows = kBatch * (kEncoderLayers * kInputs + kDecoderLayers * kTargets);
  EXPECT_EQ(extra(512) - extra(256), static_cast<double>(2 * 2 * rows * kModel * (512 - 256) / 2));
}

}  // namespace
}  // namespace regroup
