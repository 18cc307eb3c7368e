// The choice between our attention kernels and cuDNN's: by measurement, only where they agree, once a shape.
#include "kernels/cuda/attention_choice.h"

#include <cmath>

#include <gtest/gtest.h>

#include "kernels/base/random.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/simple_attention.h"
#include "kernels/make_backend.h"

namespace regroup::test {
namespace {

// Attention in cuDNN's place.
class StandIn final : public CudnnAttention {
 public:
  explicit StandIn(CudaDevice& device) : device_(device) {}
  bool supports(const AttentionCall&) override { return can; }
  bool supports(const AttentionCall&, const AttentionGradients&) override { return can; }
  void forward(const AttentionCall& call) override {
    ++forwards;
    simple_attention_forward(device_, as_done(call));
  }
  void backward(const AttentionCall& call, const AttentionGradients& gradients) override {
    ++backwards;
    simple_attention_backward(device_, as_done(call), gradients);
  }

  bool can = true, right = true;
  int forwards = 0, backwards = 0;

 private:
  AttentionCall as_done(AttentionCall call) const {
    if (!right) call.options.causal = !call.options.causal;
    return call;
  }
  CudaDevice& device_;
};

// One attention's operands on the device.
class Operands {
 public:
  Operands(Backend& backend, index_t queries) : backend_(backend) {
    call.q = random({kBatch, queries, kHeads, kChannels}, 0.3F);
    call.k = random({kBatch, kKeys, kGroups, kChannels}, 0.3F);
    call.v = random({kBatch, kKeys, kGroups, kChannels}, 1);
    call.bias = floats({kHeads, queries + kKeys - 1});
    call.out = random({kBatch, queries, kHeads, kChannels}, 1);
    call.log_sum_exp = floats({kBatch, kHeads, queries});
    call.options.padded_at_end = true;
    std::vector<std::int32_t> keys;
    for (index_t i = 0; i < kBatch * kKeys; ++i) keys.push_back(i % kKeys < kKeys / 2 ? 1 : 0);
    call.key_mask = make(DType::kInt32, {kBatch, kKeys});
    backend.copy_from_host(keys.data(), call.key_mask);
    gradients = {.dout = random({kBatch, queries, kHeads, kChannels}, 1),
                 .dq = random({kBatch, queries, kHeads, kChannels}, 1),
                 .dk = random({kBatch, kKeys, kGroups, kChannels}, 1),
                 .dv = random({kBatch, kKeys, kGroups, kChannels}, 1),
                 .dbias = floats({kHeads, queries + kKeys - 1})};
  }

  std::vector<float> dbias() const {
    std::vector<float> values(static_cast<std::size_t>(gradients.dbias.numel()));
    backend_.copy_to_host(gradients.dbias, values.data());
    return values;
  }
  void clear_dbias() { backend_.fill_zero(gradients.dbias); }

  AttentionCall call;
  AttentionGradients gradients;

 private:
  static constexpr index_t kBatch = 2, kKeys = 40, kHeads = 2, kGroups = 1, kChannels = 16;

  Tensor make(DType dtype, std::initializer_list<index_t> shape) {
    const Tensor like(nullptr, dtype, shape);
    buffers_.push_back(backend_.allocate(like.bytes()));
    return buffers_.back().tensor(dtype, shape);
  }
  Tensor random(std::initializer_list<index_t> shape, float deviation) {
    const Tensor tensor = make(DType::kBFloat16, shape);
    const Philox generator(buffers_.size(), RandomPurpose::kTest);
    std::vector<bfloat16> values;
    for (index_t i = 0; i < tensor.numel(); ++i) {
      values.emplace_back(deviation * static_cast<float>(generator.normal(static_cast<std::uint64_t>(i))));
    }
    backend_.copy_from_host(values.data(), tensor);
    return tensor;
  }
  Tensor floats(std::initializer_list<index_t> shape) { return make(DType::kFloat32, shape); }

  Backend& backend_;
  std::vector<Buffer> buffers_;
};

class AttentionChoiceTest : public testing::Test {
 protected:
  void SetUp() override {
    if (cuda_device_count() == 0) GTEST_SKIP() << "no GPU here";
    backend_ = std::make_unique<CudaBackend>(0, true);
  }
  // `cudnn_time`: what a run of the stand-in measures; the flash kernels' is 1.
  AttentionChoice choice(float cudnn_time, bool deterministic = false) {
    return AttentionChoice(backend_->device(),
                           {.deterministic = deterministic,
                            .log = Log(),
                            .make_cudnn =
                                [this] {
                                  auto made = std::make_unique<StandIn>(backend_->device());
                                  stand_in_ = made.get();
                                  made->right = right_;
                                  made->can = can_;
                                  return made;
                                },
                            .time =
                                [this, cudnn_time](const std::function<void()>& work) {
                                  ++timed_;
                                  const int before = stand_in_->forwards + stand_in_->backwards;
                                  work();
                                  const bool is_cudnn = stand_in_->forwards + stand_in_->backwards > before;
                                  return is_cudnn ? cudnn_time : 1.0F;
                                }});
  }

