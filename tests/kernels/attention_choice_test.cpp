// The choice between attention kernels: by measurement, only where they agree, once a shape.
#include "kernels/cuda/attention_choice.h"

#include <cmath>
#include <cstdlib>
#include <string>

#include <gtest/gtest.h>

#include "kernels/base/random.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/flash_attention.h"
#include "kernels/cuda/simple_attention.h"
#include "kernels/make_backend.h"

namespace regroup::test {
namespace {

// What a stand-in does wrong.
enum class Fault {
  kNone,
  kCannot,     // says that it supports nothing
  kWrong,      // computes another attention
  kBlind,      // takes no notice of the mask
  kIdle,       // writes nothing
  kFails,      // throws as cuDNN's calls do
  kNoMemory,   // throws as the device does that has no more memory
  kNeverMade,  // throws as it is made
};

// Attention in cuDNN's place.
class StandIn final : public CudnnAttention {
 public:
  StandIn(CudaDevice& device, const Fault& fault) : device_(device), fault_(fault) {}
  bool supports(const AttentionCall&) override { return fault_ != Fault::kCannot; }
  bool supports(const AttentionCall&, const AttentionGradients&) override { return fault_ != Fault::kCannot; }
  void forward(const AttentionCall& call) override {
    ++forwards;
    if (begins()) simple_attention_forward(device_, as_done(call));
  }
  void backward(const AttentionCall& call, const AttentionGradients& gradients) override {
    ++backwards;
    if (begins()) simple_attention_backward(device_, as_done(call), gradients);
  }

  int forwards = 0, backwards = 0;

 private:
  bool begins() const {
    if (fault_ == Fault::kFails) throw SystemError("attention failed: CUDNN_STATUS_EXECUTION_FAILED");
    if (fault_ == Fault::kNoMemory) throw UserError("1073741824 bytes of GPU memory were asked for");
    return fault_ != Fault::kIdle;
  }
  AttentionCall as_done(AttentionCall call) const {
    if (fault_ == Fault::kWrong) call.options.causal = !call.options.causal;
    if (fault_ == Fault::kBlind) call.key_mask = Tensor();
    return call;
  }
  CudaDevice& device_;
  const Fault& fault_;
};

// One attention's operands on the device.
class Operands {
 public:
  // Of each sample the first `shown` of kKeys keys are shown.
  Operands(Backend& backend, index_t queries, index_t shown = kKeys / 2) : backend_(backend) {
    call.q = random({kBatch, queries, kHeads, kChannels}, 0.3F);
    call.k = random({kBatch, kKeys, kGroups, kChannels}, 0.3F);
    call.v = random({kBatch, kKeys, kGroups, kChannels}, 1);
    call.bias = floats({kHeads, queries + kKeys - 1});
    call.out = random({kBatch, queries, kHeads, kChannels}, 1);
    call.log_sum_exp = floats({kBatch, kHeads, queries});
    call.options.padded_at_end = true;
    std::vector<std::int32_t> keys;
    for (index_t i = 0; i < kBatch * kKeys; ++i) keys.push_back(i % kKeys < shown ? 1 : 0);
    call.key_mask = make(DType::kInt32, {kBatch, kKeys});
    backend.copy_from_host(keys.data(), call.key_mask);
    gradients = {.dout = random({kBatch, queries, kHeads, kChannels}, 1),
                 .dq = random({kBatch, queries, kHeads, kChannels}, 1),
                 .dk = random({kBatch, kKeys, kGroups, kChannels}, 1),
                 .dv = random({kBatch, kKeys, kGroups, kChannels}, 1),
                 .dbias = floats({kHeads, queries + kKeys - 1})};
  }

  std::vector<float> dbias() const { return numbers<float>(gradients.dbias); }
  std::vector<bfloat16> out() const { return numbers<bfloat16>(call.out); }
  void clear_dbias() { backend_.fill_zero(gradients.dbias); }

  static constexpr index_t kKeys = 40;
  AttentionCall call;
  AttentionGradients gradients;

 private:
  static constexpr index_t kBatch = 2, kHeads = 2, kGroups = 1, kChannels = 16;

