// Every op on every device: parity with a naive reference in three types, gradients, the same bits in every
// run and with any number of threads.
#include "tests/kernels/activation_cases.h"
#include "tests/kernels/cross_entropy_cases.h"
#include "tests/kernels/embedding_cases.h"
#include "tests/kernels/memory_cases.h"
#include "tests/kernels/norm_cases.h"
#include "tests/kernels/optimizer_cases.h"
#include "tests/support/devices.h"
#include "tests/support/gradient_check.h"

namespace regroup::test {
namespace {

std::vector<OpCase> all_cases() {
  std::vector<OpCase> all;
  for (const auto& part : {memory_cases(), norm_cases(), activation_cases(), embedding_cases(),
                           cross_entropy_cases(), optimizer_cases()}) {
    all.insert(all.end(), part.begin(), part.end());
  }
  return all;
}

// Sizes of a real step, and around those at which kernels cut their work.
std::vector<OpCase> larger_cases() {
  return {embedding_case(50, 97, 64, 3),
          embedding_backward_case(3000, 700, 24, 5),
          embedding_backward_case(2500, 70000, 8, 0),
          embedding_backward_case(5000, 3, 40, 0),
          embedding_backward_case(4097, 256, 9, 0),
          rms_norm_case(5, 4096),
          rms_norm_case(3, 1032),
          rms_norm_backward_case(100, 768, Residual::kInPlace),
          rms_norm_backward_case(17000, 8),
          gated_gelu_case(131, 304, 0.1),
          gated_gelu_backward_case(131, 304, 0.3),
          relu_case(131, 304, 0.1),
          relu_backward_case(131, 304, 0.3),
          dropout_add_case(131, 304, 0.1, DropoutUse::kIntoX),
          cross_entropy_case(9, 1024, 2048, 1e-2),
          cross_entropy_backward_case(9, 1024, 2048, 1e-3),
          cross_entropy_max_case(3, 32128),
          cross_entropy_sums_case(3, 32128),
          adafactor_factored_case(513, 768),
          adafactor_factored_case(129, 260),
          adafactor_factored_case(1000, 8),
          adafactor_full_case(3, 40000),
          adamw_case(3, 40000, true, true),
          adamw_case(1, 32769, false, true),
          relative_bias_case(2000, 1500, 3, true),
          relative_bias_backward_case(900, 800, 3, true),
          copy_case({2, 3, 5, 8}, 8, 0)};
}

std::vector<std::pair<OpCase, OpCase>> all_gradients() {
  std::vector<std::pair<OpCase, OpCase>> all;
  for (const auto& part :
       {norm_gradients(), activation_gradients(), embedding_gradients(), cross_entropy_gradients()}) {
    all.insert(all.end(), part.begin(), part.end());
  }
  return all;
}

using OpOnDevice = std::tuple<DeviceKind, OpCase>;
class OpCaseTest : public testing::TestWithParam<OpOnDevice> {};

TEST_P(OpCaseTest, AgreesWithTheReference) {
  const auto& [device, op] = GetParam();
  const auto backend = make_test_backend(device);
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16}) {
    expect_parity(*backend, op, dtype);
  }
}

TEST_P(OpCaseTest, SameBitsInEveryRun) {
  const auto& [device, op] = GetParam();
  const auto backends = backends_of_equal_bits(device);
  for (const DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16}) {
    expect_same_bits(backends, op, dtype);
  }
}

std::string name_of_case(const testing::TestParamInfo<OpOnDevice>& instance) {
  return test_name(std::get<0>(instance.param), std::get<1>(instance.param).name);
}

INSTANTIATE_TEST_SUITE_P(Ops, OpCaseTest,
                         testing::Combine(testing::ValuesIn(test_devices()), testing::ValuesIn(all_cases())),
                         name_of_case);
INSTANTIATE_TEST_SUITE_P(LargerOps, OpCaseTest,
                         testing::Combine(testing::ValuesIn(test_devices()),
                                          testing::ValuesIn(larger_cases())),
                         name_of_case);

using GradientOnDevice = std::tuple<DeviceKind, std::pair<OpCase, OpCase>>;
class GradientTest : public testing::TestWithParam<GradientOnDevice> {};

TEST_P(GradientTest, AgreesWithCentralDifferences) {
  const auto& [device, ops] = GetParam();
  expect_gradients(*make_test_backend(device, 1), ops.first, ops.second);
}

INSTANTIATE_TEST_SUITE_P(Ops, GradientTest,
                         testing::Combine(testing::ValuesIn(test_devices()),
                                          testing::ValuesIn(all_gradients())),
                         [](const auto& instance) {
                           return test_name(std::get<0>(instance.param),
                                            std::get<1>(instance.param).second.name);
                         });

TEST(Devices, Gpu) {
  if (cuda_device_count() == 0) GTEST_SKIP() << "no GPU: ops are tested on the CPU and in emulation only";
  EXPECT_FALSE(make_test_backend(DeviceKind::kCuda)->describe().empty());
}

}  // namespace
}  // namespace regroup::test