  std::unique_ptr<CudaBackend> backend_;
  StandIn* stand_in_ = nullptr;
  bool right_ = true, can_ = true;
  int timed_ = 0;
};

TEST_F(AttentionChoiceTest, TheFasterIsChosenOnceAndThenNothingIsMeasured) {
  for (const float time : {0.5F, 2.0F}) {
    Operands operands(*backend_, 64);
    AttentionChoice attention = choice(time);
    timed_ = 0;
    attention.forward(operands.call);
    attention.backward(operands.call, operands.gradients);
    EXPECT_EQ(timed_, 4);
    const int forwards = stand_in_->forwards, backwards = stand_in_->backwards;
    const CudaCounters before = backend_->device().counters();
    attention.forward(operands.call);
    attention.backward(operands.call, operands.gradients);
    EXPECT_EQ(timed_, 4);
    EXPECT_EQ(stand_in_->forwards, forwards + (time < 1 ? 1 : 0));
    EXPECT_EQ(stand_in_->backwards, backwards + (time < 1 ? 1 : 0));
    EXPECT_EQ(backend_->device().counters().allocations, before.allocations);
    EXPECT_EQ(backend_->device().counters().waits, before.waits);
    EXPECT_EQ(attention.chosen().find(time < 1 ? "flash" : "cuDNN"), std::string::npos) << attention.chosen();
  }
}

TEST_F(AttentionChoiceTest, TheTrialsAddNothingToTheBiasGradient) {
  Operands operands(*backend_, 64);
  AttentionChoice measured = choice(2), ours = choice(2, true);
  ours.forward(operands.call);
  ours.backward(operands.call, operands.gradients);
  const std::vector<float> expected = operands.dbias();
  operands.clear_dbias();
  measured.backward(operands.call, operands.gradients);
  EXPECT_EQ(timed_, 2);
  EXPECT_EQ(operands.dbias(), expected);
  EXPECT_GT(std::abs(expected[60]), 0);
}

TEST_F(AttentionChoiceTest, WrongResultsAreNeverChosen) {
  right_ = false;
  Operands operands(*backend_, 64);
  AttentionChoice attention = choice(0.5F);
  testing::internal::CaptureStderr();
  attention.forward(operands.call);
  attention.backward(operands.call, operands.gradients);
  const std::string warnings = testing::internal::GetCapturedStderr();
  EXPECT_NE(warnings.find("cuDNN's out is off"), std::string::npos) << warnings;
  EXPECT_NE(warnings.find("cuDNN's dq is off"), std::string::npos) << warnings;
  EXPECT_EQ(timed_, 0);
  EXPECT_EQ(stand_in_->forwards, 1);
  EXPECT_EQ(attention.chosen().find("cuDNN"), std::string::npos);
}

TEST_F(AttentionChoiceTest, WhatCudnnCannotDoIsOurs) {
  can_ = false;
  Operands operands(*backend_, 64);
  AttentionChoice attention = choice(0.5F);
  attention.forward(operands.call);
  EXPECT_EQ(stand_in_->forwards, 0);
  EXPECT_EQ(timed_, 0);
}

TEST_F(AttentionChoiceTest, CudnnIsNotEvenMadeWhereItMayNotBeChosen) {
  Operands operands(*backend_, 64), decoding(*backend_, 1);
  AttentionChoice deterministic = choice(0.5F, true);
  deterministic.forward(operands.call);
  AttentionChoice attention = choice(0.5F);
  attention.forward(decoding.call);
  operands.call.options.padded_at_end = false;
  attention.forward(operands.call);
  operands.call.options.padded_at_end = true;
  operands.call.options.dropout_rate = 0.1;
  operands.call.options.heads = 2;
  attention.forward(operands.call);
  EXPECT_EQ(stand_in_, nullptr);
}

TEST_F(AttentionChoiceTest, ANamedChoiceIsNotMeasured) {
  Operands operands(*backend_, 64);
  AttentionChoice first = choice(0.5F);
  first.forward(operands.call);
  const int measured = timed_;
  AttentionChoice second = choice(2);
  second.choose(first.chosen());
  second.forward(operands.call);
  EXPECT_EQ(timed_, measured);
  EXPECT_EQ(stand_in_->forwards, 1);
  EXPECT_EQ(second.chosen(), first.chosen());
  for (const char* damaged : {"", "[1]", "{\"a\": 1}", "{\"a\": \"fast\"}"}) {
    EXPECT_THROW(second.choose(damaged), UserError) << damaged;
  }
}

// On a GPU, with cuDNN: what it computes agrees, so it is chosen where it is said to be faster.
TEST_F(AttentionChoiceTest, CudnnAgrees) {
  AttentionChoiceOptions options = attention_choice_options(backend_->device(), false);
  if (options.make_cudnn() == nullptr) GTEST_SKIP() << "this build has no cuDNN attention";
  float time = 0;
  options.time = [&time](const std::function<void()>& work) {
    work();
    return ++time;  // cuDNN is timed first
  };
  for (const index_t queries : {64, 114, 512}) {
    for (const bool causal : {false, true}) {
      AttentionChoice attention(backend_->device(), options);
      Operands operands(*backend_, queries);
      operands.call.options.causal = causal;
      attention.forward(operands.call);
      attention.backward(operands.call, operands.gradients);
      EXPECT_EQ(attention.chosen().find("flash"), std::string::npos) << attention.chosen();
    }
  }
}

}  // namespace
}  // namespace regroup::test