  template <class T>
  std::vector<T> numbers(const Tensor& tensor) const {
    std::vector<T> values(static_cast<std::size_t>(tensor.numel()));
    backend_.copy_to_host(tensor, values.data());
    return values;
  }

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
  // `cudnn_time`: what a run of the stand-in measures; another kernel's is 1, or, the second time that others
  // run forward, which is wgmma where the device has it, `wgmma_time`.
  AttentionChoice choice(float cudnn_time, bool deterministic = false, float wgmma_time = 3) {
    return AttentionChoice(backend_->device(),
                           {.deterministic = deterministic,
                            .log = Log(),
                            .make_cudnn =
                                [this] {
                                  if (fault_ == Fault::kNeverMade)
                                    throw SystemError("cudnnCreate failed: no such library");
                                  auto made = std::make_unique<StandIn>(backend_->device(), fault_);
                                  stand_in_ = made.get();
                                  return made;
                                },
                            .time =
                                [this, cudnn_time, wgmma_time](const std::function<void()>& work) {
                                  ++timed_;
                                  const int before = runs_of_stand_in();
                                  work();
                                  if (runs_of_stand_in() > before) return cudnn_time;
                                  return has_wgmma() && timed_ == 2 ? wgmma_time : 1.0F;
                                }});
  }
  bool has_wgmma() const { return backend_->device().compute_capability() == 90; }
  int runs_of_stand_in() const {
    return stand_in_ == nullptr ? 0 : stand_in_->forwards + stand_in_->backwards;
  }
  // Of forward and backward, each kernel that can do it.
  int kernels() const { return has_wgmma() ? 5 : 4; }
  std::string warnings_of(const std::function<void()>& work) {
    testing::internal::CaptureStderr();
    work();
    return testing::internal::GetCapturedStderr();
  }

