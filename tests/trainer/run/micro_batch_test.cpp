// The micro-batch of a run that leaves it open, by the memory that it would take.
#include "trainer/run/micro_batch.h"

#include <gtest/gtest.h>

#include "kernels/plan_backend.h"
#include "tests/support/devices.h"

namespace regroup {
namespace {

TEST(MicroBatch, IsTheLargestDivisorThatFits) {
  const auto up_to = [](index_t limit) { return [limit](index_t size) { return size <= limit; }; };
  EXPECT_EQ(fitting_micro_batch(128, 64, up_to(1000)), 64);
  EXPECT_EQ(fitting_micro_batch(128, 64, up_to(31)), 16);
  EXPECT_EQ(fitting_micro_batch(96, 64, up_to(1000)), 48);
  EXPECT_EQ(fitting_micro_batch(7, 64, up_to(6)), 1);
  EXPECT_EQ(fitting_micro_batch(128, 64, up_to(0)), 1);
}

ModelRunner::Options training(index_t micro_batch, DType compute) {
  return {.compute = compute,
          .micro_batch = micro_batch,
          .inputs_length = 512,
          .targets_length = 114,
          .train = true};
}

// A plan of a model whose bytes can be counted by hand: weights, masters and gradients, at least.
TEST(MicroBatch, ThePlanHoldsTheModelTwoOptimizersAndEachSequence) {
  const PlanBackend device;
  const Mesh mesh = Mesh::plan(Layout{}, 0, {2, 4});
  const ModelConfig config{.vocab_size = 1024,
                           .d_model = 256,
                           .d_kv = 64,
                           .d_ff = 512,
                           .num_heads = 4,
                           .num_layers = 2,
                           .num_decoder_layers = 2,
                           .kv_groups = 2,
                           .encoder_kv_groups = 4};
  const index_t parameters = parameter_count(config);
  const auto bytes = [&](index_t micro_batch, const char* optimizer) {
    return training_bytes(device, mesh, config, training(micro_batch, DType::kBFloat16), optimizer);
  };
  EXPECT_GT(bytes(1, "adafactor"), 10 * parameters);
  // Two moments in float32, but for work memory of each.
  EXPECT_NEAR(static_cast<double>(bytes(1, "adamw") - bytes(1, "adafactor")),
              8.0 * static_cast<double>(parameters), 0.8 * static_cast<double>(parameters));
  // What one sequence more takes is the same from any number on, but for rounding of memory.
  EXPECT_NEAR(static_cast<double>(bytes(8, "adafactor") - bytes(4, "adafactor")),
              static_cast<double>(bytes(4, "adafactor") - bytes(2, "adafactor")) * 2, 1 << 20);
}

// The paper's model on one GPU of 141 GB, which 64 sequences at once do not fit.
TEST(MicroBatch, XxlOfEightGroupsFitsOneH200) {
  ModelConfig config = t5_1_1("xxl");
  config.kv_groups = 8;
  const PlanBackend device;
  const Mesh mesh = Mesh::plan(Layout{}, 0, config.all_kv_groups());
  constexpr index_t kFree = index_t{141} * 1000 * 1000 * 1000;
  const index_t size = fitting_micro_batch(128, 64, [&](index_t micro_batch) {
    return training_bytes(device, mesh, config, training(micro_batch, DType::kBFloat16), "adafactor") +
               kUnplannedBytes <=
           kFree;
  });
  EXPECT_EQ(size, 16);
}

}  // namespace
}  // namespace regroup
