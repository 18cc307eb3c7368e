// After its first step a training step on a GPU allocates nothing, and the host waits for the device only
// where it must: for the losses, and for the optimizer's statistics.
#include <cmath>

#include <gtest/gtest.h>

#include "kernels/cuda/cuda_backend.h"
#include "trainer/optimizer/adafactor.h"
#include "trainer/run/model_runner.h"

namespace regroup {
namespace {

constexpr index_t kBatch = 2, kInputs = 9, kTargets = 5;

Batch batch_of(index_t vocab_size) {
  Batch batch{.size = kBatch, .inputs_length = kInputs, .targets_length = kTargets};
  for (index_t i = 0; i < kBatch * kInputs; ++i) {
    batch.input_ids.push_back(static_cast<std::int32_t>(2 + i * 7 % (vocab_size - 2)));
  }
  for (index_t i = 0; i < kBatch * kTargets; ++i) {
    batch.targets.push_back(static_cast<std::int32_t>(2 + i * 5 % (vocab_size - 2)));
  }
  return batch;
}

TEST(SteadyState, AStepAllocatesNothingAndWaitsForItsSumsOnly) {
  const ModelConfig config{.vocab_size = 128,
                           .d_model = 64,
                           .d_kv = 64,
                           .d_ff = 64,
                           .num_heads = 2,
                           .num_layers = 1,
                           .num_decoder_layers = 1,
                           .kv_groups = 1,
                           .encoder_kv_groups = 2};
  CudaBackend backend(0, /*deterministic=*/false);
  const Mesh mesh = Mesh::plan(Layout{}, 0, {1, 2});
  ModelRunner runner(backend, mesh, config,
                     {.compute = DType::kBFloat16,
                      .micro_batch = kBatch,
                      .inputs_length = kInputs,
                      .targets_length = kTargets,
                      .train = true,
                      .z_loss = 1e-4});
  runner.parameters().initialise(1);
  Adafactor optimizer(backend, runner.parameters(), mesh, {});
  const Batch batch = batch_of(config.vocab_size);
  CudaCounters before;
  for (index_t step = 0; step < 4; ++step) {
    if (step > 0) before = backend.device().counters();
    runner.clear_gradients();
    for (const index_t micro_batch : {0, 1, 2}) {
      runner.train(batch, {.step = step, .first_sample = micro_batch * kBatch}, 0.1,
                   /*last=*/micro_batch == 2);
    }
    runner.synchronise_gradients();
    const CudaCounters middle = backend.device().counters();
    EXPECT_TRUE(std::isfinite(runner.take_losses().mean()));
    optimizer.update(step, 1e-3);
    if (step == 0) continue;  // measures, and takes its work memory
    const CudaCounters after = backend.device().counters();
    EXPECT_EQ(after.allocations, before.allocations) << "step " << step;
    EXPECT_EQ(middle.waits, before.waits) << "forward and backward wait at step " << step;
    // The losses; each of Adafactor's two reductions reads its sums before and after they are made global.
    EXPECT_EQ(after.waits - middle.waits, 1 + 4) << "step " << step;
  }
}

}  // namespace
}  // namespace regroup