  std::unique_ptr<CudaBackend> backend_;
  StandIn* stand_in_ = nullptr;
  Fault fault_ = Fault::kNone;
  int timed_ = 0;
};

TEST_F(AttentionChoiceTest, TheFastestIsChosenOnceAndThenNothingIsMeasured) {
  for (const float time : {0.5F, 2.0F}) {
    Operands operands(*backend_, 64);
    AttentionChoice attention = choice(time);
    timed_ = 0;
    attention.forward(operands.call);
    attention.backward(operands.call, operands.gradients);
    EXPECT_EQ(timed_, kernels());
    const int forwards = stand_in_->forwards, backwards = stand_in_->backwards;
    const CudaCounters before = backend_->device().counters();
    attention.forward(operands.call);
    attention.backward(operands.call, operands.gradients);
    EXPECT_EQ(timed_, kernels());
    EXPECT_EQ(stand_in_->forwards, forwards + (time < 1 ? 1 : 0));
    EXPECT_EQ(stand_in_->backwards, backwards + (time < 1 ? 1 : 0));
    EXPECT_EQ(backend_->device().counters().allocations, before.allocations);
    EXPECT_EQ(backend_->device().counters().waits, before.waits);
    EXPECT_EQ(attention.chosen().find(time < 1 ? "flash" : "cuDNN"), std::string::npos) << attention.chosen();
    EXPECT_EQ(attention.chosen().find("wgmma"), std::string::npos) << attention.chosen();
  }
}

TEST_F(AttentionChoiceTest, HoppersKernelIsChosenWhereItIsTheFastest) {
  if (!has_wgmma()) GTEST_SKIP() << "needs compute capability 9.0";
  for (const double dropout : {0.0, 0.1}) {
    Operands operands(*backend_, 64);
    operands.call.options.dropout_rate = dropout;
    operands.call.options.heads = 2;
    AttentionChoice attention = choice(0.5F, false, 0.25F);
    timed_ = 0;
    attention.forward(operands.call);
    EXPECT_NE(attention.chosen().find("wgmma"), std::string::npos) << attention.chosen();
    const std::vector<bfloat16> out = operands.out();
    AttentionChoice second = choice(0.5F);
    second.choose(attention.chosen());
    second.forward(operands.call);
    for (std::size_t i = 0; i < out.size(); ++i) ASSERT_EQ(operands.out()[i].bits, out[i].bits) << "at " << i;
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
  fault_ = Fault::kWrong;
  Operands operands(*backend_, 64);
  AttentionChoice attention = choice(0.5F);
  const std::string warnings = warnings_of([&] {
    attention.forward(operands.call);
    attention.backward(operands.call, operands.gradients);
  });
  EXPECT_NE(warnings.find("out of cuDNN is off"), std::string::npos) << warnings;
  EXPECT_NE(warnings.find("dq of cuDNN is off"), std::string::npos) << warnings;
  EXPECT_EQ(stand_in_->forwards, 1);
  EXPECT_EQ(attention.chosen().find("cuDNN"), std::string::npos);
}

// The first batch of a run may be of full length where later ones are not.
TEST_F(AttentionChoiceTest, MasksAreTriedThatTheFirstBatchDoesNotHave) {
  fault_ = Fault::kBlind;
  Operands operands(*backend_, 64, Operands::kKeys);
  AttentionChoice attention = choice(0.5F);
  const std::string warnings = warnings_of([&] {
    attention.forward(operands.call);
    attention.backward(operands.call, operands.gradients);
  });
  EXPECT_NE(warnings.find("of cuDNN is off"), std::string::npos) << warnings;
  EXPECT_EQ(stand_in_->forwards, 2);
  EXPECT_EQ(stand_in_->backwards, 2);
  EXPECT_EQ(attention.chosen().find("cuDNN"), std::string::npos);
}

TEST_F(AttentionChoiceTest, WhatIsThereAlreadyDoesNotPassForAResult) {
  Operands operands(*backend_, 64);
  AttentionChoice ours = choice(1, true);
  ours.forward(operands.call);
  ours.backward(operands.call, operands.gradients);
  fault_ = Fault::kIdle;
  AttentionChoice attention = choice(0.5F);
  attention.forward(operands.call);
  attention.backward(operands.call, operands.gradients);
  EXPECT_EQ(attention.chosen().find("cuDNN"), std::string::npos) << attention.chosen();
}

TEST_F(AttentionChoiceTest, AKernelThatFailsIsAWarning) {
  Operands expected(*backend_, 64), operands(*backend_, 64);
  AttentionChoice ours = choice(1, true);
  ours.forward(expected.call);
  ours.backward(expected.call, expected.gradients);
  for (const auto& [fault, reason] : {std::pair{Fault::kFails, "CUDNN_STATUS_EXECUTION_FAILED"},
                                      {Fault::kNoMemory, "of GPU memory"},
                                      {Fault::kNeverMade, "no such library"}}) {
    fault_ = fault;
    operands.clear_dbias();
    AttentionChoice attention = choice(0.5F);
    const std::string warnings = warnings_of([&] {
      attention.forward(operands.call);
      attention.backward(operands.call, operands.gradients);
    });
    EXPECT_NE(warnings.find(reason), std::string::npos) << warnings;
    EXPECT_EQ(attention.chosen().find("cuDNN"), std::string::npos);
    for (std::size_t i = 0; i < expected.out().size(); ++i) {
      ASSERT_EQ(operands.out()[i].bits, expected.out()[i].bits) << reason << ", at " << i;
    }
    EXPECT_EQ(operands.dbias(), expected.dbias()) << reason;
  }
}

TEST_F(AttentionChoiceTest, ANamedKernelThatFailsIsAWarningToo) {
  Operands operands(*backend_, 64);
  AttentionChoice first = choice(0.5F);
  first.forward(operands.call);
  fault_ = Fault::kNoMemory;
  AttentionChoice second = choice(0.5F);
  second.choose(first.chosen());
  const std::string warnings = warnings_of([&] { second.forward(operands.call); });
  EXPECT_NE(warnings.find("of GPU memory"), std::string::npos) << warnings;
  EXPECT_EQ(second.chosen().find("cuDNN"), std::string::npos) << second.chosen();
}

TEST_F(AttentionChoiceTest, WhatCudnnCannotDoIsOurs) {
  fault_ = Fault::kCannot;
  Operands operands(*backend_, 64);
  AttentionChoice attention = choice(0.5F);
  attention.forward(operands.call);
  EXPECT_EQ(stand_in_->forwards, 0);
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
  EXPECT_EQ(stand_in_->forwards, 2);  // the first to see that it starts
  EXPECT_EQ(second.chosen(), first.chosen());
  for (const char* damaged : {"", "[1]", "{\"a\": 1}", "{\"a\": \"fast\"}"}) {
    EXPECT_THROW(second.choose(damaged), UserError) << damaged;
  }
}

// What compute capability 8.6 and 8.9 allow a block holds no tiles of 128 channels with a bias.
TEST_F(AttentionChoiceTest, TilesThatDoNotFitAreLeftToLoops) {
  constexpr std::size_t kSharedBytes = 101376;
  setenv("REGROUP_EMULATED_SHARED_BYTES", std::to_string(kSharedBytes).c_str(), 1);
  CudaBackend small(0, true);
  unsetenv("REGROUP_EMULATED_SHARED_BYTES");
  const CudaDevice& device = small.device();
  if (device.properties().sharedMemPerBlockOptin != kSharedBytes) GTEST_SKIP() << "this GPU has more";
  for (const index_t channels : {64, 128}) {
    for (const bool bias : {false, true}) {
      Operands operands(*backend_, 64);
      AttentionCall& call = operands.call;
      AttentionGradients& gradients = operands.gradients;
      for (Tensor* x : {&call.q, &call.k, &call.v, &call.out, &gradients.dout, &gradients.dq, &gradients.dk,
                        &gradients.dv}) {
        x->shape[3] = channels;
      }
      if (!bias) call.bias = gradients.dbias = Tensor();
      EXPECT_TRUE(flash_attention_supports(device, call));
      EXPECT_EQ(flash_attention_supports(device, call, gradients), channels == 64 || !bias) << channels;
      EXPECT_TRUE(flash_attention_supports(backend_->device(), call, gradients));
    }
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
